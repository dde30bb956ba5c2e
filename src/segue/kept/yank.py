"""QMP's `yank`, which has QEMU shut connections down: not those on which Segue depends itself."""

from __future__ import annotations

from typing import Any

from segue.errors import CommandFailed
from segue.kept.guard import BELL_ID
from segue.qemu.instance import MONITOR_ID

OUR_OWN = frozenset((MONITOR_ID, BELL_ID))
"""Ids of character devices that no client is shown."""


def without_ours(reply: dict[str, Any]) -> dict[str, Any]:
    """An answer to `query-yank`."""
    reply["return"] = [each for each in reply["return"] if not _is_ours(each)]
    return reply


def refuse_ours(arguments: dict[str, Any]) -> None:
    """Raises CommandFailed, as QEMU does for what is not there."""
    instances = arguments.get("instances")
    if isinstance(instances, list) and any(map(_is_ours, instances)):
        raise CommandFailed("Instance not found", error_class="DeviceNotFound")


def _is_ours(instance: Any) -> bool:
    return (
        isinstance(instance, dict)
        and instance.get("type") == "chardev"
        and instance.get("id") in OUR_OWN
    )
