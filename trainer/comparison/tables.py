"""Prints the results of trials.py: two tables, and a verdict on the articles' claims."""

import os

import ml_collections

from pipeline.cli.errors import StageError
from trainer.comparison import trials
from trainer.comparison.trials import BASE, NUM_STEPS, Cost, Difference, RouteResult
from trainer.runs import config as config_lib
from trainer.steps import kl_routes

# precision -> allowed relative differences: of terms and gradients, of weights after NUM_STEPS.
_TOLERANCES = {"float32": (1e-5, 1e-4), "mixed_bfloat16": (2**-8, 2**-6)}
# Ratios that differ by less count as equal, since rounds of the same route differ by as much.
_NOISE = 0.05
_WIDTH = 16


def _table(title: str, columns: list[str], rows: dict[str, list[str]]) -> str:
    lines = [title]
    for name, cells in [("", columns), *rows.items()]:
        lines.append(f"{name:<{_WIDTH}}" + "".join(f"{cell:>{_WIDTH}}" for cell in cells))
    return "\n".join(lines)


def _difference_table(
    differences: dict[str, Difference], replica_differences: dict[str, Difference]
) -> str:
    def row(route: str) -> list[str]:
        values = *differences[route], replica_differences[route].weights
        return [f"{value:.1e}" if value else "0" for value in values]

    return _table(
        f"Largest relative difference from {BASE}: in the first step, and of the weights after "
        f"{NUM_STEPS} steps",
        ["loss", "reconstr. loss", "kl", "gradients", "weights", "on 2 replicas"],
        {route: row(route) for route in differences},
    )


def _cost_table(costs: dict[str, Cost]) -> str:
    return _table(
        "Cost: medians over rounds that time each route in turn",
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
    """The articles' claims, each with the measured ratio, a verdict and a reason."""
    fit_ratios = {route: cost.ratio for route, cost in costs.items() if route != BASE}
    fastest = min(fit_ratios, key=fit_ratios.get)

    def claim(text: str, ratio: float, holds: bool, reason: str, reason_against: str) -> str:
        verdict = f"holds: {reason}" if holds else f"does not hold: {reason_against}"
        return f"* {text}: {ratio:.2f} ×, {verdict}."

    same_graph = (
        "TensorFlow traces the loss into the same graph with the same arithmetic, whichever layer "
        "adds it, and does not copy the arguments of a layer"
    )
    output_ratio = fit_ratios["output_layer"] / fit_ratios["encoder_layer"]
    model_ratio = fit_ratios["model_add_loss"] / fit_ratios["encoder_layer"]
    slower = "the host needs more time for this route here"
    return "\n".join(
        [
            "The articles' claims, and the measurements here",
            claim(
                "output_layer takes 1.4 to 1.5 × the time of encoder_layer",
                *(output_ratio, output_ratio > 1.4 - _NOISE, slower, same_graph),
            ),
            claim(
                "model_add_loss takes 1.3 to 1.5 × the time of encoder_layer",
                *(model_ratio, model_ratio > 1.3 - _NOISE, slower, same_graph),
            ),
            claim(
                f"gradient_tape is fast; {fastest}, the fastest other route, compared with it",
                *(fit_ratios[fastest], fit_ratios[fastest] > 1 - _NOISE),
                "gradient_tape runs many steps in a call, while fit feeds and inspects each step",
                "fit takes less time here",
            ),
        ]
    )


def _check(differences: dict[str, Difference], tolerances: tuple[float, float]) -> None:
    """Raises a StageError if a route differs from BASE by more than rounding explains."""
    for route, difference in differences.items():
        for name, value in difference._asdict().items():
            tolerance = tolerances[name == "weights"]
            if not value <= tolerance:
                raise StageError(
                    f"kl_route {route}: the difference of {name} from {BASE} is {value:.1e}; "
                    f"expected at most {tolerance:.1e}"
                )


def _machine(config: ml_collections.ConfigDict) -> str:
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    names = [tf.config.experimental.get_device_details(gpu).get("device_name") for gpu in gpus]
    devices = f"{len(gpus)} × {names[0]}" if gpus else f"{len(os.sched_getaffinity(0))} CPU cores"
    return f"{devices}, {config.precision}, {config.architecture}, batches of {config.batch_size}"


def report(config: ml_collections.ConfigDict, *, num_steps: int, num_rounds: int) -> None:
    """Compares the routes and prints the results.

    Args:
      config: configs/mnist.py explains its keys; kl_route and data_dir are ignored.
      num_steps: steps of a timed call, at least 2.
      num_rounds: number of timed calls of each route.

    Raises:
      UsageError: a route does not support the config.
      StageError: the routes differ by more than rounding explains, or num_steps is too small.
    """
    with config.unlocked():
        config.data_dir = "images made by trials.py"
        for route in kl_routes.NAMES:
            config.kl_route = route
            config_lib.check(config)
    config_lib.check_image_shape(config, trials.IMAGE_SHAPE)
    config = config_lib.resolve(config, trials.IMAGE_SHAPE)
    print(_machine(config), flush=True)

    def from_base(results: dict[str, RouteResult]) -> dict[str, Difference]:
        return {
            route: trials.difference(result, results[BASE]) for route, result in results.items()
        }

    routes = kl_routes.NAMES
    results, costs = trials.compare(config, routes, num_steps=num_steps, num_rounds=num_rounds)
    differences = from_base(results)
    replica_differences = from_base(trials.run_on_two_replicas(config, routes))
    difference_table = _difference_table(differences, replica_differences)
    print("", difference_table, "", _cost_table(costs), "", sep="\n", flush=True)
    _check(differences, _TOLERANCES[config.precision])
    _check(replica_differences, _TOLERANCES[config.precision])
    if min(cost.step_ms for cost in costs.values()) <= 0:
        raise StageError(
            f"--num_steps={num_steps}: {num_steps} steps take no longer than one step, so the time "
            "of a step cannot be measured; try more steps, or more --num_rounds"
        )
    print(_claims(costs))
