"""The guard: what one instance does to a kept device waits for the supervisor's answer.

A QEMU that only starts sets its taps up, and what it sets belongs to the interface, which the
incumbent is using at that moment: the incumbent's packets are lost from then on. So each
instance runs under a seccomp filter that sends us the ioctls of watched requests. Whoever kept
the device answers in the kernel's place, or lets the kernel do it.

The guard can also change which open file a descriptor number of the instance means (`lend`). The
kernel allows that only while some system call of the instance waits for us, so there is a *bell*:
a second QMP monitor that is never spoken to. A newline sent to it makes QEMU call recvmsg(2) on
the monitor's descriptor, which is in the filter too. QEMU reads its monitors in a thread of
their own, so the bell is answered while its main loop is busy stopping or loading the guest.

A filter stays for the life of the process. QEMU itself inherits the listener, so that an ioctl
waits, and does not fail, while there is no supervisor to answer it (QEMU aborts if it fails).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol

from segue.errors import SegueError
from segue.kept import seccomp
from segue.kept.seccomp import Notification
from segue.saved import Loader, Saver

BELL_ID = "segue-bell"

# Longer than a thread of a busy host takes to come round, shorter than a guest may be stopped.
_ANSWER_LIMIT = 0.5


@dataclass(frozen=True)
class Call:
    """An ioctl that an instance waits in; `argument` is a number, or an address in its memory."""

    notification: Notification
    request: int
    argument: int

    def read(self, size: int) -> bytes:
        """What the argument points to. Raises OSError."""
        return self.notification.read(self.argument, size)

    def write(self, data: bytes) -> None:
        """Write where the argument points to. Raises OSError."""
        self.notification.write(self.argument, data)


class Watcher(Protocol):
    """Whoever answers for one descriptor of an instance."""

    def ioctl(self, call: Call) -> bool:
        """Do what is asked; an OSError is what the instance sees. False: the kernel may do it."""


class Guard:
    """One instance's filter, from before its start until it is dead.

    `watch` comes first, then `arm`; `before_exec` runs in the child; `serve` once it was started.
    """

    def __init__(self) -> None:
        self.listener = -1
        self.descriptors: tuple[int, ...] = ()
        self.arguments: tuple[str, ...] = ()
        self.held_listener = -1
        """The listener's number in the instance."""
        self._reserved = -1
        self._requests: set[int] = set()
        self._watchers: dict[int, Watcher] = {}
        self._watchers_of_any: list[tuple[int, Watcher]] = []
        self._wanted: dict[int, int] = {}
        self._done: Callable[[], None] = lambda: None
        self._bell: socket.socket | None = None
        self._their_bell: socket.socket | None = None
        self._channel: tuple[socket.socket, socket.socket] | None = None

    @property
    def armed(self) -> bool:
        return self._channel is not None or self.listener >= 0

    def watch(self, fd: int, requests: Collection[int], watcher: Watcher) -> None:
        """Have the `requests` on the instance's descriptor `fd` answered by `watcher`."""
        self._requests |= set(requests)
        self._watchers[fd] = watcher

    def watch_any(self, request: int, watcher: Watcher) -> None:
        """Have `request` answered by `watcher`, whichever descriptor of the instance it is for.

        For what an instance opens itself. Of several watchers the first that does it counts.
        """
        self._requests.add(request)
        self._watchers_of_any.append((request, watcher))

    def arm(self) -> None:
        """Make what the instance is to inherit, if there is anything to watch. Raises OSError."""
        if not self._watchers:
            return
        self._bell, self._their_bell = socket.socketpair()
        self._channel = socket.socketpair()
        # Only its number counts: the child puts its listener there.
        self.held_listener = self._reserved = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        bell = self._their_bell.fileno()
        self.descriptors = (self._bell.fileno(), bell, self.held_listener)
        words = ("-chardev", f"socket,id={BELL_ID},fd={bell}", "-qmp", f"chardev:{BELL_ID}")
        self.arguments = words

    def before_exec(self) -> None:
        """In the child: put the filter on, leave its listener to QEMU, and send us a duplicate.

        What goes wrong is sent too, since an exception here reaches the parent without its words.
        """
        assert self._channel is not None and self._their_bell is not None
        numbers = seccomp.numbers()
        rules = (
            seccomp.Rule(numbers.ioctl, 1, sorted(self._requests)),
            seccomp.Rule(numbers.recvmsg, 0, (self._their_bell.fileno(),)),
        )
        try:
            listener = seccomp.install(numbers.seccomp, seccomp.program(numbers.arch, rules))
        except OSError as error:
            self._channel[1].send(os.strerror(error.errno or 0).encode())
            raise
        os.dup2(listener, self.held_listener, inheritable=True)
        socket.send_fds(self._channel[1], [b"\0"], [listener])

    def serve(self) -> None:
        """The child has been started: answer it from now on."""
        if self._channel is None:
            return
        _, fds, _, _ = socket.recv_fds(self._channel[0], 256, 1, socket.MSG_DONTWAIT)
        self._close_channel()
        self._close_reserved()
        self.listener = fds[0]
        asyncio.get_running_loop().add_reader(self.listener, self._readable)

    def why_not_started(self) -> str | None:
        """After a failed start: what the child said against the filter, None if nothing."""
        if self._channel is None:
            return None
        with contextlib.suppress(BlockingIOError):
            said = self._channel[0].recv(256, socket.MSG_DONTWAIT)
            return said.decode() if said.strip(b"\0") else None
        return None

    def save(self, saver: Saver, instance: int) -> dict[str, Any]:
        """`instance` is the number of the one that it guards."""
        if self.listener < 0 or self._bell is None or self._their_bell is None:
            return {}
        saver.fd("listener", self.listener, held={instance: self.held_listener})
        saver.fd("bell", self._bell.fileno(), lent=True)
        saver.fd("their-bell", self._their_bell.fileno(), lent=True)
        return {"held": self.held_listener}

    @classmethod
    def load(cls, data: dict[str, Any], loader: Loader) -> Guard:
        """What is to be watched is told again by `watch`, and then `go_on`."""
        guard = cls()
        if data:
            guard.held_listener = data["held"]
            guard.listener = loader.needed("listener")
            guard._bell, guard._their_bell = loader.socket("bell"), loader.socket("their-bell")
        return guard

    def go_on(self) -> None:
        """Answer the instance again, in another process."""
        if self.listener >= 0:
            asyncio.get_running_loop().add_reader(self.listener, self._readable)

    def lend(self, lendings: dict[int, int]) -> None:
        """Have each descriptor number of the instance mean ours: {its number: our descriptor}.

        Returns once it is so. Raises SegueError if the instance does not come round in time; it
        is done then as soon as it does.
        """
        self.lend_soon(lendings, lambda: None)
        poll = select.poll()
        poll.register(self.listener, select.POLLIN)
        while self._wanted:
            ready = poll.poll(_ANSWER_LIMIT * 1000)
            if not ready or not ready[0][1] & select.POLLIN:
                raise SegueError("QEMU did not take the descriptors that it was lent")
            self._readable()

    def lend_soon(self, lendings: dict[int, int], done: Callable[[], None]) -> None:
        """As `lend`, without waiting: `done` is called when it is so. Raises SegueError."""
        if self.listener < 0 or self._bell is None or not lendings:
            done()
            return
        self._wanted |= lendings
        self._done = done
        try:
            self._bell.send(b"\n", socket.MSG_DONTWAIT)
        except OSError as error:
            raise SegueError(f"QEMU's guard cannot be reached: {error.strerror}") from None

    def close(self) -> None:
        """The instance is dead, or was never started."""
        if self.listener >= 0:
            asyncio.get_running_loop().remove_reader(self.listener)
            os.close(self.listener)
            self.listener = -1
        self._close_reserved()
        for sock in (self._bell, self._their_bell):
            if sock is not None:
                sock.close()
        self._close_channel()
        self._watchers.clear()
        self._watchers_of_any.clear()

    def _close_reserved(self) -> None:
        if self._reserved >= 0:
            os.close(self._reserved)
            self._reserved = -1

    def _close_channel(self) -> None:
        if self._channel is not None:
            for sock in self._channel:
                sock.close()
            self._channel = None

    def _readable(self) -> None:
        notification = Notification.receive(self.listener)
        if notification is None:
            poll = select.poll()
            poll.register(self.listener, 0)
            if any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll(0)):
                asyncio.get_running_loop().remove_reader(self.listener)
            return
        numbers = seccomp.numbers()
        if notification.number == numbers.ioctl:
            self._ioctl(notification)
        else:
            self._rung(notification)

    def _ioctl(self, notification: Notification) -> None:
        fd, request, argument = notification.arguments[:3]
        call = Call(notification, request & 0xFFFFFFFF, argument)
        watchers = [watcher for known, watcher in self._watchers_of_any if known == call.request]
        if fd in self._watchers:
            watchers.append(self._watchers[fd])
        try:
            done = any(watcher.ioctl(call) for watcher in watchers)
        except OSError as error:
            notification.fail(error.errno or 5)
        else:
            notification.done() if done else notification.go_on()

    def _rung(self, notification: Notification) -> None:
        try:
            for number, source in self._wanted.items():
                notification.put(source, number)
        except FileNotFoundError:
            return  # called off by a signal: it will ring again; or dead
        self._wanted = {}
        notification.go_on()
        done, self._done = self._done, lambda: None
        done()
