"""Any one file of a data set may be lost; what brings it back, and what is said if nothing does."""

import shutil

import pytest

from pipeline.cli.errors import StageError
from pipeline.datasets import verification
from pipeline.datasets.building import create, repair
from pipeline.runners import options
from pipeline.stages import manifest as manifest_lib
from tests.conftest import make_folder_set, make_shards, outputs_of
from tests.forked import run_command

FIRST, SECOND = "first", "second"
DAMAGES = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
    "page": lambda data: data[: len(data) // 3] + bytes(4) + data[len(data) // 3 + 4 :],
    "gone": None,
}
SHARDS = {"num_shards": 1, "validation_fraction": 0.0, "max_quarantined": "3"}
APPENDED = "blobs-train.tfrecord-00001-of-00001"


def damage(path, kind: str) -> None:
    data = path.read_bytes()
    path.unlink()
    if DAMAGES[kind]:
        changed = DAMAGES[kind](data)
        path.write_bytes(changed if changed != data else data[:-1] + b"x")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two folders, each with an unreadable image, a set of the first, and a set of both."""
    place = tmp_path_factory.mktemp("place")
    for seed, name in enumerate((FIRST, SECOND)):
        folder = make_folder_set(place / name, num_train=8, num_test=4)
        images = sorted(folder.rglob("*.png"))
        for image in images:  # Not equal to those of the other folder.
            image.rename(image.with_name(f"{name}-{image.name}"))
        sorted(folder.rglob("*.png"))[seed].write_bytes(b"no image")
    make_shards(f"folder:{place / FIRST}", place / "plain", **SHARDS)
    shutil.copytree(place / "plain", place / "appended")
    make_shards(f"folder:{place / SECOND}", place / "appended", append=True, **SHARDS)
    return place


def names(directory) -> list[str]:
    return [name for name in outputs_of(directory) if name != "manifest.json.previous"]


def faults(directory) -> list[str]:
    return [str(fault) for fault in verification.verify(str(directory))[1]]


def mend(directory) -> repair.Repaired:
    output = create.output_directory(str(directory), {})
    return repair.repair(output, options.parse_options([]))


def each_loss(directory, tmp_path, kinds=tuple(DAMAGES)):
    """(name, damaged copy) for each file of a set and each damage."""
    for name in names(directory):
        for kind in kinds:
            copy = tmp_path / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(directory, copy)
            damage(copy / name, kind)
            yield name, copy


def is_named(name: str, copy) -> bool:
    try:
        return any(name in fault for fault in faults(copy))
    except StageError as error:
        return name in str(error)


def test_each_lost_file_of_a_set_is_named_and_made_anew(place, tmp_path):
    whole = outputs_of(place / "plain")
    for name, copy in each_loss(place / "plain", tmp_path, ("half", "zeros", "gone")):
        assert is_named(name, copy), name
        overwrite = name == "manifest.json"
        make_shards(f"folder:{place / FIRST}", copy, overwrite=overwrite, **SHARDS)
        assert outputs_of(copy) == whole, name
        assert not faults(copy)


@pytest.mark.parametrize("source", [FIRST, SECOND])
def test_each_lost_file_of_an_appended_set_comes_from_the_set_or_its_source(
    place, tmp_path, source
):
    whole = outputs_of(place / "appended")
    for name, copy in each_loss(place / "appended", tmp_path, ("zeros", "gone")):
        is_of_source, is_new = ".tfrecord-" in name, "-00001-of-" in name
        try:
            make_shards(f"folder:{place / source}", copy, append=True, reread=True, **SHARDS)
        except StageError as error:
            assert name in str(error)
            assert name == "manifest.json" or (is_of_source and is_new != (source == SECOND))
        else:
            assert outputs_of(copy) == whole, name
            assert not faults(copy)


@pytest.mark.parametrize("kind", DAMAGES)
def test_without_a_source_functions_of_the_shards_are_made_anew_and_the_rest_goes_back(
    place, tmp_path, kind
):
    whole, before = outputs_of(place / "appended"), outputs_of(place / "plain")
    for name, copy in each_loss(place / "appended", tmp_path, (kind,)):
        is_before = name in before and ".tfrecord-" in name
        if is_before and "-00000-of-" in name:  # Neither manifest helps.
            with pytest.raises(StageError, match=f"missing or damaged: {name}; expected intact"):
                mend(copy)
            continue
        done = mend(copy)
        assert done.went_back == (name == "manifest.json" or ".tfrecord-" in name)
        if not done.went_back:
            assert outputs_of(copy) == whole
            assert not done.set_aside
            continue
        after = outputs_of(copy)
        lost = {name for name in after if name.startswith("lost/")}
        assert {name: after[name] for name in after.keys() - lost} == before
        assert {name.removeprefix("lost/0001/") for name in lost} == set(done.set_aside)
        assert done.num_set_aside == {"manifest.json": 11}.get(name, done.num_set_aside)
        assert not faults(copy)
        shutil.rmtree(copy / "lost")
        make_shards(f"folder:{place / SECOND}", copy, append=True, **SHARDS)
        assert outputs_of(copy) == whole


def test_a_repair_that_is_killed_is_completed(place, tmp_path, monkeypatch):
    """Wherever it stops; a second one then ends as the first would have."""
    from pipeline.storage import files

    class Killed(BaseException):
        pass

    def torn(name):
        copy = tmp_path / name
        shutil.copytree(place / "appended", copy)
        damage(copy / APPENDED, "gone")
        (copy / "manifest.json").write_bytes(b"")
        return copy

    mend(torn("undisturbed"))
    expected = {n: d for n, d in outputs_of(tmp_path / "undisturbed").items() if "lost/" not in n}
    number, is_over = 0, False
    while not is_over:
        copy, left = torn(str(number)), [number]

        def counting(work, left=left):
            def counted(*args):
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                return work(*args)

            return counted

        with monkeypatch.context() as patch:
            for function in ("write_bytes", "link", "remove"):
                patch.setattr(files, function, counting(getattr(files, function)))
            try:
                mend(copy)
                is_over = True
            except (Killed, RuntimeError):  # Beam raises the second for the first.
                pass
        mend(copy)
        after = outputs_of(copy)
        assert {n: d for n, d in after.items() if "lost/" not in n} == expected
        # The appended shard of the split test; a killed move may have left it in two directories.
        shards = {path.name for path in (copy / "lost").rglob("*.tfrecord-*[0-9]")}
        assert shards == {"blobs-test.tfrecord-00001-of-00001"}
        number += 1
    assert number > 5


def test_what_cannot_be_mended_is_refused_and_stays(place, tmp_path, trained):
    with pytest.raises(StageError, match="no such directory"):
        mend(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    for name, origin in (("plain", place / "plain"), ("model", trained / "export")):
        shutil.copytree(origin, tmp_path / name)
        (tmp_path / name / "manifest.json").write_bytes(b"")
        before = outputs_of(tmp_path / name)
        with pytest.raises(StageError, match=r"no intact manifest.json.previous; run the command"):
            mend(tmp_path / name)
        assert outputs_of(tmp_path / name) == before


def test_a_damaged_earlier_manifest_is_named_and_goes(place, tmp_path):
    copy = tmp_path / "set"
    shutil.copytree(place / "appended", copy)
    damage(copy / manifest_lib.PREVIOUS, "page")
    [fault] = faults(copy)
    assert fault.startswith(f"{copy}/manifest.json.previous: is damaged")
    assert not mend(copy).went_back
    assert not faults(copy) and not (copy / manifest_lib.PREVIOUS).exists()


def test_an_append_sees_a_shard_of_zeros_without_reading_it(place, tmp_path):
    copy = tmp_path / "set"
    shutil.copytree(place / "appended", copy)
    damage(copy / APPENDED, "zeros")
    with pytest.raises(StageError, match=f"missing or damaged: {APPENDED}; expected intact"):
        make_shards(f"folder:{place / FIRST}", copy, append=True, **SHARDS)
    make_shards(f"folder:{place / SECOND}", copy, append=True, **SHARDS)
    assert outputs_of(copy) == outputs_of(place / "appended")


def test_the_command_says_what_is_lost_once(place, tmp_path):
    copy = tmp_path / "set"
    shutil.copytree(place / "appended", copy)
    damage(copy / "manifest.json", "gone")
    done = run_command("pipeline.verify", copy, check=False)
    assert "has no manifest.json" in done.stderr and "pipeline.verify --repair" in done.stderr
    done = run_command("pipeline.verify", "--repair", copy, check=False)
    assert done.returncode == 1
    assert f"with 11 intact records, to {copy}/lost\n" in done.stdout
    assert "verify: whole: 11 records" in done.stdout
    assert "went back to the data set before its last append" in done.stderr
    done = run_command("pipeline.verify", "--repair", copy)
    assert done.stdout.startswith("verify: whole: 11 records")
    done = run_command("pipeline.verify", "--repair", "--absent=x", copy, check=False)
    assert done.returncode == 2 and "contradict each other" in done.stderr


def test_another_source_does_not_write_over_a_set_that_has_lost_its_manifest(place, tmp_path):
    copy = tmp_path / "set"
    shutil.copytree(place / "appended", copy)
    damage(copy / "manifest.json", "gone")
    before = outputs_of(copy)
    for source in (FIRST, SECOND):
        with pytest.raises(StageError, match="mend the data set with python -m pipeline.verify"):
            make_shards(f"folder:{place / source}", copy, **SHARDS)
    assert outputs_of(copy) == before


@pytest.mark.parametrize(
    "names",
    [
        ("stats.html",),
        ("statistics.json", "manifest.json"),
        ("dataset_info.json", "imagenet-train.tfrecord-00000-of-00001", "features.json"),
        (".progress/my.json", "manifest.json"),
        ("manifest.json.previous/thesis", "timings.json"),
        ("statistics.json/thesis", "timings.json"),
    ],
)
def test_overwrite_takes_no_directory_of_another_program(place, tmp_path, names):
    for name in names:
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_text('{"name": "mine"}')
    if "timings.json" in names:  # Ours, and the rest is not.
        shutil.copy(place / "plain" / "timings.json", tmp_path / "set")
    before = outputs_of(tmp_path / "set")
    for overwrite in (False, True):
        with pytest.raises(StageError, match="not as this program|so it is no output of this"):
            make_shards(f"folder:{place / FIRST}", tmp_path / "set", overwrite=overwrite, **SHARDS)
    assert outputs_of(tmp_path / "set") == before


def test_overwrite_follows_no_link(place, tmp_path):
    shutil.copytree(place / "plain", tmp_path / "set")
    (tmp_path / "set" / "manifest.json").unlink()
    (tmp_path / "set" / "index").rename(tmp_path / "elsewhere")
    (tmp_path / "set" / "index").symlink_to(tmp_path / "elsewhere")
    before = outputs_of(tmp_path / "elsewhere")
    with pytest.raises(StageError, match="move index/ away first, and pass --overwrite"):
        make_shards(f"folder:{place / FIRST}", tmp_path / "set", overwrite=True, **SHARDS)
    assert outputs_of(tmp_path / "elsewhere") == before


def test_nothing_in_lost_is_written_over(place, tmp_path):
    copy = tmp_path / "set"
    shutil.copytree(place / "appended", copy)
    for number in (1, 2, 3):
        (copy / APPENDED).write_bytes(b"%d" % number)
        mend(copy)
        make_shards(f"folder:{place / SECOND}", copy, append=True, **SHARDS)
        if number == 2:
            shutil.rmtree(copy / "lost" / "0001")
    contents = [(copy / "lost" / f"000{n}" / APPENDED).read_bytes() for n in (2, 3)]
    assert contents == [b"2", b"3"]


def test_a_repair_that_went_back_and_was_killed_says_so_when_it_is_completed(place, tmp_path):
    copy = tmp_path / "set"
    shutil.copytree(place / "appended", copy)
    shutil.copy(copy / manifest_lib.PREVIOUS, copy / "manifest.json")
    assert mend(copy).went_back
    assert not mend(copy).went_back


def test_an_append_that_was_undone_is_no_killed_repair(place, tmp_path, when_written):
    class Killed(BaseException):
        pass

    def die() -> None:
        raise Killed

    copy = tmp_path / "set"
    shutil.copytree(place / "plain", copy)
    when_written("set/manifest.json", die)
    with pytest.raises(Killed):
        make_shards(f"folder:{place / SECOND}", copy, append=True, **SHARDS)
    assert (copy / manifest_lib.PREVIOUS).exists()
    make_shards(f"folder:{place / FIRST}", copy, append=True, overwrite=True, **SHARDS)
    assert not mend(copy).went_back
    assert outputs_of(copy) == outputs_of(place / "plain")


@pytest.mark.parametrize("lost", [APPENDED, "blobs-train.tfrecord-00000-of-00001"])
def test_a_shard_and_its_index_come_from_the_source_together(place, tmp_path, lost):
    copy = tmp_path / "set"
    shutil.copytree(place / "appended", copy)
    (copy / lost).unlink()
    (copy / "index" / f"{lost.replace('.tfrecord-', '-')}.npy").unlink()
    source = SECOND if lost == APPENDED else FIRST
    make_shards(f"folder:{place / source}", copy, append=True, **SHARDS)
    assert outputs_of(copy) == outputs_of(place / "appended")


def test_a_lost_list_of_removed_ids_comes_from_a_copy_only(place, tmp_path):
    from pipeline.datasets.building import removal

    copy = tmp_path / "set"
    shutil.copytree(place / "appended", copy)
    beam = options.parse_options([])
    removal.remove_records(str(copy), ["no such id"], overwrite=False, options=beam)
    (copy / "index" / "barred-0001.npy").unlink()
    with pytest.raises(StageError, match="restore the file from a copy"):
        mend(copy)
    with pytest.raises(StageError, match="restore the file from a copy"):
        make_shards(f"folder:{place / FIRST}", copy, append=True, **SHARDS)


def test_a_removal_leaves_no_manifest_to_go_back_to(place, tmp_path):
    from pipeline.datasets.building import removal

    copy = tmp_path / "set"
    shutil.copytree(place / "appended", copy)
    removal.remove_records(
        str(copy), ["no such id"], overwrite=False, options=options.parse_options([])
    )
    assert not (copy / manifest_lib.PREVIOUS).exists()
