"""Disk images as the host sees them, to be written out before the guest is stopped.

STOP flushes every image. With 512 MiB of unflushed guest writes that took 236 ms on QEMU 7.2,
all of it blackout; after an `fdatasync` from outside, 1.2 ms. And those of a guest that is paused,
which nobody opens by letting it run.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from segue.errors import CommandFailed
from segue.qemu.monitor import Monitor

# Another round is worth its time while the last one took longer than this many seconds.
_QUICK = 0.005
_ROUNDS = 5


async def paths(monitor: Monitor) -> list[str]:
    """Files and block devices that the machine writes to (query-named-block-nodes, flat)."""
    nodes = await monitor.execute("query-named-block-nodes", {"flat": True})
    return sorted(
        {
            node["file"]
            for node in nodes
            if node["drv"] in ("file", "host_device")
            and not node["ro"]
            and not node["cache"]["no-flush"]
        }
    )


@contextlib.contextmanager
def opened(names: list[str]) -> Iterator[list[int]]:
    """Descriptors on the images; one that cannot be opened is left to STOP's own flush."""
    fds: list[int] = []
    try:
        for name in names:
            with contextlib.suppress(OSError):
                fds.append(os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


async def write_out(fds: list[int]) -> None:
    """fdatasync until little is left to be written, in threads of their own."""
    for _ in range(_ROUNDS):
        started = time.monotonic()
        await asyncio.gather(*(asyncio.to_thread(_sync, fd) for fd in fds))
        if time.monotonic() - started < _QUICK:
            return


def _sync(fd: int) -> None:
    # An image on a full or broken disk shows its error to the guest, at STOP as at any time.
    with contextlib.suppress(OSError):
        os.fdatasync(fd)


async def activate(monitor: Monitor, directory: Path) -> None:
    """Open the images of a guest that is paused and stays so, as `cont` does for one that runs.

    A successor whose guest does not run leaves them inactive: no lock is held, no client can work
    on them, and QEMU before 10.0 aborts when it is to migrate like that (bdrv_inactivate_recurse:
    Assertion). 10.0 has a command for it; before, exporting an image does it, if only for a moment.
    `directory` is for a socket. Raises QemuError.
    """
    try:
        await monitor.execute("blockdev-set-active", {"active": True})
        return
    except CommandFailed as error:
        if error.error_class != "CommandNotFound":
            raise
    nodes = [
        device["inserted"]["node-name"]
        for device in await monitor.execute("query-block")
        if "inserted" in device
    ]
    if not nodes:
        return
    path = directory / "nbd.sock"
    started = await _nbd_server(monitor, path)
    try:
        for number, node in enumerate(nodes):
            export = {"id": f"segue-{number}", "type": "nbd", "node-name": node}
            await monitor.execute("block-export-add", export)
            await monitor.execute("block-export-del", {"id": export["id"], "mode": "hard"})
    finally:
        if started:
            await monitor.execute("nbd-server-stop")
            _remove(path)


async def _nbd_server(monitor: Monitor, path: Path) -> bool:
    """Whether one had to be started; a client may have one already.

    QEMU may have given up the root or the user to whom this path means something (chroot=).
    """
    name = "segue-nbd"
    _remove(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(str(path))
        sock.listen()
        await monitor.execute("getfd", {"fdname": name}, fds=[sock.fileno()])
        try:
            address = {"type": "fd", "data": {"str": name}}
            await monitor.execute("nbd-server-start", {"addr": address})
        except CommandFailed as error:
            _remove(path)
            with contextlib.suppress(CommandFailed):
                await monitor.execute("closefd", {"fdname": name})
            if "already running" not in error.what:
                raise
            return False
    return True


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
