"""What can go wrong for a user, and the exit status of the command line for it."""


class InputError(ValueError):
    """The input was wrong: a flag, a config, a file. The message names the culprit, what was found and expected."""

    status = 2


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used, or the numbers diverged."""

    status = 3


class BusyError(RuntimeError):
    """Another process is writing in the run's folder."""

    status = 4


class StorageError(RuntimeError):
    """The disk is full, or refuses what has to be written."""

    status = 5


ERRORS = (InputError, CheckpointError, BusyError, StorageError)
