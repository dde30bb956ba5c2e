"""What goes on in the block layer that a successor could not go on with."""

from __future__ import annotations

import asyncio
from typing import Any

from segue.errors import Blocker, CommandFailed
from segue.kept.changes.graph import Graph
from segue.kept.changes.record import Record
from segue.qemu.monitor import Monitor


async def blockers(monitor: Monitor, graph: Graph, record: Record) -> list[Blocker]:
    jobs, exports = await asyncio.gather(
        _ask(monitor, "query-jobs"), _ask(monitor, "query-block-exports")
    )
    found = [
        Blocker(
            f"job '{job['id']}' ({job['type']})",
            f"it is {job['status']}, and lives in one QEMU",
            "dismiss it with job-dismiss"
            if job["status"] == "concluded"
            else "wait for its end, or end it with job-cancel or job-complete",
        )
        for job in jobs
    ]
    found += [
        Blocker(
            f"block export '{export['id']}' ({export['type']} of {export['node-name']})",
            "its clients' connections live in one QEMU",
            "remove it with block-export-del",
        )
        for export in exports
    ]
    if record.nbd and not exports:
        found.append(
            Blocker(
                "the NBD server", "its socket belongs to one QEMU", "end it with nbd-server-stop"
            )
        )
    for name, facts in graph.facts.items():
        found += [
            Blocker(
                f"dirty bitmap '{bitmap['name']}' of node {name}",
                "it is in QEMU's memory alone",
                "remove it, or make it persistent (block-dirty-bitmap-add persistent=true)",
            )
            for bitmap in facts.get("dirty-bitmaps", ())
            # Those without a name belong to jobs.
            if not bitmap["persistent"] and bitmap.get("name")
        ]
    return found


async def _ask(monitor: Monitor, command: str) -> list[dict[str, Any]]:
    try:
        answer: list[dict[str, Any]] = await monitor.execute(command)
    except CommandFailed:  # a QEMU without a block layer's tools
        return []
    return answer
