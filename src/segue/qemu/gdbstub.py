"""Writing to a paused guest's physical memory, through QEMU's gdb stub.

There is no QMP command that writes guest memory. The stub's protocol is gdb's remote serial
protocol; `Qqemu.PhyMemMode` is QEMU's own packet (4.1). Its `D` (detach) is never sent: QEMU
answers it by running the guest.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterable

from segue.errors import QemuError
from segue.qemu.monitor import Monitor

_LIMIT = 5.0
_NAME = "segue-gdb"
_REFUSED = "Could not open gdbserver"


@contextlib.asynccontextmanager
async def attached(monitor: Monitor) -> AsyncIterator[GdbStub]:
    """A connection to the stub, over a descriptor: a path may mean something else to QEMU, or
    nothing (chroot=). It pauses the guest.

    Raises QemuError if QEMU does not let us.
    """
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    address = {"type": "fd", "data": {"str": _NAME}}
    backend = {"type": "socket", "data": {"addr": address, "server": False}}
    try:
        with ours, theirs:
            async with asyncio.timeout(_LIMIT):
                _, _, said = await asyncio.gather(
                    monitor.execute("getfd", {"fdname": _NAME}, fds=[theirs.fileno()]),
                    monitor.execute("chardev-add", {"id": _NAME, "backend": backend}),
                    monitor.hmp(f"gdbserver chardev:{_NAME}"),
                )
                if _REFUSED in said:
                    await monitor.execute("chardev-remove", {"id": _NAME})
                    raise QemuError(f"QEMU's gdb stub: {said.strip()}")
                try:
                    yield GdbStub(ours)
                finally:
                    # The character device goes with it.
                    await monitor.hmp("gdbserver none")
    except (OSError, TimeoutError) as error:
        raise QemuError(f"QEMU's gdb stub: {error!r}") from None


class GdbStub:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._received = b""

    async def write_physical(self, writes: Iterable[tuple[int, bytes]]) -> None:
        """Each (address, bytes) in turn. Raises QemuError if one is refused."""
        packets = [f"M{at:x},{len(data):x}:{data.hex()}" for at, data in writes]
        for packet in ("Qqemu.PhyMemMode:1", *packets, "Qqemu.PhyMemMode:0"):
            reply = await self._ask(packet.encode())
            if reply != b"OK":
                raise QemuError(f"QEMU's gdb stub answered {reply!r} to {packet}")

    async def _ask(self, packet: bytes) -> bytes:
        loop = asyncio.get_running_loop()
        framed = b"$%s#%02x" % (packet, sum(packet) & 0xFF)
        await loop.sock_sendall(self._sock, framed)
        # `+` acknowledges ours; then comes `$reply#cc`, which is ours to acknowledge.
        while (end := self._received.find(b"#")) < 0 or len(self._received) < end + 3:
            chunk = await loop.sock_recv(self._sock, 4096)
            if not chunk:
                raise QemuError("QEMU's gdb stub closed the connection")
            self._received += chunk
        reply = self._received[self._received.find(b"$") + 1 : end]
        self._received = self._received[end + 3 :]
        await loop.sock_sendall(self._sock, b"+")
        return reply
