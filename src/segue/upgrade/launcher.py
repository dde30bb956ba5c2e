"""A program that becomes QEMU: it is given descriptors over a socket first, then executes it.

    python -ISE launcher.py SOCKET

QEMU executes it in its own place in a cpr-exec, and Segue starts it when the old QEMU must be
brought back. It sends every descriptor that it was left with, since the guest's video and
firmware memory is in them and would be gone if what it executes dies; then it receives what the
new QEMU is to have. Messages, each a line of JSON with its descriptors by SCM_RIGHTS:

    → {"held": [NUMBER, ...], "state": NUMBER}    what it has; QEMU_CPR_EXEC_STATE
    ← {"argv": [...], "close": [NUMBER, ...], "numbers": [NUMBER, ...]}
    → {"error": TEXT}                               only if it cannot be executed

It imports nothing but the standard library's smallest modules: all of it is in the guest's pause.
"""

import os
import socket
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MOST = 250
"""Descriptors in one message; the kernel takes 253 (unix(7), SCM_MAX_FD)."""


def main(path: str) -> None:
    import json

    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(path)
    mine = [n for n in _open_descriptors() if n > 2 and n != sock.fileno()]
    send(sock, {"held": mine, "state": os.environ.get("QEMU_CPR_EXEC_STATE", "")}, mine)
    order, fds = receive(sock)
    for number in order["close"]:
        _close(number)
    wanted = dict(zip(order["numbers"], fds, strict=True))
    # Out of the way first: a number that is wanted may be one that was just received.
    top = max([*wanted, *fds, *mine, sock.fileno()], default=2) + 1
    moved = {number: _move(fd, top) for number, fd in wanted.items()}
    if sock.fileno() in wanted:
        sock = socket.socket(fileno=_move(sock.detach(), top))
    for number, fd in moved.items():
        os.dup2(fd, number, inheritable=True)
        os.close(fd)
    try:
        os.execvp(order["argv"][0], order["argv"])  # noqa: S606
    except OSError as error:
        sock.send(json.dumps({"error": f"{order['argv'][0]}: {error.strerror}"}).encode())
        os._exit(127)


def send(sock: socket.socket, message: dict[str, object], fds: list[int]) -> None:
    import json

    sock.send(json.dumps(message | {"fds": len(fds)}).encode())
    for start in range(0, len(fds), MOST):
        socket.send_fds(sock, [b"\0"], fds[start : start + MOST])


def receive(sock: socket.socket) -> "tuple[Any, list[int]]":
    """The next message and its descriptors. Raises ConnectionError at the end."""
    import json

    data = sock.recv(1 << 20)
    if not data:
        raise ConnectionError("the other side has gone")
    message = json.loads(data)
    fds: list[int] = []
    while len(fds) < message.get("fds", 0):
        _, more, _, _ = socket.recv_fds(sock, 1, MOST)
        if not more:
            raise ConnectionError("descriptors are missing")
        fds += more
    return message, fds


def _open_descriptors() -> list[int]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        number = int(name)
        try:
            os.fstat(number)
        except OSError:
            continue  # the listing's own
        found.append(number)
    return sorted(found)


def _move(fd: int, above: int) -> int:
    import fcntl

    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above)
    os.close(fd)
    return moved


def _close(number: int) -> None:
    try:
        os.close(number)
    except OSError:
        pass


if __name__ == "__main__":
    main(sys.argv[1])
