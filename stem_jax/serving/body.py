"""The JSON body of a request: every field is asked for, and one that nobody asks for is refused."""

from collections.abc import Callable, Mapping
from typing import Any

from stem_jax.errors import InputError
from stem_jax.files import parse_json
from stem_jax.json_fields import Fields
from stem_jax.serving.api_error import ApiError

_REMEDY = "correct the request"


class Body:
    """The fields of a request. null is a field that is not there.

    Methods give the value of a field, or `default`; they raise ApiError that names the field.
    """

    def __init__(self, source: bytes):
        """Raises ApiError if it is no JSON object."""
        try:
            value = parse_json(source, "the body", "send a JSON object")
            self._fields = Fields(value, "the body", _REMEDY)
        except InputError as error:
            raise ApiError(str(error)) from error
        self._asked: set[str] = set()

    def integer(self, name: str, default: Any, least: int, most: int) -> Any:
        """A whole number between two, these included."""
        return self._ask(name, lambda: self._fields.integer(name, default, least=least, most=most))

    def number(self, name: str, default: Any) -> Any:
        """A finite number."""
        return self._ask(name, lambda: self._fields.number(name, default))

    def boolean(self, name: str) -> bool:
        """true or false; without the field, false."""
        return self._ask(name, lambda: self._fields.boolean(name, False))

    def text(self, name: str, default: Any = None) -> Any:
        """A text."""
        return self._ask(name, lambda: self._fields.text(name, default))

    def value(self, name: str) -> Any:
        """Whatever JSON has; None if the field is not there."""
        return self._ask(name, lambda: self._fields.values.get(name))

    def ignore(self, *names: str) -> None:
        """Fields that may be there and change nothing here."""
        self._asked |= set(names)

    def refuse(self, neutral: Mapping[str, tuple]) -> None:
        """Fields of which only the values that change nothing are taken.

        neutral: those of each field.
        """
        for name, values in neutral.items():
            found = self.value(name)
            # 1 == True in Python, and in no JSON.
            same = (found == value and type(found) is type(value) for value in values)
            if found is not None and not any(same):
                raise ApiError(
                    f"{name} is not supported by this server; leave it out",
                    param=name,
                    code="unsupported_parameter",
                )

    def nothing_else(self) -> None:
        """Raises ApiError for the first field that nobody asked for."""
        for name in self._fields.values:
            if name not in self._asked:
                raise ApiError(
                    f"{name[:80]} is no field of this request; leave it out",
                    param=name[:80],
                    code="unknown_parameter",
                )

    def _ask(self, name: str, read: Callable[[], Any]) -> Any:
        self._asked.add(name)
        try:
            return read()
        except InputError as error:
            raise ApiError(str(error), param=name) from error
