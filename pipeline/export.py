"""Writes the embeddings of a split, and contact sheets of its reconstructions.

    python -m pipeline.export --data_dir=DIR --model_dir=WORKDIR/export --output_dir=DIR

For each input shard: a Parquet file with a row for each record, and a PNG of originals
above their reconstructions. Flags that are not listed here go to Apache Beam.
This file holds flags and nothing else; the job is in embed_shards.py.
"""

from absl import flags

from pipeline import command

_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Data set to read: output directory of pipeline.preprocess."
)
_MODEL_DIR = flags.DEFINE_string(
    "model_dir", None, "Model to run: the directory export/ in the trainer's workdir."
)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Directory to write; local or a URL.")
_SPLIT = flags.DEFINE_string("split", "test", "Split of the data set to export.")
_OVERWRITE = flags.DEFINE_bool(
    "overwrite", False, "Replace what another run of this command left in output_dir."
)
_ON_CORRUPT = flags.DEFINE_enum(
    "on_corrupt",
    "fail",
    ["fail", "quarantine"],
    "Where a shard is damaged: stop, or export without the records that cannot be had.",
)
_MAX_QUARANTINED = flags.DEFINE_string(
    "max_quarantined", "0.1%", "Such records to put up with: a count (25) or a share (0.1%)."
)
flags.mark_flags_as_required(["data_dir", "model_dir", "output_dir"])


def run(beam_args: list[str]) -> None:
    """Runs the job that the flags describe and prints what it made."""
    command.import_beam()
    from pipeline import beam_runner, embed_shards, quarantine

    manifest = embed_shards.embed_shards(
        data_dir=_DATA_DIR.value,
        model_dir=_MODEL_DIR.value,
        output_dir=_OUTPUT_DIR.value,
        split=_SPLIT.value,
        overwrite=_OVERWRITE.value,
        on_corrupt=_ON_CORRUPT.value,
        max_quarantined=quarantine.parse_limit(_MAX_QUARANTINED.value),
        options=beam_runner.parse_options(beam_args),
    )
    reused = "already finished" if manifest.get("reused") else "finished"
    records = manifest["records"]
    bad = f" + {records['quarantined']:,} quarantined" if records["quarantined"] else ""
    print(
        f"export: {reused}: {records['read']:,} read = {records['written']:,} written{bad} "
        f"({len(manifest['files'])} files), export_id {manifest['export_id']}, {_OUTPUT_DIR.value}"
    )


def main() -> None:
    """Entry point of `vae-export`."""
    command.run(run, name="export", doc=__doc__, module=__name__, beam=True)


if __name__ == "__main__":
    main()
