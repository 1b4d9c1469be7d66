"""The one exception that the export scripts turn into a message instead of a traceback."""


class ExportError(ValueError):
    """A mistake of the user's: a missing or damaged file, an unknown architecture, a wrong tensor.

    Its message is one line that says what was wrong, the value, and what would be right. Files
    give parts of messages, so what is not printable is escaped. The command line prints the message
    and exits with status 2.
    """

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))
