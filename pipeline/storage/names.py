"""File names from outside: from listings, manifests, markers and archives.

A valid name is a path below its directory, with slashes. Any other name would make the program
read, write or remove a file elsewhere.
"""

from typing import Any

from pipeline.cli.errors import StageError

_MAX_PART_BYTES = 255  # Limit of a file name on nearly all file systems.
EXPECTED = "a path below the directory: none from the root, and no '..', '.' or empty part"


def is_below(name: Any) -> bool:
    """Whether a value names a file below a directory."""
    if not isinstance(name, str) or "\0" in name:
        return False
    try:
        if any(len(part.encode()) > _MAX_PART_BYTES for part in name.split("/")):
            return False
    except UnicodeEncodeError:  # JSON can hold half a character, a file name cannot.
        return False
    return not {"", ".", ".."} & {*name.split("/")}


def check(name: str, where: str, remedy: str) -> str:
    """Returns a name that lies below a directory.

    Args:
      name: the name from outside.
      where: the holder of the name; begins the message.
      remedy: what the user can do; ends the message.

    Raises:
      StageError: the name does not lie below a directory.
    """
    if not is_below(name):
        raise StageError(f"{where} {name!r}; expected {EXPECTED}: {remedy}")
    return name
