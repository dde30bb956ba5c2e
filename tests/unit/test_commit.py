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
from segue.upgrade.commit import Commit
from segue.upgrade.surroundings import Surroundings

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


class Told:
    """What `cont` was sent to."""

    def __init__(self, successor: Successor) -> None:
        self.successor = successor
        self.limbo: list[GuestLost] = []
        surroundings = SimpleNamespace(on_limbo=self.limbo.append)
        commit = Commit(cast(Instance, successor), cast(Surroundings, surroundings), 0.01)
        successor.told = commit.told
        self.answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.outcome = asyncio.ensure_future(commit.outcome(self.answer))


async def in_limbo(told: Told) -> None:
    while not told.limbo:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    assert told.successor.done[-1] == "continued"
    assert "killed" not in told.successor.done


def test_an_answer_is_an_answer() -> None:
    async def test() -> None:
        told = Told(Successor())
        told.answer.set_result(REPLY)
        assert await told.outcome == REPLY
        assert not told.successor.done

    asyncio.run(test())


@pytest.mark.parametrize("ran", [False, True])
def test_it_dies(ran: bool) -> None:
    async def test() -> None:
        told = Told(Successor())
        if ran:
            told.successor.told.append(RESUME)
        told.answer.set_exception(MonitorClosed("closed"))
        with pytest.raises(GuestLost if ran else InstanceDied):
            await told.outcome

    asyncio.run(test())


def test_it_hangs_before_it_ran_the_guest() -> None:
    async def test() -> None:
        told = Told(Successor())
        with pytest.raises(TimedOut):
            await told.outcome
        assert told.successor.done == ["stopped", "killed"]
        assert not told.limbo

    asyncio.run(test())


def test_it_hangs_when_it_may_run_the_guest() -> None:
    """Nobody kills it, nobody else runs the guest; an answer that comes late counts."""

    async def test() -> None:
        told = Told(Successor([RESUME]))
        await in_limbo(told)
        told.answer.set_result(REPLY)
        assert await told.outcome == REPLY

    asyncio.run(test())


def test_it_hangs_and_dies_when_it_ran_the_guest() -> None:
    async def test() -> None:
        told = Told(Successor([RESUME]))
        await in_limbo(told)
        told.answer.set_exception(MonitorClosed("closed"))
        with pytest.raises(GuestLost):
            await told.outcome

    asyncio.run(test())


def test_it_cannot_be_stopped() -> None:
    """In an uninterruptible wait, say: there is no proof, until it has died without RESUME."""

    async def test() -> None:
        successor = Successor()
        successor.stops = False
        told = Told(successor)
        await in_limbo(told)
        told.answer.set_exception(MonitorClosed("closed"))
        with pytest.raises(InstanceDied):
            await told.outcome

    asyncio.run(test())
