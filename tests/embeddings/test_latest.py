"""The pointer to the newest export: it moves in one step, forth and back, and readers never mix."""

import hashlib
import json
import os
import pathlib
import shutil
import threading

import pyarrow.parquet as pq
import pytest

from pipeline.cli.errors import StageError, UsageError
from pipeline.stages import manifest as manifest_lib
from pipeline.stages import pointer, retention
from pipeline.storage import files, lock
from tests.conftest import make_embeddings, outputs_of
from tests.embeddings.test_incremental import grown, other_model  # noqa: F401
from tests.forked import run_command
from tests.storage.object_stores import BUCKET


@pytest.fixture
def place(tmp_path):
    """Where exports lie."""
    (tmp_path / "exports").mkdir()
    return tmp_path / "exports"


@pytest.fixture(scope="module")
def two_exports(data_dir, trained, other_model, tmp_path_factory):  # noqa: F811
    """Two finished exports by different models, and a rejected one."""
    directory = tmp_path_factory.mktemp("exports")
    make_embeddings(data_dir, trained / "export", directory / "dt=1")
    make_embeddings(data_dir, other_model, directory / "dt=2")
    with pytest.raises(StageError, match="rejected"):
        make_embeddings(data_dir, other_model, directory / "dt=3", require="elbo>0")
    return directory


def latest_command(*arguments, check=True):
    return run_command("pipeline.latest", *arguments, check=check)


def test_it_is_a_relative_link_that_moves_forth_and_back(two_exports, tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(two_exports, tree)
    latest = tree / "latest"
    for name in ("dt=1", "dt=2", "dt=1"):
        done = latest_command(latest, f"--to={tree}/{name}")
        assert done.stdout.strip() == str(tree / name)
        assert os.readlink(latest) == name
    # The whole tree may be moved, and its exports are read through the link.
    moved = tree.rename(tmp_path / "moved")
    assert latest_command(moved / "latest").stdout.strip() == str(moved / "dt=1")
    table = pq.read_table(moved / "latest" / "embeddings")
    assert table.num_rows == 50
    assert {entry.name for entry in moved.iterdir()} >= {"latest", ".latest.lock"}


@pytest.mark.parametrize(
    "to, status, message",
    [
        ("dt=3", 1, "was rejected by --require"),
        ("dt=4", 1, "no such directory"),
        ("shards", 1, "has no manifest.json"),
        ("dt=2", 1, "a file is missing or damaged"),
    ],
)
def test_it_refuses_what_is_not_a_good_export(two_exports, tmp_path, to, status, message):
    shutil.copytree(two_exports, tmp_path / "tree")
    (tmp_path / "tree" / "shards").mkdir()
    next((tmp_path / "tree" / "dt=2" / "embeddings").iterdir()).unlink()
    latest = tmp_path / "tree" / "latest"
    latest_command(latest, f"--to={tmp_path}/tree/dt=1")
    done = latest_command(latest, f"--to={tmp_path}/tree/{to}", check=False)
    assert done.returncode == status and message in done.stderr and len(done.stderr) < 400
    assert os.readlink(latest) == "dt=1"


@pytest.mark.parametrize(
    "latest, to",
    [
        ("elsewhere/latest", "exports/dt=1"),  # `..` of a linked directory leads elsewhere.
        ("exports/latest", "elsewhere/dt=1"),
        ("exports/latest/", "exports/dt=1/"),
        ("exports/latest", "exports/stable"),  # The pointer does not follow another one.
    ],
)
def test_it_names_the_export_whatever_links_lead_there(two_exports, tmp_path, latest, to):
    place, far = tmp_path / "exports", tmp_path / "deep" / "down" / "pointers"
    shutil.copytree(two_exports, place)
    shutil.copytree(two_exports / "dt=1", far / "dt=1")
    (tmp_path / "elsewhere").symlink_to(far)
    (place / "stable").symlink_to("dt=1")
    expected = (tmp_path / to).resolve()
    for _ in range(2):  # The second time, the pointer stays.
        done = latest_command(f"{tmp_path}/{latest}", f"--to={tmp_path}/{to}")
        assert done.stdout == f"{expected}\n"
    (place / "stable").unlink()
    assert (tmp_path / latest).resolve() == expected
    # It is still read by the same name, and never removed.
    done = latest_command(f"{tmp_path}/{latest}", "--keep=1", f"--of={expected.parent}")
    assert done.stdout == f"{expected}\n"
    check_export(str(expected))


def test_what_is_no_pointer_is_refused(two_exports, data_dir, tmp_path):
    (tmp_path / "latest").mkdir()
    done = latest_command(tmp_path / "latest", check=False)
    assert done.returncode == 1 and "is no symbolic link" in done.stderr
    done = latest_command(tmp_path / "nothing", check=False)
    assert done.returncode == 1 and "no such pointer" in done.stderr
    for arguments in ([], ["a", "b"], [tmp_path / "l", "--keep=3"], [tmp_path / "l", "--keep=0"]):
        assert latest_command(*arguments, check=False).returncode == 2
    # A link of the user to something else stays.
    (tmp_path / "file").write_text("mine")
    for number, target in enumerate((data_dir, tmp_path / "latest", tmp_path / "file")):
        link = tmp_path / f"link{number}"
        link.symlink_to(target)
        with pytest.raises(StageError, match="which is no export; .* name another path"):
            pointer.move(str(link), str(two_exports / "dt=1"), seen=pointer.read(str(link)))
        assert link.readlink() == target
    done = latest_command(tmp_path / "link0", f"--to={two_exports}/dt=1", check=False)
    assert done.returncode == 1 and "which is no export" in done.stderr


def test_a_pointer_that_cannot_name_the_directory_is_refused_first(two_exports, tmp_path):
    first, linked = str(two_exports / "dt=1"), tmp_path / "linked"
    linked.symlink_to(two_exports)
    with pytest.raises(UsageError, match="expected a URL if the directory is a URL"):
        pointer.check("gs://bucket/latest", first)
    with pytest.raises(UsageError, match="lies in the directory that it shall name"):
        pointer.check(f"{first}/latest", first)
    for latest, directory in (
        (first, first),
        (f"{first}/", f"{linked}/dt=1"),
        (first, f"{linked}/dt=1/more"),
        ("gs://bucket/latest", "gs://bucket/latest/"),
    ):
        with pytest.raises(UsageError, match="is this path or lies below it; name another path"):
            pointer.check(latest, directory)
    pointer.check(f"{linked}/latest", first)


@pytest.mark.parametrize("more", [[], ["--reuse_from=dt=2"]])
def test_the_published_export_is_not_overwritten(two_exports, tmp_path, more):
    shutil.copytree(two_exports / "dt=1", tmp_path / "dt=1")
    latest_command(tmp_path / "newest", f"--to={tmp_path}/dt=1")
    before = outputs_of(tmp_path / "dt=1")
    flags = [f"--latest={tmp_path}/newest", f"--output_dir={tmp_path}/dt=1", "--overwrite", *more]
    done = run_command("pipeline.export", "--model_dir=/m", "--data_dir=/d", *flags, check=False)
    assert done.returncode == 2 and outputs_of(tmp_path / "dt=1") == before
    assert f"--overwrite: --latest={tmp_path}/newest names {tmp_path}/dt=1, and its" in done.stderr


def test_it_leaves_an_export_that_is_damaged_or_gone(two_exports, place):
    copies(two_exports, place, ["dt=1", "dt=2"])
    latest = str(place / "latest")
    pointer.move(latest, str(place / "dt=1"), seen=None)
    (place / "dt=1" / "manifest.json").write_text("{}")
    assert pointer.read(latest) == (str(place / "dt=1"), "")
    assert latest_command(latest, f"--to={place}/dt=2").stdout == f"{place}/dt=2\n"
    shutil.rmtree(place / "dt=2")
    seen = pointer.read(latest)
    assert seen == (str(place / "dt=2"), "")
    copies(two_exports, place, ["dt=2"])  # The same directory is exported again.
    assert not pointer.move(latest, str(place / "dt=2"), seen=seen)


def test_it_moves_only_from_where_the_job_saw_it(two_exports, place):
    latest, first, second = str(place / "latest"), two_exports / "dt=1", two_exports / "dt=2"
    assert pointer.move(latest, str(first), seen=None)
    seen = pointer.read(latest)
    assert not pointer.move(latest, str(first), seen=seen)  # Nothing to do.
    pointer.move(latest, str(second), seen=seen)
    with pytest.raises(StageError, match="names .*dt=2 now, and named .*dt=1 when this job began"):
        pointer.move(latest, str(first), seen=seen)
    with lock.hold_path(latest):
        with pytest.raises(StageError, match="another process is writing here"):
            pointer.move(latest, str(first), seen=pointer.read(latest))
    assert pathlib.Path(latest).resolve() == second


def test_a_killed_move_leaves_the_old_pointer(two_exports, place):
    latest = str(place / "latest")
    pointer.move(latest, str(two_exports / "dt=1"), seen=None)
    arguments = ["pipeline.latest", latest, f"--to={two_exports}/dt=2"]
    run_command("tests.faults.die_at_rename", 1, *arguments, check=False)
    assert pathlib.Path(latest).resolve() == two_exports / "dt=1"
    assert list(place.glob(".writing-latest-*"))
    (place / ".writing-latest-2-0").touch()  # Of another pointer, latest-2.
    assert pointer.move(latest, str(two_exports / "dt=2"), seen=pointer.read(latest))
    assert {path.name for path in place.glob(".w*")} == {".writing-latest-2-0"}


def copies(two_exports, place, names) -> None:
    for name in names:
        shutil.copytree(two_exports / "dt=1", place / name)


def test_old_exports_go_and_what_is_used_stays(two_exports, place):
    copies(two_exports, place, [f"dt=2026-11-0{day}" for day in range(1, 10)])
    latest = str(place / "latest")
    pointer.move(latest, str(place / "dt=2026-11-02"), seen=None)
    (place / "notes").mkdir()
    (place / "notes" / "mine.txt").write_text("stays")
    # An unfinished old one, one that a job writes, and that job takes rows from the first.
    for name, reuses in (("dt=2026-11-03", ""), ("dt=2026-11-10", str(place / "dt=2026-11-01"))):
        (place / name / ".progress").mkdir(parents=True)
        (place / name / "manifest.json").unlink(missing_ok=True)
        job = {"stage": "export", "made_from": {}, "names": [], "reuses": reuses}
        job_file = place / name / ".progress" / "job.json"
        job_file.write_bytes(manifest_lib.sealed_json(job))
    with lock.hold(str(place / "dt=2026-11-10")):
        removed = list(retention.remove_old(str(place), latest, keep=3))
    assert [pathlib.Path(path).name for path in removed] == [
        "dt=2026-11-04",
        "dt=2026-11-05",
        "dt=2026-11-06",
        "dt=2026-11-03",
    ]
    assert sorted(path.name for path in place.glob("[!.]*")) == [
        *("dt=2026-11-01", "dt=2026-11-02", "dt=2026-11-07", "dt=2026-11-08", "dt=2026-11-09"),
        *("dt=2026-11-10", "latest", "notes"),
    ]
    # The job has died: its export is unfinished, and no finished one follows it.
    done = latest_command(latest, "--keep=1", f"--of={place}")
    assert f"latest: removed {place}/dt=2026-11-08" in done.stdout
    assert sorted(path.name for path in place.glob("dt=*")) == [
        *("dt=2026-11-02", "dt=2026-11-09", "dt=2026-11-10"),
    ]


def test_what_comes_to_be_used_during_a_removal_stays(two_exports, place):
    copies(two_exports, place, [f"dt={number}" for number in range(1, 6)])
    unfinished = place / "dt=4"
    manifest = (unfinished / "manifest.json").rename(place / "manifest")
    (unfinished / ".progress").mkdir()
    job = {"stage": "export", "made_from": {}, "names": []}
    (unfinished / ".progress" / "job.json").write_bytes(manifest_lib.sealed_json(job))
    latest = str(place / "latest")
    pointer.move(latest, str(place / "dt=5"), seen=None)
    removal = retention.remove_old(str(place), latest, keep=1)
    assert next(removal) == str(place / "dt=1")
    pointer.move(latest, str(place / "dt=2"), seen=pointer.read(latest))
    manifest.rename(unfinished / "manifest.json")
    assert list(removal) == [str(place / "dt=3")]
    check_export(str(place / "dt=2"))
    check_export(str(unfinished))


def test_what_a_running_job_takes_rows_from_stays(
    data_dir, two_exports, trained, place, tmp_path, monkeypatch, when_written
):
    copies(two_exports, place, ["dt=1", "dt=2", "dt=3"])
    latest, removed = str(place / "latest"), []
    pointer.move(latest, str(place / "dt=3"), seen=None)

    def remove_from_elsewhere() -> None:
        with monkeypatch.context() as patched:
            patched.chdir(tmp_path)
            removed.extend(retention.remove_old(str(place), latest, keep=1))

    when_written("blobs-test.tfrecord", remove_from_elsewhere)  # A marker.
    monkeypatch.chdir(place)
    make_embeddings(data_dir, trained / "export", place / "dt=4", reuse_from="dt=1")
    assert removed == [str(place / "dt=2")]


def test_whatever_a_pointer_names_stays(two_exports, place, capsys):
    copies(two_exports, place, [f"dt={number}" for number in range(1, 6)])
    latest = str(place / "latest")
    pointer.move(latest, str(place / "dt=5"), seen=None)
    (place / "stable").symlink_to("dt=1")
    (place / "rows").symlink_to(place / "dt=2" / "embeddings")
    (place / "dt=0").mkdir()
    (place / "dt=0" / "manifest.json").write_text('{"name": "a web site"}')
    removed = list(retention.remove_old(str(place), latest, keep=1))
    assert removed == [str(place / "dt=3"), str(place / "dt=4")]
    assert (
        f"latest: {place}/dt=0 stays: {place}/dt=0/manifest.json: not as" in capsys.readouterr().err
    )
    assert (place / "dt=0" / "manifest.json").exists()
    done = latest_command(latest, "--keep=1", "--of=nope", check=False)
    assert done.returncode == 1 and "--of=nope: no such directory; expected" in done.stderr


def test_rejected_exports_push_out_no_good_one(two_exports, place):
    copies(two_exports, place, ["dt=1", "dt=2"])
    latest = str(place / "latest")
    pointer.move(latest, str(place / "dt=2"), seen=None)
    for name in ("dt=3", "dt=4"):
        shutil.copytree(two_exports / "dt=3", place / name)
    assert not list(retention.remove_old(str(place), latest, keep=2))
    copies(two_exports, place, ["dt=5"])
    removed = list(retention.remove_old(str(place), latest, keep=2))
    assert [pathlib.Path(path).name for path in removed] == ["dt=1", "dt=3", "dt=4"]


def check_removal_is_begun_again(root: str, latest: str) -> None:
    """Checks that dt=1 looks like no export, and that the next removal finishes it."""
    with pytest.raises(StageError, match="no such directory|has no manifest.json"):
        pointer.move(latest, f"{root}/dt=1", seen=pointer.read(latest))
    list(retention.remove_old(root, latest, keep=1))
    assert [name for name in files.list_names(root) if "latest" not in name] == ["dt=2"]


@pytest.mark.parametrize("number", [1, 4, 7])
def test_a_killed_removal_leaves_no_half_export_and_is_begun_again(two_exports, place, number):
    copies(two_exports, place, ["dt=1", "dt=2"])
    latest = str(place / "latest")
    pointer.move(latest, str(place / "dt=2"), seen=None)
    arguments = ["pipeline.latest", latest, "--keep=1", f"--of={place}"]
    run_command("tests.faults.die_at_removal", number, *arguments, check=False)
    assert len(list(place.glob(".removing-dt=1-*"))) == 1
    check_removal_is_begun_again(str(place), latest)


# Killed before these are removed: 1 the manifest, 2 the lease of `latest`, 3 a file, 5 a directory.
@pytest.mark.parametrize(
    "number", [0, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 2, 3, 5))]
)
def test_so_it_is_on_a_store(object_store, two_exports, number):
    del object_store
    root = f"gs://{BUCKET}/removal-{number}"
    latest, first = f"{root}/latest", f"{root}/dt=1"
    for path in two_exports.glob("dt=[12]/**/*"):
        if path.is_file() and path.name != ".lock":
            files.write_bytes(f"{root}/{path.relative_to(two_exports)}", path.read_bytes())
    pointer.move(latest, f"{root}/dt=2", seen=None)
    if number:
        arguments = ["pipeline.latest", latest, "--keep=1", f"--of={root}"]
        run_command("tests.faults.die_at_removal", number, *arguments, check=False)
    else:
        retention._set_aside(first, manifest_lib.manifest_of(first))
    if number == 1:
        check_export(first)
        files.remove(f"{first}/manifest.json")
    check_removal_is_begun_again(root, latest)


def check_export(directory: str) -> str:
    """Checks every file of an export against its manifest, and its rows; returns its export_id."""
    manifest = json.loads(files.read_bytes(files.join(directory, "manifest.json")))
    models = set()
    for entry in manifest["files"]:
        data = files.read_bytes(files.join(directory, entry["name"]))
        assert hashlib.sha256(data).hexdigest() == entry["sha256"], entry["name"]
        if entry["name"].startswith("embeddings/"):
            import io

            models.add(pq.read_schema(io.BytesIO(data)).metadata[b"model_id"].decode())
    assert models == {manifest["model_id"]}
    return manifest["export_id"]


class Reader:
    """Follows a pointer in a loop, and checks what it finds, until it is stopped."""

    def __init__(self, latest: str):
        self.rounds, self.gaps, self.exports = 0, [], set()
        self._latest, self._stop = latest, threading.Event()
        self._thread = threading.Thread(target=self._read)

    def _read(self) -> None:
        while not self._stop.is_set():
            try:
                directory = pointer.resolve(self._latest)
                self.exports.add(check_export(directory))
            except Exception as error:
                self.gaps.append(repr(error))
            self.rounds += 1

    def __enter__(self) -> "Reader":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()


@pytest.mark.parametrize("num_nights", [6, pytest.param(50, marks=pytest.mark.long)])
@pytest.mark.parametrize("where", ["local", "gs"])
def test_a_reader_finds_one_whole_export_in_every_round(
    grown,  # noqa: F811
    trained,
    other_model,  # noqa: F811
    tmp_path,
    where,
    num_nights,
    request,
):
    place = str(tmp_path / "exports")
    if where == "gs":
        request.getfixturevalue("object_store")
        place = f"gs://{BUCKET}/nights-{num_nights}"
    latest, models = files.join(place, "latest"), (trained / "export", other_model)
    settings = {"latest": latest, "images": "none"}
    make_embeddings(grown(1), models[0], files.join(place, "dt=00"), **settings)
    expected = {check_export(pointer.resolve(latest))}
    with Reader(latest) as reader:
        for night in range(1, num_nights + 1):
            out = files.join(place, f"dt={night:02d}")
            manifest = make_embeddings(grown(1), models[night // 2 % 2], out, **settings)
            expected.add(manifest["export_id"])
            list(retention.remove_old(place, latest, keep=3))
    print(f"{reader.rounds} rounds, {len(reader.gaps)} gaps, {len(reader.exports)} exports seen")
    assert not reader.gaps and reader.rounds > num_nights
    assert reader.exports <= expected
    assert len(expected) == num_nights + 1


@pytest.mark.parametrize(
    "number", [0, 7, *(pytest.param(n, marks=pytest.mark.long) for n in range(1, 16))]
)
def test_killed_anywhere_latest_names_a_whole_export(
    grown,  # noqa: F811
    trained,
    tmp_path,
    number,
):
    """Killed as the n-th file is renamed: files, the manifest, and the pointer itself."""
    data, model, place = grown(1), trained / "export", tmp_path / "exports"
    latest = place / "latest"
    make_embeddings(data, model, place / "dt=1", latest=latest)
    first = check_export(str(latest.resolve()))
    grown(9)
    flags = [f"--data_dir={data}", f"--model_dir={model}", "--noreport", f"--latest={latest}"]
    flags.append(f"--output_dir={place}/dt=2")
    run_command("tests.faults.die_at_rename", number, "pipeline.export", *flags, check=False)
    assert check_export(str(latest.resolve())) == first or number == 0
    run_command("pipeline.export", *flags)
    assert latest.resolve() == place / "dt=2"
    make_embeddings(data, model, tmp_path / "fresh")
    assert outputs_of(place / "dt=2") == outputs_of(tmp_path / "fresh")


def test_on_a_store_it_is_one_object(object_store, data_dir, trained, two_exports):
    del object_store
    place = f"gs://{BUCKET}/pointer"
    latest = f"{place}/latest"
    make_embeddings(data_dir, trained / "export", f"{place}/dt=1", latest=latest)
    content = json.loads(files.read_bytes(f"{latest}.json"))
    assert content["path"] == f"{place}/dt=1"
    assert content["export_id"] == check_export(f"{place}/dt=1")
    assert pointer.resolve(latest) == f"{place}/dt=1"
    assert latest_command(latest).stdout.strip() == f"{place}/dt=1"
    # Unchanged shards are copied by the store, with the same bytes.
    make_embeddings(data_dir, trained / "export", f"{place}/dt=2", reuse_from=f"{place}/dt=1")
    assert check_export(f"{place}/dt=2") == content["export_id"]
    latest_command(latest, f"--to={place}/dt=2")
    assert pointer.resolve(latest) == f"{place}/dt=2"
    # Whatever another pointer names stays, and another object is no pointer.
    pointer.move(f"{place}/stable/", f"{place}/dt=1/", seen=None)
    files.write_bytes(f"{place}/other.json", b"[]")
    assert not list(retention.remove_old(place, latest, keep=1))
    pointer.move(f"{place}/stable", latest, seen=pointer.read(f"{place}/stable"))
    assert json.loads(files.read_bytes(f"{place}/stable.json"))["path"] == f"{place}/dt=2"
    assert list(retention.remove_old(place, latest, keep=1)) == [f"{place}/dt=1"]
    assert files.list_names(place) == ["dt=2", "latest.json", "other.json", "stable.json"]
    files.write_bytes(f"{latest}.json", b"{}")
    with pytest.raises(StageError, match="is no pointer"):
        pointer.read(latest)


def test_links_are_copies_where_links_are_not_allowed(data_dir, trained, tmp_path, monkeypatch):
    import errno

    model, first = trained / "export", tmp_path / "first"
    make_embeddings(data_dir, model, first)
    make_embeddings(data_dir, model, tmp_path / "linked", reuse_from=first)
    for number in (errno.EXDEV, errno.EPERM):

        def link(*_, number=number):
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patched:
            patched.setattr(os, "link", link)
            out = tmp_path / f"copied-{number}"
            make_embeddings(data_dir, model, out, reuse_from=first)
        assert outputs_of(out) == outputs_of(tmp_path / "linked") == outputs_of(first)
        name = "embeddings/blobs-test-00000-of-00004.parquet"
        assert (tmp_path / "linked" / name).samefile(first / name)
        assert not (out / name).samefile(first / name)


def test_a_new_class_breaks_no_link_and_a_renamed_one_does(trained, tmp_path):
    """Class lists stand in the manifest; a row holds the name of its own class."""
    from tests.conftest import make_folder_set, make_shards

    folder, data = make_folder_set(tmp_path / "set", num_train=9, num_test=60), tmp_path / "data"
    model = trained / "export"
    make_shards(f"folder:{folder}", data)
    make_embeddings(data, model, tmp_path / "1")
    new = make_folder_set(tmp_path / "more", num_train=9, num_test=20)
    next((new / "test").iterdir()).rename(new / "test" / "zebra")
    make_shards(f"folder:{new}", data, append=True, id_prefix="more-", num_shards=1)
    make_embeddings(data, model, tmp_path / "2", reuse_from=tmp_path / "1")
    names = [sorted((tmp_path / n / "embeddings").glob("*.parquet")) for n in "12"]
    assert len(names[0]) == 4 and len(names[1]) == 5
    for path in names[0]:
        assert path.samefile(tmp_path / "2" / "embeddings" / path.name)
    rows = pq.read_table(names[1][-1]).to_pylist()
    assert "zebra" in {row["class"] for row in rows} and {row["split"] for row in rows} == {"test"}


def test_programs_read_the_folder_of_rows(data_dir, trained, tmp_path):
    import pandas as pd
    import pyarrow.dataset

    make_embeddings(data_dir, trained / "export", tmp_path / "out")
    folder = tmp_path / "out" / "embeddings"
    assert len(pd.read_parquet(folder)) == 50
    assert pyarrow.dataset.dataset(folder).count_rows() == 50
