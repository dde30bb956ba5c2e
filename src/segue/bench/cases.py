"""What is to be compared: each case is one machine that is measured again and again."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

PLAIN = "plain"
"""The way that is no mode of Segue's: QEMU alone, told by us what to do."""

DISK_MIB = 512
"""What Load.DISK leaves unflushed."""


class Load(StrEnum):
    """What the guest does besides beating.

    DIRTY rewrites a quarter of its memory all the time. DISK has written 512 MiB to its disk, which
    QEMU has taken and nobody has flushed, when the upgrade begins. NET answers 500 pings a second.
    """

    IDLE = "idle"
    DIRTY = "dirty"
    DISK = "disk"
    NET = "net"


@dataclass(frozen=True)
class Case:
    """`way` is a mode of `segue upgrade`, or PLAIN; `ram` is in bytes."""

    way: str
    old: Path
    new: Path
    ram: int
    load: Load

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"old": str(self.old), "new": str(self.new)}


def combine(
    ways: Iterable[str],
    pairs: Iterable[tuple[Path, Path]],
    rams: Iterable[int],
    loads: Iterable[Load],
) -> list[Case]:
    """Every combination; the ways next to each other, since they are what is compared.

    But for PLAIN with a network: a second QEMU would make a second tap, which nobody pings.
    """
    return [
        Case(way, old, new, ram, load)
        for (old, new), ram, load, way in itertools.product(pairs, rams, loads, ways)
        if way != PLAIN or load is not Load.NET
    ]
