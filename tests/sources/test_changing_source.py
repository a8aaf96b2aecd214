"""A source that changes under a job: the job fails and says what changed, and nothing is wrong."""

import os
import shlex
import signal

import numpy as np
import pytest

from pipeline.cli.errors import SourceChanged, StageError
from pipeline.datasets import reader
from pipeline.sources import conversion
from tests.conftest import blobs, make_folder_set, make_idx_set, make_shards, outputs_of, write_csv
from tests.forked import run_command


def make_set(kind: str, place) -> str:
    """A set of 66 records of a kind of source; its spec."""
    about = {"num_train": 60, "num_test": 6, "size": (8, 8)}
    if kind == "folder":
        return f"folder:{make_folder_set(place, **about)}"
    if kind == "idx":
        return f"idx:{make_idx_set(place, **about)}"
    if kind == "idx.gz":
        return f"idx:{make_idx_set(place, suffix='.gz', **about)}"
    place.mkdir()
    images, labels = blobs(**about)["train"]
    if kind == "csv":
        return f"csv:{write_csv(place / 'set.csv', images, labels)}"
    np.savez(place / "set.npz", x=images, y=labels)
    return f"npz:{place / 'set.npz'}"


def touch(path) -> None:
    """Another time, however coarse the clock is."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000))


def change_in_place(path) -> None:
    """Another last byte, and another time; the size stays."""
    status = path.stat()
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    touch(path)


def files_of(place) -> list:
    return sorted(path for path in place.rglob("*") if path.is_file())


KINDS = ["folder", "idx", "idx.gz", "csv", "npz"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_refuses_what_is_not_as_the_command_found_it(tmp_path, kind):
    source_spec = conversion.open_converted(
        conversion.SourceSpec(make_set(kind, tmp_path / "set"))
    ).for_workers()
    conversion.open_source_once.cache_clear()  # As in another process.
    assert conversion.open_converted(source_spec).num_records == source_spec.num_records
    touch(files_of(tmp_path / "set")[0])
    conversion.open_source_once.cache_clear()
    with pytest.raises(SourceChanged, match="a worker finds other files, or other file times"):
        conversion.open_converted(source_spec)


def test_a_worker_that_serves_another_job_looks_again(tmp_path):
    spec = make_set("idx", tmp_path / "set")
    earlier = conversion.open_converted(conversion.SourceSpec(spec)).for_workers()
    change_in_place(files_of(tmp_path / "set")[0])
    later = conversion.open_converted(conversion.SourceSpec(spec)).for_workers()
    with pytest.raises(SourceChanged, match="a worker finds other files"):
        conversion.open_converted(earlier)
    assert conversion.open_converted(later).num_records == later.num_records


def test_a_source_that_lists_nothing_is_known_by_its_classes(tmp_path, monkeypatch):
    (tmp_path / "unlisted.py").write_text(
        "import numpy as np\n"
        "from pipeline.sources import ArraySource\n"
        "def open_it(rest):\n"
        "    source = ArraySource({'train': (np.zeros((9, 4, 4, 1), np.uint8), np.arange(9))})\n"
        "    source.class_names = NAMES\n"
        "    return source\n"
        "NAMES = list('abcdefghi')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import unlisted

    source_spec = conversion.open_converted(
        conversion.SourceSpec("unlisted.open_it:")
    ).for_workers()
    unlisted.NAMES = list("bacdefghi")
    conversion.open_source_once.cache_clear()
    with pytest.raises(SourceChanged, match="a worker finds other"):
        conversion.open_converted(source_spec)


@pytest.mark.parametrize("kind", ["folder", "idx", "csv"])
def test_no_byte_of_another_file_is_read(tmp_path, kind):
    source = conversion.open_converted(conversion.SourceSpec(make_set(kind, tmp_path / "set")))
    every = np.arange(source.num_records)
    source.read(every)
    for path in files_of(tmp_path / "set"):
        change_in_place(path)
    with pytest.raises(SourceChanged, match="was changed while it was in use"):
        source.read(every)
    if kind != "folder":  # Which has read all files by then, for the shape of most.
        with pytest.raises(SourceChanged, match="was changed while it was in use"):
            source.fingerprint()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, bytes]:
    """What a job makes of the folder that `make_set` makes, wherever that lies."""
    place = tmp_path_factory.mktemp("undisturbed")
    make_shards(make_set("folder", place / "set"), place / "out", num_shards=2)
    return outputs_of(place / "out")


# Between two shards, and after the last of them.
MOMENTS = ["blobs-train.tfrecord-00001-of-00002", "statistics.json"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_replaced_under_the_job_and_restored_all_records_arrive(
    tmp_path, when_written, undisturbed, moment
):
    place = tmp_path / "set"
    spec = make_set("folder", place)
    kept = {path: path.read_bytes() for path in files_of(place)[:40]}

    def replace() -> None:
        for path in kept:
            change_in_place(path)

    when_written(moment, replace)
    names = r"test/class \d/\d+\.png was changed, .* was changed, .* was changed and 37 more"
    with pytest.raises(SourceChanged, match=f"--source={spec}: {names} since the job began"):
        make_shards(spec, tmp_path / "out", num_shards=2)
    assert not (tmp_path / "out" / "manifest.json").exists()
    for path, data in kept.items():
        path.write_bytes(data)
    make_shards(spec, tmp_path / "out", num_shards=2)
    assert outputs_of(tmp_path / "out") == undisturbed


@pytest.mark.parametrize(
    "flags",
    [[], pytest.param(["--direct_num_workers=2"], marks=pytest.mark.long)],
    ids=["1", "2"],
)
def test_files_that_keep_size_and_time_are_made_again_with_those_that_do_not(
    tmp_path, when_written, undisturbed, flags
):
    place = tmp_path / "set"
    spec = make_set("folder", place)
    kept = {path: (path.read_bytes(), path.stat()) for path in files_of(place)}

    def replace() -> None:
        for path, (_, status) in kept.items():
            change_in_place(path)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        touch(files_of(place)[0])

    def restore() -> None:
        for path, (data, status) in kept.items():
            path.write_bytes(data)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    when_written(MOMENTS[0], replace)
    with pytest.raises(SourceChanged, match="was changed"):
        make_shards(spec, tmp_path / "out", num_shards=2)
    restore()
    make_shards(spec, tmp_path / "out", num_shards=2, beam_args=flags)
    assert outputs_of(tmp_path / "out") == undisturbed


def test_what_changed_is_named(tmp_path, when_written):
    place = tmp_path / "set"
    spec = make_set("folder", place)
    gone, changed = files_of(place)[0], files_of(place)[1]

    def change() -> None:
        changed.rename(changed.with_name("new.png"))
        changed.with_name("new.png").with_suffix(".txt").write_bytes(b"no image, and no matter")
        gone.unlink()
        gone.write_bytes(b"shorter")

    when_written("statistics.json", change)
    with pytest.raises(SourceChanged) as error:
        make_shards(spec, tmp_path / "out", num_shards=2)
    names = [str(path.relative_to(place)) for path in (gone, changed, changed.parent / "new.png")]
    expected = f"{names[0]} was changed, {names[1]} is gone, {names[2]} is new since the job began"
    assert expected in str(error.value)


def test_a_touched_or_moved_source_is_still_the_one_that_a_killed_job_began_with(
    tmp_path, when_written, undisturbed
):
    spec = make_set("folder", tmp_path / "set")

    def fail() -> None:
        raise StageError("stopped")

    when_written("statistics.json", fail)
    with pytest.raises(StageError, match="stopped"):
        make_shards(spec, tmp_path / "out", num_shards=2)
    moved = (tmp_path / "set").rename(tmp_path / "elsewhere")
    for path in files_of(moved):
        os.utime(path)
    make_shards(f"folder:{moved}", tmp_path / "out", num_shards=2)
    assert outputs_of(tmp_path / "out") == undisturbed


def test_a_class_directory_renamed_under_two_workers(tmp_path, when_written):
    """Labels are numbers of classes, which a worker would give in another order."""
    place = tmp_path / "set"
    spec = make_set("folder", place)
    first = min((place / "train").iterdir())
    when_written("job.json", lambda: first.rename(place / "train" / "z"))
    workers = ["--direct_num_workers=2", "--direct_running_mode=multi_processing"]
    with pytest.raises(
        SourceChanged, match=r"train/class 0/\d+\.png is gone, .* more since the job"
    ):
        make_shards(spec, tmp_path / "out", num_shards=1, beam_args=workers)
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.long
@pytest.mark.parametrize("number", [4, 5, 6, 8])
def test_killed_after_files_were_replaced_nothing_of_them_is_kept(tmp_path, undisturbed, number):
    place, out = tmp_path / "set", tmp_path / "out"
    spec = make_set("folder", place)
    kept, other = files_of(place)[-40:], tmp_path / "other.png"
    other.write_bytes(files_of(place)[0].read_bytes())
    copies = {path: path.read_bytes() for path in kept}
    change = " && ".join(f"cp {other} {shlex.quote(str(path))}" for path in kept)
    flags = [f"--source={spec}", f"--output_dir={out}", "--name=blobs", "--num_shards=2"]
    chain = [
        "tests.faults.change_at_file",
        "-train.tfrecord-00000",
        change,
        "tests.faults.die_at_file",
        number,
    ]
    done = run_command(*chain, "pipeline.preprocess", *flags, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    for path, data in copies.items():
        path.write_bytes(data)
    run_command("pipeline.preprocess", *flags)
    assert outputs_of(out) == undisturbed
    whole = reader.Dataset(str(out))
    assert sum(len(whole.read_images(split)) for split in whole.splits) == 66
