"""ELF files: made by hand in both widths and byte orders, damaged, and this system's own."""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from segue.qemu import elf

BUILD_ID = bytes(range(20))


def note(order: str, name: bytes, kind: int, content: bytes) -> bytes:
    def padded(data: bytes) -> bytes:
        return data + bytes(-len(data) % 4)

    return (
        struct.pack(order + "III", len(name), len(content), kind) + padded(name) + padded(content)
    )


def image(
    wide: bool = True,
    order: str = "<",
    kind: int = 3,
    flags: int | None = 0x08000001,
    notes: bytes | None = None,
) -> bytes:
    """An ELF file of headers, notes and a dynamic section."""
    if notes is None:
        notes = note(order, b"GNU\0", 1, b"abi-tag!") + note(order, b"GNU\0", 3, BUILD_ID)
    pair = order + ("QQ" if wide else "II")
    dynamic = struct.pack(pair, 5, 1)
    if flags is not None:
        dynamic += struct.pack(pair, 0x6FFFFFFB, flags)
    header, entry = (64, 56) if wide else (52, 32)
    at = header + 2 * entry
    head = b"\x7fELF" + bytes([2 if wide else 1, 1 if order == "<" else 2, 1]) + bytes(9)
    head += struct.pack(
        order + ("HHIQQQIHHHHHH" if wide else "HHIIIIIHHHHHH"),
        *(kind, 62, 1, 0, header, 0, 0, header, entry, 2, 0, 0, 0),
    )
    for segment, offset, size in ((4, at, len(notes)), (2, at + len(notes), len(dynamic))):
        if wide:
            head += struct.pack(order + "IIQQQQQQ", segment, 4, offset, 0, 0, size, size, 4)
        else:
            head += struct.pack(order + "IIIIIIII", segment, offset, 0, 0, size, size, 4, 4)
    return head + notes + dynamic


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("order", ["<", ">"])
def test_every_width_and_byte_order(tmp_path: Path, wide: bool, order: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(image(wide, order))
    assert elf.read(path) == elf.Elf(program=True, build_id=BUILD_ID.hex())


@pytest.mark.parametrize(
    ("kind", "flags", "program"),
    [(2, None, True), (3, 0x08000000, True), (3, 1, False), (3, None, False), (1, None, False)],
)
def test_what_is_a_program(tmp_path: Path, kind: int, flags: int | None, program: bool) -> None:
    path = tmp_path / "file"
    path.write_bytes(image(kind=kind, flags=flags))
    header = elf.read(path)
    assert header is not None
    assert header.program is program


def test_without_a_build_id(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(image(notes=note("<", b"Linux\0", 3, BUILD_ID)))
    assert elf.read(path) == elf.Elf(program=True, build_id=None)


def test_what_is_no_elf_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("#!/bin/sh\nexec qemu-system-x86_64\n")
    assert elf.read(path) is None
    assert elf.read(tmp_path / "missing") is None
    assert elf.read(tmp_path) is None
    os.mkfifo(tmp_path / "pipe")
    assert elf.read(tmp_path / "pipe") is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(st.data())
def test_damaged_files_never_raise(tmp_path: Path, data: st.DataObject) -> None:
    whole = bytearray(image(wide=data.draw(st.booleans())))
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(4, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "file"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    elf.read(path)


def test_this_systems_own_files() -> None:
    python = elf.read(os.path.realpath(sys.executable))
    assert python is not None
    assert python.program
    maps = Path("/proc/self/maps").read_text().splitlines()
    libraries = {line.split()[-1] for line in maps if ".so" in line}
    assert libraries
    for path in libraries:
        header = elf.read(path)
        assert header is not None, path
        assert not header.program, path
