"""A relay of whole frames between the instance of the moment and what is on its network.

Each instance has a socketpair of its own. At hold nothing more goes towards the guest, and what
the incumbent has not read is taken back; what it still sends is passed on. At the switch the
successor is given what was taken back, from the beginning of a frame: a frame that the incumbent
had read in part, it cannot have given to its guest.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import select
import socket
import struct
import termios
import time
from collections.abc import Callable
from typing import Any, Protocol

from segue.kept.base import Lending
from segue.kept.channel import Watches
from segue.kept.frames import BUFFER, Frames, Garbled
from segue.kept.pair import Pair
from segue.saved import Loader, Saver

# So small that a socket takes all of it or nothing: a frame is torn only if it is longer.
_PIECE = 1 << 14
# As much may wait for the guest; when it is full, the other side is read no further, and does
# what it does when nobody reads (passt holds TCP back, and drops what cannot be held back).
_TO_GUEST = 1 << 18
# While nothing goes to the guest.
_TO_HELD_GUEST = 1 << 20
# QEMU drops no frame when its socket is full, it holds its guest back.
_FROM_GUEST = 1 << 18
# Seconds for an incumbent to finish a frame that it has begun to send. QEMU writes the rest as
# soon as there is room; it would never, once it has stopped.
_FINISH = 0.05
# Seconds until a frame in part is looked at again.
_REST = 0.0005


class Far(Protocol):
    """What is on the other side of the network."""

    def fileno(self) -> int: ...

    def read(self, frames: Frames, buffer: bytearray) -> int:
        """Add what has come, as `Frames.read` does."""

    def send(self, data: bytes) -> int:
        """How much of it was taken. Raises BlockingIOError if it is full, OSError at the end."""

    def close(self) -> None: ...


class StreamFar:
    """A connection that speaks the same as QEMU."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.setblocking(False)

    def fileno(self) -> int:
        return self.sock.fileno()

    def read(self, frames: Frames, buffer: bytearray) -> int:
        return frames.read(self.sock, buffer)

    def send(self, data: bytes) -> int:
        return self.sock.send(data, socket.MSG_DONTWAIT)

    def close(self) -> None:
        self.sock.close()


class Relay:
    """`on_break` is called when the far side has gone; until another is joined, nothing flows."""

    def __init__(self, on_break: Callable[[], None]) -> None:
        self._on_break = on_break
        self._far: Far | None = None
        self._pairs: dict[int, Pair] = {}
        self._serving: int | None = None
        self._previous: int | None = None
        self._held = False
        self._to_guest = Frames()
        self._from_guest = Frames()
        # The rest of a frame that an instance has in part, for when it goes on.
        self._owed = b""
        self._watches = Watches()
        self._resting: set[int] = set()
        self._buffer = bytearray(BUFFER)

    # -- the two sides ----------------------------------------------------------------------

    def join(self, far: Far | None) -> None:
        """There is another far side: what was under way to and from the former is lost."""
        if self._far is not None:
            self._watches.forget(self._far.fileno())
            self._far.close()
            self._from_guest.begin_again()
        self._far = far
        if far is None:
            self._from_guest.clear()
        self._pump()

    def arguments(self, name: str, lending: Lending) -> list[str]:
        """A network of that name for an instance."""
        address = f"addr.type=fd,addr.str={self.lend(lending)}"
        return ["-netdev", f"stream,id={name},server=off,{address}"]

    def lend(self, lending: Lending) -> int:
        """A socket for an instance, by its number there; it holds both ends."""
        pair = Pair.make(None)
        assert pair.ours is not None
        self._pairs[lending.number] = pair
        lending.inherit(pair.ours.fileno())
        if self._serving is None:
            self._serving = lending.number
            self._pump()
        return lending.inherit(pair.theirs.fileno())

    def held_by(self, pid: int) -> bool:
        inodes = {f"socket:[{pair.inode}]" for pair in self._pairs.values()}
        directory = f"/proc/{pid}/fd"
        for fd in os.listdir(directory):
            with contextlib.suppress(OSError):
                if os.readlink(f"{directory}/{fd}") in inodes:
                    return True
        return False

    # -- another process ----------------------------------------------------------------------

    def save(self, saver: Saver) -> dict[str, Any]:
        return {
            "serving": self._serving,
            "pairs": {
                str(number): pair.save(saver.within(f"pair{number}"))
                for number, pair in self._pairs.items()
            },
            "to_guest": self._to_guest.save(saver),
            "from_guest": self._from_guest.save(saver),
        }

    def load(self, data: dict[str, Any], loader: Loader, far: Far | None) -> None:
        self._pairs = {
            int(number): Pair.load(pair, loader.within(f"pair{number}"))
            for number, pair in data["pairs"].items()
        }
        self._serving = data["serving"]
        if loader.exact:
            self._to_guest.load(data["to_guest"])
            self._from_guest.load(data["from_guest"])
        elif self._pair is not None:
            # So that it is known again what the instance has not read. If it has read a frame in
            # part (it reads 68 KiB at once), it needs the rest.
            unread = self._pair.unread()
            try:
                self._to_guest.add(unread)
            except Garbled:
                self._pair.send(unread)
        self.join(far)

    # -- the transaction --------------------------------------------------------------------

    def hold(self) -> None:
        self._held = True
        self._read_incumbent()
        pair, end = self._pair, time.monotonic() + _FINISH
        while pair is not None and pair.ours is not None and _unread(pair.ours):
            if time.monotonic() > end:
                break
            time.sleep(_REST)
            self._read_incumbent()
        self._pump()

    def take_back(self) -> None:
        if self._pair is not None:
            self._to_guest.taken_back(len(self._pair.unread()))
            self._to_guest.forget()

    def switch(self, number: int) -> None:
        """The incumbent's last frames go first."""
        self._read_incumbent()
        self._unwatch()
        self._owed = self._to_guest.owed()
        self._to_guest.begin_again()
        self._previous, self._serving = self._serving, number
        self._held = False
        self._pump()

    def give_back(self) -> None:
        """The incumbent goes on where it was."""
        if self._previous is not None:
            self._read_incumbent()
            self._unwatch()
            self._to_guest.clear()
            self._serving, self._previous = self._previous, None
            if self._pair is not None and self._owed:
                self._pair.send(self._owed)
        self._held = False
        self._pump()

    def drop(self, number: int) -> None:
        if number not in self._pairs:
            return
        if number == self._previous:
            self._previous = None
        elif number == self._serving:
            self._read_incumbent()
            self._unwatch()
            self._serving = None
        self._pairs.pop(number).close()
        self._pump()

    def close(self) -> None:
        self._watches.close()
        for pair in self._pairs.values():
            pair.close()
        self._pairs.clear()
        self._serving = self._previous = None
        if self._far is not None:
            self._far.close()
            self._far = None

    # -- frames -----------------------------------------------------------------------------

    @property
    def _pair(self) -> Pair | None:
        return None if self._serving is None else self._pairs.get(self._serving)

    def _pump(self) -> None:
        """Move what can be moved, and wait for what cannot."""
        self._write_far()
        self._write_instance()
        pair, far = self._pair, self._far
        if pair is not None and pair.ours is not None:
            fd = pair.ours.fileno()
            eager = self._held or len(self._from_guest) < _FROM_GUEST
            eager = eager and fd not in self._resting
            self._watches.read(fd, self._on_instance if eager else None)
            blocked = self._to_guest.waiting and not self._held
            self._watches.write(fd, self._pump if blocked else None)
        if far is not None:
            room = _TO_HELD_GUEST if self._held else _TO_GUEST
            reading = self._to_guest.waiting < room and far.fileno() not in self._resting
            self._watches.read(far.fileno(), self._on_far if reading else None)
            self._watches.write(far.fileno(), self._pump if self._from_guest.waiting else None)

    def _on_instance(self) -> None:
        if not self._read_instance() and self._pair is not None and self._pair.ours is not None:
            self._look_later(self._pair.ours.fileno())
        self._pump()

    def _on_far(self) -> None:
        if self._far is None:
            return
        try:
            if not self._far.read(self._to_guest, self._buffer):
                if _hung_up(self._far.fileno()):
                    raise ConnectionResetError
                self._look_later(self._far.fileno())
        except BlockingIOError:
            pass
        except (OSError, Garbled):
            self._broken()
            return
        self._pump()

    def _look_later(self, fd: int) -> None:
        """There is a frame in part, which shows as readable all the time."""
        self._resting.add(fd)
        asyncio.get_running_loop().call_later(_REST, self._look_again, fd)

    def _look_again(self, fd: int) -> None:
        self._resting.discard(fd)
        self._pump()

    def _read_instance(self) -> int:
        """Take what the instance has sent, as much as one look shows; how many bytes."""
        pair, count = self._pair, 0
        if pair is None or pair.ours is None:
            return 0
        try:
            count = self._from_guest.read(pair.ours, self._buffer)
        except Garbled:
            # Where the next frame begins nobody can tell, but it may be after all this.
            count = len(pair.receive())
        except OSError:
            return 0
        if self._far is None:
            self._from_guest.clear()
        return count

    def _read_incumbent(self) -> None:
        """All that it has sent."""
        while self._read_instance():
            pass

    def _write_far(self) -> None:
        while self._far is not None and self._from_guest.waiting:
            try:
                count = self._far.send(self._from_guest.next(_PIECE))
            except BlockingIOError:
                return
            except OSError:
                self._broken()
                return
            self._from_guest.passed(count)
            self._from_guest.forget()

    def _write_instance(self) -> None:
        pair = self._pair
        while self._to_guest.waiting and not self._held and pair is not None:
            count = pair.send(self._to_guest.next(_PIECE))
            if not count:
                break
            self._to_guest.passed(count)
        if pair is not None and not self._held:
            self._to_guest.forget(_unread(pair.theirs))

    def _broken(self) -> None:
        self.join(None)
        self._on_break()

    def _unwatch(self) -> None:
        pair = self._pair
        if pair is not None and pair.ours is not None:
            self._watches.forget(pair.ours.fileno())


def _unread(sock: socket.socket) -> int:
    count: int = struct.unpack("i", fcntl.ioctl(sock, termios.FIONREAD, bytes(4)))[0]
    return count


def _hung_up(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLRDHUP)
    return bool(poll.poll(0))
