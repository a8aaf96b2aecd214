"""The errors a command shows its user, each with the exit status it ends in.

Every message says the value found, what was expected and what to do about it.
Anything that is not one of these is a defect of the program and keeps its
traceback.
"""


class StageError(Exception):
    """A stage cannot do what was asked: its inputs or the machine are at fault."""

    exit_status = 1


class SourceChanged(StageError):
    """The image set is not the one that the job began with."""


class UsageError(StageError):
    """The command or its configuration is wrong, whatever the inputs hold."""

    exit_status = 2


class Interrupted(StageError):
    """A signal stopped the stage; its state is saved and it is worth starting again."""

    exit_status = 75
