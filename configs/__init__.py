"""Training configurations: each file's get_config() returns a locked ml_collections.ConfigDict."""

from collections.abc import Callable
from typing import Any


def parse_arguments(text: str | None, **kinds: Callable[[str], Any]) -> dict[str, Any]:
    """Reads what stands after the colon of --config=FILE:name=value,name=value.

    Args:
      text: what stands after the colon; None if there is no colon.
      **kinds: name -> how to read its value.

    Returns:
      name -> value, for the names that are there.

    Raises:
      ValueError: a name that is not known, or a value that cannot be read.
    """
    given = {}
    for part in (text or "").split(",") if text else []:
        name, _, value = part.partition("=")
        try:
            if name in given:
                raise ValueError(f"{name} stands twice")
            given[name] = kinds[name](value)
        except (KeyError, ValueError) as error:
            known = ", ".join(f"{name}={kind.__name__.upper()}" for name, kind in kinds.items())
            raise ValueError(
                f"--config=…:{text}: {part!r} is none of {known}; separate them by commas"
            ) from error
    return given
