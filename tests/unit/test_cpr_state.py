"""A state: what goes in comes out, and whatever is not as it was is refused with its reason."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import subprocess
import sys
import zlib
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from typing import Any, Self

import pytest
from hypothesis import given
from hypothesis import strategies as st

import segue.cpr
from segue.cpr import (
    Descriptor,
    Misuse,
    Reason,
    Refused,
    State,
    entries,
    section,
)
from tests.unit.cprkit import (
    AncientLamp,
    Counter,
    Extra,
    Lamp,
    NewerExtra,
    OldLamp,
    altered,
    refused,
)


class Colour(Enum):
    RED = "red"
    BLUE = 2


@dataclass(frozen=True)
class Peer:
    name: str
    unread: bytes
    link: Descriptor | None = None


@section("everything", version=1)
@dataclass(frozen=True)
class Everything:
    truth: bool
    number: int
    real: float
    text: str
    data: bytes
    maybe: int | None
    many: tuple[int, ...]
    pair: tuple[str, float]
    named: dict[str, bytes]
    colour: Colour
    peers: tuple[Peer, ...]
    plain: Any


@section("hooked", version=2, oldest=1, priority=10)
@dataclass(frozen=True)
class Hooked:
    count: int
    since: int

    def pre_save(self) -> Self:
        return replace(self, count=self.count + 1)

    @classmethod
    def pre_load(cls, fields: dict[str, Any], version: int) -> dict[str, Any]:
        return {"count": fields["seen"], "since": version}

    def post_load(self, version: int) -> Self:
        if self.count > 100:
            raise ValueError("counts too far")
        return replace(self, count=self.count + 10)


@section("hooked", version=1)
@dataclass(frozen=True)
class OldHooked:
    seen: int


def put(key: str, value: Any, body: dict[str, Any]) -> None:
    body[key] = value


TEXT = st.text(max_size=8) | st.binary(max_size=8).map(os.fsdecode)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT
PLAIN = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
PEERS = st.builds(Peer, TEXT, st.binary(max_size=40))
EVERYTHING = st.builds(
    Everything,
    truth=st.booleans(),
    number=st.integers(),
    real=st.floats(allow_nan=False),
    text=TEXT,
    data=st.binary(max_size=300),
    maybe=st.none() | st.integers(),
    many=st.lists(st.integers(), max_size=5).map(tuple),
    pair=st.tuples(TEXT, st.floats(allow_nan=False)),
    named=st.dictionaries(TEXT, st.binary(max_size=9), max_size=4),
    colour=st.sampled_from(Colour),
    peers=st.lists(PEERS, max_size=3).map(tuple),
    plain=PLAIN,
)


@given(EVERYTHING)
def test_what_goes_in_comes_out(value: Everything) -> None:
    state = State(value, Counter(3))
    loaded = State.parse(state.dump(), Counter, Everything)
    assert loaded.get(Everything) == value
    assert loaded == state
    assert loaded.dump() == state.dump()


@given(st.binary(max_size=200))
def test_whatever_bytes_are_refused_and_nothing_else_happens(data: bytes) -> None:
    for attempt in (data, b"SegueCPR" + data, State(Counter(1)).dump() + data + b"!"):
        with pytest.raises(Refused):
            State.parse(attempt, Counter)


@given(PLAIN)
def test_a_body_of_any_shape_is_refused(shape: Any) -> None:
    valid = State(Counter(1)).dump()
    for key in ("descriptors", "sections", "back"):
        data = altered(valid, partial(put, key, shape))
        try:
            loaded = State.parse(data, Counter)
        except Refused:
            continue
        assert loaded == State(Counter(1))


@given(PLAIN)
def test_fields_of_any_shape_are_refused(shape: Any) -> None:
    def change(body: dict[str, Any]) -> None:
        body["sections"][0]["fields"] = shape

    if not (isinstance(shape, dict) and shape.keys() == {"count"}):
        refused(Reason.FIELDS, altered(State(Counter(1)).dump(), change), Counter)


def test_every_byte_flipped_and_every_length_truncated() -> None:
    data = State(Counter(1), Hooked(2, 3)).dump()
    for position in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            with pytest.raises(Refused):
                State.parse(bytes(flipped), Counter, Hooked)
    for length in range(len(data)):
        with pytest.raises(Refused) as error:
            State.parse(data[:length], Counter, Hooked)
        assert error.value.reason is Reason.TRUNCATED


def test_each_damage_has_its_own_reason() -> None:
    data = State(Counter(1)).dump()
    refused(Reason.FOREIGN, b"\x7fELF" + data[4:], Counter)
    refused(Reason.FORMAT, data[:8] + b"\x02" + data[9:], Counter)
    refused(Reason.ALTERED, data[:-1] + b" ", Counter)
    refused(Reason.ALTERED, data + b" ", Counter)
    refused(Reason.ALTERED, altered(data, lambda body: body.pop("sections")), Counter)


def test_saved_in_a_memfd_that_nobody_can_change() -> None:
    fd = State(Counter(5)).save()
    try:
        assert not os.get_inheritable(fd)
        for change in (
            lambda: os.pwrite(fd, b"x", 0),
            lambda: os.ftruncate(fd, 1),
            lambda: os.ftruncate(fd, 1 << 20),
            lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
        ):
            with pytest.raises(PermissionError):
                change()
        # Whoever read it before us moved the offset.
        os.lseek(fd, 7, os.SEEK_SET)
        assert State.load(fd, Counter).get(Counter) == Counter(5)
    finally:
        os.close(fd)


def test_no_file_holds_no_state() -> None:
    with socket.socket() as lonely, pytest.raises(Refused) as error:
        State.load(lonely.fileno(), Counter)
    assert error.value.reason is Reason.FOREIGN


def test_sections_that_are_unknown_or_missing() -> None:
    assert "counter is unknown" in refused(Reason.UNKNOWN_SECTION, State(Counter(1)).dump())
    assert "hooked" in refused(Reason.MISSING, State(Counter(1)).dump(), Counter, Hooked)


def test_versions(pipe: tuple[int, int]) -> None:
    read = Descriptor.of("lamp", pipe[0])
    newest = State(Lamp(read, 7)).dump()
    assert "version 3; this code knows 2 to 2" in refused(Reason.TOO_NEW, newest, OldLamp)
    loaded = State.parse(State(OldLamp(read)).dump(), Lamp).get(Lamp)
    assert loaded == Lamp(read, brightness=0)
    ancient = State(AncientLamp(read)).dump()
    assert "version 1; this code knows 2 to 3" in refused(Reason.TOO_OLD, ancient, Lamp)


def test_a_field_of_the_same_version_that_is_missing_or_unknown() -> None:
    data = State(Counter(1)).dump()

    def rename(body: dict[str, Any]) -> None:
        body["sections"][0]["fields"] = {"number": 1}

    def lose(body: dict[str, Any]) -> None:
        body["sections"][0]["fields"] = {}

    assert "number" in refused(Reason.FIELDS, altered(data, rename), Counter)
    assert "count" in refused(Reason.FIELDS, altered(data, lose), Counter)


def test_hooks_see_the_version_that_was_written() -> None:
    assert State.parse(State(Hooked(1, 0)).dump(), Hooked).get(Hooked) == Hooked(12, 0)
    assert State.parse(State(OldHooked(5)).dump(), Hooked).get(Hooked) == Hooked(15, 1)


def test_a_hook_that_fails_refuses() -> None:
    message = refused(Reason.HOOK, State(Hooked(100, 0)).dump(), Hooked)
    assert "section hooked: post_load" in message
    assert "counts too far" in message

    def lose(body: dict[str, Any]) -> None:
        body["sections"][0]["fields"] = {}

    message = refused(Reason.HOOK, altered(State(OldHooked(5)).dump(), lose), Hooked)
    assert "pre_load" in message


LOADED: list[str] = []


@section("late", version=1, priority=-1)
@dataclass(frozen=True)
class Late:
    def post_load(self, version: int) -> Self:
        LOADED.append("late")
        return self


@section("early", version=1, priority=1)
@dataclass(frozen=True)
class Early:
    def post_load(self, version: int) -> Self:
        LOADED.append("early")
        return self


@section("usual", version=1)
@dataclass(frozen=True)
class Usual:
    def post_load(self, version: int) -> Self:
        LOADED.append("usual")
        return self


def test_sections_are_loaded_by_priority() -> None:
    LOADED.clear()
    State.parse(State(Late(), Usual(), Early()).dump(), Usual, Late, Early)
    assert LOADED == ["early", "usual", "late"]


def test_an_optional_section_is_ignored_by_those_who_do_not_know_it(
    pipe: tuple[int, int],
) -> None:
    extra = Descriptor.of("pipe", pipe[0])
    for saved, kinds in (
        (State(Counter(1), Extra(extra)), [Counter]),
        (State(Counter(1), NewerExtra(extra, 2)), [Counter, Extra]),
    ):
        loaded = State.parse(saved.dump(), *kinds)
        assert loaded.get(Counter) == Counter(1)
        assert loaded.find(Extra) is None
        assert entries(saved.dump())[0].name == "pipe"
    os.fstat(pipe[0])
    loaded.close_ignored()
    with pytest.raises(OSError):
        os.fstat(pipe[0])
    assert State.parse(State(Counter(1)).dump(), Counter, Extra).find(Extra) is None


@section("anything", version=1)
@dataclass(frozen=True)
class Anything:
    value: Any = None
    number: int = 0
    mapping: dict[str, int] = field(default_factory=dict)


@pytest.mark.parametrize(
    "wrong",
    [
        Anything(value=b"bytes"),
        Anything(value=(1, 2)),
        Anything(value={1: 2}),
        Anything(value=[{"a": {1, 2}}]),
        Anything(number=True),
        Anything(number="1"),  # type: ignore[arg-type]
        Anything(mapping={1: 1}),  # type: ignore[dict-item]
        Anything(mapping={"a": "b"}),  # type: ignore[dict-item]
    ],
)
def test_values_that_would_come_back_as_something_else(wrong: Anything) -> None:
    with pytest.raises(Misuse, match="section anything"):
        State(wrong).dump()


def test_too_deep_is_a_mistake_not_a_crash() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(Misuse, match="deeper"):
        State(Anything(value=deep)).dump()
    nested = b'{"sections":' + b"[" * 100_000
    header = struct.Struct("<8sIIQ")
    checksum = zlib.crc32(nested, zlib.crc32(header.pack(b"SegueCPR", 1, 0, len(nested))))
    refused(Reason.ALTERED, header.pack(b"SegueCPR", 1, checksum, len(nested)) + nested, Counter)


def test_mistakes_of_a_declaration() -> None:
    with pytest.raises(Misuse, match="frozen"):
        section("thawed", version=1)(type("Thawed", (), {}))
    with pytest.raises(Misuse, match="make no sense"):
        section("backwards", version=1, oldest=2)
    with pytest.raises(Misuse, match="not declared"):
        State("no section")
    with pytest.raises(Misuse, match="no section counter"):
        State().get(Counter)


def test_the_public_surface() -> None:
    public = {name for name in vars(segue.cpr) if not name.startswith("_")}
    modules = {name for name in public if isinstance(vars(segue.cpr)[name], type(sys))}
    assert public - modules == set(segue.cpr.__all__)
    assert segue.cpr.__all__ == [
        "Arrival",
        "CprError",
        "Descriptor",
        "Entry",
        "ExecFailed",
        "How",
        "Identity",
        "Misuse",
        "NoAnswer",
        "Question",
        "Reason",
        "Refused",
        "State",
        "TransferFailed",
        "ask",
        "entries",
        "receive",
        "restart",
        "resumed",
        "section",
        "transfer",
    ]


def test_it_imports_nothing_of_segue_and_little_of_python() -> None:
    code = (
        "import sys, segue.cpr; "
        "print([m for m in sys.modules if m.startswith('segue') and 'cpr' not in m], "
        "[m for m in ('asyncio', 'hashlib', 'ssl', 'ctypes') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['segue'] []\n"
