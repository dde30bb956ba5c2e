"""What a machine's user is told, by QEMU on its stderr and by the supervisor."""

from __future__ import annotations

import contextlib
import os
import sys
import syslog

from segue.machines import MachineDirectory


class Voice:
    """Whoever started a detached machine is gone: what it says goes into logs."""

    def __init__(self, directory: MachineDirectory, *, detached: bool) -> None:
        self._directory = directory
        self._detached = detached

    def open_log(self, stack: contextlib.ExitStack) -> None:
        self._log = os.open(
            self._directory.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600
        )
        stack.callback(os.close, self._log)

    @property
    def stdout(self) -> int | None:
        """QEMU's; None where it has the supervisor's own."""
        return self._log if self._detached else None

    def of_qemu(self, chunk: bytes) -> None:
        """QEMU's stderr: into its log, and where the user would have seen it."""
        with contextlib.suppress(OSError):
            os.write(self._log, chunk)
        if not self._detached:
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.buffer.write(chunk)
                sys.stderr.buffer.flush()

    def at_start(self, text: str) -> None:
        """Until the guest runs, whoever starts a detached machine is still there."""
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(f"segue: {self._directory.name}: {text}\n")

    def say(self, text: str) -> None:
        text = f"{self._directory.name}: {text}"
        if self._detached:
            syslog.syslog(syslog.LOG_WARNING, text)
        else:
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(f"segue: {text}\n")
