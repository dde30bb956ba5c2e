"""Every error that Segue raises on purpose.

    SegueError                      1   failed; the guest runs on the incumbent
    ├── UsageError                  2   the user's input is wrong
    │   └── BadCommandLine          2   QEMU's command line is not understood
    ├── NotRunning                  3   the machine has no running QEMU or supervisor
    ├── NoSuchMachine               4
    ├── Refused                     5   nothing was touched; carries blockers
    ├── TimedOut                    6   the guest runs on the incumbent
    ├── Partial                     7   some of several machines failed
    ├── GuestLost                   8   the guest is gone, or nobody can tell
    └── QemuError                   1   an instance misbehaved
        ├── InstanceDied            1   it ended when it should not have
        ├── CommandFailed           1   QMP answered with an error
        ├── MigrationFailed         1   the state did not get across
        └── MonitorClosed           1   QMP ended before an answer came

The number is the exit status of the command line, so that a caller of the library and a
script see the same distinctions.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Blocker:
    """One reason why a machine cannot be upgraded, with the one change that would help."""

    what: str
    why: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}: {self.why} ({self.remedy})"

    def to_json(self) -> dict[str, str]:
        return {"what": self.what, "why": self.why, "remedy": self.remedy}


class SegueError(Exception):
    """What happened, a hint, and where the guest is now (`running on the incumbent`, ...)."""

    exit_status: ClassVar[int] = 1

    def __init__(self, what: str, hint: str | None = None, guest: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint
        self.guest = guest

    def to_json(self) -> dict[str, Any]:
        return {
            "error": type(self).__name__,
            "what": self.what,
            "hint": self.hint,
            "guest": self.guest,
        }


class UsageError(SegueError):
    exit_status = 2


class BadCommandLine(UsageError):
    pass


class NotRunning(SegueError):
    exit_status = 3


class NoSuchMachine(SegueError):
    exit_status = 4


class Refused(SegueError):
    exit_status = 5

    def __init__(
        self,
        what: str,
        hint: str | None = None,
        guest: str | None = None,
        blockers: tuple[Blocker, ...] = (),
    ) -> None:
        super().__init__(what, hint, guest)
        self.blockers = blockers

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {"blockers": [b.to_json() for b in self.blockers]}


class TimedOut(SegueError):
    exit_status = 6


class Partial(SegueError):
    exit_status = 7


class GuestLost(SegueError):
    exit_status = 8


class QemuError(SegueError):
    pass


class InstanceDied(QemuError):
    pass


class CommandFailed(QemuError):
    """QMP answered with an error; `error_class` is QEMU's own class name."""

    def __init__(
        self,
        what: str,
        hint: str | None = None,
        guest: str | None = None,
        error_class: str = "GenericError",
    ) -> None:
        super().__init__(what, hint, guest)
        self.error_class = error_class


class MigrationFailed(QemuError):
    """The state did not get from one instance to the other; why, they say on their stderr."""


class MonitorClosed(QemuError):
    pass


def advice(error: OSError) -> str | None:
    """A hint for who named a file or an address that the system would not give, or needs more."""
    match error.errno:
        case errno.EACCES | errno.EPERM:
            return (
                "name one that is yours to use, or run it as a user who has the right to that one"
            )
        case errno.EADDRINUSE:
            return "another program listens there: end it, or choose another address"
        case errno.EMFILE | errno.ENFILE:
            return "give the supervisor more: prlimit --nofile=N --pid PID (segue ls --json has it)"
        case errno.ENOSPC | errno.EDQUOT:
            return "make room where the run directory is"
        case errno.ENOENT | errno.ENOTDIR:
            return "is the folder there?"
        case errno.EADDRNOTAVAIL:
            return "is that an address of this host?"
    return None
