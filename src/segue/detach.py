"""`segue run --detach`: the caller returns when the guest runs, the supervisor goes on by itself.

Two processes, and at any moment one of them answers for the machine: until the guest runs, the
caller. What is sent to it meanwhile (SIGNALS) is passed on to the supervisor,
whose end it waits for; if it is killed outright, the supervisor finds nobody to tell that the
guest runs, and ends the machine. A signal that came as the guest began to run has the same effect.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable

from segue.errors import SegueError

# Those that end a QEMU, Ctrl-\ (SIGQUIT) too: it must not be left behind by one.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def detached(supervise: Callable[[Callable[[], None]], int]) -> int:
    """Have a child `supervise(ready)`; return 0 once it has called `ready`, else its exit status.

    Until then the child has the user's stderr, so an error is seen as in the foreground. Its
    stdin and stdout are /dev/null: the terminal is the caller's, `segue console` is for the guest.
    """
    read_end, write_end = os.pipe()
    # Nothing is to come before there is somebody to pass it on to; the child unblocks them when
    # it can handle them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)

        def ready() -> None:
            try:
                os.write(write_end, b"1")
            except BrokenPipeError:
                raise SegueError("nobody waits for the machine any more") from None
            os.close(write_end)
            os.dup2(null, 2)
            os.close(null)

        return supervise(ready)
    os.close(write_end)
    return _wait(pid, read_end, before)


def _wait(pid: int, read_end: int, mask: set[int | signal.Signals]) -> int:
    received: list[int] = []

    def pass_on(number: int, _: object) -> None:
        received.append(number)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    handlers = [(number, signal.signal(number, pass_on)) for number in SIGNALS]
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    with os.fdopen(read_end, "rb", buffering=0) as pipe:
        runs = pipe.read(1)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    if runs and not received:
        # They stay blocked: the work is done, and is not to look as if it had not been.
        return 0
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    for number, handler in handlers:
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if received:
        return 128 + received[0]
    return status if status >= 0 else 128 - status
