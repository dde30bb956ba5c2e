"""The phases of an upgrade: one table for the code, the journal, the events and the docs.

phase     guest               a fault ends with            limit
plan      runs                nothing touched              the target is probed, blockers told
prepare   runs                successor killed             it is started and compared
open      runs                successor killed             channel made, images written out
hold      runs, then paused   undo: incumbent resumes      nothing flows; migration begins
move      paused              undo: incumbent resumes      device state goes to the successor
commit    paused, then runs   undo if QEMU says no         journal, then `cont`
release   runs on successor   told, never undone           what was held flows again
retire    runs on successor   told, never undone           the incumbent is killed and reaped
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """`limit` is in seconds; `paused` says whether the guest waits while the phase lasts."""

    name: str
    limit: float
    paused: bool = False
    undoable: bool = True


PLAN = Phase("plan", 60)
PREPARE = Phase("prepare", 60)
OPEN = Phase("open", 60)
HOLD = Phase("hold", 5, paused=True)
MOVE = Phase("move", 10, paused=True)
COMMIT = Phase("commit", 10, paused=True)
RELEASE = Phase("release", 10, undoable=False)
RETIRE = Phase("retire", 30, undoable=False)
UNDO = Phase("undo", 30)
"""Not one of the order: the way back from those before `release`. Its limit does not end it."""

PHASES = (PLAN, PREPARE, OPEN, HOLD, MOVE, COMMIT, RELEASE, RETIRE)
