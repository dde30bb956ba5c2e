"""Whether QEMU may still open the images that it writes to.

At a handover the incumbent lets go of its images and the successor takes them: both open them
anew, by name, with the rights that a process has by then. One that has lost its rights since
(another owner, a file system that is read-only now, chroot=, user=) cannot do that, nor take them
back if the upgrade is undone: the guest would stay paused. So it is asked beforehand.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from segue.errors import Blocker
from segue.qemu.instance import Instance
from segue.qemu.monitor import Monitor
from segue.upgrade import reach

# What snapshot=on makes and unlinks, which is a blocker by itself.
_TEMPORARY = re.compile(r"/vl\.\w{6}$")


async def blockers(incumbent: Instance) -> list[Blocker]:
    """One for each image that is out of its reach."""
    names = await _written(incumbent.monitor)
    if not names:
        return []
    rights = _Rights.of(incumbent.pid)
    return [
        Blocker(
            f"disk image {name}",
            f"QEMU (pid {incumbent.pid}, uid {rights.user}) could not open it for writing again",
            "let that user read and write it, under that name (mind chroot= and user=)",
        )
        for name in await asyncio.to_thread(rights.out_of_reach, names)
    ]


async def _written(monitor: Monitor) -> list[str]:
    """By name; what came to QEMU as a descriptor (/dev/fdset) is not opened again."""
    nodes = await monitor.execute("query-named-block-nodes", {"flat": True})
    return sorted(
        {
            node["file"]
            for node in nodes
            if node["drv"] in ("file", "host_device")
            and not node["ro"]
            and not node["file"].startswith(("/dev/fdset/", "json:"))
            and not _TEMPORARY.search(node["file"])
        }
    )


@dataclass(frozen=True)
class _Rights:
    """Whose rights a process has, and what it takes for the root of all paths."""

    user: int
    group: int
    groups: tuple[int, ...]
    root: str
    directory: str

    @classmethod
    def of(cls, pid: int | str) -> _Rights:
        status = Path(f"/proc/{pid}/status").read_text()

        def numbers(name: str) -> list[int]:
            found = re.findall(rf"^{name}:(.*)$", status, re.MULTILINE)
            return [int(word) for word in found[0].split()]

        root, directory = (os.readlink(f"/proc/{pid}/{link}") for link in ("root", "cwd"))
        within = os.path.relpath(directory, root)
        groups = tuple(numbers("Groups"))
        return cls(numbers("Uid")[1], numbers("Gid")[1], groups, root, f"/{within}")

    def out_of_reach(self, names: Sequence[str]) -> list[str]:
        """Which of the files cannot be opened for reading and writing."""
        if self == _Rights.of("self"):
            return [name for name in names if not reach.reachable(name)]
        groups = ",".join(map(str, self.groups))
        rights = (str(self.user), str(self.group), groups, self.root, self.directory)
        told = subprocess.run(
            [sys.executable, "-ISE", reach.__file__, *rights, *names],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        # Who cannot even take on its rights cannot tell, and leaves it to QEMU.
        return [names[int(number)] for number in told.stdout.split()]
