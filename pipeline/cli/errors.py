"""The errors that a command shows its user, each with its exit status.

Every message names the value, the expectation and the remedy. Any other exception is a defect of
the program and keeps its traceback.
"""

from pipeline.cli.signed_urls import without_secrets


def printable(text: str, keep: str = "") -> str:
    r"""A text for a terminal: control characters, which names may hold, as escapes like \x1b.

    Args:
      text: what to print.
      keep: characters that stay.
    """
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


class StageError(Exception):
    """A stage failed because of its inputs or the machine."""

    exit_status = 1

    def __init__(self, message: str):
        """Keeps the message, printable, with addresses in place of signed URLs."""
        super().__init__(printable(without_secrets(message), keep="\n"))


class SourceChanged(StageError):
    """The image set has changed since the job began."""


class UsageError(StageError):
    """The command or its configuration is wrong."""

    exit_status = 2


class Interrupted(StageError):
    """A signal stopped the stage; its state is saved, and the same command resumes."""

    exit_status = 75
