"""A supervisor without a guest: a run directory and a QMP server that says what a test wants."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from segue import machines
from segue.machines import MachineDirectory

Emit = Callable[[str, Mapping[str, Any]], None]
Answer = Callable[[dict[str, Any], Emit], Any]


class Hangup(Exception):
    """Raised by an answer: the connection is closed instead of replying."""


class Failure(Exception):
    """Raised by an answer: an error reply with this text."""


def status(name: str, **changes: Any) -> dict[str, Any]:
    """A complete status, of a machine whose QEMU and supervisor are this very process."""
    pid = os.getpid()
    start_time = machines.process_start_time(pid)
    return {
        "name": name,
        "state": "running",
        "qemu_version": "7.2.22 (Debian 1:7.2+dfsg-7)",
        "machine_type": "pc-q35-7.2",
        "qemu_pid": pid,
        "qemu_start_time": start_time,
        "supervisor_pid": pid,
        "supervisor_start_time": start_time,
        "ram_bytes": 512 << 20,
        "since": time.time() - 7300,
        "upgrades": 2,
        "outdated": False,
        "outdated_why": None,
        "binary": "/usr/bin/qemu-system-x86_64",
        "started": None,
        "command": ["qemu-system-x86_64", "-m", "512", "-name", "a b"],
        "instance_command": ["/usr/bin/qemu-system-x86_64", "-S"],
        "kept": [{"kind": "ram", "name": "pc.ram", "identity": {"inode": 77}}],
        "not_kept": [{"what": "VNC viewers", "why": "they reconnect"}],
        "blockers": [],
        "console": None,
        "log": "qemu.log",
        "run_directory": "nowhere",
    } | changes


def receipt(name: str, result: str = "done", **changes: Any) -> dict[str, Any]:
    """A complete receipt."""
    return {
        "result": result,
        "mode": "handover",
        "machine": name,
        "from": {"version": "7.2.22", "build_id": "aa", "path": "/usr/bin/qemu", "pid": 10},
        "to": {"version": "10.0.2", "build_id": "bb", "path": "/opt/qemu", "pid": 11},
        "blackout_seconds": 0.0046,
        "phases": {"plan": 0.1, "prepare": 0.2, "move": 0.003},
        "kept": [{"kind": "ram", "name": "pc.ram"}],
        "not_kept": [],
        "blockers": [],
        "warnings": [],
        "error": None,
        "guest": "running on the successor",
        "started": time.time(),
        "clock_lag_seconds": 0.0046,
    } | changes


class FakeSupervisor:
    """Serves until close(); `answers` maps a command to a value or to what makes one."""

    def __init__(self, name: str, answers: Mapping[str, Any], **changes: Any) -> None:
        self.directory = MachineDirectory.create(name)
        self.directory.write_status(status(name, **changes))
        self.received: list[tuple[str, dict[str, Any]]] = []
        self._answers = answers
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(os.fspath(self.directory.qmp))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        self.directory.remove()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                with client, client.makefile("rw", encoding="utf-8") as stream:
                    self._converse(stream)
            except (Hangup, BrokenPipeError, ConnectionResetError):
                pass  # the connection is closed, by whichever side

    def _converse(self, stream: Any) -> None:
        def send(message: Mapping[str, Any]) -> None:
            stream.write(json.dumps(message) + "\n")
            stream.flush()

        def emit(name: str, data: Mapping[str, Any]) -> None:
            send({"event": name, "data": data, "timestamp": {"seconds": 1, "microseconds": 2}})

        send({"QMP": {"version": {}, "capabilities": []}})
        for line in stream:
            command = json.loads(line)
            name, arguments = command["execute"], command.get("arguments", {})
            if name == "qmp_capabilities":
                send({"return": {}, "id": command["id"]})
                continue
            self.received.append((name, arguments))
            answer = self._answers[name]
            try:
                value = answer(arguments, emit) if callable(answer) else answer
            except Failure as failure:
                error = {"class": "GenericError", "desc": str(failure)}
                send({"error": error, "id": command["id"]})
            else:
                send({"return": value, "id": command["id"]})


def dead_process() -> tuple[int, int]:
    """(pid, start time) of a process that has ended and was reaped."""
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as process:
        start_time = machines.process_start_time(process.pid)
        assert start_time is not None
    return process.pid, start_time
