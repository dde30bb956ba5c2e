"""A machine that lies in a directory: what `segue suspend` writes and `segue resume` reads.

    machine.json    the description, written last: a directory without it holds nothing
    state           the device state, a migration stream
    ram-N           the N-th block of guest RAM, sparse; none where it lies in a file of the user's
    file-N          the N-th kept file (kernel, firmware, ...) as the guest first saw it

Whoever resumes it holds a flock on the directory.

machine.json, format 1: one object; `checksum` is the SHA-256 of all its other members as JSON
with sorted keys. `resuming` is there while a QEMU is made of it: {"pid", "start_time", "may_run"},
the last of them true from just before its guest may run until the directory is removed. Every file
has its size and SHA-256; holes in RAM and zeros count as nothing, `offsets` tell what is data.
Disks are told by path, inode, size and mtime (a device number may change with a reboot): what has
changed since would not fit the guest's memory. Guest RAM that lies in a file of the user's stays
there, told by path, size and mtime: to read it for a checksum would take as long as to copy it.

`hashlib` and `shutil` are imported where they are used: with them come OpenSSL and the libraries
of compressed archives, 4 MiB that every supervisor would hold.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segue.errors import Refused, SegueError
from segue.kept.files import KeptFile
from segue.kept.processes import kill
from segue.kept.ram import GuestRam

FORMAT = 1
_CHUNK = 1 << 20
_ZEROS = bytes(_CHUNK)


def default_directory(name: str) -> Path:
    """Where a machine is suspended to unless the user says: it must outlive a reboot."""
    if os.geteuid() == 0:
        return Path("/var/lib/segue/suspended") / name
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local/state")
    return Path(base) / "segue/suspended" / name


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def disk(path: str) -> dict[str, Any]:
    status = os.stat(path)
    return {
        "path": os.path.abspath(path),
        "inode": status.st_ino,
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
    }


def ram_in_place(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {
        "path": str(path.absolute()),
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
    }


def data_segments(fd: int) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of what is not a hole (lseek(2), SEEK_DATA)."""
    end = 0
    size = os.fstat(fd).st_size
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but a hole from here on
            return
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end - start


def bytes_in(fd: int) -> int:
    return sum(length for _, length in data_segments(fd))


def write_copy(fd: int, path: Path) -> dict[str, Any]:
    """Write the data of `fd` into a new sparse file; its entry for machine.json. Raises OSError."""
    from hashlib import sha256

    digest = sha256()
    offsets: list[list[int]] = []
    with path.open("xb") as target:
        os.ftruncate(target.fileno(), os.fstat(fd).st_size)
        for start, length in data_segments(fd):
            for offset, size in _pieces(start, length):
                data = os.pread(fd, size, offset)
                if data == _ZEROS[:size]:  # hugetlbfs knows of no holes
                    continue
                if offsets and sum(offsets[-1]) == offset:
                    offsets[-1][1] += size
                else:
                    offsets.append([offset, size])
                digest.update(data)
                _write(target.fileno(), data, offset)
        os.fsync(target.fileno())
        return {
            "name": path.name,
            "bytes": os.fstat(fd).st_size,
            "offsets": offsets,
            "sha256": digest.hexdigest(),
        }


def _pieces(start: int, length: int) -> Iterator[tuple[int, int]]:
    for offset in range(start, start + length, _CHUNK):
        yield offset, min(_CHUNK, start + length - offset)


def _write(fd: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def write_description(directory: Path, machine: dict[str, Any]) -> None:
    """Put machine.json there as a whole, durably: from now on the directory can be resumed."""
    machine = machine | {"format": FORMAT, "checksum": _checksum(machine | {"format": FORMAT})}
    new = directory / "machine.json.new"
    with new.open("w") as file:
        json.dump(machine, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    new.replace(directory / "machine.json")
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _checksum(machine: dict[str, Any]) -> str:
    from hashlib import sha256

    rest = {key: value for key, value in machine.items() if key != "checksum"}
    return sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


@dataclass
class Suspended:
    """A directory that can be resumed, and is ours alone while this object is open."""

    directory: Path
    machine: dict[str, Any]
    _lock: int

    @classmethod
    def open(cls, directory: Path) -> Suspended:
        """Raises Refused with the reason if it cannot be resumed; it stays as it was."""
        try:
            lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise Refused(
                f"there is no suspended machine in {directory}: {error.strerror}",
                hint="segue suspend NAME says where it puts one",
            ) from None
        try:
            _take(lock, directory)
            machine = cls._read(directory)
            suspended = cls(directory, machine, lock)
            suspended._check()
            return suspended
        except BaseException:
            os.close(lock)
            raise

    @classmethod
    def left_in(cls, directory: Path) -> Suspended | None:
        """What an interrupted resuming has left, unchecked; None where the guest was resumed.

        Raises Refused if it is damaged, or somebody is resuming it.
        """
        try:
            lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            _take(lock, directory)
            if not (directory / "machine.json").exists():
                os.close(lock)
                return None
            return cls(directory, cls._read(directory), lock)
        except Refused:
            os.close(lock)
            raise

    @staticmethod
    def _read(directory: Path) -> dict[str, Any]:
        try:
            machine: dict[str, Any] = json.loads((directory / "machine.json").read_bytes())
        except FileNotFoundError:
            raise Refused(
                f"{directory} holds no suspended machine",
                hint="the suspending did not come to its end, and the guest went on; or it was "
                "resumed already",
            ) from None
        except (OSError, ValueError) as error:
            raise _damaged(directory / "machine.json", str(error)) from None
        if machine.get("format") != FORMAT:
            raise Refused(
                f"{directory / 'machine.json'} is of another format than this Segue reads",
                hint="resume it with the version of Segue that wrote it",
            )
        if machine.get("checksum") != _checksum(machine):
            raise _damaged(directory / "machine.json", "its checksum is wrong")
        return machine

    def _check(self) -> None:
        from segue.machines import is_alive

        # Process numbers mean nothing after the host has booted again.
        same_boot = self.machine["boot_id"] == boot_id()
        if same_boot and is_alive(self.machine["qemu_pid"], self.machine["qemu_start_time"]):
            raise Refused(
                f"the QEMU that was suspended (pid {self.machine['qemu_pid']}) still lives",
                hint=f"it is paused for good; end it with: kill -9 {self.machine['qemu_pid']}",
            )
        if same_boot:
            self._end_what_was_begun()
        if self._ran_unseen:
            raise Refused(
                "a QEMU that is dead may have run this guest, in memory or on a disk that is "
                f"not in {self.directory}",
                hint="what it has written there fits the suspended state no more: start it anew",
            )
        for known in self.machine["disks"]:
            self._check_disk(known)
        for entry in (self.machine["state"], *self.machine["ram"], *self.machine["files"]):
            if "name" in entry:
                self._check_file(entry)
            else:
                self._check_ram(entry)

    def _end_what_was_begun(self) -> None:
        """A resuming whose supervisor died has left a QEMU: the guest must not have two."""
        process = self.process
        if process is None:
            return
        if self.may_run:
            name = self.machine["name"]
            raise Refused(
                f"it was resumed: the guest belongs to QEMU (pid {process['pid']})",
                hint=f"segue ls; where that machine is orphaned: segue recover {name}",
            )
        # Nobody is left who could tell it to run: that would have had our lock.
        kill(process["pid"])

    @property
    def process(self) -> dict[str, int] | None:
        """The QEMU that was made of it last, where that lives."""
        from segue.machines import is_alive

        resuming = self.machine.get("resuming", {})
        return resuming if is_alive(resuming.get("pid"), resuming.get("start_time")) else None

    def process_is(self, other: Mapping[str, Any]) -> bool:
        process = self.process
        return process is not None and all(process[key] == other[key] for key in other)

    @property
    def may_run(self) -> bool:
        """Whether that QEMU may have been told to let the guest run."""
        return bool(self.machine.get("resuming", {}).get("may_run", True))

    @property
    def _ran_unseen(self) -> bool:
        """Whether it may have run where nothing tells what has been written since.

        That is on a block device, and in a file on hugetlbfs, whose times a mapping leaves alone.
        """
        if not self.machine.get("resuming", {}).get("may_run", False):
            return False
        return any("name" not in entry for entry in self.machine["ram"]) or any(
            Path(known["path"]).is_block_device() for known in self.machine["disks"]
        )

    def _check_disk(self, known: dict[str, Any]) -> None:
        try:
            now = disk(known["path"])
        except OSError as error:
            raise Refused(
                f"disk {known['path']}: {error.strerror}", hint="put it back where it was"
            ) from None
        changed = [key for key, value in known.items() if now[key] != value]
        if changed:
            raise Refused(
                f"disk {known['path']} is not what it was ({', '.join(changed)})",
                hint="the guest's memory would not fit it, and its file system would be destroyed",
            )

    def _check_ram(self, known: dict[str, Any]) -> None:
        try:
            now = ram_in_place(Path(known["path"]))
        except OSError as error:
            raise Refused(
                f"guest RAM at {known['path']}: {error.strerror}",
                hint="it was left there; without it the guest cannot be resumed",
            ) from None
        changed = [key for key, value in known.items() if now[key] != value]
        if changed:
            raise Refused(
                f"guest RAM at {known['path']} is not what it was ({', '.join(changed)})",
                hint="somebody has written to it since: the guest cannot be resumed",
            )

    def _check_file(self, entry: dict[str, Any]) -> None:
        from hashlib import sha256

        path = self.directory / entry["name"]
        try:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size != entry["bytes"]:
                    raise _damaged(path, "it is truncated or longer than it was")
                digest = sha256()
                for start, length in entry["offsets"]:
                    for offset, size in _pieces(start, length):
                        digest.update(os.pread(file.fileno(), size, offset))
        except OSError as error:
            raise _damaged(path, str(error)) from None
        if digest.hexdigest() != entry["sha256"]:
            raise _damaged(path, "its checksum is wrong")

    @property
    def argv(self) -> list[str]:
        return list(self.machine["command"])

    @property
    def state(self) -> Path:
        name: str = self.machine["state"]["name"]
        return self.directory / name

    def point_at_files(self, files: list[KeptFile]) -> None:
        """Have kept files read what the guest first saw, and not what lies there now."""
        for file, entry in zip(files, self.machine["files"], strict=True):
            file.source = self.directory / entry["name"]

    def fill(self, blocks: list[GuestRam]) -> None:
        """Put the guest's memory into its place. Raises OSError."""
        for block, entry in zip(blocks, self.machine["ram"], strict=True):
            if "name" not in entry:
                continue
            with (
                (self.directory / entry["name"]).open("rb") as source,
                # Huge pages cannot be written by write(2).
                mmap.mmap(block.fd, block.size) as memory,
            ):
                for start, length in entry["offsets"]:
                    for offset, size in _pieces(start, length):
                        # Where there is no room: an error here, and not SIGBUS below.
                        os.posix_fallocate(block.fd, offset, size)
                        memory[offset : offset + size] = os.pread(source.fileno(), size, offset)

    def resuming(self, pid: int, start_time: int, *, may_run: bool) -> None:
        """Said when there is a QEMU, and again just before its guest may run."""
        self.machine["resuming"] = {"pid": pid, "start_time": start_time, "may_run": may_run}
        write_description(self.directory, self.machine)

    def not_resumed(self) -> None:
        """The directory is as it was, unless it must not be resumed any more."""
        if not self._ran_unseen and self.machine.pop("resuming", None) is not None:
            write_description(self.directory, self.machine)

    def resumed(self) -> None:
        """The guest runs: this must never be resumed again."""
        from shutil import rmtree

        self.machine.pop("resuming", None)
        (self.directory / "machine.json").unlink(missing_ok=True)
        rmtree(self.directory, ignore_errors=True)

    def close(self) -> None:
        os.close(self._lock)


def _take(lock: int, directory: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Refused(f"{directory} is being resumed by somebody else", hint="segue ls") from None


def _damaged(path: Path, why: str) -> Refused:
    return Refused(f"{path} is damaged: {why}", hint="the guest cannot be resumed from it")


def discard(directory: Path) -> None:
    """Remove what `suspend` has put there, the description first; nothing else is touched."""
    (directory / "machine.json").unlink(missing_ok=True)
    for pattern in ("machine.json.new", "state", "ram-*", "file-*"):
        for path in directory.glob(pattern):
            path.unlink()
    with contextlib.suppress(OSError):
        directory.rmdir()


def make_directory(path: Path) -> None:
    """An empty directory for a machine.

    Raises Refused if there is something already, SegueError if it cannot be made.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise Refused(f"{path} is not empty", hint="name another --to DIR, or resume it first")
    except OSError as error:
        raise SegueError(
            f"cannot make {path}: {error.strerror}", hint="name another --to DIR"
        ) from None
