"""Verifies a data set and prints every problem, with file and offset.

    python -m pipeline.verify DIR

Checks the sha256 of every file, the checksum and schema of every record, the counts, that ids are
unique and splits disjoint, and that every record is accounted for. Exit status 1 if there is a
problem.
"""

# This file holds only flags and printed messages; the work is in datasets/verification.py.

from absl import flags

from pipeline.cli import command
from pipeline.cli.errors import StageError, UsageError

_MAX_SHOWN = flags.DEFINE_integer(
    "max_shown", 100, "Maximum number of faults to print; all faults are counted.", lower_bound=1
)


def run(arguments: list[str]) -> None:
    """Verifies the directory and prints its problems."""
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


def main() -> None:
    """Entry point of `vae-verify`."""
    command.run(run, name="verify", doc=__doc__, module=__name__, arguments=True)


if __name__ == "__main__":
    main()
