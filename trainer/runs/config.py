"""Checks and derived values of a config, and the part of a config that identifies a run."""

import math
import re
from collections.abc import Mapping
from typing import Any

import keras
import ml_collections
import numpy as np

from pipeline.cli import flag_parsing
from pipeline.cli.errors import StageError, UsageError
from pipeline.stages import manifest as manifest_lib
from pipeline.storage import files
from trainer.data import placement
from trainer.model import likelihoods
from trainer.steps import kl_routes, schedules

# Values of pixels between black and white.
_DARKEST, _LIGHTEST = 26, 229
_CHOICES = {
    "data_placement": placement.PLACEMENTS,
    "architecture": ("convolutional", "mlp"),
    "likelihood": likelihoods.NAMES,
    "binarize": ("none", "static", "dynamic"),
    "kl_route": kl_routes.NAMES,
    "learning_rate_schedule": schedules.LEARNING_RATES,
    "strategy": ("mirrored", "one_device", "multi_worker"),
    "precision": ("float32", "mixed_bfloat16", "mixed_float16"),
}

# Keys that may change when a run resumes: they determine where and how long a run trains, and not
# its sequence of weights.
_FREE_KEYS = frozenset(
    {
        "data_dir",
        "data_placement",
        "num_epochs",
        "warm_start_from",  # The model's content counts, not its path: see RunPlan.identity.
        "strategy",
        "num_virtual_devices",
        "jit_compile",
        "deterministic",
        "early_stopping_patience",
        "steps_per_loop",
        "checkpoint_every_steps",
        "keep_checkpoints",
        "profile_steps",
    }
)
# Keys that say nothing of a model, so its manifest lacks them.
UNPUBLISHED_KEYS = ("data_dir", "profile_steps")
_AT_LEAST = {
    "batch_size": 1,
    "num_epochs": 1,
    "latent_dim": 1,
    "kernel_size": 1,
    "num_importance_samples": 1,
    "gaussian_std": 1e-4,
    "beta": 0,
    "beta_warmup_steps": 0,
    "free_bits": 0,
    "clip_norm": 0,
    "learning_rate_warmup_steps": 0,
    "early_stopping_patience": 0,
    "num_virtual_devices": 0,
    "steps_per_loop": 1,
    "checkpoint_every_steps": 1,
    "keep_checkpoints": 1,
}
# Settings that Keras' `fit` limits: key, supported values, why it supports no others.
_KERAS_FIT_LIMITS = (
    ("num_importance_samples", (1,), "the importance-weighted bound has no KL term"),
    ("clip_norm", (0,), "Keras clips the gradients of each replica before it sums them"),
    (
        "precision",
        ("float32", "mixed_bfloat16"),
        "Keras checks only one replica for overflow",
    ),
    ("jit_compile", (False,), "Keras compiles all replicas together, for XLA's single device"),
    ("strategy", ("mirrored", "one_device"), "Keras 3 has no fit over several workers"),
    ("data_placement", ("auto", "memory_mapped"), "the host feeds fit"),
)
# Far beyond useful values: TensorFlow would run out of memory or time without a clear message.
_AT_MOST = {
    "batch_size": 2**20,
    "latent_dim": 2**16,
    "kernel_size": 2**8,
    "num_importance_samples": 2**16,
    "free_bits": 1e4,
    "gaussian_std": 1e4,
    "num_virtual_devices": 2**6,
}
# Keras' activations that change the shape. A list, since running an activation to find out would
# start TensorFlow's devices before num_virtual_devices is applied.
_RESHAPING_ACTIVATIONS = ("glu",)


def check(config: ml_collections.ConfigDict) -> None:
    """Refuses a config that no data set can be trained with.

    Raises:
      UsageError: names the key, its value and the allowed values.
    """

    def refuse(key: str, expected: str) -> None:
        raise UsageError(f"--config.{key}={config[key]}: expected {expected}")

    if not config.data_dir:
        raise UsageError(
            "--config.data_dir is not set; name the output directory of "
            "python -m pipeline.preprocess"
        )
    flag_parsing.check_unsigned("--config.data_dir=", config.data_dir)
    for key, minimum in _AT_LEAST.items():
        if key == "beta" and config.beta is None:  # `resolve` sets it.
            continue
        if not minimum <= config[key] < math.inf:  # Written so that NaN fails too.
            refuse(key, f"at least {minimum}" + (", and finite" if minimum <= config[key] else ""))
    for key, maximum in _AT_MOST.items():
        if config[key] > maximum:
            refuse(key, f"at most {maximum}")
    for key, choices in _CHOICES.items():
        if config[key] not in choices:
            refuse(key, f"one of {', '.join(choices)}")
    if not 0 < config.learning_rate < math.inf:
        refuse("learning_rate", "a number above 0")
    if config.binarize != "none" and config.likelihood != "bernoulli":
        refuse("binarize", f"none, since likelihood is {config.likelihood} and not bernoulli")
    if config.free_bits and config.num_importance_samples > 1:
        refuse("free_bits", "0, since the importance-weighted bound has no KL term")
    if config.kl_route != "gradient_tape":
        for key, supported, reason in _KERAS_FIT_LIMITS:
            if config[key] not in supported:
                expected = " or ".join(map(str, supported))
                refuse(key, f"{expected} for kl_route {config.kl_route}, since {reason}")
    if config.strategy == "multi_worker" and config.num_virtual_devices:
        refuse("num_virtual_devices", "0 for strategy multi_worker; start more workers instead")
    try:
        keras.activations.get(config.activation)
        is_supported = config.activation not in _RESHAPING_ACTIVATIONS
    except ValueError:
        is_supported = False
    if not is_supported:
        refuse("activation", "the name of an activation in keras.activations that keeps the shape")
    for key in ("filters", "strides", "hidden_units"):
        if not config[key] or any(not isinstance(n, int) or n < 1 for n in config[key]):
            refuse(key, "an integer of at least 1 for each layer, as in (32,64,128)")
    if len(config.filters) != len(config.strides):
        refuse("strides", f"as many numbers as filters, which has {len(config.filters)}")
    if config.profile_steps and not profiled_steps(config):
        refuse("profile_steps", "FIRST:END with FIRST below END, as in 100:110, or nothing")


def profiled_steps(config: ml_collections.ConfigDict) -> range:
    """The steps of config.profile_steps; empty if the text is empty or malformed."""
    bounds = re.fullmatch(r"(\d{1,18}):(\d{1,18})", config.profile_steps, re.ASCII)
    return range(*map(int, bounds.groups())) if bounds else range(0)


def check_image_shape(config: ml_collections.ConfigDict, image_shape: tuple[int, ...]) -> None:
    """Refuses strides of convolutions that don't divide the image.

    Args:
      config: a config that `check` accepts.
      image_shape: (H, W, C) of the data set.

    Raises:
      UsageError: names the first convolution whose stride does not divide its input.
    """
    if config.architecture != "convolutional":
        return
    for name, size in zip(("height", "width"), image_shape[:2], strict=True):
        input_size = size
        for number, stride in enumerate(config.strides, 1):
            if input_size % stride:
                raise UsageError(
                    f"--config.strides={config.strides}: image {name} {size} is {input_size} "
                    f"before convolution {number}, which its stride {stride} does not divide; "
                    "expected strides whose product divides "
                    f"{image_shape[0]}×{image_shape[1]}"
                )
            input_size //= stride


def likelihood_note(config: ml_collections.ConfigDict, images: np.ndarray) -> str:
    """A line that recommends another likelihood for such images; "" without need.

    With a Bernoulli likelihood, the loss of a pixel between black and white is mostly the pixel's
    own entropy, which no model can learn.

    Args:
      config: a config that `check` accepts.
      images: some images of the data set, uint8 (n, H, W, C).
    """
    if config.likelihood != "bernoulli" or config.binarize != "none" or not len(images):
        return ""
    share = float(((images >= _DARKEST) & (images <= _LIGHTEST)).mean())
    if images.shape[-1] == 1 and share <= 0.5:
        return ""
    kind = "colour images" if images.shape[-1] > 1 else "grey images"
    return (
        f"likelihood bernoulli fits black and white; {share:.0%} of the values of these {kind} are "
        "between: try --config.likelihood=continuous_bernoulli or gaussian"
    )


def resolve(
    config: ml_collections.ConfigDict, image_shape: tuple[int, ...]
) -> ml_collections.ConfigDict:
    """The config with a number for each key; the same object if it has one already.

    A beta of None becomes that of the articles: they add 6.5e-4 times a KL term averaged over
    latents to a mean over pixels; see configs/mnist.py.

    Args:
      config: a config that `check` accepts.
      image_shape: (H, W, C) of the data set.
    """
    if config.beta is not None:
        return config
    height, width, channels = image_shape
    # In this order: the last bit of beta decides the ids of runs.
    beta = 2 * 6.5e-4 * height * width * channels / config.latent_dim
    return ml_collections.ConfigDict({**config.to_dict(), "beta": beta}).lock()


def check_length(config: ml_collections.ConfigDict, total_steps: int) -> None:
    """Refuses a warm-up of the learning rate as long as the run, and a profile after its end.

    Raises:
      UsageError: names the value and the run's length.
    """
    if config.profile_steps and profiled_steps(config).start >= total_steps:
        raise UsageError(
            f"--config.profile_steps={config.profile_steps}: expected a first step below the run's "
            f"{total_steps} steps, the first of which is 0"
        )
    if config.learning_rate_warmup_steps >= total_steps:
        raise UsageError(
            f"--config.learning_rate_warmup_steps={config.learning_rate_warmup_steps}: expected "
            f"fewer than the run's {total_steps} steps"
        )


def identity(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The part of a config that determines a run's sequence of weights, as a JSON value."""
    free_keys = _FREE_KEYS
    if config.learning_rate_schedule != "constant":
        free_keys = free_keys - {"num_epochs"}  # The schedule depends on the number of steps.
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in sorted(config.to_dict().items())
        if key not in free_keys
    }


def config_from_manifest(manifest: Mapping[str, Any], model_dir: str) -> ml_collections.ConfigDict:
    """The config that a model was trained with; data_dir is empty.

    Raises:
      StageError: this version cannot train with the manifest's config.
    """
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in manifest["config"].items()}
    config = ml_collections.ConfigDict({**dict.fromkeys(UNPUBLISHED_KEYS, ""), **values})
    try:
        check(ml_collections.ConfigDict({**config.to_dict(), "data_dir": model_dir}))
        if config.beta is None:
            raise ValueError("beta is null, expected a number")
    except (UsageError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise StageError(
            f"{files.join(model_dir, manifest_lib.MANIFEST)}: this version cannot use the model's "
            f"config ({' '.join(str(error).split())}); train the model again"
        ) from error
    return config.lock()
