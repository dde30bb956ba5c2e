"""A machine is put into a directory and goes on later; nothing is lost, nothing happens twice."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.qemu.conftest import migrates_as_ever, tiny, unharmed, watch
from tests.qemu.harness import Client, Machine, Segue, alive, cpu_ticks, qemu, wait_until


def suspend(guest: Machine, to: Path, status: int = 0) -> dict[str, object]:
    done = guest.segue("suspend", guest.name, "--to", str(to), "--json")
    assert done.returncode == status, (done.stdout, done.stderr)
    receipt: dict[str, object] = json.loads(done.stdout)
    return receipt


def resume(segue: Segue, directory: Path, *more: str) -> Machine:
    process = subprocess.Popen(
        [sys.executable, "-m", "segue", "resume", str(directory), *more],
        env=segue.environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    machine = Machine(segue, "guest", process)
    segue.machines.append(machine)
    status = segue.root / "guest/status.json"
    wait_until("the resuming", lambda: status.exists() or process.poll() is not None)
    assert process.poll() is None
    return machine


def follow(before: Client, guest: Machine, place: Path) -> Client:
    """A new client, whose witness goes on where that of the last one stopped."""
    after = guest.connect(place / "console")
    after.witness = before.witness
    return after


@pytest.mark.parametrize(("first", "then"), [("7.2", "7.2"), ("7.2", "11.1"), ("11.1", "10.0")])
def test_a_guest_goes_on_where_it_stopped(segue: Segue, place: Path, first: str, then: str) -> None:
    guest = segue.start("guest", tiny(place, first, "-M", "pc-q35-7.2"))
    console = watch(guest, place)
    pid, directory = guest.qemu_pid, place / "suspended"
    receipt = suspend(guest, directory)
    assert receipt["result"] == "done"
    assert receipt["guest"] == f"suspended in {directory}"
    assert guest.wait() == 0
    assert not alive(pid)
    console.wait(lambda: console.closed, "the end of the console")
    ticks = console.witness and console.witness.ticks
    again = resume(segue, directory, "--to", qemu(then))
    after = again.connect(place / "console")
    after.expect(rb"tick \d+\r\n")
    after.expect(rb"nonce \w+")
    assert ticks
    first_tick = int(after.expect(rb"tick (\d+)\r\n").group(1))
    assert ticks <= first_tick < ticks + 10_000
    assert not directory.exists()
    with again.qmp() as qmp:
        migrates_as_ever(qmp)
    again.handed_over("--to", qemu("10.0"), "--force")
    after.close()
    unharmed(watch(again, place))


def test_the_qemu_that_ran_it_last_goes_on(segue: Segue, place: Path) -> None:
    """Not the one that it was started with, which may be gone, or too old for its state."""
    guest = segue.start("guest", tiny(place, "7.2"))
    watch(guest, place)
    guest.handed_over("--to", qemu("10.0"))
    directory = place / "suspended"
    done = segue("suspend", "guest", "--to", str(directory))
    assert done.stdout.splitlines() == [
        f"guest: suspended in {directory}",
        f"  it goes on by: segue resume {directory}",
    ]
    assert guest.wait() == 0
    again = resume(segue, directory)
    unharmed(watch(again, place))
    assert again.status()["binary"] == qemu("10.0")


def test_what_cannot_be_resumed_is_left_as_it_was(segue: Segue, place: Path) -> None:
    disk = place / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    guest = segue.start("guest", tiny(place, "10.0", "-drive", f"file={disk},if=virtio,format=raw"))
    watch(guest, place)
    directory = place / "suspended"
    suspend(guest, directory)
    assert guest.wait() == 0

    def refused(why: str) -> None:
        before = {p.name: p.read_bytes() for p in directory.iterdir()}
        done = segue("resume", str(directory))
        assert done.returncode == 5, done
        assert why in done.stderr
        assert "Traceback" not in done.stderr
        assert {p.name: p.read_bytes() for p in directory.iterdir()} == before

    stamp = disk.stat()
    disk.write_bytes(b"x" * (1 << 20))
    refused("is not what it was")
    disk.write_bytes(bytes(1 << 20))
    os.utime(disk, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    for name in ("state", "ram-0", "file-0", "machine.json"):
        path = directory / name
        kept = place / "kept"
        shutil.copyfile(path, kept)
        for spoil in (_truncate, _flip):
            spoil(path)
            refused("damaged")
            shutil.copyfile(kept, path)
    failed = segue("resume", str(directory), "--to", "/bin/true")
    assert failed.returncode == 5, failed
    again = resume(segue, directory)
    unharmed(watch(again, place))
    assert segue("resume", str(directory)).returncode == 5


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path) -> None:
    with path.open("r+b") as file:
        end = os.lseek(file.fileno(), 0, os.SEEK_DATA) + 40
        file.seek(end)
        byte = file.read(1)
        file.seek(end)
        file.write(bytes([byte[0] ^ 1]))


@pytest.fixture
def shm() -> Iterator[Path]:
    """A folder on tmpfs."""
    with tempfile.TemporaryDirectory(prefix="segue-", dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.mark.parametrize("spelling", ["object", "mem-path"])
def test_memory_in_a_file_of_the_users_is_left_there(
    segue: Segue, place: Path, shm: Path, spelling: str
) -> None:
    """And nothing else than that very memory is taken for it."""
    memory = shm / "memory"
    backend = f"memory-backend-file,id=m0,size=64M,share=on,mem-path={memory}"
    words = {
        "object": ["-object", backend, "-machine", "memory-backend=m0"],
        "mem-path": ["-mem-path", str(memory)],
    }
    memory.write_bytes(bytes(64 << 20))
    guest = segue.start("guest", tiny(place, "7.2", "-M", "pc-q35-7.2", *words[spelling]))
    before = watch(guest, place)
    directory = place / "suspended"
    suspend(guest, directory)
    assert guest.wait() == 0
    before.wait(lambda: before.closed, "the end of the console")
    ticks = before.witness and before.witness.ticks
    assert ticks
    assert not list(directory.glob("ram-*"))

    def refused(why: str) -> None:
        files = {p.name: p.read_bytes() for p in directory.iterdir()}
        done = segue("resume", str(directory))
        assert done.returncode == 5, done
        assert why in done.stderr
        assert {p.name: p.read_bytes() for p in directory.iterdir()} == files

    kept, moved = memory.read_bytes(), memory.with_name("moved")
    memory.rename(moved)
    refused("No such file")
    memory.write_bytes(kept)
    refused("is not what it was (mtime_ns)")
    memory.write_bytes(kept[: 32 << 20])
    refused("is not what it was (bytes")
    moved.replace(memory)
    failed = segue("resume", str(directory), "--to", "/bin/true")
    assert failed.returncode == 5, failed
    bad = place / "qemu-bad"
    hpet = 'case "$*" in *defer*) set -- "$@" -machine hpet=off;; esac'
    bad.write_text(f'#!/bin/sh\n{hpet}\nexec {qemu("10.0")} "$@"\n')
    bad.chmod(0o755)
    assert segue("resume", str(directory), "--to", str(bad)).returncode == 1
    assert memory.read_bytes() == kept

    again = resume(segue, directory, "--to", qemu("11.1"))
    after = again.connect(place / "console")
    assert ticks <= int(after.expect(rb"tick (\d+)\r\n").group(1)) < ticks + 10_000
    after.close()
    console = watch(again, place)
    ram = again.handed_over("--to", qemu("10.0"))["kept"]
    inode = memory.stat().st_ino
    assert [k["identity"]["inode"] for k in ram if k["kind"] == "ram"] == [inode]
    unharmed(console)
    again.stop()
    again.wait()
    assert memory.stat().st_ino == inode


def test_memory_on_a_file_system_of_the_users_comes_back_there(
    segue: Segue, place: Path, shm: Path
) -> None:
    """A folder there means, as with QEMU, a file that nobody else can see."""
    guest = segue.start("guest", tiny(place, "10.0", "-mem-path", str(shm)))
    watch(guest, place)
    directory = place / "suspended"
    suspend(guest, directory)
    assert guest.wait() == 0
    assert (directory / "ram-0").stat().st_blocks << 9 < 64 << 20
    again = resume(segue, directory)
    console = watch(again, place)
    device = shm.stat().st_dev
    kept = again.handed_over("--to", qemu("11.1"))["kept"]
    assert [k["identity"]["device"] for k in kept if k["kind"] == "ram"] == [device]
    unharmed(console)
    assert not list(shm.iterdir())


@pytest.fixture
def hugetlbfs() -> Iterator[Path]:
    """A folder on hugetlbfs, which takes root."""
    with tempfile.TemporaryDirectory(prefix="segue-") as folder:
        subprocess.run(["mount", "-t", "hugetlbfs", "segue", folder], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="a mount takes root")
@pytest.mark.parametrize("where", ["memfd", "folder", "file"])
def test_memory_on_huge_pages(
    huge_pages: int, hugetlbfs: Path, segue: Segue, place: Path, where: str
) -> None:
    """It comes back onto huge pages; what lies in a file of the user's is left there."""
    memory = hugetlbfs / "memory"
    words = {
        "memfd": ["-object", "memory-backend-memfd,id=m0,size=64M,hugetlb=on"],
        "folder": ["-object", f"memory-backend-file,id=m0,size=64M,mem-path={hugetlbfs}"],
        "file": ["-object", f"memory-backend-file,id=m0,size=64M,share=on,mem-path={memory}"],
    }
    if where == "file":
        with memory.open("wb") as file:
            file.truncate(64 << 20)
    argv = tiny(place, "7.2", "-M", "pc-q35-7.2", "-machine", "memory-backend=m0", *words[where])
    if huge_pages < 32:
        guest = segue.start("guest", argv, wait=False)
        assert guest.wait() == 1
        return
    guest = segue.start("guest", argv)
    console = watch(guest, place)
    assert on_huge_pages(guest)
    directory = place / "suspended"
    for release in ("11.1", "10.0"):
        suspend(guest, directory)
        assert guest.wait() == 0
        ticks = last_tick(console)
        assert bool(list(directory.glob("ram-*"))) == (where != "file")
        guest = resume(segue, directory, "--to", qemu(release))
        assert on_huge_pages(guest)
        after = guest.connect(place / "console")
        assert ticks <= int(after.expect(rb"tick (\d+)\r\n").group(1)) < ticks + 10_000
        after.close()
        console = watch(guest, place)
    guest.handed_over("--to", qemu("7.2"))
    assert on_huge_pages(guest)
    unharmed(console)


@pytest.mark.skipif(os.geteuid() != 0, reason="a mount takes root")
def test_memory_in_which_a_dead_qemu_may_have_run_the_guest(
    huge_pages: int, hugetlbfs: Path, segue: Segue, place: Path
) -> None:
    """On hugetlbfs no time tells what was written; the state of before does not fit it any more."""
    if huge_pages < 32:
        return
    memory = hugetlbfs / "memory"
    with memory.open("wb") as file:
        file.truncate(64 << 20)
    backend = f"memory-backend-file,id=m0,size=64M,share=on,mem-path={memory}"
    guest = segue.start(
        "guest", tiny(place, "10.0", "-object", backend, "-machine", "memory-backend=m0")
    )
    watch(guest, place)
    directory = place / "suspended"
    suspend(guest, directory)
    assert guest.wait() == 0
    died = subprocess.run(
        [sys.executable, "-m", "segue", "resume", str(directory)],
        env={**segue.environment, "SEGUE_DIE_AT": "cont"},
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert died.returncode == -signal.SIGKILL
    (pid,) = segue.processes()
    used = cpu_ticks(pid)
    wait_until("the guest running", lambda: cpu_ticks(pid) > used)
    os.kill(pid, signal.SIGKILL)
    wait_until("its end", lambda: not alive(pid))
    assert segue("recover", "guest").returncode == 3
    for _ in range(2):
        done = segue("resume", str(directory))
        assert done.returncode == 5, done
        assert "may have run this guest" in done.stderr
    assert (directory / "machine.json").exists()
    shutil.rmtree(segue.root / "guest")


def last_tick(console: Client) -> int:
    """Of a guest that was suspended."""
    console.wait(lambda: console.closed, "the end of the console")
    assert console.witness is not None
    return console.witness.ticks


def on_huge_pages(guest: Machine) -> bool:
    """Whether the kernel shows a mapping as large as the guest's memory on them."""
    maps = Path(f"/proc/{guest.qemu_pid}/smaps").read_text()
    found = re.findall(r"^Size: +(\d+) kB\nKernelPageSize: +2048 kB", maps, re.MULTILINE)
    return "65536" in found


def test_a_target_that_does_not_load_it(segue: Segue, place: Path) -> None:
    guest = segue.start("guest", tiny(place, "10.0"))
    watch(guest, place)
    directory = place / "suspended"
    suspend(guest, directory)
    guest.wait()
    bad = place / "qemu-bad"
    hpet = 'case "$*" in *defer*) set -- "$@" -machine hpet=off;; esac'
    bad.write_text(f'#!/bin/sh\n{hpet}\nexec {qemu("10.0")} "$@"\n')
    bad.chmod(0o755)
    done = segue("resume", str(directory), "--to", str(bad))
    assert done.returncode == 1, done
    assert "could not be loaded" in done.stderr
    assert "suspended in" in done.stderr
    unharmed(watch(resume(segue, directory), place))


@pytest.mark.parametrize("phase", ["prepare", "open", "hold", "move", "commit"])
def test_a_suspend_that_is_called_off(segue: Segue, place: Path, phase: str) -> None:
    """In every phase: the guest runs on, and there is no directory."""
    guest = segue.start("guest", tiny(place, "10.0"))
    console = watch(guest, place)
    directory = place / "suspended"
    with guest.qmp() as qmp, guest.qmp() as other:
        going = qmp.begin(
            "segue-suspend",
            {"to": str(directory), "x-break": [phase], "x-limits": {phase: 0.000001}},
        )
        qmp.event(phase=phase, state="break")
        if phase == "commit":
            (directory / "machine.json.new").mkdir()
        other.command("x-segue-continue")
        receipt = going.result(60)
    assert receipt["result"] == ("failed" if phase == "commit" else "timed-out"), receipt
    assert not directory.exists()
    unharmed(console)
    guest.handed_over("--to", qemu("11.1"))
    unharmed(console)


def test_a_directory_that_is_not_empty(segue: Segue, place: Path) -> None:
    guest = segue.start("guest", tiny(place, "10.0"))
    console = watch(guest, place)
    receipt = suspend(guest, place, status=5)
    assert "not empty" in str(receipt["error"])
    unharmed(console)


@pytest.mark.parametrize(
    ("phase", "written"),
    [*((p, False) for p in ("prepare", "open", "hold", "move", "commit")), ("commit", True)],
)
def test_a_suspend_whose_supervisor_is_killed(
    segue: Segue, place: Path, phase: str, written: bool
) -> None:
    """The guest goes on when it is taken up, and then there is nothing to be resumed."""
    guest = segue.start("guest", tiny(place, "10.0"))
    console = watch(guest, place)
    pid, directory = guest.qemu_pid, place / "suspended"
    assert guest.process is not None
    with guest.qmp() as qmp:
        qmp.begin("segue-suspend", {"to": str(directory), "x-break": [phase]})
        qmp.event(phase=phase, state="break")
        guest.process.kill()
        guest.process.wait()
    if written:
        # Between two lines of the commit there is nothing to stop at: what the first one writes.
        (directory / "machine.json").write_text("{}")
    taken_up = segue("recover", "guest")
    assert taken_up.returncode == 0, taken_up
    assert guest.qemu_pid == pid
    unharmed(console)
    assert not directory.exists()
    guest.handed_over("--to", qemu("11.1"))
    unharmed(console)
    guest.stop()
    wait_until("the end", lambda: not segue.leftovers(), 10)


class Interrupted:
    """A machine whose resuming was cut short by SIGKILL to its supervisor, at `point`."""

    def __init__(self, segue: Segue, place: Path, point: str) -> None:
        self.segue, self.place = segue, place
        disk = place / "disk.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "16M"], check=True)
        guest = segue.start(
            "guest", tiny(place, "10.0", "-drive", f"file={disk},if=virtio,format=qcow2")
        )
        self.console = watch(guest, place)
        self.directory = place / "suspended"
        suspend(guest, self.directory)
        assert guest.wait() == 0
        self.console.wait(lambda: self.console.closed, "the end of the console")
        self.ticks = self.console.witness and self.console.witness.ticks
        self.before = self.files()
        died = subprocess.run(
            segue.command("resume", str(self.directory)),
            env=segue.environment | {"SEGUE_DIE_AT": point},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            check=False,
        )
        assert died.returncode == -signal.SIGKILL
        self.qemus = [pid for pid in segue.processes() if alive(pid)]

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.directory.iterdir()}

    def resume(self, status: int) -> str:
        """`segue resume` that must not succeed; what it says."""
        done = self.segue("resume", str(self.directory))
        assert done.returncode == status, done
        assert "Traceback" not in done.stderr
        return done.stderr

    def goes_on(self, guest: Machine) -> None:
        """One QEMU, the guest where it was suspended or later, and the next upgrade works."""
        after = guest.connect(self.place / "console")
        assert self.ticks
        first = int(after.expect(rb"tick (\d+)\r\n").group(1))
        assert first >= self.ticks
        after.close()
        console = watch(guest, self.place)
        assert not self.directory.exists()
        guest.handed_over("--to", qemu("11.1"))
        unharmed(console)
        supervisor = int(guest.status()["supervisor_pid"])
        running = [p for p in self.segue.processes() if alive(p) and p != supervisor]
        assert running == [guest.qemu_pid]
        guest.stop()
        wait_until("the end", lambda: not self.segue.leftovers(), 10)


@pytest.mark.parametrize("point", ["journal", "marked", "loaded"])
@pytest.mark.parametrize("first", ["recover", "resume"])
def test_a_resume_whose_supervisor_is_killed_before_the_guest_may_run(
    segue: Segue, place: Path, point: str, first: str
) -> None:
    """Its QEMU is ended, by whoever comes first, and the directory is as it was."""
    cut = Interrupted(segue, place, point)
    (pid,) = cut.qemus
    if first == "recover" or point == "journal":
        if first == "resume":
            # Only the run directory knows of that QEMU.
            assert "segue recover guest" in cut.resume(5)
            assert alive(pid)
        done = segue("recover", "guest")
        assert done.returncode == 3, done
        assert f"segue resume {cut.directory}" in done.stderr
        assert not alive(pid)
        assert cut.files() == cut.before
    again = resume(segue, cut.directory)
    assert not alive(pid)
    cut.goes_on(again)


@pytest.mark.parametrize("point", ["may-run", "cont", "removed"])
def test_a_resume_whose_supervisor_is_killed_when_the_guest_may_run(
    segue: Segue, place: Path, point: str
) -> None:
    """The guest belongs to that QEMU: it is taken up, and is not resumed a second time."""
    cut = Interrupted(segue, place, point)
    (pid,) = cut.qemus
    assert ("segue recover guest" in cut.resume(5)) == (point != "removed")
    done = segue("recover", "guest")
    assert done.returncode == 0, done
    guest = Machine(segue, "guest", None)
    segue.machines.append(guest)
    assert guest.qemu_pid == pid
    cut.resume(5)
    cut.goes_on(guest)


def test_a_resume_whose_supervisor_and_qemu_are_killed(segue: Segue, place: Path) -> None:
    """`cont` was never sent, and no disk has changed: the guest is where it was."""
    cut = Interrupted(segue, place, "may-run")
    (pid,) = cut.qemus
    os.kill(pid, signal.SIGKILL)
    wait_until("its end", lambda: not alive(pid))
    done = segue("recover", "guest")
    assert done.returncode == 3, done
    assert f"segue resume {cut.directory}" in done.stderr
    assert cut.files() == cut.before
    cut.goes_on(resume(segue, cut.directory))
