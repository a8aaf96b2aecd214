"""Verifies a data set, a model directory or an export, and prints every problem.

    python -m pipeline.verify DIR
    python -m pipeline.verify --repair DIR
    python -m pipeline.verify --absent=FILE DIR [DIR …]

Checks the sha256 of every file that the manifest lists, and the id in the manifest. Of a data set:
the checksum and schema of every record, the counts, that ids are unique and splits disjoint, and
that every record is accounted for. Of an export: the rows and the counts of each shard, files in
embeddings/ that the manifest does not list, changes.parquet, and the report if there is one. Exit
status 1 if there is a problem. A problem has a file, and in TFRecord files an offset.

With --repair it first makes indexes, statistics and pages of a data set anew that are missing or
damaged. If records are lost, the data set goes back to what it was before its last append, and the
exit status is 1: append the source of the lost records again.

With --absent it prints every file of data sets, exports and caches that still names or shows one
of the records in FILE. Exit status 1 if there is such a file.
"""

# This file holds only flags and printed messages; the work is in datasets/verification.py,
# reports/verification.py, stages/verification.py and embeddings/absence.

from absl import flags

from pipeline.cli import command, metrics_file
from pipeline.cli.errors import StageError, UsageError

# Stage -> the key of its id in the manifest.
_IDS = {"preprocess": "dataset_id", "train": "model_id", "export": "export_id"}
_MAX_SHOWN = flags.DEFINE_integer(
    "max_shown", 100, "Maximum number of faults to print; all faults are counted.", lower_bound=1
)
_ABSENT = flags.DEFINE_string(
    "absent",
    None,
    "File with an id, or the sha256 of a record, in each line: prints every file that still names "
    "or shows one of these records.",
)
_REPAIR = flags.DEFINE_bool("repair", False, "Mend a data set from its own files first.")
metrics_file.define_flag()


def run(arguments: list[str]) -> None:
    """Verifies the directory and prints its problems."""
    if _ABSENT.value is not None and _REPAIR.value:
        raise UsageError("--absent --repair: contradict each other; set one of them")
    if _ABSENT.value is not None:
        _find_records(_ABSENT.value, arguments)
        return
    if len(arguments) != 1 or not arguments[0]:
        raise UsageError(
            f"{len(arguments)} arguments; expected one directory: python -m pipeline.verify DIR"
        )
    from pipeline.stages import pointer

    directory = pointer.resolve(arguments[0])
    lost = _repair(directory) if _REPAIR.value else ""
    manifest, problems = _verify(directory)
    count, num_unfinished = 0, 0
    for problem in problems:
        count += 1
        num_unfinished += problem.is_unfinished_append
        if count <= _MAX_SHOWN.value:
            print(problem)
    text = _contents(manifest)
    if count:
        faults = "1 fault" if count == 1 else f"{count} faults"
        remedy = _remedy(manifest, count, num_unfinished)
        raise StageError(f"{directory}: {faults} in {text}; expected none: {remedy}")
    rejected = ""
    if reasons := manifest.get("rejected"):
        rejected = f", rejected by --require ({', '.join(reasons)})"
    key = _IDS[manifest["stage"]]
    print(f"verify: whole: {text}, {key} {manifest[key]}, {directory}{rejected}")
    if lost:
        raise StageError(lost)


def _repair(directory: str) -> str:
    """Mends a data set; the message about records that are lost, if any."""
    from pipeline.cli import quiet

    quiet.import_beam()
    from pipeline.datasets.building import create, repair
    from pipeline.runners import options
    from pipeline.stages import contents

    output = create.output_directory(directory, {})
    done = repair.repair(output, options.parse_options([]))
    place = f"{directory}/{contents.LOST}"
    if done.set_aside:
        print(
            f"verify: moved {len(done.set_aside)} files that the manifest does not list, with "
            f"{done.num_set_aside:,} intact records, to {place}"
        )
    if not done.went_back:
        return ""
    return (
        f"--repair: {directory}: went back to the data set before its last append, dataset_id "
        f"{done.manifest['dataset_id']}; the records of that append are lost: append their source "
        f"again{f', and then remove {place}' if done.set_aside else ''}"
    )


def _verify(directory: str):
    """The manifest of a finished stage, and an iterator over its problems."""
    from pipeline.stages import manifest as manifest_lib
    from pipeline.stages import verification

    stage = manifest_lib.read_manifest(directory, None, "DIR")["stage"]
    if stage == "train":
        return verification.verify_model(directory)
    if stage == "export":
        from pipeline.reports import verification
    else:
        from pipeline.datasets import verification
    return verification.verify(directory)


def _contents(manifest: dict) -> str:
    """What a directory holds, in a few words."""
    num_files = f"{len(manifest['files'])} files"
    if manifest["stage"] == "train":
        return f"the model of step {manifest['step']:,}, {num_files}"
    records = "rows" if manifest["stage"] == "export" else "records"
    return f"{manifest['records']['written']:,} {records}, {num_files}"


def _remedy(manifest: dict, count: int, num_unfinished: int) -> str:
    """What to do about faults, of which some may be an unfinished append."""
    if manifest["stage"] == "train":
        return "run the training command again, which publishes the model again"
    if manifest["stage"] == "export":
        return (
            "run the export command again, unless a line says otherwise, or export into a new "
            "directory, which takes over intact rows"
        )
    if count == num_unfinished:
        return "finish the append or the removal"
    if num_unfinished or any(key.startswith("appended") for key in manifest["made_from"]):
        return (
            "append the source of lost records with --append --reread; --repair mends the rest, "
            "and goes back to the set before its last append where no source is left"
        )
    return "run the preprocess command again; --repair moves files away that are not listed"


def _find_records(path: str, directories: list[str]) -> None:
    """Prints every file that names or shows a record; raises a StageError if there is one."""
    if not directories:
        raise UsageError(
            f"--absent={path}: no directory; expected data sets, exports or caches: "
            "python -m pipeline.verify --absent=FILE DIR [DIR …]"
        )
    from pipeline.embeddings import absence

    wanted = absence.read(path)
    searches = [absence.Search(directory, wanted) for directory in directories]
    count = 0
    for search in searches:
        count_before = count
        for finding in search.findings():
            count += 1
            if count <= _MAX_SHOWN.value:
                print(finding)
        for model in search.models:
            print(f"{model}: is a model, whose weights are not looked into; train again")
        if count == count_before:
            where = f"{search.num_files:,} files of {search.directory}"
            print(f"verify: absent: none of {wanted} in {where}")
    if count:
        findings = "1 finding" if count == 1 else f"{count:,} findings"
        num_files = sum(search.num_files for search in searches)
        raise StageError(
            f"--absent={path}: {findings} in {num_files:,} files, {wanted}; expected none: remove "
            "the records from data sets with python -m pipeline.remove, make exports again or "
            "remove them, and delete other files"
        )


def main() -> None:
    """Entry point of `vae-verify`."""
    command.run(run, name="verify", doc=__doc__, module=__name__, arguments=True)


if __name__ == "__main__":
    main()
