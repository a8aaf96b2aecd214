"""Whatever a power cut leaves, the rerun gives the same bytes; what has status 0 is on the disk.

Each case records a command once (faults/replay.py). Then every state that the disk may have after
each operation is looked at, and the command is run again on it.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import random
import shutil
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from pipeline.cli.errors import StageError, UsageError
from pipeline.datasets.building import create as create_set
from pipeline.datasets.building import finish, repair
from pipeline.reports import create as create_report
from pipeline.runners import options
from pipeline.stages import manifest as manifest_lib
from pipeline.stages import pointer, quarantine, retention
from tests.benchmarks import bench_export
from tests.conftest import make_embeddings, make_folder_set, make_shards, outputs_of, smoke_config
from tests.faults import replay

# Files of a directory whose manifest or state lists files.
LISTS = ("manifest.json", "report.json")


@dataclasses.dataclass(frozen=True)
class Case:
    """A command on a directory, which may lie there already."""

    prepare: Callable[[pathlib.Path], object]
    command: Callable[[pathlib.Path], object]
    outputs: Callable[[pathlib.Path], object]
    # Files that the command may change before the manifest that lists them.
    changing: tuple[str, ...] = ()
    # Files without which a run would begin anew, once the first of them is on the disk.
    needed: str = ""
    # A file without which the others in its directory belong to nobody.
    first: str = ""
    # Number of states on which the command is run again; 0 for all of them.
    draw: int = 0
    is_rerun: bool = True

    def record(self, root: pathlib.Path) -> replay.Record:
        root.mkdir(exist_ok=True)
        replay.build({}, root)
        self.prepare(root)
        with replay.Recorder(root) as record:
            self.command(root)
        return record


def save(path: pathlib.Path, seed: int, count: int = 8) -> str:
    images = np.random.default_rng(seed).integers(0, 256, (count, 4, 4), np.uint8)
    np.savez(path, x_train=images, y_train=np.arange(count) % 2)
    return f"npz:{path}"


def make_set(root: pathlib.Path, source: str, **settings) -> None:
    make_shards(source, root / "out", num_shards=1, validation_fraction=0.0, **settings)


def make_export_directory(directory: pathlib.Path, export_id: str) -> None:
    """The smallest finished export."""
    directory.mkdir()
    (directory / "rows").write_bytes(b"rows")
    counts = {"read": 0, "written": 0, "quarantined": 0}
    manifest = {"stage": "export", "format_version": 1, "export_id": export_id, "dataset_id": "d"}
    manifest |= {"model_id": export_id, "records": counts, "metrics": {}, "shards": {}}
    manifest |= {"made_from": {"name": "n", "split": ["test"]}}
    manifest |= {"files": [manifest_lib.file_entry("rows", b"rows")]}
    (directory / "manifest.json").write_bytes(manifest_lib.sealed_json(manifest))


def set_aside(root: pathlib.Path) -> None:
    for number in (1, 2):
        make_export_directory(root / f"dt={number}", f"{number:016x}")
    (root / "dt=2" / "manifest.json").rename(root / "dt=2" / "aside")


def move_pointer(root: pathlib.Path) -> None:
    """To an export that a killed job has just finished, from a directory that is new."""
    if (root / "dt=2" / "aside").exists():
        os.replace(root / "dt=2" / "aside", root / "dt=2" / "manifest.json")
    latest = str(root / "links" / "latest")
    pointer.move(latest, str(root / "dt=2"), seen=pointer.read(latest))


def confirm_pointer(root: pathlib.Path) -> None:
    """A killed job has moved the pointer and not waited for the disk."""
    latest = root / "latest"
    if not latest.is_symlink():
        os.symlink("dt=1", str(root / "new"))
        os.replace(str(root / "new"), str(latest))
    pointer.move(str(latest), str(root / "dt=1"), seen=pointer.read(str(latest)))


def remove_old(root: pathlib.Path) -> None:
    """A killed job has moved the pointer and not waited for the disk."""
    if os.readlink(root / "latest") == "dt=1":
        os.symlink("dt=2", str(root / "new"))
        os.replace(str(root / "new"), str(root / "latest"))
    list(retention.remove_old(str(root), str(root / "latest"), keep=1))


def prepare_removal(root: pathlib.Path) -> None:
    for number in (1, 2):
        make_export_directory(root / f"dt={number}", f"{number:016x}")
    (root / "latest").symlink_to("dt=1")


def links_of(root: pathlib.Path) -> dict[str, str]:
    paths = sorted(path for path in root.rglob("*") if not path.match("*.lock"))
    return {
        str(path.relative_to(root)): os.readlink(path) if path.is_symlink() else ""
        for path in paths
    }


def out_of(root: pathlib.Path) -> dict[str, bytes]:
    return outputs_of(root / "out")


def without_lost(root: pathlib.Path) -> dict[str, bytes]:
    """A killed repair may leave a file in two directories of lost/."""
    return {name: data for name, data in out_of(root).items() if not name.startswith("lost/")}


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, Case]:
    from trainer.runs import measure

    place = tmp_path_factory.mktemp("sources")
    first, second = save(place / "first.npz", 1), save(place / "second.npz", 2)

    def append(root: pathlib.Path) -> None:
        make_set(root, second, append=True, id_prefix="more-")

    def replace(root: pathlib.Path) -> None:
        make_set(root, second, append=True, on_changed="replace")

    def unindex(root: pathlib.Path) -> None:
        """As an earlier version made sets."""
        make_set(root, first)
        manifest = manifest_lib.manifest_of(str(root / "out"))
        names = [entry["name"] for entry in manifest["files"] if "/blobs-" in entry["name"]]
        kept = [entry for entry in manifest["files"] if entry["name"] not in names]
        data = manifest_lib.sealed_json({**manifest, "files": kept})
        (root / "out" / "manifest.json").write_bytes(data)
        for name in names:
            (root / "out" / name).unlink()

    def finish_again(root: pathlib.Path) -> None:
        """After a job that was killed as its manifest got its name."""
        aside = root / "out" / "aside"
        if aside.exists():
            os.replace(aside, root / "out" / "manifest.json")
        make_set(root, first)

    def kill_at_manifest(root: pathlib.Path) -> None:
        make_set(root, first)
        (root / "out" / "manifest.json").rename(root / "out" / "aside")

    def made(root: pathlib.Path) -> None:
        make_set(root, first)

    def lose_the_manifest(root: pathlib.Path) -> None:
        made(root)
        append(root)
        (root / "out" / "manifest.json").write_bytes(b"")

    def go_back(root: pathlib.Path) -> None:
        output = create_set.output_directory(str(root / "out"), {})
        repair.repair(output, options.parse_options([]))

    def lose_a_shard(root: pathlib.Path) -> None:
        made(root)
        append(root)
        (root / "out" / "blobs-train.tfrecord-00001-of-00001").unlink()

    folder = make_folder_set(place / "folder", num_train=2, num_test=0)
    next(folder.rglob("*.png")).write_bytes(b"no image")

    def made_with_a_list(root: pathlib.Path) -> None:
        make_set(root, f"folder:{folder}", max_quarantined="1")

    def lose_a_list(root: pathlib.Path) -> None:
        made_with_a_list(root)
        next((root / "out" / "quarantine").iterdir()).unlink()

    descriptions = (*finish.NAMES, "index/statistics-train.npz")
    return {
        "preprocess": Case(lambda root: None, made, out_of),
        "append": Case(made, append, out_of, changing=descriptions),
        "pointer": Case(set_aside, move_pointer, links_of),
        "pointer again": Case(set_aside, confirm_pointer, links_of),
        "removal of old exports": Case(prepare_removal, remove_old, links_of),
        "replace": Case(made, replace, out_of, changing=descriptions),
        "overwrite": Case(
            made, lambda root: make_set(root, second, seed=1, overwrite=True), out_of
        ),
        "restore": Case(unindex, append, out_of, changing=descriptions),
        "repair": Case(lose_the_manifest, go_back, without_lost, changing=descriptions),
        "a lost shard": Case(lose_a_shard, append, out_of, changing=(".tfrecord-00001-of-00001",)),
        "a lost list": Case(lose_a_list, made_with_a_list, out_of, changing=(".jsonl",)),
        "finished by a killed try": Case(kill_at_manifest, finish_again, out_of),
        "evaluate": Case(
            lambda root: None,
            lambda root: measure.write({"split": "test"}, str(root), None),
            links_of,
        ),
    }


@pytest.fixture(scope="module")
def slow_cases(data_dir, trained, tmp_path_factory) -> dict[str, Case]:
    """Cases with a model."""
    from trainer.runs import train

    damaged = tmp_path_factory.mktemp("damaged") / "set"
    shutil.copytree(data_dir, damaged)
    shard = damaged / "blobs-train.tfrecord-00000-of-00004"
    shard.write_bytes(shard.read_bytes()[:-1])

    def export(root: pathlib.Path, name: str, **settings) -> None:
        make_embeddings(data_dir, trained / "export", root / name, **settings)

    def first_night(root: pathlib.Path) -> None:
        export(root, "dt=1")
        (root / "latest").symlink_to("dt=1")

    def second_night(root: pathlib.Path) -> None:
        export(root, "dt=2", split="test,validation", latest=root / "latest")

    def run(root: pathlib.Path, source: pathlib.Path = data_dir) -> None:
        # The first checkpoint comes after the first lines of metrics.jsonl.
        config = smoke_config(source, checkpoint_every_steps=100, keep_checkpoints=1)
        limit = quarantine.parse_limit("50%")
        train.train(
            config, workdir=str(root / "run"), on_corrupt="quarantine", max_quarantined=limit
        )

    def report(root: pathlib.Path) -> None:
        create_report.make_report(str(root / "out"), input_=None, model_dir=None, run_dir=None)

    def kill_at_manifest(root: pathlib.Path) -> None:
        shutil.copytree(trained, root / "run", ignore=shutil.ignore_patterns("tensorboard"))
        (root / "run" / "metrics.jsonl").unlink()
        (root / "run/export/manifest.json").rename(root / "run/export/aside")

    def finish_again(root: pathlib.Path) -> None:
        if (root / "run/export/aside").exists():
            os.replace(root / "run/export/aside", root / "run/export/manifest.json")
        train.train(smoke_config(data_dir), workdir=str(root / "run"))

    def publish(root: pathlib.Path, **changes) -> None:
        bench_export.make_model(str(root / "model"), (12, 8, 1), filters=(2, 2, 2), **changes)

    return {
        "export": Case(
            first_night,
            second_night,
            lambda root: (os.readlink(root / "latest"), outputs_of(root / "dt=2")),
            draw=20,
        ),
        "report": Case(lambda root: export(root, "out"), report, out_of, draw=5),
        "train": Case(
            lambda root: None, run, model_of, needed=".npz", first="run/config.json", draw=20
        ),
        "train, a damaged shard": Case(
            lambda root: None, lambda root: run(root, damaged), model_of, is_rerun=False
        ),
        "train, finished by a killed try": Case(kill_at_manifest, finish_again, model_of, draw=5),
        "publish": Case(
            publish, lambda root: publish(root, latent_dim=2), lambda root: None, is_rerun=False
        ),
    }


def model_of(root: pathlib.Path) -> list[bytes]:
    run = root / "run"
    model_id = json.loads((run / "export" / "manifest.json").read_bytes())["model_id"]
    paths = [run / name for name in ("config.json", "metrics.jsonl", "export/weights.npz")]
    return [model_id.encode(), *(path.read_bytes() for path in paths)]


def listed_files(tree: replay.Tree) -> Iterator[tuple[str, dict]]:
    """(path, entry) of each file that a manifest, a report or a marker lists."""
    for path, content in tree.items():
        directory, name = os.path.split(path)
        is_marker = name.endswith(".json") and os.path.basename(directory) == ".progress"
        if path.startswith(".removing-"):
            continue  # Nobody reads it.
        if isinstance(content, bytes) and (name in LISTS or is_marker):
            try:
                value = json.loads(content)
            except ValueError:
                continue  # Torn, and so refused.
            base = os.path.dirname(directory) if is_marker else directory
            for entry in value.get("files", value.get("entries", ())):
                if "sha256" in entry:  # report.json lists names at first.
                    yield os.path.join(base, entry["name"]), entry


def check_lists(case: Case, tree: replay.Tree) -> None:
    """What lists files lists bytes on the disk, and a pointer names a finished directory."""
    for path, entry in listed_files(tree):
        content = tree.get(path)
        if not path.endswith(case.changing or ("\0",)):
            assert isinstance(content, bytes), f"{path} is listed and missing"
            assert hashlib.sha256(content).hexdigest() == entry["sha256"], f"{path} is torn"
    if case.first and case.first not in tree:
        assert not any(map(tree.get, tree)), f"{case.first} is lost, and others are not"
    for path, content in tree.items():
        if isinstance(content, replay.Link):
            target = os.path.normpath(os.path.join(os.path.dirname(path), content.target))
            assert f"{target}/manifest.json" in tree, f"{path} names an unfinished {target}"


def check_all(case: Case, record: replay.Record, without: str = "") -> int:
    """Looks at the states after each operation; returns their number."""
    seen, num_operations = set(), len(record.operations)
    final = record.tree(record.now)
    for end in range(num_operations + 1):
        for state in record.states(end, without=without):
            key = replay.key(state.tree)
            if key not in seen or end == num_operations:
                check_lists(case, state.tree)
            if end == num_operations:
                for path, content in final.items():
                    assert state.tree.get(path, b"") == content, f"status 0, and {path} is lost"
            seen.add(key)
    if case.needed:
        check_needed(case, record, without)
    return len(seen)


def check_needed(case: Case, record: replay.Record, without: str) -> None:
    """Once a checkpoint counts as saved, the disk holds one, whatever happens."""
    whole = {
        node.data
        for operation in record.operations
        for _, name, node in operation.changes
        if isinstance(node, replay.File) and name.endswith(case.needed)
    }
    syncs = [n for n, op in enumerate(record.operations) if op.site.startswith("checkpoints.")]
    for end in range(syncs[0] + 1, len(record.operations) + 1):
        for what, tree in record.states(end, without=without):
            saved = {data for path, data in tree.items() if path.endswith(case.needed)}
            assert saved & whole, f"{what}: no checkpoint"


def rerun(case: Case, state: replay.State, root: pathlib.Path, expected: object) -> None:
    """Runs the command on a state; raises if it fails, or if its outputs are others."""
    replay.build(state.tree, root)
    case.command(root)
    assert case.outputs(root) == expected, state.what


def rerun_all(
    case: Case, record: replay.Record, root: pathlib.Path, expected: object, without: str = ""
) -> int:
    """Reruns on each state of the record, or on drawn ones; returns their number."""
    seen: dict[bytes, replay.State] = {}
    for end in range(len(record.operations) + 1):
        for state in record.states(end, without=without, few=True):
            seen.setdefault(replay.key(state.tree), state)
    states = list(seen.values())
    if case.draw and not without:
        states = random.Random(0).sample(states, min(case.draw, len(states)))
    for state in states:
        try:
            rerun(case, state, root, expected)
        except (StageError, UsageError) as error:
            raise AssertionError(f"{state.what}: {error}") from error
    return len(states)


QUICK = ("preprocess", "append", "pointer", "pointer again", "removal of old exports", "evaluate")
MORE = (
    *("replace", "overwrite", "restore", "repair", "a lost shard", "a lost list"),
    "finished by a killed try",
)
SLOW = (
    *("export", "report", "publish"),
    *("train", "train, a damaged shard", "train, finished by a killed try"),
)


def survives(case: Case, root: pathlib.Path) -> str:
    """Checks all states and reruns on them; returns what was done."""
    record = case.record(root)
    expected, num_states = case.outputs(root), check_all(case, record)
    num_reruns = rerun_all(case, record, root, expected) if case.is_rerun else 0
    return f"{len(record.operations)} operations, {num_states} states, {num_reruns} reruns"


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(n, marks=pytest.mark.long) for n in MORE)])
def test_each_state_is_completed_to_the_same_bytes(name, cases, tmp_path):
    print(name, survives(cases[name], tmp_path / "root"))


@pytest.mark.long
@pytest.mark.parametrize("name", SLOW)
def test_each_state_of_models_and_exports_is_completed(name, slow_cases, tmp_path):
    print(name, survives(slow_cases[name], tmp_path / "root"))


@pytest.mark.long
def test_each_wait_for_the_disk_is_needed(cases, slow_cases, tmp_path):
    """Without any one of them some state is wrong, or cannot be completed."""
    root, needed, sites = tmp_path / "root", {}, set()

    def try_without(name: str, site: str, check: Callable[[], object]) -> None:
        sites.add(site)
        try:
            if site not in needed:
                check()
        except Exception as error:  # In a rerun, any.
            needed[site] = f"{name}: {str(error).splitlines()[0]}"

    for name, case in (cases | slow_cases).items():
        record = case.record(root)
        for site in record.sites():
            try_without(name, site, functools.partial(check_all, case, record, site))
    for name, case in cases.items():
        record = case.record(root)
        expected = case.outputs(root)
        for site in record.sites():
            check = functools.partial(rerun_all, case, record, root, expected, site)
            try_without(name, site, check)
    for site in sorted(sites):
        print(f"{site:<45}{needed.get(site, '-')}")
    assert needed.keys() == sites
