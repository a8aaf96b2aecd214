"""Trains a variational autoencoder on a data set and publishes the model.

    python -m trainer.main --config=configs/mnist.py --config.data_dir=DIR --workdir=DIR

--config=NAME stands for configs/NAME.py of the installed package. Set any key of the config as
--config.KEY=VALUE; the config files explain the keys. Run the same command again to resume after an
interruption.
"""

# This file only defines flags; training is in runs/train.py.

from absl import flags

from pipeline.cli import command, quiet
from trainer.cluster import rendezvous
from trainer.runs import config_flag

_CONFIG = config_flag.define(
    None, "A Python file with get_config(), or the name of one of configs/, such as mnist."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory for checkpoints, metrics and the model; local or a URL."
)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace another run's state in workdir.")
_ON_CORRUPT = flags.DEFINE_enum(
    "on_corrupt",
    "fail",
    ["fail", "quarantine"],
    "If a shard is damaged: stop, or train without its unreadable records.",
)
_MAX_QUARANTINED = flags.DEFINE_string(
    "max_quarantined", "0.1%", "Maximum number (25) or share (0.1%) of unreadable records."
)
_CACHE_DIR = flags.DEFINE_string(
    "cache_dir",
    None,
    "Local directory that keeps the shards of a URL, so that a resumed run need not fetch the "
    "shards again.",
)
_JOIN_TIMEOUT_SECS = flags.DEFINE_integer(
    "join_timeout_secs",
    900,
    "Seconds that a worker of a cluster waits for the other workers before it ends with status 75.",
    lower_bound=1,
)
flags.mark_flags_as_required(["config", "workdir"])


def run(_: list[str]) -> None:
    """Trains as the flags say and prints the result."""
    # Before TensorFlow, which would wait for missing workers without handling signals.
    if _CONFIG.value.strategy == "multi_worker":
        rendezvous.meet(_CONFIG.value, timeout_secs=_JOIN_TIMEOUT_SECS.value)
    quiet.import_tensorflow()
    from pipeline.stages import quarantine
    from trainer.runs import train

    train.train(
        _CONFIG.value,
        workdir=_WORKDIR.value,
        overwrite=_OVERWRITE.value,
        on_corrupt=_ON_CORRUPT.value,
        max_quarantined=quarantine.parse_limit(_MAX_QUARANTINED.value),
        cache_dir=_CACHE_DIR.value,
    )


def main() -> None:
    """Entry point of `vae-train`."""
    command.run(run, name="train", doc=__doc__, module=__name__, beam=False)


if __name__ == "__main__":
    main()
