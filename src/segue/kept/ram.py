"""Guest RAM: memory of the supervisor's, which every instance maps shared.

An instance opens it as `memory-backend-file,mem-path=/proc/self/fd/N,share=on`. The object's id
is the machine's own `default-ram-id` (query-machines), so that the RAM block bears the name that
plain `-m` gives it: a guest that was started without Segue can be migrated in.
"""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path
from typing import Any

from segue.errors import SegueError
from segue.kept.base import Kept, Lending
from segue.kept.draft import Computed, Draft, Words
from segue.qemu.commandline import Option
from segue.qemu.options import Params, format_size, parse_size
from segue.saved import Loader, Saver

# /usr/include/linux/memfd.h: log2 of the page size, shifted.
_MFD_HUGETLB = 0x4
_MFD_HUGE_SHIFT = 26

# Properties that say where the memory comes from; ours replace them.
ORIGIN = ("size", "share", "mem-path", "hugetlb", "hugetlbsize", "seal", "prealloc", "shm-id")

# QEMU's own default (MachineClass.default_ram_size), where `-m` does not say.
DEFAULT_SIZE = 128 << 20

AUX_RAM_SHARE = (10, 0, 0)


class GuestRam(Kept):
    """One block of guest RAM. `origin` is None for a memfd, or a hugetlbfs or other path."""

    kind = "ram"

    def __init__(
        self,
        params: Params,
        size: int,
        *,
        huge_page: int | None = None,
        origin: Path | None = None,
    ) -> None:
        self.name = params.get("id") or "ram"
        self.size = size
        self.fd = -1
        self._prealloc = params.boolean("prealloc", False)
        self._rest = params.without(*ORIGIN)
        self._huge_page = huge_page
        self._origin = origin
        self._copies: dict[int, int] = {}

    async def start(self) -> None:
        """Make the memory. Raises SegueError, with QEMU's reason, if there is not enough."""
        self.fd = self._make()

    def save(self, saver: Saver) -> dict[str, Any]:
        saver.fd("memory", self.fd, lent=True)
        for number, fd in self._copies.items():
            saver.fd(f"copy{number}", fd, lent=True)
        return {"copies": list(self._copies)}

    async def load(self, data: dict[str, Any], loader: Loader) -> None:
        self.fd = loader.needed("memory")
        for number in data["copies"]:
            if (fd := loader.fd(f"copy{number}")) is not None:
                self._copies[number] = fd

    def _make(self) -> int:
        try:
            fd = self._open()
            if self._origin is None or not self._origin.is_file():
                os.ftruncate(fd, self.size)
            return fd
        except OSError as error:
            raise SegueError(
                f"guest RAM '{self.name}' ({format_size(self.size)}): {error.strerror}",
                hint="are there enough huge pages? see /proc/meminfo" if self._huge_page else None,
            ) from None

    def _open(self) -> int:
        if self._origin is None:
            flags = os.MFD_CLOEXEC
            if self._huge_page:
                flags |= _MFD_HUGETLB | (self._huge_page.bit_length() - 1) << _MFD_HUGE_SHIFT
            return os.memfd_create(f"segue-{self.name}", flags)
        if not self._origin.is_dir():
            return os.open(self._origin, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        # As QEMU does with a directory: a file that nobody else can find.
        from tempfile import mkstemp  # large, and rarely needed

        fd, path = mkstemp(prefix="segue-ram-", dir=self._origin)
        os.unlink(path)
        return fd

    def arguments(self, lending: Lending) -> list[str]:
        fd = self.fd
        if lending.copies_ram:
            fd = self._copies[lending.number] = self._make()
        number = lending.inherit(fd)
        params = (
            self._rest.set("qom-type", "memory-backend-file")
            .set("size", str(self.size))
            .set("mem-path", f"/proc/self/fd/{number}")
            .set("share", "on")
        )
        if self._prealloc and lending.first:
            # Not for later ones: it writes each page's first byte back while the guest runs.
            params = params.set("prealloc", "on")
        return ["-object", str(params)]

    def switch(self, number: int) -> None:
        if number in self._copies:
            self._copies[number], self.fd = self.fd, self._copies[number]

    def drop(self, number: int) -> None:
        # After a switch these are what the last instance had, else what the successor was given.
        for fd in self._copies.values():
            # In a thread: freeing a gigabyte takes a quarter of a second, and meanwhile nobody
            # would read what the guest says.
            threading.Thread(target=os.close, args=(fd,)).start()
        self._copies.clear()

    @property
    def place(self) -> Path | None:
        """The file of the user's in which this memory lies, and stays when the machine is gone."""
        return self._origin if self._origin is not None and self._origin.is_file() else None

    def identity(self) -> dict[str, Any]:
        status = os.fstat(self.fd)
        return {"device": status.st_dev, "inode": status.st_ino, "bytes": self.size}

    def held_by(self, pid: int) -> bool:
        """Whether the process maps this very file, by device and inode (proc_pid_maps(5))."""
        status = os.fstat(self.fd)
        device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
        wanted = re.compile(rf"^\S+ rw-s \S+ {device} {status.st_ino}\b", re.MULTILINE)
        return bool(wanted.search(Path(f"/proc/{pid}/maps").read_text()))

    def close(self) -> None:
        self.drop(0)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class RamRule:
    """`-m`, `-mem-path`, `-mem-prealloc`, `-object memory-backend-*`, and the machine's default."""

    def apply(self, draft: Draft) -> None:
        for option in draft.options("object"):
            if (option.params.get("qom-type") or "").startswith("memory-backend-"):
                self.backend(draft, option)
        machine = draft.command_line.machine()
        if machine.get("aux-ram-share") is None:
            draft.add(Computed(_share_the_rest))
        if machine.get("memory-backend") or self._numa_memdev(draft):
            return
        self._default(draft, machine)

    def _numa_memdev(self, draft: Draft) -> bool:
        return any(option.params.get("memdev") for option in draft.options("numa"))

    def _default(self, draft: Draft, machine: Params) -> None:
        """What QEMU would allocate by itself, from `-m`, `-mem-path` and `-mem-prealloc`."""
        machine_type = draft.binary.machine(machine.get("type"))
        if machine_type is None:
            return
        if machine_type.default_ram_id is None:
            draft.block(
                f"machine type {machine_type.name}",
                "its RAM cannot be given by a memory backend",
                "use a machine type that has a default-ram-id in query-machines",
            )
            return
        size_text = draft.command_line.memory().get("size")
        size = parse_size(size_text) if size_text else DEFAULT_SIZE
        params = Params.parse(f"memory-backend-file,id={machine_type.default_ram_id}", "qom-type")
        params = params.set("x-use-canonical-path-for-ramblock-id", "off")
        path = next((o.value for o in reversed(draft.take("mem-path"))), None)
        if draft.take("mem-prealloc"):
            params = params.set("prealloc", "on")
        ram = GuestRam(params, size, **self._from_path(path))
        draft.kept.append(ram)
        draft.add(ram, Words(("-machine", f"memory-backend={machine_type.default_ram_id}")))

    def _from_path(self, path: str | None) -> dict[str, Any]:
        return {} if path is None else {"origin": Path(path)}

    def backend(self, draft: Draft, option: Option) -> None:
        """Put our own memory in the place of one `-object memory-backend-*`."""
        params = option.params
        kind = params.get("qom-type")
        path = params.get("mem-path")
        name = f"-object {kind},id={params.get('id')}"
        origin: dict[str, Any] = {}
        if kind == "memory-backend-epc":
            draft.block(name, "SGX enclave memory cannot be shared", "start without SGX")
            return
        if kind == "memory-backend-file" and path is not None:
            if params.boolean("readonly", False):
                return
            origin = self._from_path(path)
            if not Path(path).is_dir() and not params.boolean("share", False):
                draft.block(
                    name,
                    f"it is a private copy of {path} in each process",
                    "add share=on, if the guest may write to the file",
                )
                return
        elif kind == "memory-backend-memfd" and params.boolean("hugetlb", False):
            size_text = params.get("hugetlbsize")
            origin["huge_page"] = parse_size(size_text) if size_text else default_huge_page()
        size_text = params.get("size")
        if size_text is None:
            return
        ram = GuestRam(params, parse_size(size_text, "B"), **origin)
        draft.kept.append(ram)
        draft.replace(option, ram)


def _share_the_rest(lending: Lending) -> list[str]:
    """QEMU's own CPR needs video and firmware memory to be shared too, from the start."""
    return ["-machine", "aux-ram-share=on"] if lending.target.version >= AUX_RAM_SHARE else []


def default_huge_page() -> int:
    """Bytes of a default huge page, from /proc/meminfo (proc_meminfo(5))."""
    found = re.search(r"^Hugepagesize:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found.group(1)) << 10 if found else 2 << 20


def total_bytes(kept: list[Kept]) -> int:
    return sum(k.size for k in kept if isinstance(k, GuestRam))
