"""Every error that segue.cpr raises on purpose.

    CprError
    ├── Misuse              a mistake of the program's own; nothing was done
    ├── Refused             a state cannot be used, or somebody does not want it; `reason` says why
    ├── NoAnswer            the new code gave no answer: it could not be started, died, or hung
    ├── ExecFailed          exec() failed; the old code goes on
    └── TransferFailed      the other process went away; the sender still owns everything

Each says what happened (`what`) and what would help (`hint`). After any of them the process that
had the descriptors still has them, all of them, open.
"""

from __future__ import annotations

from enum import StrEnum


class CprError(Exception):
    def __init__(self, what: str, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.what} ({self.hint})" if self.hint else self.what


class Misuse(CprError):
    pass


class Reason(StrEnum):
    """Why a state is refused. The values are part of what the asked code answers (ask.py)."""

    FOREIGN = "foreign"  # not a state at all
    FORMAT = "format"  # of a format that we do not know
    TRUNCATED = "truncated"
    ALTERED = "altered"
    UNKNOWN_SECTION = "unknown-section"
    TOO_NEW = "too-new"
    TOO_OLD = "too-old"
    FIELDS = "fields"  # a section's fields are not those that were declared
    MISSING = "missing"  # a section that is needed is not there
    TWICE = "twice"  # two sections or descriptors of one name
    DESCRIPTOR = "descriptor"  # one is not what it was
    LEFT_OVER = "left-over"  # one that no section speaks of
    HOOK = "hook"  # a section's own hook, or the program's own check
    NOT_KEEPABLE = "not-keepable"  # an object that cannot be taken apart
    BUSY = "busy"  # a restart is under way already
    FAILED = "failed"  # the new code failed before it was ready


class Refused(CprError):
    def __init__(self, what: str, hint: str | None = None, reason: Reason = Reason.HOOK) -> None:
        super().__init__(what, hint)
        self.reason = reason


class NoAnswer(CprError):
    pass


class ExecFailed(CprError):
    pass


class TransferFailed(CprError):
    pass
