"""Descriptors in a state: each is what it was, has one name, and is spoken of."""

from __future__ import annotations

import os
import select
import socket
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from segue.cpr import Descriptor, Identity, Misuse, Reason, Refused, State
from tests.unit.cprkit import Counter, Extra, Lamp, OldLamp, altered, refused


def double(key: str, body: dict[str, Any]) -> None:
    body[key] = body[key] * 2


def test_what_is_not_the_ignored_descriptor_is_not_closed(pipe: tuple[int, int]) -> None:
    data = State(Counter(1), Extra(Descriptor.of("pipe", pipe[0]))).dump()
    os.dup2(pipe[1], pipe[0])
    State.parse(data, Counter).close_ignored()
    assert os.fstat(pipe[0])
    os.close(pipe[0])
    State.parse(data, Counter).close_ignored()


def test_what_an_ignored_section_shares_is_not_closed(pipe: tuple[int, int]) -> None:
    shared = Descriptor.of("pipe", pipe[0])
    loaded = State.parse(State(Lamp(shared), Extra(shared)).dump(), Lamp)
    loaded.close_ignored()
    assert os.fstat(loaded.get(Lamp).socket.fd)


def test_descriptors_are_what_they_were(pipe: tuple[int, int]) -> None:
    data = State(Lamp(Descriptor.of("lamp", pipe[0]))).dump()
    os.set_inheritable(pipe[0], True)
    loaded = State.parse(data, Lamp).get(Lamp)
    assert loaded.socket.fileno() == pipe[0]
    assert not os.get_inheritable(pipe[0])

    other = os.pipe()
    try:
        # Another pipe, another kind, nothing at all under the same number.
        os.dup2(other[0], pipe[0])
        assert "lamp" in refused(Reason.DESCRIPTOR, data, Lamp)
        with socket.socket() as different:
            os.dup2(different.fileno(), pipe[0])
        assert "it was fifo" in refused(Reason.DESCRIPTOR, data, Lamp)
        os.close(pipe[0])
        assert "is closed now" in refused(Reason.DESCRIPTOR, data, Lamp)
    finally:
        for fd in other:
            os.close(fd)


def test_descriptors_under_other_numbers(pipe: tuple[int, int]) -> None:
    data = State(Lamp(Descriptor.of("lamp", pipe[0]))).dump()
    elsewhere = os.dup(pipe[0])
    try:
        loaded = State.parse(data, Lamp, descriptors={"lamp": elsewhere})
        assert loaded.get(Lamp).socket.fd == elsewhere
        refused(Reason.DESCRIPTOR, data, Lamp, descriptors={"lamp": pipe[1] + 1000})
        refused(Reason.DESCRIPTOR, data, Lamp, descriptors={})
        two = {"lamp": elsewhere, "stray": pipe[1]}
        assert "stray" in refused(Reason.LEFT_OVER, data, Lamp, descriptors=two)
    finally:
        os.close(elsewhere)


def test_a_descriptor_that_no_section_speaks_of(pipe: tuple[int, int]) -> None:
    data = State(Lamp(Descriptor.of("lamp", pipe[0])), Counter(1)).dump()

    def lose(body: dict[str, Any]) -> None:
        del body["sections"][0]

    assert "lamp" in refused(Reason.LEFT_OVER, altered(data, lose), Counter)


def test_a_descriptor_that_is_spoken_of_but_not_there(pipe: tuple[int, int]) -> None:
    data = State(Lamp(Descriptor.of("lamp", pipe[0]))).dump()
    gone = altered(data, lambda body: body.update(descriptors=[]))
    assert "lamp did not come along" in refused(Reason.DESCRIPTOR, gone, Lamp)


def test_two_for_one_name(pipe: tuple[int, int]) -> None:
    read, write = Descriptor.of("pipe", pipe[0]), Descriptor.of("pipe", pipe[1])
    with pytest.raises(Refused) as error:
        State(Lamp(read), Extra(write)).dump()
    assert error.value.reason is Reason.TWICE
    with pytest.raises(Refused) as error:
        State(Lamp(read), Extra(Descriptor.of("same", pipe[0]))).dump()
    assert error.value.reason is Reason.TWICE
    with pytest.raises(Misuse):
        State(Lamp(read), OldLamp(read))

    data = State(Lamp(read)).dump()
    for key in ("sections", "descriptors"):
        twice = altered(data, partial(double, key))
        refused(Reason.TWICE, twice, Lamp)


def test_a_closed_descriptor_is_not_saved() -> None:
    with pytest.raises(Refused) as error:
        State(Lamp(Descriptor.of("lamp", 999))).dump()
    assert error.value.reason is Reason.DESCRIPTOR


def test_every_kind_of_descriptor_is_itself_and_no_other(tmp_path: Path) -> None:
    def terminal() -> tuple[int, ...]:
        return os.openpty()

    def file(name: str) -> int:
        return os.open(tmp_path / name, os.O_CREAT)

    children = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    make: dict[str, Callable[[int], tuple[int, ...]]] = {
        "socket": lambda _: (socket.socket().detach(),),
        "file": lambda n: (file(f"file{n}"),),
        "memfd": lambda _: (os.memfd_create("same"),),
        "directory": lambda n: (os.open("/" if n else "/proc", os.O_RDONLY),),
        "fifo": lambda _: os.pipe(),
        "pty": lambda _: terminal(),
        "pidfd": lambda n: (os.pidfd_open(children[n].pid),),
        "eventfd": lambda _: (os.eventfd(0),),
    }
    with ExitStack() as stack:
        seen: dict[int, Identity] = {}
        for kind in make.values():
            for number in range(2):
                for fd in kind(number):
                    stack.callback(os.close, fd)
                    seen[fd] = Identity.of(fd)
        for fd, identity in seen.items():
            again = os.dup(fd)
            stack.callback(os.close, again)
            assert Identity.of(again).same_as(identity)
            assert [f for f, other in seen.items() if other.same_as(identity)] == [fd]
        # A pidfd stays what it is when its process has been reaped.
        [first, second] = [fd for fd, identity in seen.items() if identity.kind == "pidfd"]
        for child in children:
            child.kill()
            child.wait()
        assert Identity.of(first).same_as(seen[first])
        assert select.select([second], [], [], 10)[0]


def test_what_hides_bytes_is_refused_with_a_hint() -> None:
    import asyncio
    import ssl

    async def open_streams() -> None:
        left, right = socket.socketpair()
        _reader, writer = await asyncio.open_connection(sock=left)
        server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
        for hider in (writer, writer.transport, server):
            with pytest.raises(Refused) as error:
                Descriptor.of("hider", hider)  # type: ignore[arg-type]
            assert error.value.reason is Reason.NOT_KEEPABLE
            assert "segue.cpr.aio" in (error.value.hint or "")
        server.close()
        writer.close()
        await writer.wait_closed()
        right.close()

    asyncio.run(open_streams())
    context = ssl.create_default_context()
    plain, peer = socket.socketpair()
    with context.wrap_socket(plain, do_handshake_on_connect=False, server_hostname="x") as hidden:
        with pytest.raises(Refused) as error:
            Descriptor.of("tls", hidden)
    assert error.value.reason is Reason.NOT_KEEPABLE
    peer.close()
