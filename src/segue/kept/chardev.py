"""From a `-chardev` as QEMU understands it to what keeps it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from segue.errors import SegueError, advice
from segue.kept.base import Kept, Lending
from segue.kept.broker import Broker
from segue.kept.endpoints import Endpoint, Pipe, Say, Udp
from segue.kept.mux import Front, Mux
from segue.kept.sockets import Client, Server
from segue.kept.terminal import Pty, Stdio
from segue.qemu.chardevs import Chardev
from segue.saved import Loader, Saver

# They hold nothing outside QEMU.
UNCHANGED = frozenset(
    "null ringbuf memory vc console msmouse wctablet testdev qemu-vdagent hub mux".split()
)
# Their contents are QEMU's own, and in no saved state.
IN_MEMORY = frozenset(("ringbuf", "memory"))
_BROKERED = frozenset("socket pty stdio pipe udp".split())
_SHARED = ("logfile", "logappend")


def unsupported(chardev: Chardev) -> str | None:
    """Why this character device cannot be kept, or None. It is then left to QEMU unchanged."""
    params = chardev.params
    if chardev.backend == "socket":
        for key in ("websocket", "tn3270"):
            if params.boolean(key, False):
                return f"{key} connections are not kept by this version"
        if params.get("tls-creds"):
            return "TLS connections are not kept by this version"
        if not any(params.get(key) for key in ("path", "port", "fd")):
            return "it has neither path, port nor fd"
    elif chardev.backend == "file":
        if params.get("input-path") is not None:
            return "a file with input-path would be read anew by each QEMU"
    elif chardev.backend in ("serial", "parallel"):
        return "a port of the host cannot be given to two QEMUs"
    elif chardev.backend not in UNCHANGED | _BROKERED:
        return f"character devices of type {chardev.backend} are not kept by this version"
    return None


def is_kept(chardev: Chardev) -> bool:
    """Whether `make` is to be asked; other devices are passed on as they are."""
    return chardev.backend in _BROKERED | {"file"} and unsupported(chardev) is None


def make(
    chardev: Chardev,
    *,
    monitor: bool = False,
    presence: bool = False,
    gated: bool = False,
    out: Say = lambda line: None,
    err: Say = lambda line: None,
) -> Kept:
    """What keeps this device; opens nothing before its `start()`.

    `monitor`: a human monitor, and nothing else, uses it. `presence`: a virtserialport uses it,
    whose guest is to see clients come and go. `gated`: a human monitor is one of several users.
    `out` and `err` take lines for the user's standard output and error, as QEMU words them but
    without its name before them.
    """
    if chardev.backend == "file":
        return KeptOutput(chardev)
    shared = {key: value for key, value in chardev.params.items() if key in _SHARED}
    if chardev.mux:
        shared["mux"] = "on"
    return Broker(
        chardev.id,
        host_end(chardev, out, err),
        shared=shared,
        monitor=monitor and not chardev.mux,
        presence=presence and not chardev.mux,
        gated=gated,
        err=err,
    )


def make_mux(
    chardev: Chardev,
    fronts: Sequence[Front],
    *,
    escape: int = 1,
    out: Say = lambda line: None,
    err: Say = lambda line: None,
) -> Mux:
    """What keeps a device with `mux=on` that is shared by `fronts`.

    Instances get a chardev for each front, and none of the device's own id unless a front has
    it. `escape` is what `-echr` says.
    """
    shared = {key: value for key, value in chardev.params.items() if key in _SHARED}
    end = host_end(chardev, out, err)
    return Mux(chardev.id, end, fronts, shared=shared, escape=escape)


def host_end(chardev: Chardev, out: Say, err: Say) -> Endpoint:
    params = chardev.params
    match chardev.backend:
        case "socket":
            kind = Server if params.boolean("server", False) else Client
            return kind(chardev.id, params, err)
        case "pty":
            return Pty(chardev.id, params.get("path"), out)
        case "stdio":
            return Stdio(params.boolean("signal", True))
        case "pipe":
            return Pipe(params.get("path") or "")
        case "udp":
            return Udp(params)
    raise SegueError(f"character devices of type {chardev.backend} have no host end to keep")


class KeptOutput(Kept):
    """`-chardev file`: opened once, as the user said; each instance appends to it.

    No broker is needed: a file takes what is written to it, in order, and nobody reads there.
    """

    kind = "chardev"

    def __init__(self, chardev: Chardev) -> None:
        self.name = chardev.id
        self.fd = -1
        self._chardev = chardev
        self._path = chardev.params.get("path") or ""

    async def start(self) -> None:
        append = self._chardev.params.boolean("append", False)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | (0 if append else os.O_TRUNC)
        try:
            self.fd = os.open(self._path, flags | os.O_CLOEXEC, 0o666)
        except OSError as error:
            what = f"Could not open '{self._path}': {error.strerror}"
            raise SegueError(what, advice(error)) from None

    def save(self, saver: Saver) -> dict[str, Any]:
        saver.fd("file", self.fd, lent=True)
        return {}

    async def load(self, data: dict[str, Any], loader: Loader) -> None:
        self.fd = loader.needed("file")

    def arguments(self, lending: Lending) -> list[str]:
        fd = lending.inherit(self.fd)
        params = self._chardev.params.set("path", f"/proc/self/fd/{fd}").set("append", True)
        if "logfile" in params and not lending.first:
            params = params.set("logappend", True)
        pairs = [("id", self.name), *params.items()]
        if self._chardev.mux:
            pairs.append(("mux", "on"))
        text = ",".join(f"{key}={value.replace(',', ',,')}" for key, value in pairs)
        return ["-chardev", f"file,{text}"]

    def identity(self) -> dict[str, Any]:
        status = os.fstat(self.fd)
        return {"path": self._path, "device": status.st_dev, "inode": status.st_ino}

    def held_by(self, pid: int) -> bool:
        ours = os.fstat(self.fd)
        try:
            theirs = os.stat(f"/proc/{pid}/fd/{self.fd}")
        except OSError:
            return False
        return (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
