"""What can go wrong for a user, and the exit status of the command line for it."""


class InputError(ValueError):
    """The input was wrong: a flag, a config, a file. The message names the culprit, what was found and expected."""

    status = 2


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used, or the numbers diverged."""

    status = 3
