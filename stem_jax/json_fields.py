"""The values of JSON objects that other programs wrote, each taken as what it has to be."""

from collections.abc import Mapping
from typing import Any

from stem_jax.errors import InputError

# Counts and ids are int32 on the devices.
MOST = 2**31 - 1
_LARGEST = 1e300
_NEEDED = object()


class Fields:
    """An object of a JSON file. A key with the value null is a key that is not there.

    Methods return the value of a key, or `default` where it is not there; without a default it
    has to be. They raise InputError that names file, key and value if it is something else.
    """

    def __init__(self, value: Any, where: str, remedy: str):
        """Args:
        value: what the JSON reader gave.
        where, remedy: for messages: "config.json", "give the file that belongs to the model".

        Raises:
            InputError: it is no object.
        """
        self._where, self._remedy = where, remedy
        if not isinstance(value, dict):
            raise InputError(f"{where} is {_shown(value)}, expected an object; {remedy}")
        self._values = value

    @property
    def values(self) -> Mapping[str, Any]:
        """All of them, as they were read."""
        return self._values

    def has(self, key: str) -> bool:
        """Whether the key is there, with another value than null."""
        return self._values.get(key) is not None

    def integer(self, key: str, default: Any = _NEEDED, *, least: int = 0, most: int = MOST) -> int:
        """A whole number. 2.0 and true are none."""
        value = self._value(key, default)
        if value is default:
            return value
        if type(value) is not int:
            raise self._wrong(key, value, "a whole number")
        if not least <= value <= most:
            raise self._wrong(key, value, f"a number from {least} to {most}")
        return value

    def number(self, key: str, default: Any = _NEEDED) -> float:
        """A finite number, as a float."""
        value = self._value(key, default)
        if value is default:
            return value
        # NaN is not below anything, and large integers have no float.
        if type(value) not in (int, float) or not abs(value) < _LARGEST:
            raise self._wrong(key, value, "a number")
        return float(value)

    def boolean(self, key: str, default: Any = _NEEDED) -> bool:
        """true or false. Text such as "false" is neither."""
        value = self._value(key, default)
        if value is not default and type(value) is not bool:
            raise self._wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: Any = _NEEDED) -> str:
        """A text."""
        value = self._value(key, default)
        if value is not default and not isinstance(value, str):
            raise self._wrong(key, value, "a text")
        return value

    def integers(self, key: str, default: Any = _NEEDED, *, most: int = MOST) -> tuple[int, ...]:
        """A list of whole numbers of at least 0."""
        value = self._value(key, default)
        if value is default:
            return value
        fits = isinstance(value, list) and all(type(x) is int and 0 <= x <= most for x in value)
        if not fits:
            raise self._wrong(key, value, f"a list of whole numbers from 0 to {most}")
        return tuple(value)

    def inner(self, key: str, default: Any = _NEEDED) -> "Fields":
        """An object in this one; its messages name both."""
        return Fields(self._value(key, default), f"{self._where}: {key}", self._remedy)

    def _value(self, key: str, default: Any) -> Any:
        if self.has(key):
            return self._values[key]
        if default is _NEEDED:
            said = "null" if key in self._values else "missing"
            raise InputError(f"{self._where}: {key} is {said}; {self._remedy}")
        return default

    def _wrong(self, key: str, value: Any, expected: str) -> InputError:
        return InputError(
            f"{self._where}: {key} is {_shown(value)}, expected {expected}; {self._remedy}"
        )


def _shown(value: Any) -> str:
    """As JSON has it, cut short."""
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
