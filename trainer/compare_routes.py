"""Compares the five routes of the KL term: their numbers and their cost.

    python -m trainer.compare_routes

Starts a process for each route. The processes train the same model from the same weights on
generated images. Prints two tables: the differences of losses, gradients and weights, and the time
and memory of a step. Ends with status 1 if a difference is larger than rounding explains.
"""

# This file only defines flags; the measurement is in comparison/trials.py.

import os

from absl import flags

import configs.mnist
from pipeline.cli import command, quiet
from trainer.runs import config_flag

_CONFIG = config_flag.define(
    configs.mnist.__file__,
    "A Python file with get_config(), or the name of one of configs/; its kl_route is ignored.",
)
_NUM_STEPS = flags.DEFINE_integer(
    "num_steps", 10, "Steps in one timed call.", lower_bound=2, upper_bound=1000
)
_NUM_ROUNDS = flags.DEFINE_integer(
    "num_rounds", 15, "Number of timed calls of each route.", lower_bound=1, upper_bound=1000
)


def run(_: list[str]) -> None:
    """Compares as the flags say and prints the tables."""
    # The routes' processes share a GPU.
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    quiet.import_tensorflow()
    from trainer.comparison import tables

    tables.report(_CONFIG.value, num_steps=_NUM_STEPS.value, num_rounds=_NUM_ROUNDS.value)


def main() -> None:
    """Entry point of `vae-compare-routes`."""
    command.run(run, name="compare_routes", doc=__doc__, module=__name__, beam=False)


if __name__ == "__main__":
    main()
