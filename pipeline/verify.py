"""Verifies a data set and prints every problem, with file and offset.

    python -m pipeline.verify DIR
    python -m pipeline.verify --absent=FILE DIR [DIR …]

Checks the sha256 of every file, the checksum and schema of every record, the counts, that ids are
unique and splits disjoint, and that every record is accounted for. Exit status 1 if there is a
problem.

With --absent it prints every file of data sets, exports and caches that still names or shows one
of the records in FILE. Exit status 1 if there is such a file.
"""

# This file holds only flags and printed messages; the work is in datasets/verification.py and
# embeddings/absence.

from absl import flags

from pipeline.cli import command
from pipeline.cli.errors import StageError, UsageError

_MAX_SHOWN = flags.DEFINE_integer(
    "max_shown", 100, "Maximum number of faults to print; all faults are counted.", lower_bound=1
)
_ABSENT = flags.DEFINE_string(
    "absent",
    None,
    "File with an id, or the sha256 of a record, in each line: prints every file that still names "
    "or shows one of these records.",
)


def run(arguments: list[str]) -> None:
    """Verifies the directory and prints its problems."""
    if _ABSENT.value is not None:
        _find_records(_ABSENT.value, arguments)
        return
    if len(arguments) != 1:
        raise UsageError(
            f"{len(arguments)} arguments; expected one directory: python -m pipeline.verify DIR"
        )
    from pipeline.datasets import verification

    manifest, problems = verification.verify(arguments[0])
    count, num_unfinished = 0, 0
    for problem in problems:
        count += 1
        num_unfinished += problem.is_unfinished_append
        if count <= _MAX_SHOWN.value:
            print(problem)
    records = manifest["records"]
    text = f"{records['written']:,} records, {len(manifest['files'])} files"
    if count:
        faults = "1 fault" if count == 1 else f"{count} faults"
        if count == num_unfinished:
            remedy = "finish the --append"
        elif num_unfinished or any(key.startswith("appended") for key in manifest["made_from"]):
            remedy = "create the data set again with --overwrite, and repeat its appends"
        else:
            remedy = "delete the files named above and run the preprocess command again"
        raise StageError(f"{arguments[0]}: {faults} in {text}; expected none: {remedy}")
    print(f"verify: whole: {text}, dataset_id {manifest['dataset_id']}, {arguments[0]}")


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
