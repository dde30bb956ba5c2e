"""The `segue` command as a user without rights.

Such a user need not be able to reach this checkout or the releases (/root is closed): so there is
a mount namespace in which what bars the way is covered by a folder with nothing in it but them.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.qemu.harness import Segue, cache

USER, STRANGER = 64321, 64322
"""Two numbers that belong to nobody."""

_NEEDED = (Path(__file__).parents[2], Path(sys.prefix), Path(sys.base_prefix), cache())


class Users:
    """The mount namespace; root makes it."""

    def __init__(self) -> None:
        self._keeper = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", "echo; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._keeper.stdout is not None
        self._keeper.stdout.readline()
        try:
            self._open_up()
        except BaseException:
            self.close()
            raise

    def _open_up(self) -> None:
        barred = {path: bar for path in _NEEDED if (bar := _bar(path))}
        with tempfile.TemporaryDirectory() as stage:
            for number, path in enumerate(barred):
                folder = Path(stage, str(number))
                folder.mkdir()
                self._inside("mount", "--bind", path, folder)
            for bar in set(barred.values()):
                self._inside("mount", "-t", "tmpfs", "-o", "mode=0755", "tmpfs", bar)
            for number, path in enumerate(barred):
                self._inside("mkdir", "-p", path)
                self._inside("mount", "--move", Path(stage, str(number)), path)

    def close(self) -> None:
        self._keeper.communicate()

    @property
    def _enter(self) -> list[str]:
        return ["nsenter", f"--mount=/proc/{self._keeper.pid}/ns/mnt"]

    def _inside(self, *command: str | Path) -> None:
        subprocess.run([*self._enter, *command], check=True)

    def may_open(self, device: str) -> None:
        """As on most hosts: everybody may open it, which gives no right to make anything."""
        status = os.stat(device)
        node = Path(tempfile.mkdtemp()) / "node"
        os.mknod(node, stat.S_IFCHR | 0o666, status.st_rdev)
        node.chmod(0o666)
        self._inside("mount", "--bind", node, device)
        shutil.rmtree(node.parent)

    def as_user(self, number: int) -> list[str]:
        """What to put before a command."""
        ids = [f"--reuid={number}", f"--regid={number}", "--clear-groups"]
        return [*self._enter, "setpriv", *ids]


def _bar(path: Path) -> Path | None:
    """The outermost folder on the way there that others may not pass."""
    for folder in [*reversed(path.parents), path]:
        if not folder.stat().st_mode & 0o001:
            return folder
    return None


class UsersSegue(Segue):
    """`segue` of one of them, at home in `place`; `environment` says where its machines are."""

    def __init__(
        self, users: Users, number: int, place: Path, root: Path, **environment: str
    ) -> None:
        super().__init__(root, {"HOME": str(place), "SEGUE_TESTING": "1"})
        for name in ("SEGUE_RUN_DIR", "XDG_RUNTIME_DIR", "XDG_CACHE_HOME"):
            self.environment.pop(name, None)
        self.environment |= environment
        self._before = users.as_user(number)

    def command(self, *arguments: str) -> list[str]:
        return [*self._before, *super().command(*arguments)]


def owned(path: Path, number: int, mode: int = 0o700) -> Path:
    """A folder of that user's."""
    path.mkdir(exist_ok=True)
    path.chmod(mode)
    os.chown(path, number, number)
    return path
