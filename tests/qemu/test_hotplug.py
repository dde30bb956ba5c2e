"""What clients plug into a running machine, and unplug from it, is there after an upgrade."""

from __future__ import annotations

import subprocess
from pathlib import Path

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
        *("-append", "console=ttyS0 quiet tsc=reliable segue.heartbeat=/dev/hvc0"),
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

    def run(self, line: str) -> str:
        """What it prints, without what the terminal echoes."""
        return self.shell.command(f"echo be''gin; {line}").rpartition("begin")[2].strip()

    def until(self, line: str) -> None:
        """Wait until a command succeeds in the guest."""
        wait_until(line, lambda: "yes" in self.run(f"{line} && echo y''es"), LIMIT)

    def upgrade(self, release: str) -> None:
        self.machine.handed_over("--to", qemu(release))
        seen = len(self.beat.data)
        self.beat.expect(rb"hb \d+ ", seen)

    def refused(self, release: str) -> list[str]:
        receipt = self.machine.upgrade("--to", qemu(release), status=5)
        return [f"{b['what']}: {b['why']}" for b in receipt["error"]["blockers"]]

    def hmp(self, line: str) -> str:
        text: str = self.qmp.command("human-monitor-command", {"command-line": line})
        return text

    def device_gone(self, id: str) -> None:
        self.qmp.command("device_del", {"id": id})
        wait_until(
            f"unplugging {id}",
            lambda: any(
                e["event"] == "DEVICE_DELETED" and e["data"].get("device") == id
                for e in self.qmp.events
            ),
        )

    def beats(self) -> None:
        """None of the guest's beats was lost."""
        numbers = [int(n) for n in __import__("re").findall(rb"hb (\d+) ", bytes(self.beat.data))]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_: object) -> None:
        self.qmp.close()


def disk(path: Path, size: str = "16M", kind: str = "raw") -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", kind, path, size], check=True)
    return path


def test_a_disk_is_plugged_in_used_through_upgrades_and_unplugged(
    segue: Segue, place: Path
) -> None:
    with Guest(segue, place, "7.2") as guest:
        image = disk(place / "hot.qcow2", kind="qcow2")
        guest.qmp.command(
            "blockdev-add",
            {
                "driver": "qcow2",
                "node-name": "hot",
                "file": {"driver": "file", "filename": str(image), "node-name": "hot-file"},
            },
        )
        guest.qmp.command(
            "device_add",
            {
                "driver": "virtio-blk-pci",
                "id": "disk9",
                "drive": "hot",
                "bus": "port2",
                "serial": "S9",
            },
        )
        guest.until("test -b /dev/vda")
        guest.run("echo before the first upgrade >/dev/vda")
        where = guest.run("readlink -f /sys/block/vda/device")
        for release in ROUND:
            guest.upgrade(release)
            assert guest.run("readlink -f /sys/block/vda/device") == where
            guest.run("echo 3 >/proc/sys/vm/drop_caches")
            assert "before the first" in guest.run("head -c 23 /dev/vda")
            assert "S9" in guest.run("cat /sys/block/vda/serial")
        guest.device_gone("disk9")
        guest.until("! test -b /dev/vda")
        guest.upgrade("10.0")
        guest.qmp.command("blockdev-del", {"node-name": "hot"})
        guest.upgrade("11.1")
        assert guest.qmp.command("query-named-block-nodes") == []
        guest.beats()


def test_controllers_networks_and_objects(segue: Segue, place: Path) -> None:
    with Guest(segue, place, "7.2") as guest:
        image = disk(place / "scsi.raw")
        add = guest.qmp.command
        add("object-add", {"qom-type": "iothread", "id": "io1"})
        add("object-add", {"qom-type": "secret", "id": "word", "data": "hush"})
        add(
            "device_add",
            {"driver": "virtio-scsi-pci", "id": "scsi", "bus": "port0", "iothread": "io1"},
        )
        add(
            "blockdev-add",
            {
                "driver": "raw",
                "node-name": "s0",
                "file": {"driver": "file", "filename": str(image)},
            },
        )
        add(
            "device_add",
            {
                "driver": "scsi-hd",
                "id": "sd",
                "drive": "s0",
                "bus": "scsi.0",
                "scsi-id": 3,
                "lun": 2,
            },
        )
        add("netdev_add", {"type": "user", "id": "net9"})
        add(
            "device_add",
            {"driver": "virtio-net-pci", "id": "nic", "netdev": "net9", "bus": "port1"},
        )
        add("object-add", {"qom-type": "rng-builtin", "id": "random"})
        add(
            "device_add", {"driver": "virtio-rng-pci", "id": "rng", "rng": "random", "bus": "port3"}
        )
        guest.until("test -b /dev/sda")
        guest.until("test -d /sys/class/net/eth0")
        mac = guest.run("cat /sys/class/net/eth0/address")
        where = guest.run("readlink -f /sys/block/sda /sys/class/net/eth0")
        guest.run("echo hello >/dev/sda")
        for release in ROUND:
            guest.upgrade(release)
            assert guest.run("cat /sys/class/net/eth0/address") == mac
            assert guest.run("readlink -f /sys/block/sda /sys/class/net/eth0") == where
            guest.run("echo 3 >/proc/sys/vm/drop_caches")
            assert "hello" in guest.run("head -c 5 /dev/sda")
            guest.run("ip address add 10.0.2.15/24 dev eth0; ip link set eth0 up")
            guest.until("ping -c 1 -W 1 10.0.2.2")
        for id in ("sd", "scsi", "nic", "rng"):
            guest.device_gone(id)
        guest.qmp.command("netdev_del", {"id": "net9"})
        for id in ("io1", "word", "random"):
            guest.qmp.command("object-del", {"id": id})
        guest.upgrade("10.0")
        assert "net9" not in guest.hmp("info network")
        guest.beats()


def test_processors_and_memory(segue: Segue, place: Path) -> None:
    with Guest(segue, place, "7.2") as guest:
        cpus = guest.qmp.command("query-hotpluggable-cpus")
        empty = [cpu for cpu in cpus if "qom-path" not in cpu]
        guest.qmp.command(
            "device_add", {"driver": empty[0]["type"], "id": "cpu9", **empty[0]["props"]}
        )
        guest.qmp.command(
            "object-add", {"qom-type": "memory-backend-ram", "id": "mem9", "size": 128 << 20}
        )
        guest.qmp.command("device_add", {"driver": "pc-dimm", "id": "dimm9", "memdev": "mem9"})
        guest.run("echo online >/sys/devices/system/memory/auto_online_blocks")
        guest.until("test -d /sys/devices/system/cpu/cpu1")
        guest.run("echo 1 >/sys/devices/system/cpu/cpu1/online")
        guest.until("grep -q 1 /sys/devices/system/cpu/cpu1/online")
        blocks = "ls -d /sys/devices/system/memory/memory*"
        guest.until(f"for m in $({blocks}); do echo online >$m/state; done; true")
        memory = guest.run("grep MemTotal /proc/meminfo")
        for release in ROUND:
            guest.upgrade(release)
            assert guest.run("grep MemTotal /proc/meminfo") == memory
            assert guest.run("cat /sys/devices/system/cpu/online") == "0-1"
            assert "ok" in guest.run(
                "taskset 2 sh -c 'i=0; while [ $i -lt 999 ]; do i=$((i+1)); done; echo o''k'"
            )
            kept = guest.machine.status()["kept"]
            assert any(k["name"] == "mem9" and k["held"] for k in kept), kept
        guest.beats()
