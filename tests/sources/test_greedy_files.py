"""Small files that would eat the machine: refused or quarantined, by what their headers say."""

import functools
import gzip
import io
import os
import socket
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline import sources
from pipeline.cli.errors import StageError, UsageError
from pipeline.datasets.building import create as create_set
from pipeline.sources import conversion, image_file
from pipeline.storage import trees
from tests.conftest import REPOSITORY, make_folder_set, write_idx


def chunk(kind: bytes, data: bytes) -> bytes:
    crc = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + crc


@functools.cache
def png_of_many_pixels() -> bytes:
    """20 kB."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("1", (13_000, 13_000)).save(buffer, "PNG")
    return buffer.getvalue()


def png_of_much_text() -> bytes:
    """60 chunks of 1 kB that unpack to a megabyte each."""
    text = zlib.compress(b"a" * 1_040_000, 9)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0))
    texts = [chunk(b"zTXt", b"k%d\0\0" % number + text) for number in range(60)]
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 72))
    return b"".join([b"\x89PNG\r\n\x1a\n", head, *texts, pixels, chunk(b"IEND", b"")])


def tiff(*tags: tuple[int, int, int, int], data: bytes) -> bytes:
    """A TIFF of a header, data from byte 8 on, and one directory of (tag, type, count, value)."""
    data += b"\0" * (len(data) % 2)
    entries = b"".join(struct.pack("<HHLL", *tag) for tag in tags)
    directory = struct.pack("<H", len(tags)) + entries + b"\0" * 4
    return b"II*\0" + struct.pack("<L", 8 + len(data)) + data + directory


def tiff_of_overlapping_tags() -> bytes:
    """200 tags that all are the same megabyte."""
    tags = [(40_000 + number, 7, 1 << 20, 8) for number in range(200)]
    return tiff(*tags, data=b"\0" * (1 << 20))


@functools.cache
def tiff_of_a_large_tile() -> bytes:
    """An image of 10×10 pixels in a tile of 144 million."""
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(b"\0" * 1_440_000) for _ in range(100)) + packer.flush()
    size = [(256, 4, 1, 10), (257, 4, 1, 10), (322, 4, 1, 12_000), (323, 4, 1, 12_000)]
    of_pixels = [(258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
    where = [(324, 4, 1, 8), (325, 4, 1, len(packed))]
    return tiff(*sorted([*size, *of_pixels, *where]), data=packed)


def gif_of_comments() -> bytes:
    """10 MB of them, which Pillow takes a minute and a half to join."""
    return b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0, 0, 0) + b"!\xfe" + b"\xff".ljust(256) * 40_000


def webp_of_many_pixels() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "WEBP", lossless=True)
    small, side = struct.pack("<I", 7)[:3] * 2, struct.pack("<I", 16_382)[:3]
    frame = b"\0" * 6 + small + b"\1\0\0\0" + buffer.getvalue()[12:]
    parts = [
        (b"VP8X", b"\2\0\0\0" + side * 2),
        (b"ANIM", b"\0" * 6),
        (b"ANMF", frame),
    ]
    body = b"".join(name + struct.pack("<I", len(data)) + data for name, data in parts)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


BOMBS = [
    (
        png_of_many_pixels,
        "^13000×13000 = 169,000,000 pixels, expected at most 16,000,000: --max",
    ),
    (png_of_much_text, "Too much memory used in text chunks"),
    (tiff_of_overlapping_tags, "a header that is out of proportion to the file"),
    (tiff_of_a_large_tile, "^tiles of 12000×12000 = 144,000,000 pixels, expected at most"),
    (gif_of_comments, "a header that is out of proportion to the file"),
    (webp_of_many_pixels, "^16383×16383 = 268,402,689 pixels"),
]


@pytest.mark.parametrize(("make", "reason"), BOMBS)
def test_a_bomb_is_known_by_its_header(make, reason):
    with pytest.raises(ValueError, match=reason):
        image_file.decode(make(), allow_tiff=True)
    with pytest.raises(ValueError, match=reason):
        image_file.read_header(io.BytesIO(make()), allow_tiff=True)


def test_the_notes_of_a_jpeg_are_no_more_than_it_is():
    """They make no pixels, so the image can be had."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("L", (8, 8), 7).save(buffer, "JPEG")
    jpeg = buffer.getvalue()
    tags = [(1_000 + number, 7, 33_000, 30_100) for number in range(2_500)]
    entries = b"".join(struct.pack("<HHLL", *tag) for tag in tags)
    notes = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries
    notes = b"Exif\0\0" + notes.ljust(65_400, b"\0")
    jfif_end = 4 + struct.unpack(">H", jpeg[4:6])[0]
    data = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(notes) + 2) + notes + jpeg[jfif_end:]
    tracemalloc.start()
    try:
        assert image_file.decode(data).tolist() == np.full((8, 8, 1), 7).tolist()
        assert tracemalloc.get_traced_memory()[1] < 10e6  # Of 82 MB that they would be.
    finally:
        tracemalloc.stop()


READ_ALL = """
import resource, sys
import numpy as np
from PIL import Image
from pipeline.sources import conversion
source = conversion.open_converted(conversion.SourceSpec(sys.argv[1]))
source.fingerprint()
source = conversion.open_converted(source.for_workers())
records = source.read(np.arange(source.num_records))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(len(records.places), len(records.faults), peak)
"""


def read_in_a_process(spec: str) -> tuple[int, int, float]:
    """Reads a source; how many records there are, how many are bad, and peak memory in MB."""
    command = [sys.executable, "-c", READ_ALL, spec]
    done = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    good, bad, peak = map(int, done.stdout.split())
    return good, bad, peak / (1024 if sys.platform == "linux" else 1024**2)


def test_bombs_take_no_memory(tmp_path):
    from PIL import Image

    folder = make_folder_set(tmp_path / "set", num_train=200, num_test=5)
    good, bad, without = read_in_a_process(f"folder:{folder}")
    assert (good, bad) == (205, 0)
    for number in range(8):
        (folder / "train" / "class 1" / f"bomb {number}.png").write_bytes(png_of_many_pixels())
        # No bombs, but each for itself: together they take 192 MB.
        Image.new("RGB", (2_000, 2_000)).save(folder / "train" / "class 2" / f"large {number}.png")
    for make, _ in BOMBS:
        (folder / "train" / "class 3" / f"{make.__name__}.png").write_bytes(make())
    (folder / "train" / "class 4" / "endless.png").symlink_to("/dev/zero")
    with open(folder / "train" / "class 5" / "sparse.png", "wb") as file:
        file.truncate(1 << 40)
    good, bad, with_bombs = read_in_a_process(f"folder:{folder}")
    assert (good, bad) == (205, 24)
    assert with_bombs - without < 60, (with_bombs, without)


def test_images_are_decoded_one_by_one_and_not_kept():
    made = []
    images = sources.OneByOne(lambda place: made.append(place) or np.full(1, place), 3)
    assert len(images) == 3 and not made
    assert next(iter(images)) == 0 and made == [0]
    assert [int(image[0]) for image in images] == [0, 1, 2]
    assert images[2] == 2
    with pytest.raises(IndexError):
        images[3]


def test_the_limit_is_a_setting_of_the_set_where_it_is_not_the_default(tmp_path):
    folder = make_folder_set(tmp_path / "set", num_train=6, num_test=2)  # 12×8 pixels.

    def identity_and_faults(**settings):
        source_spec = conversion.SourceSpec(f"folder:{folder}", **settings)
        source = conversion.open_converted(source_spec)
        return create_set.source_identity(source_spec, source), source.read(np.arange(8)).faults

    assert "max_image_pixels" not in identity_and_faults()[0]
    made_from, faults = identity_and_faults(max_image_pixels=96)
    assert made_from["max_image_pixels"] == 96 and not faults
    with pytest.raises(StageError, match=r"none of its 8 images can be opened .*12×8 = 96 "):
        identity_and_faults(max_image_pixels=95)
    with pytest.raises(UsageError, match="--max_image_pixels=95: applies to folder:… and parquet"):
        conversion.open_converted(conversion.SourceSpec("sample", max_image_pixels=95))


# What is no regular file.


def make_pipe(path) -> None:
    os.mkfifo(path)


def make_socket(path) -> None:
    directory = os.getcwd()
    os.chdir(path.parent)  # The name of a socket is short.
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(directory)


def make_device(path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("make", "kind"),
    [(make_pipe, "is a pipe"), (make_socket, "is a socket"), (make_device, "is a device")],
)
def test_only_regular_files_are_opened(tmp_path, make, kind):
    make(tmp_path / "odd")
    for spec in (f"npz:{tmp_path}/odd", f"csv:{tmp_path}/odd"):
        with pytest.raises(StageError, match=f"odd: {kind}; expected a regular file"):
            sources.open_source(spec)
    idx = tmp_path / "idx"
    idx.mkdir()
    write_idx(idx / "train-labels-idx1-ubyte", np.zeros(3, np.uint8))
    (idx / "train-images-idx3-ubyte").symlink_to(tmp_path / "odd")
    with pytest.raises(StageError, match=f"{kind}; expected a regular file"):
        sources.open_source(f"idx:{idx}")
    folder = make_folder_set(tmp_path / "folder", num_train=6, num_test=2)
    (next(folder.rglob("*.png")).parent / "link.png").symlink_to(tmp_path / "odd")
    source = conversion.open_converted(conversion.SourceSpec(f"folder:{folder}"))
    [(_, reason)] = source.read(np.arange(9)).faults
    assert reason == f"{kind}, expected a file"


def test_a_jpeg_of_hundreds_of_scans_is_not_decoded():
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "JPEG", progressive=True)
    assert image_file.decode(buffer.getvalue()).shape == (8, 8, 1)
    with pytest.raises(ValueError, match="scans of a JPEG, expected at most 500"):
        image_file.decode(buffer.getvalue() + b"\xff\xda" * 500)


# Links between directories.


def test_a_link_to_itself_is_a_record_that_cannot_be_had_or_none(tmp_path):
    place = make_folder_set(tmp_path / "set", num_train=3, num_test=1)
    (place / "loop").symlink_to("loop")
    (place / "train" / "class 0").mkdir(exist_ok=True)
    (place / "train" / "class 0" / "loop.png").symlink_to("loop.png")
    source = sources.open_source(f"folder:{place}")
    assert source.split_sizes == {"train": 4, "test": 1}
    images, _ = source.read(np.arange(5))
    assert sum(isinstance(image, sources.Unreadable) for image in images) == 1


def test_each_directory_is_listed_once(tmp_path):
    siblings = [tmp_path / "set" / name for name in "abcdefghi"]
    for directory in siblings:
        directory.mkdir(parents=True)
        (directory / "1.png").write_bytes(b"")
    for directory in siblings:
        for other in siblings:
            (directory / f"to {other.name}").symlink_to(other)
    tree = trees.read_tree(str(tmp_path / "set"))
    assert list(tree.stamps) == [f"{name}/1.png" for name in "abcdefghi"]
    assert len(tree.skipped_links) == 81
    source = sources.open_source(f"folder:{tmp_path / 'set'}")
    assert source.split_sizes == {"unsplit": 9}
    assert "81 links to directories that are already listed" in source.notes[0]


@pytest.mark.parametrize("first", ["0", "z"])
def test_a_directory_s_own_path_goes_before_links_and_of_links_the_first(tmp_path, first):
    inside, outside = tmp_path / "set", tmp_path / "outside"
    for directory in (inside / "m", outside / "deep"):
        directory.mkdir(parents=True)
        (directory / "1.png").write_bytes(b"")
    (inside / first).symlink_to(inside / "m")  # Sorts before or after it.
    names = ["p", "q", "r"] if first == "0" else ["r", "q", "p"]  # Made in either order.
    for name in names:
        (inside / name).symlink_to(outside / "deep" if name == "q" else outside)
    tree = trees.read_tree(str(inside))
    assert list(tree.stamps) == ["m/1.png", "p/deep/1.png"]
    assert tree.skipped_links == sorted([first, "q", "r"])


# Archives that contradict themselves.


def write_npz(path, members: dict[str, tuple[np.ndarray, bytes]], **settings) -> str:
    """Arrays whose header says one thing, and the bytes that follow; the spec."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, (like, data) in members.items():
            buffer = io.BytesIO()
            about = np.lib.format.header_data_from_array_1_0(like)
            np.lib.format.write_array_header_1_0(buffer, about)
            archive.writestr(f"{key}.npy", buffer.getvalue() + data, **settings)
    return f"npz:{path}"


IMAGES, LABELS = np.zeros((3, 4, 4), np.uint8), np.arange(3)


@pytest.mark.parametrize(
    ("members", "settings", "message"),
    [
        (
            {"x": (IMAGES, b"\0" * 3_000_000)},
            {},
            r"x: its header states uint8 \(3, 4, 4\), but it holds 3000000",
        ),
        (
            {"y": (LABELS, b"\0" * 3_000_000)},
            {},
            r"y: its header states int64 \(3,\), but it holds 3000000",
        ),
        (
            {"y": (np.broadcast_to(0, 400_000), b"\0" * 3_200_000)},
            {},
            r"3 images and labels int64 \(400000,\); expected one integer for each",
        ),
        (
            {"x": (IMAGES, IMAGES.tobytes())},
            {"compress_type": 12},
            "compressed with another method",
        ),
        (
            {"x": (IMAGES, IMAGES.tobytes())},
            {"compress_type": 14},
            "compressed with another method",
        ),
    ],
    ids=["images", "labels", "many labels", "bzip2", "lzma"],
)
def test_of_an_npz_nothing_is_unpacked_before_its_headers_are_believed(
    tmp_path, monkeypatch, members, settings, message
):
    whole = {"x": (IMAGES, IMAGES.tobytes()), "y": (LABELS, LABELS.tobytes())}
    spec = write_npz(tmp_path / "set.npz", whole | members, **settings)
    del members
    monkeypatch.setattr("tempfile.TemporaryFile", lambda: pytest.fail("it was unpacked"))
    with pytest.raises(StageError, match=message):
        sources.open_source(spec)


def test_an_npz_that_holds_less_than_both_its_headers_say(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for key, array in (("x", IMAGES), ("y", LABELS)):
            with archive.open(f"{key}.npy", "w") as file:
                about = np.lib.format.header_data_from_array_1_0(array)
                np.lib.format.write_array_header_1_0(file, about)
                file.write(array.tobytes()[:-1])
            archive.filelist[-1].file_size += 1
    with pytest.raises(
        StageError, match=r"x: its header states uint8 \(3, 4, 4\), but it holds 47 bytes"
    ):
        sources.open_source(f"npz:{tmp_path}/set.npz")


def test_a_header_of_an_npz_that_is_no_end(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        head = b"\x93NUMPY\x02\x00" + struct.pack("<I", 3_000_000)
        for key in "xy":
            archive.writestr(f"{key}.npy", head + b" " * 3_000_000, compresslevel=1)
    with pytest.raises(StageError, match="x: not a NumPy array .*reading array header"):
        sources.open_source(f"npz:{tmp_path}/set.npz")


def packed_idx(num_images: int, data: bytes) -> bytes:
    return gzip.compress(struct.pack(">HBBIII", 0, 8, 3, num_images, 4, 4) + data, 1)


FORGED = packed_idx(3, b"\0" * 100_000_000)[:-4] + struct.pack("<I", 64)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (packed_idx(3, b"\0" * 30_000_000), r"its header states 64 bytes, its end 30000016\); d"),
        (
            packed_idx(2**32 - 1, b"\0" * 48),
            r"states 68719476736 bytes, but \d+ compressed bytes hold at m",
        ),
        (FORGED, "states 3×4×4 = 48 bytes, the file holds 49 or more"),
    ],
    ids=["more", "less", "more, and forged"],
)
def test_a_packed_idx_file_is_unpacked_as_far_as_it_promises(tmp_path, data, message):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(data)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(3, np.uint8))
    with pytest.raises(StageError, match=message):
        sources.open_source(f"idx:{tmp_path}")


def test_a_packed_idx_file_of_several_members_is_whole(tmp_path):
    images = np.arange(48, dtype=np.uint8).reshape(3, 4, 4)
    whole = gzip.decompress(packed_idx(3, images.tobytes()))
    parts = [gzip.compress(whole[:10]), gzip.compress(whole[10:50]), gzip.compress(whole[50:])]
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"".join(parts))
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(3, np.uint8))
    read_images, _ = sources.open_source(f"idx:{tmp_path}").read(np.arange(3))
    np.testing.assert_array_equal(read_images[..., 0], images)
