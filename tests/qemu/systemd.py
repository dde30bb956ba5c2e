"""A systemd of a test's own, as the first process of its namespaces, with Segue installed.

It sees this host's files with a layer on top, which goes with it, and has a network, /dev, /run and
a control group of its own. /proc/sys and /sys are read-only, and what would load modules or mount
what there is once for all is masked, so that it changes nothing of the host.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.qemu.harness import LIMIT, cache, wait_until

CHECKOUT = Path(__file__).resolve().parents[2]
USER, UID = "segue-test", 64242
"""Somebody who is not root, in it alone."""

_INIT = "/lib/systemd/systemd"
# Nothing that this host has enabled is started.
_OWN_UNITS = "/etc/systemd"
_MASKED = (
    *("systemd-modules-load.service", "modprobe@.service", "systemd-sysctl.service"),
    *("systemd-binfmt.service", "proc-sys-fs-binfmt_misc.automount"),
    *("proc-sys-fs-binfmt_misc.mount", "sys-fs-fuse-connections.mount"),
    *("sys-kernel-config.mount", "sys-kernel-debug.mount", "sys-kernel-tracing.mount"),
)

# $1: a folder for the layer; $2: `segue`; the others are seen at their own paths.
_SCRIPT = f"""
set -e
layer=$1 segue=$2; shift 2
mount --make-rprivate /
mount -t tmpfs layer "$layer"
mkdir "$layer/upper" "$layer/work" "$layer/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$layer/upper,workdir=$layer/work" "$layer/root"
cd "$layer/root"
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
for folder in dev run tmp .{_OWN_UNITS}; do mount -t tmpfs tmpfs $folder; done
mkdir .{_OWN_UNITS}/system dev/pts dev/shm dev/net
for unit in {" ".join(_MASKED)}; do ln -s /dev/null .{_OWN_UNITS}/system/$unit; done
mount -t devpts -o newinstance,ptmxmode=666,mode=620,gid=5 devpts dev/pts
ln -s pts/ptmx dev/ptmx
for link in fd stdin stdout stderr; do ln -s /proc/self/fd dev/$link; done
for node in null zero full random urandom tty kvm net/tun vhost-net; do
    [ -e /dev/$node ] || continue
    touch dev/$node
    mount --bind /dev/$node dev/$node
done
for folder in "$@"; do
    mkdir -p ".$folder"
    mount --bind "$folder" ".$folder"
    # Other users are to reach it too.
    while folder=$(dirname "$folder"); [ "$folder" != / ]; do chmod go+x ".$folder"; done
done
ln -s "$segue" usr/bin/segue
echo '{USER}:x:{UID}:{UID}::/home/{USER}:/bin/sh' >>etc/passwd
echo '{USER}:x:{UID}:' >>etc/group
echo '{USER}:*:20000::::::' >>etc/shadow
mkdir home/{USER}
chown {UID}:{UID} home/{USER}
units={CHECKOUT}/packaging/systemd
cp $units/*.service usr/lib/systemd/system
cp $units/user/*.service usr/lib/systemd/user
pivot_root . mnt
umount -l /mnt
exec env -i container=test PATH="$PATH" {_INIT} --unit=basic.target --show-status=0
"""


class Systemd:
    """Made by root alone. The folder `place` is the same inside."""

    def __init__(self, place: Path, environment: dict[str, str]) -> None:
        layer = place / "systemd"
        layer.mkdir()
        spaces = ("--mount", "--pid", "--cgroup", "--ipc", "--uts", "--net")
        segue = Path(sys.executable).with_name("segue")
        seen = [str(folder) for folder in (place, CHECKOUT, cache())]
        words = ["sh", "-c", _SCRIPT, "sh", str(layer), str(segue), *seen]
        self._environment = environment
        # The host's own systemd has groups of the same names.
        self._group = control_group() / f"segue-test-{os.getpid()}"
        self._group.mkdir()
        enter = ["sh", "-c", 'echo $$ >"$0" && exec "$@"', str(self._group / "cgroup.procs")]
        self._process = subprocess.Popen(
            [*enter, "unshare", *spaces, "--fork", "--kill-child", *words]
        )
        self._first = wait_until("the start of systemd", self._find)
        wait_until("systemd", lambda: self.try_to("systemctl", "show-environment") == 0)
        self.run("systemctl", "start", "basic.target")
        for name, value in environment.items():
            self.run("systemctl", "set-environment", f"{name}={value}")

    def log_in(self) -> None:
        """Start the user's manager, as logging in would."""
        self.run("systemctl", "start", f"user@{UID}.service")
        for name, value in self._environment.items():
            self.run("systemctl", "--user", "set-environment", f"{name}={value}", user=True)

    def _find(self) -> int | None:
        assert self._process.poll() is None, "a systemd could not be started in namespaces"
        pid = self._process.pid
        for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            if os.path.basename(os.readlink(f"/proc/{word}/exe")) == "systemd":
                return int(word)
        return None

    @property
    def root(self) -> Path:
        """Its files, as seen from here."""
        return Path(f"/proc/{self._first}/root")

    def outside(self, pid: int) -> int:
        """The number that a process of its has here."""
        for status in Path("/proc").glob("[0-9]*/status"):
            numbers = next(
                line.split()[1:]
                for line in status.read_text().splitlines()
                if line.startswith("NSpid:")
            )
            if numbers[1:] == [str(pid)] and self.is_ours(int(numbers[0])):
                return int(numbers[0])
        raise AssertionError(f"there is no process {pid} in it")

    def is_ours(self, pid: int) -> bool:
        return os.readlink(f"/proc/{pid}/ns/pid") == os.readlink(f"/proc/{self._first}/ns/pid")

    def _enter(self, command: tuple[str, ...], user: bool = False) -> Any:
        environment = {"PATH": os.environ["PATH"], **self._environment}
        become: list[str] = []
        if user:
            environment |= {"HOME": f"/home/{USER}", "XDG_RUNTIME_DIR": f"/run/user/{UID}"}
            become = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups"]
        return subprocess.run(
            ["nsenter", "-t", str(self._first), "-a", *become, *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )

    def try_to(self, *command: str) -> int:
        status: int = self._enter(command).returncode
        return status

    def run(self, *command: str, user: bool = False) -> str:
        """What it prints, to root or to the user. It must succeed."""
        done = self._enter(command, user)
        if done.returncode:
            journal = self._enter(("journalctl", "--no-pager", "-n", "40")).stdout
            raise AssertionError((shlex.join(command), done.stdout, done.stderr, journal))
        said: str = done.stdout
        return said

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        wait_until("the end of its processes", self._remove_groups)

    def _remove_groups(self) -> bool:
        for folder, _, _ in os.walk(self._group, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        return not self._group.exists()


def control_group() -> Path:
    """Where this process is in the hierarchy of version 2 (cgroups(7), proc(5))."""
    mounts = (line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines())
    root = next(Path(words[4]) for words in mounts if words[words.index("-") + 1] == "cgroup2")
    groups = Path("/proc/self/cgroup").read_text().splitlines()
    own = next(line for line in groups if line.startswith("0::"))
    return root / own.removeprefix("0::/")
