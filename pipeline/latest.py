"""Shows and moves the pointer to the newest export, and removes old exports.

    python -m pipeline.latest PATH                    prints the directory that PATH names
    python -m pipeline.latest PATH --to=DIR           moves PATH to another finished export
    python -m pipeline.latest PATH --keep=7 --of=DIR  removes old exports in DIR

Of the exports in DIR, sorted by name, the last KEEP good ones stay. Rejected and unfinished ones go
once a good one follows. What PATH and other pointers in DIR name stays, and so do exports that a
running job in DIR writes or takes rows from.
"""

from absl import flags

from pipeline.cli import command, metrics_file
from pipeline.cli.errors import StageError, UsageError

_TO = flags.DEFINE_string("to", None, "Finished export that PATH shall name.")
_KEEP = flags.DEFINE_integer(
    "keep", None, "Number of good exports that stay in the directory --of.", lower_bound=1
)
_OF = flags.DEFINE_string("of", None, "Directory whose subdirectories are exports.")
metrics_file.define_flag()


def run(arguments: list[str]) -> None:
    """Does what the flags say."""
    from pipeline.stages import pointer, retention

    if len(arguments) != 1:
        raise UsageError(
            f"{' '.join(arguments) or 'no path'}: expected one path, that of the pointer"
        )
    if (_KEEP.value is None) != (_OF.value is None):
        raise UsageError(
            f"--keep={_KEEP.value} --of={_OF.value}: expected both, such as --keep=7 --of=DIR"
        )
    path = arguments[0].rstrip("/") or arguments[0]
    seen = pointer.read(path)
    if _TO.value:
        pointer.move(path, _TO.value, seen=seen)
        seen = pointer.read(path)
    if seen is None:
        raise StageError(f"{path}: no such pointer; expected a path that export --latest has made")
    if _KEEP.value is not None:
        for directory in retention.remove_old(_OF.value, path, keep=_KEEP.value):
            print(f"latest: removed {directory}")
    print(seen.directory)


def main() -> None:
    """Entry point of `vae-latest`."""
    command.run(run, name="latest", doc=__doc__, module=__name__, arguments=True)


if __name__ == "__main__":
    main()
