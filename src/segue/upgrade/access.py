"""Whether QEMU may still open the images that it writes to.

At a handover the incumbent lets go of its images and the successor takes them: both open them
anew, by name, with the rights that they have by then. Where those were lost since (another owner,
a file system that is read-only now), neither can do that, nor can the incumbent take them back if
the upgrade is undone: the guest would stay paused. So it is asked beforehand.

One that gave up its rights opens its images once and for all (kept/confined.py).
"""

from __future__ import annotations

import os
import re

from segue.errors import Blocker
from segue.kept import confined
from segue.qemu.commandline import CommandLine
from segue.qemu.instance import Instance

# What snapshot=on makes and unlinks, which is a blocker by itself.
_TEMPORARY = re.compile(r"/vl\.\w{6}$")


async def blockers(incumbent: Instance, line: CommandLine) -> list[Blocker]:
    """One for each image that is out of its reach, whose rights are ours."""
    if confined.is_confined(line):
        return []
    nodes = await incumbent.monitor.execute("query-named-block-nodes", {"flat": True})
    return [
        Blocker(
            f"disk image {name}",
            f"QEMU (pid {incumbent.pid}) could not open it for writing again",
            "let its user read and write it, under that name",
        )
        for name in sorted({node["file"] for node in nodes if _is_opened_again(node)})
        if not os.access(name, os.R_OK | os.W_OK, effective_ids=True)
    ]


def _is_opened_again(node: dict[str, object]) -> bool:
    """By name: not what came to QEMU as a descriptor."""
    name = str(node["file"])
    if node["drv"] not in ("file", "host_device") or node["ro"]:
        return False
    return not name.startswith(("/dev/fdset/", "json:")) and not _TEMPORARY.search(name)
