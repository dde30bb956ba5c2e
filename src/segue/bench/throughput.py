"""How much goes through a user network: QEMU's slirp, passt alone, passt behind Segue's relay.

The same guest with the same card; one TCP connection at a time, to a port of the host and back.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segue.bench import guest
from segue.bench.guest import Shell
from segue.bench.net import Tell
from segue.errors import SegueError
from segue.kept import passt, usernet
from segue.qemu.instance import Instance
from segue.qemu.options import Params

SLIRP, ALONE, RELAY = "slirp", "passt alone", "passt, segue's relay"
WAYS = (SLIRP, ALONE, RELAY)
MIB = 16

_HOST, _GUEST = "10.0.2.2", "10.0.2.15"
_LIMIT = 120.0


@dataclass
class Rates:
    """Bytes a second, one for each transfer."""

    way: str
    refused: str | None = None
    to_guest: list[float] = field(default_factory=list)
    from_guest: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        def median(rates: list[float]) -> float | None:
            return round(statistics.median(rates)) if rates else None

        return {
            "way": self.way,
            "refused": self.refused,
            "transfers": len(self.to_guest),
            "bytes_per_second": {
                "to_guest": median(self.to_guest),
                "from_guest": median(self.from_guest),
            },
        }


def need_route() -> None:
    """In the bench's namespace: what passt wants to see of a network."""
    for words in (
        "link add bench-up type veth peer name bench-far",
        "address add 192.0.2.253/30 dev bench-up",
        "link set bench-far up",
        "link set bench-up up",
        "route add default via 192.0.2.254",
    ):
        subprocess.run(["ip", *words.split()], check=True)  # noqa: S607


async def rates(binary: Path, runs: int, place: Path, tell: Tell) -> list[Rates]:
    found = [Rates(way) for way in WAYS]
    for one in found:
        tell(f"starting a guest: {one.way}")
        with contextlib.ExitStack() as stack:
            try:
                shell = await _START[one.way](binary, place, stack)
                for run in range(runs):
                    one.to_guest.append(await _transfer(shell, to_guest=True))
                    one.from_guest.append(await _transfer(shell, to_guest=False))
                    tell(f"{run + 1}/{runs} {one.way}")
            except SegueError as error:
                one.refused = str(error)
    return found


async def _transfer(shell: Shell, *, to_guest: bool) -> float:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        where = f"{_HOST} {listener.getsockname()[1]}"
        moving = asyncio.create_task(asyncio.to_thread(_move, listener, to_guest))
        if to_guest:
            await shell.command(f"nc {where} </dev/null >/dev/null")
        else:
            await shell.command(f"head -c {MIB << 20} /dev/zero | nc {where} >/dev/null")
        return await moving


def _move(listener: socket.socket, to_guest: bool) -> float:
    """The other end; bytes a second from the first to the last, which the guest has then."""
    listener.settimeout(_LIMIT)
    connection, _ = listener.accept()
    with connection:
        connection.settimeout(_LIMIT)
        began, piece = time.monotonic(), bytes(1 << 20)
        if to_guest:
            for _ in range(MIB):
                connection.sendall(piece)
            connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 20):
            pass
        return (MIB << 20) / (time.monotonic() - began)


def _argv(*network: str) -> list[str]:
    files = guest.files()
    words = f"console=ttyS0 quiet segue.shell=/dev/ttyS0 segue.ip={_GUEST}/24"
    return [
        *("-M", "q35", "-m", "256", "-nodefaults", "-display", "none"),
        *("-kernel", str(files.kernel), "-initrd", str(files.initrd), "-append", words),
        *("-serial", "chardev:shell", "-netdev", *network),
        *("-device", "virtio-net-pci,netdev=net"),
    ]


async def _alone(
    binary: Path, stack: contextlib.ExitStack, netdev: str, *descriptors: int
) -> Shell:
    ours, theirs = socket.socketpair()
    with theirs:
        instance = Instance.spawn(
            1,
            [
                *(str(binary), *_argv(netdev)),
                *("-chardev", f"socket,id=shell,fd={theirs.fileno()}"),
            ],
            (theirs.fileno(), *descriptors),
            on_stderr=lambda _: None,
        )
    stack.callback(instance.close)
    stack.callback(instance.kill_at_once)
    await instance.connect(_LIMIT)
    return await _shell(ours, stack)


async def _shell(sock: socket.socket, stack: contextlib.ExitStack) -> Shell:
    """Once it is there: what is typed before is lost."""
    shell = Shell(sock)
    stack.callback(shell.close)
    said = b""
    try:
        async with asyncio.timeout(_LIMIT):
            while b"\n# " not in said:
                said += await asyncio.get_running_loop().sock_recv(sock, 65536)
    except TimeoutError:
        raise SegueError("the guest does not come to its shell") from None
    return shell


async def _slirp(binary: Path, place: Path, stack: contextlib.ExitStack) -> Shell:
    return await _alone(binary, stack, "user,id=net")


def _need_passt() -> passt.Found:
    found = passt.find()
    if isinstance(found, str):
        raise SegueError(found)
    return found


async def _passt(binary: Path, place: Path, stack: contextlib.ExitStack) -> Shell:
    found = _need_passt()
    words = usernet.translate(Params.parse("user", "type"))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [found.path, *words, "--fd", str(theirs.fileno())]
        process = await asyncio.create_subprocess_exec(
            *command,
            pass_fds=[theirs.fileno()],
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        if await process.wait():
            raise SegueError("passt did not start")
        # It ends when QEMU does, which then has the only other end.
        address = f"addr.type=fd,addr.str={ours.fileno()}"
        netdev = f"stream,id=net,server=off,{address}"
        return await _alone(binary, stack, netdev, ours.fileno())


async def _relay(binary: Path, place: Path, stack: contextlib.ExitStack) -> Shell:
    _need_passt()
    name, console = f"bench-{os.getpid()}", place / "shell"
    argv = [*_argv("user,id=net"), "-chardev", f"socket,id=shell,path={console},server=on,wait=off"]
    words = ["run", "--name", name, "--detach", "--net-user=passt", "--", str(binary), *argv]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "segue", *words),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await process.communicate()
    if process.returncode:
        raise SegueError(f"segue run: {said.decode(errors='replace').strip()}")
    stop = [sys.executable, "-m", "segue", "stop", name, "--timeout", "0.1"]
    stack.callback(
        subprocess.run, stop, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False
    )
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(console))
    return await _shell(sock, stack)


_START = {SLIRP: _slirp, ALONE: _passt, RELAY: _relay}
