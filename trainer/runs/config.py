"""What a config may say, and which of its keys shape the result."""

import math
from collections.abc import Mapping
from typing import Any

import keras
import ml_collections

from pipeline.cli.errors import StageError, UsageError
from pipeline.stages import manifest as manifest_lib
from pipeline.storage import files
from trainer.data import placement
from trainer.model import likelihoods
from trainer.steps import kl_routes, schedules

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

# Keys that may change when a run goes on: they say where and how long it runs,
# not which path it takes.
_FREE_KEYS = frozenset(
    {
        "data_dir",
        "data_placement",
        "num_epochs",
        "warm_start_from",  # Its content counts, not its place: Run.identity has it.
        "strategy",
        "num_virtual_devices",
        "jit_compile",
        "deterministic",
        "early_stopping_patience",
        "steps_per_loop",
        "checkpoint_every_steps",
        "keep_checkpoints",
    }
)
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
# What routes by Keras' `fit` cannot honour: key, the values that they can, why no others.
_ONLY_BY_TAPE = (
    ("num_importance_samples", (1,), "the importance-weighted bound has no KL term"),
    ("clip_norm", (0,), "Keras clips the gradients of each replica before it sums them"),
    (
        "precision",
        ("float32", "mixed_bfloat16"),
        "Keras looks for overflow on one replica alone",
    ),
    ("jit_compile", (False,), "Keras compiles all replicas as one, and XLA has one device"),
    ("strategy", ("mirrored", "one_device"), "Keras 3 has no fit over several workers"),
    ("data_placement", ("auto", "memory_mapped"), "fit is fed by the host"),
)
# Far beyond what is of use: TensorFlow would run out of memory or time, and not say why.
_AT_MOST = {
    "batch_size": 2**20,
    "latent_dim": 2**16,
    "kernel_size": 2**8,
    "num_importance_samples": 2**16,
    "free_bits": 1e4,
    "gaussian_std": 1e4,
    "num_virtual_devices": 2**6,
}
# Activations of Keras that give another shape than they take. By name: to run one would
# start TensorFlow's devices, before num_virtual_devices has had its say.
_RESHAPING = ("glu",)


def check(config: ml_collections.ConfigDict) -> None:
    """Refuses a config whose values cannot be trained with, whatever the data.

    Raises:
      UsageError: with the key, its value and what it may be.
    """

    def refuse(key: str, expected: str) -> None:
        raise UsageError(f"--config.{key}={config[key]}: expected {expected}")

    if not config.data_dir:
        raise UsageError(
            "--config.data_dir is not set; name the output directory of "
            "python -m pipeline.preprocess"
        )
    for key, least in _AT_LEAST.items():
        if not least <= config[key] < math.inf:  # Written so that NaN fails too.
            refuse(key, f"at least {least}, and finite")
    for key, most in _AT_MOST.items():
        if config[key] > most:
            refuse(key, f"at most {most}")
    for key, choices in _CHOICES.items():
        if config[key] not in choices:
            refuse(key, f"one of {', '.join(choices)}")
    if not 0 < config.learning_rate < math.inf:
        refuse("learning_rate", "a number above 0")
    if config.binarize != "none" and config.likelihood != "bernoulli":
        refuse("binarize", f"none, since likelihood is {config.likelihood}, and not bernoulli")
    if config.free_bits and config.num_importance_samples > 1:
        refuse("free_bits", "0, since the importance-weighted bound has no KL term")
    for key, honoured, reason in _ONLY_BY_TAPE if config.kl_route != "gradient_tape" else ():
        if config[key] not in honoured:
            expected = " or ".join(map(str, honoured))
            refuse(key, f"{expected} for kl_route {config.kl_route}, since {reason}")
    if config.strategy == "multi_worker" and config.num_virtual_devices:
        refuse("num_virtual_devices", "0 for strategy multi_worker; start more workers instead")
    try:
        keras.activations.get(config.activation)
        known = config.activation not in _RESHAPING
    except ValueError:
        known = False
    if not known:
        refuse("activation", "a name that keras.activations knows and that keeps the shape")
    for key in ("filters", "strides", "hidden_units"):
        if not config[key] or any(not isinstance(n, int) or n < 1 for n in config[key]):
            refuse(key, "one number of at least 1 for each layer, as in (32,64,128)")
    if len(config.filters) != len(config.strides):
        refuse("strides", f"as many as filters, which has {len(config.filters)}")


def check_image_shape(config: ml_collections.ConfigDict, image_shape: tuple[int, ...]) -> None:
    """Refuses strides of convolutions that don't divide the image.

    Args:
      config: as checked.
      image_shape: (H, W, C) of the data set.

    Raises:
      UsageError: with the size and the stride at which it fails.
    """
    if config.architecture != "convolutional":
        return
    for name, size in zip(("height", "width"), image_shape[:2], strict=True):
        left = size
        for place, stride in enumerate(config.strides):
            if left % stride:
                raise UsageError(
                    f"--config.strides={config.strides}: image {name} {size} is {left} before "
                    f"convolution {place + 1}, which its stride {stride} does not divide; expected "
                    f"strides whose product divides {image_shape[0]}×{image_shape[1]}"
                )
            left //= stride


def check_length(config: ml_collections.ConfigDict, total_steps: int) -> None:
    """Refuses a warm-up of the learning rate that is as long as the run.

    Raises:
      UsageError: with both lengths.
    """
    if config.learning_rate_warmup_steps >= total_steps:
        raise UsageError(
            f"--config.learning_rate_warmup_steps={config.learning_rate_warmup_steps}: expected "
            f"fewer than the run's {total_steps} steps"
        )


def identity(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The part of a config that determines the path of a run, as a JSON value."""
    free = _FREE_KEYS
    if config.learning_rate_schedule != "constant":
        free = free - {"num_epochs"}  # The rate of a step depends on the last one's number.
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in sorted(config.to_dict().items())
        if key not in free
    }


def config_of(manifest: Mapping[str, Any], model_dir: str) -> ml_collections.ConfigDict:
    """The config that a model was trained with; data_dir is empty.

    Raises:
      StageError: the manifest's config is none that can be trained with.
    """
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in manifest["config"].items()}
    config = ml_collections.ConfigDict({"data_dir": "", **values})
    try:
        check(ml_collections.ConfigDict({**values, "data_dir": model_dir}))
    except (UsageError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise StageError(
            f"{files.join(model_dir, manifest_lib.MANIFEST)}: its config cannot be trained with "
            f"({' '.join(str(error).split())}); expected one of this version: train the model again"
        ) from error
    return config.lock()
