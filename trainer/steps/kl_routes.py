"""Five ways to bring the KL term into training, all to the same weights.

All routes obey one rule: every tensor that a loss needs is an argument of the loss. A layer or a
loss that closes over `mean` and `log_var` of a functional model closes over placeholders, which
hold no numbers when a step runs (tests/trainer/test_kl_routes.py has the message that a user
sees). The routes differ in where they compute the KL term, and so in which tensors they can pass.

* `gradient_tape` is TapeSteps in tape_steps.py: encoder, decoder and loss run under a gradient
  tape. The articles called this route fast, the most flexible and the way of the future, and Keras
  3 changed nothing about it. Choose it unless the model has to go through `fit`: many steps run in
  one call, and any loss is possible, the importance-weighted loss included.
* The other four are Keras models, built here and trained by `fit` in keras_fit_steps.py. Each takes

      images   float32 (n, H, W, C) in [0, 1]
      places   int32 (n,), places of the examples in the global batch, which determine the noise
      step     int32 (n,), global number of the step, n times the same
      weights  float32 (n,), the example's share of the global batch, 0 where there is no example
      beta     float32 (n,), weight of the KL term in this step, n times the same

  since the step's number, a short last batch and a schedule have to be inputs too. The model draws
  the noise itself, on the device, as gradient_tape does: normal random numbers of a CPU and of a
  GPU differ in their last digits.

Keras 3 has dropped `add_metric`, and `add_loss` on the symbolic tensors of a functional model.
Keras 3 has kept `add_loss` within the `call` of a layer or a model, and metrics of a layer.
"""

from collections.abc import Callable
from typing import NamedTuple

import keras
import ml_collections
import tensorflow as tf

from trainer.model import likelihoods, losses, objective
from trainer.model.networks import VAE

Inputs = dict[str, tf.Tensor]
# int32 scalar, the step's number, and int32 (n,), places -> float32 (n, 1, latent_dim)
DrawNoise = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
PerExample = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]  # two (n, …) -> float32 (n,)


def _share(terms: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """A replica's part of the mean over the global batch, in the form that `add_loss` expects.

    Keras divides an added loss by the number of replicas, as if the loss were a mean over the
    replica's own examples; here the weights already divide by the size of the global batch.

    Args:
      terms: float32 (n,), nats.
      weights: float32 (n,), as in the module's docstring.

    Returns:
      float32 scalar.
    """
    num_replicas = tf.distribute.get_strategy().num_replicas_in_sync
    return num_replicas * tf.reduce_sum(weights * terms)


class _Loss(keras.losses.Loss):
    """A loss for `compile`: the sum over examples of (target, output) times `sample_weight`."""

    def __init__(self, function: PerExample):
        super().__init__(reduction="sum")  # Keras' mean would count missing examples.
        self._function = function

    def call(self, y_true, y_pred):
        return self._function(y_true, y_pred)


class _SampleAndDecode(keras.layers.Layer):
    """Draws z from the posterior and decodes it.

    Both terms are metrics of this layer; before Keras 3, `add_metric` did this.
    """

    def __init__(self, decoder: keras.Model, negative_log: PerExample, draw_noise: DrawNoise):
        super().__init__(name="decode")
        self.decoder, self._negative_log = decoder, negative_log
        self._draw_noise = draw_noise
        self.reconstruction_loss = keras.metrics.Mean("reconstruction_loss")
        self.kl = keras.metrics.Mean("kl")

    def call(self, inputs, mean, log_var):
        # They are int32, except for the placeholders with which Keras builds a model of several
        # replicas.
        step, places = (tf.cast(inputs[name], tf.int32) for name in ("step", "places"))
        noise = self._draw_noise(step[0], places)
        (z,) = tf.unstack(objective.sample(mean, log_var, noise), axis=1)
        logits = self.decoder(z)  # (n, H, W, C)
        negative_log = self._negative_log(inputs["images"], logits)
        self.reconstruction_loss.update_state(negative_log, inputs["weights"])
        self.kl.update_state(losses.kl(mean, log_var), inputs["weights"])
        return logits


class Parts(NamedTuple):
    """The layers and terms that every route combines."""

    encoder: keras.Model  # images -> mean, log_var
    decode: keras.layers.Layer  # inputs, mean, log_var -> logits
    negative_log: PerExample  # images, logits -> nats
    kl_term: PerExample  # mean, log_var -> nats

    def inputs(self) -> dict[str, keras.KerasTensor]:
        """Placeholders of a functional model, by name."""
        return {
            "images": keras.Input(self.encoder.input_shape[1:], name="images"),
            "places": keras.Input((), name="places", dtype="int32"),
            "step": keras.Input((), name="step", dtype="int32"),
            "weights": keras.Input((), name="weights"),
            "beta": keras.Input((), name="beta"),
        }


class _KlLayer(keras.layers.Layer):
    def __init__(self, kl_term: PerExample):
        super().__init__(name="kl_term")
        self._kl_term = kl_term

    def call(self, mean, log_var, weights, beta):
        self.add_loss(_share(beta * self._kl_term(mean, log_var), weights))
        return mean, log_var


def encoder_layer(parts: Parts, optimizer: keras.Optimizer, **options) -> keras.Model:
    """A layer after mean and log_var adds the KL term; `compile` has the reconstruction loss.

    The articles: the most elegant route, and the fastest.
    Keras 3: `add_loss` in a layer's `call` still works, so this route needed no change.
    Choose it where an encoder should carry its regulariser to any decoder.
    """
    inputs = parts.inputs()
    mean, log_var = parts.encoder(inputs["images"])
    mean, log_var = _KlLayer(parts.kl_term)(mean, log_var, inputs["weights"], inputs["beta"])
    model = keras.Model(inputs, parts.decode(inputs, mean, log_var))
    model.compile(optimizer, loss=_Loss(parts.negative_log), **options)
    return model


def multi_output(parts: Parts, optimizer: keras.Optimizer, **options) -> keras.Model:
    """Mean and log_var are a second output of the model, with its own loss: the KL term.

    The articles: this route works, and is somewhat complex.
    Keras 3: a loss of `compile` sees one output and its target. So mean and log_var are stacked
    in one output, and beta, which the loss needs too, is the target (see `targets`).
    Choose it where `predict` should return the posterior, or `fit` should log each output's loss.
    """
    inputs = parts.inputs()
    mean, log_var = parts.encoder(inputs["images"])
    outputs = {
        "reconstruction": parts.decode(inputs, mean, log_var),
        "posterior": keras.ops.stack([mean, log_var], axis=1),  # (n, 2, latent_dim)
    }
    output_losses = {
        "reconstruction": _Loss(parts.negative_log),
        "posterior": _Loss(
            lambda beta, posterior: beta * parts.kl_term(posterior[:, 0], posterior[:, 1])
        ),
    }
    model = keras.Model(inputs, outputs)
    model.compile(optimizer, loss=output_losses, **options)
    return model


class _ModelThatAddsLoss(keras.Model):
    def __init__(self, parts: Parts):
        super().__init__(name="vae")
        self.encoder, self.decode, self._kl_term = parts.encoder, parts.decode, parts.kl_term

    def call(self, inputs):
        mean, log_var = self.encoder(inputs["images"])
        kl_term = inputs["beta"] * self._kl_term(mean, log_var)
        self.add_loss(_share(kl_term, inputs["weights"]))
        return self.decode(inputs, mean, log_var)


def model_add_loss(parts: Parts, optimizer: keras.Optimizer, **options) -> keras.Model:
    """The model adds the KL term in its `call`; `compile` has the reconstruction loss.

    The articles: light, but it may cost a factor of 1.3 to 1.5.
    Keras 3: `model.add_loss(tensor)` on a functional model is gone; a subclass of Model adds its
    loss in `call`.
    Choose it where the model is a subclass anyway: `call` then shows the whole objective.
    """
    model = _ModelThatAddsLoss(parts)
    model.compile(optimizer, loss=_Loss(parts.negative_log), **options)
    return model


class _LossLayer(keras.layers.Layer):
    def __init__(self, parts: Parts):
        super().__init__(name="loss")
        self._negative_log, self._kl_term = parts.negative_log, parts.kl_term

    def call(self, logits, inputs, mean, log_var):
        reconstruction_loss = self._negative_log(inputs["images"], logits)
        loss = reconstruction_loss + inputs["beta"] * self._kl_term(mean, log_var)
        self.add_loss(_share(loss, inputs["weights"]))
        return logits


def output_layer(parts: Parts, optimizer: keras.Optimizer, **options) -> keras.Model:
    """A last layer takes mean, log_var, images and logits, and adds the whole loss.

    The articles: this route works once all tensors are arguments, and is the slowest: 15 s an
    epoch where the others take 10 to 11 s.
    Keras 3: `compile` needs no loss where a layer adds a loss, and `fit` then ignores targets.
    Choose it where a loss takes tensors from several places of a functional model.
    """
    inputs = parts.inputs()
    mean, log_var = parts.encoder(inputs["images"])
    logits = parts.decode(inputs, mean, log_var)
    model = keras.Model(inputs, _LossLayer(parts)(logits, inputs, mean, log_var))
    model.compile(optimizer, **options)
    return model


_MODELS = {
    build.__name__: build for build in (encoder_layer, multi_output, model_add_loss, output_layer)
}
NAMES = ("gradient_tape", *_MODELS)


def compile_model(
    config: ml_collections.ConfigDict,
    vae: VAE,
    optimizer: keras.Optimizer,
    draw_noise: DrawNoise,
) -> keras.Model:
    """Builds and compiles the model of a config's route, which is not gradient_tape.

    The model has the metrics loss, reconstruction_loss and kl, means in nats per image.

    Args:
      config: kl_route, likelihood and its keys, free_bits.
      vae: the networks; the model has no other weights.
      optimizer: of these weights.
      draw_noise: as `Evaluator.draw_noise` draws for training.
    """
    negative_log = likelihoods.make(config).negative_log
    decode = _SampleAndDecode(vae.decoder, negative_log, draw_noise)
    parts = Parts(vae.encoder, decode, negative_log, objective.kl_term(config))
    # Without jit_compile Keras would choose XLA by itself on a GPU.
    return _MODELS[config.kl_route](parts, optimizer, jit_compile=config.jit_compile)


def targets(kl_route: str, inputs: Inputs) -> tf.Tensor | Inputs:
    """The targets that `fit` takes beside the inputs of a route's model."""
    if kl_route == "multi_output":
        return {"reconstruction": inputs["images"], "posterior": inputs["beta"]}
    return inputs["images"]
