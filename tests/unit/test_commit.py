"""A `cont` without a plain answer: undone where the guest provably did not run, and only there.

The successor here is a fake, for what a real one does not do on demand: die or hang just before
or just after it has said RESUME. What a real one does is in tests/qemu/test_faults.py.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from segue.errors import GuestLost, InstanceDied, MonitorClosed, TimedOut
from segue.qemu.instance import Instance
from segue.upgrade.handover import Handover, Surroundings
from segue.upgrade.receipt import Receipt

RESUME = {"event": "RESUME"}
REPLY: dict[str, Any] = {"return": {}}


class Successor:
    """It says `words` when it is stopped, as a QEMU whose last words have not been read yet."""

    def __init__(self, words: list[dict[str, Any]] | None = None) -> None:
        self.words = words or []
        self.done: list[str] = []
        self.told: list[dict[str, Any]] = []
        self.stops = True

    async def hold_still(self) -> None:
        self.done.append("stopped")
        self.told += self.words
        if not self.stops:
            await asyncio.sleep(3600)

    def go_on(self) -> None:
        self.done.append("continued")

    async def kill(self) -> int:
        self.done.append("killed")
        return 137

    async def death(self) -> InstanceDied:
        return InstanceDied("QEMU ended with SIGKILL")


class Commit:
    def __init__(self, successor: Successor) -> None:
        self.successor = successor
        self.limbo: list[GuestLost] = []
        surroundings = SimpleNamespace(on_limbo=self.limbo.append)
        self.handover = Handover(
            incumbent=cast(Instance, None),
            target="x86_64",
            surroundings=cast(Surroundings, surroundings),
            receipt=Receipt(machine="guest", started=0.0),
            limits={"commit": 0.01},
            successor=cast(Instance, successor),
        )
        successor.told = self.handover._told
        self.answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.outcome = asyncio.ensure_future(self.handover._answer_to_cont(self.answer))


async def in_limbo(commit: Commit) -> None:
    while not commit.limbo:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    assert commit.successor.done[-1] == "continued"
    assert "killed" not in commit.successor.done


def test_an_answer_is_an_answer() -> None:
    async def test() -> None:
        commit = Commit(Successor())
        commit.answer.set_result(REPLY)
        assert await commit.outcome == REPLY
        assert not commit.successor.done

    asyncio.run(test())


@pytest.mark.parametrize("ran", [False, True])
def test_it_dies(ran: bool) -> None:
    async def test() -> None:
        commit = Commit(Successor())
        if ran:
            commit.successor.told.append(RESUME)
        commit.answer.set_exception(MonitorClosed("closed"))
        with pytest.raises(GuestLost if ran else InstanceDied):
            await commit.outcome

    asyncio.run(test())


def test_it_hangs_before_it_ran_the_guest() -> None:
    async def test() -> None:
        commit = Commit(Successor())
        with pytest.raises(TimedOut):
            await commit.outcome
        assert commit.successor.done == ["stopped", "killed"]
        assert not commit.limbo

    asyncio.run(test())


def test_it_hangs_when_it_may_run_the_guest() -> None:
    """Nobody kills it, nobody else runs the guest; an answer that comes late counts."""

    async def test() -> None:
        commit = Commit(Successor([RESUME]))
        await in_limbo(commit)
        commit.answer.set_result(REPLY)
        assert await commit.outcome == REPLY

    asyncio.run(test())


def test_it_hangs_and_dies_when_it_ran_the_guest() -> None:
    async def test() -> None:
        commit = Commit(Successor([RESUME]))
        await in_limbo(commit)
        commit.answer.set_exception(MonitorClosed("closed"))
        with pytest.raises(GuestLost):
            await commit.outcome

    asyncio.run(test())


def test_it_cannot_be_stopped() -> None:
    """In an uninterruptible wait, say: there is no proof, until it has died without RESUME."""

    async def test() -> None:
        successor = Successor()
        successor.stops = False
        commit = Commit(successor)
        await in_limbo(commit)
        commit.answer.set_exception(MonitorClosed("closed"))
        with pytest.raises(InstanceDied):
            await commit.outcome

    asyncio.run(test())
