"""The one exception that the export scripts turn into a message instead of a traceback."""


class ExportError(ValueError):
    """A mistake of the user's: a missing or damaged file, an unknown architecture, a wrong tensor.

    Its message is one line that says what was wrong, the value, and what would be right. The
    command line prints it and exits with status 2.
    """
