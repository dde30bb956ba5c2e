"""What a user's mistake or bad luck looks like at the command line: one line, a hint, a number."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.qemu.conftest import tiny, unharmed, watch
from tests.qemu.harness import Machine, Segue, no_descriptor_leak, qemu, wait_until

Done = subprocess.CompletedProcess[str]


def said(done: Done, status: int, *words: str) -> None:
    """Its exit status, and words that stand in what it says; what and hint, and no more."""
    assert done.returncode == status, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


def mistake(done: Done, status: int, *words: str) -> None:
    said(done, status, *words)
    what, hint = done.stderr.splitlines()
    assert what.startswith("segue: ")
    assert hint.startswith("hint: ")


@pytest.fixture
def guest(segue: Segue, place: Path) -> Iterator[Machine]:
    machine = segue.start("guest", tiny(place, "10.0"))
    console = watch(machine, place)
    assert machine.process is not None
    with no_descriptor_leak(machine.process.pid):
        yield machine
        unharmed(console)


def slow(place: Path) -> Path:
    """A QEMU that is probed like any, and hangs when it is to be the successor."""
    return target(place, "slow", 'case "$*" in *defer*) exec sleep 1000;; esac')


def dying(place: Path) -> Path:
    return target(place, "dying", 'case "$*" in *defer*) echo no luck >&2; exit 1;; esac')


def target(place: Path, name: str, line: str) -> Path:
    path = place / f"qemu-{name}"
    path.write_text(f'#!/bin/sh\n{line}\nexec {qemu("11.1")} "$@"\n')
    path.chmod(0o755)
    return path


def test_upgrades(segue: Segue, guest: Machine, place: Path) -> None:
    said(segue("upgrade", "guest"), 0)
    said(segue("upgrade", "guest", "--to", str(dying(place))), 1, "no luck", "running on the incu")
    said(segue("upgrade", "guest", "--to", str(slow(place)), "--timeout", "1.5"), 6, "1.5 s")
    said(segue("upgrade", "guest", "--to", "/nothing"), 5, "/nothing", "hint: ")
    said(segue("upgrade", "guest", "--to", "/bin/true"), 5)
    mistake(segue("upgrade", "nobody"), 4, "nobody")
    said(segue("upgrade", "guest", "--to", qemu("11.1")), 0)
    said(segue("check", "guest", "--to", qemu("10.0")), 0)
    history = segue("history", "guest", "--json").stdout
    assert [word in history for word in ("failed", "timed-out", "refused", "done")] == [True] * 4


def test_all_is_partial(segue: Segue, guest: Machine, place: Path) -> None:
    """One machine that can be upgraded, and one that cannot."""
    (place / "other").mkdir()
    other = segue.start("other", [*tiny(place / "other", "10.0"), "-snapshot"])
    done = segue("upgrade", "--all", "--to", qemu("11.1"))
    assert segue("check", "other", "--to", qemu("11.1")).returncode == 5, done
    said(done, 7, "other")
    assert guest.status()["qemu_version"].startswith("11.1")
    assert other.status()["qemu_version"].startswith("10.0")
    other.stop()
    other.wait()
    said(segue("upgrade", "--all", "--to", qemu("10.0")), 0)


def test_usage(segue: Segue, guest: Machine, place: Path) -> None:
    mistake(segue("upgrade", "guest", "--frobnicate"), 2, "--frobnicate")
    mistake(segue("frobnicate"), 2, "frobnicate")
    mistake(segue("run", "--name", "a b", "--", qemu("10.0")), 2, "a b")
    mistake(segue("run", "--name", "guest", "--", qemu("10.0")), 5, "already running")
    mistake(segue("run", "--", "qemu-system-none"), 5, "qemu-system-none")
    unreadable = place / "qemu-unreadable"
    unreadable.write_bytes(b"\x7fELF")
    mistake(segue("run", "--", str(unreadable)), 5, str(unreadable))
    bad = segue("run", "--name", "bad", "--", qemu("10.0"), "-no-such-option")
    assert bad.returncode in (1, 2), bad
    assert "no-such-option" in bad.stderr
    assert "Traceback" not in bad.stderr
    assert not (segue.root / "bad").exists()


def test_a_path_too_long(place: Path) -> None:
    segue = Segue(place / ("d" * 100))
    mistake(segue("run", "--name", "guest", "--", qemu("10.0")), 2, "too long", "SEGUE_RUN_DIR")
    assert not segue.leftovers()


def test_no_qemu_installed(segue: Segue, place: Path) -> None:
    segue.environment["PATH"] = str(place)
    mistake(segue("run", "--", "qemu-system-x86_64"), 5, "qemu-system-x86_64", "install")
    mistake(segue("demo"), 2, "qemu-system-x86_64", "apt-get install")


def test_no_rights() -> None:
    """Where not even root may make a directory."""
    segue = Segue(Path("/proc/segue"))
    mistake(segue("run", "--name", "guest", "--", qemu("10.0")), 1, "/proc/segue", "SEGUE_RUN_DIR")


def test_not_running(segue: Segue, place: Path) -> None:
    """Its supervisor was killed outright: what is left says so."""
    machine = segue.start("guest", tiny(place, "10.0"))
    pid = machine.qemu_pid
    assert machine.process is not None
    machine.process.kill()
    machine.process.wait()
    said(segue("upgrade", "guest"), 3)
    said(segue("stop", "guest"), 3)
    os.kill(pid, 9)
    wait_until("its end", lambda: not Path(f"/proc/{pid}").exists())
    said(segue("upgrade", "guest"), 3)
    again = segue.start("guest", tiny(place, "10.0"))
    # Not the one that was left.
    wait_until("its console", lambda: segue("ls", "--json").stdout.count('"running"') == 1)
    unharmed(watch(again, place))


def test_outdated(segue: Segue, place: Path) -> None:
    """As a package manager does it: the new file is renamed over the old one."""
    source = place / "qemu"
    shutil.copy(qemu("10.0"), source)
    machine = segue.start("guest", [str(source), *tiny(place, "10.0")[1:]])
    console = watch(machine, place)
    assert machine.status()["outdated"] is False
    new = place / "qemu.new"
    shutil.copy(qemu("11.1"), new)
    new.replace(source)
    listed = segue("ls")
    assert f"{source} has changed" in listed.stdout, listed.stdout
    receipt = machine.handed_over()
    assert receipt["to"]["version"].startswith("11.1")
    assert machine.status()["outdated"] is False
    unharmed(console)


def test_outdated_by_a_library(segue: Segue, place: Path) -> None:
    """One that it maps was replaced, as a package manager does it, and QEMU itself was not."""
    script = Path(qemu("11.1")).read_text()
    (folder,) = set(re.findall(r"--library-path (\S+)", script))
    libraries = place / "lib"
    shutil.copytree(folder, libraries, symlinks=True, copy_function=_link)
    source = place / "qemu"
    source.write_text(script.replace(f"--library-path {folder}", f"--library-path {libraries}"))
    source.chmod(0o755)
    machine = segue.start("guest", [str(source), *tiny(place, "11.1")[1:]])
    console = watch(machine, place)
    maps = Path(f"/proc/{machine.qemu_pid}/maps").read_text()
    (library,) = set(re.findall(rf"{libraries}/libz\.so\S*", maps))

    def outdated() -> bool:
        (listed,) = json.loads(segue("ls", "--json").stdout)
        return bool(listed["outdated"])

    assert not outdated()
    _replace(Path(library), lambda code: code)
    # Who may not read what is mapped cannot know that it is the same.
    assert outdated() == (os.geteuid() != 0)
    _replace(Path(library), _another_build)
    assert outdated()
    assert f"{library}, which it uses, was replaced" in segue("ls").stdout
    assert machine.handed_over()["result"] == "done"
    assert not outdated()
    unharmed(console)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def _replace(path: Path, change: Callable[[bytes], bytes]) -> None:
    new = path.with_name("new")
    new.write_bytes(change(path.read_bytes()))
    new.replace(path)


def _another_build(code: bytes) -> bytes:
    """The same library with another build id: 20 bytes in an ELF note of type 3 named GNU."""
    at = code.index(struct.pack("<III", 4, 20, 3) + b"GNU\0") + 16
    return code[:at] + bytes([code[at] ^ 1]) + code[at + 1 :]


# Between the probe and a QEMU: its greeting is that of an older release.
OLD = """\
#!{python}
import os, socket, sys, threading

def copy(source, target):
    while data := source.recv(65536):
        target.sendall(data.replace(b'"major": 7', b'"major": 6'))
    os._exit(0)

for word in sys.argv:
    if word.startswith("socket,id=probe,fd="):
        fd = int(word.rpartition("=")[2])
        outer = socket.socket(fileno=os.dup(fd))
        ours, theirs = socket.socketpair()
        if os.fork() == 0:
            os.close(fd)
            theirs.close()
            threading.Thread(target=copy, args=(outer, ours), daemon=True).start()
            copy(ours, outer)
        os.dup2(theirs.fileno(), fd)
os.execv("{qemu}", ["{qemu}", *sys.argv[1:]])
"""


def test_a_target_that_is_too_old(segue: Segue, guest: Machine, place: Path) -> None:
    old = place / "qemu-old"
    old.write_text(OLD.format(python=sys.executable, qemu=qemu("7.2")))
    old.chmod(0o755)
    for command in ("check", "upgrade"):
        done = segue(command, "guest", "--to", str(old))
        assert done.returncode == 5, done
        assert "QEMU 6.2" in done.stdout + done.stderr
        assert "it is older than 7.2" in done.stdout + done.stderr
        assert "name a QEMU from 7.2 on" in done.stdout + done.stderr
    guest.handed_over("--to", qemu("11.1"))


def test_a_machine_type_that_the_target_does_not_know(segue: Segue, place: Path) -> None:
    machine = segue.start("guest", tiny(place, "10.0", machine="pc-q35-10.0"))
    console = watch(machine, place)
    pid = machine.qemu_pid
    for command in ("check", "upgrade"):
        done = segue(command, "guest", "--to", qemu("7.2"))
        assert done.returncode == 5, done
        assert "machine type pc-q35-10.0" in done.stdout + done.stderr
        assert "does not know it" in done.stdout + done.stderr
    assert machine.qemu_pid == pid
    unharmed(console)
    machine.handed_over("--to", qemu("11.1"))
    unharmed(console)


def test_descriptors_of_an_instance(segue: Segue, guest: Machine) -> None:
    """What it needs, and what it holds for a supervisor that is killed; the same after upgrades."""

    def kinds() -> dict[str, int]:
        counted: dict[str, int] = {}
        for entry in Path(f"/proc/{guest.qemu_pid}/fd").iterdir():
            kind = os.readlink(entry).split(":")[0]
            counted[kind] = counted.get(kind, 0) + 1
        return counted

    first = kinds()
    for release in ("10.0", "10.0", "10.0"):
        guest.handed_over("--to", qemu(release), "--force")
        wait_until(f"the same descriptors as {first}, not {kinds()}", lambda: kinds() == first, 5)
    supervisor = {
        os.readlink(entry)
        for entry in Path(f"/proc/{guest.process and guest.process.pid}/fd").iterdir()
    }
    instance = {os.readlink(e) for e in Path(f"/proc/{guest.qemu_pid}/fd").iterdir()}
    shared = instance & supervisor
    assert not any("qmp.sock" in name or "status.json" in name for name in shared)
    assert not any("segue.log" in name or "journal" in name for name in instance)
