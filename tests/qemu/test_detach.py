"""segue run --detach: whoever is interrupted, there is a whole machine or none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.qemu.conftest import tiny, unharmed, watch
from tests.qemu.harness import Machine, Segue, command_of, wait_until


def begin(segue: Segue, argv: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "segue", "run", "--name", "guest", "--detach", "--", *argv],
        env=segue.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def qemu_is_there(segue: Segue) -> bool:
    return any(
        "-nodefaults" in command_of(p) and "segue" not in command_of(p).split()[0]
        for p in segue.processes()
    )


MOMENTS: dict[str, Callable[[Segue], bool]] = {
    "it begins": lambda segue: len(segue.processes()) > 0,
    "there are two of it": lambda segue: len(segue.processes()) > 1,
    "the run directory": lambda segue: (segue.root / "guest").exists(),
    "its QEMU": qemu_is_there,
    "its QMP socket": lambda segue: (segue.root / "guest/qmp.sock").exists(),
    "its status": lambda segue: (segue.root / "guest/status.json").exists(),
}


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        *((moment, number) for moment in MOMENTS for number in (signal.SIGTERM, signal.SIGKILL)),
        *(("its QEMU", number) for number in (signal.SIGINT, signal.SIGHUP)),
    ],
)
def test_interrupted(segue: Segue, place: Path, moment: str, number: signal.Signals) -> None:
    caller = begin(segue, tiny(place, "10.0"))
    wait_until(moment, lambda: MOMENTS[moment](segue) or caller.poll() is not None)
    caller.send_signal(number)
    _, err = caller.communicate(timeout=60)
    assert "Traceback" not in err
    if caller.returncode == 0:
        # It had done its work before the signal came.
        unharmed(watch(started(segue), place))
        assert segue("stop", "guest", "--timeout", "1").returncode == 0
    elif number == signal.SIGKILL:
        assert caller.returncode == -signal.SIGKILL
        # Its supervisor was told that it is wanted, or finds nobody to tell.
        wait_until("a whole machine or none", lambda: whole(segue) or not segue.leftovers())
        if segue.leftovers():
            assert segue("stop", "guest", "--timeout", "1").returncode == 0
    else:
        # Python itself dies of them until `segue` is loaded.
        assert caller.returncode in (128 + number, -number)
    wait_until("an end without leftovers", lambda: not segue.leftovers())


def started(segue: Segue) -> Machine:
    machine = Machine(segue, "guest", None)
    segue.machines.append(machine)
    return machine


def whole(segue: Segue) -> bool:
    done = segue("show", "guest", "--json")
    return done.returncode == 0


def test_the_callers_terminal_is_left_alone(segue: Segue, place: Path) -> None:
    """With a guest on stdio too: what it says is for `segue console` from then on."""
    argv = [word for word in tiny(place, "10.0") if not word.startswith("unix:")]
    argv[argv.index("-serial") + 1 : argv.index("-serial") + 1] = ["stdio"]
    caller = begin(segue, argv)
    out, err = caller.communicate(timeout=60)
    assert (caller.returncode, out, err) == (0, "", "")
    machine = started(segue)
    client = machine.connect(machine.directory / "console.sock")
    client.expect(rb"tick \d+")
    for fd in ("0", "1", "2"):
        pid = machine.status()["supervisor_pid"]
        assert os.readlink(f"/proc/{pid}/fd/{fd}") == "/dev/null"
    assert segue("stop", "guest", "--timeout", "1").returncode == 0


def test_what_an_upgrade_cannot_do_is_told_at_the_start(segue: Segue, place: Path) -> None:
    """While the command line can still be changed."""
    lost = ["-chardev", "ringbuf,id=ring,size=4096"]
    caller = begin(segue, [*tiny(place, "10.0"), "-snapshot", *lost])
    _, err = caller.communicate(timeout=60)
    assert caller.returncode == 0
    blocked, told = err.splitlines()
    assert blocked.startswith("segue: guest: cannot be upgraded: -snapshot: ")
    assert "make overlays with qemu-img" in blocked
    assert told.startswith("segue: guest: not kept by an upgrade: chardev 'ring'")
    assert segue("stop", "guest", "--timeout", "1").returncode == 0


def test_an_error_is_seen_as_in_the_foreground(segue: Segue, place: Path) -> None:
    argv = [*tiny(place, "10.0"), "-device", "no-such-device"]
    caller = begin(segue, argv)
    _, err = caller.communicate(timeout=60)
    assert caller.returncode == 1
    assert "no-such-device" in err
    assert "Traceback" not in err
