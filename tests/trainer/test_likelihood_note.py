"""Another likelihood is recommended for colours and mid-tones, and for nothing else."""

import numpy as np
import pytest

from tests.conftest import make_shards, smoke_config
from trainer.runs import config as config_lib
from trainer.runs import train


def images(low: int, high: int, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(0).integers(low, high + 1, (40, 12, 8, channels), np.uint8)


@pytest.mark.parametrize(
    ("some", "changes", "is_said"),
    [
        (255 * (images(0, 1)), {}, False),
        (images(0, 255), {}, True),
        (images(0, 12), {}, False),
        (images(0, 12, 3), {}, True),
        (images(0, 255, 3), {"likelihood": "gaussian"}, False),
        (images(0, 255), {"binarize": "static"}, False),
        (images(0, 255)[:0], {}, False),
    ],
)
def test_when_another_likelihood_is_recommended(some, changes, is_said):
    note = config_lib.likelihood_note(smoke_config("x", **changes), some)
    assert bool(note) == is_said
    assert not note or "--config.likelihood=continuous_bernoulli or gaussian" in note


def test_training_says_it_in_one_line(tmp_path, capsys):
    np.savez(tmp_path / "set.npz", x_train=images(0, 255, 3), y_train=np.arange(40) % 2)
    make_shards(f"npz:{tmp_path}/set.npz", tmp_path / "set", num_shards=1)
    train.train(smoke_config(tmp_path / "set", num_epochs=1), workdir=str(tmp_path / "run"))
    [line] = [text for text in capsys.readouterr().err.splitlines() if "likelihood" in text]
    assert "% of the values of these colour images are between: try --config.likelihood=" in line
