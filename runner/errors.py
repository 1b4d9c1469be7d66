"""The one exception type that stands for a mistake of the user's."""


class RunnerError(ValueError):
    """A mistake of the user's: one line saying what was wrong, the value, and what would be right.

    The command line prints it and exits with status 2 and no traceback.
    """
