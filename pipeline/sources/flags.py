"""The flags by which a command names an image set and how to convert it."""

import re

from absl import flags

from pipeline import sources
from pipeline.cli.errors import UsageError

_SOURCE = flags.DEFINE_string(
    "source",
    None,
    "The image set: sample (10,000 MNIST digits, embedded), idx:DIR, npz:FILE, csv:FILE, "
    "folder:DIR, tfds:NAME[:VERSION], or your_module.your_function:REST.",
)
NAME = flags.DEFINE_string("name", "mnist", "Name of the data set; file names begin with it.")
NUM_SHARDS = flags.DEFINE_string(
    "num_shards", "auto", "Shards per split; 'auto' makes shards of 64 to 256 MiB."
)
VALIDATION_FRACTION = flags.DEFINE_float(
    "validation_fraction", 0.1, "Share of train that goes to the split 'validation'."
)
SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of the order of the records.", lower_bound=0, upper_bound=2**63 - 1
)
_IMAGE_SIZE = flags.DEFINE_string("image_size", None, "HxW: scale all images to this size.")
_GRAYSCALE = flags.DEFINE_bool("grayscale", False, "Make RGB images grey.")
_TRANSPOSE = flags.DEFINE_bool(
    "transpose", False, "Swap rows and columns of every image, as EMNIST's files need."
)
_CLASS_NAMES = flags.DEFINE_list(
    "class_names", None, "Names of the classes 0, 1, …, in place of the source's own."
)
_ID_PREFIX = flags.DEFINE_string(
    "id_prefix", "", "What to put before every id, so that --append takes a set's ids as new."
)
_TFDS_DATA_DIR = flags.DEFINE_string(
    "tfds_data_dir", None, "Where tensorflow-datasets keeps prepared sets; its default if left out."
)
_TFDS_MANUAL_DIR = flags.DEFINE_string(
    "tfds_manual_dir", None, "Where it finds original files that it would download otherwise."
)
_MAX_IMAGE_PIXELS = flags.DEFINE_integer(
    "max_image_pixels",
    sources.MAX_IMAGE_PIXELS,
    "Pixels (height times width) that an image file may have; a larger one is not decoded and "
    "goes to quarantine.",
    lower_bound=1,
)
flags.register_validator(
    "name",
    lambda name: name.isidentifier() and len(name.encode()) <= 100,  # Of 255 in a file name.
    message="expected at most 100 bytes of letters, digits and underscores, not a digit first",
)
flags.register_validator(
    "id_prefix",
    lambda text: text.isprintable() and len(text) <= 200,
    message="expected at most 200 printable characters",
)
flags.register_validator(
    "num_shards",
    lambda text: text == "auto" or (text.isdecimal() and 0 < int(text) <= 99_999),
    message="expected auto, or a number from 1 to 99999",
)
flags.register_validator(
    "image_size",
    lambda text: text is None or re.fullmatch(r"[1-9]\d{0,3}x[1-9]\d{0,3}", text),
    message="expected HxW in pixels, such as 28x28, at most 9999x9999",
)
flags.register_validator(
    "class_names",
    lambda names: (
        names is None
        or (
            names
            and all(names)
            and len(set(names)) == len(names)
            and all(map(str.isprintable, names))
        )
    ),
    message="expected printable names separated by commas, none of them empty or twice",
)


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    height, width = map(int, text.split("x"))
    return height, width


def refuse_without_source() -> None:
    """Raises a UsageError for a flag that says how to read a source where there is none."""
    if _SOURCE.value is not None:
        return
    for flag in flags.FLAGS.get_key_flags_for_module(__name__):
        if flag.present:
            raise UsageError(
                f"--{flag.name}={flag.value}: says how to read a --source, and a data set is as it "
                "was made; leave it out, or name a --source"
            )


def reading():
    """The reading (conversion.Reading) that the flags describe; None without --source."""
    from pipeline.sources import conversion

    if _SOURCE.value is None:
        return None
    return conversion.Reading(
        spec=_SOURCE.value,
        image_size=_size(_IMAGE_SIZE.value),
        grayscale=_GRAYSCALE.value,
        transpose=_TRANSPOSE.value,
        id_prefix=_ID_PREFIX.value,
        class_names=tuple(_CLASS_NAMES.value) if _CLASS_NAMES.value else None,
        tfds_data_dir=_TFDS_DATA_DIR.value,
        tfds_manual_dir=_TFDS_MANUAL_DIR.value,
        max_image_pixels=_MAX_IMAGE_PIXELS.value,
    )


def num_shards() -> int | None:
    """Shards per split; None to choose by size."""
    return None if NUM_SHARDS.value == "auto" else int(NUM_SHARDS.value)
