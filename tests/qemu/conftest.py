"""Fixtures of the tests on real QEMU. Each test ends with nothing left over."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from segue.guest import Witness, image
from tests.qemu.harness import Client, Machine, Qmp, Segue, accelerator, qemu, wait_until

_MEMORY = Path("/dev/shm")


@pytest.fixture
def place() -> Iterator[Path]:
    """A short path, since Unix sockets are to have room in it."""
    path = Path(tempfile.mkdtemp(prefix="segue-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def segue(place: Path) -> Iterator[Segue]:
    """The command in a run directory of its own; at the end machines are stopped, nothing left."""
    # Where it is for users: in memory. A disk that is written to keeps a supervisor waiting that
    # only renames a file.
    memory = tempfile.mkdtemp(prefix="segue-", dir=_MEMORY if _MEMORY.is_dir() else None)
    command = Segue(Path(memory, "run"), {"SEGUE_TESTING": "1"})
    try:
        yield command
        for machine in command.machines:
            if machine.process is not None and machine.process.poll() is None:
                machine.stop()
                machine.wait()
        wait_until("the end of all that was started", lambda: not command.leftovers(), 10)
    finally:
        left = command.leftovers()
        command.end()
        shutil.rmtree(memory)
        assert not left, left


@pytest.fixture
def huge_pages() -> Iterator[int]:
    """How many huge pages of 2 MiB are free; the host is asked for some, and given them back."""
    pool = Path("/proc/sys/vm/nr_hugepages")
    before = int(pool.read_text())
    with contextlib.suppress(OSError):
        pool.write_text(str(before + 40))
    given = int(pool.read_text()) - before
    free = re.search(r"HugePages_Free: +(\d+)", Path("/proc/meminfo").read_text())
    yield int(free[1]) if free else 0
    if given > 0:
        # What others on this host have asked for meanwhile stays theirs.
        pool.write_text(str(max(0, int(pool.read_text()) - given)))


def tiny(place: Path, release: str, *more: str, machine: str = "q35") -> list[str]:
    """The command line of the tiny guest, its console on a Unix socket."""
    return [
        qemu(release),
        *accelerator(),
        *("-M", machine, "-m", "64", "-nodefaults", "-display", "none"),
        *("-kernel", str(image())),
        *("-serial", f"unix:{place}/console,server=on,wait=off"),
        *more,
    ]


def watch(machine: Machine, place: Path) -> Client:
    """A client on the tiny guest's console that checks every byte from here on."""
    client = machine.connect(place / "console")
    client.witness = Witness()
    client.wait(lambda: client.witness and client.witness.ticks > 20, "the first ticks")
    return client


def migrates_as_ever(qmp: Qmp) -> None:
    """A migration of a client's own is as it was before any upgrade."""
    assert qmp.command("qom-get", {"path": "/machine", "property": "suppress-vmdesc"}) is False
    listed = qmp.command("query-migrate-capabilities")
    assert not [each["capability"] for each in listed if each["state"]]


def unharmed(client: Client) -> None:
    """The guest went on without a fault, and goes on."""
    witness = client.witness
    assert witness is not None
    seen = witness.ticks
    client.wait(lambda: witness.ticks > seen + 20, "the guest going on")
    assert not witness.faults, witness.faults[:3]
