"""Of the transaction, what real QEMUs do not bring about on demand (see tests/qemu)."""

from __future__ import annotations

import asyncio
import gc
import socket
from types import SimpleNamespace
from typing import Any, cast

import pytest

from segue.errors import GuestLost, MonitorClosed, SegueError
from segue.qemu.instance import Instance
from segue.upgrade.cpr_exec import CprExec
from segue.upgrade.handover import Handover
from segue.upgrade.receipt import LOST, TIMED_OUT, Receipt
from segue.upgrade.surroundings import Surroundings


def handover(incumbent: Any = None) -> Handover:
    return Handover(
        incumbent=cast(Instance, incumbent),
        target="x86_64",
        surroundings=cast(Surroundings, None),
        receipt=Receipt("guest", 0.0),
    )


def test_nobody_is_told_that_an_incumbent_died_which_nobody_asks_any_more() -> None:
    """It dies right after STOP, when something else has failed already."""

    def relay(_: Any) -> asyncio.Future[Any]:
        answer = asyncio.get_running_loop().create_future()
        answer.set_exception(MonitorClosed("QEMU's monitor is closed"))
        return answer

    async def test() -> None:
        told: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, what: told.append(what))
        one = handover(SimpleNamespace(monitor=SimpleNamespace(relay=relay)))
        one._migrating = True
        one._incumbent_event({"event": "STOP"})
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        one._stack.close()
        del one
        await asyncio.sleep(0)
        gc.collect()
        assert not told

    asyncio.run(test())


def test_a_time_limit_that_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket's, say: it is undone like any other fault."""

    async def test() -> None:
        one = handover()
        gone_back = []

        async def go_back() -> None:
            gone_back.append(True)

        monkeypatch.setattr(one, "_go_back", go_back)
        await one._fail(TimeoutError())
        assert gone_back
        assert one.receipt.result == TIMED_OUT
        assert one.receipt.error is not None
        assert (
            one.receipt.error["what"] == "the upgrade took longer than its time, in phase prepare"
        )

    asyncio.run(test())


def test_what_has_executed_and_gives_nothing_back_is_ended() -> None:
    """It is no QEMU any more, and without what it had nobody can be one again."""

    async def test() -> None:
        killed = []

        async def kill() -> int:
            killed.append(True)
            return 137

        one = CprExec(
            incumbent=cast(Instance, SimpleNamespace(kill=kill)),
            target="x86_64",
            surroundings=cast(Surroundings, None),
            receipt=Receipt("guest", 0.0),
        )
        one._place = cast(Any, object())
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        theirs.close()
        with ours:
            try:
                one._take_over(ours)
            except SegueError as error:
                await one._fail(error)
        assert killed
        assert one.receipt.result == LOST

    asyncio.run(test())


class Dying:
    """An instance that tells when it is killed."""

    def __init__(self) -> None:
        self.killed = False
        self.monitor = SimpleNamespace(closed=False)

    async def kill(self) -> int:
        self.killed = True
        return 137


def test_a_guest_of_whom_nothing_is_known_is_nobodys() -> None:
    """Neither QEMU is left to run it behind the back of who starts the machine again."""

    async def test() -> None:
        old, new = Dying(), Dying()
        one = handover(old)
        one.successor = cast(Instance, new)
        await one._fail(GuestLost("the successor died", guest="lost"))
        assert old.killed
        assert new.killed
        assert one.receipt.result == LOST

    asyncio.run(test())


@pytest.mark.parametrize("broken", ["journal", "switch"])
def test_no_way_leads_back_once_the_guest_has_run(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Told:
        def __init__(self, *_: Any) -> None:
            pass

        async def run(self) -> float:
            return 0.0

        def switch(self) -> None:
            if broken == "switch":
                raise ZeroDivisionError("a bug")

        def resume_told(self) -> None:
            return None

    def write(phase: str, *_: Any) -> None:
        if broken == "journal" and phase == "release":
            raise OSError(5, "Input/output error")

    async def test() -> None:
        monkeypatch.setattr("segue.upgrade.handover.Commit", Told)
        old, new = Dying(), Dying()
        one = handover(old)
        one.successor = cast(Instance, new)
        one._was_running = True
        served: list[Any] = []
        surroundings = SimpleNamespace(
            kept=(),
            journal=SimpleNamespace(write=write),
            served=lambda instance, _: served.append(instance),
        )
        one.surroundings = cast(Surroundings, surroundings)
        try:
            await one._commit()
        except ZeroDivisionError as error:
            await one._fail(error)
            assert served == [new]
        assert one.receipt.error is None
        assert len(one.receipt.warnings) == 1
        assert not new.killed

    asyncio.run(test())
