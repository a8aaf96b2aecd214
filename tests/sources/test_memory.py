"""With a memory a source gives the same as without, and does not open what has not changed."""

import io
import json
import os
import pathlib
import shutil
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.sources import conversion, memory
from pipeline.sources.options import SourceOptions
from tests.conftest import blobs, make_idx_set
from tests.storage.object_stores import BUCKET

SECOND = 1_000_000_000
_WATCHED: list[tuple[str, set[str]]] = []


def _watch(event: str, args: tuple) -> None:
    if event == "open" and _WATCHED and isinstance(args[0], str):
        place, opened = _WATCHED[-1]
        if args[0].startswith(place):
            opened.add(os.path.relpath(args[0], place))


sys.addaudithook(_watch)  # It stays as long as the process.


class Opened:
    """The files below a directory that are opened in a block."""

    def __init__(self, place):
        self.files: set[str] = set()
        self._place = f"{place}{os.sep}"

    def __enter__(self) -> set[str]:
        _WATCHED.append((self._place, self.files))
        return self.files

    def __exit__(self, *_) -> None:
        _WATCHED.pop()


class Clock:
    """Times for files, each another one, all long ago."""

    def __init__(self):
        self.now = 1_600_000_000 * SECOND

    def stamp(self, path: pathlib.Path) -> pathlib.Path:
        self.now += 1_000
        os.utime(path, ns=(self.now, self.now))
        return path


def png(seed: int, shape=(8, 8)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def open_it(spec: str, remembered: bytes | None = None, at=None, **settings):
    """The source, with the memory in a file at a path, if any."""
    if remembered is not None:
        at.write_bytes(remembered)
        settings["memory"] = str(at)
    return conversion.open_converted(conversion.SourceSpec(spec, **settings))


def records(source: conversion.ConvertedSource) -> dict[bytes, tuple]:
    """Id -> class and image of each record, or what is wrong."""
    indices = np.arange(source.num_records)
    ids, read = source.ids(indices), source.read(indices)
    contents = {ids[place]: ("fault", reason) for place, reason in read.faults}
    for place, image, label in zip(read.places.tolist(), read.images, read.labels, strict=True):
        name = source.class_names[label] if 0 <= label < len(source.class_names) else int(label)
        contents[ids[place]] = name, image.tobytes()
    assert len(contents) == source.num_records
    return contents


def all_of(source: conversion.ConvertedSource) -> dict:
    return {
        "fingerprint": source.fingerprint(),
        "shape": source.image_shape,
        "splits": source.split_sizes,
        "classes": source.class_names,
        "notes": source.notes,
        "ignored": dict(source.ignored),
        "hash": source.for_workers().source_hash,
        "ids": source.ids(np.arange(source.num_records)),
        "records": records(source),
    }


class Folder:
    """Images in class directories, changed at random."""

    def __init__(self, place: pathlib.Path, generator: np.random.Generator):
        self.place, self._generator, self._clock = place, generator, Clock()
        self.spec, self._number = f"folder:{place}", 0
        for _ in range(12):
            self.add("ab"[self._number % 2])

    def add(self, class_name: str | None = None) -> None:
        class_name = class_name or self._generator.choice(list("abcz"))
        shape = [(8, 8), (8, 8), (8, 8), (8, 8, 3), (6, 8)][self._generator.integers(5)]
        path = self.place / class_name / f"{self._number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._number += 1
        path.write_bytes(png(self._number, shape))
        self._clock.stamp(path)

    def edit(self) -> None:
        paths = sorted(self.place.rglob("*.png"))
        path = paths[self._generator.integers(len(paths))]
        match self._generator.integers(7):
            case 0 | 1:
                self.add()
            case 2:
                path.write_bytes(png(int(self._generator.integers(10_000))))
                self._clock.stamp(path)
            case 3 if len(paths) > 8:
                path.unlink()
            case 4:
                target = self.place / self._generator.choice(list("abcz")) / path.name
                target.parent.mkdir(exist_ok=True)
                path.rename(target)
            case 5:
                self._clock.stamp(path)
            case _:
                path.write_bytes(b"no image")
                self._clock.stamp(path)


class Csv:
    """Files of splits, changed at random."""

    def __init__(self, place: pathlib.Path, generator: np.random.Generator):
        self.place, self._generator, self._clock = place, generator, Clock()
        self.spec = f"csv:{place}"
        place.mkdir()
        for split in ("train", "test"):
            self.write(split)

    def write(self, split: str, words: bool = False) -> None:
        labels = self._generator.integers(0, 4, 12)
        texts = ["wolf", "cat", "dog", "eel"] if words else list("0123")
        header = ["label", *(f"pixel{i}" for i in range(16))]
        rows = [
            [texts[label], *map(str, self._generator.integers(0, 256, 16).tolist())]
            for label in labels.tolist()
        ]
        if self._generator.integers(3) == 0:
            header.insert(0, "id")
            rows = [[f"i{number}", *row] for number, row in enumerate(rows)]
        path = self.place / f"{split}.csv"
        path.write_text("\n".join(map(",".join, [header, *rows])) + "\n")
        self._clock.stamp(path)

    def edit(self) -> None:
        paths = sorted({*self.place.glob("*.csv")} - {self.place / "answers.csv"})
        path = paths[self._generator.integers(len(paths))]
        match self._generator.integers(7):
            case 0:
                self.write("val")
            case 1:
                self.write(path.stem)
            case 2:
                words = bool(self._generator.integers(2))
                for other in paths:
                    self.write(other.stem, words)
            case 3 if len(paths) > 1:
                path.unlink()
            case 4:
                (self.place / "answers.csv").write_text("id,label\n1,2\n")
                self._clock.stamp(self.place / "answers.csv")
            case 5:
                (self.place / f"README{self._generator.integers(9)}.md").write_text("read me")
            case _:
                self._clock.stamp(path)


class Parquet:
    """Parts of a table, changed at random."""

    def __init__(self, place: pathlib.Path, generator: np.random.Generator):
        self.place, self._generator, self._clock = place, generator, Clock()
        self.spec, self._number = f"parquet:{place}", 0
        self._is_of_texts = bool(generator.integers(2))
        place.mkdir()
        for _ in range(3):
            self.add()

    def add(self, name: str | None = None, most: int = 3) -> None:
        generator, self._number = self._generator, self._number + 1
        size = int(generator.integers(1, 9))
        images = [png(int(generator.integers(10_000))) for _ in range(size)]
        if generator.integers(3) == 0:
            images[0] = b"no image"
        if generator.integers(3) == 0:
            images[-1] = png(1, (6, 8))
        labels = generator.integers(0, most, size).tolist()
        if self._is_of_texts:
            labels = [["dog", "ant", "cat", "bee", ""][label] for label in labels]
        table = pa.table({"image": pa.array(images, pa.binary()), "label": labels})
        path = self.place / (name or f"part-{self._number:03d}.parquet")
        pq.write_table(table, path, row_group_size=3)
        self._clock.stamp(path)

    def edit(self) -> None:
        paths = sorted(self.place.glob("*.parquet"))
        path = paths[self._generator.integers(len(paths))]
        match self._generator.integers(6):
            case 0 | 1:
                self.add(most=5)
            case 2:
                self.add(path.name)
            case 3 if len(paths) > 2:
                path.unlink()
            case 4:
                path.rename(self.place / f"first-{path.name}")
            case _:
                self._clock.stamp(path)


SETS = {"folder": Folder, "csv": Csv, "parquet": Parquet}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", SETS)
def test_all_is_as_without_a_memory_however_the_set_is_changed(tmp_path, kind, seed):
    generator = np.random.default_rng(seed)
    image_set = SETS[kind](tmp_path / "set", generator)
    settings = {"image_size": (4, 4), "rgb": True} if seed % 2 else {}
    before, remembered, num_trusted = {}, None, 0
    for _ in range(8):
        expected = all_of(open_it(image_set.spec, **settings))
        source = open_it(image_set.spec, remembered, tmp_path / "memory", **settings)
        trusted = source.trusted(np.arange(source.num_records))
        worker = conversion.open_converted(source.for_workers())
        conversion.open_source_once.cache_clear()
        other = conversion.open_converted(source.for_workers())  # As in another process.
        for opened in (worker, other):
            np.testing.assert_array_equal(trusted, opened.trusted(np.arange(len(trusted))))
        assert records(other) == expected["records"]
        assert all_of(source) == expected
        for record_id, is_trusted in zip(expected["ids"], trusted, strict=True):
            if is_trusted:
                then, now = before[record_id], expected["records"][record_id]
                assert then == now or then[0] == now[0] == "fault"
        num_trusted += trusted.sum()
        before, remembered = expected["records"], source.memory_bytes()
        for _ in range(generator.integers(3)):
            image_set.edit()
    assert num_trusted


def grown_folder(place: pathlib.Path) -> tuple[Folder, bytes]:
    """A folder of 20 images, and its memory."""
    folder = Folder(place, np.random.default_rng(0))
    for _ in range(8):
        folder.add("b")
    return folder, open_it(folder.spec).memory_bytes()


def test_a_night_opens_new_images_alone(tmp_path):
    folder, remembered = grown_folder(tmp_path / "set")
    before = {str(p.relative_to(folder.place)) for p in folder.place.rglob("*.png")}
    for class_name in "abz":
        folder.add(class_name)
    with Opened(folder.place) as opened:
        source = open_it(folder.spec, remembered, tmp_path / "memory")
        source.fingerprint()
        trusted = source.trusted(np.arange(source.num_records))
        source.read(np.flatnonzero(~trusted))
        source.memory_bytes()
    ids = [record_id.decode() for record_id in source.ids(np.flatnonzero(trusted))]
    assert set(ids) == before and len(opened) == 3 and not opened & before
    assert not source.is_unchanged
    with Opened(folder.place) as opened:
        source = open_it(folder.spec, source.memory_bytes(), tmp_path / "memory")
        assert source.is_unchanged and source.fingerprint()
        assert source.trusted(np.arange(source.num_records)).all()
    assert not opened


@pytest.mark.parametrize("change", ["add", "remove", "move", "touch"])
def test_what_makes_a_source_another_one(tmp_path, change):
    folder, remembered = grown_folder(tmp_path / "set")
    path = folder.place / "a" / "0.png"
    if change == "add":
        folder.add("a")
    elif change == "remove":
        path.unlink()
    elif change == "move":
        path.rename(folder.place / "b" / "0.png")
    else:
        Clock().stamp(path)
        os.utime(path, ns=(0, 5))
    source = open_it(folder.spec, remembered, tmp_path / "memory")
    assert not source.is_unchanged
    assert (source.fingerprint() == json_about(remembered)["fingerprint"]) == (change == "touch")
    assert (~source.trusted(np.arange(source.num_records))).sum() == (change != "remove")


def parsed(remembered: bytes) -> pa.Table:
    return pa.ipc.open_file(remembered.partition(b"\n")[2][32:]).read_all()


def json_about(remembered: bytes) -> dict:
    return json.loads(parsed(remembered).schema.metadata[b"about"])


def changed_memory(remembered: bytes, **about) -> bytes:
    return memory.to_bytes(parsed(remembered), json_about(remembered) | about)


@pytest.mark.parametrize(("age", "is_trusted"), [(1.9, False), (60, True), (-1, False)])
@pytest.mark.parametrize("kind", SETS)
def test_a_file_that_was_just_written_is_not_remembered(tmp_path, kind, age, is_trusted):
    image_set = SETS[kind](tmp_path / "set", np.random.default_rng(1))
    path = next(p for p in sorted(image_set.place.rglob("*")) if p.is_file())
    written = time.time_ns() - int(age * SECOND)
    os.utime(path, ns=(written, written))
    remembered = open_it(image_set.spec).memory_bytes()
    # Another program writes the file again within the tick of a coarse clock.
    data = bytearray(path.read_bytes())
    if not is_trusted:
        data[-2] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(written, written))
    if kind == "parquet" and not is_trusted:  # Its end is its length: another table of that size.
        path.write_bytes(bytes(data[:-2]) + bytes([data[-2] ^ 1]) + data[-1:])
        os.utime(path, ns=(written, written))
    source = open_it(image_set.spec, remembered, tmp_path / "memory")
    assert source.is_unchanged == is_trusted
    assert source.fingerprint() == open_it(image_set.spec).fingerprint()
    assert source.trusted(np.arange(source.num_records)).all() == is_trusted


@pytest.mark.parametrize(
    ("stamp", "is_settled"),
    [
        ("12 1600000000000000000", True),
        ("12 -5", True),
        ("12 1700000000000000001", False),
        ("12 1800000000000000000", False),
        ("12 1699999998000000001", False),
        ("12 1699999997999999999", True),
        ("12 1600000000000000", True),  # A generation.
        ('12 "5d41402abc"', True),
        ("12 CJ+x/A== md5:aaa=", True),
        ("12 ", False),
        ("None CJ", False),
        ("12 2026-01-01 00:00:00+00:00", False),
        ("12 1600000000.5", False),
        ("is a pipe", False),
        ("", False),
    ],
)
def test_which_stamps_tell_a_change(stamp, is_settled):
    assert memory.is_settled(stamp, 1_700_000_000 * SECOND) == is_settled


@pytest.mark.parametrize(
    "option",
    [
        {"labels": "none"},
        {"class_level": 1},
        {"background": "#ffffff"},
        {"max_image_pixels": 60},
        {"allow_tiff": True},
        {"pixel_range": (0.0, 1.0)},
        {"label_column": "y"},
    ],
)
def test_a_memory_of_other_options_is_none(tmp_path, option):
    assert memory.key_of("folder:a", SourceOptions()) != memory.key_of(
        "folder:a", SourceOptions(**option)
    )
    read_otherwise = {"labels", "class_level", "background", "max_image_pixels", "allow_tiff"}
    if read_otherwise.isdisjoint(option):
        return
    folder, remembered = grown_folder(tmp_path / "set")
    if "max_image_pixels" in option:  # Some images of 6×8 and none of 8×8 are read.
        (folder.place / "a" / "x.png").write_bytes(png(0, (6, 8)))
    with Opened(folder.place) as opened:
        source = open_it(folder.spec, remembered, tmp_path / "memory", **option)
    assert len(opened) == source.num_records
    assert not source.trusted(np.arange(source.num_records)).any()
    assert all_of(source) == all_of(open_it(folder.spec, **option))


@pytest.mark.parametrize("setting", [{"image_size": (4, 4)}, {"rgb": True}, {"id_prefix": "x"}])
def test_records_that_are_converted_otherwise_are_not_trusted(tmp_path, setting):
    folder, remembered = grown_folder(tmp_path / "set")
    with Opened(folder.place) as opened:
        source = open_it(folder.spec, remembered, tmp_path / "memory", **setting)
        assert source.is_unchanged and source.fingerprint()
        assert not source.trusted(np.arange(source.num_records)).any()
    assert not opened


def test_a_class_that_takes_the_name_of_another_one_is_not_trusted(tmp_path):
    folder, _ = grown_folder(tmp_path / "set")
    remembered = open_it(folder.spec, class_names=("x", "y")).memory_bytes()
    same = open_it(folder.spec, remembered, tmp_path / "memory", class_names=("x", "y"))
    assert same.trusted(np.arange(20)).all()
    (folder.place / "a").rename(folder.place / "c")  # b was y, and is x now.
    source = open_it(folder.spec, remembered, tmp_path / "memory", class_names=("x", "y"))
    assert not source.trusted(np.arange(20)).any()


def test_a_memory_of_another_place_is_none(tmp_path):
    folder, remembered = grown_folder(tmp_path / "set")
    shutil.copytree(folder.place, tmp_path / "copy")  # With all times.
    copy = f"folder:{tmp_path / 'copy'}"
    source = open_it(copy, remembered, tmp_path / "memory")
    assert not source.is_unchanged and not source.trusted(np.arange(20)).any()


@pytest.mark.parametrize("damage", ["byte", "cut", "empty", "foreign", "absent", "directory"])
def test_a_damaged_memory_is_none(tmp_path, damage):
    folder, remembered = grown_folder(tmp_path / "set")
    path = tmp_path / "memory"
    for place in range(0, len(remembered), 97) if damage == "byte" else [0]:
        data = bytearray(remembered)
        data[place] ^= 1
        damaged = {"byte": data, "cut": data[:-1], "empty": b"", "foreign": png(0)}
        if damage == "directory":
            path.mkdir()
        elif damage != "absent":
            path.write_bytes(damaged[damage])
        assert memory.read(str(path), json_about(remembered)["key"]) is None
    source = open_it(folder.spec, memory=str(path))
    assert not source.is_unchanged and not source.trusted(np.arange(20)).any()
    assert all_of(source) == all_of(open_it(folder.spec))


def test_a_file_that_cannot_be_read_is_never_trusted(tmp_path):
    folder, _ = grown_folder(tmp_path / "set")
    target = tmp_path / "elsewhere.png"
    (folder.place / "a" / "link.png").symlink_to(target)
    for _ in range(2):
        source = open_it(folder.spec)
        remembered = source.memory_bytes()
        source = open_it(folder.spec, remembered, tmp_path / "memory")
        trusted = source.trusted(np.arange(source.num_records))
        [place] = np.flatnonzero(~trusted)
        assert source.ids(np.array([place])) == [b"a/link.png"] and not source.is_unchanged
    target.write_bytes(png(3))
    assert all_of(open_it(folder.spec, remembered, tmp_path / "memory")) == all_of(
        open_it(folder.spec)
    )


def test_a_file_that_failed_while_it_was_listed_as_whole_is_not_remembered(tmp_path):
    """A directory may be listed, and its files not be readable."""
    folder, _ = grown_folder(tmp_path / "set")
    facts = conversion.open_converted(conversion.SourceSpec(folder.spec))._source.facts()
    assert facts.is_read.all()
    from pipeline.sources.readers.folder_tree.contents import Contents

    contents = Contents(2)
    contents.add(0, b"", "Input/output error")
    contents.add(1, b"d" * 32, "no image")
    assert contents.columns()[1].tolist() == [False, True]


@pytest.mark.parametrize(
    ("kept", "before", "more"),
    [
        ("cat/train/1.png", ["cat/test/2.png"], ["dog/train/3.png", "dog/test/4.png"]),
        ("x.png", ["y.png"], ["a/z.png"]),
        ("test/x.png", ["cats/y.png"], []),
    ],
    ids=["no class", "no fault", "a class and no split"],
)
def test_a_file_whose_directory_has_another_meaning_is_not_trusted(tmp_path, kept, before, more):
    place, clock = tmp_path / "set", Clock()

    def write(name: str) -> None:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(png(len(name)))
        clock.stamp(place / name)

    for name in [kept, *before]:
        write(name)
    spec = f"folder:{place}"
    remembered = open_it(spec).memory_bytes()
    for name in more:
        write(name)
    if not more:
        (place / "cats").rename(place / "train")
    source = open_it(spec, remembered, tmp_path / "memory")
    ids = source.ids(np.arange(source.num_records))
    assert not source.trusted(np.array([ids.index(kept.encode())])).any()
    assert all_of(source) == all_of(open_it(spec))


class OneFile:
    """A source of a file that could not be read."""

    image_shape, class_names, split_sizes = (1, 1, 1), (), {"train": 1}

    def __init__(self, is_read: bool):
        self._is_read = is_read

    def fingerprint(self) -> str:
        return "0"

    def file_numbers(self, indices):
        return indices

    def ways(self):
        return [""]

    def facts(self):
        return memory.Facts({}, np.array([self._is_read]))


@pytest.mark.parametrize("is_read", [True, False])
def test_a_file_that_has_a_stamp_and_cannot_be_read_is_not_trusted(tmp_path, is_read):
    about = {"key": "k", "opened_at": time.time_ns()}
    first = memory.Recollection(OneFile(is_read), {"f": "1 1"}, memory=None, **about)
    (tmp_path / "memory").write_bytes(first.to_bytes({}))
    remembered = memory.read(str(tmp_path / "memory"), "k")
    again = memory.Recollection(OneFile(True), {"f": "1 1"}, memory=remembered, **about)
    assert again.is_unchanged == again.trusted(np.arange(1)).item() == is_read


def test_csv_labels_that_become_words_are_not_trusted(tmp_path):
    place, clock = tmp_path / "set", Clock()
    place.mkdir()

    def write(split: str, labels: list[str]) -> None:
        rows = [["label", *(f"p{i}" for i in range(16))]]
        rows += [[label, *["7"] * 16] for label in labels]
        (place / f"{split}.csv").write_text("\n".join(map(",".join, rows)) + "\n")
        clock.stamp(place / f"{split}.csv")

    write("train", ["-1", "0", "1", "0"])
    write("test", ["0", "1", "1"])
    remembered = open_it(f"csv:{place}").memory_bytes()
    write("test", ["0", "1", "-1", "b", "b", "b"])
    source = open_it(f"csv:{place}", remembered, tmp_path / "memory")
    assert source.class_names[0] == "-1"
    assert not source.trusted(np.arange(source.num_records)).any()


def test_unchanged_csv_files_are_opened_for_their_records_alone(tmp_path):
    image_set = Csv(tmp_path / "set", np.random.default_rng(5))
    for split in ("train", "test"):
        while "id" in (image_set.place / f"{split}.csv").read_text():
            image_set.write(split)
    (image_set.place / "answers.csv").write_text("id,label\n1,2\n")
    os.utime(image_set.place / "answers.csv", ns=(0, 1))
    first = open_it(image_set.spec)
    expected = all_of(first)
    with Opened(image_set.place) as opened:
        source = open_it(image_set.spec, first.memory_bytes(), tmp_path / "memory")
        found = {key: value for key, value in all_of_but_records(source).items()}
        remembered = source.memory_bytes()
    assert not opened and found == {k: v for k, v in expected.items() if k != "records"}
    assert json_about(remembered) == json_about(first.memory_bytes())
    assert records(source) == expected["records"]
    # Beside a file that may change and keep its stamp, all are opened.
    written = time.time_ns()
    os.utime(image_set.place / "answers.csv", ns=(written, written))
    again = open_it(image_set.spec).memory_bytes()
    with Opened(image_set.place) as opened:
        open_it(image_set.spec, again, tmp_path / "memory")
    assert "answers.csv" in opened
    # A file that is told to be no image set by its columns may become one.
    (image_set.place / "answers.csv").write_text("id,label\n1,3\n")
    os.utime(image_set.place / "answers.csv", ns=(0, 2))
    with Opened(image_set.place) as opened:
        open_it(image_set.spec, remembered, tmp_path / "memory")
    assert "answers.csv" in opened


def all_of_but_records(source: conversion.ConvertedSource) -> dict:
    assert source.is_unchanged and source.trusted(np.arange(source.num_records)).all()
    return {
        "fingerprint": source.fingerprint(),
        "shape": source.image_shape,
        "splits": source.split_sizes,
        "classes": source.class_names,
        "notes": source.notes,
        "ignored": dict(source.ignored),
        "hash": source.for_workers().source_hash,
        "ids": source.ids(np.arange(source.num_records)),
    }


def test_csv_files_that_change_under_a_job_are_refused(tmp_path):
    from pipeline.cli.errors import SourceChanged

    image_set = Csv(tmp_path / "set", np.random.default_rng(5))
    remembered = open_it(image_set.spec).memory_bytes()
    source = open_it(image_set.spec, remembered, tmp_path / "memory")
    os.utime(image_set.place / "train.csv", ns=(0, 1))
    with pytest.raises(SourceChanged, match="train.csv: was changed while it was in use"):
        source.read(np.arange(1))


def parquet_set(place: pathlib.Path, *, num_parts: int, num_bytes: int) -> str:
    """Parts with about so many bytes of images, which no program can pack."""
    place.mkdir(exist_ok=True)
    for number in range(num_parts):
        path = place / f"part-{number:03d}.parquet"
        if path.exists():
            continue
        data = np.random.default_rng(number).integers(0, 256, (4, num_bytes // 4), np.uint8)
        images = [png(number) + row.tobytes() for row in data]
        pq.write_table(pa.table({"image": images, "label": [0, 1, 2, number]}), path)
        os.utime(path, ns=(0, 1_600_000_000 * SECOND + number))
    return f"parquet:{place}"


def test_a_night_opens_new_parquet_files_and_the_last_one_before(tmp_path):
    place = tmp_path / "set"
    spec = parquet_set(place, num_parts=6, num_bytes=5 << 20)
    remembered = open_it(spec).memory_bytes()
    with Opened(place) as opened:
        source = open_it(spec, remembered, tmp_path / "memory")
        assert source.is_unchanged and source.trusted(np.arange(24)).all()
        assert json_about(source.memory_bytes())["fingerprint"] == source.fingerprint()
    assert not opened
    parquet_set(place, num_parts=7, num_bytes=5 << 20)
    expected = all_of(open_it(spec))
    with Opened(place) as opened:
        source = open_it(spec, remembered, tmp_path / "memory")
        trusted = source.trusted(np.arange(28))
        source.fingerprint()
        source.read(np.flatnonzero(~trusted))
    # Parts of the fingerprint have 8 MiB: the last one began in the last file but one.
    assert opened == {"part-004.parquet", "part-005.parquet", "part-006.parquet"}
    assert np.flatnonzero(~trusted).tolist() == [24, 25, 26, 27]
    assert all_of(source) == expected
    worker = source.for_workers()
    conversion.open_source_once.cache_clear()
    with Opened(place) as opened:
        conversion.open_converted(worker).read(np.array([5]))
    assert opened == {"part-001.parquet", "part-006.parquet"}


@pytest.mark.parametrize("change", ["touch", "shorten", "rename", "remove the last", "nothing"])
def test_the_parts_of_a_fingerprint_that_are_remembered_are_those_that_are_equal(tmp_path, change):
    place = tmp_path / "set"
    spec = parquet_set(place, num_parts=5, num_bytes=5 << 20)
    remembered = open_it(spec).memory_bytes()
    path = place / "part-003.parquet"
    if change == "touch":
        os.utime(path, ns=(0, 1))
    elif change == "shorten":
        pq.write_table(pq.read_table(path)[:2], path)
    elif change == "rename":
        path.rename(place / "part-005.parquet")
    elif change == "remove the last":
        (place / "part-004.parquet").unlink()
    source = open_it(spec, remembered, tmp_path / "memory")
    assert source.fingerprint() == open_it(spec).fingerprint()


def test_a_memory_that_has_other_rows_than_a_parquet_file_is_found_out(tmp_path):
    from pipeline.cli.errors import SourceChanged

    spec = parquet_set(tmp_path / "set", num_parts=2, num_bytes=1_000)
    remembered = open_it(spec).memory_bytes()
    table = parsed(remembered)
    lengths = [np.frombuffer(cell.as_py(), "<i8") + [1, -1, 0, 0] for cell in table["lengths"]]
    swapped = [of_file.tobytes() for of_file in lengths]
    table = table.set_column(
        table.schema.get_field_index("lengths"), "lengths", pa.array(swapped, pa.large_binary())
    )
    source = open_it(spec, memory.to_bytes(table, json_about(remembered)), tmp_path / "memory")
    with pytest.raises(SourceChanged, match="part-000.parquet: was changed while it was in use"):
        source.read(np.arange(2))


def test_too_many_texts_are_no_classes_with_a_memory_either(tmp_path):
    from pipeline.cli.errors import StageError

    place = tmp_path / "set"
    place.mkdir()

    def write(name: str, first: int) -> None:
        texts = [f"text {number}" for number in range(first, first + 40_000)]
        path = place / f"{name}.parquet"
        pq.write_table(pa.table({"image": [png(0)] * 40_000, "label": texts}), path)
        os.utime(path, ns=(0, 1_600_000_000 * SECOND))

    write("b", 0)
    remembered = open_it(f"parquet:{place}").memory_bytes()
    write("a", 40_000)
    with pytest.raises(StageError, match="b.parquet: the column 'label' holds more than 65,536"):
        open_it(f"parquet:{place}", remembered, tmp_path / "memory")


def test_parquet_labels_that_get_other_names_are_not_trusted(tmp_path):
    place = tmp_path / "set"
    spec = parquet_set(place, num_parts=2, num_bytes=1_000)
    remembered = open_it(spec).memory_bytes()
    about = {"info": {"features": {"label": {"_type": "ClassLabel", "names": list("abc")}}}}
    table = pq.read_table(place / "part-001.parquet")
    named = table.replace_schema_metadata({"huggingface": json.dumps(about)})
    pq.write_table(named, place / "part-001.parquet")
    source = open_it(spec, remembered, tmp_path / "memory")
    assert not source.trusted(np.arange(8)).any()
    assert all_of(source) == all_of(open_it(spec))


def test_parquet_files_with_one_label_a_row_are_refused_as_without_a_memory(tmp_path):
    from pipeline.cli.errors import UsageError

    place = tmp_path / "set"
    place.mkdir()

    def write(name: str, numbers) -> None:
        path = place / f"{name}.parquet"
        table = pa.table({"image": [png(0)] * len(numbers), "number": list(numbers)})
        pq.write_table(table, path)
        os.utime(path, ns=(0, 1_600_000_000 * SECOND))

    write("a", range(12))  # Fewer rows say nothing.
    spec = f"parquet:{place}"
    remembered = open_it(spec).memory_bytes()
    write("b", range(100, 112))
    for settings in ({}, {"remembered": remembered, "at": tmp_path / "memory"}):
        with pytest.raises(UsageError, match="differs in all 24 rows"):
            open_it(spec, **settings)
    with Opened(place) as opened:
        write("b", [100] * 12)
        assert open_it(spec, remembered, tmp_path / "memory").num_records == 24
    assert opened == {"a.parquet", "b.parquet"}
    assert all_of(open_it(spec, remembered, tmp_path / "memory")) == all_of(open_it(spec))


def test_parquet_files_with_repeated_labels_are_not_opened_to_see_that(tmp_path):
    place, clock = tmp_path / "set", Clock()
    place.mkdir()
    for name in "ab":
        table = pa.table({"image": [png(0)] * 12, "number": [0, 1] * 6})
        pq.write_table(table, place / f"{name}.parquet")
        clock.stamp(place / f"{name}.parquet")
        if name == "a":
            remembered = open_it(f"parquet:{place}").memory_bytes()
    with Opened(place) as opened:
        source = open_it(f"parquet:{place}", remembered, tmp_path / "memory")
        assert source.trusted(np.arange(24)).sum() == 12
    assert opened == {"b.parquet"}


@pytest.mark.parametrize("column", ["label", "numbers"])
def test_parquet_files_of_which_other_columns_are_read_are_read_again(tmp_path, column):
    place = tmp_path / "set"
    place.mkdir()
    table = pa.table({"photo": [png(0)] * 4, "number": [0, 0, 1, 2]})
    if column == "numbers":
        table = table.append_column("numbers", pa.array([list(range(64))] * 4))
    pq.write_table(table, place / "a.parquet")
    Clock().stamp(place / "a.parquet")
    spec = f"parquet:{place}"
    remembered = open_it(spec).memory_bytes()
    if column == "label":  # By its name; so far the labels were the column that was left over.
        table = table.append_column("label", pa.array([3, 3, 2, 1]))
    else:  # By the metadata; so far the images were the column of bytes.
        about = {"info": {"features": {"numbers": {"_type": "Image"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
    pq.write_table(table, place / "b.parquet")
    source = open_it(spec, remembered, tmp_path / "memory")
    assert not source.trusted(np.arange(8)).any()
    assert all_of(source) == all_of(open_it(spec))


def array_set(kind: str, place: pathlib.Path) -> str:
    images, labels = blobs(num_train=60, num_test=6, size=(8, 8))["train"]
    if kind == "idx":
        return f"idx:{make_idx_set(place, num_train=60, num_test=6)}"
    place.mkdir()
    if kind == "npz":
        np.savez(place / "set.npz", x=images, y=labels)
        return f"npz:{place / 'set.npz'}"
    np.save(place / "x_train.npy", images)
    np.save(place / "y_train.npy", labels)
    return f"npy:{place}"


@pytest.mark.parametrize("kind", ["idx", "npz", "npy"])
def test_the_fingerprint_of_unchanged_arrays_is_in_the_memory(tmp_path, kind):
    place = tmp_path / "set"
    spec, clock = array_set(kind, place), Clock()
    paths = [clock.stamp(path) for path in sorted(place.rglob("*")) if path.is_file()]
    source = open_it(spec)
    remembered, indices = source.memory_bytes(), np.arange(source.num_records)
    assert json_about(remembered)["fingerprint"] == source.fingerprint()
    marked = changed_memory(remembered, fingerprint="of the memory")
    source = open_it(spec, marked, tmp_path / "memory")
    assert source.is_unchanged and source.trusted(indices).all()
    assert source.fingerprint() == "of the memory"
    clock.stamp(paths[0])
    source = open_it(spec, marked, tmp_path / "memory")
    assert not source.is_unchanged and not source.trusted(indices).any()
    assert source.fingerprint() == open_it(spec).fingerprint()
    # The same files may be read in another way by another version.
    clock.stamp(paths[0])
    remembered = open_it(spec).memory_bytes()
    for other in ({"set": {}}, {"key": "another"}, {"num_files": 9}):
        marked = changed_memory(remembered, fingerprint="of the memory", **other)
        source = open_it(spec, marked, tmp_path / "memory")
        assert not source.is_unchanged and not source.trusted(indices).any()
        assert source.fingerprint() == open_it(spec).fingerprint()


def test_a_source_of_a_user_has_no_memory(tmp_path, monkeypatch):
    (tmp_path / "of_user.py").write_text(
        "import numpy as np\n"
        "from pipeline.sources import ArraySource\n"
        "def open_it(path):\n"
        "    arrays = np.zeros((9, 4, 4, 1), np.uint8), np.arange(9)\n"
        "    return ArraySource({'train': arrays}, listed={path: '1 1'})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    spec = "of_user.open_it:/x"
    source = open_it(spec, open_it(spec).memory_bytes(), tmp_path / "memory")
    assert not source.is_unchanged and not source.trusted(np.arange(9)).any()


def test_a_memory_is_no_part_of_an_identity(tmp_path):
    folder, remembered = grown_folder(tmp_path / "set")
    source = open_it(folder.spec, remembered, tmp_path / "memory")
    worker = source.for_workers()
    assert worker.memory == str(tmp_path / "memory")
    assert worker.identity() == open_it(folder.spec).for_workers().identity() == {}


@pytest.mark.parametrize("kind", SETS)
def test_unchanged_objects_are_not_fetched(tmp_path, object_store, kind):
    image_set = SETS[kind](tmp_path / "set", np.random.default_rng(5))
    name = f"memory-{kind}"

    def put(path: pathlib.Path) -> None:
        object_store.put(f"{name}/{path.relative_to(image_set.place)}", path.read_bytes())

    for path in sorted(image_set.place.rglob("*.*")):
        put(path)
    spec, at = f"{kind}:gs://{BUCKET}/{name}", tmp_path / "memory"
    source = open_it(spec)
    remembered, expected = source.memory_bytes(), source.fingerprint()
    fetched: list[str] = []

    def look(request) -> None:
        if "alt=media" in request.path or "/download/" in request.path:
            fetched.append(request.path)

    with object_store.deciding(look):
        source = open_it(spec, remembered, at)
        assert source.is_unchanged and source.fingerprint() == expected
        assert source.trusted(np.arange(source.num_records)).all()
    assert not fetched
    put(path)  # The same bytes are another generation.
    with object_store.deciding(look):
        source = open_it(spec, remembered, at)
        assert source.fingerprint() == expected
    assert not source.is_unchanged and not source.trusted(np.arange(source.num_records)).all()
    # Of tables, a fingerprint is taken over all bytes, or over parts of 8 MiB.
    assert fetched and (kind != "folder" or all(path.stem in place for place in fetched))


def test_a_memory_lies_in_an_object_store(tmp_path, object_store):
    folder, remembered = grown_folder(tmp_path / "set")
    object_store.put("memory-of-a-folder", remembered)
    source = open_it(folder.spec, memory=f"gs://{BUCKET}/memory-of-a-folder")
    assert source.is_unchanged
    assert not open_it(folder.spec, memory=f"gs://{BUCKET}/none").is_unchanged
