"""segue upgrade: exit codes, receipts and progress, whatever the supervisor does."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from segue.cli import main, output
from segue.cli.progress import Progress
from tests.unit.fake_supervisor import (
    Emit,
    Failure,
    FakeSupervisor,
    Hangup,
    dead_process,
    receipt,
    status,
)

Supervised = Callable[..., FakeSupervisor]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEGUE_RUN_DIR", str(tmp_path / "r"))
    return tmp_path / "r"


@pytest.fixture
def supervised() -> Iterator[Supervised]:
    """Makes machines whose fake supervisors answer `segue-upgrade` as told."""
    made: list[FakeSupervisor] = []

    def make(name: str, answer: Any) -> FakeSupervisor:
        made.append(FakeSupervisor(name, {"segue-upgrade": answer}))
        return made[-1]

    yield make
    for supervisor in made:
        supervisor.close()


def phases(*names: str) -> list[Mapping[str, Any]]:
    """The events of these phases, begun and ended."""
    return [
        {"phase": name, "state": state} | ({"seconds": 0.0123} if state == "end" else {})
        for name in names
        for state in ("begin", "end")
    ]


def failed(name: str, result: str, **changes: Any) -> dict[str, Any]:
    error = {"what": "it went wrong", "hint": "try again"}
    return receipt(name, result, error=error, guest="running on the incumbent", **changes)


def test_done(supervised: Supervised, capfd: Capture) -> None:
    loss = {"what": "VNC viewers", "why": "they reconnect"}
    web = supervised("web", receipt("web", not_kept=[loss]))
    assert main(["upgrade", "web"]) == 0
    assert web.received == [("segue-upgrade", {})]
    out, err = capfd.readouterr()
    assert not err
    assert out.splitlines() == [
        "web: QEMU 7.2.22 → 10.0.2, pid 10 → 11, blackout 4.6 ms, 1 object kept",
        "  not kept: VNC viewers: they reconnect",
    ]


@pytest.mark.parametrize("result", ["current", "rehearsed"])
def test_nothing_changed_on_purpose(supervised: Supervised, capfd: Capture, result: str) -> None:
    supervised("web", receipt("web", result))
    assert main(["upgrade", "web"]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("web: ") and "10.0.2" in out and not err


def test_what_was_not_done_has_lost_nothing(supervised: Supervised, capfd: Capture) -> None:
    loss = {"what": "VNC viewers", "why": "they reconnect"}
    supervised("web", receipt("web", "current", not_kept=[loss], blackout_seconds=None))
    assert main(["upgrade", "web"]) == 0
    assert capfd.readouterr().out == "web: already runs QEMU 10.0.2\n"


def test_a_guest_that_was_paused_has_no_blackout(supervised: Supervised, capfd: Capture) -> None:
    supervised("web", receipt("web", blackout_seconds=None))
    assert main(["upgrade", "web"]) == 0
    said = "web: QEMU 7.2.22 → 10.0.2, pid 10 → 11, 1 object kept\n"
    assert capfd.readouterr().out == said


@pytest.mark.parametrize(
    ("result", "exit_status"),
    [("failed", 1), ("refused", 5), ("timed-out", 6), ("lost", 8), ("never heard of", 8)],
)
def test_failures_say_what_a_hint_and_where_the_guest_is(
    supervised: Supervised, capfd: Capture, result: str, exit_status: int
) -> None:
    blocker = {"what": "spice", "why": "it holds clients", "remedy": "use VNC"}
    supervised("web", failed("web", result, blockers=[blocker]))
    assert main(["upgrade", "web"]) == exit_status
    out, err = capfd.readouterr()
    assert not out
    assert err.splitlines() == [
        f"segue: web: {result}: it went wrong",
        "  spice: it holds clients; use VNC",
        "hint: try again",
        "guest: running on the incumbent",
    ]


@pytest.mark.parametrize("result", ["done", "failed", "refused"])
def test_json_is_the_receipt_and_nothing_else(
    supervised: Supervised, capfd: Capture, result: str
) -> None:
    given = receipt("web") if result == "done" else failed("web", result)

    def answer(_: object, emit: Emit) -> object:
        for data in phases("plan", "prepare"):
            emit("SEGUE_UPGRADE", data)
        return given

    supervised("web", answer)
    main(["upgrade", "web", "--json"])
    out, err = capfd.readouterr()
    assert json.loads(out) == given
    assert err.startswith("web: plan: 12.3 ms\nweb: prepare: 12.3 ms\n")


def test_options_reach_the_supervisor(
    supervised: Supervised, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web = supervised("web", receipt("web"))
    monkeypatch.chdir(tmp_path)
    main(["upgrade", "web", "--to", "./qemu", "--rehearse", "--force", "--timeout", "2.5"])
    main(["upgrade", "web", "--to", "cat"])
    given = {"to": f"{tmp_path}/qemu", "rehearse": True, "force": True, "timeout": 2.5}
    assert web.received[0] == ("segue-upgrade", given)
    assert os.path.isabs(web.received[1][1]["to"])


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["web", "--all"],
        ["web", "--timeout", "0"],
        ["web", "--timeout", "-1"],
        ["web", "--timeout", "nan"],
        ["web", "--timeout", "inf"],
        ["web", "--timeout", "soon"],
        ["web", "--to", "no-such-program"],
        ["web", "db"],
        ["web", "--unknown"],
        ["a/b"],
    ],
)
def test_mistakes_end_in_two_lines(
    supervised: Supervised, capfd: Capture, words: list[str]
) -> None:
    web = supervised("web", receipt("web"))
    assert main(["upgrade", *words]) == 2
    out, err = capfd.readouterr()
    what, hint = err.splitlines()
    assert not out and what.startswith("segue: ") and hint.startswith("hint: ")
    assert not web.received


def test_events_of_others_are_no_progress(supervised: Supervised, capfd: Capture) -> None:
    def answer(_: object, emit: Emit) -> object:
        emit("STOP", {})
        emit("SEGUE_UPGRADE", {"phase": "plan", "state": "begin"})
        emit("RESUME", {})
        emit("SEGUE_UPGRADE", {"phase": "plan", "state": "end", "seconds": 1.5})
        return receipt("web")

    supervised("web", answer)
    main(["upgrade", "web"])
    assert capfd.readouterr().err == "web: plan: 1.50 s\n"


def test_an_error_reply_is_a_failure_in_the_supervisors_words(
    supervised: Supervised, capfd: Capture
) -> None:
    def answer(*_: object) -> object:
        raise Failure("an upgrade is under way")

    supervised("web", answer)
    assert main(["upgrade", "web", "--json"]) == 1
    out, err = capfd.readouterr()
    assert err == "segue: an upgrade is under way\n"
    said = json.loads(out)
    assert said["result"] == "failed"
    assert said["error"]["what"] == "an upgrade is under way"
    assert {"mode", "from", "to", "blackout_seconds", "phases", "kept", "not_kept"} <= set(said)


def hang_up_after_plan(_: object, emit: Emit) -> object:
    emit("SEGUE_UPGRADE", {"phase": "plan", "state": "begin"})
    raise Hangup


def test_a_connection_that_ends_midway_while_the_supervisor_lives(
    supervised: Supervised, capfd: Capture
) -> None:
    supervised("web", hang_up_after_plan)
    assert main(["upgrade", "web"]) == 1
    err = capfd.readouterr().err.splitlines()
    assert err[0] == "web: plan: did not end"
    assert "closed the connection midway" in err[1]
    assert err[2:] == [
        "hint: its outcome: segue history web",
        f"guest: running, QEMU pid {os.getpid()}",
    ]


def test_a_supervisor_that_dies_midway(supervised: Supervised, capfd: Capture, root: Path) -> None:
    pid, start_time = dead_process()
    gone = {"supervisor_pid": pid, "supervisor_start_time": start_time}

    def answer(*_: object) -> object:
        web.directory.write_status(status("web", **gone))
        raise Hangup

    web = supervised("web", answer)
    assert main(["upgrade", "web"]) == 8
    assert f"guest: unknown; QEMU pid {os.getpid()} lives\n" in capfd.readouterr().err

    def answer_again(*_: object) -> object:
        db.directory.write_status(status("db", **gone, qemu_pid=pid, qemu_start_time=start_time))
        raise Hangup

    db = supervised("db", answer_again)
    assert main(["upgrade", "db", "--json"]) == 8
    out, err = capfd.readouterr()
    assert "guest: lost, or ended\n" in err
    assert json.loads(out)["result"] == "lost"


def test_a_receipt_on_disk_counts_when_the_connection_has_ended(
    supervised: Supervised, capfd: Capture
) -> None:
    def answer(*_: object) -> object:
        lines = [receipt("web", "failed", started=1.0), receipt("web")]
        web.directory.receipts.write_text("".join(json.dumps(line) + "\n" for line in lines))
        raise Hangup

    web = supervised("web", answer)
    assert main(["upgrade", "web"]) == 0
    assert "7.2.22 → 10.0.2" in capfd.readouterr().out


def test_an_old_receipt_on_disk_does_not(supervised: Supervised) -> None:
    web = supervised("web", hang_up_after_plan)
    web.directory.receipts.write_text(json.dumps(receipt("web", started=1.0)) + "\n")
    assert main(["upgrade", "web"]) == 1


def test_a_supervisor_that_never_answers(
    supervised: Supervised, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(_: object, emit: Emit) -> object:
        while True:  # until the client has gone
            emit("SEGUE_UPGRADE", {"phase": "plan", "state": "begin"})

    monkeypatch.setattr("segue.cli.upgrade._PATIENCE", 0.1)
    supervised("web", answer)
    assert main(["upgrade", "web", "--timeout", "0.1"]) == 8
    assert "does not answer" in capfd.readouterr().err


def test_all_goes_on_after_a_failure(supervised: Supervised, root: Path, capfd: Capture) -> None:
    for name in ("a", "c"):
        supervised(name, receipt(name))
    b = supervised("b", failed("b", "refused"))
    (root / "dead").mkdir()
    assert main(["upgrade", "--all", "--rehearse"]) == 7
    out, err = capfd.readouterr()
    assert [line[:2] for line in out.splitlines()] == ["a:", "c:"]
    assert err.splitlines() == [
        "segue: b: refused: it went wrong",
        "hint: try again",
        "guest: running on the incumbent",
        "dead: left out, it is not running",
    ]
    assert b.received == [("segue-upgrade", {"rehearse": True})]


def test_all_in_json_is_a_list(supervised: Supervised, capfd: Capture) -> None:
    supervised("a", receipt("a"))
    supervised("b", receipt("b", "current"))
    assert main(["upgrade", "--all", "--json"]) == 0
    assert [r["result"] for r in json.loads(capfd.readouterr().out)] == ["done", "current"]


def test_all_of_none(capfd: Capture) -> None:
    assert main(["upgrade", "--all", "--json"]) == 0
    assert capfd.readouterr() == ("[]\n", "no machines\n")


def test_ctrl_c_leaves_the_upgrade_to_the_supervisor(supervised: Supervised) -> None:
    begun = "SEGUE_UPGRADE", {"phase": "plan", "state": "begin"}
    ended = "SEGUE_UPGRADE", {"phase": "plan", "state": "end", "seconds": 1}

    def answer(_: object, emit: Emit) -> object:
        emit(*begun)
        emit(*ended)
        while True:  # until the client has gone
            emit(*begun)

    supervised("web", answer)
    with subprocess.Popen(
        [sys.executable, "-m", "segue", "upgrade", "web"], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        process.stderr.readline()
        process.send_signal(signal.SIGINT)
        said = process.stderr.read().splitlines()
        assert process.wait() == 130
    assert said[-2:] == [
        "segue: interrupted; the supervisor of web goes on with the upgrade",
        "hint: its outcome: segue history web",
    ]


def test_a_closed_stderr_loses_no_receipt(supervised: Supervised) -> None:
    def answer(_: object, emit: Emit) -> object:
        for data in phases("plan", "prepare"):
            emit("SEGUE_UPGRADE", data)
        return receipt("web")

    supervised("web", answer)
    reading, writing = os.pipe()
    os.close(reading)
    ran = subprocess.run(
        [sys.executable, "-m", "segue", "upgrade", "web", "--json"],
        stdout=subprocess.PIPE,
        stderr=writing,
    )
    os.close(writing)
    assert json.loads(ran.stdout)["result"] == "done"
    assert ran.returncode == 0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(stream: Terminal, events: list[Mapping[str, Any]]) -> str:
    progress = Progress("web", stream)
    for data in events:
        progress.event({"event": "SEGUE_UPGRADE", "data": data})
    progress.abandon()
    return stream.getvalue()


def test_a_terminal_shows_each_phase_as_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    shown = show(Terminal(), [*phases("plan", "undo"), {"phase": "move", "state": "begin"}])
    assert shown == (
        "  … plan\r  ✓ plan        12.3 ms\n  … undo\r  ↩ undo        12.3 ms\n  … move\r  ✗ move\n"
    )
    monkeypatch.delenv("NO_COLOR")
    assert "\x1b[32m✓\x1b[0m" in show(Terminal(), phases("plan"))


def test_a_dumb_terminal_is_like_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert show(Terminal(), phases("plan")) == "web: plan: 12.3 ms\n"
    assert output.good("✓", Terminal()) == "✓"


def test_a_phase_that_failed_is_followed_by_its_undoing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    events = [{"phase": "move", "state": "begin"}, *phases("undo")]
    assert show(Terminal(), events) == "web: move: did not end\nweb: undo: 12.3 ms\n"
