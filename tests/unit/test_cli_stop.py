"""segue stop returns when the supervisor has gone, and says how the guest went."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from segue.cli import main
from segue.machines import process_start_time
from tests.unit.fake_supervisor import Failure, FakeSupervisor, Hangup

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """Stands for the supervisor's process, whose end is waited for."""
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as process:
        yield process


@pytest.fixture
def how() -> list[str]:
    """How the guest ends; a test may change it."""
    return ["powerdown"]


@pytest.fixture
def supervisor(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    process: subprocess.Popen[bytes],
    how: list[str],
) -> Iterator[FakeSupervisor]:
    monkeypatch.setenv("SEGUE_RUN_DIR", str(tmp_path))

    def stop(*_: object) -> dict[str, str]:
        if how[0] == "refusal":
            raise Failure("not now")
        if how[0] != "hang":
            process.kill()
        if how[0] == "hangup":
            raise Hangup
        return {"how": how[0]}

    supervisor = FakeSupervisor(
        "web",
        {"segue-stop": stop},
        supervisor_pid=process.pid,
        supervisor_start_time=process_start_time(process.pid),
    )
    yield supervisor
    supervisor.close()


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        ("powerdown", "powered itself off"),
        ("quit", "told to quit"),
        ("kill", "QEMU was killed"),
        ("hangup", "ended"),
    ],
)
def test_how_a_guest_went(
    supervisor: FakeSupervisor, how: list[str], capfd: Capture, ending: str, said: str
) -> None:
    how[0] = ending
    assert main(["stop", "web", "--timeout", "3"]) == 0
    assert supervisor.received == [("segue-stop", {"timeout": 3.0})]
    out, err = capfd.readouterr()
    assert out.startswith("web: ") and said in out and not err


def test_json(supervisor: FakeSupervisor, capfd: Capture) -> None:
    assert main(["stop", "web", "--json"]) == 0
    assert supervisor.received == [("segue-stop", {"timeout": 60.0})]
    assert json.loads(capfd.readouterr().out) == {"name": "web", "how": "powerdown"}


@pytest.mark.parametrize(("command", "said"), [("stop", "stopped"), ("suspend", "suspended")])
def test_ctrl_c_calls_nothing_off(tmp_path: Path, command: str, said: str) -> None:
    asked, gone = threading.Event(), threading.Event()

    def answer(*_: object) -> object:
        asked.set()
        gone.wait(60)
        raise Hangup

    environment = os.environ | {"SEGUE_RUN_DIR": str(tmp_path), "XDG_STATE_HOME": str(tmp_path)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEGUE_RUN_DIR", str(tmp_path))
        supervisor = FakeSupervisor("web", {f"segue-{command}": answer})
    try:
        with subprocess.Popen(
            [sys.executable, "-m", "segue", command, "web"],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert asked.wait(60)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
    finally:
        gone.set()
        supervisor.close()
    assert process.returncode == 130
    assert err.startswith(f"segue: interrupted; machine web is being {said} all the same\nhint: ")


def test_a_supervisor_that_does_not_go(
    supervisor: FakeSupervisor, how: list[str], capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    how[0] = "hang"
    monkeypatch.setattr("segue.cli.stop._AFTERWARDS", 0.1)
    assert main(["stop", "web"]) == 1
    assert "but its supervisor" in capfd.readouterr().err


def test_a_refusal(supervisor: FakeSupervisor, how: list[str], capfd: Capture) -> None:
    how[0] = "refusal"
    assert main(["stop", "web"]) == 1
    assert capfd.readouterr().err == "segue: not now\n"
