"""What a request is told when it gets no answer: OpenAI's error form, in one line."""

from ee_scale.log import spelled

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
LONGEST = 400  # characters


class ApiError(Exception):
    """A request that is not answered, or not to its end.

    Attributes:
        status: of HTTP.
        param: the field at fault, if one is.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON that is sent."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        message = spelled(str(self))[:LONGEST]
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}
