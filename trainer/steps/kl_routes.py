"""Five ways to bring the KL term into training, all to the same weights.

The rule behind them: every tensor that a loss needs is passed to it. A layer or a loss that
closes over `mean` and `log_var` of a functional model closes over placeholders, which hold no
numbers when a step runs (tests/trainer/test_kl_routes.py has the message that a user sees). So the
routes differ in where the KL term stands, and by that in what can be passed to it there.

* `gradient_tape` is Steps in tape_steps.py: encoder, decoder and loss are called under a tape of
  our own. The articles called it fast, the most flexible and the way of the future, and Keras 3
  changed nothing about it. Choose it unless the model has to go through `fit`: many steps run in
  one call, and the loss may be anything, the importance-weighted one included.
* The other four are Keras models made here and trained by `fit` in keras_fit_steps.py. Each takes

      images   float32 (n, H, W, C) in [0, 1]
      places   int32 (n,), places in the global batch, by which noise belongs to them
      step     int32 (n,), global number of the step, n times the same
      weights  float32 (n,), the example's share of the global batch, 0 where there is none
      beta     float32 (n,), weight of the KL term in this step, n times the same

  for the noise of a step, a short last batch and a schedule are passed in like everything else.
  The noise itself is drawn in the model, on the device, as gradient_tape draws it: normal numbers
  of a CPU and of a GPU differ in their last digits.

Keras 3 has dropped `add_metric`, and `add_loss` on the symbolic tensors of a functional model.
It has kept `add_loss` within the `call` of a layer or a model, and metrics that a layer owns.
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
    """A replica's part of the mean over the global batch, in the form in which `add_loss` wants it.

    Keras divides what is added by the number of replicas, as if it were a mean over the replica's
    own examples; the weights have divided by the size of the global batch already.

    Args:
      terms: float32 (n,), nats.
      weights: float32 (n,), as above.

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

    Keeps the means of both terms as metrics, which was `add_metric` before Keras 3.
    """

    def __init__(self, decoder: keras.Model, negative_log: PerExample, draw_noise: DrawNoise):
        super().__init__(name="decode")
        self.decoder, self._negative_log = decoder, negative_log
        self._draw_noise = draw_noise
        self.reconstruction_loss = keras.metrics.Mean("reconstruction_loss")
        self.kl = keras.metrics.Mean("kl")

    def call(self, inputs, mean, log_var):
        # int32 already, but for the placeholders by which Keras builds a model of several replicas.
        step, places = (tf.cast(inputs[name], tf.int32) for name in ("step", "places"))
        noise = self._draw_noise(step[0], places)
        (z,) = tf.unstack(objective.sample(mean, log_var, noise), axis=1)
        logits = self.decoder(z)  # (n, H, W, C)
        negative_log = self._negative_log(inputs["images"], logits)
        self.reconstruction_loss.update_state(negative_log, inputs["weights"])
        self.kl.update_state(losses.kl(mean, log_var), inputs["weights"])
        return logits


class Parts(NamedTuple):
    """What the routes are put together from."""

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


def encoder_layer(parts: Parts, optimizer: keras.Optimizer, **about) -> keras.Model:
    """A layer of the encoder, next to mean and log_var, adds the KL term; compile has the rest.

    The articles: the most elegant route, and the fastest.
    Keras 3: `add_loss` in a layer's `call` is what it has kept, so this route needed no change.
    Choose it where an encoder is to bring its regulariser along, whatever decoder it meets.
    """
    inputs = parts.inputs()
    mean, log_var = parts.encoder(inputs["images"])
    mean, log_var = _KlLayer(parts.kl_term)(mean, log_var, inputs["weights"], inputs["beta"])
    model = keras.Model(inputs, parts.decode(inputs, mean, log_var))
    model.compile(optimizer, loss=_Loss(parts.negative_log), **about)
    return model


def multi_output(parts: Parts, optimizer: keras.Optimizer, **about) -> keras.Model:
    """Mean and log_var are a further output of the model, which has a loss of its own.

    The articles: it works, and is somewhat complex.
    Keras 3: a loss of `compile` sees one output and its target. So mean and log_var travel
    as one output, and beta, which its loss needs too, as the target (see `targets`).
    Choose it where `predict` is to give the posterior, or `fit` to log each output's loss.
    """
    inputs = parts.inputs()
    mean, log_var = parts.encoder(inputs["images"])
    outputs = {
        "reconstruction": parts.decode(inputs, mean, log_var),
        "posterior": keras.ops.stack([mean, log_var], axis=1),  # (n, 2, latent_dim)
    }
    of_outputs = {
        "reconstruction": _Loss(parts.negative_log),
        "posterior": _Loss(lambda beta, both: beta * parts.kl_term(both[:, 0], both[:, 1])),
    }
    model = keras.Model(inputs, outputs)
    model.compile(optimizer, loss=of_outputs, **about)
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


def model_add_loss(parts: Parts, optimizer: keras.Optimizer, **about) -> keras.Model:
    """The model as a whole adds the KL term; compile has the rest.

    The articles: light, but it may cost a factor of 1.3 to 1.5.
    Keras 3: `model.add_loss(tensor)` on a functional model is gone; a model with a `call` of its
    own adds its loss there.
    Choose it where the model is such a class anyway: the objective then stands in one place.
    """
    model = _ModelThatAddsLoss(parts)
    model.compile(optimizer, loss=_Loss(parts.negative_log), **about)
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


def output_layer(parts: Parts, optimizer: keras.Optimizer, **about) -> keras.Model:
    """One layer on top takes mean, log_var, images and logits, and adds the whole loss.

    The articles: it works once all tensors are arguments, and is the slowest: 15 s an epoch where
    others take 10 to 11.
    Keras 3: `compile` needs no loss where a layer adds one, and `fit` then leaves targets unused.
    Choose it where a loss takes tensors from several places of a functional model.
    """
    inputs = parts.inputs()
    mean, log_var = parts.encoder(inputs["images"])
    logits = parts.decode(inputs, mean, log_var)
    model = keras.Model(inputs, _LossLayer(parts)(logits, inputs, mean, log_var))
    model.compile(optimizer, **about)
    return model


_MODELS = {
    make.__name__: make for make in (encoder_layer, multi_output, model_add_loss, output_layer)
}
NAMES = ("gradient_tape", *_MODELS)


def compiled(
    config: ml_collections.ConfigDict,
    vae: VAE,
    optimizer: keras.Optimizer,
    draw_noise: DrawNoise,
) -> keras.Model:
    """The compiled model of a config's route, which is not gradient_tape.

    It has the metrics loss, reconstruction_loss and kl, means in nats per image.

    Args:
      config: kl_route, likelihood and its keys, free_bits.
      vae: the networks; the model has no other weights.
      optimizer: of these weights.
      draw_noise: as `Steps.draw_noise` draws for training.
    """
    negative_log = likelihoods.make(config).negative_log
    decode = _SampleAndDecode(vae.decoder, negative_log, draw_noise)
    parts = Parts(vae.encoder, decode, negative_log, objective.kl_term(config))
    # Keras would choose XLA by itself where it finds a GPU.
    return _MODELS[config.kl_route](parts, optimizer, jit_compile=config.jit_compile)


def targets(kl_route: str, inputs: Inputs) -> tf.Tensor | Inputs:
    """What `fit` takes as `y` beside the inputs of a route's model."""
    if kl_route == "multi_output":
        return {"reconstruction": inputs["images"], "posterior": inputs["beta"]}
    return inputs["images"]
