"""What a request of the protocol can be answered with instead of text."""


class ApiError(Exception):
    """A refusal, in the shape that OpenAI's clients know.

    `param` is the field of the request that is to blame, `code` a word for programs.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None,
        headers: dict[str, str] | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        default = "server_error" if status >= 500 else "invalid_request_error"
        self.error = {
            "message": message, "type": kind.get(status, default), "param": param, "code": code,
        }  # fmt: skip

    def as_dict(self) -> dict:
        return {"error": self.error}
