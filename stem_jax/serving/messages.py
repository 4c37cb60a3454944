"""The messages of a chat request, as templates take them."""

from typing import Any

from stem_jax.serving.api_error import ApiError

ROLES = ("system", "developer", "user", "assistant")
# Beside role and content they may be there with nothing in them, as clients send back what came.
_EMPTY = ("refusal", "tool_calls", "function_call", "annotations", "audio", "name")


def read_messages(given: Any) -> list[dict[str, str]]:
    """Messages of a role and a text each.

    Raises:
        ApiError: no list, a role that is unknown, or content that is no text.
    """
    if not isinstance(given, list) or not given:
        raise ApiError("messages must be a list of one or more", param="messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(given)]


def _message(given: Any, where: str) -> dict[str, str]:
    if not isinstance(given, dict):
        raise ApiError(f"{where} must be an object of role and content", param=where)
    role = given.get("role")
    if role not in ROLES:
        shown = repr(role)[:80]
        raise ApiError(
            f"{where}.role is {shown}, this server takes {', '.join(ROLES)}", param=f"{where}.role"
        )
    for name, value in given.items():
        if name not in ("role", "content") and not (name in _EMPTY and not value):
            raise ApiError(
                f"{where}.{name[:80]} is not supported by this server; leave it out",
                param=f"{where}.{name[:80]}",
                code="unsupported_parameter",
            )
    return {"role": role, "content": _content(given.get("content"), f"{where}.content")}


def _content(given: Any, where: str) -> str:
    """A text, or texts in parts."""
    if isinstance(given, str):
        return given
    if not isinstance(given, list) or not given:
        raise ApiError(f"{where} must be a text, or a list of parts of type text", param=where)
    for index, part in enumerate(given):
        fits = isinstance(part, dict) and part.get("type") == "text"
        if not (fits and isinstance(part.get("text"), str)):
            raise ApiError(
                f"{where}[{index}] must be of type text; this server takes no other",
                param=f"{where}[{index}]",
            )
    return "".join(part["text"] for part in given)
