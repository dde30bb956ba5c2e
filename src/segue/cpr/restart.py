"""Restart: this process becomes newer code, with the same pid, children and descriptors.

    ask       the new code is started as a child with the same descriptors. It loads the state,
              says whether it can, and ends. Until here nothing was touched
    exec      all signals are blocked, the state is written once more, exec() is called
    load      the new code loads the state (arrival.py), installs its handlers, unblocks signals

An exec() that fails is undone, and an ExecFailed tells why. New code that does not get ready, or
not in time, executes the old code again, by the command line that the state records; where a
package upgrade has removed that, it cannot be, hence the question first. What stays out of reach is
an interpreter that dies between exec() and `resumed`, though it answered a moment before.

exec() itself keeps umask, working directory, limits, priority, affinity, cgroup and the ignored
signals. It ends all other threads, and nothing that was registered for the end of the program runs.
"""

from __future__ import annotations

import contextlib
import math
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NoReturn, Self

from segue.cpr.arrival import ENVIRONMENT, How, execute, raise_from_line
from segue.cpr.errors import ExecFailed, Misuse, NoAnswer
from segue.cpr.state import Back, State, dump, in_memfd

TIMEOUT = 30.0
_LONGEST_ANSWER = 1 << 16


class Question:
    """New code that is asked. `ask` waits for it; an event loop waits until `fileno` is readable.

    with Question(state, argv, env) as question:
        ... once readable, or too late:
        question.answer()
    """

    def __init__(
        self,
        state: State,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        *,
        timeout: float = TIMEOUT,
    ) -> None:
        """Raises NoAnswer where the new code cannot be started."""
        if not argv:
            raise Misuse("there is nothing to execute")
        self._argv = argv
        data, passed = dump(state, None)
        with contextlib.ExitStack() as undo:
            try:
                fd = in_memfd(data)
                undo.callback(os.close, fd)
                self._read, write = os.pipe()
                undo.callback(os.close, self._read)
                undo.callback(os.close, write)
                self._output = os.memfd_create("segue-cpr-output")
                undo.callback(os.close, self._output)
                letter = f"ask {fd} {write} {math.ceil(timeout) + 1}"
                self._child = subprocess.Popen(
                    list(argv),
                    env=dict(os.environ if env is None else env) | {ENVIRONMENT: letter},
                    # Unless they are part of the state, which would not be what it was.
                    stdin=None if 0 in passed else subprocess.DEVNULL,
                    stdout=None if 1 in passed else self._output,
                    stderr=None if 2 in passed else self._output,
                    pass_fds=[fd, write, *passed],
                )
            except (OSError, ValueError) as error:
                why = getattr(error, "strerror", None) or error
                raise NoAnswer(f"{argv[0]} cannot be started: {why}") from error
            undo.pop_all()
        os.close(fd)
        os.close(write)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.wait()
        os.close(self._read)
        os.close(self._output)

    def fileno(self) -> int:
        return self._read

    def answer(self) -> None:
        """Returns if the answer is yes. Raises Refused if it is no, NoAnswer if there is none."""
        os.set_blocking(self._read, False)
        try:
            line = os.read(self._read, _LONGEST_ANSWER)
        except BlockingIOError:
            raise NoAnswer(f"{self._argv[0]} does not answer", self._last_words()) from None
        if not line:
            raise NoAnswer(f"{self._argv[0]} ended without an answer", self._last_words())
        try:
            raise_from_line(line)
        except ValueError as error:
            raise NoAnswer(f"{self._argv[0]} gave no answer that we know: {line!r}") from error

    def _last_words(self) -> str | None:
        """The last line that the new code printed: of a traceback it is the reason."""
        end = os.fstat(self._output).st_size
        tail = os.pread(self._output, 1000, max(0, end - 1000)).decode(errors="replace")
        lines = tail.strip().splitlines()
        return f"it said: {lines[-1]}" if lines else None


def ask(
    state: State,
    argv: Sequence[str],
    env: Mapping[str, str] | None = None,
    *,
    timeout: float = TIMEOUT,
) -> None:
    """Ask new code whether it can take `state`; this process goes on whatever the answer is.

    Blocks for as long as the new code takes to start; in an event loop use segue.cpr.aio.ask.
    Raises Refused if the answer is no, NoAnswer if there is none.
    """
    deadline = time.monotonic() + timeout
    with (
        Question(state, argv, env, timeout=timeout) as question,
        selectors.DefaultSelector() as selector,
    ):
        selector.register(question, selectors.EVENT_READ)
        selector.select(max(0.0, deadline - time.monotonic()))
        question.answer()


def restart(
    state: State,
    argv: Sequence[str],
    env: Mapping[str, str] | None = None,
    *,
    asked: bool = False,
    back: Sequence[str] | None = None,
    timeout: float = TIMEOUT,
) -> NoReturn:
    """Execute `argv` in place of this code. Returns never; it may raise, and then nothing changed.

    `env` replaces the environment, `back` the command line by which this code is executed again if
    the new code does not get ready; by default that which started it. `asked` says that the caller
    has asked already, and that the state has the same shape since. `timeout` is for the answer, and
    then again for getting ready. Raises Refused or NoAnswer as `ask` does, ExecFailed if exec()
    does.
    """
    if not asked:
        ask(state, argv, env, timeout=timeout)
    old = (sys.executable, *sys.orig_argv[1:]) if back is None else tuple(back)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        back_to = Back(old, dict(os.environ), tuple(int(number) for number in mask))
        data, passed = dump(state, back_to)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        with contextlib.ExitStack() as undo:
            try:
                fd = in_memfd(data)
                undo.callback(os.close, fd)
                letter = f"{How.RESTART.value} {fd} {timeout}"
                environment = dict(os.environ if env is None else env) | {ENVIRONMENT: letter}
                execute(tuple(argv), environment, [fd, *passed])
            except (OSError, ValueError) as error:
                raise ExecFailed(f"{argv[0]} cannot be executed: {error}") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
