"""resume: a guest that lies in a directory (suspended.py) goes on in a new instance."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path

from segue.errors import SegueError
from segue.qemu import migration
from segue.qemu.instance import Instance
from segue.qemu.migration import MigrationWatch
from segue.suspended import Suspended
from segue.upgrade import interrupts

_LIMIT = 120.0
"""Seconds for the device state; its size is that of firmware and video memory."""


async def load(suspended: Suspended, instance: Instance) -> None:
    """Load the state; the guest does not run yet. Raises SegueError with QEMU's reason."""
    monitor = instance.monitor
    await migration.configure(monitor, migration.RECEIVER - {"return-path"})
    watch = MigrationWatch(instance)
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            await monitor.execute("getfd", {"fdname": "segue"}, fds=[theirs.fileno()])
        async with asyncio.timeout(_LIMIT):
            await monitor.execute("migrate-incoming", {"uri": "fd:segue"})
            sending = asyncio.ensure_future(_send(suspended, ours))
            try:
                await watch.until("completed")
            finally:
                sending.cancel()
                with contextlib.suppress(asyncio.CancelledError, OSError):
                    await sending
    except TimeoutError:
        raise _failed(suspended, f"it took longer than {_LIMIT:g} s") from None
    except SegueError as error:
        raise _failed(suspended, (await _cause(error, instance)).what) from None
    finally:
        ours.close()
        watch.close()


async def _cause(error: SegueError, instance: Instance) -> SegueError:
    """QEMU's own last words, where it has ended."""
    try:
        await instance.wait(timeout=2)
    except TimeoutError:
        return error
    return await instance.death()


def _failed(suspended: Suspended, why: str) -> SegueError:
    return SegueError(
        f"the suspended guest could not be loaded: {why}",
        hint="resume it with the QEMU that it was suspended from: --to BIN",
        guest=f"suspended in {suspended.directory}",
    )


async def _send(suspended: Suspended, sock: socket.socket) -> None:
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    with suspended.state.open("rb") as file:
        while chunk := file.read(1 << 20):
            await loop.sock_sendall(sock, chunk)
    sock.shutdown(socket.SHUT_WR)


async def go_on(suspended: Suspended, instance: Instance, directory: Path) -> None:
    """Let the guest run, and make sure that this is never done twice. Raises SegueError.

    `directory` is for a socket.
    """
    if suspended.machine["running"]:
        if suspended.machine["loses_interrupts"]:
            await interrupts.give_again(instance, directory)
        suspended.resuming(instance.pid, instance.start_time)
        try:
            await instance.monitor.execute("cont")
        except SegueError:
            await instance.kill()
            suspended.not_resumed()
            raise
    suspended.resumed()
