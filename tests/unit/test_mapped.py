"""Whether a process still runs what its path holds; `cat` in QEMU's place."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from segue.qemu import elf, mapped

CAT = Path(os.path.realpath(shutil.which("cat") or "/bin/cat"))
OTHER = Path(os.path.realpath(shutil.which("sleep") or "/bin/sleep"))
Start = Callable[..., int]


def _interpreter() -> str:
    with open("/proc/self/maps") as maps:
        return next(line.split()[-1] for line in maps if "/ld-linux" in line or "/ld64" in line)


def _library() -> Path:
    with open("/proc/self/maps") as maps:
        return Path(next(line.split()[-1] for line in maps if "/libc.so" in line))


@pytest.fixture
def start() -> Iterator[Start]:
    processes: list[subprocess.Popen[bytes]] = []

    def run(path: Path, **environment: str) -> int:
        """Start a program that becomes `cat`, and return once it answers as one."""
        pipe = subprocess.PIPE
        process = subprocess.Popen([path], env=os.environ | environment, stdin=pipe, stdout=pipe)
        processes.append(process)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"ready\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"ready\n"
        return process.pid

    yield run
    for process in processes:
        with process:
            process.kill()


@pytest.fixture
def program(tmp_path: Path) -> Path:
    return Path(shutil.copy(CAT, tmp_path / "cat"))


def remembered(path: Path, pid: int) -> mapped.Started:
    started = mapped.remember(path, pid)
    assert started is not None
    # As the record is kept in the run directory.
    return mapped.Started.from_json(started.to_json())


def install(source: Path, target: Path) -> None:
    """As a package manager does: a new file under the old name."""
    scratch = target.with_name("new")
    shutil.copy(source, scratch)
    scratch.replace(target)


def test_nothing_changed(program: Path, start: Start) -> None:
    pid = start(program)
    started = remembered(program, pid)
    assert started.path == str(program)
    assert started.inode == program.stat().st_ino
    assert started.build_id == elf.build_id(CAT)
    os.utime(program, (1, 1))
    assert mapped.outdated(pid, program, started) is None


def test_another_binary(program: Path, start: Start) -> None:
    pid = start(program)
    started = remembered(program, pid)
    install(OTHER, program)
    assert mapped.outdated(pid, program, started) == f"{program} holds another binary now"
    assert mapped.outdated(pid, program, None) == f"{program} holds another binary now"
    main = mapped.main_object(pid)
    assert main is not None
    assert (main.path, main.build_id) == (str(program), elf.build_id(CAT))


def test_the_same_build_once_more(program: Path, start: Start) -> None:
    pid = start(program)
    started = remembered(program, pid)
    install(CAT, program)
    assert program.stat().st_ino != started.inode
    assert mapped.outdated(pid, program, started) is None


def test_gone(program: Path, start: Start) -> None:
    pid = start(program)
    started = remembered(program, pid)
    program.unlink()
    assert mapped.outdated(pid, program, started) == f"{program} is gone"


def test_a_symbolic_link_that_is_switched(program: Path, start: Start) -> None:
    link = program.with_name("current")
    link.symlink_to(program)
    pid = start(link)
    started = remembered(link, pid)
    assert mapped.outdated(pid, link, started) is None
    link.unlink()
    link.symlink_to(OTHER)
    assert mapped.outdated(pid, link, started) == f"{link} holds another binary now"


def wrapper(program: Path, before: str = "") -> Path:
    path = program.with_name("wrapper")
    path.write_text(f'#!/bin/sh\n{before}exec {program} "$@"\n')
    path.chmod(0o755)
    return path


def test_a_script_that_executes_it(program: Path, start: Start) -> None:
    script = wrapper(program)
    pid = start(script)
    started = remembered(script, pid)
    assert started.path == str(program)
    assert mapped.outdated(pid, script, started) is None
    wrapper(program)
    assert mapped.outdated(pid, script, started) is None
    wrapper(program, "QEMU_MODULE_DIR=/new ")
    assert mapped.outdated(pid, script, started) == f"{script} has changed"
    script.unlink()
    assert mapped.outdated(pid, script, started) == f"{script} is gone"


def test_what_a_script_executes_is_replaced(program: Path, start: Start) -> None:
    script = wrapper(program)
    pid = start(script)
    started = remembered(script, pid)
    install(OTHER, program)
    assert mapped.outdated(pid, script, started) == f"{program} holds another binary now"


def test_behind_a_dynamic_loader_given_by_name(program: Path, start: Start) -> None:
    script = program.with_name("wrapper")
    script.write_text(f'#!/bin/sh\nexec {_interpreter()} {program} "$@"\n')
    script.chmod(0o755)
    pid = start(script)
    started = remembered(script, pid)
    assert (started.path, started.build_id) == (str(program), elf.build_id(CAT))
    assert mapped.outdated(pid, script, started) is None
    install(OTHER, program)
    assert mapped.outdated(pid, script, started) == f"{program} holds another binary now"


def test_a_replaced_library(program: Path, start: Start) -> None:
    library = Path(shutil.copy(_library(), program.with_name(_library().name)))
    pid = start(program, LD_LIBRARY_PATH=str(program.parent))
    started = remembered(program, pid)
    assert mapped.outdated(pid, program, started) is None
    library.unlink()
    assert mapped.outdated(pid, program, started) == f"{library}, which it uses, was replaced"


def test_nothing_to_be_read(program: Path, start: Start) -> None:
    pid = start(program)
    started = remembered(program, pid)
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert mapped.main_object(gone.pid) is None
    assert mapped.remember(program, gone.pid) is None
    assert mapped.outdated(gone.pid, program, started) is None
    assert mapped.outdated(gone.pid, program, None) is None
