"""Work that goes on beside the program's own, and that nobody waits for when the program ends.

Python itself cannot end then: a thread that comes back from compiled code while the interpreter
goes down aborts the process. `leave` ends it before that.
"""

import atexit
import concurrent.futures
import os
import sys
import threading
from collections.abc import Callable

_under_way: set[threading.Thread] = set()


def begin(work: Callable[[], object], name: str) -> concurrent.futures.Future:
    """Calls `work` on a thread of its own; the result has what it returns, or raises."""
    result: concurrent.futures.Future = concurrent.futures.Future()

    def run():
        try:
            try:
                found = work()
            finally:
                _under_way.discard(threading.current_thread())
        except BaseException as error:
            result.set_exception(error)
        else:
            result.set_result(found)

    # Python waits for threads that are not daemons.
    thread = threading.Thread(target=run, name=name, daemon=True)
    _under_way.add(thread)
    thread.start()
    return result


def under_way() -> bool:
    """Whether some of it is."""
    return bool(_under_way)


def leave(error: BaseException | None) -> None:
    """Ends the process as Python would, at the end of a program or by what it raised.

    What is registered for the exit is done; what is under way is left as it is.
    """
    status = 0
    if isinstance(error, SystemExit):
        code = error.code
        status = code if isinstance(code, int) else 0
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            status = 1
    elif error is not None:
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            # Nobody reads it any more.
            continue
    os._exit(status)
