"""The phases of an upgrade as they happen: one line each, on stderr.

Fed with SEGUE_UPGRADE events: {"phase": name, "state": "begin"|"end", "seconds": number}. On a
terminal a phase shows as soon as it begins, and its line is completed when it ends; in a pipe or
a log there is one plain line for each phase that ended.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from segue.cli import output

EVENT = "SEGUE_UPGRADE"


class Progress:
    def __init__(self, machine: str, stream: TextIO | None = None) -> None:
        self._machine = machine
        self._stream = sys.stderr if stream is None else stream
        self._lively = output.is_lively(self._stream)
        self._open: str | None = None
        self._began = 0.0
        self._broken = False

    def event(self, event: Mapping[str, Any]) -> None:
        """Take one QMP event; those that are not about an upgrade are ignored."""
        if event.get("event") != EVENT:
            return
        data = event.get("data", {})
        phase, seconds = str(data.get("phase")), data.get("seconds")
        if data.get("state") == "begin":
            self.abandon()
            self._open, self._began = phase, time.monotonic()
            if self._lively:
                self._write(f"  … {phase}")
        elif self._open == phase or self._open is None:
            if seconds is None and self._open is not None:
                seconds = time.monotonic() - self._began
            self._open = None
            self._end(phase, seconds)

    def abandon(self) -> None:
        """The phase that had begun will not end as it should have."""
        if self._open is None:
            return
        if self._lively:
            self._write(f"\r  {output.bad('✗', self._stream)} {self._open}\n")
        else:
            self._write(f"{self._machine}: {self._open}: did not end\n")
        self._open = None

    def _end(self, phase: str, seconds: object) -> None:
        took = output.seconds(seconds)
        if not self._lively:
            self._write(f"{self._machine}: {phase}: {took}\n")
            return
        undone = phase == "undo"
        mark = output.bad("↩", self._stream) if undone else output.good("✓", self._stream)
        self._write(f"\r  {mark} {phase:<8} {took:>10}\n")

    def _write(self, text: str) -> None:
        # Whoever has closed stderr shall not end an upgrade, nor miss its receipt.
        if self._broken:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            self._broken = True
