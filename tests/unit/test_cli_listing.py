"""segue ls, show, check and history: what they print for people and for programs."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from segue.cli import main
from segue.qemu import mapped
from tests.unit.fake_supervisor import FakeSupervisor, dead_process, receipt, status

Supervised = Callable[..., FakeSupervisor]


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEGUE_RUN_DIR", str(tmp_path / "r"))
    return tmp_path / "r"


@pytest.fixture
def supervised() -> Iterator[Supervised]:
    """Makes machines with a fake supervisor each."""
    made: list[FakeSupervisor] = []

    def make(name: str, answers: Mapping[str, Any] | None = None, **changes: Any) -> FakeSupervisor:
        made.append(FakeSupervisor(name, answers or {}, **changes))
        return made[-1]

    yield make
    for supervisor in made:
        supervisor.close()


def plan(**changes: Any) -> dict[str, Any]:
    return {
        "from": {"path": "/usr/bin/qemu", "version": "7.2.22"},
        "to": {"path": "/opt/qemu", "version": "10.0.2", "build_id": "bb"},
        "current": False,
        "mode": "handover",
        "why": "it is the shortest",
        "modes": {
            "handover": [],
            "cpr-exec": [{"what": "it", "why": "it is too old", "remedy": "wait"}],
        },
        "blockers": [],
        "not_kept": [],
        "notes": [],
    } | changes


def kill(root: Path, name: str) -> None:
    """Leave behind what a machine that died would."""
    pid, start_time = dead_process()
    (root / name).mkdir(parents=True)
    report = status(
        name,
        qemu_pid=pid,
        qemu_start_time=start_time,
        supervisor_pid=pid,
        supervisor_start_time=start_time,
    )
    (root / name / "status.json").write_text(json.dumps(report))


def test_ls_without_machines(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["ls"]) == 0
    assert capfd.readouterr() == ("", "no machines\n")
    assert main(["ls", "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == []


def test_ls_is_aligned_and_asks_nobody(
    supervised: Supervised, root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    web = supervised("web")
    supervised("a-much-longer-name", state="paused", ram_bytes=3 << 29, since=time.time() - 5)
    kill(root, "old")
    assert main(["ls"]) == 0
    head, *rows = capfd.readouterr().out.splitlines()
    assert head.split() == "NAME STATE QEMU MACHINE PID RAM SINCE UPGRADES OUTDATED".split()
    assert [row.split()[:2] for row in rows] == [
        ["a-much-longer-name", "paused"],
        ["old", "dead"],
        ["web", "running"],
    ]
    for row in rows:
        assert row[head.index("STATE") - 1] == " " and row[head.index("STATE")] != " "
    assert rows[2].split()[2:] == f"7.2.22 pc-q35-7.2 {os.getpid()} 512 MiB 2h 2 -".split()
    assert "1.5 GiB" in rows[0]
    assert web.received == []


def test_ls_json_has_what_scripts_rely_on(
    supervised: Supervised, root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    supervised("web")
    kill(root, "old")
    assert main(["ls", "--json"]) == 0
    old, web = json.loads(capfd.readouterr().out)
    assert {
        "name": "web",
        "state": "running",
        "qemu_version": "7.2.22 (Debian 1:7.2+dfsg-7)",
        "machine_type": "pc-q35-7.2",
        "qemu_pid": os.getpid(),
        "supervisor_pid": os.getpid(),
        "outdated": False,
        "run_directory": str(root / "web"),
    }.items() <= web.items()
    assert {"name": "old", "state": "dead", "qemu_pid": None, "supervisor_pid": None} == {
        key: old[key] for key in ("name", "state", "qemu_pid", "supervisor_pid")
    }


def test_ls_says_why_a_machine_is_outdated(
    supervised: Supervised, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    binary = tmp_path / "qemu"
    binary.write_bytes(Path("/bin/cat").read_bytes())
    binary.chmod(0o700)
    with subprocess.Popen([binary], stdin=subprocess.PIPE) as process:
        started = mapped.remember(binary, process.pid)
        assert started is not None
        supervised("web", qemu_pid=process.pid, binary=str(binary), started=started.to_json())
        main(["ls", "--json"])
        assert json.loads(capfd.readouterr().out)[0]["outdated_why"] is None
        binary.unlink()
        main(["ls", "--json"])
        listed = json.loads(capfd.readouterr().out)[0]
        assert listed["outdated"] is True
        assert listed["outdated_why"] == f"{binary} is gone"
        main(["ls"])
        assert capfd.readouterr().out.rstrip().endswith(f"{binary} is gone")


def test_ls_imports_nothing_heavy() -> None:
    code = "import sys; from segue.cli import main; main(['ls']); print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"asyncio", "socket", "subprocess", "shutil", "logging", "qemu.qmp", "difflib"}
    assert heavy.isdisjoint(ran.stdout.split())


def test_show_asks_the_supervisor(
    supervised: Supervised, capfd: pytest.CaptureFixture[str]
) -> None:
    blocker = {"what": "spice", "why": "it holds\nclients", "remedy": "use VNC"}
    web = supervised("web", {"segue-query": status("web", state="paused", blockers=[blocker])})
    assert main(["show", "web"]) == 0
    shown = capfd.readouterr().out
    assert web.received == [("segue-query", {})]
    for expected in (
        "state          paused\n",
        "RAM            512 MiB\n",
        "ram pc.ram  (inode=77)\n",
        "VNC viewers: they reconnect\n",
        "spice: it holds clients; use VNC\n",
    ):
        assert expected in shown


def test_show_command_prints_both_command_lines(
    supervised: Supervised, capfd: pytest.CaptureFixture[str]
) -> None:
    supervised("web", {"segue-query": status("web")})
    assert main(["show", "web", "--command"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [shlex.split(line) for line in lines if not line.startswith("#")] == [
        ["qemu-system-x86_64", "-m", "512", "-name", "a b"],
        ["/usr/bin/qemu-system-x86_64", "-S"],
    ]
    assert main(["show", "web", "--command", "--json"]) == 0
    shown = json.loads(capfd.readouterr().out)
    assert set(shown) == {"command", "instance_command"}


def test_show_json_is_the_supervisors_word(
    supervised: Supervised, capfd: pytest.CaptureFixture[str]
) -> None:
    said = status("web")
    supervised("web", {"segue-query": said})
    assert main(["show", "web", "--json"]) == 0
    del said["started"]
    assert json.loads(capfd.readouterr().out) == said


def test_a_machine_that_is_gone_or_never_was(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kill(root, "old")
    for command in ("show", "check", "upgrade", "console", "stop"):
        assert main([command, "old"]) == 3
        assert capfd.readouterr().err.startswith("segue: machine old is not running\nhint: ")
        assert main([command, "oldd"]) == 4
        said = capfd.readouterr().err
        assert said == "segue: there is no machine named oldd\nhint: did you mean old?\n"


def test_a_supervisor_that_is_still_starting(
    supervised: Supervised, capfd: pytest.CaptureFixture[str]
) -> None:
    web = supervised("web")
    web.directory.status.unlink()
    web.directory.qmp.rename(web.directory.path / "elsewhere")
    assert main(["show", "web"]) == 3
    assert capfd.readouterr().err.startswith("segue: machine web is still starting\nhint: ")


def test_check_that_would_go_through(
    supervised: Supervised, capfd: pytest.CaptureFixture[str]
) -> None:
    loss = {"what": "VNC viewers", "why": "they reconnect"}
    web = supervised("web", {"segue-check": plan(not_kept=[loss], notes=["deprecated"])})
    assert main(["check", "web", "--to", "/opt/qemu"]) == 0
    assert web.received == [("segue-check", {"to": "/opt/qemu"})]
    assert capfd.readouterr().out.splitlines() == [
        "web: QEMU 7.2.22 → 10.0.2 (/opt/qemu)",
        "  not kept: VNC viewers: they reconnect",
        "  mode handover: possible  (it is the shortest)",
        "  mode cpr-exec: it is too old (wait)",
        "  note: deprecated",
        "  nothing stands in the way",
    ]


def test_check_that_would_be_refused(
    supervised: Supervised, capfd: pytest.CaptureFixture[str]
) -> None:
    blocker = {"what": "device x", "why": "QEMU 10.0.2 lacks it", "remedy": "install it"}
    supervised("web", {"segue-check": plan(blockers=[blocker])})
    assert main(["check", "web"]) == 5
    out = capfd.readouterr().out
    assert "  blocker: device x: QEMU 10.0.2 lacks it; install it\n" in out
    assert "nothing stands" not in out
    assert main(["check", "web", "--json"]) == 5
    assert json.loads(capfd.readouterr().out)["blockers"] == [blocker]


def test_check_when_there_is_nothing_to_do(
    supervised: Supervised, capfd: pytest.CaptureFixture[str]
) -> None:
    supervised("web", {"segue-check": plan(current=True)})
    assert main(["check", "web"]) == 0
    said = capfd.readouterr().out.splitlines()
    assert said[0] == "web: already runs QEMU 10.0.2 (/opt/qemu)"
    assert "  nothing stands in the way" not in said


def test_history_in_order(supervised: Supervised, capfd: pytest.CaptureFixture[str]) -> None:
    error = {"what": "the successor\ndied", "hint": None}
    past = [receipt("web", "failed", error=error, to=None, blackout_seconds=None), receipt("web")]
    supervised("web", {"segue-history": past})
    assert main(["history", "web"]) == 0
    head, first, second = capfd.readouterr().out.splitlines()
    assert head.split() == "WHEN RESULT FROM TO BLACKOUT TOTAL WHY".split()
    assert first.split()[2:5] == ["failed", "7.2.22", "?"]
    assert first.endswith("the successor died")
    assert second.split()[2:] == ["done", "7.2.22", "10.0.2", "4.6", "ms", "303.0", "ms"]
    assert main(["history", "web", "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == past


def test_history_names_what_stood_in_the_way(
    supervised: Supervised, capfd: pytest.CaptureFixture[str]
) -> None:
    blocker = {"what": "-snapshot", "why": "each would have its own", "remedy": "leave it out"}
    error = {"what": "this machine cannot be moved", "hint": None}
    refused = receipt("web", "refused", error=error, blockers=[blocker], blackout_seconds=None)
    supervised("web", {"segue-history": [refused]})
    assert main(["history", "web"]) == 0
    _, line = capfd.readouterr().out.splitlines()
    assert line.endswith("-snapshot: each would have its own")


def test_history_of_the_dead_is_read_from_what_they_left(
    root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kill(root, "old")
    (root / "old" / "receipts.jsonl").write_text(json.dumps(receipt("old")) + "\n")
    assert main(["history", "old", "--json"]) == 0
    assert [r["result"] for r in json.loads(capfd.readouterr().out)] == ["done"]


def test_history_of_a_machine_without_one(
    supervised: Supervised, capfd: pytest.CaptureFixture[str]
) -> None:
    supervised("web", {"segue-history": []})
    assert main(["history", "web"]) == 0
    assert capfd.readouterr() == ("", "web has not been upgraded yet\n")
