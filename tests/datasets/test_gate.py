"""--require and --reference of a data set: what is rejected, and what becomes of it."""

import json
import shutil
import signal
import subprocess
import sys

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest

from pipeline.api import UsageError, preprocess
from pipeline.cli.errors import StageError
from pipeline.datasets.profile import drift, measures
from pipeline.datasets.profile.statistics import Statistics
from pipeline.datasets.profile.warnings import Duplicates
from pipeline.stages import gate
from pipeline.stages.output_directory import UnfinishedConflict
from tests.conftest import (
    REPOSITORY,
    blobs,
    die_at_file,
    make_embeddings,
    make_idx_set,
    make_shards,
    outputs_of,
    smoke_config,
    write_idx,
)
from tests.datasets.test_append import grown_idx
from tests.forked import run_command

# Bounds that blobs break and keep.
BROKEN, KEPT = "min_class_share>=0.5", "min_class_share>=0.01,test_in_train==0"


def save_npz(path, splits) -> str:
    """A source of arrays, split -> (images, labels)."""
    arrays = {}
    for split, (images, labels) in splits.items():
        arrays |= {f"x_{split}": images, f"y_{split}": labels}
    np.savez(path, **arrays)
    return f"npz:{path}"


def everything_in(directory) -> dict[str, bytes]:
    """As outputs_of, with timings, memories of sources and unfinished work."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture
def grown(idx_dir, tmp_path):
    return f"idx:{grown_idx(tmp_path / 'grown', idx_dir)}"


@pytest.fixture
def out(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "out")
    return tmp_path / "out"


def test_every_metric_is_that_of_the_records_to_the_last_bit(tmp_path):
    generator = np.random.default_rng(3)
    sizes = {"train": 97, "validation": 31, "test": 23}
    sets = {
        split: (generator.integers(0, 256, (n, 5, 4), np.uint8), generator.integers(0, 3, n))
        for split, n in sizes.items()
    }
    (x, y), (v, _), (u, w) = sets["train"], sets["validation"], sets["test"]
    x[:4], x[5], y[9:16], y[20] = 7, x[6], -1, 5
    u[:3], v[0], u[9], w[9] = x[30:33], x[40], v[1], 2
    splits = {s: (images, labels) for s, (images, labels) in sets.items()}
    source = save_npz(tmp_path / "set.npz", splits)
    settings = {"validation_fraction": 0.0, "class_names": ("a", "b", "c")}
    make_shards(source, tmp_path / "out", **settings)

    images = {s: [image.tobytes() for image in part] for s, (part, _) in sets.items()}
    labels = {s: labels.tolist() for s, (_, labels) in sets.items()}
    count, everything = sum(sizes.values()), [i for part in images.values() for i in part]
    shares = [
        labels[s].count(label) / (sizes[s] - labels[s].count(-1))
        for s in sizes
        for label in (0, 1, 2)
    ]
    labels_of = {}
    for image, label in zip(everything, sum(labels.values(), []), strict=True):
        labels_of.setdefault(image, set()).add(label)
    expected = {
        "written": count,
        "quarantined": 0,
        "quarantined_share": 0,
        "min_class_share": min(shares),
        "max_class_share": max(shares),
        "unlabelled": 7 / count,
        "outside_classes": 1,
        "blank": 4 / count,
        "duplicates": sum(n - len(set(images[s])) for s, n in sizes.items()) / count,
        "relabelled": sum(len(found) > 1 for found in labels_of.values()),
        "test_in_train": 3,
        "validation_in_train": 1,
        "test_in_validation": 1,
    }
    assert expected.keys() == {*measures.NAMES} and 0 < expected["duplicates"] < 0.1

    def rerun(*bounds: str) -> dict:
        return make_shards(source, tmp_path / "out", **settings, require=",".join(bounds))

    assert rerun(*(f"{n}{o}{v!r}" for n, v in expected.items() for o in (">=", "<=", "==")))[
        "reused"
    ]
    # At the edge, none of these holds, and the message has each of them.
    with pytest.raises(gate.Rejected) as error:
        rerun(*(f"{n}{o}{v!r}" for n, v in expected.items() for o in ("<", ">")))
    assert str(error.value).count("(it is ") == 2 * len(expected)
    # A finished set stays what it is.
    assert "rejected" not in json.loads((tmp_path / "out" / "manifest.json").read_text())
    page = (REPOSITORY / "docs" / "preprocess.md").read_text()
    assert all(f"| `{name}`" in page or f", `{name}`" in page for name in measures.NAMES)


def test_quarantined_records_are_counted_and_shared(tmp_path):
    from tests.conftest import make_folder_set

    folder = make_folder_set(tmp_path / "folder", num_train=40, num_test=0)
    for path in sorted(folder.rglob("*.png"))[:2]:
        path.write_bytes(b"no image")
    settings = {"max_quarantined": "0.5", "require": "quarantined<2,quarantined_share>0.05"}
    with pytest.raises(gate.Rejected) as error:
        make_shards(f"folder:{folder}", tmp_path / "out", **settings)
    for text in ("quarantined<2 (it is 2)", "quarantined_share>0.05 (it is 0.05)"):
        assert text in str(error.value)
    settings["require"] = "quarantined<=2,quarantined_share>=0.05"
    make_shards(f"folder:{folder}", tmp_path / "out", **settings)


def test_without_labels_no_bound_on_class_shares_holds(tmp_path):
    source = save_npz(tmp_path / "set.npz", {"train": (blobs()["train"][0], np.full(300, -1))})
    for number, bound in enumerate(("min_class_share>=0", "max_class_share<=1")):
        with pytest.raises(gate.Rejected, match="there is none, without labels"):
            make_shards(source, tmp_path / f"{number}", require=bound)
    make_shards(source, tmp_path / "out", require="unlabelled==1,duplicates<1")


def test_a_rejected_set_is_finished_and_nobody_takes_it(idx_dir, data_dir, trained, tmp_path):
    source, out = f"idx:{idx_dir}", tmp_path / "out"
    with pytest.raises(gate.Rejected, match=r"min_class_share>=0.5 \(it is 0.0"):
        make_shards(source, out, require=BROKEN)
    rejected, plain = outputs_of(out), outputs_of(data_dir)
    manifest = json.loads(rejected["manifest.json"])
    assert len(manifest["rejected"]) == 1 and BROKEN in manifest["rejected"][0]
    assert manifest["dataset_id"] == json.loads(plain["manifest.json"])["dataset_id"]
    # The same bytes, without the files by which tensorflow-datasets would read the set.
    assert plain.keys() - rejected.keys() == {
        *("croissant.json", "dataset_info.json", "features.json", "label.labels.txt")
    }
    same = plain.keys() & rejected.keys() - {"manifest.json"}
    assert all(rejected[name] == plain[name] for name in same)

    from trainer.runs import measure, train

    model = trained / "export"
    for take in (
        lambda: train.train(smoke_config(out), workdir=str(tmp_path / "run")),
        lambda: measure.measure(
            model_dir=str(model), data_dir=str(out), split="test", num_importance_samples=1
        ),
        lambda: make_embeddings(out, model, tmp_path / "embeddings"),
        lambda: make_shards(source, out, append=True),
        lambda: make_shards(source, out),
    ):
        with pytest.raises(gate.Rejected, match="was rejected by --require .min_class_share>=0.5"):
            take()
    assert not (tmp_path / "run").exists() and not (tmp_path / "embeddings").exists()
    for append in (False, True):
        with pytest.raises(gate.Rejected, match="min_class_share>=0.4 .it is"):
            make_shards(source, out, require="min_class_share>=0.4", append=append)
    assert outputs_of(out) == rejected
    done = run_command("pipeline.verify", out)
    assert ", rejected by --require (min_class_share>=0.5 (it is 0.0" in done.stdout
    # A rerun mends a rejected set, and does not accept it.
    (out / "stats.html").unlink()
    with pytest.raises(gate.Rejected):
        make_shards(source, out)
    assert outputs_of(out) == rejected

    accepted = make_shards(source, out, require=KEPT)
    assert accepted["reused"] and "rejected" not in accepted
    assert outputs_of(out) == plain


@pytest.mark.parametrize("removes", [pytest.param(False, marks=pytest.mark.long), True])
def test_a_rejected_set_is_accepted_with_the_records_that_it_lacked(tmp_path, removes):
    images, labels = blobs()["train"]
    is_rare = labels == 3
    few = save_npz(tmp_path / "few.npz", {"train": (images[~is_rare], labels[~is_rare])})
    names = {"class_names": tuple("0123456789"), "validation_fraction": 0.0}
    with pytest.raises(gate.Rejected, match="it is 0"):
        make_shards(few, tmp_path / "out", require=KEPT, **names)
    if removes:  # A removal does not lift the rejection.
        (tmp_path / "ids").write_text("train-0000001\n")
        run_command("pipeline.remove", f"--data_dir={tmp_path}/out", f"--ids={tmp_path}/ids")
        assert "rejected" in json.loads((tmp_path / "out" / "manifest.json").read_text())
        assert not (tmp_path / "out" / "dataset_info.json").exists()
    rest = save_npz(tmp_path / "rest.npz", {"train": (images[is_rare], labels[is_rare])})
    more = {"append": True, "id_prefix": "more-", **names}
    with pytest.raises(gate.Rejected, match="was rejected"):
        make_shards(rest, tmp_path / "out", **more)
    manifest = make_shards(rest, tmp_path / "out", require=KEPT, **more)
    assert "rejected" not in manifest
    assert manifest["records"]["written"] == 300 - removes
    assert (tmp_path / "out" / "dataset_info.json").exists()
    assert run_command("pipeline.verify", tmp_path / "out").returncode == 0


def test_a_rejected_append_leaves_the_set_as_it_was(out, grown, idx_dir, tmp_path):
    shutil.copytree(out, tmp_path / "never judged")
    before = everything_in(out)
    for bound in ("written<410", "min_class_share>0.5,written==410"):
        with pytest.raises(gate.Rejected, match="stays as it was"):
            make_shards(grown, out, append=True, require=bound, num_shards=2)
        assert everything_in(out) == before
    assert run_command("pipeline.verify", out).returncode == 0
    # Nothing is in the way of this append without the bound, or of another one.
    other = f"idx:{grown_idx(tmp_path / 'other', idx_dir, extra=9)}"
    first = {"append": True, "id_prefix": "other-"}
    make_shards(other, tmp_path / "never judged", **first)
    make_shards(other, out, require="written==709", **first)
    make_shards(grown, tmp_path / "never judged", append=True, num_shards=2)
    make_shards(grown, out, append=True, num_shards=2, require="written==769")
    assert outputs_of(out) == outputs_of(tmp_path / "never judged")
    with pytest.raises(gate.Rejected, match="written<9"):  # Nothing is new; the bound applies.
        make_shards(grown, out, append=True, require="written<9")


def test_a_rejected_replacement_leaves_the_set_as_it_was(idx_dir, out, tmp_path):
    changed = make_idx_set(tmp_path / "changed")
    images, _ = blobs()["train"]
    images[7] = 255 - images[7]
    write_idx(changed / "train-images-idx3-ubyte", images)
    settings = {"append": True, "on_changed": "replace"}
    before = outputs_of(out)
    with pytest.raises(gate.Rejected):
        make_shards(f"idx:{changed}", out, require="written<350", **settings)
    assert outputs_of(out) == before and not (out / ".progress").exists()
    assert run_command("pipeline.verify", out).returncode == 0
    make_shards(f"idx:{changed}", out, require="written==350", **settings)


def append_flags(source: str, out, *more: str) -> list[str]:
    flags = [f"--source={source}", f"--output_dir={out}", "--append", "--num_shards=2"]
    return ["pipeline.preprocess", *flags, "--validation_fraction=0.1", *more]


@pytest.mark.parametrize("killed", ["die_at_file 4", "die_at_file 9", "die_at_removal 3"])
def test_a_rejected_append_that_was_killed_ends_as_one_that_was_not(out, grown, killed):
    before = outputs_of(out)
    command = append_flags(grown, out, "--require=written<410")
    program, number = killed.split()
    done = run_command(f"tests.faults.{program}", number, *command, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (out / ".progress").exists()
    listed = {e["name"] for e in json.loads(before["manifest.json"])["files"]} | {"manifest.json"}
    now = outputs_of(out)
    assert {name: now.get(name) for name in listed} == {name: before[name] for name in listed}
    done = run_command(*command, "--status_on_rejection=9", check=False)
    assert done.returncode == 9, done.stderr
    assert outputs_of(out) == before and not (out / ".progress").exists()
    assert run_command("pipeline.verify", out).returncode == 0


@pytest.mark.long
def test_a_rejected_append_may_be_killed_anywhere(out, grown, tmp_path):
    before, number = outputs_of(out), 0
    command = append_flags(grown, out, "--require=written<410")
    for program in ("die_at_file", "die_at_removal"):
        for number in range(1, 200):
            done = run_command(f"tests.faults.{program}", number, *command, check=False)
            if done.returncode == 1:
                break
            assert done.returncode == -signal.SIGKILL, done.stderr
            assert run_command(*command, check=False).returncode == 1
            assert outputs_of(out) == before and not (out / ".progress").exists()
        assert 5 < number < 199


def test_an_append_that_was_killed_before_its_rejection_stands_in_the_way_of_others(
    out, grown, idx_dir, tmp_path
):
    die_at_file(4, *append_flags(grown, out, "--require=written<410"))
    other = f"idx:{grown_idx(tmp_path / 'other', idx_dir, extra=9)}"
    with pytest.raises(UnfinishedConflict):
        make_shards(other, out, append=True)
    make_shards(other, out, append=True, overwrite=True, require="written==359")


def test_a_wrong_bound_is_refused_before_beam_is_imported(tmp_path):
    code = """
import runpy, sys
sys.argv = ["vae-preprocess", "--source=sample", *sys.argv[1:]]
try:
    runpy.run_module("pipeline.preprocess", run_name="__main__", alter_sys=True)
finally:
    assert "apache_beam" not in sys.modules
"""
    for bound, text in (
        ("min_clas_share>0", "no metric 'min_clas_share'; expected one of written, quarantined,"),
        ("duplicates<1%", "'duplicates<1%' is no bound; expected NAME, one of"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, f"--require={bound}", f"--output_dir={tmp_path}/x"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2 and f"preprocess: --require={bound}: {text}" in done.stderr


def test_the_commands_and_the_functions_reject_alike(idx_dir, tmp_path):
    flags = [f"--source=idx:{idx_dir}", "--name=blobs", f"--require={BROKEN}"]
    reference = tmp_path / "reference"
    preprocess(f"idx:{idx_dir}", reference, name="blobs", require=KEPT)
    x, y = blobs()["train"]
    source = save_npz(tmp_path / "dark.npz", {"train": (x // 2, y)})
    flags = [f"--source={source}", f"--reference={reference}", f"--require={BROKEN}"]
    command = ["pipeline.preprocess", *flags, f"--output_dir={tmp_path}/a"]
    for _ in range(2):
        done = run_command(*command, "--status_on_rejection=7", check=False)
        assert done.returncode == 7 and done.stderr.splitlines()[-1].startswith("preprocess: ")
        assert "warning: train: brightness has drifted: mean 38." in done.stderr
    assert run_command(*command, check=False).returncode == 1
    keywords = {"reference": reference, "require": BROKEN}
    with pytest.raises(gate.Rejected, match="min_class_share>=0.5"):
        preprocess(source, tmp_path / "b", **keywords)
    assert outputs_of(tmp_path / "a") == outputs_of(tmp_path / "b")
    found = preprocess(source, tmp_path / "b", reference=reference, require=KEPT)
    assert found.reused and any("brightness has drifted" in text for text in found.warnings)
    with pytest.raises(UsageError, match="no metric 'elbo'"):
        preprocess(source, tmp_path / "c", require="elbo>0")


@pytest.mark.parametrize(
    ("reference", "status", "message"),
    [
        ("out", 2, "is the directory to write; expected an earlier data set"),
        ("out/index", 2, "is the directory to write"),
        ("nonesuch", 1, "--reference={}: no such directory; expected the output of"),
        (".", 1, "--reference={}: has no manifest.json"),
        ("damaged", 1, "statistics.json: damaged"),
        ("cut", 1, "has no readable record at its beginning"),
    ],
)
def test_a_reference_that_is_none_is_refused_before_work(
    idx_dir, data_dir, tmp_path, reference, status, message
):
    for name, damaged in (("damaged", "statistics.json"), ("cut", "blobs-*-00000-*")):
        if name == reference:
            shutil.copytree(data_dir, tmp_path / name)
            for path in (tmp_path / name).glob(damaged):
                path.write_bytes(b"{}")
    path = (tmp_path / reference).resolve()
    flags = [f"--source=idx:{idx_dir}", f"--output_dir={tmp_path}/out", f"--reference={path}"]
    done = run_command("pipeline.preprocess", *flags, check=False)
    assert done.returncode == status and message.format(path) in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def compared(tmp_path, sets, **settings) -> dict:
    """The drift of the second of two sets of arrays from the first."""
    for name, splits in sets.items():
        source = save_npz(tmp_path / f"{name}.npz", splits)
        made = {"reference": tmp_path / "a"} if name == "b" else {}
        fraction = {"validation_fraction": 0.0}
        manifest = make_shards(source, tmp_path / name, **fraction, **made, **settings)
    return manifest


def test_drift_is_large_and_no_chance():
    from pipeline.stages import drift as drift_tests

    many = np.random.default_rng(1).normal(size=40_000)
    for reference, current, has_drifted in (
        (many[:20_000], many[20_000:] + 0.06, False),  # Significant, and small.
        (many[:5], many[:5] + 9, False),  # Large, and perhaps chance.
        (many[:20_000], many[20_000:] + 0.6, True),
    ):
        test = drift_tests.kolmogorov_smirnov(reference, current)
        assert drift_tests.has_drifted(test, 1) == has_drifted
        assert (test["p_value"] < 0.001 or test["statistic"] > 0.1) and len(test) == 2


def test_a_few_records_of_the_same_distribution_are_no_drift():
    generator = np.random.default_rng(4)
    shares = np.array([0.6, 0.3, 0.06, 0.03, 0.009, 0.001])

    def profile(count: int) -> drift.Profile:
        counts = generator.multinomial(count, shares).tolist()
        images = generator.normal(100, 20, (count, 1)), generator.normal(50, 9, count)
        split = drift._Split(dict(zip("abcdef", counts, strict=True)), *images)
        return drift.Profile("", (1, 1, 1), {"train": split})

    reference = profile(900)
    for count in [*range(1, 40), *range(1, 40), 100, 300, 900]:
        found = drift.compare(profile(count), reference)
        assert found["warnings"] == [], (count, found)


def test_what_has_not_drifted_is_not_said_to(tmp_path):
    x, y = blobs(num_train=600)["train"]
    manifest = compared(
        tmp_path, {"a": {"train": (x[:400], y[:400])}, "b": {"train": (x[400:], y[400:])}}
    )
    assert manifest["drift"]["warnings"] == []
    page = (tmp_path / "b" / "stats.html").read_text()
    reference = json.loads((tmp_path / "a" / "manifest.json").read_text())["dataset_id"]
    assert manifest["drift"]["reference"] == reference and reference in page
    assert "Nothing looks wrong" in page


CHANGES = {
    "train: brightness has drifted": lambda x, y: (x // 2 + 60, y),
    "train: contrast has drifted": lambda x, y: (np.where(x > 127, 255, 0).astype(np.uint8), y),
    "train: class shares have drifted: 1 is": lambda x, y: (x[y > 1], y[y > 1]),
    "train: class shares have drifted: without a label is 0.0% in the reference": (
        lambda x, y: (x, np.where(y > 5, -1, y.astype(np.int64)))
    ),
    "another shape: 12×8×1 in the reference, 8×12×1 here": lambda x, y: (x.swapaxes(1, 2), y),
    "another shape: 12×8×1 in the reference, 12×8×3 here": (
        lambda x, y: (np.stack([x, x, x], axis=3), y)
    ),
}


# The others are in each run of the tests: class shares, and colours.
LONG = [text for text in CHANGES if "class shares" not in text and not text.endswith("3 here")]


@pytest.mark.parametrize(
    "warning",
    [pytest.param(w, marks=[pytest.mark.long] if w in LONG else []) for w in CHANGES],
)
def test_what_has_drifted_is_named(tmp_path, warning):
    x, y = blobs(num_train=600)["train"]
    names = {"class_names": tuple("0123456789")}
    before, after = (x[:300], y[:300]), CHANGES[warning](x[300:], y[300:])
    manifest = compared(tmp_path, {"a": {"train": before}, "b": {"train": after}}, **names)
    found = manifest["drift"]["warnings"]
    assert any(warning in text for text in found), found
    # Shards and dataset_id are those of a set that was compared with none.
    path = f"npz:{tmp_path}/b.npz"
    plain = make_shards(path, tmp_path / "c", validation_fraction=0.0, **names)
    shards = [
        {name: data for name, data in outputs_of(tmp_path / d).items() if "tfrecord" in name}
        for d in "bc"
    ]
    assert shards[0] == shards[1] and manifest["dataset_id"] == plain["dataset_id"]
    # The page shows the drift, is mended with the same bytes, and shows a later comparison, too.
    page = (tmp_path / "b" / "stats.html").read_bytes()
    assert warning.split(":")[0] in page.decode()
    (tmp_path / "b" / "stats.html").write_bytes(b"")
    make_shards(path, tmp_path / "b", validation_fraction=0.0, **names)
    assert (tmp_path / "b" / "stats.html").read_bytes() == page
    reference = tmp_path / "a"
    make_shards(path, tmp_path / "c", validation_fraction=0.0, reference=reference, **names)
    first, second = (outputs_of(tmp_path / directory) for directory in "bc")
    manifests = [json.loads(part.pop("manifest.json")) for part in (first, second)]
    assert manifests[0] == manifests[1] and first == second
    assert run_command("pipeline.verify", tmp_path / "c").returncode == 0


def test_splits_are_compared_one_by_one(tmp_path):
    (x, y), (u, v) = blobs(num_train=300, num_test=300).values()
    first = {"train": (x, y), "test": (u, v)}
    second = {"train": (x, y), "test": (255 - u, v)}
    found = compared(tmp_path, {"a": first, "b": second})["drift"]
    assert all(text.startswith("test: ") for text in found["warnings"]) and found["warnings"]
    assert found["splits"]["train"]["brightness"][0]["statistic"] == 0
    (tmp_path / "other").mkdir()
    sets = {"a": {"train": (x, y)}, "b": {"test": (u, v)}}
    found = compared(tmp_path / "other", sets)["drift"]
    assert found["warnings"] == ["no split has records both in the reference and here"]


def test_new_records_are_compared_with_the_set_to_which_they_are_appended(tmp_path):
    x, y = blobs(num_train=500)["train"]
    old, new = {"train": (x[:300], y[:300])}, {"train": (x[300:] // 2, y[300:])}
    apart = compared(tmp_path, {"a": old, "b": new})
    settings = {"append": True, "validation_fraction": 0.0, "id_prefix": "new-"}
    source, out = f"npz:{tmp_path}/b.npz", tmp_path / "a"
    with pytest.raises(gate.Rejected) as error:
        make_shards(source, out, reference=out, require="written<9", **settings)
    assert list(error.value.warnings) == apart["drift"]["warnings"] != []
    grown = make_shards(source, out, reference=out, **settings)
    # The samples are all records here, so nothing depends on their order.
    exact, close = (
        [(name, {key: test[key] for key in test}) for name, test in drift.tests(part)]
        for m in (apart, grown)
        for part in m["drift"]["splits"].values()
    )
    for (name, one), (_, other) in zip(exact, close, strict=True):
        assert one["statistic"] == other["statistic"] and one["p_value"] == other["p_value"], name
    assert grown["drift"]["reference"] == apart["drift"]["reference"] != grown["dataset_id"]
    again = make_shards(source, out, reference=out, **settings)
    assert again["reused"] and again["drift"] == grown["drift"]
    third = save_npz(tmp_path / "c.npz", {"train": (x[:5] // 3, y[:5])})
    settings["id_prefix"] = "third-"
    assert "drift" not in make_shards(third, out, **settings)


@hypothesis.given(
    hnp.arrays(np.int64, st.integers(1, 40), elements=st.integers(-1, 4)), st.integers(1, 3)
)
def test_shares_are_those_of_the_labels(labels, num_splits):
    parts = np.array_split(labels, num_splits)
    splits = {}
    for number, part in enumerate(parts):
        statistics = Statistics((1, 1, 1))
        statistics.add(np.zeros((len(part), 1, 1, 1), np.uint8), part)
        splits[f"split{number}"] = statistics.summary(["a", "b", "c"])
    records = {"read": len(labels), "written": len(labels), "quarantined": 0}
    found = measures.measures(splits, Duplicates(), records)
    shares = [
        (part == label).sum() / (part >= 0).sum()
        for part in parts
        if (part >= 0).any()
        for label in range(3)
    ]
    assert found.get("min_class_share") == (min(shares) if shares else None)
    assert found.get("max_class_share") == (max(shares) if shares else None)
    assert found["unlabelled"] == (labels == -1).sum() / len(labels)
    assert found["outside_classes"] == (labels > 2).sum()


def test_large_images_and_many_shards_give_a_bounded_sample(tmp_path, monkeypatch):
    from pipeline.datasets import reader

    x, y = blobs(num_train=300)["train"]
    make_shards(save_npz(tmp_path / "a.npz", {"train": (x, y)}), tmp_path / "a", num_shards=7)
    manifest = reader.Dataset(str(tmp_path / "a")).manifest
    whole = drift.read(str(tmp_path / "a"), manifest).splits["train"]
    monkeypatch.setattr(drift, "_MAX_BYTES", 96 * 50)
    part = drift.read(str(tmp_path / "a"), manifest).splits["train"]
    assert len(whole.contrast) == manifest["splits"]["train"]
    assert 50 <= len(part.contrast) <= 50 + 7 and part.counts == whole.counts
    assert {*part.contrast.tolist()} <= {*whole.contrast.tolist()}


def test_a_damaged_manifest_with_a_rejection_is_refused(out):
    from pipeline.stages import manifest as manifest_lib

    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["sha256_of_the_rest"]
    for key, value in (("rejected", []), ("rejected", "no"), ("drift", {"reference": "x"})):
        sealed = manifest_lib.sealed_json({**manifest, key: value})
        (out / "manifest.json").write_bytes(sealed)
        with pytest.raises(StageError, match=f"manifest.json: {key}.* is .*; expected"):
            manifest_lib.read_manifest(str(out), "preprocess", "--data_dir")
