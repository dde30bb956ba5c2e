"""systemd's side of a service that replaces itself: sd_notify, the descriptor store, LISTEN_FDS.

The protocols are those of sd_notify(3) and sd_listen_fds(3). Without systemd nothing happens, and
each call says so by returning False or nothing.

What a unit of a service that restarts itself on SIGHUP needs:

    systemd 253 and newer                     Type=notify-reload
    older (Debian 12 has 252)                 Type=notify
                                              ExecReload=kill -HUP $MAINPID

`reload_lines` gives those of the systemd that is installed. With the older one `systemctl reload`
does not wait for the new code; where it should, let ExecReload= be a command that does.
FileDescriptorStoreMax= has to allow the store, and NotifyAccess= whoever speaks (main by default).
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import time
from collections.abc import Iterable, MutableMapping, Sequence

from segue.cpr.descriptor import Descriptor
from segue.cpr.errors import Misuse

FIRST_WITH_NOTIFY_RELOAD = 253
# The kernel takes up to 253 (SCM_MAX_FD) in one message.
_BATCH = 253
_FIRST_DESCRIPTOR = 3
_LONGEST_NAME = 255
_TIMEOUT = 5.0


class Notifier:
    """Tells systemd what becomes of the service. Each method says whether it could be told."""

    def __init__(self, address: str | None, timeout: float = _TIMEOUT) -> None:
        """`address` is what NOTIFY_SOCKET says; None where there is no systemd.

        `timeout` is how long a systemd that reads nothing may hold up a call, in seconds.
        """
        self._address = address
        self._timeout = timeout

    @classmethod
    def from_environment(cls) -> Notifier:
        """NOTIFY_SOCKET stays in the environment, for the code that comes after a restart."""
        return cls(os.environ.get("NOTIFY_SOCKET") or None)

    def ready(self, status: str | None = None) -> bool:
        """The service is up; or its restart is over, that `reloading` began."""
        return self._send(["READY=1", *_status(status)])

    def reloading(self, status: str | None = None) -> bool:
        """A restart begins; `ready` ends it, sent by the new code or by the old."""
        # systemd tells by the time whether this answers its own signal, or an earlier one.
        now = time.monotonic_ns() // 1000
        return self._send(["RELOADING=1", f"MONOTONIC_USEC={now}", *_status(status)])

    def stopping(self, status: str | None = None) -> bool:
        return self._send(["STOPPING=1", *_status(status)])

    def status(self, text: str) -> bool:
        return self._send(_status(text))

    def main_pid(self, pid: int) -> bool:
        """Another process is the service from here on, as after `transfer`."""
        return self._send([f"MAINPID={pid}"])

    def store(
        self, name: str, descriptors: Sequence[int | Descriptor], *, poll: bool = True
    ) -> bool:
        """Have systemd hold duplicates, which come back by `listen_fds` after a crash.

        It lets go of those that are hung up, unless it is told not to `poll` them.
        """
        _check_name(name)
        numbers = [each if isinstance(each, int) else each.fd for each in descriptors]
        lines = ["FDSTORE=1", f"FDNAME={name}", *([] if poll else ["FDPOLL=0"])]
        return all(
            self._send(lines, numbers[start : start + _BATCH])
            for start in range(0, len(numbers), _BATCH)
        )

    def remove(self, name: str) -> bool:
        """Have systemd close all that it holds under this name."""
        _check_name(name)
        return self._send(["FDSTOREREMOVE=1", f"FDNAME={name}"])

    def barrier(self, timeout: float = _TIMEOUT) -> bool:
        """Wait until systemd has acted on all that it was told before (sd_notify_barrier(3))."""
        read, write = os.pipe()
        try:
            try:
                told = self._send(["BARRIER=1"], [write])
            finally:
                os.close(write)
            return told and bool(select.select([read], [], [], timeout)[0])
        finally:
            os.close(read)

    def _send(self, lines: Iterable[str], descriptors: Sequence[int] = ()) -> bool:
        if self._address is None or self._address[0] not in "/@":
            return False
        # A first @ stands for the NUL byte of an abstract address.
        address = os.fsencode(self._address)
        if address.startswith(b"@"):
            address = b"\0" + address[1:]
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(self._timeout)
            message = "\n".join(lines).encode()
            try:
                sock.connect(address)
                socket.send_fds(sock, [message], descriptors, socket.MSG_NOSIGNAL)
            except OSError:
                return False
        return True


def listen_fds(environment: MutableMapping[str, str] = os.environ) -> tuple[Descriptor, ...]:
    """What systemd passed: listening sockets by their FileDescriptorName=, and the store's.

    Several may have one name. They become close-on-exec, and the variables are removed, so that
    neither passes to children; a second call finds nothing.
    """
    pid = environment.pop("LISTEN_PID", None)
    count = environment.pop("LISTEN_FDS", None)
    names = environment.pop("LISTEN_FDNAMES", "").split(":")
    try:
        if pid is None or count is None or int(pid) != os.getpid():
            return ()
        numbers = range(_FIRST_DESCRIPTOR, _FIRST_DESCRIPTOR + int(count))
    except ValueError:
        return ()
    if len(names) != len(numbers):
        names = ["unknown"] * len(numbers)
    for number in numbers:
        os.set_inheritable(number, False)
    return tuple(Descriptor(name, number) for name, number in zip(names, numbers, strict=True))


def reload_lines(version: int | None = None) -> str:
    """The lines of a [Service] section by which `systemctl reload` sends SIGHUP.

    `version` is that of systemd, by default of the installed one; unknown ones count as old.
    """
    version = installed_version() if version is None else version
    if version is not None and version >= FIRST_WITH_NOTIFY_RELOAD:
        return "Type=notify-reload\n"
    return "Type=notify\nExecReload=kill -HUP $MAINPID\n"


def installed_version() -> int | None:
    """As in `systemd 252 (252.38-1~deb12u1)`; None where there is none."""
    with contextlib.suppress(OSError, ValueError, IndexError, subprocess.SubprocessError):
        command = ["systemctl", "--version"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_TIMEOUT)
        return int(done.stdout.split()[1].split("~")[0].split(".")[0])
    return None


def _status(text: str | None) -> list[str]:
    return [] if text is None else ["STATUS=" + text.replace("\n", " ")]


def _check_name(name: str) -> None:
    fine = name.isascii() and name.isprintable() and ":" not in name
    if not (fine and 0 < len(name) <= _LONGEST_NAME):
        raise Misuse(f"systemd takes no descriptor name like {name!r}")
