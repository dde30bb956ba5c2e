"""A supervisor that becomes newer code: nobody who has to do with the machine notices."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from qemu.qmp.qmp_client import ExecuteError

from tests.qemu.conftest import tiny, unharmed, watch
from tests.qemu.harness import Segue, descriptors, qemu


def test_clients_and_guest_go_on(segue: Segue, place: Path) -> None:
    machine = segue.start("m", tiny(place, "7.2"))
    assert machine.process is not None
    console = watch(machine, place)
    with machine.qmp() as idle, machine.qmp() as asker:
        asker.command("segue-reexec")
        before = len(descriptors(machine.process.pid))
        pid = machine.qemu_pid
        for _ in range(3):
            assert asker.command("segue-reexec")["pid"] == machine.process.pid
            assert machine.qemu_pid == pid
            assert idle.command("query-status")["status"] == "running"
            unharmed(console)
        receipt = machine.handed_over("--to", qemu("10.0"))
        asker.command("segue-reexec")
        unharmed(console)
        assert [each["started"] for each in idle.command("segue-history")] == [receipt["started"]]
        assert idle.command("query-fdsets") == []
        assert len(descriptors(machine.process.pid)) == before


def test_code_that_does_not_start_is_refused(segue: Segue, place: Path) -> None:
    machine = segue.start("m", tiny(place, "7.2"))
    console = watch(machine, place)
    python = place / "python"
    with machine.qmp() as qmp:
        for script, said in (
            (None, "cannot be started"),
            ("exit 3", "ended without an answer"),
            ("echo ModuleNotFoundError: No module named segue >&2; exit 1", "No module named"),
        ):
            if script is not None:
                python.write_text(f"#!/bin/sh\n{script}\n")
                python.chmod(0o755)
            with pytest.raises(ExecuteError, match=said):
                qmp.command("segue-reexec", {"python": os.fspath(python)})
            unharmed(console)
        qmp.command("segue-reexec")
    unharmed(console)
