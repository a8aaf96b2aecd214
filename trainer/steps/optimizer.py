"""Keras' Adam, applied to gradients that are already summed, clipped and tested for overflow.

Keras clips and tests the gradients of each replica before it sums them, so its updates would
depend on the number of replicas.
"""

import keras
import ml_collections
import tensorflow as tf

from trainer.model.networks import VAE
from trainer.steps import schedules

# Keras' values for mixed_float16: keras.optimizers.LossScaleOptimizer.
_FIRST_SCALE = 2.0**15
_GROWTH_STEPS = 2000


class _Adam(keras.optimizers.Adam):
    """Adam that updates a variable by one kernel.

    The formula is Keras' formula: Kingma and Ba (2015), "Adam", before section 2.1. Keras computes
    it in some twenty operations a variable: a step of configs/mnist.py launches 504 kernels on a
    GPU with Keras' update, 148 with this one (tests/trainer/test_gpu_graphs.py counts them).
    """

    # update_step and the private names are Keras' hooks for its own optimizers; when they change,
    # tests/trainer/test_train.py and test_kl_routes.py fail.

    def rates(self, learning_rate: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """The learning rate and Adam's two powers of the next step, float32 scalars.

        They are the same for all variables and computed once a step; computed for each variable
        they would be five kernels of a GPU.
        """
        step = tf.cast(self.iterations + 1, tf.float32)
        powers = [tf.constant(beta, tf.float32) ** step for beta in (self.beta_1, self.beta_2)]
        return tf.cast(learning_rate, tf.float32), *powers

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        super()._backend_update_step(grads, trainable_variables, self.rates(learning_rate))

    def update_step(self, gradient, variable, learning_rate):
        index = self._get_variable_index(variable)
        rate, beta_1_power, beta_2_power = learning_rate
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._momentums[index].value.handle,
            v=self._velocities[index].value.handle,
            beta1_power=beta_1_power,
            beta2_power=beta_2_power,
            lr=rate,
            beta1=tf.constant(self.beta_1, tf.float32),
            beta2=tf.constant(self.beta_2, tf.float32),
            epsilon=tf.constant(self.epsilon, tf.float32),
            grad=gradient,
        )


class _AdamOfSums(_Adam):
    """_Adam for gradients that are already summed over replicas."""

    def _all_reduce_sum_gradients(self, grads_and_vars):
        return grads_and_vars


class Optimizer:
    """The update of a step: Adam, clipping, and for mixed_float16 a scale of the loss."""

    def __init__(self, config: ml_collections.ConfigDict, vae: VAE, *, total_steps: int):
        """Builds the state, under the current distribution strategy.

        Args:
          config: the optimizer's keys, precision, jit_compile.
          vae: the model whose weights the optimizer updates.
          total_steps: steps of the whole run.
        """
        self._vae, self._clip_norm = vae, config.clip_norm
        # `fit` leaves the sum to the optimizer and calls none of the methods below.
        adam = _AdamOfSums if config.kl_route == "gradient_tape" else _Adam
        self.keras = adam(schedules.learning_rate(config, total_steps), name="adam")
        self.keras.build(vae.variables)
        self._compiled_update = None
        if config.jit_compile:
            self._compiled_update = tf.function(self._update, jit_compile=True)
        self.scales_loss = config.precision == "mixed_float16"
        self._scaling = {}
        if self.scales_loss:
            self._scaling = {
                "scale": tf.Variable(_FIRST_SCALE, trainable=False),
                "steps_since_change": tf.Variable(0, trainable=False),
            }

    @property
    def variables(self) -> dict[str, keras.Variable | tf.Variable]:
        """Name -> variable, for all variables that a checkpoint has to hold."""
        by_path = {variable.path: variable for variable in self.keras.variables}
        return by_path | {f"scaling/{name}": value for name, value in self._scaling.items()}

    @property
    def learning_rate(self) -> tf.Tensor:
        """The rate of the next step."""
        return self.keras.learning_rate

    def scale_loss(self, loss: tf.Tensor) -> tf.Tensor:
        """Scales a loss so that its gradients don't vanish in float16; else the loss itself."""
        return loss * self._scaling["scale"] if self.scales_loss else loss

    def unscale(self, gradients: list[tf.Tensor]) -> list[tf.Tensor]:
        """Gradients of the loss from those of the scaled loss."""
        if not self.scales_loss:
            return gradients
        return [gradient / self._scaling["scale"] for gradient in gradients]

    def apply(self, gradients: list[tf.Tensor]) -> None:
        """Updates the weights; in a replica's context.

        Args:
          gradients: of the batch's mean loss, summed over replicas, one for each of the
            model's variables.
        """
        if self._compiled_update:
            # Keras would leave the replica's context for every variable, which XLA cannot compile.
            self._compiled_update(gradients, self.keras.rates(self.learning_rate))
            self.keras.iterations.assign_add(1)
        else:
            self.keras.apply(self._clipped(gradients), self._vae.variables)

    def _clipped(self, gradients: list[tf.Tensor]) -> list[tf.Tensor]:
        if not self._clip_norm:
            return gradients
        # Pascanu, Mikolov and Bengio (2013), "On the difficulty of training recurrent neural
        # networks", algorithm 1.
        return tf.clip_by_global_norm(gradients, self._clip_norm)[0]

    def _update(self, gradients: list[tf.Tensor], rates: tuple[tf.Tensor, ...]) -> None:
        for gradient, variable in zip(self._clipped(gradients), self._vae.variables, strict=True):
            self.keras.update_step(gradient, variable.value, rates)

    def adapt_scale(self, finite: tf.Tensor) -> None:
        """Halves the scale after a step with an overflow, doubles it after many without one.

        Args:
          finite: bool scalar, whether all gradients of the step were finite.
        """
        scale, steps = self._scaling["scale"], self._scaling["steps_since_change"]
        grows = steps + 1 >= _GROWTH_STEPS
        scale.assign(tf.where(finite, tf.where(grows, scale * 2, scale), scale / 2))
        steps.assign(tf.where(finite & ~grows, steps + 1, 0))
