"""Debian packages without touching this system: private sources, lists and downloads.

Nothing here is installed and nothing needs root. apt's own settings (a proxy, say) still count;
its sources, lists, downloads and idea of what is installed are replaced by folders of ours.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MIRROR = os.environ.get("SEGUE_DEBIAN_MIRROR", "http://deb.debian.org")
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
LISTS_STAY_FRESH = 3600.0  # seconds: one `make test` needs one look at the archive


class Failed(Exception):
    """Says what did not work, in one line, and optionally a hint in a second one."""


def cache_folder() -> Path:
    """Where everything that is downloaded or built from downloads is kept, between checkouts."""
    if chosen := os.environ.get("SEGUE_CACHE"):
        return Path(chosen).resolve()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).resolve() / "segue"


def run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["(it said nothing)"]
        raise Failed(f"{Path(command[0]).name} ended with {done.returncode}: {said[-1]}")
    return done.stdout


def replace(path: Path, data: bytes) -> None:
    """Write a file that is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.new")
    scratch.write_bytes(data)
    scratch.rename(path)


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Scripts that share the cache wait for each other; the second finds the work done."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main(name: str, work: Callable[[], None]) -> None:
    """Runs `work()`; what it cannot do is told in two lines at most."""
    try:
        work()
    except Failed as failed:
        print(f"{name}: {failed}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


@dataclass(frozen=True)
class Archive:
    """A Debian release as apt sees it, with lists of its own in the cache."""

    release: str
    suites: tuple[tuple[str, str], ...]  # folder on the mirror, suite

    @property
    def folder(self) -> Path:
        return cache_folder() / "apt" / self.release

    def _apt(self, program: str, *args: str, cwd: Path | None = None) -> str:
        options = {
            "Dir::Etc::sourcelist": self.folder / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "Dir::State": self.folder,
            "Dir::State::lists": self.folder / "lists",
            "Dir::State::status": self.folder / "status",
            "Dir::Cache": self.folder,
            "Dir::Cache::archives": self.folder / "archives",
            "APT::Architecture": "amd64",
            "APT::Sandbox::User": "root",
            "APT::Install-Recommends": "false",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
        }
        flags = [f"-o{key}={value}" for key, value in options.items()]
        return run(program, "-qq", *flags, *args, cwd=cwd)

    def refresh(self) -> None:
        """Fetches the lists, unless they are fresh."""
        stamp = self.folder / "fresh"
        if stamp.exists() and time.time() - stamp.stat().st_mtime < LISTS_STAY_FRESH:
            return
        for name in ("lists/partial", "archives/partial"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "status").touch()
        lines = [
            f"deb [arch=amd64 signed-by={KEYRING}] {MIRROR}/{folder} {suite} main\n"
            for folder, suite in self.suites
        ]
        (self.folder / "sources.list").write_text("".join(lines))
        self._apt("apt-get", "update")
        stamp.touch()

    def depends(self, package: str) -> list[str]:
        """What `package` directly depends on; for metapackages, what they stand for."""
        self.refresh()
        lines = self._apt("apt-cache", "depends", package).splitlines()
        return [line.split(":")[1].strip() for line in lines if line.strip().startswith("Depends:")]

    def fetched(self, package: str, into: Path) -> Path:
        """`package` unpacked in a folder of `into`, downloaded once.

        A kernel's name has its version in it; its metapackage's name stands for it.
        """
        folder = into / package
        if not folder.exists():
            real = self.depends(package)[0] if package.startswith("linux-image-") else package
            print(f"fetching {real}", flush=True)
            for left in into.glob(".unpacking-*"):
                shutil.rmtree(left)
            scratch = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=into))
            self.unpack([real], scratch, with_libraries=False)
            scratch.rename(folder)
        return folder

    def unpack(self, packages: Sequence[str], into: Path, *, with_libraries: bool) -> None:
        """Downloads `packages` (`NAME` or `NAME/SUITE`) and unpacks them into the folder `into`.

        With their libraries, what comes out runs by its own dynamic loader on any distribution.
        debootstrap gives the same, but takes a chroot, and root for it, to configure packages
        whose configuration nobody looks at.
        """
        self.refresh()
        archives = self.folder / "archives"
        if with_libraries:
            self._apt("apt-get", "install", "--yes", "--download-only", *packages)
        else:
            self._apt("apt-get", "download", *packages, cwd=archives)
        into.mkdir(parents=True, exist_ok=True)
        for package in sorted(archives.glob("*.deb")):
            run("dpkg-deb", "--extract", package, into)
        for package in archives.glob("*.deb"):
            package.unlink()


_BOOKWORM = (
    ("debian", "bookworm"),
    ("debian-security", "bookworm-security"),
    ("debian", "bookworm-backports"),
)
BOOKWORM = Archive("bookworm", _BOOKWORM)
TRIXIE = Archive("trixie", (("debian", "trixie"), ("debian", "trixie-backports")))
