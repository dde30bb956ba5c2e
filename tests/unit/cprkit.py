"""Sections to save, and states as another process gets them, or gets them altered."""

from __future__ import annotations

import asyncio
import json
import os
import struct
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest

from segue.cpr import Descriptor, Reason, Refused, State, entries, section


@section("lamp", version=3, oldest=2)
@dataclass(frozen=True)
class Lamp:
    socket: Descriptor
    brightness: int = 0


@section("lamp", version=2)
@dataclass(frozen=True)
class OldLamp:
    socket: Descriptor


@section("lamp", version=1)
@dataclass(frozen=True)
class AncientLamp:
    socket: Descriptor


@section("extra", version=1, optional=True)
@dataclass(frozen=True)
class Extra:
    pipe: Descriptor


@section("extra", version=2, optional=True)
@dataclass(frozen=True)
class NewerExtra:
    pipe: Descriptor
    more: int


@section("counter", version=1)
@dataclass(frozen=True)
class Counter:
    count: int


def refused(reason: Reason, data: bytes, *kinds: type[Any], **more: Any) -> str:
    with pytest.raises(Refused) as error:
        State.parse(data, *kinds, **more)
    assert error.value.reason is reason, error.value
    return str(error.value)


def altered(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """The state as somebody else would write it: its body changed, its checksum right."""
    body = json.loads(data[24:])
    change(body)
    encoded = json.dumps(body).encode()
    header = struct.Struct("<8sIIQ")
    checksum = zlib.crc32(encoded, zlib.crc32(header.pack(b"SegueCPR", 1, 0, len(encoded))))
    return header.pack(b"SegueCPR", 1, checksum, len(encoded)) + encoded


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(limited())


def moved(state: State, *kinds: type) -> State:
    """What another process would get: the same things under other numbers."""
    data = state.dump()
    numbers = {entry.name: os.dup(entry.fd) for entry in entries(data)}
    return State.parse(data, *kinds, descriptors=numbers)
