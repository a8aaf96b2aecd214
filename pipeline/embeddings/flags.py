"""Flags of export and report that name an image set, a model and a training run."""

from absl import flags

from pipeline.api import keywords, rules
from pipeline.cli import flag_parsing

_DEFAULTS = keywords.ExportKeywords()
flags.DEFINE_string(
    "data_dir", _DEFAULTS.data_dir, "Data set to read: output directory of pipeline.preprocess."
)
flags.DEFINE_list(
    "split",
    _DEFAULTS.split,
    "Splits to read, separated by commas, or all; if not set, test of a data set, and all of a "
    "--source.",
)
flags.DEFINE_string(
    "model_dir",
    _DEFAULTS.model_dir,
    "Model to run: the directory export/ in the trainer's workdir.",
)
flags.DEFINE_string(
    "run_dir",
    _DEFAULTS.run_dir,
    "The trainer's workdir, for loss curves; default: the parent directory of model_dir.",
)
flag_parsing.refuse_values(__name__, rules.CHECKS)
