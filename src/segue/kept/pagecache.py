"""What the host has cached of a disk image stays cached when another QEMU opens it.

QEMU takes an image over from another as if that one had run on another host: it tells the kernel
to forget all cached pages of the file. Here both see the same page cache, so this does nothing but
harm: with 512 MiB cached it takes 80 ms, all of it while the guest stands still, and the guest's
next reads come from the disk. `drop-cache=off` (QEMU 4.0) leaves it out.

Only what is plainly a file gets it: `-drive file=PATH`, and in `-blockdev` the driver `file`.
"""

from __future__ import annotations

import json
import os
from typing import Any

from segue.qemu.commandline import Option

_KEY = "drop-cache"


def kept(option: Option) -> Option:
    """The option so that the page cache outlives an upgrade; itself, if it is not about a file."""
    if option.name == "drive":
        return _drive(option)
    return _blockdev(option) if option.name == "blockdev" else option


def _drive(option: Option) -> Option:
    params = option.params
    if (
        not os.path.isfile(params.get("file") or "")
        or params.get("media") == "cdrom"
        or params.boolean("readonly", False)
        or any(key.startswith("file.") for key, _ in params.items())
    ):
        return option
    return option.with_params(params.set(f"file.{_KEY}", "off"))


def _blockdev(option: Option) -> Option:
    params = option.params
    if params.json is not None:
        tree = params.tree()
        return option.with_value(json.dumps(tree)) if _in_tree(tree) else option
    for prefix in ("", "file."):
        if params.get(f"{prefix}driver") == "file" and not params.get(prefix + _KEY):
            return option.with_params(params.set(prefix + _KEY, "off"))
    return option


def _in_tree(node: Any) -> bool:
    """Add it to each `file` node below; whether there was one."""
    changed = False
    if isinstance(node, dict):
        if node.get("driver") == "file" and _KEY not in node:
            node[_KEY] = False
            changed = True
        changed = any([_in_tree(below) for below in node.values()]) or changed
    return changed
