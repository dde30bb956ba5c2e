"""Stopping an upgrade at the beginning of a phase, so that a test can kill a process just there.

Only a supervisor that was started with SEGUE_TESTING=1 in its environment has this. Then
`segue-upgrade` takes `x-break` (a list of phases) and `x-limits` (phase: seconds). At each phase
of the list the event SEGUE_UPGRADE says `"state": "break"`, and nothing more is done until
`x-segue-continue`. A resuming has no client who could be told: SEGUE_DIE_AT names the point at
which its supervisor gets SIGKILL.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Collection
from typing import Any


def allowed() -> bool:
    return os.environ.get("SEGUE_TESTING") == "1"


def die_at(point: str) -> None:
    if allowed() and os.environ.get("SEGUE_DIE_AT") == point:
        os.kill(os.getpid(), signal.SIGKILL)


class Breakpoints:
    def __init__(
        self, phases: Collection[str] = (), tell: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        self._phases = phases
        self._tell = tell
        self._go = asyncio.Event()

    async def reach(self, phase: str) -> None:
        if phase in self._phases:
            self._go.clear()
            if self._tell is not None:
                self._tell({"phase": phase, "state": "break"})
            await self._go.wait()

    def go_on(self) -> None:
        self._go.set()
