"""What the command line says about the machine's beginning and end.

The guest's own wishes (power-off, panic) must reach the supervisor before QEMU acts on them, or
an incumbent could end in the middle of an upgrade. So every instance pauses where the user's
command line, or QEMU's default, says to end; the supervisor then does what was said.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from dataclasses import dataclass
from pathlib import Path

from segue.errors import SegueError, advice
from segue.kept.base import Lending
from segue.kept.draft import Computed, Draft, Once, Words


@dataclass(frozen=True)
class Lifecycle:
    """What the user's command line asks for; `panic` and `shutdown` are QEMU's `-action` words."""

    detach: bool
    pidfile: str | None
    paused: bool
    incoming: bool
    shutdown: str
    panic: str

    def write_pidfile(self) -> None:
        """Raises SegueError."""
        if self.pidfile is None:
            return
        try:
            Path(self.pidfile).write_text(f"{os.getpid()}\n")
        except OSError as error:
            what = f"cannot create PID file '{self.pidfile}': {error.strerror}"
            raise SegueError(what, advice(error)) from None

    def remove_pidfile(self) -> None:
        if self.pidfile is not None:
            with contextlib.suppress(OSError):
                os.unlink(self.pidfile)


class LifecycleRule:
    def apply(self, draft: Draft) -> None:
        self.read(draft)
        draft.take("daemonize", "pidfile", "no-shutdown")
        for name in ("S", "loadvm", "incoming", "writeconfig", "D"):
            for option in draft.options(name):
                draft.replace(option, Once(tuple(option.argv())))
        panic = self.read(draft).panic
        words = "shutdown=pause" if panic == "none" else "shutdown=pause,panic=pause"
        draft.add(Words(("-action", words)))
        for option in draft.options("rtc"):
            base = option.params.get("base")
            if base in (None, "utc", "localtime"):
                continue
            self._keep_date(draft, base or "")

    @staticmethod
    def read(draft: Draft) -> Lifecycle:
        line = draft.command_line
        actions = {"shutdown": "poweroff", "panic": "shutdown"}
        for option in line.options:
            if option.name == "action":
                actions |= dict(option.params.items())
            elif option.name == "no-shutdown":
                actions["shutdown"] = "pause"
        return Lifecycle(
            detach=line.daemonize,
            pidfile=line.pidfile,
            paused=line.flag("S"),
            incoming=line.flag("incoming"),
            shutdown=actions["shutdown"],
            panic=actions["panic"],
        )

    def _keep_date(self, draft: Draft, base: str) -> None:
        """`-rtc base=DATE` names the date at the start of the *first* instance."""
        try:
            date = datetime.datetime.fromisoformat(base)
        except ValueError:
            return
        started = draft.decide("started", time.monotonic, otherwise=time.monotonic())

        def arguments(lending: Lending) -> list[str]:
            if lending.first:
                return []
            passed = datetime.timedelta(seconds=time.monotonic() - started)
            return ["-rtc", f"base={(date + passed).isoformat(timespec='seconds')}"]

        draft.add(Computed(arguments))
