"""Timers that go on: a deadline on the monotonic clock is the same in each process of a host."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping


class Timers:
    """Timers by name, each with its callback. One that is due during a restart fires after it."""

    def __init__(self, callbacks: Mapping[str, Callable[[], object]]) -> None:
        self._callbacks = callbacks
        self._deadlines: dict[str, float] = {}
        self._handles: dict[str, asyncio.TimerHandle] = {}

    def set(self, name: str, seconds: float) -> None:
        """Fire once, that many seconds from now; in place of what was set for that name."""
        self._set(name, time.monotonic() + seconds)

    def cancel(self, name: str) -> None:
        self._deadlines.pop(name, None)
        handle = self._handles.pop(name, None)
        if handle is not None:
            handle.cancel()

    def suspend(self) -> dict[str, float]:
        """Stop, and give the deadlines, for a field of a section."""
        for handle in self._handles.values():
            handle.cancel()
        self._handles.clear()
        return dict(self._deadlines)

    def start(self, deadlines: Mapping[str, float]) -> None:
        """Go on with what `suspend` gave, in the same process or in a newer one.

        A timer that has no callback any more is forgotten.
        """
        for name, when in deadlines.items():
            if name in self._callbacks:
                self._set(name, when)

    def _set(self, name: str, when: float) -> None:
        callback = self._callbacks[name]
        self.cancel(name)
        loop = asyncio.get_running_loop()
        self._deadlines[name] = when
        delay = max(0.0, when - time.monotonic())
        self._handles[name] = loop.call_later(delay, self._fire, name, callback)

    def _fire(self, name: str, callback: Callable[[], object]) -> None:
        # Forgotten first: the callback may set it again.
        del self._deadlines[name], self._handles[name]
        callback()
