"""Where files lie: home directories, what volumes hold of their own, names that a shell splits."""

import os
import shutil
import subprocess

import numpy as np
import pytest

from pipeline import sources
from pipeline.cli import flag_parsing
from pipeline.cli.errors import StageError
from pipeline.storage import files
from tests.conftest import (
    REPOSITORY,
    blobs,
    make_folder_set,
    make_idx_set,
    make_shards,
    outputs_of,
    write_csv,
)

OF_VOLUMES = ("lost+found/#1", ".snapshot/1/a", ".DS_Store", ".nfs0001", ".Trash-0/files/a", "._a")


def add_volumes_own(directory) -> dict:
    """Puts what a volume holds of its own into a directory; returns path -> bytes of it."""
    for number, name in enumerate(OF_VOLUMES):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"%d" % number)
    return {directory / name: (directory / name).read_bytes() for name in OF_VOLUMES}


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--output_dir=~/x", "--output_dir={home}/x"),
        ("--output_dir=~", "--output_dir={home}"),
        ("--source=csv:~/a.csv", "--source=csv:{home}/a.csv"),
        ("--config.data_dir=~/x", "--config.data_dir={home}/x"),
        ("--output_dir=./~", "--output_dir=./~"),
        ("--output_dir=/a/~/x", "--output_dir=/a/~/x"),
        ("--output_dir=gs://b/~/x", "--output_dir=gs://b/~/x"),
        ("--id_prefix=~x", "--id_prefix=~x"),
        ("~/x", "~/x"),  # A word that the shell has expanded itself, if it is not quoted.
    ],
)
def test_a_home_directory_stands_where_no_shell_puts_it(monkeypatch, argument, expected):
    monkeypatch.setenv("HOME", "/people/someone")
    assert flag_parsing.with_home(argument) == expected.format(home="/people/someone")


def test_a_volumes_own_files_make_no_directory_foreign_and_stay(idx_dir, data_dir, tmp_path):
    out = tmp_path / "volume"
    theirs = add_volumes_own(out)
    make_shards(f"idx:{idx_dir}", out, seed=1)
    make_shards(f"idx:{idx_dir}", out, overwrite=True)
    names = {str(path.relative_to(out)) for path in theirs}
    ours = {name: data for name, data in outputs_of(out).items() if name not in names}
    assert ours == outputs_of(data_dir)
    assert {path: path.read_bytes() for path in theirs} == theirs
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "nfs0001").touch()
    with pytest.raises(StageError, match="holds 'nfs0001' and neither"):
        make_shards(f"idx:{idx_dir}", tmp_path / "foreign")


def test_a_directory_that_holds_a_volumes_own_is_not_removed_as_empty(tmp_path):
    (tmp_path / "empty").mkdir()
    theirs = add_volumes_own(tmp_path / "not")
    for name in ("empty", "not", "nothing"):
        files.remove_empty(str(tmp_path / name))
    assert [path.name for path in tmp_path.iterdir()] == ["not"]
    assert all(path.exists() for path in theirs)


@pytest.mark.parametrize("kind", ["idx", "csv", "folder"])
def test_a_volumes_own_files_are_no_records(tmp_path, kind):
    plain, volume = tmp_path / "plain", tmp_path / "volume"
    if kind == "folder":
        make_folder_set(plain, num_train=20, num_test=10)
    elif kind == "idx":
        make_idx_set(plain, num_train=20, num_test=10)
    else:
        plain.mkdir()
        for split, about in blobs(num_train=20, num_test=10, size=(8, 8)).items():
            write_csv(plain / f"{split}.csv", *about)
    shutil.copytree(plain, volume)
    add_volumes_own(volume)
    for path in list(volume.rglob("*")):  # As macOS does, and a check of a disk that was damaged.
        if path.is_file() and path.parent.name != "lost+found":
            shutil.copy(path, path.with_name(f"._{path.name}"))
            shutil.copy(path, volume / "lost+found" / path.name)
    expected, found = (sources.open_source(f"{kind}:{place}") for place in (plain, volume))
    assert found.split_sizes == expected.split_sizes
    indices = np.arange(sum(expected.split_sizes.values()))
    assert found.ids(indices) == expected.ids(indices)
    assert found.fingerprint() == expected.fingerprint()


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_make_passes_each_value_on_as_one_word(tmp_path):
    values = {
        "SOURCE": "csv:/a b/#1.csv",
        "OUTPUT_DIR": "/tmp/o b",
        "DATA_DIR": "/it's",
        "MODEL_DIR": '/a "b" `c` \\d; e & f',
        "WORKDIR": "gs://b/*?[x]",
        "CONFIG": "configs/mnist.py:latent_dim=2,beta=1.0",
    }
    # In place of Python: a word a line.
    make = ["make", "--silent", "-o", ".venv/.installed", 'PY=printf "%s\\n"', "FLAGS=--a --b"]

    def words(target: str) -> list[str]:
        settings = [f"{name}={value}" for name, value in values.items()]
        done = subprocess.run(
            [*make, target, *settings], cwd=REPOSITORY, check=True, capture_output=True, text=True
        )
        return done.stdout.splitlines()[2:]  # Without -m MODULE.

    source, out, data, model, workdir, config = values.values()
    assert words("preprocess") == [
        *(f"--source={source}", f"--output_dir={out}", "--a", "--b"),
    ]
    values["NAME"] = "it's"
    assert words("preprocess")[1] == "--name=it's"
    assert words("train") == [
        *(f"--config={config}", f"--config.data_dir={data}", f"--workdir={workdir}", "--a", "--b"),
    ]
    of_export = [f"--data_dir={data}", f"--model_dir={model}", "--split=test"]
    for target in ("export", "report"):
        assert words(target) == [*of_export, f"--output_dir={out}", "--a", "--b"]
    assert words("evaluate") == [*of_export, "--a", "--b"]
    assert words("verify") == [data]
    assert words("week") == [f"--source={source}", "--workdir=demo/week"]
    assert not os.path.exists(REPOSITORY / "demo" / "week")
