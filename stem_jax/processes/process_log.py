"""What a run says: process 0 on the terminal, every process in a file of its own."""

import contextlib
import logging
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from stem_jax.errors import ToldToStop

FOLDER = "logs"
log = logging.getLogger("stem_jax")


def log_path(workdir: Path, process_index: int) -> Path:
    """The file of a process."""
    return workdir / FOLDER / f"process_{process_index:03d}.log"


@contextlib.contextmanager
def process_log(workdir: Path, process_index: int) -> Iterator[Path]:
    """Sends what `log` is told to the process's file, and that of process 0 to stdout as well.

    An error that leaves the context is written to the file.
    """
    path = log_path(workdir, process_index)
    path.parent.mkdir(exist_ok=True)
    file = _File(path)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handlers = [file, _Terminal()] if process_index == 0 else [file]
    for handler in handlers:
        log.addHandler(handler)
    level, propagate = log.level, log.propagate
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        _into_file(file, logging.INFO, f"process {process_index} on {socket.gethostname()}")
        yield path
    except ToldToStop as stop:
        _into_file(file, logging.INFO, f"told to stop {stop}; the same command continues")
        raise
    except BaseException as error:
        _into_file(file, logging.ERROR, f"{type(error).__name__}: {error}", error)
        raise
    finally:
        log.setLevel(level)
        log.propagate = propagate
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()


def _into_file(
    file: logging.FileHandler, level: int, text: str, error: BaseException | None = None
) -> None:
    info = None if error is None else (type(error), error, error.__traceback__)
    file.handle(logging.LogRecord(log.name, level, __file__, 0, text, None, info))


class _File(logging.FileHandler):
    """Where there is no room for a line, says that in one; what fills the disk ends the run."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            self._warn(error)
        else:
            super().handleError(record)

    def close(self) -> None:
        try:
            super().close()
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        print(f"warning: {self.baseFilename} lacks lines ({error.strerror})", file=sys.stderr)


class _Terminal(logging.Handler):
    """Writes plain lines above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record))
