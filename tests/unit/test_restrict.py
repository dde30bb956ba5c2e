"""What a guest that is shut in may send: frames as they are on the wire."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segue.kept.restrict import admits

SYN, ACK, FIN, RST = 2, 16, 1, 4
ARP = b"\x08\x06" + bytes(28)


def ethernet(rest: bytes) -> memoryview:
    return memoryview(bytes(12) + rest)


def ipv4(protocol: int, inner: bytes, fragment: int = 0, options: bytes = b"") -> bytes:
    words = 0x45 + len(options) // 4
    length = 20 + len(options) + len(inner)
    header = struct.pack("!BBHHHBBH8x", words, 0, length, 1, fragment, 64, protocol, 0)
    return b"\x08\x00" + header + options + inner


def ipv6(following: int, inner: bytes) -> bytes:
    header = struct.pack("!IHBB32x", 6 << 28, len(inner), following, 64)
    return b"\x86\xdd" + header + inner


def tcp(flags: int, data: bytes = b"") -> bytes:
    return struct.pack("!HHIIBBHHH", 80, 40000, 1, 1, 0x50, flags, 1000, 0, 0) + data


def udp(port: int) -> bytes:
    return struct.pack("!HHHH", 68, port, 8, 0)


@pytest.mark.parametrize("flags", [ACK, SYN | ACK, FIN | ACK, RST, RST | ACK])
def test_it_answers_and_has_an_address(flags: int) -> None:
    for frame in (
        ipv4(6, tcp(flags, b"data")),
        ipv4(6, tcp(flags), options=bytes(4)),
        ipv4(6, tcp(flags), fragment=0x4000),  # do not fragment
        ipv6(6, tcp(flags)),
        ARP,
        ipv4(17, udp(67)),
        ipv6(17, udp(547)),
        *(ipv6(58, bytes([kind, 0, 0, 0])) for kind in (133, 135, 136)),
    ):
        assert admits(ethernet(frame)), frame


@pytest.mark.parametrize("flags", [SYN, SYN | FIN, SYN | 0xC8])
def test_it_begins_nothing(flags: int) -> None:
    for frame in (
        ipv4(6, tcp(flags)),
        ipv4(6, tcp(flags), options=bytes(8)),
        ipv6(6, tcp(flags)),
        ipv4(17, udp(53)),
        ipv6(17, udp(53)),
        ipv4(1, bytes([8, 0, 0, 0])),
        ipv6(58, bytes([128, 0, 0, 0])),
        ipv4(132, bytes(40)),
    ):
        assert not admits(ethernet(frame)), frame


def test_what_is_not_understood() -> None:
    answer = tcp(ACK)
    for frame in (
        ipv4(6, answer, fragment=0x2000),
        ipv4(6, answer, fragment=1),
        ipv6(44, bytes(8) + answer),
        ipv6(0, bytes(8) + answer),
        b"\x81\x00\x00\x01" + ipv4(6, answer),
        b"\x88\xcc" + bytes(40),
        b"\x08\x00" + b"\x44" + ipv4(6, answer)[3:],
        b"\x08\x00" + b"\x65" + ipv4(6, answer)[3:],
        b"\x86\xdd" + b"\x45" + ipv6(6, answer)[3:],
        ipv4(6, answer[:19]),
        ipv6(58, b""),
    ):
        assert not admits(ethernet(frame)), frame


@given(st.binary(max_size=80))
def test_nothing_makes_it_fail(data: bytes) -> None:
    for frame in (data, bytes(12) + b"\x08\x00" + data, bytes(12) + b"\x86\xdd" + data):
        admits(memoryview(frame))
