"""What a guest does of its own accord while it is handed over, by what its QEMU tells of it."""

from __future__ import annotations

from collections.abc import Sequence

from segue.errors import SegueError
from segue.qemu.monitor import Event

_ENDINGS = {
    "SHUTDOWN": "the guest powered off",
    "GUEST_PANICKED": "the guest panicked",
}
# What changes the machine that is to be handed over.
_WISHES = _ENDINGS | {
    "RESET": "the guest reset itself",
    "SUSPEND": "the guest suspended itself",
}
# Events that tell of a pause by the guest's own doing: the action that is one, and what did it.
_PAUSES = {"BLOCK_IO_ERROR": ("stop", "an I/O error"), "WATCHDOG": ("pause", "its watchdog")}


def check(events: Sequence[Event], *, stops: bool) -> None:
    """Raise SegueError if the guest is no longer what was compared and is being moved.

    `stops` says whether a STOP among them is the upgrade's: what came before is in the state that
    was saved.
    """
    stopped = False
    for event in events:
        name = event["event"]
        stopped = stopped or (name == "STOP" and stops)
        if name in _ENDINGS:
            raise SegueError(f"{_ENDINGS[name]} during the upgrade", guest="not running")
        if name in _WISHES and stopped:
            raise SegueError(f"{_WISHES[name]} in the very moment", hint="upgrade again")
        if (cause := _paused_by(event)) is not None:
            raise SegueError(
                f"the guest was stopped by {cause} during the upgrade",
                guest="stopped on the incumbent",
            )


def stopped_itself(events: Sequence[Event]) -> bool:
    return any(e["event"] in _ENDINGS or _paused_by(e) is not None for e in events)


def _paused_by(event: Event) -> str | None:
    """What has made QEMU pause the guest, if the event tells of that."""
    action, cause = _PAUSES.get(event["event"], (None, None))
    return cause if action is not None and event["data"]["action"] == action else None
