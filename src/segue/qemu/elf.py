"""What Segue reads of an ELF file: whether it is a program, and its GNU build id.

Only the headers are read, so a file of 30 MB costs three small reads. What is not ELF, or is
damaged, is `None` and never an exception: the files are the user's.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

_ET_EXEC, _ET_DYN = 2, 3
_PT_DYNAMIC, _PT_NOTE = 2, 4
_NT_GNU_BUILD_ID = 3
_DT_FLAGS_1, _DF_1_PIE = 0x6FFFFFFB, 0x08000000
# Larger than any real one; a damaged header must not make us read gigabytes.
_MAX_SEGMENT = 1 << 20


@dataclass(frozen=True)
class Elf:
    """`program`: it can be executed by itself, which neither a library nor ld.so is meant for.

    Libraries are ET_DYN as programs are, and libc has an interpreter as programs have; what only
    a program has is the linker's flag DF_1_PIE, or the type ET_EXEC.
    """

    program: bool
    build_id: str | None


@dataclass(frozen=True)
class _Segment:
    kind: int
    offset: int
    size: int


def read(path: Path | str) -> Elf | None:
    """None if the file cannot be read, is not ELF, or is damaged."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return _parse(fd)
    except (OSError, OverflowError, struct.error):
        return None
    finally:
        os.close(fd)


def build_id(path: Path | str) -> str | None:
    elf = read(path)
    return elf.build_id if elf else None


def _parse(fd: int) -> Elf | None:
    head = os.pread(fd, 64, 0)
    if len(head) < 52 or head[:4] != b"\x7fELF" or head[4] not in (1, 2) or head[5] not in (1, 2):
        return None
    wide, order = head[4] == 2, "<" if head[5] == 1 else ">"
    kind = struct.unpack_from(order + "H", head, 16)[0]
    segments = _segments(fd, head, wide, order)
    identity = None
    flags = 0
    for segment in segments:
        if segment.size > _MAX_SEGMENT:
            continue
        if segment.kind == _PT_NOTE and identity is None:
            identity = _build_id(os.pread(fd, segment.size, segment.offset), order)
        elif segment.kind == _PT_DYNAMIC:
            flags = _flags_1(os.pread(fd, segment.size, segment.offset), wide, order)
    program = kind == _ET_EXEC or (kind == _ET_DYN and bool(flags & _DF_1_PIE))
    return Elf(program, identity)


def _segments(fd: int, head: bytes, wide: bool, order: str) -> list[_Segment]:
    table = struct.unpack_from(order + ("Q" if wide else "I"), head, 32 if wide else 28)[0]
    entry, count = struct.unpack_from(order + "HH", head, 54 if wide else 42)
    if entry != (56 if wide else 32):
        return []
    data = os.pread(fd, entry * count, table)
    segments = []
    for at in range(0, entry * count, entry):
        if wide:
            kind, _, offset, _, _, size = struct.unpack_from(order + "IIQQQQ", data, at)
        else:
            kind, offset, _, _, size = struct.unpack_from(order + "IIIII", data, at)
        segments.append(_Segment(kind, offset, size))
    return segments


def _build_id(notes: bytes, order: str) -> str | None:
    at = 0
    while at + 12 <= len(notes):
        name_size, size, kind = struct.unpack_from(order + "III", notes, at)
        name = notes[at + 12 : at + 12 + name_size]
        start = at + 12 + (name_size + 3 & ~3)
        if kind == _NT_GNU_BUILD_ID and name == b"GNU\0" and 0 < size <= len(notes) - start:
            return notes[start : start + size].hex()
        at = start + (size + 3 & ~3)
    return None


def _flags_1(dynamic: bytes, wide: bool, order: str) -> int:
    pair = struct.Struct(order + ("QQ" if wide else "II"))
    for tag, value in pair.iter_unpack(dynamic[: len(dynamic) // pair.size * pair.size]):
        if tag == _DT_FLAGS_1:
            return int(value)
    return 0
