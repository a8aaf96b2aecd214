"""Reads a data set back and names every fault, with file and offset.

    python -m pipeline.verify DIR

Checks the sha256 of every file, the checksums of every record, their schema and counts,
that ids are unique and splits disjoint, and that every record is accounted for. Exits with status 1
if there is a fault.
This file holds flags only; the checks are in datasets/verification.py.
"""

from absl import flags

from pipeline.cli import command
from pipeline.cli.errors import StageError, UsageError

_MAX_SHOWN = flags.DEFINE_integer(
    "max_shown", 100, "Faults to print; all are counted.", lower_bound=1
)


def run(arguments: list[str]) -> None:
    """Verifies the directory and prints its faults."""
    if len(arguments) != 1:
        raise UsageError(
            f"{len(arguments)} arguments; expected one directory: python -m pipeline.verify DIR"
        )
    from pipeline.datasets import verification

    manifest, faults = verification.verify(arguments[0])
    count, num_of_append = 0, 0
    for fault in faults:
        count += 1
        num_of_append += fault.of_append
        if count <= _MAX_SHOWN.value:
            print(fault)
    records = manifest["records"]
    text = f"{records['written']:,} records, {len(manifest['files'])} files"
    if count:
        faults = "1 fault" if count == 1 else f"{count} faults"
        if count == num_of_append:
            remedy = "finish the unfinished --append"
        elif num_of_append or any(key.startswith("appended") for key in manifest["made_from"]):
            remedy = "make the data set again with --overwrite, and repeat its appends"
        else:
            remedy = "delete the named files and run the preprocess command again"
        raise StageError(f"{arguments[0]}: {faults} in {text}; expected none: {remedy}")
    print(f"verify: whole: {text}, dataset_id {manifest['dataset_id']}, {arguments[0]}")


def main() -> None:
    """Entry point of `vae-verify`."""
    command.run(run, name="verify", doc=__doc__, module=__name__, arguments=True)


if __name__ == "__main__":
    main()
