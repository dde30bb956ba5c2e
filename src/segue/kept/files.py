"""Files that may vanish or change while the machine runs: kernels, initrds, firmware, tables.

The successor must build the same machine, so it is given the bytes that the first instance saw:
a sealed memfd. (Only holding the file open would do where a package is upgraded by rename, but
not where somebody copies a new kernel over the old one.)
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from segue.errors import SegueError
from segue.kept.base import Kept, Lending
from segue.kept.draft import Draft
from segue.qemu.commandline import Option
from segue.saved import Loader, Saver

# Options whose whole value is a path, and those that name one under a key.
_WHOLE = ("kernel", "initrd", "dtb", "shim", "bios", "option-rom")
_KEYED = {"acpitable": ("file", "data"), "smbios": ("file",), "fw_cfg": ("file",)}


class KeptFile(Kept):
    """The bytes of a file at the start of the machine, and the option that names them."""

    kind = "file"

    def __init__(self, path: Path, words: Callable[[str], list[str]]) -> None:
        self.name = str(path)
        self.source = path
        self.fd = -1
        self._words = words

    async def start(self) -> None:
        try:
            self.fd = sealed_copy(self.source)
        except OSError as error:
            raise SegueError(f"cannot read '{self.name}': {error.strerror}") from None

    def save(self, saver: Saver) -> dict[str, Any]:
        saver.fd("bytes", self.fd, lent=True)
        return {}

    async def load(self, data: dict[str, Any], loader: Loader) -> None:
        self.fd = loader.needed("bytes")

    def arguments(self, lending: Lending) -> list[str]:
        return self._words(f"/proc/self/fd/{lending.inherit(self.fd)}")

    def identity(self) -> dict[str, Any]:
        status = os.fstat(self.fd)
        return {"device": status.st_dev, "inode": status.st_ino, "bytes": status.st_size}

    def held_by(self, pid: int) -> bool:
        ours = os.fstat(self.fd)
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                theirs = os.stat(f"/proc/{pid}/fd/{name}")
                if (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino):
                    return True
        return False

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def sealed_copy(path: Path) -> int:
    """A sealed memfd with the bytes of `path`. Raises OSError."""
    with path.open("rb") as source:
        fd = os.memfd_create(path.name[:200], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            while os.sendfile(fd, source.fileno(), None, 1 << 30):
                pass
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals | fcntl.F_SEAL_SEAL)
        except BaseException:
            os.close(fd)
            raise
    return fd


class FilesRule:
    """A path that is not a readable file is left to QEMU: it looks in its own directories too."""

    def apply(self, draft: Draft) -> None:
        for option in draft.options(*_WHOLE):
            self._keep(draft, option, option.value, lambda o, path: o.with_value(path))
        for name, keys in _KEYED.items():
            for option in draft.options(name):
                for key in keys:
                    self._keep_key(draft, option, key)
        for option in draft.options("device"):
            if option.params.get("driver") == "loader":
                self._keep_key(draft, option, "file")
        for option in draft.options("drive"):
            params = option.params
            if params.get("if") == "pflash" and (
                params.boolean("readonly", False) or params.boolean("read-only", False)
            ):
                self._keep_key(draft, option, "file")

    def _keep_key(self, draft: Draft, option: Option, key: str) -> None:
        path = option.params.get(key)
        self._keep(draft, option, path, lambda o, new: o.with_params(o.params.set(key, new)))

    def _keep(
        self,
        draft: Draft,
        option: Option,
        path: str | None,
        rewritten: Callable[[Option, str], Option],
    ) -> None:
        if path is None:
            return

        def readable() -> bool:
            return os.path.isfile(path) and os.access(path, os.R_OK)

        if not draft.decide(f"file {path}", readable, otherwise=False):
            return
        kept = KeptFile(Path(path), lambda new: rewritten(option, new).argv())
        draft.kept.append(kept)
        draft.replace(option, kept)
