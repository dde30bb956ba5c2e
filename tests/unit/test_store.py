"""What is given to systemd's descriptor store, and what a later process makes of it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from typing import cast

import pytest

from segue.cpr.systemd import Notifier
from segue.saved import Saver
from segue.store import Store


class Systemd:
    """`full`: it reads nothing at the moment."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.full = False

    def store(self, name: str, descriptors: Sequence[int], *, poll: bool) -> bool:
        assert not poll
        assert len(descriptors) == 1
        return self._hear(f"store {name}")

    def remove(self, name: str) -> bool:
        return self._hear(f"remove {name}")

    def barrier(self) -> bool:
        return self._hear("barrier")

    def _hear(self, what: str) -> bool:
        if not self.full:
            self.told.append(what)
        return not self.full

    def heard(self) -> list[str]:
        heard, self.told = self.told, []
        return heard


@pytest.fixture
def socks() -> Iterator[list[socket.socket]]:
    made = [socket.socket() for _ in range(3)]
    yield made
    for sock in made:
        sock.close()


def held(**socks: socket.socket) -> Saver:
    saver = Saver(exact=False)
    for name, sock in socks.items():
        saver.fd(f"kept0.{name}", sock.fileno(), outlives=True)
    saver.fd("memory", 0, lent=True)
    return saver


def made(passed: dict[str, int] | None = None) -> tuple[Store, Systemd]:
    systemd = Systemd()
    return Store(cast(Notifier, systemd), passed or {}), systemd


def test_what_comes_and_goes(socks: list[socket.socket]) -> None:
    one, other, third = socks
    store, systemd = made()
    assert not store.open("0123abcd").found
    store.keep(held(a=one, b=other))
    assert sorted(systemd.heard()) == ["store 0123abcd.kept0.a", "store 0123abcd.kept0.b"]
    store.keep(held(a=one, b=other))
    assert systemd.heard() == []
    # Another one under its name.
    store.keep(held(a=third, b=other))
    assert systemd.heard() == ["remove 0123abcd.kept0.a", "store 0123abcd.kept0.a"]
    store.keep(held(b=other))
    assert systemd.heard() == ["remove 0123abcd.kept0.a"]
    store.clear()
    assert systemd.heard() == ["remove 0123abcd.kept0.b"]


def test_what_could_not_be_told_is_told_later(socks: list[socket.socket]) -> None:
    one, other, _ = socks
    store, systemd = made()
    store.open("0123abcd")
    systemd.full = True
    store.keep(held(a=one))
    systemd.full = False
    store.keep(held(a=one))
    assert systemd.heard() == ["store 0123abcd.kept0.a"]
    systemd.full = True
    store.keep(held(a=other))
    systemd.full = False
    store.keep(held(a=other))
    assert systemd.heard() == ["remove 0123abcd.kept0.a", "store 0123abcd.kept0.a"]


def test_what_is_passed_is_ours_or_let_go_of(socks: list[socket.socket]) -> None:
    one, other, third = socks
    mine, foreign, given = os.dup(one.fileno()), os.dup(other.fileno()), third.fileno()
    store, systemd = made(
        {"0123abcd.kept0.a": mine, "12345678.kept0.a": foreign, "web.socket": given}
    )
    assert store.open("0123abcd").fd("kept0.a") == mine
    assert systemd.heard() == ["remove 12345678.kept0.a", "barrier"]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(foreign)
    # From a socket unit, for `fd=N`.
    assert os.fstat(given)
    # It is there already.
    with socket.socket(fileno=mine) as again:
        store.keep(held(a=again))
    assert systemd.heard() == []


def test_other_code_in_the_same_process_goes_on(socks: list[socket.socket]) -> None:
    one, other, _ = socks
    store, _ = made()
    store.open("0123abcd")
    store.keep(held(a=one, b=other))
    later, systemd = made()
    later.load(store.save(), "0123abcd")
    later.keep(held(b=other))
    assert systemd.heard() == ["remove 0123abcd.kept0.a"]


def test_without_systemd_nothing_is_kept(socks: list[socket.socket]) -> None:
    store = Store()
    assert not store.used
    assert not store.open("0123abcd").found
    store.keep(held(a=socks[0]))
    store.clear()
    assert store.save() == {}
