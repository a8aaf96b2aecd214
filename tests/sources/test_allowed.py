"""What is read only if asked for: TIFFs, and sets whose code comes from elsewhere."""

import io
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.api import preprocess
from pipeline.cli.errors import StageError, UsageError
from pipeline.datasets.building import create
from pipeline.sources import SourceOptions, Unreadable, conversion, image_file, open_source
from pipeline.sources.images import bounded_image
from tests.forked import run_command

PIXELS = np.arange(64, dtype=np.uint8).reshape(8, 8)
ALLOWED = SourceOptions(allow_tiff=True)


def encoded(kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, kind, **options)
    return buffer.getvalue()


def spec_of(kind: str, directory, *images: bytes) -> str:
    """A folder, or a Parquet file, of images."""
    if kind == "parquet":
        pq.write_table(pa.table({"image": images}), directory / "set.parquet")
        return f"parquet:{directory}/set.parquet"
    for number, data in enumerate(images):  # The first bytes decide, and not the ending.
        (directory / f"{number}.png").write_bytes(data)
    return f"folder:{directory}"


@pytest.mark.parametrize("kind", ["folder", "parquet"])
@pytest.mark.parametrize("options", [{}, {"big_tiff": True}, {"compression": "tiff_lzw"}])
def test_a_tiff_is_read_only_if_asked_for(tmp_path, kind, options):
    spec = spec_of(kind, tmp_path, encoded("PNG"), encoded("TIFF", **options))
    refused, allowed = open_source(spec), open_source(spec, ALLOWED)
    image, unread = refused.read(np.arange(2))[0]
    assert isinstance(unread, Unreadable) and unread.reason.endswith("set --allow_tiff")
    np.testing.assert_array_equal(image[..., 0], PIXELS)
    assert refused.image_shape == (8, 8, 1) and "--allow_tiff" in "".join(refused.notes)
    for image in allowed.read(np.arange(2))[0]:
        np.testing.assert_array_equal(image[..., 0], PIXELS)


def test_other_formats_of_pillow_are_no_images():
    Image.init()
    others = sorted(Image.SAVE.keys() - {*bounded_image.FORMATS, "TIFF", "MPO"})
    assert len(others) > 10 and not {"EPS", "PDF", "PSD"} & {*bounded_image.FORMATS}
    for kind in others:
        try:
            data = encoded(kind)
        except (OSError, ValueError, KeyError):  # Not for grey images, or not for reading.
            continue
        with pytest.raises(ValueError, match="bytes that are no image"):
            image_file.decode(data, allow_tiff=True)


@pytest.mark.parametrize("start", ["II*\0", "MM\0*", "MM*\0", "II\0*", "II+\0", "MM\0+"])
def test_pillow_s_tiff_reader_sees_no_byte_of_a_refused_file(monkeypatch, start):
    from PIL import TiffImagePlugin

    def read(self):
        raise AssertionError("the file was opened as a TIFF")

    monkeypatch.setattr(TiffImagePlugin.TiffImageFile, "_open", read)
    for act in (image_file.decode, lambda data: image_file.read_header(io.BytesIO(data))):
        with pytest.raises(ValueError, match="set --allow_tiff"):
            act(start.encode() + bytes(100))


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_the_flag_is_no_part_of_an_id(tmp_path, kind):
    """So data sets of TIFFs that exist keep theirs; without the flag the source is another."""
    (tmp_path / "set").mkdir()
    spec = spec_of(kind, tmp_path / "set", encoded("PNG"), encoded("TIFF"))
    assert open_source(spec).fingerprint() != open_source(spec, ALLOWED).fingerprint()
    source = conversion.open_converted(conversion.SourceSpec(spec, allow_tiff=True))
    assert "allow_tiff" not in create.source_identity(source.source_spec, source)


def test_a_set_of_tiffs_names_the_flag(tmp_path):
    (tmp_path / "set").mkdir()
    spec = spec_of("folder", tmp_path / "set", encoded("TIFF"))
    out = tmp_path / "out"
    done = run_command(
        "pipeline.preprocess", f"--source={spec}", f"--output_dir={out}", check=False
    )
    assert done.returncode == 1 and "--allow_tiff" in done.stderr and not out.exists()
    with pytest.raises(StageError, match="--allow_tiff"):
        preprocess(spec, out)
    assert sum(preprocess(spec, out, allow_tiff=True).splits.values()) == 1


def test_the_flag_applies_to_image_files_alone():
    with pytest.raises(UsageError, match="--allow_tiff=True: applies to folder:… and parquet"):
        open_source("sample", ALLOWED)


@pytest.mark.parametrize(
    "name", ["huggingface:mnist", "kaggle:a/b:1.0.0", "my-name:a", "robotics:a/b/c=1", "a:b:*.*.*"]
)
def test_a_community_set_is_refused_unless_asked_for(monkeypatch, name):
    import tensorflow_datasets as tfds

    def builder(name, **_):  # The real one would reach for another host.
        raise ValueError(f"asked for {name}")

    monkeypatch.setattr(tfds, "builder", builder)
    with pytest.raises(UsageError, match="a community set .* --allow_tfds_namespace"):
        open_source(f"tfds:{name}")
    with pytest.raises(StageError, match=f"asked for {re.escape(name)}"):
        open_source(f"tfds:{name}", SourceOptions(allow_tfds_namespace=True))


@pytest.mark.parametrize("name", ["nosuch", "nosuch/config", "nosuch:1.0.0", "nosuch/config:1.*.*"])
def test_configs_and_versions_are_no_namespaces(tmp_path, name):
    with pytest.raises(StageError, match="tensorflow-datasets has no such set"):
        open_source(f"tfds:{name}", SourceOptions(tfds_data_dir=str(tmp_path)))


def test_the_flag_of_community_sets_is_checked_before_a_job(tmp_path):
    done = run_command(
        "pipeline.preprocess", "--source=tfds:kaggle:a", f"--output_dir={tmp_path}/out", check=False
    )
    assert done.returncode == 2 and "--allow_tfds_namespace" in done.stderr
    assert not (tmp_path / "out").exists()
