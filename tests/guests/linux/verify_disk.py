"""Reads back, after power-off, what `guest disk` wrote; shares no code with it.

    python3 verify_disk.py RAW-IMAGE [ACKNOWLEDGED]

The block format stands at the top of guest.c. What must hold: each place of the sequence holds
the newest block that belongs there, of one run, with a right checksum, and no block that the
guest was told is on the disk is missing.
"""

from __future__ import annotations

import struct
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

BLOCK = 4096
HEADER = struct.Struct("<8sQQQII")
MAGIC = b"SEGUEBL1"


class BadDisk(Exception):
    """The image does not hold what the guest wrote; says which block and how."""


@dataclass(frozen=True)
class Verified:
    blocks: int  # how many there are in the sequence's newest part that were looked at
    newest: int  # sequence number of the last one
    seed: int  # tells the run that wrote them


def verify(image: Path, acknowledged: int = 0) -> Verified:
    """Verifies a raw image. `acknowledged` is the last N of the guest's `disk DEVICE N ok`.

    Raises BadDisk.
    """
    with image.open("rb") as disk:
        # The first place was written first, by the newest run: its seed is that run's.
        _, seed, count = _header(disk.read(BLOCK), 0)
        disk.seek(0)
        found: list[int | None] = []
        for place in range(count):
            block = disk.read(BLOCK)
            # Places that this run had not reached hold what was there before.
            mine = block[:8] == MAGIC and HEADER.unpack_from(block)[2] == seed
            found.append(_header(block, place)[0] if mine else None)

    newest = max(sequence for sequence in found if sequence is not None)
    if newest + 1 < acknowledged:
        raise BadDisk(f"{acknowledged} blocks were acknowledged, the newest here is {newest}")
    for place, sequence in enumerate(found):
        # Every `count`-th block lands here: the last of them that is not newer than `newest`.
        expected = newest - (newest - place) % count if place <= newest else None
        if sequence != expected:
            raise BadDisk(f"place {place} holds block {sequence} instead of {expected}")
    return Verified(blocks=min(newest + 1, count), newest=newest, seed=seed)


def _header(block: bytes, place: int) -> tuple[int, int, int]:
    magic, sequence, seed, count, _, crc = HEADER.unpack_from(block.ljust(BLOCK, b"\0"))
    if magic != MAGIC:
        raise BadDisk(f"place {place} holds no block of the sequence")
    if zlib.crc32(block[:36] + bytes(4) + block[40:]) != crc:
        raise BadDisk(f"block {sequence} at place {place} has a wrong checksum")
    return sequence, seed, count


if __name__ == "__main__":
    try:
        print(verify(Path(sys.argv[1]), *map(int, sys.argv[2:3])))
    except (BadDisk, OSError) as error:
        sys.exit(f"verify_disk: {error}")
