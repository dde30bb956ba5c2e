"""Networks that QEMU has over a socket of its own: `stream`, `dgram` and the older `socket`.

The supervisor opens the socket, as QEMU would, and keeps it. Each instance is given `dgram` on a
socketpair with a relay of frames behind it, whatever the user's own spelling: a guest cannot tell.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from segue.kept.base import Kept, Lending
from segue.kept.plug import Plug
from segue.kept.relay import Far, Relay
from segue.saved import Loader, Saver


class Wire(Kept):
    """One such network: the relay to the instances, and whatever its far side is (`Plug`)."""

    kind = "net"

    def __init__(self, name: str, plug: Plug, more: tuple[str, ...] = ()) -> None:
        self.name = name
        self._plug = plug
        self._more = more
        self._relay = Relay(self._broken)
        plug.came = self._came

    def move_in(self, directory: Path, say: Callable[[str], None]) -> None:
        self._plug.say = say

    async def start(self) -> None:
        await self._plug.start()

    def save(self, saver: Saver) -> dict[str, Any]:
        return {
            "plug": self._plug.save(saver.within("plug")),
            "relay": self._relay.save(saver.within("relay")),
        }

    async def load(self, data: dict[str, Any], loader: Loader) -> None:
        far = await self._plug.load(data["plug"], loader.within("plug"))
        self._relay.load(data["relay"], loader.within("relay"), far)

    def _came(self, far: Far) -> None:
        self._relay.join(far)
        self.changed()

    def _broken(self) -> None:
        self._plug.left()
        self.changed()

    def arguments(self, lending: Lending) -> list[str]:
        return [*self._relay.arguments(self.name, lending), *self._more]

    def hold(self) -> None:
        self._relay.hold()

    def take_back(self) -> None:
        self._relay.take_back()

    def switch(self, number: int) -> None:
        self._relay.switch(number)

    def give_back(self) -> None:
        self._relay.give_back()

    def drop(self, number: int) -> None:
        self._relay.drop(number)

    def identity(self) -> dict[str, Any]:
        return self._plug.identity()

    def held_by(self, pid: int) -> bool:
        return self._relay.held_by(pid)

    def close(self) -> None:
        self._relay.close()
        self._plug.close()
