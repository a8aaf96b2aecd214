"""Removes records from a data set for good.

    python -m pipeline.remove --data_dir=DIR --ids=FILE

FILE has an id a line. The shards with these records are written again without them, under new
names, and the data set gets a new dataset_id. The ids are barred: no later append brings them back.
Exports, caches, sources and models that were made before stay; docs/preprocess.md says what to do
with them.
"""

# This file holds only flags and printed messages; the job is in datasets/building/removal.py.

import sys

from absl import flags

from pipeline.cli import command, metrics_file, quiet
from pipeline.cli.errors import StageError, UsageError

_DATA_DIR = flags.DEFINE_string("data_dir", None, "A finished data set; local or a URL.")
_IDS = flags.DEFINE_string("ids", None, "File with an id a line.")
_ALSO = flags.DEFINE_list(
    "also", [], "Exports, directories of exports and caches: their files with these ids are named."
)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Undo an unfinished append or removal first.")
metrics_file.define_flag()
flags.mark_flags_as_required(["data_dir", "ids"])


def run(beam_args: list[str]) -> None:
    """Removes the records and prints what is left to do."""
    quiet.import_beam()
    from pipeline.datasets.building import removal
    from pipeline.embeddings import absence
    from pipeline.runners import cluster
    from pipeline.runners import options as beam_options

    options = beam_options.parse_options(beam_args)
    cluster.check_paths(options, data_dir=_DATA_DIR.value)
    wanted = absence.read(_IDS.value, "--ids")
    if not wanted.ids:
        raise UsageError(f"--ids={_IDS.value}: holds no id; expected an id a line")
    manifest = removal.remove_records(
        _DATA_DIR.value, sorted(wanted.ids), overwrite=_OVERWRITE.value, options=options
    )
    removed = f"{manifest['num_removed']:,} records removed"
    if manifest["reused"]:
        removed = "nothing to remove: an earlier run has removed these records"
    print(
        f"remove: {removed}, {len(wanted.ids):,} ids barred, "
        f"dataset_id {manifest['dataset_id']}, {_DATA_DIR.value}"
    )
    if unknown := manifest["unknown"]:
        print(
            f"remove: warning: {len(unknown):,} of the ids are in neither the data set nor its "
            f"quarantine, such as {unknown[0]!r}; they are barred",
            file=sys.stderr,
        )
    num_findings = 0
    for directory in (_DATA_DIR.value, *_ALSO.value):
        for finding in absence.find(directory, wanted):
            num_findings += 1
            print(f"remove: still there: {finding}")
    print(
        "remove: weights of models that were trained on these records are not unlearned",
        file=sys.stderr,
    )
    if num_findings:
        raise StageError(
            f"{num_findings:,} files still name a removed record; expected none: remove them, or "
            "make them again"
        )


def main() -> None:
    """Entry point of `vae-remove`."""
    command.run(run, name="remove", doc=__doc__, module=__name__, beam=True)


if __name__ == "__main__":
    main()
