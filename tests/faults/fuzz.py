"""Damages valid input in ways that nobody thought of, and reads what is left.

    python -m tests.faults.fuzz READER SECONDS

Hypothesis draws edits of valid bytes. A reader must return, or refuse in its own words: StageError,
UsageError, an Unreadable, a Fault, or the ValueError that its docstring names. Anything else is a
fault of the reader; so are 5 s and 1 GB for an example.
"""

import io
import json
import os
import pathlib
import resource
import struct
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from typing import NamedTuple

import hypothesis
import numpy as np
from hypothesis import strategies as st
from PIL import Image

from pipeline.cli.errors import StageError, UsageError
from pipeline.datasets import reader as dataset_reader
from pipeline.sources import SourceOptions, Unreadable, image_file, open_source
from pipeline.stages import manifest as manifest_lib

MOST_SECONDS, MOST_BYTES = 5.0, 1 << 30
EXAMPLES_A_ROUND = 200
IMAGES = np.arange(12 * 6 * 6, dtype=np.uint8).reshape(12, 6, 6)
LABELS = np.arange(12, dtype=np.uint8) % 3


class Target(NamedTuple):
    """A reader and its valid input."""

    seeds: Sequence[bytes]
    read: Callable[[bytes, pathlib.Path], None]  # Takes damaged bytes and an empty directory.


def read_source(spec: str, **options) -> None:
    """Opens a source and reads all of it, as preprocess does."""
    source = open_source(spec, SourceOptions(**options))
    num_records = sum(source.split_sizes.values())
    list(source.class_names), source.image_shape, source.fingerprint()
    indices = np.arange(min(num_records, 1000))
    source.ids(indices), [source.where(int(index)) for index in indices[:10]]
    images, labels = source.read(indices)
    assert len(labels) == len(indices)
    for image in images:
        assert isinstance(image, Unreadable) or (image.dtype == np.uint8 and image.ndim == 3)


def idx_bytes(array: np.ndarray, code: int = 8) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape) + array.tobytes()


def read_idx(data: bytes, directory: pathlib.Path) -> None:
    is_labels = data[3:4] in (b"\x01", b"\x02")
    files = {"images-idx3-ubyte": idx_bytes(IMAGES), "labels-idx1-ubyte": idx_bytes(LABELS)}
    files["labels-idx1-ubyte" if is_labels else "images-idx3-ubyte"] = data
    for name, contents in files.items():
        (directory / f"train-{name}").write_bytes(contents)
    read_source(f"idx:{directory}")


def npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npz_bytes(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return buffer.getvalue()


def read_npz(data: bytes, directory: pathlib.Path) -> None:
    (directory / "set.npz").write_bytes(data)
    read_source(f"npz:{directory}/set.npz")


def read_npz_member(data: bytes, directory: pathlib.Path) -> None:
    """A whole archive around a damaged array."""
    read_npz(npz_bytes(x_train=data, y_train=npy_bytes(LABELS)), directory)


def read_npy(data: bytes, directory: pathlib.Path) -> None:
    (directory / "cat.npy").write_bytes(data)
    (directory / "dog.npy").write_bytes(npy_bytes(IMAGES))
    read_source(f"npy:{directory}")


def csv_bytes(header: str = "", separator: str = ",") -> bytes:
    rows = np.c_[LABELS, IMAGES.reshape(12, -1)].tolist()
    return (header + "".join(separator.join(map(str, row)) + "\n" for row in rows)).encode()


def read_csv(data: bytes, directory: pathlib.Path) -> None:
    (directory / "set.csv").write_bytes(data)
    read_source(f"csv:{directory}/set.csv")


def image_bytes(kind: str, mode: str = "RGB", **options) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3)).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def read_image(data: bytes, directory: pathlib.Path) -> None:
    for number in range(2):
        path = directory / "cat" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data if number else image_bytes("PNG"))
    try:
        image_file.decode(data, background="#ffffff", allow_tiff=True)
    except ValueError:
        pass
    read_source(f"folder:{directory}", allow_tiff=True)


def parquet_bytes(**options) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [{"bytes": image_bytes("PNG", "L"), "path": None} for _ in range(12)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(images, kind), "label": pa.array(LABELS.tolist())})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


def read_parquet(data: bytes, directory: pathlib.Path) -> None:
    (directory / "train.parquet").write_bytes(data)
    read_source(f"parquet:{directory}/train.parquet")


def tfrecord_bytes(compression: str = "none") -> bytes:
    from pipeline.formats import tf_example, tfrecord

    buffer = io.BytesIO()
    records = (tf_example.encode(b"%d" % i, bytes(36), i - 1) for i in range(5))
    tfrecord.write(buffer, f"x{tfrecord.suffix(compression)}", records)
    return buffer.getvalue()


def read_tfrecord(data: bytes, directory: pathlib.Path) -> None:
    del directory
    for path in ("x.tfrecord", "x.tfrecord.gz"):
        for _ in dataset_reader.parse_records(data, path, (6, 6, 1)):
            pass


def manifest_bytes() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        from tests.conftest import make_shards

        write = pathlib.Path(directory, "set.npz").write_bytes
        write(npz_bytes(x_train=npy_bytes(IMAGES), y_train=npy_bytes(LABELS)))
        make_shards(f"npz:{directory}/set.npz", f"{directory}/out", num_shards=1)
        return pathlib.Path(directory, "out", "manifest.json").read_bytes()


def read_manifest(data: bytes, directory: pathlib.Path) -> None:
    (directory / "manifest.json").write_bytes(data)
    manifest_lib.read_manifest(str(directory), "preprocess", "--data_dir")
    dataset = dataset_reader.Dataset(str(directory))
    for split in dataset.splits:
        for entry in dataset.shards(split):
            dataset.read_shard(entry)


def targets() -> dict[str, Callable[[], Target]]:
    """Name of a reader -> a function that makes its valid input."""
    arrays = [
        IMAGES,
        IMAGES.reshape(12, 36),
        IMAGES / np.float32(255),
        np.asfortranarray(IMAGES),
        IMAGES.astype(">i4"),
        IMAGES > 100,
    ]
    return {
        "idx": lambda: Target(
            [idx_bytes(IMAGES), idx_bytes(LABELS), idx_bytes(IMAGES.astype(">i4"), 12)], read_idx
        ),
        "npz": lambda: Target(
            [npz_bytes(x_train=npy_bytes(IMAGES), y_train=npy_bytes(LABELS))], read_npz
        ),
        "npz_member": lambda: Target(list(map(npy_bytes, arrays)), read_npz_member),
        "npy": lambda: Target(list(map(npy_bytes, arrays)), read_npy),
        "csv": lambda: Target(
            [
                csv_bytes(),
                csv_bytes("label," + ",".join(f"pixel{i}" for i in range(36)) + "\n"),
                csv_bytes("id;" + ";".join(f"p{i}" for i in range(36)) + "\n", ";"),
                csv_bytes().replace(b"\n", b"\r\n"),
                csv_bytes().decode().encode("utf-16"),
            ],
            read_csv,
        ),
        "image": lambda: Target(
            [
                *map(image_bytes, ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")),
                image_bytes("PNG", "LA"),
                image_bytes("PNG", "P"),
                image_bytes("PNG", "I;16"),
                image_bytes("JPEG", "CMYK"),
                image_bytes("TIFF", compression="tiff_lzw"),
                image_bytes("JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\3\0\1\0\0\0\6"),
            ],
            read_image,
        ),
        "parquet": lambda: Target(
            [
                parquet_bytes(),
                parquet_bytes(compression="zstd", row_group_size=5),
                parquet_bytes(compression="none", use_dictionary=False, data_page_version="2.0"),
            ],
            read_parquet,
        ),
        "tfrecord": lambda: Target([tfrecord_bytes(), tfrecord_bytes("gzip")], read_tfrecord),
        "manifest": lambda: Target([manifest_bytes()], read_manifest),
    }


_NUMBERS = (0, 1, 0x7F, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_SNIPPETS = (b"", b",", b"\n", b'"', b"\r", b"-1", b"1e309", b"nan", b"\0", b"\xff", b"../", b"[]")
_SNIPPETS += (b"{}", b"null", b"99999999999999999999", b"'", b";", b"\t", b"\xef\xbb\xbf")


@st.composite
def damaged(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """A valid file with up to six edits, or any bytes."""
    if draw(st.integers(0, 19)) == 0:
        return draw(st.binary(max_size=200))
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 6))):
        # Headers and footers hold what a reader trusts.
        position = draw(
            st.integers(0, len(data))
            | st.integers(0, min(len(data), 96))
            | st.integers(max(0, len(data) - 600), len(data))
        )
        length = draw(st.integers(0, 12) | st.integers(0, len(data)))
        match draw(st.sampled_from(["byte", "number", "cut", "copy", "insert", "end"])):
            case "byte" if position < len(data):
                data[position] = draw(st.integers(0, 255))
            case "number":
                order = draw(st.sampled_from("<>"))
                number = struct.pack(f"{order}I", draw(st.sampled_from(_NUMBERS)))
                data[position : position + 4] = number
            case "cut":
                del data[position : position + length]
            case "copy":
                data[position:position] = data[position : position + length]
            case "insert":
                data[position:position] = draw(st.sampled_from(_SNIPPETS) | st.binary(max_size=8))
            case "end":
                del data[position:]
    return bytes(data)


def check(target: Target, data: bytes) -> None:
    """Reads damaged bytes; raises an AssertionError or what the reader should not raise."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    started = time.process_time()
    with tempfile.TemporaryDirectory() as directory:
        try:
            target.read(data, pathlib.Path(directory))
        except (StageError, UsageError) as error:
            assert len(str(error)) < 3_000, "a message of pages"
    secs = time.process_time() - started
    assert secs < MOST_SECONDS, f"{secs:.1f} s"
    num_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    assert num_bytes < MOST_BYTES, f"{num_bytes >> 20} MiB"


def fuzz(name: str, seconds: float, *, max_examples: int = EXAMPLES_A_ROUND, seed=None) -> int:
    """Reads damaged input for some seconds, at least one round; returns the number of examples."""
    target = targets()[name]()
    for data in target.seeds:
        check(target, data)
    end, count = time.monotonic() + seconds, 0

    @hypothesis.settings(
        max_examples=max_examples,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(damaged(target.seeds))
    def round_of_examples(data: bytes) -> None:
        nonlocal count
        count += 1
        try:
            check(target, data)
        except BaseException:
            with tempfile.NamedTemporaryFile(
                delete=False, prefix=f"fault-{name}-", suffix=".bin"
            ) as file:
                file.write(data)
            raise

    while True:
        number = int.from_bytes(os.urandom(4), "big") if seed is None else seed
        hypothesis.seed(number)(round_of_examples)()
        if time.monotonic() >= end:
            return count


def main() -> None:
    name, seconds = sys.argv[1:]
    print(json.dumps({"reader": name, "examples": fuzz(name, float(seconds))}))


if __name__ == "__main__":
    main()
