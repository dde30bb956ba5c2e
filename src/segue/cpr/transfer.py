"""Transfer: a state with its descriptors goes to another process, over a connected Unix socket.

| sender                                   | receiver                                              |
|------------------------------------------|-------------------------------------------------------|
| `S` with the memfd of the state          | `+`: it knows now which descriptors will come         |
| `D` with up to 250 of them, in the order | `+` for each such message, so that few of them are on |
| of the state's table, until all are sent | the way at once (the kernel limits that)              |
|                                          | `R`: loaded, and everything is ready                  |
| `Y`: yours. `N`, at any time: not yours  |                                                       |

Instead of `+` or `R` a receiver may say `-` and one line of JSON, why not (arrival.py).

Sending `Y` is the one point at which the owner changes: a sender that cannot, or that has waited
for too long, still owns everything. It says `N` then. So to a receiver that is ready the end of the
stream without either means that the sender is dead, and that nobody else has what it was given.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import time
from collections.abc import Iterator

from segue.cpr.arrival import Arrival, How, raise_from_line, to_line
from segue.cpr.errors import CprError, Misuse, Reason, Refused, TransferFailed
from segue.cpr.state import Parsed, State, dump, in_memfd, read_all

TIMEOUT = 30.0
# The kernel takes up to 253 (SCM_MAX_FD) in one message.
_BATCH = 250
_LONGEST_ANSWER = 1 << 16
_STATE, _DESCRIPTORS, _YOURS, _NOT_YOURS = b"S", b"D", b"Y", b"N"
_OK, _READY, _NO = b"+", b"R", b"-"


def transfer(state: State, sock: socket.socket, *, timeout: float = TIMEOUT) -> None:
    """Give `state` to the process at the other end of `sock`, which calls `receive`.

    Blocks until that one is ready. On return it owns the state, and this process should close its
    own descriptors, or end. Until then, and after any error, this process owns everything: Refused
    by the receiver, TransferFailed where it went away or took longer than `timeout` seconds. The
    socket is shut down then.
    """
    channel = _Channel(sock, timeout)
    with contextlib.ExitStack() as ours:
        ours.callback(channel.restore)
        ours.push(channel.abandon)
        data, descriptors = dump(state, None)
        try:
            fd = in_memfd(data)
        except OSError as error:
            raise TransferFailed(f"the state cannot be written: {error.strerror}") from error
        ours.callback(os.close, fd)
        channel.send(_STATE, [fd])
        channel.expect(_OK)
        for start in range(0, len(descriptors), _BATCH):
            channel.send(_DESCRIPTORS, descriptors[start : start + _BATCH])
            channel.expect(_OK)
        channel.expect(_READY)
        channel.send(_YOURS)


@contextlib.contextmanager
def receive(sock: socket.socket, *, timeout: float = TIMEOUT) -> Iterator[Arrival]:
    """The state that `transfer` sends over `sock`. As with `resumed`, the block makes it ready.

    When the block ends, this process owns the state. Whatever exception leaves it is told to the
    sender, who goes on. TransferFailed says that the sender changed its mind, went away before all
    had come, or took longer than `timeout` seconds to send it. What had come is closed then; what
    `load` has returned is the program's to close, as by then other objects may hold it.
    """
    channel = _Channel(sock, timeout)
    taken: list[int] = []
    arrival: Arrival | None = None
    try:
        arrival = _fetch(channel, taken)
        yield arrival
        arrival._require_loaded()
        channel.settle()
    except BaseException as error:
        if arrival is None or not arrival._loaded:
            for fd in taken:
                os.close(fd)
        if not isinstance(error, TransferFailed):
            with contextlib.suppress(TransferFailed):
                channel.send(_NO + to_line(error))
        channel.close()
        raise
    finally:
        channel.restore()


def _fetch(channel: _Channel, taken: list[int]) -> Arrival:
    [fd] = channel.expect(_STATE, 1)
    try:
        parsed = Parsed(read_all(fd))
    finally:
        os.close(fd)
    table = parsed.entries
    channel.send(_OK)
    while len(taken) < len(table):
        taken += channel.expect(_DESCRIPTORS, min(_BATCH, len(table) - len(taken)))
        channel.send(_OK)
    numbers = {entry.name: taken[at] for at, entry in enumerate(table)}
    return Arrival(How.TRANSFER, parsed, descriptors=numbers)


class _Channel:
    """One end of the socket, with a deadline for all of it."""

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
            raise Misuse("a state is transferred over a Unix stream socket")
        self._socket = sock
        self._before = sock.gettimeout()
        self.deadline: float | None = time.monotonic() + timeout

    def restore(self) -> None:
        self._socket.settimeout(self._before)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def abandon(self, kind: object, error: object, trace: object) -> None:
        """If anything went wrong: the receiver learns that it will own nothing."""
        if error is not None:
            with contextlib.suppress(TransferFailed):
                self.send(_NOT_YOURS)
            self.close()

    def settle(self) -> None:
        """Tell the sender that all is ready, and return once we own it. Raises TransferFailed."""
        # Without a limit: if we gave up, it might have said already that all is ours.
        self.deadline = None
        with contextlib.suppress(TransferFailed):
            self.send(_READY)
        with self._failures():
            word = self._socket.recv(1)
        if word not in (_YOURS, b""):
            raise TransferFailed("the sender keeps what it has sent")

    def send(self, data: bytes, descriptors: list[int] | None = None) -> None:
        with self._failures():
            if descriptors:
                # One byte: there is no such thing as half of it.
                socket.send_fds(self._socket, [data], descriptors, socket.MSG_NOSIGNAL)
            else:
                self._socket.sendall(data, socket.MSG_NOSIGNAL)

    def expect(self, wanted: bytes, count: int = 0) -> list[int]:
        """The descriptors that come with the message `wanted`, of which there must be `count`."""
        with self._failures():
            word, descriptors, truncated = self._receive(count)
        if word == wanted and len(descriptors) == count:
            return descriptors
        for fd in descriptors:
            os.close(fd)
        if truncated or (word == wanted and len(descriptors) < count):
            raise Refused(
                f"{count - len(descriptors)} of {count} descriptors could not be received",
                "raise the limit of open files (ulimit -n) of the receiver",
                Reason.DESCRIPTOR,
            )
        if word == wanted:
            raise Refused("more descriptors came than were named", reason=Reason.LEFT_OVER)
        if word == _NO:
            self._refused()
        if word == _NOT_YOURS:
            raise TransferFailed("the sender keeps what it has sent")
        if not word:
            raise TransferFailed("the other process went away")
        raise TransferFailed(f"the other process said {word!r} in place of {wanted!r}")

    def _receive(self, count: int) -> tuple[bytes, list[int], bool]:
        width = array.array("i").itemsize
        # Room for one more than expected, so that one more is noticed.
        room = socket.CMSG_SPACE((count + 1) * width)
        word, ancillary, flags, _ = self._socket.recvmsg(1, room, socket.MSG_CMSG_CLOEXEC)
        found = array.array("i")
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                found.frombytes(data[: len(data) - len(data) % width])
        return word, list(found), bool(flags & socket.MSG_CTRUNC)

    def _refused(self) -> None:
        line = bytearray()
        with self._failures():
            while not line.endswith(b"\n") and len(line) < _LONGEST_ANSWER:
                more = self._socket.recv(4096)
                if not more:
                    break
                line += more
        try:
            raise_from_line(bytes(line))
        except ValueError as error:
            raise TransferFailed("the other process refuses, and does not say why") from error
        raise TransferFailed("the other process refuses, and does not say why")

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            if self.deadline is None:
                self._socket.settimeout(None)
            else:
                self._socket.settimeout(max(0.001, self.deadline - time.monotonic()))
            yield
        except TimeoutError as error:
            raise TransferFailed("the other process does not answer") from error
        except CprError:
            raise
        except OSError as error:
            raise TransferFailed(f"the other process went away: {error.strerror}") from error
