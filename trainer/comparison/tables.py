"""What trials.py has found, for a person to read: two tables, and the articles' claims."""

import os

import ml_collections

from pipeline.cli.errors import StageError
from trainer.comparison import trials
from trainer.comparison.trials import BASE, NUM_STEPS, Cost, Difference, Proof
from trainer.runs import config as config_lib
from trainer.steps import kl_routes

# precision -> largest relative difference: of terms and gradients, of weights after NUM_STEPS.
_TOLERANCES = {"float32": (1e-5, 1e-4), "mixed_bfloat16": (2**-8, 2**-6)}
# Ratios that differ by less are one: rounds of the same route do too.
_NOISE = 0.05
_WIDTH = 16


def _table(title: str, columns: list[str], rows: dict[str, list[str]]) -> str:
    lines = [title]
    for name, cells in [("", columns), *rows.items()]:
        lines.append(f"{name:<{_WIDTH}}" + "".join(f"{cell:>{_WIDTH}}" for cell in cells))
    return "\n".join(lines)


def _equality(here: dict[str, Difference], two: dict[str, Difference]) -> str:
    def row(route: str) -> list[str]:
        return [f"{value:.1e}" if value else "0" for value in (*here[route], two[route].weights)]

    return _table(
        f"Largest difference from {BASE}, relative: of the first step, and of the weights after "
        f"{NUM_STEPS}",
        ["loss", "reconstr. loss", "kl", "gradients", "weights", "on 2 replicas"],
        {route: row(route) for route in here},
    )


def _timing(costs: dict[str, Cost]) -> str:
    return _table(
        "Cost, medians over rounds in which each route has its turn",
        ["ms/step", f"× {BASE}", "ms/call", "trace, s", "peak MiB"],
        {
            route: [
                f"{cost.step_ms:.1f}",
                f"{cost.ratio:.2f}",
                f"{cost.call_ms:.0f}",
                f"{cost.first_step_secs:.1f}",
                f"{cost.peak_mib:,.0f}",
            ]
            for route, cost in costs.items()
        },
    )


def _claims(costs: dict[str, Cost]) -> str:
    """The articles' claims, each with what was measured, and why."""
    by_fit = {route: cost.ratio for route, cost in costs.items() if route != BASE}
    fastest = min(by_fit, key=by_fit.get)

    def claim(what: str, ratio: float, holds: bool, why: str, why_not: str) -> str:
        verdict = f"holds: {why}" if holds else f"does not hold: {why_not}"
        return f"* {what}: {ratio:.2f} ×, {verdict}."

    once_traced = (
        "whichever layer adds it, a loss is traced into the same graph with the same arithmetic, "
        "and what a layer takes as an argument is not copied"
    )
    on_top = by_fit["output_layer"] / by_fit["encoder_layer"]
    in_model = by_fit["model_add_loss"] / by_fit["encoder_layer"]
    slower = "the host takes longer over it here"
    return "\n".join(
        [
            "What the articles claim, and what was measured here",
            claim(
                "output_layer takes 1.4 to 1.5 × the time of encoder_layer",
                *(on_top, on_top > 1.4 - _NOISE, slower, once_traced),
            ),
            claim(
                "model_add_loss takes 1.3 to 1.5 × the time of encoder_layer",
                *(in_model, in_model > 1.3 - _NOISE, slower, once_traced),
            ),
            claim(
                f"gradient_tape is fast; {fastest}, the fastest of the others, against it",
                *(by_fit[fastest], by_fit[fastest] > 1 - _NOISE),
                "its steps run many to a call, while fit feeds and looks at each",
                "fit takes less here",
            ),
        ]
    )


def _check(differences: dict[str, Difference], tolerances: tuple[float, float]) -> None:
    """Raises a StageError if a route is further from BASE than rounding explains."""
    for route, difference in differences.items():
        for name, value in difference._asdict().items():
            tolerance = tolerances[name == "weights"]
            if not value <= tolerance:
                raise StageError(
                    f"kl_route {route}: {name} differ from {BASE} by {value:.1e}; expected at most "
                    f"{tolerance:.1e}"
                )


def _machine(config: ml_collections.ConfigDict) -> str:
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    names = [tf.config.experimental.get_device_details(gpu).get("device_name") for gpu in gpus]
    on = f"{len(gpus)} × {names[0]}" if gpus else f"{len(os.sched_getaffinity(0))} CPU cores"
    return f"{on}, {config.precision}, {config.architecture}, batches of {config.batch_size}"


def report(config: ml_collections.ConfigDict, *, num_steps: int, num_rounds: int) -> None:
    """Compares the routes and prints what was found.

    Args:
      config: as configs/mnist.py explains; its kl_route and data_dir do not matter.
      num_steps: of a timed call, at least 2.
      num_rounds: how often each route is timed.

    Raises:
      UsageError: a route cannot honour the config.
      StageError: the routes' numbers are further apart than rounding explains.
    """
    with config.unlocked():
        config.data_dir = "images made by trials.py"
        for config.kl_route in kl_routes.NAMES:
            config_lib.check(config)
    config_lib.check_image_shape(config, trials.IMAGE_SHAPE)
    print(_machine(config), flush=True)

    def differences(proofs: dict[str, Proof]) -> dict[str, Difference]:
        return {route: trials.difference(proof, proofs[BASE]) for route, proof in proofs.items()}

    routes = kl_routes.NAMES
    proofs, costs = trials.compare(config, routes, num_steps=num_steps, num_rounds=num_rounds)
    here, two = differences(proofs), differences(trials.on_two_replicas(config, routes))
    print("", _equality(here, two), "", _timing(costs), "", sep="\n", flush=True)
    for found in (here, two):
        _check(found, _TOLERANCES[config.precision])
    if min(cost.step_ms for cost in costs.values()) <= 0:
        raise StageError(
            f"--num_steps={num_steps}: {num_steps} steps take no longer than one, so what a step "
            "takes cannot be told from what a call takes; try more, or more --num_rounds"
        )
    print(_claims(costs))
