"""Who connected to the QMP server and what befell them, in a file that stays small.

One line each, `TIME TEXT`. At LIMIT bytes the file is renamed to `NAME.1` and begun anew, since
the run directory is in memory.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

LIMIT = 1 << 20


class LogFile(logging.Handler):
    """What cannot be written is lost: nobody's connection depends on a log."""

    def __init__(self, path: Path, limit: int = LIMIT) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self._path = path
        self._limit = limit
        self._fd = self._open()

    def emit(self, record: logging.LogRecord) -> None:
        line = f"{self.format(record)}\n".encode(errors="backslashreplace")
        try:
            if os.fstat(self._fd).st_size + len(line) > self._limit:
                self._path.rename(f"{self._path}.1")
                os.close(self._fd)
                self._fd = self._open()
            os.write(self._fd, line)
        except OSError:
            pass

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        super().close()

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def logger(handler: LogFile) -> logging.Logger:
    """A logger of its own: nothing in the process but the server writes there."""
    made = logging.Logger("segue.qmp", logging.INFO)
    made.addHandler(handler)
    return made
