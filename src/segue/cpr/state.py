"""A state: sections and named descriptors, and the bytes that they pass as.

| offset | size | what                                                                        |
|--------|------|-----------------------------------------------------------------------------|
| 0      | 8    | magic, `SegueCPR`                                                           |
| 8      | 4    | version of this format, 1                                                   |
| 12     | 4    | CRC-32 of the two fields around it and of the body                          |
| 16     | 8    | length of the body                                                          |
| 24     |      | body: one JSON object, ASCII                                                |

Numbers are little-endian. The body:

    {"descriptors": [{"name", "fd", "kind", "facts"}],                 see descriptor.py
     "sections":    [{"name", "version", "optional", "fields", "descriptors": [NAME]}],
     "back":        {"argv", "env", "mask"} or null}                   see restart.py

A higher version of the format is refused: what may be added without one goes into `fields`, which
have versions of their own. JSON because a person can read it; pickle would run what it reads.
"""

from __future__ import annotations

import binascii
import contextlib
import fcntl
import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from segue.cpr.descriptor import Descriptor, Identity, check
from segue.cpr.errors import Misuse, Reason, Refused
from segue.cpr.section import declaration, pack, unpack

T = TypeVar("T")

FORMAT = 1
_MAGIC = b"SegueCPR"
_HEADER = struct.Struct("<8sIIQ")
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


@dataclass(frozen=True)
class Entry:
    """A descriptor as it was saved: its number then, and what it was."""

    name: str
    fd: int
    identity: Identity


@dataclass(frozen=True)
class Back:
    """How the code that saved the state is executed again, and the signal mask that it had."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    mask: tuple[int, ...]


@dataclass(frozen=True)
class _Saved:
    """A section as it was saved."""

    name: str
    version: int
    optional: bool
    fields: Any
    descriptors: frozenset[str]


class State:
    """Sections, one of a class, with the descriptors that their fields name."""

    def __init__(self, *sections: object) -> None:
        """Raises Misuse for what is no section, and for two of one name."""
        self._sections: dict[str, Any] = {}
        for each in sections:
            self.add(each)
        # Of sections that this code may ignore: closed with `close_ignored`.
        self._ignored: list[int] = []

    def add(self, section: object) -> None:
        name = declaration(type(section)).name
        if name in self._sections:
            raise Misuse(f"two sections are named {name}")
        self._sections[name] = section

    def get(self, kind: type[T]) -> T:
        """Raises Misuse where there is none."""
        found = self.find(kind)
        if found is None:
            raise Misuse(f"the state has no section {declaration(kind).name}")
        return found

    def find(self, kind: type[T]) -> T | None:
        found = self._sections.get(declaration(kind).name)
        return found if isinstance(found, kind) else None

    def save(self) -> int:
        """The state in a sealed memfd, close-on-exec, which the caller closes."""
        return in_memfd(self.dump())

    @classmethod
    def load(cls, fd: int, *kinds: type[Any], descriptors: Mapping[str, int] | None = None) -> Self:
        """The state in `fd`, which stays open; `descriptors` as for `parse`."""
        return cls.parse(read_all(fd), *kinds, descriptors=descriptors)

    def dump(self) -> bytes:
        """The state as bytes. Raises Misuse, or Refused by a section's own hook."""
        return dump(self, None)[0]

    @classmethod
    def parse(
        cls, data: bytes, *kinds: type[Any], descriptors: Mapping[str, int] | None = None
    ) -> Self:
        """The state that `dump` gave, as sections of these kinds. Raises Refused.

        The descriptors are looked for under the numbers that they had; `descriptors` says where
        they are if they have others now. None is closed, and none changes hands, if it is refused.
        """
        return Parsed(data).state(cls, kinds, descriptors)

    def close_ignored(self) -> None:
        """Close what only sections spoke of that this code does not know and may ignore."""
        while self._ignored:
            os.close(self._ignored.pop())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, State) and self._sections == other._sections

    def __repr__(self) -> str:
        return f"State({', '.join(map(repr, self._sections.values()))})"

    def _packed(self) -> tuple[list[dict[str, Any]], list[Descriptor]]:
        named: dict[str, Descriptor] = {}
        packed = []
        for section in _by_priority(self._sections.values()):
            declared = declaration(type(section))
            fields, descriptors = pack(section)
            for each in descriptors:
                if named.setdefault(each.name, each).fd != each.fd:
                    raise Refused(
                        f"two descriptors are named {each.name}: {named[each.name].fd}, {each.fd}",
                        reason=Reason.TWICE,
                    )
            packed.append(
                {
                    "name": declared.name,
                    "version": declared.version,
                    "optional": declared.optional,
                    "fields": fields,
                    "descriptors": sorted({each.name for each in descriptors}),
                }
            )
        return packed, list(named.values())


def entries(data: bytes) -> list[Entry]:
    """The descriptors that go with a state, so that they can be fetched. Raises Refused."""
    return Parsed(data).entries


def dump(state: State, back: Back | None) -> tuple[bytes, list[int]]:
    """A state as bytes, and the numbers of its descriptors."""
    sections, descriptors = state._packed()
    numbers: dict[int, str] = {}
    for each in descriptors:
        other = numbers.setdefault(each.fd, each.name)
        if other != each.name:
            raise Refused(
                f"descriptor {each.fd} has two names, {other} and {each.name}",
                "give each a duplicate of its own (os.dup)",
                Reason.TWICE,
            )
    body = {
        "descriptors": [_entry(each) for each in descriptors],
        "sections": sections,
        "back": None
        if back is None
        else {
            "argv": list(back.argv),
            "env": dict(back.env),
            "mask": list(back.mask),
        },
    }
    encoded = json.dumps(body, separators=(",", ":")).encode("ascii")
    checksum = _checksum(_MAGIC, FORMAT, encoded)
    header = _HEADER.pack(_MAGIC, FORMAT, checksum, len(encoded))
    return header + encoded, [each.fd for each in descriptors]


class Parsed:
    """What the bytes of a state say, before any section is made of it. Raises Refused."""

    def __init__(self, data: bytes) -> None:
        body = _body(data)
        try:
            self.entries = [
                Entry(
                    _is(str, each["name"]),
                    _is(int, each["fd"]),
                    Identity(_is(str, each["kind"]), _is(dict, each["facts"])),
                )
                for each in body["descriptors"]
            ]
            self._sections = [
                _Saved(
                    _is(str, each["name"]),
                    _is(int, each["version"]),
                    _is(bool, each["optional"]),
                    each["fields"],
                    frozenset(each["descriptors"]),
                )
                for each in body["sections"]
            ]
            back = body["back"]
            self.back = (
                None
                if back is None
                else Back(tuple(back["argv"]), _is(dict, back["env"]), tuple(back["mask"]))
            )
        except (LookupError, TypeError, ValueError) as error:
            raise Refused(f"the state is damaged: {error!r}", reason=Reason.ALTERED) from error
        _refuse_two("sections", (saved.name for saved in self._sections))
        _refuse_two("descriptors", (entry.name for entry in self.entries))

    def state(
        self,
        cls: type[S],
        kinds: Iterable[type[Any]],
        descriptors: Mapping[str, int] | None,
    ) -> S:
        known = {declaration(kind).name: kind for kind in kinds}
        taken = self._take(known)
        ignored = self._ignored(taken)
        wanted = [entry for entry in self.entries if entry.name not in ignored]
        numbers = self._check(wanted, ignored, descriptors)
        used: set[str] = set()

        def find(name: str) -> Descriptor:
            if name not in numbers:
                raise Refused(f"descriptor {name} did not come along", reason=Reason.DESCRIPTOR)
            used.add(name)
            return Descriptor(name, numbers[name])

        state = cls()
        for kind in sorted(taken, key=lambda kind: -declaration(kind).priority):
            saved = taken[kind]
            state.add(unpack(kind, saved.fields, saved.version, find))
        for name in numbers.keys() - used:
            raise Refused(f"no section speaks of descriptor {name}", reason=Reason.LEFT_OVER)
        state._ignored = self._still_there(ignored, descriptors)
        for fd in (*numbers.values(), *state._ignored):
            os.set_inheritable(fd, False)
        return state

    def _take(self, known: Mapping[str, type[Any]]) -> dict[type[Any], _Saved]:
        taken: dict[type[Any], _Saved] = {}
        for saved in self._sections:
            kind = known.get(saved.name)
            if kind is None:
                if not saved.optional:
                    raise Refused(
                        f"section {saved.name} is unknown here", reason=Reason.UNKNOWN_SECTION
                    )
                continue
            ours = declaration(kind)
            if saved.version > ours.version:
                if not saved.optional:
                    raise Refused(
                        f"section {ours.name} has version {saved.version}; "
                        f"this code knows {ours.oldest} to {ours.version}",
                        reason=Reason.TOO_NEW,
                    )
                continue
            if saved.version < ours.oldest:
                raise Refused(
                    f"section {ours.name} has version {saved.version}; "
                    f"this code knows {ours.oldest} to {ours.version}",
                    "go there by way of a release that knows both",
                    Reason.TOO_OLD,
                )
            taken[kind] = saved
        for name, kind in known.items():
            if kind not in taken and not declaration(kind).optional:
                raise Refused(f"section {name} is not in the state", reason=Reason.MISSING)
        return taken

    def _ignored(self, taken: Mapping[type[Any], Any]) -> set[str]:
        """The descriptors that none but ignored sections speak of."""
        names = {declaration(kind).name for kind in taken}
        ours: set[str] = set()
        others: set[str] = set()
        for saved in self._sections:
            (ours if saved.name in names else others).update(saved.descriptors)
        return others - ours

    def _still_there(self, ignored: set[str], descriptors: Mapping[str, int] | None) -> list[int]:
        """Those that may be closed: what is something else by now belongs to somebody else."""
        found = []
        numbers = _numbers((each for each in self.entries if each.name in ignored), descriptors)
        for entry in self.entries:
            if entry.name in numbers:
                with contextlib.suppress(Refused):
                    check(entry.name, numbers[entry.name], entry.identity)
                    found.append(numbers[entry.name])
        return found

    def _check(
        self, wanted: list[Entry], ignored: set[str], descriptors: Mapping[str, int] | None
    ) -> dict[str, int]:
        numbers = _numbers(wanted, descriptors)
        for entry in wanted:
            if entry.name not in numbers:
                raise Refused(
                    f"descriptor {entry.name} did not come along", reason=Reason.DESCRIPTOR
                )
            check(entry.name, numbers[entry.name], entry.identity)
        for name in (descriptors or {}).keys() - numbers.keys() - ignored:
            raise Refused(f"the state knows no descriptor {name}", reason=Reason.LEFT_OVER)
        return numbers


S = TypeVar("S", bound=State)


def in_memfd(data: bytes) -> int:
    fd = os.memfd_create("segue-cpr", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_all(fd: int) -> bytes:
    """All of a memfd or a file, wherever its offset is. Raises Refused."""
    try:
        parts = []
        offset = 0
        while part := os.pread(fd, 1 << 20, offset):
            parts.append(part)
            offset += len(part)
    except OSError as error:
        raise Refused(
            f"descriptor {fd} holds no state: {error.strerror}", reason=Reason.FOREIGN
        ) from error
    return b"".join(parts)


def _body(data: bytes) -> dict[str, Any]:
    if not data.startswith(_MAGIC[: len(data)]):
        raise Refused("this is not a state of segue.cpr", reason=Reason.FOREIGN)
    if len(data) < _HEADER.size:
        raise Refused(f"the state ends after {len(data)} bytes", reason=Reason.TRUNCATED)
    magic, version, checksum, length = _HEADER.unpack_from(data)
    if version != FORMAT:
        raise Refused(
            f"the state is of format {version}, this code knows {FORMAT}", reason=Reason.FORMAT
        )
    body = data[_HEADER.size :]
    if len(body) < length:
        raise Refused(
            f"the state ends after {len(body)} of {length} bytes", reason=Reason.TRUNCATED
        )
    if len(body) > length or checksum != _checksum(magic, version, body):
        raise Refused("the state was altered: its checksum differs", reason=Reason.ALTERED)
    try:
        decoded = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the state is damaged: {error}", reason=Reason.ALTERED) from error
    if not isinstance(decoded, dict):
        raise Refused("the state is damaged: it is no object", reason=Reason.ALTERED)
    return decoded


def _checksum(magic: bytes, version: int, body: bytes) -> int:
    return binascii.crc32(body, binascii.crc32(_HEADER.pack(magic, version, 0, len(body))))


def _entry(descriptor: Descriptor) -> dict[str, Any]:
    try:
        identity = Identity.of(descriptor.fd)
    except OSError as error:
        raise Refused(
            f"descriptor {descriptor.name} ({descriptor.fd}): {error.strerror}",
            reason=Reason.DESCRIPTOR,
        ) from error
    return {"name": descriptor.name, "fd": descriptor.fd, **identity.to_plain()}


def _numbers(entries: Iterable[Entry], descriptors: Mapping[str, int] | None) -> dict[str, int]:
    if descriptors is None:
        return {entry.name: entry.fd for entry in entries}
    return {entry.name: descriptors[entry.name] for entry in entries if entry.name in descriptors}


def _is(kind: type[T], value: Any) -> T:
    if type(value) is not kind:
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def _by_priority(sections: Iterable[Any]) -> list[Any]:
    return sorted(sections, key=lambda each: -declaration(type(each)).priority)


def _refuse_two(what: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise Refused(f"two {what} are named {name}", reason=Reason.TWICE)
        seen.add(name)
