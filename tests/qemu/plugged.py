"""The Linux guest with ports to plug devices into, and what the tests of that say to it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

from tests.qemu.harness import LIMIT, Client, Machine, Qmp, Segue, cache, qemu, wait_until

ROUND = ("10.0", "11.1", "7.2")
PORTS = 6


def linux(place: Path, release: str, *more: str, full: bool = False) -> list[str]:
    """The Linux guest with ports to plug into, a shell and a heartbeat."""
    folder = cache() / "linux" / ("full" if full else "")
    words = [
        qemu(release),
        *("-M", "pc-q35-7.2", "-m", "256,slots=4,maxmem=2G", "-smp", "1,maxcpus=3"),
        *("-nodefaults", "-display", "none"),
        *("-kernel", f"{folder}/vmlinuz", "-initrd", f"{folder}/initrd.img"),
        *("-append", "console=ttyS0 quiet segue.heartbeat=/dev/hvc0"),
        *("-serial", f"unix:{place}/console,server=on,wait=off"),
        *("-chardev", f"socket,id=beat,path={place}/beat,server=on,wait=off"),
        *("-device", "virtio-serial-pci", "-device", "virtconsole,chardev=beat"),
    ]
    for port in range(PORTS):
        words += ["-device", f"pcie-root-port,id=port{port},chassis={port + 1}"]
    return [*words, *more]


class Guest:
    """A machine with a shell in it, and a QMP client on it."""

    def __init__(self, segue: Segue, place: Path, release: str, *more: str, full: bool = False):
        self.place = place
        self.machine: Machine = segue.start("linux", linux(place, release, *more, full=full))
        self.shell: Client = self.machine.connect(place / "console")
        self.beat: Client = self.machine.connect(place / "beat")
        self.shell.expect(rb"# ")
        self.qmp: Qmp = self.machine.qmp()
        self.run("dmesg -n 1")

    def run(self, line: str) -> str:
        """What it prints, without what the terminal echoes."""
        return self.shell.command(f"echo be''gin; {line}").rpartition("begin")[2].strip()

    def until(self, line: str) -> None:
        """Wait until a command succeeds in the guest."""
        wait_until(line, lambda: "yes" in self.run(f"{line} && echo y''es"), LIMIT)

    def disk_ready(self, path: str) -> None:
        """Wait until the kernel serves it, which is later than the node's appearing."""
        self.until(f"test -b {path} && head -c 1 {path} >/dev/null")

    def write(self, text: str, path: str) -> None:
        assert self.run(f"echo {text} >{path} && sync && echo writ''ten") == "written"

    def upgrade(self, release: str) -> None:
        self.machine.handed_over("--to", qemu(release))
        assert self.run("echo ali''ve") == "alive"

    def plug_disk(self, image: Path, node: str, id: str, bus: str) -> None:
        file = {"driver": "file", "filename": str(image)}
        self.qmp.command("blockdev-add", {"driver": "raw", "node-name": node, "file": file})
        self.qmp.command(
            "device_add", {"driver": "virtio-blk-pci", "id": id, "drive": node, "bus": bus}
        )

    def refused(self, release: str) -> list[str]:
        receipt = self.machine.upgrade("--to", qemu(release), status=5)
        return [f"{b['what']}: {b['why']}" for b in receipt["blockers"]]

    def hmp(self, line: str) -> str:
        text: str = self.qmp.command("human-monitor-command", {"command-line": line})
        return text

    def device_gone(self, id: str) -> None:
        self.qmp.command("device_del", {"id": id})
        self.deleted(device=id)

    def deleted(self, **data: str) -> None:
        wait_until(
            f"unplugging {data}",
            lambda: any(
                e["event"] == "DEVICE_DELETED" and data.items() <= e["data"].items()
                for e in self.qmp.events
            ),
        )

    def job(self, command: str, arguments: dict[str, Any], id: str) -> None:
        """A block job until it has ended, by job-complete where it waits for that."""
        self.qmp.command(command, arguments)

        def over() -> bool:
            jobs = {job["id"]: job["status"] for job in self.qmp.command("query-jobs")}
            if jobs.get(id) == "ready":
                self.qmp.command("job-complete", {"id": id})
            return id not in jobs

        wait_until(f"the end of {command}", over)

    def beats(self) -> None:
        """None of the guest's beats was lost. A busy host's guest may begin late."""
        self.beat.expect(rb"hb \d+ ")
        numbers = [int(n) for n in re.findall(rb"hb (\d+) ", bytes(self.beat.data))]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_: object) -> None:
        self.qmp.close()


def disk(path: Path, size: str = "16M", kind: str = "raw") -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", kind, path, size], check=True)
    return path
