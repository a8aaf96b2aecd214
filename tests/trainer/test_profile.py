"""config.profile_steps: what is recorded, and that no step depends on it."""

import json
import math
import pathlib
import signal

import numpy as np
import pytest

from pipeline.cli.errors import UsageError
from tests.conftest import assert_same_run, smoke_config, state_of
from tests.faults import interrupting
from tests.faults.interrupting import STEP, At
from tests.trainer import test_interruptions as interruptions
from tests.trainer.test_cluster import run_cluster
from trainer.runs import board, train


def recordings(workdir: pathlib.Path) -> list[list[int]]:
    """The global steps that each recording's calls begin with, in order of time."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    recorded = []
    for path in sorted((workdir / "tensorboard").glob("plugins/profile/*/*.xplane.pb")):
        space = xplane_pb2.XSpace.FromString(path.read_bytes())
        [plane] = [plane for plane in space.planes if plane.name == "/host:CPU"]
        events = [
            (plane.event_metadata[event.metadata_id].name, event)
            for line in plane.lines
            for event in line.events
        ]
        steps = {
            stat.int64_value
            for name, event in events
            if name == "train"
            for stat in event.stats
            if plane.stat_metadata[stat.metadata_id].name == "step_num"
        }
        calls = [name for name, _ in events if name.startswith("EagerLocalExecute: __inference_tr")]
        assert len(calls) == len(steps)
        recorded.append(sorted(steps))
    return recorded


def test_a_recorded_run_is_the_run_without(data_dir, trained, tmp_path, capsys):
    """Steps 6 to 12 of 22, 11 an epoch; steps_per_loop is 4 and checkpoint_every_steps 5."""
    workdir = tmp_path / "run"
    train.train(smoke_config(data_dir, profile_steps="6:13"), workdir=str(workdir))
    assert recordings(workdir) == [[6, 10, 11]]
    assert "a profile of steps 6 to 12 is in tensorboard/plugins/profile" in capsys.readouterr().err
    assert_same_run(workdir, trained)
    configs = [
        json.loads((run / "export" / "manifest.json").read_text())["config"]
        for run in (workdir, trained)
    ]
    assert configs[0] == configs[1]
    train.train(smoke_config(data_dir, profile_steps="1:2"), workdir=str(workdir))
    assert "already finished" in capsys.readouterr().out
    assert len(recordings(workdir)) == 1


def test_a_run_stopped_within_the_steps_records_the_rest_when_it_resumes(
    data_dir, trained, tmp_path
):
    """Also if its workdir is a URL, to which a recording is copied."""
    workdir, log = tmp_path / "run", tmp_path / "log"
    flags = interruptions.arguments(data_dir, workdir.as_uri(), "--config.profile_steps=2:99")
    # The signal comes inside the fourth step; a call later the run has heard of it.
    assert interrupting.train(flags, log=log, at=At(STEP, 4, signal.SIGTERM)) == 75
    stopped_at = int(state_of(workdir)["name"].item()[5:15])
    assert "train: a profile of the steps from 2 on is in tensorboard" in log.read_text()
    [[first, *_]] = recordings(workdir)
    assert first == 2
    train.train(smoke_config(data_dir, profile_steps="2:99"), workdir=workdir.as_uri())
    [_, resumed] = recordings(workdir)
    assert resumed[0] == stopped_at and resumed[-1] < 22
    assert_same_run(workdir, trained)


def test_a_recording_ends_with_the_run_and_a_run_behind_the_steps_records_nothing(
    data_dir, trained, tmp_path
):
    for num_epochs, steps in ((1, "9:99"), (2, "1:5")):
        config = smoke_config(data_dir, num_epochs=num_epochs, profile_steps=steps)
        train.train(config, workdir=str(tmp_path))
    assert recordings(tmp_path) == [[9, 10]]
    [path] = tmp_path.glob("tensorboard/plugins/profile/*/*.xplane.pb")
    assert b"__inference_evaluate" not in path.read_bytes()
    assert_same_run(tmp_path, trained)


@pytest.mark.long
def test_fit_is_recorded_too(data_dir, tmp_path):
    config = smoke_config(data_dir, num_epochs=1, kl_route="encoder_layer", profile_steps="3:5")
    train.train(config, workdir=str(tmp_path))
    names = list((tmp_path / "tensorboard").glob("plugins/profile/*/*.xplane.pb"))
    assert len(names) == 1 and b"__inference_multi_step_on_iterator" in names[0].read_bytes()


@pytest.mark.long
def test_in_a_cluster_the_chief_records_and_the_path_stays(data_dir, tmp_path):
    run_cluster(data_dir, tmp_path / "without")
    run_cluster(data_dir, tmp_path / "run", "--config.profile_steps=6:13")
    assert recordings(tmp_path / "run") == [[6, 10, 11]]
    assert_same_run(tmp_path / "run", tmp_path / "without")


def test_workers_that_record_nothing_cut_their_calls_alike():
    """So that all workers of a cluster make calls of equal length."""
    profiler = board.Profiler(range(6, 13), board=None)
    steps_left = [profiler.reach(step) for step in range(14)]
    assert steps_left == [*range(6, 0, -1), *range(7, 0, -1), math.inf]
    np.testing.assert_array_equal(board.Profiler(range(0), None).reach(3), math.inf)


def test_steps_behind_the_end_are_refused(data_dir, tmp_path):
    with pytest.raises(UsageError, match="=22:23: expected a first step below the run's 22 steps"):
        train.train(smoke_config(data_dir, profile_steps="22:23"), workdir=str(tmp_path / "run"))
    assert not (tmp_path / "run" / "config.json").exists()
