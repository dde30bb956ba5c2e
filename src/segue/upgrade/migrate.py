"""migrate: an ordinary migration, which copies RAM into memory of the successor's own.

For a machine whose RAM cannot be shared, and as the measure of what the other modes save. What
clients send is held once QEMU has stopped the guest, since the copying before may take long.
"""

from __future__ import annotations

from segue.qemu import migration
from segue.upgrade.handover import Handover

_SENDER = (migration.SENDER - {"x-ignore-shared"}) | {"pause-before-switchover"}
_RECEIVER = migration.RECEIVER - {"x-ignore-shared"}


class Migrate(Handover):
    async def _configure(self) -> None:
        await self._configure_both(_SENDER, _RECEIVER)

    async def _open(self) -> None:
        await super()._open()
        self._hush()
        await self.incumbent.monitor.execute("migrate", {"uri": "fd:segue"})
        await self._until(self._watches[0].until("pre-switchover"))

    async def _begin(self) -> None:
        await self.incumbent.monitor.execute("migrate-continue", {"state": "pre-switchover"})
