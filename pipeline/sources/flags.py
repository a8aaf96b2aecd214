"""The flags that name an image set and its conversion."""

import functools
import re

from absl import flags

from pipeline import sources
from pipeline.cli.errors import StageError, UsageError

_SOURCE = flags.DEFINE_string(
    "source",
    None,
    f"The image set: {sources.FORMS}. sample is 10,000 MNIST digits, included in the package.",
)
NAME = flags.DEFINE_string(
    "name",
    None,
    "Name of the data set; file names start with it. If not set, the name of what the output "
    "directory holds, else one after the source: mnist for idx:/data/mnist.",
)
NUM_SHARDS = flags.DEFINE_string(
    "num_shards", "auto", "Number of shards per split; 'auto' makes shards of 64 to 256 MiB."
)
VALIDATION_FRACTION = flags.DEFINE_float(
    "validation_fraction",
    None,
    "Share of train that moves to the split 'validation'; if not set, 0.1, but 0 for a source with "
    "a validation split of its own. An append takes the data set's share.",
)
SEED = flags.DEFINE_integer(
    "seed", 0, "Seed for the order of the records.", lower_bound=0, upper_bound=2**63 - 1
)
_IMAGE_SIZE = flags.DEFINE_string(
    "image_size", None, "Scale all images to this size, HxW in pixels."
)
_GRAYSCALE = flags.DEFINE_bool("grayscale", False, "Convert RGB images to grayscale.")
_RGB = flags.DEFINE_bool("rgb", False, "Convert grey images to RGB.")
_BACKGROUND = flags.DEFINE_string(
    "background",
    None,
    "Colour behind transparent pixels of image files: white, black or #rrggbb. If not set, images "
    "with transparent pixels go to quarantine.",
)
_PIXEL_RANGE = flags.DEFINE_string(
    "pixel_range",
    None,
    "LOW,HIGH: values of NumPy arrays that become 0 and 255; values between are scaled.",
)
_TRANSPOSE = flags.DEFINE_bool(
    "transpose", False, "Swap rows and columns of every image; needed for EMNIST's files."
)
_LABELS = flags.DEFINE_enum(
    "labels", "auto", ("auto", "none"), "none ignores the labels of the source."
)
_CLASS_LEVEL = flags.DEFINE_integer(
    "class_level",
    None,
    "Number of directories, below the split, whose names joined by / are the class of an image "
    "file. Needed where image files lie deeper than one directory.",
    lower_bound=1,
)
_LABEL_COLUMN = flags.DEFINE_string(
    "label_column",
    None,
    "Column of a table that holds the labels: its name, first or last. If not set, a header "
    "decides, else the first column.",
)
_CLASS_NAMES = flags.DEFINE_list(
    "class_names",
    None,
    "Names of the classes 0, 1, …; replace the source's names. @DATA_DIR takes the names of a "
    "finished data set.",
)
_ID_PREFIX = flags.DEFINE_string(
    "id_prefix",
    "",
    "Prefix for every id, so that --append does not take ids of another set as repeated.",
)
_TFDS_DATA_DIR = flags.DEFINE_string(
    "tfds_data_dir", None, "Directory of sets prepared by tensorflow-datasets; by default its own."
)
_TFDS_MANUAL_DIR = flags.DEFINE_string(
    "tfds_manual_dir",
    None,
    "Directory of original files, for tensorflow-datasets to use instead of a download.",
)
_MAX_IMAGE_PIXELS = flags.DEFINE_integer(
    "max_image_pixels",
    sources.MAX_IMAGE_PIXELS,
    "Maximum pixels (height times width) of an image file; larger ones are not decoded and go to "
    "quarantine.",
    lower_bound=1,
)
flags.register_validator(
    "name",
    lambda name: name is None or (name.isidentifier() and len(name.encode()) <= 100),
    message="expected at most 100 bytes of letters, digits and underscores, the first not a digit",
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
    message="expected HxW in pixels, such as 28x28, up to 9999x9999",
)
flags.register_validator(
    "background",
    lambda text: text is None or re.fullmatch(r"white|black|#[0-9a-fA-F]{6}", text),
    message="expected white, black or #rrggbb in hexadecimal digits, such as #ff8000",
)
_DECIMAL = r"-?\d+(?:\.\d+)?(?:e[-+]?\d\d?)?"
flags.register_validator(
    "pixel_range",
    lambda text: (
        text is None
        or (
            re.fullmatch(f"{_DECIMAL},{_DECIMAL}", text)
            and float(text.split(",")[0]) < float(text.split(",")[1])
        )
    ),
    message="expected LOW,HIGH, two numbers with LOW < HIGH, such as 0,1 or -1,1",
)


def _is_data_set(names: list[str]) -> bool:
    """Whether a value of --class_names is @DATA_DIR."""
    return len(names) == 1 and len(names[0]) > 1 and names[0].startswith("@")


flags.register_validator(
    "class_names",
    lambda names: (
        names is None
        or _is_data_set(names)
        or (
            names
            and all(names)
            and len(set(names)) == len(names)
            and all(map(str.isprintable, names))
            and not any(name.startswith("@") for name in names)
        )
    ),
    message="expected printable, distinct, non-empty names separated by commas, none of them with "
    "@ at its start; or @DATA_DIR alone",
)


# Subjects of these flags, for --help; every flag of this module needs one.
SUBJECTS = {
    "Image set": (
        "source",
        "tfds_data_dir",
        "tfds_manual_dir",
        "class_names",
        "id_prefix",
        "labels",
        "label_column",
        "class_level",
    ),
    "Conversion of images": (
        "image_size",
        "grayscale",
        "rgb",
        "transpose",
        "background",
        "pixel_range",
        "max_image_pixels",
    ),
    "Splits, order and shards": ("name", "validation_fraction", "seed", "num_shards"),
}


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    height, width = map(int, text.split("x"))
    return height, width


def _colour(text: str | None) -> str | None:
    """A colour as #rrggbb."""
    return {"white": "#ffffff", "black": "#000000"}.get(text, text.lower()) if text else None


def _range(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    low, high = map(float, text.split(","))
    return low, high


def _class_names() -> tuple[str, ...] | None:
    """Raises a StageError if @DATA_DIR is no data set with classes."""
    names = _CLASS_NAMES.value
    if not names:
        return None
    return _names_in(names[0][1:]) if _is_data_set(names) else tuple(names)


@functools.cache  # All parts of a command get one list, also if the set grows meanwhile.
def _names_in(data_dir: str) -> tuple[str, ...]:
    from pipeline.stages import manifest as manifest_lib

    manifest = manifest_lib.read_manifest(data_dir, "preprocess", "--class_names")
    if not manifest["class_names"]:
        raise StageError(
            f"--class_names=@{data_dir}: the data set has no classes; expected a labelled one: "
            "name another data set, or the classes"
        )
    return tuple(manifest["class_names"])


def refuse_without_source() -> None:
    """Raises a UsageError for a flag of this module that is set without --source."""
    if _SOURCE.value is not None:
        return
    for flag in flags.FLAGS.get_key_flags_for_module(__name__):
        if flag.present:
            raise UsageError(
                f"--{flag.name}={flag.value}: applies to a --source only, not to a finished data "
                "set; remove the flag, or name a --source"
            )


def source_spec():
    """The conversion.SourceSpec that the flags describe; None without --source."""
    from pipeline.sources import conversion

    if _SOURCE.value is None:
        return None
    if _GRAYSCALE.value and _RGB.value:
        raise UsageError("--grayscale --rgb: contradict each other; set one of them")
    if _LABELS.value == "none" and _CLASS_NAMES.value:
        raise UsageError(
            "--labels=none --class_names: no class is left to be named; remove one of them"
        )
    return conversion.SourceSpec(
        source=_SOURCE.value,
        image_size=_size(_IMAGE_SIZE.value),
        grayscale=_GRAYSCALE.value,
        rgb=_RGB.value,
        transpose=_TRANSPOSE.value,
        id_prefix=_ID_PREFIX.value,
        class_names=_class_names(),
        tfds_data_dir=_TFDS_DATA_DIR.value,
        tfds_manual_dir=_TFDS_MANUAL_DIR.value,
        max_image_pixels=_MAX_IMAGE_PIXELS.value,
        labels=_LABELS.value,
        label_column=_LABEL_COLUMN.value,
        class_level=_CLASS_LEVEL.value,
        background=_colour(_BACKGROUND.value),
        pixel_range=_range(_PIXEL_RANGE.value),
    )


def num_shards() -> int | None:
    """Shards per split; None to choose by size."""
    return None if NUM_SHARDS.value == "auto" else int(NUM_SHARDS.value)
