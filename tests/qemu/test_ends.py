"""Whatever ends the guest, or its supervisor, in the middle of an upgrade: nothing is left over."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from tests.qemu.conftest import migrates_as_ever, unharmed
from tests.qemu.harness import Segue, qemu, stop_between_turns, wait_until
from tests.qemu.survivor import PHASES, STARTED, Survivor, limits


@pytest.fixture
def guest(segue: Segue, place: Path, request: pytest.FixtureRequest) -> Iterator[Survivor]:
    survivor = Survivor(place, *getattr(request, "param", ()), segue=segue)
    yield survivor
    survivor.close()


def ended(guest: Survivor, status: int) -> None:
    assert guest.machine.wait() == status
    wait_until("an end without leftovers", lambda: not guest.segue.leftovers(), 10)


def works_and_ends(survivor: Survivor) -> None:
    """The next upgrade succeeds, and nothing is left over at the end."""
    survivor.upgrade_works()
    survivor.close()
    survivor.machine.stop()
    ended(survivor, 0)


def outcome(going: Future[Any]) -> dict[str, Any]:
    """The receipt, which comes before the machine's end."""
    receipt: dict[str, Any] = going.result(60)
    return receipt


@pytest.mark.parametrize("phase", ["prepare", "open", "hold", "move"])
def test_incumbent_killed(guest: Survivor, phase: str) -> None:
    """It was the guest's only QEMU: that is the guest's death, and reported as that."""
    going = guest.begin(phase)
    os.kill(guest.machine.qemu_pid, signal.SIGKILL)
    guest.go_on()
    receipt = outcome(going)
    assert receipt["result"] == "lost", receipt
    assert receipt["guest"] == "lost"
    assert "SIGKILL" in receipt["error"]["what"]
    ended(guest, 128 + signal.SIGKILL)


@pytest.mark.parametrize("phase", ["release", "retire"])
def test_successor_killed_when_it_runs_the_guest(guest: Survivor, phase: str) -> None:
    going = guest.begin(phase)
    os.kill(guest.successor(), signal.SIGKILL)
    guest.go_on()
    receipt = outcome(going)
    assert receipt["result"] == "lost", receipt
    assert "SIGKILL" in receipt["error"]["what"]
    ended(guest, 128 + signal.SIGKILL)


@pytest.mark.parametrize("phase", ["release", "retire"])
def test_quit_when_the_successor_runs_the_guest(guest: Survivor, phase: str) -> None:
    """That is what its user wants, and nothing is lost."""
    going = guest.begin(phase)
    successor = guest.successor()
    guest.other.command("quit")
    # A supervisor that has not noticed yet would say that it runs.
    wait_until("its end", lambda: not Path(f"/proc/{successor}").exists())
    guest.go_on()
    receipt = outcome(going)
    assert receipt["result"] == "done", receipt
    assert receipt["guest"] == "ended"
    ended(guest, 0)


def test_kill_of_qemu_is_told_by_the_commands(guest: Survivor, place: Path) -> None:
    """`segue upgrade` ends with 8, `segue run` as QEMU did; nobody waits for the successor."""
    started = place / "started"
    target = place / "qemu-slow"
    wait = f'case "$*" in *defer*) touch {started}; exec sleep 1000;; esac'
    target.write_text(f'#!/bin/sh\n{wait}\nexec {qemu("10.0")} "$@"\n')
    target.chmod(0o755)
    command = subprocess.Popen(
        guest.segue.command("upgrade", "survivor", "--to", str(target)),
        env=guest.segue.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until("the successor", started.exists)
    os.kill(guest.machine.qemu_pid, signal.SIGKILL)
    _, err = command.communicate(timeout=30)
    assert command.returncode == 8, err
    assert "SIGKILL" in err
    assert "Traceback" not in err
    ended(guest, 128 + signal.SIGKILL)


@pytest.mark.parametrize("phase", ["plan", *PHASES, "release", "retire"])
def test_supervisor_is_told_to_end(guest: Survivor, phase: str) -> None:
    """Before commit the upgrade is undone, after it finished; then QEMU is told, as without."""
    assert guest.machine.process is not None
    going = guest.begin(phase)
    guest.machine.process.send_signal(signal.SIGTERM)
    # Twice: who has no patience does no harm either.
    guest.machine.process.send_signal(signal.SIGTERM)
    if phase in ("commit", "release", "retire"):
        guest.go_on()
    receipt = outcome(going)
    if phase in ("commit", "release", "retire"):
        assert receipt["result"] == "done", receipt
    else:
        assert receipt["result"] == "failed", receipt
        assert receipt["error"]["what"] == "the upgrade was called off"
    ended(guest, 0)


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 0), (signal.SIGHUP, 0), (signal.SIGQUIT, 128 + signal.SIGQUIT)],
)
def test_other_signals_that_end_it(guest: Survivor, number: signal.Signals, status: int) -> None:
    assert guest.machine.process is not None
    going = guest.begin("move")
    guest.machine.process.send_signal(number)
    assert outcome(going)["result"] == "failed"
    ended(guest, status)


@pytest.mark.parametrize("phase", PHASES)
def test_guest_powers_off(guest: Survivor, phase: str) -> None:
    going = guest.begin(phase)
    guest.console.send(b"q")
    if phase in ("prepare", "open", "hold"):
        wait_until(
            "the power-off",
            lambda: guest.other.command("query-status")["status"] == "shutdown",
        )
    guest.go_on()
    receipt = outcome(going)
    if phase in ("prepare", "open", "hold"):
        assert receipt["result"] in ("failed", "refused"), receipt
        assert receipt["guest"].startswith("not running")
    else:
        assert receipt["result"] == "done", receipt
    ended(guest, 0)


@pytest.mark.parametrize("guest", [("-no-reboot",), ("-action", "reboot=shutdown")], indirect=True)
@pytest.mark.parametrize("phase", ["prepare", "hold", "move"])
def test_guest_resets_where_that_is_the_end(guest: Survivor, phase: str) -> None:
    going = guest.begin(phase)
    guest.console.send(b"r")
    if phase != "move":
        wait_until(
            "the end",
            lambda: guest.other.command("query-status")["status"] == "shutdown",
        )
    guest.go_on()
    receipt = outcome(going)
    expected = ("done",) if phase == "move" else ("failed", "refused")
    assert receipt["result"] in expected, receipt
    ended(guest, 0)


@pytest.mark.parametrize(
    ("guest", "status"),
    [
        (("-device", "pvpanic"), 0),
        (("-device", "pvpanic", "-action", "panic=exit-failure"), 1),
    ],
    indirect=["guest"],
)
@pytest.mark.parametrize("phase", ["hold", "move"])
def test_guest_panics_where_that_is_the_end(guest: Survivor, phase: str, status: int) -> None:
    going = guest.begin(phase)
    guest.console.send(b"p")
    if phase != "move":
        wait_until(
            "the panic",
            lambda: guest.other.command("query-status")["status"] == "guest-panicked",
        )
    guest.go_on()
    receipt = outcome(going)
    expected = ("done",) if phase == "move" else ("failed", "refused")
    assert receipt["result"] in expected, receipt
    ended(guest, status)


@pytest.mark.parametrize("guest", [("-no-shutdown",)], indirect=True)
def test_guest_that_is_kept_when_it_has_shut_down(guest: Survivor) -> None:
    """It is in no state to be moved, and stays where it is until somebody resets it."""
    going = guest.begin("open")
    guest.console.send(b"q")
    wait_until("the power-off", lambda: guest.other.command("query-status")["status"] == "shutdown")
    guest.go_on()
    assert outcome(going)["result"] == "failed"
    assert guest.segue("upgrade", "survivor", "--to", qemu("10.0")).returncode == 5
    guest.machine.stop()
    ended(guest, 0)


def test_stop_in_the_middle_of_an_upgrade(guest: Survivor) -> None:
    """The upgrade is called off; it says how the guest ended, and leaves nothing."""
    going = guest.begin("hold")
    stopping = subprocess.Popen(
        guest.segue.command("stop", "survivor", "--timeout", "1"),
        env=guest.segue.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert outcome(going)["result"] == "failed"
    out, _ = stopping.communicate(timeout=60)
    assert stopping.returncode == 0
    assert "told to quit" in out
    ended(guest, 0)


def test_a_stop_that_comes_together_with_an_upgrade(guest: Survivor) -> None:
    """Both are there at once; the upgrade has been begun, but has not done its first step."""
    assert guest.machine.process is not None
    supervisor = guest.machine.process.pid
    commands = (
        b'{"execute": "segue-upgrade", "arguments": {"force": true}}',
        b'{"execute": "segue-stop", "arguments": {"timeout": 1}}',
    )
    clients = [guest.machine.connect(guest.machine.directory / "qmp.sock") for _ in commands]
    for client in clients:
        client.send(b'{"execute": "qmp_capabilities"}')
        client.expect(rb'"return": \{\}')
    stop_between_turns(supervisor)
    for client, command in zip(clients, commands, strict=True):
        client.send(command)
    os.kill(supervisor, signal.SIGCONT)
    clients[0].expect(b"the upgrade was called off")
    clients[1].expect(b'"how": "quit"')
    ended(guest, 0)


def test_stop_of_what_hangs(guest: Survivor) -> None:
    """In the middle of an upgrade that waits for an incumbent which does not answer."""
    going = guest.begin("hold", **limits(hold=0.5, undo=0.5))
    os.kill(guest.machine.qemu_pid, signal.SIGSTOP)
    guest.go_on()
    assert outcome(going)["guest"].startswith("unknown")
    done = guest.segue("stop", "survivor", "--timeout", "0.5", limit=100)
    assert done.returncode == 0, done
    assert "killed" in done.stdout
    ended(guest, 128 + signal.SIGKILL)


def test_clients_hear_that_a_guest_stays_paused(segue: Segue, place: Path) -> None:
    """Where QEMU cannot take its image back: the stop was of our doing, and is to stay."""
    disk = place / "disk"
    disk.write_bytes(bytes(1 << 20))
    guest = Survivor(place, "-drive", f"file={disk},if=virtio,format=raw", segue=segue)
    going = guest.begin("commit")
    guest.other.events.clear()
    disk.rename(place / "elsewhere")
    os.kill(guest.successor(), signal.SIGKILL)
    guest.go_on()
    receipt = outcome(going)
    assert receipt["result"] == "failed", receipt
    assert receipt["guest"] == "paused on the incumbent"

    def heard() -> list[str]:
        return [e["event"] for e in guest.other.events if e["event"] in ("STOP", "RESUME")]

    wait_until("the news", lambda: heard() == ["STOP"])
    (place / "elsewhere").rename(disk)
    guest.qmp.command("cont")
    wait_until("the good news", lambda: heard() == ["STOP", "RESUME"])
    guest.well()
    guest.upgrade_works()
    assert heard() == ["STOP", "RESUME"]
    guest.close()


@contextlib.contextmanager
def small_tmpfs(path: Path, limit: str = "size=1m") -> Iterator[None]:
    path.mkdir()
    options = f"{limit},mode=0700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


def fill(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_no_space_in_the_run_directory(place: Path) -> None:
    """An upgrade needs none: it is done, or undone, and the receipt is told all the same."""
    with small_tmpfs(place / "run"):
        segue = Segue(place / "run", {"SEGUE_TESTING": "1"})
        survivor = Survivor(place, segue=segue)
        try:
            fill(place / "run/fill")
            for release in ("10.0", "7.2"):
                receipt = survivor.begin(None, release).result(60)
                assert receipt["result"] == "done", receipt
                unharmed(survivor.console)
            going = survivor.begin("move")
            os.kill(survivor.successor(), signal.SIGKILL)
            survivor.go_on()
            receipt = going.result(60)
            assert receipt["result"] == "failed", receipt["error"]
            survivor.well()
            assert len(survivor.other.command("segue-history")) == 3
            (place / "run/fill").unlink()
            works_and_ends(survivor)
        finally:
            segue.end()


def test_no_space_from_each_phase_on(place: Path) -> None:
    """It is done, or undone if the successor is killed besides; what is listed comes right."""
    with small_tmpfs(place / "run"):
        segue = Segue(place / "run", {"SEGUE_TESTING": "1"})
        survivor = Survivor(place, segue=segue)
        receipts = 0
        try:
            for phase in ("plan", *PHASES, "release", "retire"):
                for kill in (False, True):
                    if kill and phase not in STARTED:
                        continue
                    incumbent = survivor.machine.qemu_pid
                    going = survivor.begin(phase)
                    fill(place / "run/fill")
                    if kill:
                        os.kill(survivor.successor(), signal.SIGKILL)
                    survivor.go_on()
                    receipt = going.result(60)
                    receipts += 1
                    if kill:
                        survivor.check(receipt, "failed", incumbent)
                    else:
                        assert receipt["result"] == "done", receipt
                        assert survivor.qemus() == [receipt["to"]["pid"]]
                    (place / "run/fill").unlink()
                    running = incumbent if kill else receipt["to"]["pid"]
                    wait_until("the list", lambda: survivor.machine.qemu_pid == running)  # noqa: B023
                    survivor.well()
                    survivor.upgrade_works()
                    receipts += 1
            assert len(survivor.other.command("segue-history")) == receipts
            survivor.close()
            survivor.machine.stop()
            ended(survivor, 0)
        finally:
            segue.end()


def test_no_space_for_a_paused_guest(place: Path) -> None:
    """Its images are opened by way of a socket on QEMU 7.2; all else is done without that."""

    def fill_up() -> None:
        with contextlib.suppress(OSError):
            for number in range(64):
                (place / f"run/fill{number}").mkdir()

    disk = place / "disk"
    disk.write_bytes(bytes(1 << 20))
    with small_tmpfs(place / "run", "nr_inodes=64"):
        segue = Segue(place / "run", {"SEGUE_TESTING": "1"})
        survivor = Survivor(place, "-drive", f"file={disk},if=virtio,format=raw", segue=segue)
        try:
            survivor.qmp.command("stop")
            incumbent = survivor.machine.qemu_pid
            going = survivor.begin("commit")
            fill_up()
            os.kill(survivor.successor(), signal.SIGKILL)
            survivor.go_on()
            receipt = going.result(60)
            assert receipt["result"] == "failed", receipt
            assert any("images were not opened" in each for each in receipt["warnings"])
            assert survivor.qemus() == [incumbent]
            for path in (place / "run").glob("fill*"):
                path.rmdir()
            survivor.qmp.command("cont")
            survivor.qmp.command("stop")
            for release in ("10.0", "7.2"):
                going = survivor.begin("commit", release)
                if release == "7.2":
                    fill_up()
                survivor.go_on()
                receipt = going.result(60)
                assert receipt["result"] == "done", receipt
            assert any("images were not opened" in each for each in receipt["warnings"])
            migrates_as_ever(survivor.qmp)
            for path in (place / "run").glob("fill*"):
                path.rmdir()
            survivor.qmp.command("cont")
            survivor.well()
            works_and_ends(survivor)
        finally:
            segue.end()


def test_no_space_at_the_start(place: Path) -> None:
    with small_tmpfs(place / "run"):
        fill(place / "run/fill")
        segue = Segue(place / "run")
        done = segue("run", "--name", "guest", "--", qemu("10.0"), "-display", "none")
        assert done.returncode == 1, done
        assert done.stderr.startswith("segue: ")
        assert "Traceback" not in done.stderr
        assert not segue.processes()
        assert not (place / "run/guest").exists()
