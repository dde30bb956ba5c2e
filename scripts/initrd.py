"""Initial RAM disks for the tests' Linux guests, made without root."""

from __future__ import annotations

import lzma
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

# Found beside this script: Python puts a script's own folder first in its path.
from debian import Failed, run


@dataclass
class Newc:
    """A cpio archive of the kind that the kernel unpacks (`newc`).

    It is not compressed: QEMU copies it into the guest at once, while a guest under TCG would
    take longer to decompress it than for anything else that it does at boot.
    """

    content: bytearray = field(default_factory=bytearray)
    inode: int = 0

    def add(
        self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)
    ) -> None:
        self.inode += 1
        path = name.encode() + b"\0"
        fields = (self.inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0)
        self.content += b"070701" + b"".join(b"%08X" % number for number in fields) + path
        self._align(4)
        self.content += data
        self._align(4)

    def folder(self, name: str) -> None:
        self.add(name, 0o040755)

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        self.add(name, 0o100000 | mode, data)

    def link(self, name: str, target: str) -> None:
        self.add(name, 0o120777, target.encode())

    def console(self) -> None:
        """The kernel opens it before /init can mount anything."""
        self.folder("dev")
        self.add("dev/console", 0o020600, device=(5, 1))

    def busybox(self, program: Path) -> None:
        """`program` and a link for each of its applets."""
        self.folder("bin")
        self.file("bin/busybox", program.read_bytes(), 0o755)
        for applet in run(program, "--list").split():
            if applet != "busybox":
                self.link(f"bin/{applet}", "busybox")

    def modules(self, wanted: Iterable[str], root: Path) -> None:
        """`wanted` of the kernel unpacked at `root`, to be loaded as modules/order says."""
        self.folder("modules")
        modules = in_order(wanted, root)
        for name, content in modules.items():
            self.file(f"modules/{name}.ko", content)
        self.file("modules/order", "".join(f"{name}.ko\n" for name in modules).encode())

    def finished(self) -> bytes:
        self.add("TRAILER!!!", 0)
        self._align(512)
        return bytes(self.content)

    def _align(self, to: int) -> None:
        self.content += bytes(-len(self.content) % to)


def in_order(wanted: Iterable[str], root: Path) -> dict[str, bytes]:
    """The modules and all they depend on, dependencies first; each file names its own."""
    files = {_name(path.name): path for path in root.rglob("*.ko*")}
    built_in = {
        _name(Path(line).name)
        for listing in root.rglob("modules.builtin")
        for line in listing.read_text().splitlines()
    }
    done: dict[str, bytes] = {}

    def visit(name: str) -> None:
        name = _name(name)
        if name in done or name in built_in:
            return
        if name not in files:
            raise Failed(f"this kernel has no module {name}")
        content = files[name].read_bytes()
        if files[name].suffix == ".xz":
            content = lzma.decompress(content)
        match = re.search(rb"\0depends=([^\0]*)\0", content)
        for dependency in match[1].decode().split(",") if match else ():
            if dependency:
                visit(dependency)
        done[name] = content

    for name in wanted:
        visit(name)
    return done


def _name(file: str) -> str:
    """The same module goes by either spelling."""
    return file.partition(".")[0].replace("-", "_")
