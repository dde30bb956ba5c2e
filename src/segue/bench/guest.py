"""The Linux guest that is measured (scripts/linux-guest): its files, command line and shell."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

from segue.bench.cases import DISK_MIB, Case, Load
from segue.errors import SegueError, UsageError

_PROGRAM = "qemu-system-x86_64"
_STATUS = re.compile(rb"status=(\d+)\r?\n")
# A shell that says nothing for so many seconds will not say anything any more.
_SILENCE = 120.0


def cache() -> Path:
    """Where the guest and QEMU releases for tests are: $SEGUE_CACHE, or else ~/.cache/segue."""
    if chosen := os.environ.get("SEGUE_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "segue"


def qemu(name: str) -> Path:
    """A path, a program in PATH, or a release in the cache."""
    if (release := cache() / "qemu" / name / _PROGRAM).is_file() and "/" not in name:
        return release
    if "/" in name:
        return Path(name).absolute()
    if (found := shutil.which(name)) is None:
        raise UsageError(
            f"there is no program {name} in PATH, and no such release in {cache() / 'qemu'}",
            hint="in Segue's sources: make releases",
        )
    return Path(found)


def usual_pair() -> tuple[Path, Path]:
    """The newest release of the cache, upgraded to itself: every mode can do that."""
    releases = sorted((cache() / "qemu").glob(f"*/{_PROGRAM}"), key=_version)
    newest = qemu(releases[-1].parent.name if releases else _PROGRAM)
    return newest, newest


def _version(program: Path) -> list[int]:
    return [int(part) for part in program.parent.name.split(".") if part.isdecimal()]


@dataclass(frozen=True)
class Files:
    kernel: Path
    initrd: Path


def files() -> Files:
    """Raises UsageError if the guest has not been built."""
    found = Files(cache() / "linux/vmlinuz", cache() / "linux/initrd.img")
    if not (found.kernel.is_file() and found.initrd.is_file()):
        raise UsageError(
            f"the Linux guest has not been built: there is no {found.kernel}",
            hint="in Segue's sources: make guest (or measure a machine of yours: --machine NAME)",
        )
    return found


def addresses(number: int) -> tuple[str, str]:
    """The host's and the guest's, of the machine with this number; RFC 5737 keeps them free."""
    return f"192.0.2.{4 * number + 1}", f"192.0.2.{4 * number + 2}"


def machine(case: Case, place: Path, number: int) -> list[str]:
    """What makes the machine, without its memory and without the ends of its two consoles.

    The heartbeat is on the console with chardev id `beat`, the shell on the one named `shell`.
    `place` is a directory for its disk.
    """
    found = files()
    words = "console=ttyS0 quiet segue.heartbeat=/dev/hvc0 segue.shell=/dev/ttyS0"
    if case.load is Load.NET:
        words += f" segue.ip={addresses(number)[1]}/30"
    argv = [
        *("-m", f"{case.ram >> 20}", "-nodefaults", "-display", "none"),
        *("-kernel", str(found.kernel), "-initrd", str(found.initrd), "-append", words),
        *("-serial", "chardev:shell"),
        *("-device", "virtio-serial-pci", "-device", "virtconsole,chardev=beat"),
    ]
    if case.load is Load.DISK:
        image = place / "disk"
        with image.open("wb") as file:
            file.truncate(DISK_MIB << 20)
        argv += ["-drive", f"file={image},if=virtio,format=raw"]
    if case.load is Load.NET:
        script = place / "up"
        script.write_text(
            f"#!/bin/sh\nip address add {addresses(number)[0]}/30 dev $1; ip link set $1 up\n"
        )
        script.chmod(0o700)
        argv += ["-netdev", f"tap,id=net,script={script},downscript=no"]
        argv += ["-device", "virtio-net-pci,netdev=net"]
    return argv


class Shell:
    """The guest's serial console, with a shell on it."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock

    async def command(self, line: str) -> None:
        """Have it carried out. Raises SegueError if it fails or the guest falls silent."""
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self._sock, f"{line}; echo status=$?\n".encode())
        said = bytearray()
        try:
            while (found := _STATUS.search(said)) is None:
                async with asyncio.timeout(_SILENCE):
                    chunk = await loop.sock_recv(self._sock, 65536)
                if not chunk:
                    raise SegueError("the guest's console was closed", guest="gone")
                said += chunk
        except TimeoutError:
            raise SegueError(f"the guest's shell was silent for {_SILENCE:g} s") from None
        if found[1] != b"0":
            raise SegueError(f"in the guest, {line!r} failed: {said.decode(errors='replace')}")

    def close(self) -> None:
        self._sock.close()


async def load_once(case: Case, shell: Shell) -> None:
    """What goes on from the start to the end of the machine."""
    if case.load is Load.DIRTY:
        await shell.command(f"(guest churn {case.ram >> 22} &)")


async def load_again(case: Case, shell: Shell) -> None:
    """What has to be done anew before each upgrade."""
    if case.load is Load.DISK:
        await shell.command(f"guest dirty /dev/vda {DISK_MIB}")
