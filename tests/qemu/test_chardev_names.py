"""`query-chardev` names the ends that a user has, in the words of a QEMU without Segue."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.qemu.harness import Qmp, Segue, alive, qemu, wait_until

SERVER = "server=on,wait=off"
PLAIN = ("-M", "q35", "-m", "64", "-nodefaults", "-display", "none", "-S")


def chardevs(place: Path, there: int) -> dict[str, str]:
    """By name; the servers numbered 0 are called, `there` is a TCP port on which somebody is."""
    servers = {
        f"{kind}{number}": f"socket,{where},{SERVER}"
        for number in range(2)
        for kind, where in (
            ("unix", f"path={place}/unix{number}"),
            ("tcp", "host=127.0.0.1,port=0"),
            ("telnet", "host=127.0.0.1,port=0,telnet=on"),
        )
    }
    return servers | {
        "client": f"socket,path={place}/there",
        "tcp-client": f"socket,host=127.0.0.1,port={there}",
        "pty": "pty",
        "null": "null",
        "file": f"file,path={place}/file",
        "pipe": f"pipe,path={place}/pipe",
        "udp": f"udp,host=127.0.0.1,port={there}",
    }


@contextmanager
def plain(release: str, arguments: list[str], place: Path) -> Iterator[Path]:
    path, pid = place / "qmp", place / "pid"
    words = [qemu(release), *arguments, "-qmp", f"unix:{path},{SERVER}"]
    # -daemonize: it returns when the sockets are there.
    subprocess.run([*words, "-daemonize", "-pidfile", str(pid)], check=True, capture_output=True)
    number = int(pid.read_text())
    try:
        yield path
    finally:
        os.kill(number, signal.SIGKILL)
        wait_until("its end", lambda: not alive(number))


def names(monitor: Path, place: Path, wanted: dict[str, str]) -> dict[str, str]:
    """What is told, once all clients are there; without what differs from one time to another."""

    def told() -> dict[str, str]:
        listed = {c["label"]: c["filename"] for c in qmp.command("query-chardev")}
        return {name: listed[name] for name in wanted}

    with ExitStack() as stack:
        qmp = stack.enter_context(Qmp(monitor))
        for kind, filename in ((kind, told()[f"{kind}0"]) for kind in ("unix", "tcp", "telnet")):
            assert filename.startswith("disconnected:")
            if kind == "unix":
                sock = stack.enter_context(socket.socket(socket.AF_UNIX))
                sock.connect(str(place / "unix0"))
            else:
                port = int(filename.partition("127.0.0.1:")[2].partition(",")[0])
                stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        wait_until(
            "the clients",
            lambda: not any(told()[f"{k}0"].startswith("disc") for k in ("unix", "tcp", "telnet")),
        )
        found = told()
    return {
        name: re.sub(r"(pts/|127\.0\.0\.1:)\d+", r"\1N", text).replace(str(place), "PLACE")
        for name, text in found.items()
    }


# Of a client of a Unix socket 7.2 tells no path.
@pytest.mark.parametrize("release", ["10.0", "11.1"])
def test_names_as_qemu_gives_them(segue: Segue, place: Path, release: str) -> None:
    found = []
    for kept in (False, True):
        with tempfile.TemporaryDirectory(dir=place) as name, ExitStack() as stack:
            folder = Path(name)
            os.mkfifo(folder / "pipe")
            unix = stack.enter_context(socket.socket(socket.AF_UNIX))
            unix.bind(str(folder / "there"))
            unix.listen()
            tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            wanted = chardevs(folder, tcp.getsockname()[1])
            arguments = list(PLAIN)
            for id, text in wanted.items():
                kind, _, rest = text.partition(",")
                arguments += ["-chardev", f"{kind},id={id}" + (f",{rest}" if rest else "")]
            if kept:
                guest = segue.start("guest", [qemu(release), *arguments])
                found.append(names(guest.directory / "qmp.sock", folder, wanted))
                guest.stop()
                guest.wait()
            else:
                monitor = stack.enter_context(plain(release, arguments, folder))
                found.append(names(monitor, folder, wanted))
    assert found[1] == found[0]
