"""Turns an image set into TFRecord shards.

    python -m pipeline.preprocess --source=sample --output_dir=DIR
    python -m pipeline.preprocess --source=idx:DIR --output_dir=DIR [Beam options]

Flags that are not listed here go to Apache Beam (--runner, --direct_num_workers, …).
This file holds flags and nothing else; the job is in make_set.py.
"""

import re
import sys

from absl import flags

from pipeline import command

_SOURCE = flags.DEFINE_string(
    "source",
    None,
    "The image set: sample (10,000 MNIST digits, embedded), idx:DIR, npz:FILE, csv:FILE, "
    "folder:DIR, tfds:NAME[:VERSION], or your_module.your_function:REST.",
)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Directory to write; local or a URL.")
_NAME = flags.DEFINE_string("name", "mnist", "Name of the data set; shard files begin with it.")
_NUM_SHARDS = flags.DEFINE_string(
    "num_shards", "auto", "Shards per split; 'auto' makes shards of 64 to 256 MiB."
)
_VALIDATION_FRACTION = flags.DEFINE_float(
    "validation_fraction", 0.1, "Share of train that goes to the split 'validation'."
)
_SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of the order of the records.", lower_bound=0, upper_bound=2**63 - 1
)
_COMPRESSION = flags.DEFINE_enum(
    "compression", "none", ["none", "gzip"], "Packing of shard files; TFDS reads only 'none'."
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
_MAX_QUARANTINED = flags.DEFINE_string(
    "max_quarantined", "0.1%", "Bad records to put up with: a count (25) or a share (0.1%)."
)
_APPEND = flags.DEFINE_bool(
    "append", False, "Add the source's new records to the finished data set in output_dir."
)
_OVERWRITE = flags.DEFINE_bool(
    "overwrite",
    False,
    "Replace what another run of this command left in output_dir; with --append, undo an "
    "append that was not finished.",
)
flags.mark_flags_as_required(["source", "output_dir"])
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


def run(beam_args: list[str]) -> None:
    """Runs the job that the flags describe and prints what it made."""
    command.import_beam()
    from pipeline import append_set, beam_runner, convert, make_set, quarantine

    request = make_set.Request(
        reading=convert.Reading(
            spec=_SOURCE.value,
            image_size=_size(_IMAGE_SIZE.value),
            grayscale=_GRAYSCALE.value,
            transpose=_TRANSPOSE.value,
            id_prefix=_ID_PREFIX.value,
            class_names=tuple(_CLASS_NAMES.value) if _CLASS_NAMES.value else None,
            tfds_data_dir=_TFDS_DATA_DIR.value,
            tfds_manual_dir=_TFDS_MANUAL_DIR.value,
        ),
        settings=make_set.Settings(
            name=_NAME.value,
            num_shards=None if _NUM_SHARDS.value == "auto" else int(_NUM_SHARDS.value),
            validation_fraction=_VALIDATION_FRACTION.value,
            seed=_SEED.value,
            compression=_COMPRESSION.value,
        ),
        output_dir=_OUTPUT_DIR.value,
        max_quarantined=quarantine.parse_limit(_MAX_QUARANTINED.value),
        overwrite=_OVERWRITE.value,
        options=beam_runner.parse_options(beam_args),
    )
    make = append_set.append if _APPEND.value else make_set.make_set
    manifest = make(request)
    for warning in manifest["warnings"]:
        print(f"preprocess: warning: {warning}", file=sys.stderr)
    print(f"preprocess: {_account(manifest)}, {_OUTPUT_DIR.value}")


def _account(manifest: dict) -> str:
    """What became of every record, in a line."""
    splits = ", ".join(f"{split} {count:,}" for split, count in manifest["splits"].items())
    records = manifest["records"]
    done = "already finished" if manifest.get("reused") else "finished"
    if _APPEND.value and manifest.get("reused"):
        return f"nothing to append: all of it is there ({splits}), {_id(manifest)}"
    if _APPEND.value:
        done, records = "appended", manifest["last_append"]
    account = f"{records['read']:,} read = {records['written']:,} written"
    if records["quarantined"]:
        account += f" + {records['quarantined']:,} quarantined"
    if records.get("there"):
        account += f" + {records['there']:,} there before"
    return f"{done}: {account} ({splits}), {_id(manifest)}"


def _id(manifest: dict) -> str:
    return f"dataset_id {manifest['dataset_id']}"


def main() -> None:
    """Entry point of `vae-preprocess`."""
    command.run(run, name="preprocess", doc=__doc__, module=__name__, beam=True)


if __name__ == "__main__":
    main()
