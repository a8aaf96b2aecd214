"""What a run needs of its training steps, whichever kl_route they take."""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from trainer.data import placement
from trainer.steps.evaluation import Evaluator
from trainer.steps.keras_fit_steps import KerasFitSteps
from trainer.steps.optimizer import Optimizer
from trainer.steps.tape_steps import TapeSteps


class TrainingSteps(Protocol):
    """The training steps of one model on one strategy; `stop` of their evaluator ends them."""

    evaluator: Evaluator
    max_steps: float  # the most steps for one call of `train_some`

    def place(self, images: np.ndarray, *, num_bytes: int) -> placement.Split:
        """Puts the training images where the steps take them from.

        Args:
          images: uint8 (n, H, W, C).
          num_bytes: size of the data, all splits together.
        """

    def trace(self, visit: placement.Visit, step: int, first_batch: int) -> None:
        """Builds the graph of a step ahead of the first step, where possible; runs no step."""

    def train_some(
        self,
        visit: placement.Visit,
        *,
        step: int,
        first_batch: int,
        num_steps: int,
        on_rows: Callable[[np.ndarray], None],
    ) -> bool:
        """Trains up to `num_steps` steps within one epoch.

        Args:
          visit: the epoch's records, a visit of what `place` returned.
          step: global number of the first step.
          first_batch: number in the epoch of the same step's batch.
          num_steps: at most `max_steps`.
          on_rows: receives float32 (n, 4), a row of evaluation.SUMS for each finished step.

        Returns:
          Whether a call of `stop`, in any process, has ended the steps.
        """


def make(evaluator: Evaluator, optimizer: Optimizer) -> TrainingSteps:
    """The training steps of the kl_route in the evaluator's config.

    Args:
      evaluator: of the model; its config also has jit_compile and steps_per_loop.
      optimizer: of the model's weights, built in the strategy's scope.
    """
    if evaluator.config.kl_route == "gradient_tape":
        return TapeSteps(evaluator, optimizer)
    return KerasFitSteps(evaluator, optimizer)
