"""A listening socket of the QMP server, and the Unix socket that is for its owner alone."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from segue.errors import UsageError

if TYPE_CHECKING:
    from segue.qmp.server import QmpServer

_MAX_UNIX_PATH = 107
_ACCEPT_PAUSE = 1.0


class Listener:
    """A listening socket whose connections become clients."""

    def __init__(self, server: QmpServer, sock: socket.socket, pretty: bool) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.pretty = pretty
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._first: asyncio.Future[None] = self._loop.create_future()
        self._paused: asyncio.TimerHandle | None = None
        self._loop.add_reader(sock.fileno(), self._accept)

    async def first_client(self) -> None:
        """Return once somebody has connected: `wait=on` of a user's socket."""
        await asyncio.shield(self._first)

    def close(self) -> None:
        if self._paused:
            self._paused.cancel()
        self._loop.remove_reader(self.sock.fileno())
        self.sock.close()
        self._first.cancel()

    def _accept(self) -> None:
        try:
            sock, _ = self.sock.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as failure:
            # Out of descriptors or memory. The connection stays in the backlog: without a pause
            # the loop would turn around it.
            self._server.log.warning("no QMP client can be accepted: %s", failure.strerror)
            self._loop.remove_reader(self.sock.fileno())
            self._paused = self._loop.call_later(
                _ACCEPT_PAUSE, self._loop.add_reader, self.sock.fileno(), self._accept
            )
            return
        if not self._first.done():
            self._first.set_result(None)
        self._server.adopt(sock, pretty=self.pretty)


def bind_unix(path: Path, mode: int) -> socket.socket:
    """A listening socket at `path`; one that is left there and that nobody serves is replaced.

    Raises UsageError if the path is too long or in use.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Never connectable by others, not even between bind and chmod. No other thread makes files.
    mask = os.umask(0o777 & ~mode)
    try:
        _bind(sock, path)
    except OSError as failure:
        sock.close()
        hint = None
        if len(os.fsencode(path)) > _MAX_UNIX_PATH:
            hint = f"a Unix socket's path has at most {_MAX_UNIX_PATH} bytes"
        raise UsageError(
            f"cannot listen on {path}: {failure.strerror or failure}", hint=hint
        ) from failure
    finally:
        os.umask(mask)
    sock.listen(128)
    return sock


def _bind(sock: socket.socket, path: Path) -> None:
    try:
        sock.bind(os.fspath(path))
    except OSError as failure:
        if failure.errno != errno.EADDRINUSE or _is_served(path):
            raise
        path.unlink()
        sock.bind(os.fspath(path))


def _is_served(path: Path) -> bool:
    """Whether something other than a dead process's socket is there."""
    if not stat.S_ISSOCK(path.lstat().st_mode):
        return True
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        return probe.connect_ex(os.fspath(path)) != errno.ECONNREFUSED
