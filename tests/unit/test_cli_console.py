"""segue console: every byte through, Ctrl-] detaches, and the terminal is always put back."""

from __future__ import annotations

import os
import pty
import select
import signal
import socket
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from segue.machines import MachineDirectory
from tests.unit.fake_supervisor import status

COMMAND = [sys.executable, "-m", "segue", "console", "web"]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MachineDirectory]:
    monkeypatch.setenv("SEGUE_RUN_DIR", str(tmp_path))
    directory = MachineDirectory.create("web")
    directory.write_status(status("web"))
    yield directory
    directory.remove()


@pytest.fixture
def listener(machine: MachineDirectory) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(os.fspath(machine.console))
        listener.listen()
        yield listener


class Session:
    """`segue console` on a terminal of its own, and the guest's end of the line."""

    def __init__(self, listener: socket.socket) -> None:
        self.terminal, inner = pty.openpty()
        self.before = termios.tcgetattr(self.terminal)
        self.process = subprocess.Popen(COMMAND, stdin=inner, stdout=inner, stderr=inner)
        os.close(inner)
        self.guest, _ = listener.accept()
        self.screen = b""
        self.shows(b"Ctrl-] detaches")

    def shows(self, text: bytes) -> None:
        """Read the screen until it shows `text`."""
        while text not in self.screen:
            assert select.select([self.terminal], [], [], 60)[0], self.screen
            self.screen += os.read(self.terminal, 65536)

    def ended(self) -> int:
        """The exit status; by then the terminal must be as it was."""
        status = self.process.wait(60)
        assert termios.tcgetattr(self.terminal) == self.before
        return status

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.guest.close()
        os.close(self.terminal)


@pytest.fixture
def session(listener: socket.socket) -> Iterator[Session]:
    session = Session(listener)
    yield session
    session.close()


def test_keys_and_output_go_through_and_ctrl_bracket_detaches(session: Session) -> None:
    keys = b"\x03\x1a\x04\x00\xff\r\x7f"
    os.write(session.terminal, keys)
    assert session.guest.recv(len(keys), socket.MSG_WAITALL) == keys
    session.guest.sendall(b"line\n\x1b[1mbold")
    session.shows(b"line\n\x1b[1mbold")  # no \r added: the guest's line discipline is the one
    os.write(session.terminal, b"last\x1dignored")
    assert session.guest.recv(4, socket.MSG_WAITALL) == b"last"
    session.shows(b"detached")
    assert session.ended() == 0
    assert session.guest.recv(100) == b""


def test_a_console_that_closes(session: Session) -> None:
    session.guest.sendall(b"bye")
    session.guest.close()
    session.shows(b"bye")
    session.shows(b"the console was closed")
    assert session.ended() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_put_the_terminal_back(session: Session, number: signal.Signals) -> None:
    session.process.send_signal(number)
    assert session.ended() == 128 + number


def test_more_than_a_guest_reads_is_kept_waiting_not_lost(
    listener: socket.socket, tmp_path: Path
) -> None:
    data = os.urandom(1 << 20)
    (tmp_path / "input").write_bytes(data)
    with open(tmp_path / "input", "rb") as source, open(tmp_path / "out", "wb") as sink:
        process = subprocess.Popen(COMMAND, stdin=source, stdout=sink)
    guest, _ = listener.accept()
    with guest:
        guest.sendall(b"before")
        assert guest.recv(len(data), socket.MSG_WAITALL) == data
        guest.sendall(b" after")
    assert process.wait(60) == 0
    assert (tmp_path / "out").read_bytes() == b"before after"


def test_ctrl_bracket_in_a_pipe_is_data(listener: socket.socket) -> None:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(COMMAND, **pipes) as process:
        guest, _ = listener.accept()
        assert process.stdin is not None
        process.stdin.write(b"a\x1db")
        process.stdin.close()
        assert guest.recv(3, socket.MSG_WAITALL) == b"a\x1db"
        guest.close()
        assert process.wait(60) == 0


def test_interrupted_in_a_pipe(listener: socket.socket) -> None:
    with subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        guest, _ = listener.accept()
        guest.sendall(b"x")
        assert process.stdout is not None
        assert process.stdout.read(1) == b"x"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        guest.close()


def test_a_machine_without_a_console(machine: MachineDirectory) -> None:
    ran = subprocess.run(COMMAND, capture_output=True, text=True)
    assert ran.returncode == 1
    what, hint = ran.stderr.splitlines()
    assert what == "segue: machine web has no console to attach to"
    assert hint.startswith("hint: ")


def test_a_console_that_nobody_serves(machine: MachineDirectory) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as left_behind:
        left_behind.bind(os.fspath(machine.console))
    ran = subprocess.run(COMMAND, capture_output=True, text=True)
    assert ran.returncode == 3
    assert "does not answer: Connection refused" in ran.stderr
