"""A relay of whole frames between the instance of the moment and what is on its network.

Each instance has a socketpair of its own, over which each frame is a message, so that none can be
torn (`-netdev dgram`). At hold nothing more goes towards the guest, and what the incumbent has not
read is taken back, to be sent to the successor first; what it still sends is passed on.

Not `-netdev stream`: QEMU 7.2 to 11.1 end by an assertion (net_fill_rstate) if there is nothing
where poll() had just shown something, which is what taking back comes to on a busy host.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
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
# Frames that are read at one turn.
_TURN = 64
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
    """`on_break` is called when the far side has gone; until another is joined, nothing flows.

    With `admits`, only frames of the guest's that it says yes to are passed on.
    """

    def __init__(
        self,
        on_break: Callable[[], None],
        admits: Callable[[memoryview], bool] | None = None,
    ) -> None:
        self._on_break = on_break
        self._admits = admits
        self._far: Far | None = None
        self._pairs: dict[int, Pair] = {}
        self._serving: int | None = None
        self._previous: int | None = None
        self._held = False
        self._to_guest = Frames()
        self._from_guest = Frames()
        self._watches = Watches()
        # There is a frame in part on the far side, which shows as readable all the time.
        self._resting = False
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
        return ["-netdev", f"dgram,id={name},local.type=fd,local.str={self.lend(lending)}"]

    def lend(self, lending: Lending) -> int:
        """A socket for an instance, by its number there; it holds both ends."""
        pair = Pair.make(None, messages=True)
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
        self._held = loader.held
        if loader.exact:
            self._to_guest.load(data["to_guest"])
            self._from_guest.load(data["from_guest"])
        self.join(far)

    # -- the transaction --------------------------------------------------------------------

    def hold(self) -> None:
        self._held = True
        self._pump()

    def take_back(self) -> None:
        if self._pair is not None:
            self._to_guest.put_back(_all_unread(self._pair))

    def switch(self, number: int) -> None:
        """The incumbent's last frames go first."""
        self._read_incumbent()
        self._unwatch()
        self._previous, self._serving = self._serving, number
        self._held = False
        self._pump()

    def give_back(self) -> None:
        """The incumbent goes on where it was."""
        if self._previous is not None:
            self._read_incumbent()
            self._unwatch()
            self.take_back()
            self._serving, self._previous = self._previous, None
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
            eager = self._held or self._from_guest.waiting < _FROM_GUEST
            self._watches.read(fd, self._on_instance if eager else None)
            blocked = self._to_guest.waiting and not self._held
            self._watches.write(fd, self._pump if blocked else None)
        if far is not None:
            room = _TO_HELD_GUEST if self._held else _TO_GUEST
            reading = self._to_guest.waiting < room and not self._resting
            self._watches.read(far.fileno(), self._on_far if reading else None)
            self._watches.write(far.fileno(), self._pump if self._from_guest.waiting else None)

    def _on_instance(self) -> None:
        self._read_instance()
        self._pump()

    def _on_far(self) -> None:
        if self._far is None:
            return
        try:
            if not self._far.read(self._to_guest, self._buffer):
                if _hung_up(self._far.fileno()):
                    raise ConnectionResetError
                self._resting = True
                asyncio.get_running_loop().call_later(_REST, self._look_again)
        except BlockingIOError:
            pass
        except (OSError, Garbled):
            self._broken()
            return
        self._pump()

    def _look_again(self) -> None:
        self._resting = False
        self._pump()

    def _read_instance(self) -> bool:
        """Take frames that the instance has sent; whether there may be more."""
        pair = self._pair
        if pair is None or pair.ours is None:
            return False
        for _ in range(_TURN):
            try:
                count = pair.ours.recv_into(self._buffer, 0, socket.MSG_DONTWAIT)
            except OSError:
                return False
            if not count:
                return False
            frame = memoryview(self._buffer)[:count]
            if self._far is not None and (self._admits is None or self._admits(frame)):
                self._from_guest.add_frame(frame)
        return True

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

    def _write_instance(self) -> None:
        pair = self._pair
        while self._to_guest.waiting and not self._held and pair is not None:
            if not pair.send(self._to_guest.first()):
                break
            self._to_guest.passed_first()

    def _broken(self) -> None:
        self.join(None)
        self._on_break()

    def _unwatch(self) -> None:
        pair = self._pair
        if pair is not None and pair.ours is not None:
            self._watches.forget(pair.ours.fileno())


def _all_unread(pair: Pair) -> list[bytes]:
    """Take out what the instance has not read; it may read at the same time."""
    return list(iter(pair.unread, b""))


def _hung_up(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLRDHUP)
    return bool(poll.poll(0))
