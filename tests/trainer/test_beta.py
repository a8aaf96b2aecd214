"""The weight of the KL term where no one sets it: from the command to every file that holds it."""

import json

import pytest

from tests.conftest import make_idx_set, make_shards, smoke_config
from tests.forked import run_command
from trainer.runs import train

# The tests' images have 12×8 pixels.
_TINY = [
    *("--config.num_epochs=1", "--config.filters=(2,)", "--config.strides=(2,)"),
    "--config.steps_per_loop=4",
]


def betas_of(workdir) -> set[float]:
    """Every beta that a finished run has written."""
    config = json.loads((workdir / "config.json").read_text())
    manifest = json.loads((workdir / "export" / "manifest.json").read_text())
    return {c["beta"] for c in (config, manifest["config"], manifest["made_from"]["config"])}


@pytest.mark.parametrize(
    ("flags", "latent_dim", "beta"),
    [
        ([], 12, 2 * 6.5e-4 * 12 * 8 / 12),
        (["--config.latent_dim=4"], 4, 2 * 6.5e-4 * 12 * 8 / 4),
        (["--config.latent_dim=4", "--config.beta=0.5"], 4, None),
    ],
)
def test_a_beta_that_is_not_set_is_derived_and_written(data_dir, tmp_path, flags, latent_dim, beta):
    flags = ["--config=configs/mnist.py", *flags, *_TINY]
    flags += [f"--config.data_dir={data_dir}", f"--workdir={tmp_path}"]
    done = run_command("trainer.main", *flags)
    assert betas_of(tmp_path) == {beta or 0.5}
    line = (
        f"train: beta {beta or 0:.4g} is derived from 12×8×1 pixels and {latent_dim} latents; "
        "--config.beta sets another"
    )
    assert done.stderr.splitlines().count(line) == (beta is not None)
    assert ("is derived" in done.stderr) == (beta is not None)


def test_a_run_with_the_beta_of_earlier_versions_goes_on(tmp_path, capsys):
    source = make_idx_set(tmp_path / "idx", num_train=60, num_test=8, size=(28, 28))
    make_shards(f"idx:{source}", tmp_path / "set")

    def go_on(num_epochs, beta, workdir="run"):
        config = smoke_config(tmp_path / "set", num_epochs=num_epochs, beta=beta, latent_dim=12)
        return train.train(config, workdir=str(tmp_path / workdir))

    go_on(1, 2 * 6.5e-4 * 28 * 28 / 12)
    model = go_on(2, None)
    assert "train: from step 2 to step 4" in capsys.readouterr().err
    assert betas_of(tmp_path / "run") == {2 * 6.5e-4 * 28 * 28 / 12}
    assert go_on(2, 2 * 6.5e-4 * 28 * 28 / 12, "whole")["model_id"] == model["model_id"]
