"""The flags that name an image set and its conversion."""

from absl import flags

from pipeline import sources
from pipeline.api import keywords, rules
from pipeline.cli import flag_parsing

_DEFAULTS = keywords.ImageSetKeywords()
flags.DEFINE_string(
    "source",
    None,
    f"The image set: {sources.FORMS}. sample is 10,000 MNIST digits, included in the package.",
)
flags.DEFINE_string(
    "name",
    _DEFAULTS.name,
    "Name of the data set; file names start with it. If not set, the name of what the output "
    "directory holds, else one after the source: mnist for idx:/data/mnist.",
)
flags.DEFINE_string(
    "num_shards",
    _DEFAULTS.num_shards,
    "Number of shards per split; 'auto' makes shards of 64 to 256 MiB.",
)
flags.DEFINE_float(
    "validation_fraction",
    _DEFAULTS.validation_fraction,
    "Share of train that moves to the split 'validation'; if not set, 0.1, but 0 for a source with "
    "a validation split of its own. An append takes the data set's share.",
)
flags.DEFINE_integer(
    "seed",
    _DEFAULTS.seed,
    "Seed for the order of the records.",
    lower_bound=0,
    upper_bound=2**63 - 1,
)
flags.DEFINE_string(
    "image_size", _DEFAULTS.image_size, "Scale all images to this size, HxW in pixels."
)
flags.DEFINE_bool("grayscale", _DEFAULTS.grayscale, "Convert RGB images to grayscale.")
flags.DEFINE_bool("rgb", _DEFAULTS.rgb, "Convert grey images to RGB.")
flags.DEFINE_string(
    "background",
    _DEFAULTS.background,
    "Colour behind transparent pixels of image files: white, black or #rrggbb. If not set, images "
    "with transparent pixels go to quarantine.",
)
flags.DEFINE_string(
    "pixel_range",
    _DEFAULTS.pixel_range,
    "LOW,HIGH: values of NumPy arrays that become 0 and 255; values between are scaled.",
)
flags.DEFINE_bool(
    "transpose",
    _DEFAULTS.transpose,
    "Swap rows and columns of every image; needed for EMNIST's files.",
)
flags.DEFINE_enum(
    "labels", _DEFAULTS.labels, rules.LABELS, "none ignores the labels of the source."
)
flags.DEFINE_integer(
    "class_level",
    _DEFAULTS.class_level,
    "Number of directories, below the split, whose names joined by / are the class of an image "
    "file. Needed where image files lie deeper than one directory.",
    lower_bound=1,
)
flags.DEFINE_string(
    "label_column",
    _DEFAULTS.label_column,
    "Column of a table that holds the labels: its name, first or last. If not set, a header "
    "decides, else the first column.",
)
flags.DEFINE_list(
    "class_names",
    _DEFAULTS.class_names,
    "Names of the classes 0, 1, …; replace the source's names. @DATA_DIR takes the names of a "
    "finished data set.",
)
flags.DEFINE_string(
    "id_prefix",
    _DEFAULTS.id_prefix,
    "Prefix for every id, so that --append does not take ids of another set as repeated.",
)
flags.DEFINE_string(
    "tfds_data_dir",
    _DEFAULTS.tfds_data_dir,
    "Directory of sets prepared by tensorflow-datasets; by default its own.",
)
flags.DEFINE_string(
    "tfds_manual_dir",
    _DEFAULTS.tfds_manual_dir,
    "Directory of original files, for tensorflow-datasets to use instead of a download.",
)
flags.DEFINE_bool(
    "allow_tfds_namespace",
    _DEFAULTS.allow_tfds_namespace,
    "Allow community sets, tfds:NAMESPACE:NAME, whose code tensorflow-datasets loads from "
    "elsewhere and runs.",
)
flags.DEFINE_bool(
    "allow_tiff",
    _DEFAULTS.allow_tiff,
    "Read TIFFs, of trusted origin: their decoder has a long list of security holes. If not set, "
    "TIFFs go to quarantine.",
)
flags.DEFINE_integer(
    "max_image_pixels",
    _DEFAULTS.max_image_pixels,
    "Maximum pixels (height times width) of an image file; larger ones are not decoded and go to "
    "quarantine.",
    lower_bound=1,
)
flag_parsing.refuse_values(__name__, rules.CHECKS)

# Subjects of these flags, for --help; every flag of this module needs one.
SUBJECTS = {
    "Image set": (
        "source",
        "tfds_data_dir",
        "tfds_manual_dir",
        "allow_tfds_namespace",
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
        "allow_tiff",
    ),
    "Splits, order and shards": ("name", "validation_fraction", "seed", "num_shards"),
}
