"""The one exception that the export scripts turn into a message instead of a traceback."""

# Characters of a message.
LONGEST = 900


class ExportError(ValueError):
    """A mistake of the user's: a missing or damaged file, an unknown architecture, a wrong tensor.

    Its message is one line that says what was wrong, the value, and what would be right. Files
    give parts of messages, so what is not printable is escaped, and the middle of what is endless
    is left out. The command line prints the message and exits with status 2.
    """

    def __init__(self, message: str):
        message = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
        if len(message) > LONGEST:
            message = f"{message[: LONGEST // 2]} ... {message[-LONGEST // 4 :]}"
        super().__init__(message)
