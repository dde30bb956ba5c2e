"""What Segue reads from a command line is what real QEMU makes of it."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from segue.errors import BadCommandLine
from segue.qemu.chardevs import find_chardevs
from segue.qemu.commandline import CommandLine
from tests.qemu.harness import LIMIT, qemu

RELEASES = ["7.2", "10.0", "11.1"]


def ask(argv: list[str], folder: Path, *commands: str) -> list[Any] | None:
    """Start QEMU, ask it over a monitor of our own, and quit; None if it refuses to start."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "probe"))
    listener.listen(1)
    probe = ["-chardev", f"socket,id=probe,path={folder / 'probe'}"]
    process = subprocess.Popen(
        [*argv, "-S", "-display", "none", *probe, "-mon", "chardev=probe,mode=control"],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        # A QEMU that dies early closes what it had, or never connects.
        listener.settimeout(0.05)
        while True:
            try:
                connection, _ = listener.accept()
                break
            except TimeoutError:
                if process.poll() is not None:
                    return None
        with connection, connection.makefile("rw") as monitor:
            connection.settimeout(LIMIT)
            return [_execute(monitor, name) for name in ("qmp_capabilities", *commands)][1:]
    except (ConnectionError, EOFError):
        return None
    finally:
        listener.close()
        process.kill()
        process.wait()


def _execute(monitor: Any, command: str) -> Any:
    monitor.write(json.dumps({"execute": command}))
    monitor.flush()
    while line := monitor.readline():
        reply = json.loads(line)
        if "return" in reply:
            return reply["return"]
    raise EOFError


CHARDEVS = [
    "-M none",
    "-M pc",
    "-M pc -nographic",
    "-M microvm -nographic",
    "-M pc -nodefaults -nographic",
    "-M pc -monitor null -nographic",
    "-M pc -parallel mon:null -nographic",
    "-M pc -device isa-serial,chardev=c -chardev null,id=c",
    "-M pc -global isa-serial.iobase=0x3f8",
    "-M pc -nodefaults -serial none -serial null -serial null",
    "-M pc -nodefaults -parallel none -parallel null",
    "-M pc -nodefaults -qmp null -monitor none -monitor null -qmp-pretty unix:q,server=on,wait=off",
    "-M pc -nodefaults -serial mon:null -parallel null -debugcon file:d -gdb unix:g,server,nowait",
    "-M pc -nodefaults -chardev null,id=a,mux=on -serial chardev:a -mon chardev=a",
    "-M pc -nodefaults -serial vc:80Cx24C -serial udp:localhost:5555 -serial vcx",
    "-M pc -nodefaults -serial mon:pty -serial unix:k,mux=on,id=z,server=on,wait=off",
    "-M pc -nodefaults -serial unix:a,,b,server=on,wait=off -serial unix:path=c,server,nowait",
    "-M pc -nodefaults -qtest unix:g,server=on,wait=off -gdb none",
    "-M pc -nodefaults -chardev null,id=a,id=b",
    "-M pc -nodefaults -serial mon:chardev:x",
    "-M pc -nodefaults -serial mon:none",
    "-M pc -nodefaults -debugcon none",
    "-M pc -nodefaults -qmp none",
    "-M pc -nodefaults -serial ringbuf",
    "-M pc -nodefaults -serial vc:100x",
    "-M pc -nodefaults -chardev null",
    "-M pc -nodefaults -chardev id=x",
]


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("text", CHARDEVS)
def test_chardevs_have_the_ids_that_qemu_gives_them(
    tmp_path: Path, release: str, text: str
) -> None:
    argv = [qemu(release), *shlex.split(text)]
    answer = ask(argv, tmp_path, "query-chardev")
    theirs = answer and {
        # A gdb stub has a monitor of its own, without a name.
        entry["label"]
        for entry in answer[0]
        if entry["label"] != "probe" and not entry["label"].startswith("#")
    }
    try:
        # The probe's monitor takes QEMU's default one away.
        found = find_chardevs(CommandLine.parse([*argv, "-mon", "probe"]))
        ours = {c.id for c in found} | {f"{c.id}-base" for c in found if c.mux}
    except BadCommandLine:
        assert answer is None
    else:
        assert ours == theirs


CONFIG = """
[machine]
  type = "q35"
[memory]
  size = "192M"
[smp-opts]
  cpus = "3"
[netdev "n"]
  type = "user"
[device "nic"]
  driver = "virtio-net-pci"
  netdev = "n"
  mac = "52:54:00:00:00:01"
[chardev "c"]
  backend = "null"
[device "serial"]
  driver = "isa-serial"
  chardev = "c"
[global]
  driver = "virtio-net-pci"
  property = "ioeventfd"
  value = "off"
[drive "d"]
  if = "virtio"
  driver = "null-co"
"""


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("more", ["", "-nodefaults", "-nic none", "-set device.nic.bus=pcie.0"])
def test_a_configuration_file_means_the_options_that_it_is_replaced_by(
    tmp_path: Path, release: str, more: str
) -> None:
    (tmp_path / "vm.cfg").write_text(CONFIG.lstrip())
    argv = [qemu(release), "-readconfig", "vm.cfg", *shlex.split(more)]
    replaced = CommandLine.parse(argv, readconfig_base=tmp_path)
    assert not replaced.flag("readconfig", "set")
    answers = []
    for number, variant in enumerate([argv, replaced.argv()]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "vm.cfg").symlink_to(tmp_path / "vm.cfg")
        answer = ask(
            variant,
            folder,
            *("query-pci", "query-memory-size-summary", "query-cpus-fast", "query-rx-filter"),
        )
        assert answer is not None
        pci, memory, cpus, filters = answer
        answers.append((pci, memory, len(cpus), [entry["main-mac"] for entry in filters]))
    assert answers[0] == answers[1]
