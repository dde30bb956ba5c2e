"""What clients connect to: the run directory's QMP and console sockets, and the user's monitors.

They are listened on once, and outlive each instance and each supervisor that is replaced.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Mapping
from typing import Any

from segue.kept.description import Description
from segue.kept.sockets import ACCEPT_PAUSE, OUT_OF_ROOM, Server
from segue.machines import MachineDirectory
from segue.qmp.listener import Listener
from segue.qmp.server import QmpServer
from segue.saved import Loader, Saver


class Entrances:
    """Those of one machine. `close` is for what `server` does not close by itself."""

    def __init__(
        self,
        directory: MachineDirectory,
        machine: Description,
        server: QmpServer,
        say: Callable[[str], None],
    ) -> None:
        self._directory = directory
        self._machine = machine
        self._server = server
        self._say = say
        self._spared = False
        self._controls: list[Server] = []
        self._console: socket.socket | None = None
        self._paused: asyncio.TimerHandle | None = None
        self._qmp: Listener | None = None

    def spare(self, on: bool) -> None:
        """As `Kept.spare`; the sockets in the run directory go with it."""
        self._spared = on
        for end in self._controls:
            end.spared = on

    async def open_before_qemu(self, found: Loader) -> None:
        """All but `open_qmp`; `found` is as for `Kept.inherit`. Raises SegueError, as QEMU would.

        With `wait` (QEMU's default) a monitor holds up the start until somebody has connected.
        """
        if self._machine.console() is not None:
            self._console = self._listen_on_console()
            self._accept_on_console()
        for number, (chardev, pretty) in enumerate(self._machine.control):
            end = Server(chardev.id, chardev.params, self._say)
            end.spared = self._spared
            end.found = found.within(f"control{number}")
            self._controls.append(end)
            listeners = self._adopt(await end.listen(), pretty)
            if chardev.params.boolean("wait", True):
                end.say_waiting()
                await _first_client(listeners)

    def open_qmp(self) -> None:
        """The run directory's, once there is a QEMU to answer."""
        self._qmp = self._server.listen_unix(self._directory.qmp)

    def save(self, saver: Saver) -> dict[str, Any]:
        """Once all are open."""
        assert self._qmp is not None
        saver.fd("qmp", self._qmp.sock.fileno())
        if self._console is not None:
            saver.fd("console", self._console.fileno())
        return {
            "control": [
                end.save(saver.within(f"control{number}"))
                for number, end in enumerate(self._controls)
            ],
            "console": self._console is not None,
        }

    async def load(self, data: Mapping[str, Any], loader: Loader) -> None:
        """Those that another process had; new ones where they are lost. See `go_on`."""
        for number, saved in enumerate(data["control"]):
            chardev, pretty = self._machine.control[number]
            end = Server(chardev.id, chardev.params, self._say)
            end.spared = self._spared
            self._controls.append(end)
            inner = loader.within(f"control{number}")
            self._adopt(await end.load_listeners(saved, inner), pretty)
        self._qmp = self._server.listen_unix(self._directory.qmp, found=loader.socket("qmp"))
        if data["console"]:
            self._console = loader.socket("console") or self._listen_on_console()

    def go_on(self) -> None:
        """What was loaded is ours alone now."""
        if self._console is not None:
            self._accept_on_console()

    def close(self) -> None:
        if self._paused is not None:
            self._paused.cancel()
        if self._console is not None:
            asyncio.get_running_loop().remove_reader(self._console.fileno())
            self._console.close()
        for end in self._controls:
            end.remove_path()

    def _adopt(self, socks: list[socket.socket], pretty: bool) -> list[Listener]:
        for sock in socks:
            sock.listen(128)
        return [self._server.adopt_listener(sock, pretty) for sock in socks]

    def _listen_on_console(self) -> socket.socket:
        """For `segue console`, on the first serial device that is kept."""
        path = self._directory.console
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        os.chmod(path, 0o600)
        listener.listen()
        return listener

    def _accept_on_console(self) -> None:
        broker, listener = self._machine.console(), self._console
        assert broker is not None and listener is not None
        listener.setblocking(False)

        loop = asyncio.get_running_loop()

        def accept() -> None:
            try:
                sock, _ = listener.accept()
            except OSError as error:
                if error.errno in OUT_OF_ROOM:
                    loop.remove_reader(listener.fileno())
                    self._paused = loop.call_later(
                        ACCEPT_PAUSE, loop.add_reader, listener.fileno(), accept
                    )
                return
            broker.attach(sock)

        loop.add_reader(listener.fileno(), accept)


async def _first_client(listeners: list[Listener]) -> None:
    waiting = [asyncio.ensure_future(each.first_client()) for each in listeners]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for each in waiting:
        each.cancel()
