"""Where a tap's descriptor can come from besides the device, and the scripts that set it up."""

from __future__ import annotations

import os
import shlex
import socket
from pathlib import Path

from segue.errors import SegueError
from segue.kept import processes, tun
from segue.qemu.commandline import Option

_BRIDGE = "br0"
_HELPER = "qemu-bridge-helper"
_HELPER_FOLDERS = ("../lib/qemu", "../libexec")


def from_helper(option: Option, program: str) -> int:
    """By QEMU's bridge helper, with its rights. Raises SegueError."""
    params = option.params
    helper = params.get("helper") or _default_helper(program)
    bridge = params.get("br") or _BRIDGE
    ours, theirs = socket.socketpair()
    with ours, theirs:
        arguments = ["--use-vnet", f"--fd={theirs.fileno()}"]
        if " " in helper or "\t" in helper:
            if "--br=" not in helper:
                arguments.append(f"--br={shlex.quote(bridge)}")
            command = ["/bin/sh", "-c", " ".join([helper, *arguments])]
        else:
            command = [helper, *arguments, f"--br={bridge}"]
        status = processes.run(command, pass_fds=(theirs.fileno(),))
        theirs.close()
        fds = socket.recv_fds(ours, 1, 1)[1] if status == 0 else []
    if not fds:
        raise SegueError(
            f"the bridge helper failed: {helper} ended with {status}",
            hint=f"is '{bridge}' allowed in /etc/qemu/bridge.conf?",
        )
    os.set_inheritable(fds[0], False)
    os.set_blocking(fds[0], False)
    return fds[0]


def given(option: Option, word: str) -> int:
    """A descriptor that whoever started us passed on. Raises SegueError if it is no tap."""
    try:
        fd = int(word)
        tun.interface(fd)
        os.set_inheritable(fd, False)
        os.set_blocking(fd, False)
    except (OSError, ValueError):
        raise SegueError(
            f"{option}: {word} is not a tap's descriptor",
            hint="pass the number of a descriptor that `segue run` inherits",
        ) from None
    return fd


def run_script(script: str, interface: str) -> None:
    status = processes.run([script, interface])
    if status != 0:
        raise SegueError(
            f"network script {script} failed with status {status}",
            hint="script=no runs none" if not os.path.exists(script) else None,
        )


def _default_helper(program: str) -> str:
    folder = Path(program).resolve().parent
    for place in (*(folder / name for name in _HELPER_FOLDERS), Path("/usr/lib/qemu")):
        if (place / _HELPER).exists():
            return str((place / _HELPER).resolve())
    return str(Path("/usr/lib/qemu") / _HELPER)
