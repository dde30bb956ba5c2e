"""Probing what is no QEMU: each ends in one clear refusal, with no process left."""

from __future__ import annotations

import asyncio
import os
import struct
import sys
import time
from pathlib import Path

import pytest

from segue.errors import Refused
from segue.qemu.binary import Binary, MachineType, find, missing_devices, probe

GREETING = '{"QMP": {"version": {"qemu": {"major": 9, "minor": 1, "micro": 0}, "package": ""}, %s}}'


def script(folder: Path, text: str, shell: str = "/bin/sh") -> Path:
    path = folder / "qemu"
    path.write_text(f"#!{shell}\n{text}\n")
    path.chmod(0o755)
    return path


def refusal(path: Path, cache: Path, limit: float = 30) -> Refused:
    with pytest.raises(Refused) as caught:
        asyncio.run(probe(path, limit=limit, cache_dir=cache))
    assert not cache.exists()
    return caught.value


def impostor(folder: Path, *replies: str) -> Path:
    """Speaks as a QMP server does, whatever it is asked."""
    code = f"""
import socket, sys, re
fd = int(re.search(r"fd=(\\d+)", " ".join(sys.argv))[1])
end = socket.socket(fileno=fd)
for reply in {replies!r}:
    end.sendall(reply.encode() + b"\\n")
    if not end.recv(65536):
        break
"""
    return script(folder, code, sys.executable)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("echo 'error while loading libfdt.so.1' >&2; echo more >&2; exit 127", "libfdt.so.1"),
        ("exit 0", "it ended without a word"),
        ("echo garbage; echo garbage >&3; exit 1", "is no usable QEMU"),
        ("kill -SEGV $$", "it ended without a word"),
    ],
)
def test_what_ends_by_itself(tmp_path: Path, text: str, words: str) -> None:
    error = refusal(script(tmp_path, text), tmp_path / "cache")
    assert words in error.what
    assert str(tmp_path / "qemu") in error.what
    assert "more" not in error.what
    assert error.hint


def test_what_hangs_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    path = script(tmp_path, f"echo waiting >&2\nsleep 1000 &\necho $! $$ >{tmp_path}/pids\nwait")
    error = refusal(path, tmp_path / "cache", limit=1)
    assert "did not answer within 1 s: waiting" in error.what
    # The last of them is not our child: nobody tells when its kill has come through.
    end = time.monotonic() + 10
    for pid in (tmp_path / "pids").read_text().split():
        while running(int(pid)):
            assert time.monotonic() < end, f"{pid} lives on"


def running(pid: int) -> bool:
    """A zombie of which init is to be told is as good as gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_what_is_cancelled_leaves_nothing(tmp_path: Path) -> None:
    pipe = tmp_path / "started"
    os.mkfifo(pipe)
    path = script(tmp_path, f"echo $$ >{pipe}\nexec sleep 1000")

    async def cancelled() -> int:
        task = asyncio.create_task(probe(path, cache_dir=tmp_path))
        pid = await asyncio.to_thread(pipe.read_text)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return int(pid)

    assert not running(asyncio.run(cancelled()))


@pytest.mark.parametrize(
    "replies",
    [
        ("garbage",),
        ('{"QMP": null}',),
        ('{"QMP": {"version": {}, "capabilities": []}}', '{"return": {}, "id": 1}'),
        (GREETING % '"capabilities": []', '{"error": {"class": "X", "desc": "no"}, "id": 1}'),
        (
            GREETING % '"capabilities": []',
            '{"return": {}, "id": 1}',
            '{"error": {"class": "CommandNotFound", "desc": "query-target?"}, "id": 2}',
        ),
        (GREETING % '"capabilities": []', '{"return": {}, "id": 1}', '{"return": [], "id": 2}'),
    ],
)
def test_what_does_not_speak_as_qemu(tmp_path: Path, replies: tuple[str, ...]) -> None:
    error = refusal(impostor(tmp_path, *replies), tmp_path / "cache")
    assert "is no usable QEMU" in error.what


def test_what_speaks_as_qemu_and_is_none(tmp_path: Path) -> None:
    path = impostor(
        tmp_path,
        GREETING % '"capabilities": []',
        '{"return": {}, "id": 1}',
        '{"return": {"arch": "x86_64"}, "id": 2}',
    )
    error = refusal(path, tmp_path / "cache")
    assert "does not become QEMU" in error.what
    assert error.hint is not None
    assert "exec" in error.hint


def test_another_architectures_program(tmp_path: Path) -> None:
    path = tmp_path / "qemu"
    # EM_S390, and nothing behind the header: no Linux that runs these tests executes it.
    path.write_bytes(b"\x7fELF\x02\x02\x01" + bytes(9) + struct.pack(">HHI", 2, 22, 1) + bytes(40))
    path.chmod(0o755)
    assert str(path) in refusal(path, tmp_path / "cache").what


def test_a_script_without_its_interpreter(tmp_path: Path) -> None:
    error = refusal(script(tmp_path, "", "/nonexistent/sh"), tmp_path / "cache")
    assert "No such file or directory" in error.what


def test_paths_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "qemu"
    file.write_text("")
    file.chmod(0o644)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, words in (
        (tmp_path / "missing", "does not exist"),
        (tmp_path, "is not a file"),
        (file, "is not executable"),
        ("qemu", "there is no qemu in PATH"),
    ):
        with pytest.raises(Refused, match=words) as caught:
            asyncio.run(probe(name))
        assert caught.value.hint


def test_names_are_found_as_a_shell_finds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    (first / "qemu").mkdir(parents=True)
    second.mkdir()
    real = script(second, "exit 0")
    link = second / "current"
    link.symlink_to(real)
    monkeypatch.setenv("PATH", f"{first}:{second}")
    monkeypatch.chdir(tmp_path)
    assert find("qemu") == real
    assert find("current") == link
    assert find("second/current") == link
    assert find("./second/../second/qemu") == real


def test_asking_for_devices_of_no_qemu(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="is no usable QEMU: broken"):
        asyncio.run(missing_devices(script(tmp_path, "echo broken >&2; exit 1"), ["e1000"]))


def test_machine_types_by_name_and_alias() -> None:
    def machine(name: str, alias: str | None = None, default: bool = False) -> MachineType:
        return MachineType(name, alias, default, False, "pc.ram", None, 255, True, True)

    types = [machine("pc-q35-7.2"), machine("pc-q35-10.0", "q35"), machine("a", "pc", True)]
    empty: frozenset[str] = frozenset()
    binary = Binary(
        *(Path("/bin/qemu"), (10, 0, 2), "10.0.2", "x86_64", "abc", {m.name: m for m in types}),
        *(frozenset(["x-ignore-shared"]), frozenset(["display-update"]), empty, empty, False),
    )
    assert binary.machine("q35") is types[1]
    assert binary.machine("pc-q35-7.2") is types[0]
    assert binary.machine(None) is binary.default_machine() is types[2]
    assert binary.machine("virt") is None
    assert binary.has_ignore_shared
    assert binary.has_display_update
    assert not binary.has_late_block_activate
    assert not binary.has_pause_before_switchover
