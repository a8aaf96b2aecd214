"""Names of files as they come from outside: in listings, manifests, markers and archives.

Such a name is a path below the directory that it stands for, with slashes. Any other would be
read, written or removed somewhere else.
"""

from typing import Any

from pipeline.cli.errors import StageError

_MAX_PART_BYTES = 255  # Of a file's name, on nearly all file systems.
EXPECTED = "a path below the directory: none from the root, and no '..', '.' or empty part"


def is_below(name: Any) -> bool:
    """Whether a value names a file below a directory."""
    if not isinstance(name, str) or "\0" in name:
        return False
    try:
        if any(len(part.encode()) > _MAX_PART_BYTES for part in name.split("/")):
            return False
    except UnicodeEncodeError:  # JSON can write half a character, and no file is called so.
        return False
    return not {"", ".", ".."} & {*name.split("/")}


def check(name: str, where: str, remedy: str) -> str:
    """Gives a name back, if it is of a file below a directory.

    Args:
      name: as it was found.
      where: what holds the name, as the beginning of a message.
      remedy: what its user can do.

    Raises:
      StageError: it is none.
    """
    if not is_below(name):
        raise StageError(f"{where} {name!r}; expected {EXPECTED}: {remedy}")
    return name
