"""Taps: the supervisor has the interface's queues, and lends the same ones to each instance.

An instance whose guest does not run still takes a packet from a queue that it can read, and a
successor that only starts sets the interface up anew. So a successor is started with *stand-ins*,
sockets that never become readable, and its ioctls on them are answered by the guard (guard.py):

    prepare   the successor has stand-ins; what it sets is remembered, and not done
    hold      the incumbent is given stand-ins too: what arrives waits in the queues from now on,
              and what the guest still sends is passed on by us
    commit    what the successor wants is set on the interface; then `cont`
    switch    when QEMU's announcement has come, the queues are put in the places of the successor's
              stand-ins; what its guest has sent meanwhile is passed on, the announcement is not
    undo      what the incumbent had set is set again, and it gets its queues back

With the kernel's vhost-net it is the same, but vhost is never told of a stand-in. QEMU tells it
of a queue, by a descriptor's number, whenever its guest goes on: in `cont`, or by itself when it
sees a migration fail. That call waits for the guard, which puts another number in: that of a
duplicate of the queue, which each instance holds. So vhost has the queue from `cont` on, and QEMU
has only the stand-in. That matters, since what QEMU itself has read of a queue it throws away as
vhost starts (virtio_net_vhost_status): the queue must not be in its place before the guest runs. At
STOP vhost ends by itself; it leaves what has come in the queue, and what the guest has sent in the
guest's ring.

Why not at STOP: QEMU pauses its vCPUs before it says so, and throws away a packet that it reads
meanwhile (do_vm_stop, net_vm_change_state_handler); one packet was lost in a third of handovers.

In each instance the ioctls are carried out here, on our own descriptor of the same queue, so
that we know what is in force.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segue.errors import SegueError
from segue.kept import processes, tapsource, tun
from segue.kept.base import Kept, Lending
from segue.kept.guard import Call, Guard
from segue.kept.standin import Place
from segue.qemu.commandline import Option
from segue.qemu.monitor import Monitor
from segue.saved import Loader, Saver

VHOST_NET = Path("/dev/vhost-net")
_VHOST_NET_SET_BACKEND = 0x4008AF30
# struct vhost_vring_file: which ring, and a queue's descriptor or -1
_VRING_FILE = struct.Struct("=Ii")

# QEMU's own, where the user names none (include/net/net.h, net/tap.h).
_SCRIPT, _DOWN_SCRIPT = "/etc/qemu-ifup", "/etc/qemu-ifdown"
_NO_RIGHTS = (
    "making an interface takes root; one that root has made for you is enough: "
    "ip tuntap add dev NAME mode tap user YOU, then ifname=NAME,script=no,downscript=no"
)

# What says where the queues come from; our descriptors replace all of it.
_ORIGIN = ("ifname", "script", "downscript", "br", "helper", "vnet_hdr", "queues", "fd", "fds")
_VHOST_FDS = ("vhostfd", "vhostfds")

# EtherType of the reverse ARP packet by which QEMU announces a guest (net/announce.c).
_RARP = b"\x80\x35"
# Seconds for QEMU to send it, which it does in `cont` after it has said RESUME. The queues are lent
# as soon as it has come, so that it is not seen on the interface.
_ANNOUNCED = 0.05
# Seconds for an instance that runs the guest to take the queues.
_LENT_LIMIT = 10.0

# (queue, request) -> value, in the order in which they were set last.
Settings = dict[tuple[int, int], int]


@dataclass
class Borrower:
    """An instance: its guard, its places, and what it has asked to be set."""

    guard: Guard
    places: list[Place]
    spares: list[int]
    """Numbers in it of duplicates that it only holds, for us (keeper.py)."""
    settings: Settings = field(default_factory=dict)
    off: bool = False
    lent: asyncio.Event = field(default_factory=asyncio.Event)


class Tap(Kept):
    """One `-netdev tap` or `bridge`, with one queue or several."""

    kind = "tap"

    def __init__(self, option: Option, program: str) -> None:
        params = option.params
        self._option = option
        self._program = program
        self.name = params.get("id") or params.get("ifname") or option.value or "tap"
        self.interface = ""
        self.queues: list[int] = []
        self._offloads = 0
        self._borrowers: dict[int, Borrower] = {}
        self._spares: list[int] = []
        self._in_force: Settings = {}
        self._before: Settings | None = None
        self._live = 1
        self._was_live = 1
        self._down: Callable[[], None] | None = None
        self._has_vhost = any(
            params.get(key) not in (None, "off") for key in ("vhost", "vhostforce", *_VHOST_FDS)
        )

    async def start(self) -> None:
        try:
            self._open()
            self.interface, _ = tun.interface(self.queues[0])
            self._offloads = tun.known_offloads(self.queues[0])
            self._in_force = self._as_found()
            self._set_aside()
        except OSError as error:
            raise SegueError(f"{self._option}: {error.strerror}", _hint(error)) from None

    # -- another process --------------------------------------------------------------------

    def save(self, saver: Saver) -> dict[str, Any]:
        # While the guest is paused, no instance has them in their places. Nor can one be sent them
        # when it runs: QEMU makes what it is sent block, and would wait for the next packet.
        for queue, fd in enumerate(self.queues):
            held = {number: b.spares[queue] for number, b in self._borrowers.items()}
            saver.fd(f"queue{queue}", fd, held=held)
        if (steering := self._in_force.get((0, tun.TUNSETSTEERINGEBPF), -1)) >= 0:
            saver.fd("steering", steering)
        return {
            "interface": self.interface,
            "queues": len(self.queues),
            "offloads": self._offloads,
            "in_force": _plain(self._in_force),
            "live": self._live,
            "borrowers": {
                str(number): [[place.number for place in borrower.places], borrower.spares]
                for number, borrower in self._borrowers.items()
            },
        }

    async def load(self, data: dict[str, Any], loader: Loader) -> None:
        self.queues = [loader.needed(f"queue{queue}") for queue in range(data["queues"])]
        self.interface, self._offloads = data["interface"], data["offloads"]
        self._live = self._was_live = data["live"]
        self._in_force = {(queue, request): value for queue, request, value in data["in_force"]}
        if (0, tun.TUNSETSTEERINGEBPF) in self._in_force:
            steering = loader.fd("steering")
            self._in_force[0, tun.TUNSETSTEERINGEBPF] = -1 if steering is None else steering
        if not loader.exact:
            for setter, getter in tun.INT_SETTERS.items():
                with contextlib.suppress(OSError):
                    self._in_force[0, setter] = tun.get_int(self.queues[0], getter)
        self._set_aside()
        for number, (places, spares) in data["borrowers"].items():
            guard = loader.guards.get(int(number))
            if guard is not None:
                # Whoever was killed may have put stand-ins there: `restore` is to undo that.
                self._borrowers[int(number)] = Borrower(
                    guard, [Place(n) for n in places], spares, off=loader.held
                )
                self._watch(int(number))
        self._set_down_script()

    # -- opening ----------------------------------------------------------------------------

    def _open(self) -> None:
        params = self._option.params
        given = params.get("fd") or params.get("fds")
        if given is not None:
            self.queues = [tapsource.given(self._option, word) for word in given.split(":")]
        elif params.get("type") == "bridge" or params.get("helper") is not None:
            self.queues = [tapsource.from_helper(self._option, self._program)]
        else:
            self._open_device()

    def _open_device(self) -> None:
        params = self._option.params
        count = params.number("queues", 1)
        known = tun.features()
        flags = tun.IFF_TAP | tun.IFF_NO_PI
        if params.boolean("vnet_hdr", True):
            flags |= known & tun.IFF_VNET_HDR
        if count > 1:
            flags |= tun.IFF_MULTI_QUEUE
        name = params.get("ifname") or "tap%d"
        try:
            for _ in range(count):
                fd, name = tun.open_queue(name, flags)
                self.queues.append(fd)
        except OSError as error:
            raise SegueError(
                f"could not configure {tun.DEVICE} ({name}): {error.strerror}", _hint(error)
            ) from None
        self.interface = name
        script = params.get("script", _SCRIPT)
        if script not in ("", "no", None):
            tapsource.run_script(script, name)
        self._set_down_script()

    def _set_aside(self) -> None:
        self._spares = [os.dup(fd) for fd in self.queues]

    def _set_down_script(self) -> None:
        params = self._option.params
        if any(key in params for key in ("fd", "fds", "helper")) or params.get("type") == "bridge":
            return
        down = params.get("downscript", _DOWN_SCRIPT)
        if down not in ("", "no", None):
            self._down = lambda: tapsource.run_script(down, self.interface)

    def _as_found(self) -> Settings:
        found: Settings = {}
        for setter, getter in tun.INT_SETTERS.items():
            with contextlib.suppress(OSError):
                found[0, setter] = tun.get_int(self.queues[0], getter)
        found[0, tun.TUNSETOFFLOAD] = 0
        for queue, fd in enumerate(self.queues):
            flags = tun.interface(fd)[1]
            if flags & tun.IFF_MULTI_QUEUE:
                off = flags & tun.IFF_DETACH_QUEUE
                found[queue, tun.TUNSETQUEUE] = off or tun.IFF_ATTACH_QUEUE
        return found

    # -- lending ----------------------------------------------------------------------------

    def arguments(self, lending: Lending) -> list[str]:
        places = []
        for fd in self.queues:
            place = Place(fd)
            if not lending.first:
                place.number = place.stand_in()
            places.append(place)
            lending.inherit(place.number)
        for fd in self._spares:
            lending.inherit(fd)
        self._borrowers[lending.number] = Borrower(lending.guard, places, list(self._spares))
        self._watch(lending.number)
        params = self._option.params.without(*_ORIGIN).set("type", "tap")
        if lending.first:
            for key in _VHOST_FDS:
                for word in (params.get(key) or "").split(":"):
                    if word.isdecimal():
                        lending.inherit(int(word))
        elif any(key in params for key in _VHOST_FDS):
            params = params.without(*_VHOST_FDS).set("vhost", "on")
        numbers = ":".join(str(place.number) for place in places)
        key = "fds" if len(places) > 1 or "fds" in self._option.params else "fd"
        return self._option.with_params(params.set(key, numbers)).argv()

    def _watch(self, number: int) -> None:
        borrower = self._borrowers[number]
        for queue, place in enumerate(borrower.places):
            watcher = Queue(self, number, queue)
            borrower.guard.watch(place.number, [*tun.SETTERS, *tun.GETTERS], watcher)
        if self._has_vhost:
            borrower.guard.watch_any(_VHOST_NET_SET_BACKEND, Backend(self, number))

    def ioctl(self, instance: int, queue: int, call: Call) -> bool:
        """What an instance asks of its queue; see `guard.Watcher`."""
        fd, request = self.queues[queue], call.request
        place = self._borrowers[instance].places[queue]
        if instance == self._live and not self._lent(call.notification.pid, place.number, fd):
            return False
        if request in tun.GETTERS:
            call.write(self._asked(instance, fd, request))
            return True
        value = self._value(call)
        if instance != self._live:
            if request == tun.TUNSETOFFLOAD and value & ~self._offloads:
                raise OSError(22, "Invalid argument")
            self._note(self._borrowers[instance].settings, queue, request, value)
            return True
        tun.set_value(fd, request, value)
        self._note(self._in_force, queue, request, value)
        self.changed()
        return True

    def set_backend(self, instance: int, call: Call) -> None:
        """vhost is told of a queue: it is to be the queue, whatever stands in its place."""
        borrower = self._borrowers[instance]
        ring, number = _VRING_FILE.unpack(call.read(_VRING_FILE.size))
        for place, spare in zip(borrower.places, borrower.spares, strict=True):
            if place.number == number:
                call.write(_VRING_FILE.pack(ring, spare))

    def _lent(self, pid: int, number: int, fd: int) -> bool:
        """Whether the number still means our queue, or a stand-in for it."""
        borrower = self._borrowers[self._live]
        return borrower.off or tun.same_interface(pid, number, fd)

    def _asked(self, instance: int, fd: int, request: int) -> bytes:
        if instance != self._live:
            for (_, setter), value in self._borrowers[instance].settings.items():
                if tun.INT_SETTERS.get(setter) == request:
                    return tun.INT.pack(value)
        return tun.get(fd, request)

    def _value(self, call: Call) -> int:
        if call.request == tun.TUNSETOFFLOAD:
            return call.argument
        if call.request == tun.TUNSETQUEUE:
            flags: int = tun.IFREQ.unpack(call.read(tun.IFREQ.size))[1]
            return flags
        value: int = tun.INT.unpack(call.read(tun.INT.size))[0]
        if call.request == tun.TUNSETSTEERINGEBPF and value >= 0:
            return processes.duplicate_of(call.notification.pid, value)
        return value

    # -- the transaction --------------------------------------------------------------------

    def hold(self) -> None:
        borrower = self._borrowers[self._live]
        borrower.off = True
        stand_ins = {place.number: place.stand_in() for place in borrower.places}
        for place, queue in zip(borrower.places, self.queues, strict=True):
            place.relay(queue)
        # One that does not come round in time takes at most one packet of each queue with it.
        with contextlib.suppress(SegueError):
            borrower.guard.lend(stand_ins)

    def pass_on(self, number: int) -> None:
        self._end_relay(self._borrowers[self._live])
        successor = self._borrowers[number]
        self._before = dict(self._in_force)
        self._was_live, self._live = self._live, number
        self._set(successor.settings)
        successor.off = True

    def restore(self) -> None:
        if self._before is not None:
            self._live = self._was_live
            self._set(self._before)
            self._before = None
        borrower = self._borrowers[self._live]
        if not borrower.off or self._has_vhost:
            return
        try:
            borrower.guard.lend(self._places(borrower))
        finally:
            self._end_relay(borrower)
        self._has_queues(borrower)

    def _end_relay(self, borrower: Borrower) -> None:
        for place, queue in zip(borrower.places, self.queues, strict=True):
            place.end_relay(queue)

    def switch(self, number: int) -> None:
        """The guest runs: what arrives waits in the queues, what it sends we pass on."""
        self._live = number
        self._before = None
        borrower = self._borrowers[number]
        if not borrower.off:
            return
        if borrower.places[0].ours is None:
            # Whoever was killed had not, or had; what its stand-ins were sent is lost.
            self._lend_soon(borrower)
            return
        loop = asyncio.get_running_loop()
        announced = loop.call_later(_ANNOUNCED, self._lend_soon, borrower)

        def spared(frame: bytes) -> bool:
            found = self._is_announcement(frame)
            if found and not announced.cancelled():
                announced.cancel()
                self._lend_soon(borrower)
            return found

        for place, queue in zip(borrower.places, self.queues, strict=True):
            place.relay(queue, spared)

    def _lend_soon(self, borrower: Borrower) -> None:
        if borrower.off and borrower is self._borrowers.get(self._live):
            with contextlib.suppress(SegueError):  # QEMU is dead
                borrower.guard.lend_soon(self._places(borrower), lambda: self._has_queues(borrower))

    async def settle(self, monitor: Monitor) -> None:
        borrower = self._borrowers[self._live]
        if not borrower.off:
            return
        try:
            async with asyncio.timeout(_LENT_LIMIT):
                await borrower.lent.wait()
        except TimeoutError:
            raise SegueError("QEMU has not taken the interface's queues yet") from None

    def _has_queues(self, borrower: Borrower) -> None:
        borrower.off = False
        borrower.lent.set()
        self._end_relay(borrower)
        for place in borrower.places:
            place.wake()

    def give_back(self) -> None:
        self._lend_soon(self._borrowers[self._live])

    def _is_announcement(self, frame: bytes) -> bool:
        """QEMU's own packet after a migration, for switches: the guest is where it was."""
        header = 0
        if tun.interface(self.queues[0])[1] & tun.IFF_VNET_HDR:
            header = tun.get_int(self.queues[0], tun.TUNGETVNETHDRSZ)
        return frame[header + 12 : header + 14] == _RARP

    def drop(self, number: int) -> None:
        borrower = self._borrowers.pop(number, None)
        if borrower is not None:
            borrower.guard.close()
            for place in borrower.places:
                place.close()

    def _places(self, borrower: Borrower) -> dict[int, int]:
        numbers = [place.number for place in borrower.places]
        return dict(zip(numbers, self.queues, strict=True))

    def _set(self, settings: Settings) -> None:
        """Bring the interface to these settings; what it refuses, it had refused before."""
        for (queue, request), value in settings.items():
            if request == tun.TUNSETQUEUE and self._in_force.get((queue, request)) == value:
                continue
            with contextlib.suppress(OSError):
                tun.set_value(self.queues[queue], request, value)
                self._note(self._in_force, queue, request, value)

    def _note(self, settings: Settings, queue: int, request: int, value: int) -> None:
        """What concerns the whole interface is noted once, whichever queue it was set by."""
        if request != tun.TUNSETQUEUE:
            queue = 0
        old = settings.pop((queue, request), -1)
        settings[queue, request] = value
        if request == tun.TUNSETSTEERINGEBPF and old >= 0:
            noted = [self._in_force, self._before or {}]
            noted += [borrower.settings for borrower in self._borrowers.values()]
            if not any(known.get((0, request)) == old for known in noted):
                os.close(old)

    # -- proof and end ----------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        known: dict[str, Any] = {"interface": self.interface, "queues": len(self.queues)}
        with contextlib.suppress(OSError):  # in another network namespace
            known["ifindex"] = socket.if_nametoindex(self.interface)
        return known

    def held_by(self, pid: int) -> bool:
        borrower = self._borrowers[self._live]
        return all(
            tun.same_interface(pid, place.number, fd)
            for place, fd in zip(borrower.places, self.queues, strict=True)
        )

    def close(self) -> None:
        for number in list(self._borrowers):
            self.drop(number)
        if self._down is not None:
            with contextlib.suppress(SegueError, OSError):
                self._down()
            self._down = None
        for fd in (*self.queues, *self._spares):
            os.close(fd)
        self.queues, self._spares = [], []


def _plain(settings: Settings) -> list[list[int]]:
    return [[queue, request, value] for (queue, request), value in settings.items()]


@dataclass(frozen=True)
class Queue:
    """A queue of a tap, in one instance."""

    tap: Tap
    instance: int
    number: int

    def ioctl(self, call: Call) -> bool:
        return self.tap.ioctl(self.instance, self.number, call)


@dataclass(frozen=True)
class Backend:
    """What an instance tells vhost, on descriptors that it has opened itself."""

    tap: Tap
    instance: int

    def ioctl(self, call: Call) -> bool:
        self.tap.set_backend(self.instance, call)
        return False


def _hint(error: OSError) -> str | None:
    return _NO_RIGHTS if error.errno in (errno.EPERM, errno.EACCES) else None
