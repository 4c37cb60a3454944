"""What ends a program: input that is refused, a run that cannot go on, a wish to stop."""


class InputError(ValueError):
    """A value the user gave cannot be used.

    The message is one line: the value, the field or file it came from, and the remedy. Entry
    points print it to stderr and exit with status 1.
    """


class TrainingError(RuntimeError):
    """A run cannot go on, for a reason found while it ran; the last checkpoint stands."""


class DivergedError(TrainingError):
    """Loss or gradients stayed without finite values."""


class ToldToStop(BaseException):
    """SIGTERM came before the first step of a run. No failure, so that nothing takes it for one."""


class BadRecord(InputError):
    """One document among many that cannot be used; whoever reads them may leave it out.

    place: `file`, `file:line`, `file#row`, or "" where only the caller knows it.
    """

    def __init__(self, message: str, place: str = ""):
        super().__init__(message)
        self.place = place
