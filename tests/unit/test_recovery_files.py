"""What a machine is taken up from: whatever is not as it was written is refused, nobody touched."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from segue import recovery
from segue.errors import NotRunning, Refused
from segue.machines import MachineDirectory
from segue.qemu.instance import Instance, start_time
from segue.sealed import Damaged, seal, unseal
from segue.upgrade import journal, resume
from segue.upgrade.journal import Journal


def damages(data: bytes) -> Iterator[bytes]:
    """Truncated at every length, and every byte flipped in two ways."""
    for length in range(len(data)):
        yield data[:length]
    for place, byte in enumerate(data):
        for flip in (1, 0x80):
            yield data[:place] + bytes([byte ^ flip]) + data[place + 1 :]


def test_what_is_sealed_is_itself_or_nothing() -> None:
    record = {"text": "\u00e4\x00", "pid": 4711, "more": [1.5, None, {"a": True}]}
    data = seal(record)
    assert unseal(data) == record
    for damaged in damages(data):
        with pytest.raises(Damaged):
            unseal(damaged)


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MachineDirectory]:
    """Of a machine whose supervisor is dead; its QEMU is this process."""
    monkeypatch.setenv("SEGUE_RUN_DIR", str(tmp_path))
    directory = MachineDirectory.create("m")
    this = SimpleNamespace(pid=os.getpid(), start_time=start_time(os.getpid()))
    directory.write_status({"qemu_pid": this.pid, "qemu_start_time": this.start_time})
    machine = {"instances": [{"instance": vars(this)}]}
    record = {"format": 2, "machine": machine, "descriptors": {}}
    directory.machine.write_bytes(seal(record))
    written = Journal(directory.journal)
    written.write("commit", cast(Instance, this), None)
    written.close()
    yield directory
    directory.remove()


def test_what_is_whole_is_read(directory: MachineDirectory) -> None:
    found = recovery.Recovery.read(directory)
    assert found.phase == "commit"
    assert found.journal["incumbent"]["pid"] == os.getpid()


def test_a_damaged_machine_file_is_refused(directory: MachineDirectory) -> None:
    for damaged in damages(directory.machine.read_bytes()):
        directory.machine.write_bytes(damaged)
        with pytest.raises(Refused, match="not as it was written") as error:
            recovery.Recovery.read(directory)
        assert f"(pid {os.getpid()}) runs on" in (error.value.hint or "")


def test_a_damaged_journal_is_refused(directory: MachineDirectory) -> None:
    """It is not taken for one that says that all is done."""
    whole = directory.journal.read_bytes()
    for damaged in damages(whole):
        directory.journal.write_bytes(damaged)
        if damaged:
            with pytest.raises(Refused, match="cannot be read"):
                journal.read(directory.journal)
        else:
            assert journal.read(directory.journal) is None


def test_before_anything_is_done(
    directory: MachineDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touched(*_: object) -> None:
        raise AssertionError("something was done by a journal that cannot be read")

    monkeypatch.setattr(resume, "end_what_must_not_run", touched)
    directory.journal.write_bytes(b"x" * 4096)
    with pytest.raises(Refused, match="cannot be read"):
        recovery.recover(directory, lambda: None, detached=True)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda d: d.machine.unlink(), "there is nothing"),
        (lambda d: d.status.unlink() or d.machine.write_bytes(b"?"), "not as it was written"),
    ],
    ids=["absent", "dead"],
)
def test_where_there_is_nothing_to_take_up(
    directory: MachineDirectory, write: Callable[[MachineDirectory], None], said: str
) -> None:
    directory.journal.unlink()
    write(directory)
    with pytest.raises(NotRunning, match=said):
        recovery.Recovery.read(directory)


def test_another_release_s_files(directory: MachineDirectory) -> None:
    record = unseal(directory.machine.read_bytes())
    directory.machine.write_bytes(seal(record | {"format": 3}))
    with pytest.raises(Refused, match="another version"):
        recovery.Recovery.read(directory)
    said = unseal(directory.journal.read_bytes().rstrip())
    directory.journal.write_bytes(seal(said | {"version": 3}).ljust(4096))
    with pytest.raises(Refused, match="another version"):
        journal.read(directory.journal)


def test_a_journal_that_says_nothing_yet(tmp_path: Path) -> None:
    made = Journal(tmp_path / "journal")
    made.close()
    assert journal.read(tmp_path / "journal") is None
    assert journal.read(tmp_path / "none") is None
