"""How a state arrives: `resumed` for code that was executed, and what it has in common with others.

What restart.py puts into the environment, as SEGUE_CPR; `resumed` takes it out again:

    ask FD ANSWER SECONDS   only load the state in FD, tell in ANSWER whether that can be done, end
    restart FD SECONDS      load it and go on; the code before us was replaced by us
    back FD REASON          the same; we are that code again, the newer one did not get ready

What a newer segue.cpr adds at the end of the first two is ignored. An answer is one line of JSON:
{} for yes, otherwise {"reason", "what", "hint"}.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any, NoReturn

from segue.cpr.errors import CprError, Misuse, Reason, Refused
from segue.cpr.state import Parsed, State, read_all

ENVIRONMENT = "SEGUE_CPR"
# Of a reason: one string of the environment may be 128 KiB long, and a pipe holds 64.
_LONGEST = 4096


class How(Enum):
    RESTART = "restart"
    BACK = "back"
    TRANSFER = "transfer"


class Arrival:
    """A state that has arrived; `how`, and with `How.BACK` the `reason` why it came back to us."""

    def __init__(
        self,
        how: How,
        parsed: Parsed,
        *,
        descriptors: Mapping[str, int] | None = None,
        reason: str | None = None,
    ) -> None:
        self.how = how
        self.reason = reason
        self._parsed = parsed
        self._descriptors = descriptors
        self._state: State | None = None

    def load(self, *kinds: type[Any]) -> State:
        """The state as sections of these kinds. Raises Refused, which the block should pass on.

        Code that is only asked ends in here: what comes after this call may open, bind and change
        things; what comes before it may not.
        """
        self._state = self._parsed.state(State, kinds, self._descriptors)
        return self._state

    @property
    def _loaded(self) -> bool:
        return self._state is not None

    def _require_loaded(self) -> None:
        if not self._loaded:
            raise Refused("the state was not loaded", "call Arrival.load()", Reason.FAILED)

    def _let_go(self) -> None:
        assert self._state is not None
        self._state.close_ignored()


class _Asked(Arrival):
    def __init__(self, parsed: Parsed, answer: int) -> None:
        super().__init__(How.RESTART, parsed)
        self._answer = answer

    def load(self, *kinds: type[Any]) -> NoReturn:
        super().load(*kinds)
        _end(self._answer, None)


@contextlib.contextmanager
def resumed() -> Iterator[Arrival | None]:
    """The state that this process was executed with; None where it simply was started.

    The block, at the top of the program, loads the state and makes everything ready: signals are
    blocked until it ends. Whatever exception leaves it, the code that was replaced is executed
    again with the same state, so the block should hold the program's imports too, and should
    neither read nor write what was kept.
    """
    letter = os.environ.pop(ENVIRONMENT, None)
    if letter is None:
        yield None
        return
    word, _, rest = letter.partition(" ")
    match word:
        case "ask":
            fd, answer, seconds, *_ = rest.split()
            yield from _asked(int(fd), int(answer), int(seconds))
        case "restart":
            number, timeout, *_ = rest.split()
            yield from _restarted(int(number), float(timeout))
        case "back":
            number, _, reason = rest.partition(" ")
            yield from _went_back(int(number), reason)
        case _:
            raise Misuse(f"{ENVIRONMENT}={letter} is of a segue.cpr that this one does not know")


def _asked(fd: int, answer: int, seconds: int) -> Iterator[Arrival]:
    # Whoever asked kills us after that time; if it was itself killed, nobody does.
    signal.alarm(seconds)
    for each in (fd, answer):
        os.set_inheritable(each, False)
    try:
        yield _Asked(Parsed(read_all(fd)), answer)
    except BaseException as error:
        _end(answer, error)
    _end(answer, Refused("the state was not loaded", "call Arrival.load()", Reason.FAILED))


def _end(answer: int, error: BaseException | None) -> NoReturn:
    # Not sys.exit(): what the program registered for its end is not for a process that never began.
    with contextlib.suppress(OSError):
        os.write(answer, to_line(error))
    os._exit(0)


def _restarted(fd: int, timeout: float) -> Iterator[Arrival]:
    os.set_inheritable(fd, False)
    parsed = Parsed(read_all(fd))
    late: list[TimeoutError] = []

    def give_up(*_: object) -> None:
        late.append(TimeoutError(f"not ready after {timeout:g} s"))
        raise late[0]

    try:
        handler = signal.signal(signal.SIGALRM, give_up)
        signal.setitimer(signal.ITIMER_REAL, timeout)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
        arrival = Arrival(How.RESTART, parsed)
        yield arrival
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        arrival._require_loaded()
    except BaseException as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        # An event loop makes a CancelledError of it.
        _go_back(fd, parsed, late[0] if late else error)
        raise
    _arrived(fd, arrival)


def _went_back(fd: int, reason: str) -> Iterator[Arrival]:
    os.set_inheritable(fd, False)
    parsed = Parsed(read_all(fd))
    arrival = Arrival(How.BACK, parsed, reason=reason)
    yield arrival
    arrival._require_loaded()
    _arrived(fd, arrival)


def _arrived(fd: int, arrival: Arrival) -> None:
    """There is no way back any more: what was kept for it is let go."""
    os.close(fd)
    arrival._let_go()
    back = arrival._parsed.back
    assert back is not None  # restart() always writes it
    # What was blocked meanwhile comes now, to the handlers that the block has installed.
    signal.pthread_sigmask(signal.SIG_SETMASK, back.mask)


def _go_back(fd: int, parsed: Parsed, error: BaseException) -> None:
    """Execute the code that we have replaced. Returns only if that is impossible."""
    assert parsed.back is not None  # restart() always writes it
    # As the environment can carry it.
    reason = describe(error).encode(errors="replace").decode().replace("\0", "")
    environment = dict(parsed.back.env) | {ENVIRONMENT: f"{How.BACK.value} {fd} {reason}"}
    passed = [fd, *(entry.fd for entry in parsed.entries)]
    try:
        execute(parsed.back.argv, environment, passed)
    except (OSError, ValueError) as failure:
        error.add_note(f"{parsed.back.argv[0]} could not be executed again: {failure}")


def execute(argv: tuple[str, ...], environment: Mapping[str, str], passed: list[int]) -> NoReturn:
    """exec() with these descriptors and the standard three; if it fails, all is as it was."""
    before = {}
    for name in os.listdir("/proc/self/fd"):
        # The directory's own descriptor is listed too, and closed by now.
        with contextlib.suppress(OSError):
            before[int(name)] = os.get_inheritable(int(name))
    wanted = {0, 1, 2, *passed}
    try:
        for number, inheritable in before.items():
            if inheritable != (number in wanted):
                os.set_inheritable(number, number in wanted)
        os.execvpe(argv[0], argv, environment)  # noqa: S606
    except BaseException:
        for number, inheritable in before.items():
            with contextlib.suppress(OSError):
                os.set_inheritable(number, inheritable)
        raise


def describe(error: BaseException) -> str:
    text = str(error)
    if not isinstance(error, CprError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text[:_LONGEST]


def to_line(error: BaseException | None) -> bytes:
    if error is None:
        answer: dict[str, Any] = {}
    elif isinstance(error, Refused):
        hint = error.hint and error.hint[:_LONGEST]
        answer = {"reason": error.reason.value, "what": error.what[:_LONGEST], "hint": hint}
    else:
        answer = {"reason": Reason.FAILED.value, "what": describe(error), "hint": None}
    return json.dumps(answer).encode("ascii") + b"\n"


def raise_from_line(line: bytes) -> None:
    """Raises what `to_line` was given; ValueError for what is no answer."""
    answer = json.loads(line)
    if not isinstance(answer, dict):
        raise ValueError("an answer is an object")
    if not answer:
        return
    try:
        reason = Reason(str(answer.get("reason")))
    except ValueError:
        reason = Reason.FAILED  # of a newer segue.cpr
    raise Refused(str(answer.get("what")), answer.get("hint"), reason)
