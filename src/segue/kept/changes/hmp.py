"""Lines of the human monitor that a client gave by `human-monitor-command`, in QMP's words.

What is typed into a human monitor itself is seen by nobody but QEMU.
"""

from __future__ import annotations

from typing import Any

from segue.errors import BadCommandLine
from segue.qemu.options import Params

# HMP's name → QMP's, and the key of a first word without one.
_OPTIONS = {
    "device_add": ("device_add", "driver"),
    "netdev_add": ("netdev_add", "type"),
    "object_add": ("object-add", "qom-type"),
}


def translate(line: str) -> tuple[str, dict[str, Any]] | None:
    """Command and arguments, all values as text; None for what need not be noted."""
    word, _, rest = line.strip().partition(" ")
    match word, rest.split():
        case (("device_add" | "netdev_add" | "object_add"), [_, *_]):
            command, implied = _OPTIONS[word]
            try:
                return command, dict(Params.parse(rest.strip(), implied).items())
            except BadCommandLine:
                return None
        case "set_link", [name, state]:
            return "set_link", {"name": name, "up": state == "on"}
        case "watchdog_action", [action]:
            return "watchdog-set-action", {"action": action}
    return None
