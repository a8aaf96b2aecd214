import json
import os
import random

import numpy as np
import pytest

from trainer.runs import checkpoints


def test_a_damaged_checkpoint_is_refused_or_harmless_and_never_read_wrong(tmp_path, capsys):
    arrays = {"model/a": np.random.default_rng(0).random((20, 3)), "model/b": np.arange(3)}
    saved = checkpoints.Checkpoint(5, [1.0, 2.0, 3.0], {"key": 1}, arrays)
    checkpoints.save(str(tmp_path), saved, keep=2)
    path = checkpoints.checkpoint_path(str(tmp_path), 5)
    with open(path, "rb") as file:
        data = file.read()
    chance = random.Random(0)
    num_refused = 0
    for _ in range(1000):
        damaged = bytearray(data)
        kind = chance.choice(["flip", "flip", "cut", "garbage"])
        if kind == "flip":
            damaged[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        elif kind == "cut":
            damaged = damaged[: chance.randrange(len(data))]
        else:
            damaged = chance.randbytes(chance.randrange(200))
        with open(path, "wb") as file:
            file.write(damaged)
        read = checkpoints.restore_newest(str(tmp_path), {"key": 1})
        if read is None:
            num_refused += 1
            continue
        assert (read.step, read.epoch_sums) == (saved.step, saved.epoch_sums)
        for name, value in arrays.items():
            np.testing.assert_array_equal(read.arrays[name], value)
    assert num_refused > 800  # The rest are bits of the zip format that no reader looks at.
    assert f"{path} is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"step": "5"},
        {"epoch_sums": None},
        {"run": []},
        {"reported": 5},
    ],
    ids=str,
)
def test_a_checkpoint_of_other_types_is_damaged(tmp_path, change, capsys):
    checkpoint = checkpoints.Checkpoint(5, [], {}, {})
    checkpoints.save(str(tmp_path), checkpoint, keep=2)
    path = checkpoints.checkpoint_path(str(tmp_path), 6)
    about = {"format_version": 1, "step": 6, "epoch_sums": [], "run": {}, "names": []} | change
    np.savez(path, about=np.frombuffer(json.dumps(about).encode(), np.uint8))
    assert checkpoints.read_newest(str(tmp_path)) == checkpoint._replace(metrics_text=None)
    assert f"{path} is damaged" in capsys.readouterr().err


def test_a_directory_in_place_of_a_checkpoint_is_passed_over(tmp_path):
    checkpoints.save(str(tmp_path), checkpoints.Checkpoint(5, [], {}, {}), keep=2)
    os.mkdir(checkpoints.checkpoint_path(str(tmp_path), 6))
    assert checkpoints.read_newest(str(tmp_path)).step == 5


def test_only_the_newest_stay(tmp_path):
    for step in (1, 2, 4, 30):
        checkpoints.save(str(tmp_path), checkpoints.Checkpoint(step, [], {}, {}), keep=2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-0000000004.npz", "step-0000000030.npz"]
    assert checkpoints.restore_newest(str(tmp_path), {}).step == 30


def test_damaged_ones_do_not_crowd_out_whole_ones(tmp_path):
    for step in (1, 2, 3):
        checkpoints.save(str(tmp_path), checkpoints.Checkpoint(step, [], {}, {}), keep=2)
    for path in (tmp_path / "checkpoints").iterdir():
        path.write_bytes(b"damaged")
    assert checkpoints.restore_newest(str(tmp_path), {}) is None
    checkpoints.save(str(tmp_path), checkpoints.Checkpoint(1, [], {}, {}), keep=2)
    assert checkpoints.restore_newest(str(tmp_path), {}).step == 1


def test_the_best_stays_beside_the_newest(tmp_path):
    for step in (1, 2, 3, 4):
        checkpoint = checkpoints.Checkpoint(step, [], {}, {})
        checkpoints.save(str(tmp_path), checkpoint, keep=1, best_step=2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-0000000002.npz", "step-0000000004.npz"]
