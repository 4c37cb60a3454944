"""Errors as OpenAI's API says them: a status and one JSON object that names the field."""

from typing import Any

_TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error"}
_TYPES |= {503: "server_error"}


class ApiError(Exception):
    """A request that is answered with an error.

    message: one line: the value, the field and the remedy. status: of HTTP. param: the field of the
    body, None where it is no field's fault. code: for programs. retry_after: seconds, None for
    never.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The object that is sent."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def headers(self) -> dict[str, str]:
        """What goes with it."""
        # Whole seconds, rounded up: HTTP has no others.
        if self.retry_after is None:
            return {}
        return {"Retry-After": str(max(1, -int(-self.retry_after // 1)))}
