"""QEMU's migration as the carrier of device state between two instances on one RAM.

Facts behind it, each measured on 7.2, 10.0 and 11.1:
- `x-ignore-shared` leaves shared RAM out of the stream;
- `return-path` makes the incumbent notice a successor that dies while it loads;
- `late-block-activate` keeps a 7.2 successor's hands off the images until `cont`;
- the stream ends in a description of itself, in JSON, unless both sides have the machine's property
  `suppress-vmdesc`. Nobody reads it here, and writing it takes a sixth of the guest's pause.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from segue.errors import CommandFailed, MigrationFailed, MonitorClosed
from segue.qemu.instance import Instance
from segue.qemu.monitor import Event, Monitor

SENDER = frozenset({"x-ignore-shared", "events", "return-path"})
RECEIVER = SENDER | {"late-block-activate"}

# No bandwidth limit, and as few packets of QEMU's own on the guest's networks as it can do with.
# No `announce-rounds` at all would be a trap: QEMU 7.2, 10.0 and 11.1 then free a timer that the
# next reset of a virtio-net device uses, and crash when the guest reboots. The one round is sent
# as the state is loaded, before the networks are the successor's; what comes late is a guest that
# is asked to announce itself (virtio-net, 100 s afterwards, the latest possible).
_PARAMETERS = {"max-bandwidth": 1 << 40, "announce-rounds": 1, "announce-initial": 100_000}

_SUPPRESSED = {"path": "/machine", "property": "suppress-vmdesc"}

# What upgrades set, and put back themselves.
CHANGED = frozenset({*_PARAMETERS, "mode", "cpr-exec-command"})

OVER = frozenset({"none", "completed", "failed", "cancelled"})


@dataclass(frozen=True)
class Settings:
    """A monitor's migration capabilities and the parameters that `configure` changes.

    `described` tells whether the stream ends in its description; None where QEMU has no choice.
    """

    capabilities: dict[str, bool]
    parameters: dict[str, Any]
    described: bool | None = None

    def with_those_of(self, other: Settings) -> Settings:
        """These, with the values that `other` has for the same names."""
        return Settings(
            {n: other.capabilities.get(n, s) for n, s in self.capabilities.items()},
            {n: other.parameters.get(n, v) for n, v in self.parameters.items()},
            self.described,
        )


async def configure(monitor: Monitor, wanted: frozenset[str], **parameters: Any) -> Settings:
    """Switch the `wanted` capabilities on and every other off; what was set before.

    `parameters` are set too, besides those that every upgrade needs. Raises CommandFailed if this
    QEMU lacks one.
    """
    listed, current, described = await asyncio.gather(
        monitor.execute("query-migrate-capabilities"),
        monitor.execute("query-migrate-parameters"),
        _described(monitor),
    )
    # QEMU 8.2 brought modes; QEMU 11.1 aborts when one that is left over meets a plain `migrate`.
    mode = {"mode": "normal"} if "mode" in current else {}
    changed = _PARAMETERS | mode | parameters
    before = Settings(
        {c["capability"]: c["state"] for c in listed},
        {n: current[n] for n in changed if n in current},
        described,
    )
    await _apply(
        monitor,
        Settings({name: name in wanted for name in {*before.capabilities, *wanted}}, changed),
        before,
    )
    return before


async def describe_not(sender: Monitor, receiver: Monitor, *before: Settings) -> None:
    """Have a stream between the two without its description, if both can do without."""
    if any(settings.described is None for settings in before):
        return
    for monitor in (sender, receiver):
        await _describe(monitor, False)


async def restore(monitor: Monitor, settings: Settings) -> None:
    await _apply(monitor, settings, None)
    if settings.described is not None:
        await _describe(monitor, settings.described)


async def _described(monitor: Monitor) -> bool | None:
    try:
        return not await monitor.execute("qom-get", _SUPPRESSED)
    except CommandFailed:
        return None


async def _describe(monitor: Monitor, wanted: bool) -> None:
    await monitor.execute("qom-set", _SUPPRESSED | {"value": not wanted})


async def _apply(monitor: Monitor, settings: Settings, before: Settings | None) -> None:
    changed = {
        name: state
        for name, state in settings.capabilities.items()
        if before is None or before.capabilities.get(name) != state
    }
    capabilities = [{"capability": n, "state": s} for n, s in sorted(changed.items())]
    if capabilities:
        await monitor.execute("migrate-set-capabilities", {"capabilities": capabilities})
    if settings.parameters:
        await monitor.execute("migrate-set-parameters", settings.parameters)


class MigrationWatch:
    """The states that one instance's migration goes through, told by its MIGRATION events."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._seen: dict[str, float] = {}
        self._waiting: dict[asyncio.Future[str], tuple[str, ...]] = {}
        self._unlisten = instance.monitor.listen(self._event)
        self._forget = instance.monitor.on_close(self._closed)

    def _event(self, event: Event) -> None:
        if event["event"] != "MIGRATION":
            return
        status = event["data"]["status"]
        stamp = event["timestamp"]
        self._seen[status] = stamp["seconds"] + stamp["microseconds"] / 1e6
        for future, wanted in list(self._waiting.items()):
            if status in (*wanted, "failed", "cancelled"):
                del self._waiting[future]
                _settle(future, status, wanted)

    def _closed(self) -> None:
        for future in self._waiting:
            if not future.done():
                future.set_exception(_ended())
                future.exception()
        self._waiting.clear()

    def until(self, *wanted: str) -> asyncio.Future[str]:
        """Done once the migration is, or has been, in one of these states: which it was.

        Its exception is MonitorClosed if the instance ends first, MigrationFailed if the migration
        fails. A plain future, since each task on the way costs the guest 0.1 ms of its pause.
        """
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        ends = frozenset({*wanted, "failed", "cancelled"})
        status = next((s for s in self._seen if s in ends), None)
        if status is not None:
            _settle(future, status, wanted)
        elif self._instance.monitor.closed:
            future.set_exception(_ended())
        else:
            self._waiting[future] = wanted
        return future

    def reached(self, status: str) -> float:
        """When QEMU says that it reached `status`, seconds since the epoch."""
        return self._seen[status]

    def close(self) -> None:
        self._unlisten()
        self._forget()


def _settle(future: asyncio.Future[str], status: str, wanted: tuple[str, ...]) -> None:
    if future.done():
        return
    if status in wanted:
        future.set_result(status)
    else:
        future.set_exception(
            MigrationFailed(f"migration {status}", hint="see the machine's qemu.log")
        )
        future.exception()


def _ended() -> MonitorClosed:
    return MonitorClosed("QEMU ended in the middle of a migration")


async def cancel(monitor: Monitor) -> str:
    """End whatever migration is under way; the state in which it ended."""
    status = await state(monitor)
    if status not in OVER:
        try:
            await monitor.execute("migrate_cancel")
        except CommandFailed:
            pass
        while (status := await state(monitor)) not in OVER:  # noqa: ASYNC110
            # There is an event for this, but only if the `events` capability was set in time.
            await asyncio.sleep(0.002)
    return status


async def state(monitor: Monitor) -> str:
    answer: dict[str, Any] = await monitor.execute("query-migrate")
    return str(answer.get("status", "none"))
