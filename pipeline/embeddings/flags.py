"""Flags of export and report that name an image set, a model and a training run."""

import dataclasses
from collections.abc import Sequence

from absl import flags

from pipeline.cli.errors import UsageError
from pipeline.sources import flags as source_flags

_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Data set to read: output directory of pipeline.preprocess."
)
_ALL = "all"  # In place of names of splits.
_SPLIT = flags.DEFINE_list(
    "split",
    None,
    "Splits to read, separated by commas, or all; if not set, test of a data set, and all of a "
    "--source.",
)
MODEL_DIR = flags.DEFINE_string(
    "model_dir", None, "Model to run: the directory export/ in the trainer's workdir."
)
RUN_DIR = flags.DEFINE_string(
    "run_dir",
    None,
    "The trainer's workdir, for loss curves; default: the parent directory of model_dir.",
)
flags.register_validator(
    "split",
    lambda splits: splits in (None, [_ALL]) or (splits and {_ALL, ""}.isdisjoint(splits)),
    message="expected names of splits separated by commas, such as train,test, or all",
)


def is_source() -> bool:
    """Whether the images come from a source and not from the shards of a data set."""
    return source_flags.source_spec() is not None


def names_images() -> bool:
    """Whether the flags name an image set."""
    return is_source() or _DATA_DIR.value is not None


def paths() -> dict[str, str | None]:
    """Flag -> path of every input."""
    source_spec = source_flags.source_spec()
    return {
        "source": source_spec and source_spec.source,
        "data_dir": _DATA_DIR.value,
        "model_dir": MODEL_DIR.value,
    }


def image_set(on_corrupt: str, exports: Sequence[str] = ()):
    """The image set (inputs.Input) that the flags name.

    Args:
      on_corrupt: what to do if a shard is damaged, see reader.Dataset.
      exports: directories; without --name, the first that holds an export says the name of a
        source's set.

    Raises:
      UsageError: the flags name no image set, or two.
      StageError: the image set cannot be read, or a source's model has no manifest.
    """
    from pipeline.datasets import naming
    from pipeline.datasets.building import create as create_set
    from pipeline.embeddings import inputs
    from pipeline.stages import manifest as manifest_lib

    source_spec = source_flags.source_spec()
    if (source_spec is None) == (_DATA_DIR.value is None):
        raise UsageError(
            f"--data_dir={_DATA_DIR.value} --source={source_spec and source_spec.source}: expected "
            "one of the two: a data set that pipeline.preprocess made, or a source of images"
        )
    if source_spec is None:
        source_flags.refuse_without_source()
        splits = None if _SPLIT.value == [_ALL] else _SPLIT.value or ["test"]
        return inputs.ShardsInput(_DATA_DIR.value, splits, on_corrupt)
    if MODEL_DIR.value is not None:
        model = manifest_lib.read_manifest(MODEL_DIR.value, "train", "--model_dir")
        names = tuple(model.get("class_names", ()))
        source_spec = dataclasses.replace(source_spec, model_class_names=names)
    name = source_flags.NAME.value
    for directory in exports:
        name = name or naming.existing_name(directory)
    settings = create_set.Settings(
        name=name,
        num_shards=source_flags.num_shards(),
        validation_fraction=source_flags.VALIDATION_FRACTION.value,
        seed=source_flags.SEED.value,
        compression="none",
    )
    splits = None if _SPLIT.value == [_ALL] else _SPLIT.value
    return inputs.SourceInput(source_spec, settings, splits)
