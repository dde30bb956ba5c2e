"""cpr-transfer: QEMU's own way, since 10.0 (docs/devel/migration/CPR in QEMU's sources).

The incumbent sends its descriptors to the successor before that creates anything, over a channel
of their own; so the successor has no monitor until the incumbent was told to `migrate`. The guest
runs on meanwhile: it stops when the successor, compared by then, is told to listen.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from segue.errors import CommandFailed
from segue.qemu import migration
from segue.upgrade.handover import Handover

# In this mode all RAM stays out of the stream anyway; with x-ignore-shared the successor would
# compare where the guest has mapped its video memory, and refuse.
_SENDER = migration.SENDER - {"x-ignore-shared"}
_RECEIVER = migration.RECEIVER - {"x-ignore-shared"}

_CPR, _MAIN = "cpr.sock", "main.sock"


def incoming(directory: Path) -> tuple[str, ...]:
    """What the successor is started with; QEMU 10.0 knows a path alone for this channel."""
    return ("-incoming", json.dumps(_channel("cpr", directory / _CPR)), "-incoming", "defer")


def _channel(kind: str, path: Path) -> dict[str, Any]:
    address = {"transport": "socket", "type": "unix", "path": str(path)}
    return {"channel-type": kind, "addr": address}


class CprTransfer(Handover):
    async def _introduce(self) -> None:
        assert self.successor is not None
        directory = self.surroundings.directory
        for name in (_CPR, _MAIN):
            self._stack.callback((directory / name).unlink, missing_ok=True)
        old = self.incumbent.monitor
        self._before = await migration.configure(old, _SENDER, mode="cpr-transfer")
        channels = [_channel("main", directory / _MAIN), _channel("cpr", directory / _CPR)]
        while True:
            # There is nothing to wait for but that the successor listens.
            try:
                await old.execute("migrate", {"channels": channels})
                return
            except CommandFailed:
                if not self.successor.running:
                    raise await self.successor.death() from None
                await asyncio.sleep(0.01)

    async def _configure(self) -> None:
        assert self.successor is not None
        self._fresh = await migration.configure(self.successor.monitor, _RECEIVER)

    async def _open_channel(self) -> None:
        """The successor makes it in `_begin`: that stops the guest."""

    async def _begin(self) -> None:
        assert self.successor is not None
        await self.successor.monitor.execute(
            "migrate-incoming", {"uri": f"unix:{self.surroundings.directory / _MAIN}"}
        )
