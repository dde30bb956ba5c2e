"""What an instance is given to hold, and when."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from segue import checkpoint, keeper
from segue.keeper import Keeper
from segue.saved import Saver
from segue.store import Store
from segue.supervisor import Supervisor


class Instance:
    """QEMU, as far as it is asked to hold something. It answers when `answers` is set."""

    number = 1
    running = True

    def __init__(self) -> None:
        self.monitor = self
        self.asked: list[str] = []
        self.answers = asyncio.Event()
        self.answers.set()

    async def execute(self, command: str, arguments: Any, **_: Any) -> dict[str, int]:
        self.asked.append(command)
        await self.answers.wait()
        return {"fd": 100 + len(self.asked)}


class World:
    """A supervisor of nothing but `clients`."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clients: dict[str, socket.socket] = {}
        self.instance = Instance()
        self.path = place / "machine.json"
        supervisor = SimpleNamespace(
            instance=self.instance,
            instances=[self.instance],
            directory=SimpleNamespace(machine=self.path),
            upgrader=SimpleNamespace(busy=False),
            store=Store(),
        )
        monkeypatch.setattr(checkpoint, "save", self._save)
        self.keeper = Keeper(cast(Supervisor, supervisor))

    def _save(self, _: Any, saver: Saver) -> dict[str, Any]:
        for name, sock in self.clients.items():
            saver.fd(name, sock.fileno())
        return {}

    def come(self, name: str) -> None:
        self.clients[name] = socket.socket()
        self.keeper.changed()

    @property
    def held(self) -> list[str]:
        known = json.loads(self.path.read_text())["descriptors"]
        return [name for name, each in known.items() if each["held"]]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0)

    def close(self) -> None:
        self.keeper.close()
        for sock in self.clients.values():
            sock.close()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def run(test: Callable[[World], Awaitable[None]], pause: float) -> None:
        async def within() -> None:
            monkeypatch.setattr(keeper, "_PAUSE", pause)
            world = World(tmp_path, monkeypatch)
            try:
                await test(world)
            finally:
                world.close()

        asyncio.run(within())

    return run


async def turns(count: int = 100) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def test_the_first_is_held_at_once_and_those_after_it_together(run: Callable[..., None]) -> None:
    async def test(world: World) -> None:
        world.keeper.begin()
        world.come("a")
        await world.until(lambda: world.held == ["a"])
        for name in ("b", "c"):
            world.come(name)
        await turns()
        assert world.instance.asked == ["add-fd"]

    run(test, pause=3600)


def test_while_qemu_hangs_nobody_turns_in_circles(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(world: World) -> None:
        world.instance.answers.clear()
        world.keeper.begin()
        world.come("a")
        await world.until(lambda: world.instance.asked == ["add-fd"])
        timers: list[float] = []
        loop = asyncio.get_running_loop()
        call_at = loop.call_at

        def counted(when: float, *more: Any, **context: Any) -> asyncio.TimerHandle:
            timers.append(when)
            return call_at(when, *more, **context)

        monkeypatch.setattr(loop, "call_at", counted)
        world.keeper.changed()
        await turns()
        assert len(timers) == 1
        # What came meanwhile is not forgotten.
        world.come("b")
        await turns()
        world.instance.answers.set()
        await world.until(lambda: sorted(world.held) == ["a", "b"])

    run(test, pause=0)
