"""Turns an image set into TFRecord shards.

    python -m pipeline.preprocess --source=sample --output_dir=DIR
    python -m pipeline.preprocess --source=idx:DIR --output_dir=DIR [Beam options]

Flags that are not listed here go to Apache Beam (--runner, --direct_num_workers, …).
This file holds flags and nothing else; the job is in write_shards.py.
"""

from absl import flags

from pipeline import command

_SOURCE = flags.DEFINE_string(
    "source", None, "The image set: 'sample' (10,000 MNIST digits, embedded), or 'idx:DIR'."
)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Directory to write; local or a URL.")
_NAME = flags.DEFINE_string("name", "mnist", "Name of the data set; shard files begin with it.")
_NUM_SHARDS = flags.DEFINE_integer("num_shards", 16, "Shards per split.", lower_bound=1)
_VALIDATION_FRACTION = flags.DEFINE_float(
    "validation_fraction", 0.1, "Share of train that goes to the split 'validation'."
)
_SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of the order of the records.", lower_bound=0, upper_bound=2**63 - 1
)
_OVERWRITE = flags.DEFINE_bool(
    "overwrite", False, "Replace what another run of this command left in output_dir."
)
flags.mark_flags_as_required(["source", "output_dir"])
flags.register_validator(
    "name",
    lambda name: name.isidentifier() and len(name) <= 100,  # File systems allow 255 bytes.
    message="expected at most 100 letters, digits and underscores, not beginning with a digit",
)


def run(beam_args: list[str]) -> None:
    """Runs the job that the flags describe and prints what it made."""
    command.import_beam()
    from pipeline import beam_runner, write_shards

    manifest = write_shards.write_shards(
        spec=_SOURCE.value,
        output_dir=_OUTPUT_DIR.value,
        name=_NAME.value,
        num_shards=_NUM_SHARDS.value,
        validation_fraction=_VALIDATION_FRACTION.value,
        seed=_SEED.value,
        overwrite=_OVERWRITE.value,
        options=beam_runner.parse_options(beam_args),
    )
    reused = "already finished" if manifest.get("reused") else "finished"
    splits = ", ".join(f"{split} {count:,}" for split, count in manifest["splits"].items())
    records = manifest["records"]
    print(
        f"preprocess: {reused}: {records['read']:,} read = {records['written']:,} written "
        f"({splits}), dataset_id {manifest['dataset_id']}, {_OUTPUT_DIR.value}"
    )


def main() -> None:
    """Entry point of `vae-preprocess`."""
    command.run(run, name="preprocess", doc=__doc__, module=__name__, beam=True)


if __name__ == "__main__":
    main()
