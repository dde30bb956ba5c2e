"""A daemon is replaced in place, or it goes on: never nobody, whatever fails and wherever."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

DAEMON = str(Path(__file__).with_name("cpr_daemon.py"))


class Running:
    """The daemon, with things of its own that a restart must not change."""

    def __init__(self, directory: Path) -> None:
        self.control, theirs = socket.socketpair()
        self.control.settimeout(60)
        self.lines = self.control.makefile()
        stray, self.stray = os.pipe()

        def prepare() -> None:
            os.umask(0o123)
            os.nice(3)
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
            resource.setrlimit(resource.RLIMIT_NOFILE, (345, 456))

        self.said = directory / "said"
        with self.said.open("wb") as said:
            self.process = subprocess.Popen(
                [sys.executable, DAEMON, str(theirs.fileno())],
                cwd=directory,
                pass_fds=[theirs.fileno(), stray],
                preexec_fn=prepare,
                stderr=said,
                env=os.environ | {"GIVEN": "by \udcff the test"},
            )
        theirs.close()
        os.close(stray)

    def tell(self, **command: Any) -> dict[str, Any]:
        self.control.sendall(json.dumps(command).encode() + b"\n")
        return self.hear()

    def hear(self) -> dict[str, Any]:
        line = self.lines.readline()
        assert line, f"the daemon is gone: {self.process.wait()}, {self.said.read_text()}"
        message: dict[str, Any] = json.loads(line)
        return message

    def restart(self, *argv: str, fault: str = "", **more: Any) -> dict[str, Any]:
        facts = self.tell(facts=None)
        environment = facts["environment"] | {"FAULT": fault}
        command = list(argv) or [sys.executable, DAEMON, "newer"]
        return self.tell(restart={"argv": command, "env": environment, **more})

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.lines.close()
        self.control.close()
        os.close(self.stray)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Running]:
    running = Running(tmp_path)
    child = running.tell(facts=None)["child"]
    yield running
    running.close()
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)


def test_it_becomes_newer_code_and_keeps_everything(daemon: Running) -> None:
    before = daemon.tell(facts=None)
    assert daemon.restart() == {"resumed": "restart", "reason": None, "generation": 1}
    after = daemon.tell(facts=None)
    assert after["pid"] == before["pid"] == daemon.process.pid
    assert after["argv"][1:] == ["newer"]
    assert after["kept"] == before["kept"]
    assert after["environment"] == before["environment"] | {"FAULT": ""}
    assert after["environment"]["GIVEN"] == "by \udcff the test"
    # A child is still a child.
    assert daemon.tell(wait=None) == {"status": signal.SIGTERM}


def test_only_named_descriptors_pass(daemon: Running) -> None:
    before = daemon.tell(facts=None)["descriptors"]
    stray = f"pipe:[{os.fstat(daemon.stray).st_ino}]"
    assert [stray, True] in before.values()
    daemon.restart()
    after = daemon.tell(facts=None)["descriptors"]
    assert stray not in [link for link, _ in after.values()]
    assert len(after) == len(before) - 1
    # And none of them would pass to a child of the daemon's own.
    assert {name for name, (_, inheritable) in after.items() if inheritable} == {"0", "1", "2"}


def test_many_times_without_a_leak(daemon: Running) -> None:
    daemon.restart()
    before = daemon.tell(facts=None)
    for generation in range(2, 7):
        assert daemon.restart(asked=True)["generation"] == generation
    after = daemon.tell(facts=None)
    assert len(after["descriptors"]) == len(before["descriptors"])
    assert after["kept"] == before["kept"]


def test_a_signal_that_comes_before_its_handler_waits_for_it(daemon: Running) -> None:
    daemon.restart(fault="hangup arrived")
    assert daemon.tell(facts=None)["hangups"] == 1


def test_signals_at_any_moment_do_no_harm(daemon: Running) -> None:
    over = threading.Event()

    def hang_up() -> None:
        while not over.is_set():
            daemon.process.send_signal(signal.SIGHUP)

    with ThreadPoolExecutor() as pool:
        sender = pool.submit(hang_up)
        try:
            for generation in range(1, 6):
                assert daemon.restart(asked=True)["generation"] == generation
        finally:
            over.set()
        sender.result()


@pytest.mark.parametrize(
    ("fault", "error", "what"),
    [
        ("import asked", "Refused", "No module named 'no_such_module'"),
        ("hook asked", "Refused", "the hook does not like it"),
        ("unloaded asked", "Refused", "the state was not loaded"),
        ("exit asked", "Refused", "SystemExit: 3"),
        ("odd asked", "Refused", "xxxxx"),
        ("die asked", "NoAnswer", "ended without an answer"),
    ],
)
def test_newer_code_that_says_no_is_never_executed(
    daemon: Running, fault: str, error: str, what: str
) -> None:
    before = daemon.tell(facts=None)
    failed = daemon.restart(fault=fault)
    assert failed["error"] == error
    assert what in failed["what"]
    assert daemon.tell(facts=None) == before
    assert daemon.restart()["generation"] == 1


def test_newer_code_that_does_not_answer_is_killed(daemon: Running) -> None:
    before = daemon.tell(facts=None)
    failed = daemon.restart(fault="hang asked", timeout=0.5)
    assert failed["error"] == "NoAnswer"
    assert "does not answer" in failed["what"]
    assert daemon.tell(facts=None) == before
    children = Path(f"/proc/{daemon.process.pid}/task/{daemon.process.pid}/children").read_text()
    assert children.split() == [str(before["child"])]
    assert daemon.restart()["generation"] == 1


def unusable(kind: str, directory: Path) -> str:
    path = directory / kind
    if kind == "ENOEXEC":
        path.write_bytes(b"\x7fELF, almost")
        path.chmod(0o755)
    elif kind == "EACCES":
        path.write_text("#!/bin/sh\n")
    elif kind == "interpreter":
        path.write_text("#!/no/such/interpreter\n")
        path.chmod(0o755)
    return str(path)


UNUSABLE = ["ENOENT", "ENOEXEC", "EACCES", "interpreter"]


@pytest.mark.parametrize("kind", UNUSABLE)
def test_what_cannot_be_executed_is_found_by_asking(
    daemon: Running, kind: str, tmp_path: Path
) -> None:
    before = daemon.tell(facts=None)
    failed = daemon.restart(unusable(kind, tmp_path))
    assert failed["error"] == "NoAnswer"
    assert "cannot be started" in failed["what"]
    assert daemon.tell(facts=None) == before
    assert daemon.restart()["generation"] == 1


@pytest.mark.parametrize("kind", UNUSABLE)
def test_exec_that_fails_after_the_answer(daemon: Running, kind: str, tmp_path: Path) -> None:
    before = daemon.tell(facts=None)
    failed = daemon.restart(unusable(kind, tmp_path), asked=True)
    assert failed["error"] == "ExecFailed"
    assert "cannot be executed" in failed["what"]
    assert daemon.tell(facts=None) == before
    assert daemon.restart()["generation"] == 1


@pytest.mark.parametrize("asked", [False, True])
def test_out_of_descriptors(daemon: Running, asked: bool) -> None:
    # Fills the lowest free number, which is then the limit.
    failed = daemon.restart(full=True, asked=asked)
    assert "Too many open files" in failed["what"]
    assert daemon.restart()["generation"] == 1


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("import", "No module named 'no_such_module'"),
        ("hook", "the hook does not like it"),
        ("unloaded", "the state was not loaded"),
        ("exit", "SystemExit: 3"),
        ("late", "not ready after all"),
        ("odd", "RuntimeError:  ? xxx"),
    ],
)
def test_newer_code_that_fails_after_exec_gives_way_to_the_old(
    daemon: Running, fault: str, reason: str
) -> None:
    before = daemon.tell(facts=None)
    back = daemon.restart(fault=f"{fault} arrived")
    assert back["resumed"] == "back"
    assert reason in back["reason"]
    after = daemon.tell(facts=None)
    for name in ("pid", "child", "argv", "environment", "kept"):
        assert after[name] == before[name]
    stray = f"pipe:[{os.fstat(daemon.stray).st_ino}]"
    links = sorted(link for link, _ in after["descriptors"].values())
    assert links == sorted(link for link, _ in before["descriptors"].values() if link != stray)
    assert daemon.restart() == {"resumed": "restart", "reason": None, "generation": 2}
    assert daemon.tell(wait=None) == {"status": signal.SIGTERM}


def test_newer_code_that_hangs_after_exec_gives_way_to_the_old(daemon: Running) -> None:
    before = daemon.tell(facts=None)
    back = daemon.restart(fault="stuck arrived", asked=True, timeout=1)
    reason = "TimeoutError: not ready after 1 s"
    assert back == {"resumed": "back", "reason": reason, "generation": 1}
    assert daemon.tell(facts=None)["kept"] == before["kept"]
    assert daemon.restart()["generation"] == 2


TERMINAL = """
import asyncio, sys
from dataclasses import dataclass
from segue.cpr import Descriptor, How, State, restart, resumed, section

@section("terminal", version=1)
@dataclass(frozen=True)
class Terminal:
    ends: tuple[Descriptor, ...]

async def main():
    with resumed() as arrival:
        if arrival:
            terminal = arrival.load(Terminal).get(Terminal)
            assert [end.fd for end in terminal.ends] == [0, 1, 2]
            if arrival.how is How.RESTART and "stuck" in sys.argv:
                await asyncio.sleep(3600)
    if arrival:
        print(arrival.how.value, arrival.reason, sys.stdin.readline(), end="")
    else:
        ends = tuple(Descriptor(name, fd) for fd, name in enumerate(("in", "out", "err")))
        argv = [sys.executable, *sys.argv]
        restart(State(Terminal(ends)), argv, asked="stuck" in sys.argv, timeout=1)

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("fine", "restart None a line\n"),
        ("stuck", "back TimeoutError: not ready after 1 s a line\n"),
    ],
)
def test_standard_descriptors_in_the_state_of_an_event_loop(
    argument: str, expected: str, tmp_path: Path
) -> None:
    script = tmp_path / "terminal.py"
    script.write_text(
        TERMINAL.replace("timeout=1)", f"timeout={1 if argument == 'stuck' else 60})")
    )
    done = subprocess.run(
        [sys.executable, str(script), argument],
        input="a line\n",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == (expected, "")


def test_the_way_back_may_be_another_command_line(daemon: Running) -> None:
    back = daemon.restart(fault="late arrived", back=[sys.executable, DAEMON, "fallback"])
    assert back["resumed"] == "back"
    assert daemon.tell(facts=None)["argv"][1:] == ["fallback"]


def test_where_the_old_code_is_gone_the_reasons_are_told(daemon: Running) -> None:
    order = {
        "argv": [sys.executable, DAEMON],
        "env": {**os.environ, "FAULT": "late arrived"},
        "back": ["/no/such/daemon"],
    }
    daemon.control.sendall(json.dumps({"restart": order}).encode() + b"\n")
    assert daemon.process.wait(60) == 1
    said = daemon.said.read_text()
    assert "not ready after all" in said
    assert "/no/such/daemon could not be executed again" in said
