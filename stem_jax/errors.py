"""The one exception for input that we refuse."""


class InputError(ValueError):
    """A value the user gave cannot be used.

    The message is one line: the value, the field or file it came from, and the remedy. Entry
    points print it to stderr and exit with status 1.
    """


class TrainingError(RuntimeError):
    """A run cannot go on, for a reason found while it ran; the last checkpoint stands."""
