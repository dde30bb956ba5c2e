"""Interrupts of disks in iothreads, which QEMU from 8.2 on can lose when it stops a guest.

In an iothread the write to a queue's eventfd is deferred to the end of the completion handler; the
drain at the stop can be over before that, the eventfd is read empty and closed, and the late write
goes nowhere. One interrupt is lost, in no saved state, and the guest's I/O stalls for good: in 1-2
of 100 stops (QEMU 10.0 and 11.1; not 7.2).

The cure is to give each queue's interrupt once more before the guest runs again: an interrupt for
which there is nothing to do is harmless. An MSI is a write to physical memory, made through the
gdb stub (qemu/gdbstub.py); what to write where is in the device's MSI-X table. Rejected: pinning
the iothread and the main thread to one CPU, which makes it rarer only.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from segue.errors import Blocker
from segue.qemu import gdbstub
from segue.qemu.binary import Binary
from segue.qemu.instance import Instance
from segue.qemu.monitor import Monitor

# Vendor and device ids of virtio block devices and SCSI controllers, transitional and not.
_VIRTIO = 0x1AF4
_DISKS = frozenset({0x1001, 0x1042, 0x1004, 0x1048})
_TABLE_BAR = 1
"""virtio-pci's `msix_bar_idx`."""
_COMMON_BAR = 4
"""virtio-pci's modern registers; the common configuration begins with them, and in its sixth word
the first byte is the device's status (virtio 1.2, 4.1.4.3)."""
_DRIVER_OK = 4
_WORD = re.compile(r"0x([0-9a-f]{8})\b")

_REMEDY = "start without iothread=, or go on with QEMU 7.2"


async def blockers(instance: Instance, running: Binary) -> list[Blocker]:
    """Why a lost interrupt could not be given again here; nothing where none can get lost."""
    if not running.deferred_irqfd or not await _has_iothreads(instance.monitor):
        return []
    what = f"iothread= on QEMU {running.version_text}"
    why = "it loses an interrupt of a disk in an iothread in 1-2 of 100 stops, and "
    if running.target not in ("x86_64", "i386"):
        return [Blocker(what, why + "Segue can give it again on x86 only", _REMEDY)]
    tree = await instance.monitor.hmp("info qtree")
    if "dev: intel-iommu" in tree or "dev: amd-iommu" in tree:
        return [Blocker(what, why + "an IOMMU that remaps it stands in the way", _REMEDY)]
    if await _without_msix(instance.monitor):
        return [
            Blocker(
                what,
                why + "this guest uses a disk without MSI-X, where it cannot be given again",
                "try again when the guest has booted; else " + _REMEDY,
            )
        ]
    return []


async def can_be_lost(instance: Instance, running: Binary) -> bool:
    """Whether a stop of this instance can lose one."""
    return running.deferred_irqfd and await _has_iothreads(instance.monitor)


async def give_again(instance: Instance) -> None:
    """Every interrupt of every disk, to a guest that is paused and stays so. Raises QemuError."""
    writes = [
        (address, data.to_bytes(4, "little"))
        for table in await _tables(instance.monitor)
        for address, data in table
    ]
    if writes:
        async with gdbstub.attached(instance.monitor) as stub:
            await stub.write_physical(writes)


async def _has_iothreads(monitor: Monitor) -> bool:
    return bool(await monitor.execute("query-iothreads"))


@dataclass(frozen=True)
class _Disk:
    """Where the guest has mapped a disk's MSI-X table and its virtio registers; 0 is nowhere."""

    table: int
    table_bytes: int
    common: int


async def _tables(monitor: Monitor) -> list[list[tuple[int, int]]]:
    """(address, data) of the messages of each disk's MSI-X table; none where it is not in use."""
    disks = [disk for disk in _disks(await monitor.execute("query-pci")) if disk.table]
    dumps = await asyncio.gather(
        *(monitor.hmp(f"xp /{disk.table_bytes // 4}wx 0x{disk.table:x}") for disk in disks)
    )
    return [list(_messages(dump)) for dump in dumps]


async def _without_msix(monitor: Monitor) -> bool:
    """Whether a driver uses a disk whose MSI-X table is empty.

    The virtio registers are read themselves: `x-query-virtio-status` aborts QEMU 11.1
    (visit_start_struct: Assertion).
    """
    for disk in _disks(await monitor.execute("query-pci")):
        if not disk.common:
            continue
        words = _words(await monitor.hmp(f"xp /6wx 0x{disk.common:x}"))
        if len(words) == 6 and words[5] & _DRIVER_OK:
            table = await monitor.hmp(f"xp /{disk.table_bytes // 4}wx 0x{disk.table:x}")
            if not list(_messages(table)):
                return True
    return False


def _disks(buses: list[dict[str, Any]]) -> Iterator[_Disk]:
    for bus in buses:
        for device in bus["devices"]:
            if bridge := device.get("pci_bridge"):
                yield from _disks([{"devices": bridge.get("devices", [])}])
            if device["id"]["vendor"] == _VIRTIO and device["id"]["device"] in _DISKS:
                # -1 (or all ones) is an address that the guest has not given yet.
                bars = {
                    region["bar"]: (region["address"], region["size"])
                    for region in device["regions"]
                    if 0 < region["address"] < 1 << 52
                }
                # The table takes the first half of its BAR, the pending bits the other.
                table, size = bars.get(_TABLE_BAR, (0, 0))
                yield _Disk(table, size // 2, bars.get(_COMMON_BAR, (0, 0))[0])


def _messages(dump: str) -> Iterator[tuple[int, int]]:
    for low, high, data, _ in zip(*[iter(_words(dump))] * 4, strict=False):
        if low or high:
            yield high << 32 | low, data


def _words(dump: str) -> list[int]:
    """Of HMP's `xp /Nwx`; it stops where there is nothing, behind the table's last entry."""
    return [int(word, 16) for line in dump.splitlines() for word in _WORD.findall(line)]
