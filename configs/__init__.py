"""Training configurations: each file's get_config() returns a locked ml_collections.ConfigDict."""

from collections.abc import Callable
from typing import Any

import ml_collections


def default() -> ml_collections.ConfigDict:
    """The reference config of mnist.py, unlocked: a config file may change some keys of it."""
    from configs import mnist  # Which imports this module.

    return mnist.get_config().unlock()


def parse_arguments(text: str | None, **kinds: Callable[[str], Any]) -> dict[str, Any]:
    """Parses the arguments after the colon of --config=FILE:name=value,name=value.

    Args:
      text: the text after the colon; None if there is no colon.
      **kinds: name -> function that parses the value.

    Returns:
      name -> value, for the names in `text`.

    Raises:
      ValueError: a name is unknown or repeated, or a value is malformed.
    """
    values = {}
    if not text:
        return values
    for argument in text.split(","):
        name, _, value = argument.partition("=")
        try:
            if name in values:
                raise ValueError(f"{name} is repeated")
            values[name] = kinds[name](value)
        except (KeyError, ValueError) as error:
            allowed = ", ".join(f"{name}={kind.__name__.upper()}" for name, kind in kinds.items())
            raise ValueError(
                f"--config=…:{text}: {argument!r} is not one of {allowed}; name each at most once, "
                "separated by commas"
            ) from error
    return values
