"""--config from another directory: configs by name, and files of one's own."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY, run_command

_OWN = """from configs import default


def get_config():
    config = default()
    config.latent_dim = 5
    return config
"""
_FEW = """import ml_collections


def get_config():
    return ml_collections.ConfigDict({"latent_dim": 3, "data_dir": ""})
"""
_TYPO = _OWN.replace("latent_dim", "latent_dims")
_DICT = "def get_config():\n    return {'latent_dim': 3}\n"


def train_from(directory, config, *flags, module="trainer.main") -> subprocess.CompletedProcess:
    """Runs a command with a config in a directory that is not the repository."""
    done = subprocess.run(
        [sys.executable, "-m", module, f"--config={config}", *flags],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.parametrize(("config", "latent_dim"), [("mnist:latent_dim=2", 2), ("own.py", 5)])
def test_a_config_by_name_or_path(data_dir, tmp_path, config, latent_dim):
    (tmp_path / "own.py").write_text(_OWN)
    (tmp_path / "mnist").write_text("The name means the package's config, and not this file.")
    flags = ["--config.filters=(2,)", "--config.strides=(2,)", "--config.num_epochs=1"]
    done = train_from(tmp_path, config, *flags, f"--config.data_dir={data_dir}", "--workdir=run")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["latent_dim"] == latent_dim


@pytest.mark.parametrize("module", ["trainer.main", "trainer.compare_routes"])
def test_an_unknown_name_lists_the_names(tmp_path, module):
    flags = ["--workdir=run"] if module == "trainer.main" else []
    done = train_from(tmp_path, "minst", *flags, module=module)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    names = "fashion_mnist, mnist, mnist_likelihood, mnist_z2, rgb, smoke"
    assert f"--config=minst: no such config; expected a path to a .py file, or one of {names}" in (
        done.stderr
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_FEW, "without activation, architecture, batch_size, beta, "),
        (_FEW, ": let it begin with `from configs import default`, `config = default()`"),
        (_TYPO, "a config with latent_dims; expected only keys of configs/mnist.py"),
        (_DICT, "returned a dict; expected a ml_collections.ConfigDict"),
    ],
    ids=["few", "few, the remedy", "typo", "dict"],
)
def test_a_config_with_other_keys_is_refused_in_a_line(tmp_path, text, message):
    (tmp_path / "own.py").write_text(text)
    # The flag of a missing key comes after the file, and does not hide the message.
    done = train_from(tmp_path, "own.py", "--config.batch_size=3", "--workdir=run")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr
    assert "latent_dim, " not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["own.py"]


@pytest.mark.parametrize("module", ["trainer.main", "trainer.compare_routes"])
def test_help_has_the_flag(module):
    assert "\n  --config=CONFIG\n" in run_command(module, "--help").stdout


@pytest.mark.parametrize("name", ["configs", "pipeline"])
@pytest.mark.parametrize("form", ["{}/__init__.py", "{}.py"])
def test_a_package_that_hides_ours_is_named_in_a_line(tmp_path, name, form):
    path = tmp_path / form.format(name)
    path.parent.mkdir(exist_ok=True)
    path.touch()
    done = train_from(tmp_path, "mnist", "--workdir=run")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    place = path.parent if path.name == "__init__.py" else path
    assert f"{place}: hides the package {name} of vae-pipeline; expected" in done.stderr
    assert "run the console script, such as vae-train" in done.stderr


def test_a_directory_of_configs_hides_nothing(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "own.py").write_text(_TYPO)
    done = train_from(tmp_path, "configs/own.py", "--workdir=run")
    assert "a config with latent_dims; expected only keys" in done.stderr


def test_python_raises_an_import_error(tmp_path):
    (tmp_path / "configs.py").touch()
    command = [sys.executable, "-c", "import trainer.api"]
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"ImportError: {tmp_path}/configs.py: hides the package configs" in done.stderr


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no -P")
def test_processes_of_a_console_script_are_ours_beside_a_package_that_hides_us(tmp_path):
    """-P keeps the working directory off sys.path, as a console script does."""
    (tmp_path / "configs.py").touch()
    command = [sys.executable, "-P", "-m", "trainer.launch", "--num_workers=1", "--"]
    done = subprocess.run(
        [*command, "--config=minst", "--workdir=run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "[0] train: flag --config=minst: no such config" in done.stderr
