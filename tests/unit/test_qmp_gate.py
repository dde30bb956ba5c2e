"""Who passes the gate, when, and in which order."""

from __future__ import annotations

import asyncio

import pytest

from segue.errors import TimedOut
from segue.qmp.gate import MAX_IN_FLIGHT, Gate, Passage, is_read_only
from tests.unit.qmpfakes import run


class Traffic:
    def __init__(self) -> None:
        self.gate = Gate()
        self.started: list[str] = []
        self.passages: dict[str, Passage] = {}

    def enter(self, name: str, read_only: bool = False, out_of_band: bool = False) -> None:
        passage = Passage(name, read_only, lambda: self.started.append(name), out_of_band)
        self.passages[name] = passage
        self.gate.enter(passage)

    def leave(self, name: str) -> None:
        self.gate.leave(self.passages[name])


def test_what_may_not_pass_waits_in_order() -> None:
    traffic = Traffic()
    traffic.gate.close()
    traffic.enter("write 1")
    traffic.enter("read 1", read_only=True)
    traffic.enter("write 2")
    assert traffic.started == []
    traffic.gate.read_only()
    assert traffic.started == ["read 1"]
    traffic.enter("read 2", read_only=True)
    traffic.gate.open()
    assert traffic.started == ["read 1", "read 2", "write 1", "write 2"]


def test_few_are_under_way_at_once() -> None:
    traffic = Traffic()
    for number in range(MAX_IN_FLIGHT + 2):
        traffic.enter(str(number))
    assert len(traffic.started) == MAX_IN_FLIGHT
    traffic.enter("urgent", out_of_band=True)
    assert traffic.started[-1] == "urgent"
    traffic.leave("urgent")
    traffic.leave("0")
    assert traffic.started[-1] == str(MAX_IN_FLIGHT)


def test_out_of_band_waits_while_the_gate_is_closed() -> None:
    traffic = Traffic()
    traffic.gate.close()
    traffic.enter("urgent", out_of_band=True)
    assert traffic.started == []
    traffic.gate.open()
    assert traffic.started == ["urgent"]


def test_drain_waits_for_what_may_not_pass_any_more() -> None:
    async def test() -> None:
        traffic = Traffic()
        traffic.enter("read", read_only=True)
        traffic.enter("write")
        traffic.gate.read_only()
        both = [asyncio.create_task(traffic.gate.drain()) for _ in range(2)]
        await asyncio.sleep(0)
        assert not any(task.done() for task in both)
        traffic.leave("write")
        await asyncio.gather(*both)
        traffic.gate.close()
        drained = asyncio.create_task(traffic.gate.drain())
        await asyncio.sleep(0)
        assert not drained.done()
        traffic.leave("read")
        await drained
        traffic.gate.read_only()
        traffic.enter("read", read_only=True)
        traffic.gate.close()
        drained = asyncio.create_task(traffic.gate.drain())
        await asyncio.sleep(0)
        traffic.gate.read_only()
        await drained

    run(test())


def test_drain_names_whom_it_waited_for() -> None:
    async def test() -> None:
        traffic = Traffic()
        traffic.enter("device_add")
        traffic.gate.close()
        with pytest.raises(TimedOut, match="device_add"):
            await traffic.gate.drain(0.001)

    run(test())


def test_who_is_forgotten_does_not_pass() -> None:
    traffic = Traffic()
    traffic.gate.close()
    traffic.enter("one")
    traffic.enter("two")
    assert traffic.gate.forget(traffic.passages["one"])
    traffic.gate.open()
    assert traffic.started == ["two"]
    assert not traffic.gate.forget(traffic.passages["two"])


@pytest.mark.parametrize(
    ("command", "line", "expected"),
    [
        ("query-status", None, True),
        ("x-query-irq", None, True),
        ("qom-get", None, True),
        ("qom-set", None, False),
        ("device_add", None, False),
        ("cont", None, False),
        ("getfd", None, False),
        ("human-monitor-command", "info block", True),
        ("human-monitor-command", " info\tblock", True),
        ("human-monitor-command", "cont", False),
        ("human-monitor-command", "information", False),
        ("human-monitor-command", "", False),
        ("human-monitor-command", None, False),
    ],
)
def test_read_only_commands(command: str, line: str | None, expected: bool) -> None:
    assert is_read_only(command, None if line is None else {"command-line": line}) is expected
