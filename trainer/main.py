"""Trains a variational autoencoder on a data set and publishes the model.

    python -m trainer.main --config=configs/mnist.py --config.data_dir=DIR --workdir=DIR

--config=NAME stands for configs/NAME.py of the installed package. Set any key of the config as
--config.KEY=VALUE; the config files explain the keys. Run the same command again to resume after an
interruption.
"""

# This file only defines flags; api.py begins the run.

import inspect

from absl import flags

from pipeline.cli import command, flag_parsing, metrics_file
from trainer import api
from trainer.cluster import tf_config
from trainer.runs import config_flag

_DEFAULTS = inspect.getfullargspec(api.train).kwonlydefaults
_CONFIG = config_flag.define(
    None, "A Python file with get_config(), or the name of one of configs/, such as mnist."
)
flags.DEFINE_string(
    "workdir", None, "Directory for checkpoints, metrics and the model; local or a URL."
)
flags.DEFINE_bool("overwrite", _DEFAULTS["overwrite"], "Replace another run's state in workdir.")
flags.DEFINE_enum(
    "on_corrupt",
    _DEFAULTS["on_corrupt"],
    ["fail", "quarantine"],
    "If a shard is damaged: stop, or train without its unreadable records.",
)
flags.DEFINE_string(
    "max_quarantined",
    _DEFAULTS["max_quarantined"],
    "Maximum number (25) or share (0.1%) of unreadable records.",
)
flags.DEFINE_string(
    "cache_dir",
    _DEFAULTS["cache_dir"],
    "Local directory that keeps the shards of a URL, so that a resumed run need not fetch the "
    "shards again.",
)
flags.DEFINE_integer(
    "join_timeout_secs",
    _DEFAULTS["join_timeout_secs"],
    "Seconds that a worker of a cluster waits for the other workers before it ends with status 75.",
    lower_bound=1,
)
metrics_file.define_flag()
flags.mark_flags_as_required(["config", "workdir"])


def run(_: list[str]) -> None:
    """Trains as the flags say; the result is printed."""
    if _CONFIG.value.strategy == "multi_worker" and tf_config.read().index:
        metrics_file.disable()  # Only the chief of a cluster writes.
    api.train(**flag_parsing.values_of(__name__))


def main() -> None:
    """Entry point of `vae-train`."""
    command.run(run, name="train", doc=__doc__, module=__name__, beam=False)


if __name__ == "__main__":
    main()
