import multiprocessing
import re

import numpy as np
import pytest

from pipeline.cli.errors import StageError, UsageError
from tests.conftest import run_command, smoke_config
from trainer.comparison import tables, trials
from trainer.comparison.trials import Cost, Difference, RouteResult
from trainer.steps import kl_routes

SMALL = (
    "--num_rounds=1",
    "--num_steps=300",  # Of next to no arithmetic: fewer would drown in what a call costs.
    "--config.architecture=mlp",
    "--config.hidden_units=(4,)",
    "--config.batch_size=4",
)


def result(**changes) -> RouteResult:
    weights = [np.array([1.0, -2.0], np.float32), np.array([0.5], np.float32)]
    terms = np.array([100.0, 90.0, 10.0], np.float32)
    return RouteResult(terms, [w / 10 for w in weights], weights)._replace(**changes)


def test_a_difference_is_relative_to_the_largest_of_its_array():
    assert trials.difference(result(), result()) == Difference(0, 0, 0, 0, 0)
    other = result(
        terms=np.array([101.0, 90.0, 10.0], np.float32),
        weights=[np.array([1.0, -2.1], np.float32), np.array([0.5], np.float32)],
    )
    difference = trials.difference(other, result())
    assert difference == pytest.approx(Difference(0.01, 0, 0, 0, 0.05), rel=1e-5)


def test_nothing_differs_from_nothing_by_nothing():
    dead = result(gradients=[np.zeros(3, np.float32)])
    assert trials.difference(dead, dead) == Difference(0, 0, 0, 0, 0)


def test_batches_of_one_hold_one():
    config = smoke_config("x", batch_size=1, architecture="mlp")
    _, means = trials._Trial(config.to_dict(), 3).train(9)
    assert means.shape == (9, 3)
    assert np.isfinite(means).all()


def test_a_process_that_is_killed_is_named():
    with trials._trial_process(smoke_config("x", kl_route="output_layer"), 2) as call:
        (child,) = multiprocessing.active_children()
        child.kill()
        child.join()
        with pytest.raises(StageError, match="output_layer: its process ended with status"):
            call("weights")


def test_steps_too_short_to_time_are_no_verdict(monkeypatch, capsys):
    costs = {route: Cost(-1.0, -2.0, 300.0, 1.0, 600.0) for route in kl_routes.NAMES}
    results = {route: result() for route in kl_routes.NAMES}
    monkeypatch.setattr(trials, "compare", lambda *_, **__: (results, costs))
    monkeypatch.setattr(trials, "run_on_two_replicas", lambda *_: results)
    with pytest.raises(StageError, match="--num_steps=2: .* try more steps, or more --num_rounds"):
        tables.report(smoke_config("x"), num_steps=2, num_rounds=1)
    assert "hold" not in capsys.readouterr().out


def test_routes_without_a_beta_take_that_of_the_generated_images(monkeypatch):
    class Compared(Exception):
        pass

    def compare(config, *_, **__):
        raise Compared(config.beta)  # Before five processes start.

    monkeypatch.setattr(trials, "compare", compare)
    with pytest.raises(Compared) as caught:
        tables.report(smoke_config("x", beta=None, latent_dim=2), num_steps=2, num_rounds=1)
    assert caught.value.args == (2 * 6.5e-4 * 28 * 28 / 2,)


@pytest.mark.parametrize(
    ("difference", "message"),
    [
        (
            Difference(0, 0, 2e-5, 0, 0),
            "output_layer: the difference of kl from gradient_tape is 2.0e-05",
        ),
        (Difference(0, 0, 0, 0, 2e-4), "difference of weights .* expected at most 1.0e-04"),
        (Difference(float("nan"), 0, 0, 0, 0), "difference of loss from gradient_tape is nan"),
    ],
)
def test_more_than_rounding_is_a_failure(difference, message):
    with pytest.raises(StageError, match=message):
        tables._check({"output_layer": difference}, (1e-5, 1e-4))
    tables._check({"output_layer": Difference(1e-5, 0, 0, 1e-6, 9e-5)}, (1e-5, 1e-4))


@pytest.mark.parametrize(
    ("ratios", "verdicts"),
    [
        ((1.0, 1.1, 1.12, 1.08, 1.15), ["does not hold", "does not hold", "holds"]),
        ((1.0, 1.0, 1.1, 1.4, 1.5), ["holds", "holds", "holds"]),
        ((1.0, 0.8, 0.9, 0.8, 0.9), ["does not hold", "does not hold", "does not hold"]),
    ],
)
def test_claims_are_judged_by_the_measured_ratios(ratios, verdicts):
    costs = {
        route: Cost(step_ms=100 * ratio, ratio=ratio, call_ms=1, first_step_secs=1, peak_mib=1)
        for route, ratio in zip(kl_routes.NAMES, ratios, strict=True)
    }
    lines = tables._claims(costs).splitlines()[1:]
    assert [re.search(r"× *, (holds|does not hold): ", line)[1] for line in lines] == verdicts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_norm": 1.0}, "--config.clip_norm=1.0: expected 0 for kl_route encoder_layer"),
        ({"strides": (2, 3)}, "its stride 3 does not divide"),
    ],
)
def test_a_config_that_a_route_cannot_honour_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        tables.report(smoke_config("x", **changes), num_steps=2, num_rounds=1)


def test_a_flag_out_of_range_is_bad_usage():
    done = run_command("trainer.compare_routes", "--num_steps=1", check=False)
    assert done.returncode == 2
    assert "--num_steps" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.long
def test_the_command_prints_both_tables_and_the_claims():
    out = run_command("trainer.compare_routes", *SMALL).stdout
    for route in kl_routes.NAMES:
        equality, timing = re.findall(rf"^{route} .*$", out, re.MULTILINE)
        *terms, gradients, weights, on_two_replicas = equality.split()[1:]
        # Terms are summed by Keras in another order than by us.
        assert max(map(float, terms)) <= 1e-6
        assert (gradients, weights, on_two_replicas) == ("0", "0", "0")
        assert len(timing.split()) == 6
    assert out.count("hold") == 3
