"""What clients plug into a running machine, and unplug from it, is there after an upgrade."""

from __future__ import annotations

import re
import socket
from pathlib import Path

from tests.qemu.conftest import tiny
from tests.qemu.harness import Segue, qemu, wait_until
from tests.qemu.plugged import ROUND, Guest, disk


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
        guest.disk_ready("/dev/vda")
        guest.write("before the first upgrade", "/dev/vda")
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
        guest.disk_ready("/dev/sda")
        guest.until("test -d /sys/class/net/eth0")
        mac = guest.run("cat /sys/class/net/eth0/address")
        where = guest.run("readlink -f /sys/block/sda /sys/class/net/eth0")
        guest.write("hello", "/dev/sda")
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


def test_ports_that_slirp_forwards(segue: Segue, place: Path) -> None:
    """Added, removed, and the port that QEMU chose: each stays what it is."""
    net = "user,id=n0,hostfwd=tcp:127.0.0.1:0-:22,hostfwd=tcp:127.0.0.1:0-:23"
    argv = tiny(place, "7.2", "-netdev", net, "-device", "virtio-net-pci,netdev=n0")
    guest = segue.start("guest", argv, "--net-user", "slirp")
    with guest.qmp() as qmp:

        def hmp(line: str) -> str:
            return str(qmp.command("human-monitor-command", {"command-line": line}))

        def forwards() -> set[tuple[str, ...]]:
            listed = hmp("info usernet")
            found = re.findall(r"(\w+)\[HOST_FORWARD\] +\d+ +(\S+) +(\d+) +\S+ +(\d+)", listed)
            return {tuple(each) for each in found}

        (port,) = [port for _, _, port, to in forwards() if to == "23"]
        assert "removed" in hmp(f"hostfwd_remove n0 tcp:127.0.0.1:{port}")
        assert hmp("hostfwd_add n0 tcp:127.0.0.1:0-:24") == ""
        assert hmp("hostfwd_add n0 udp::0-:25") == ""
        qmp.command("netdev_add", {"type": "user", "id": "n1"})
        assert hmp("hostfwd_add n1 tcp:127.0.0.1:0-:26") == ""
        before = forwards()
        assert {to for _, _, _, to in before} == {"22", "24", "25", "26"}
        for release in ("10.0", "11.1", "10.0"):
            guest.handed_over("--to", qemu(release))
            assert forwards() == before
            for protocol, host, port, _ in before:
                if protocol == "TCP":
                    socket.create_connection((host, int(port))).close()


def test_a_guest_unplugs_by_itself(segue: Segue, place: Path) -> None:
    """Its slot's power is switched off; a device of the command line, and one that was added."""
    first = disk(place / "first.raw")
    more = (
        *("-drive", f"if=none,id=first,file={first},format=raw"),
        *("-device", "virtio-blk-pci,drive=first,id=first,bus=port0"),
    )
    with Guest(segue, place, "7.2", *more) as guest:
        guest.plug_disk(disk(place / "second.raw"), "second", "second", "port1")
        guest.plug_disk(disk(place / "third.raw"), "third", "third", "port2")
        for name in ("vda", "vdb", "vdc"):
            guest.disk_ready(f"/dev/{name}")
        guest.upgrade("10.0")
        for id, name in (("first", "vda"), ("second", "vdb")):
            guest.run(
                f"a=$(readlink -f /sys/block/{name} | sed 's|.*/\\([^/]*\\)[.]./virtio.*|\\1|'); "
                "for s in /sys/bus/pci/slots/*; do "
                "[ $(cat $s/address) = $a ] && echo 0 >$s/power; done; true"
            )
            guest.deleted(device=id)
        for release in ("11.1", "7.2"):
            guest.upgrade(release)
            assert guest.run("ls /sys/block") == "vdc"
            devices = guest.qmp.command("qom-list", {"path": "/machine/peripheral"})
            assert {"first", "second", "third"} & {d["name"] for d in devices} == {"third"}
        guest.beats()


def test_processors_and_memory(segue: Segue, place: Path) -> None:
    # Without the heartbeat: on a busy host a new CPU would wait for the one that makes up for it.
    # And without what the guest's kernel does ill while a host lets one of its CPUs wait: it
    # measures delays anew for a new CPU, tests its clock, in which both CPUs spin, and has
    # watchdogs that fill the console. QEMU 7.2's TCG may let the new CPU sleep for good in `hlt`,
    # and, alone and with no upgrade at all, hung such a guest as its new CPU came online (1 of 17
    # on a busy host; `stop` and `cont` woke it): so it is plugged into 10.0 (none of 60).
    patient = "idle=poll lpj=4000000 tsc=reliable nosoftlockup nowatchdog"
    quiet = ("-append", f"console=ttyS0 quiet {patient}")
    with Guest(segue, place, "10.0", *quiet) as guest:
        cpus = guest.qmp.command("query-hotpluggable-cpus")
        empty = [cpu for cpu in cpus if "qom-path" not in cpu]
        guest.qmp.command(
            "device_add", {"driver": empty[0]["type"], "id": "cpu9", **empty[0]["props"]}
        )
        alone = guest.run("grep MemTotal /proc/meminfo")
        # Movable, so that it can be unplugged.
        guest.run("echo online_movable >/sys/devices/system/memory/auto_online_blocks")
        guest.qmp.command(
            "object-add", {"qom-type": "memory-backend-ram", "id": "mem9", "size": 128 << 20}
        )
        guest.qmp.command("device_add", {"driver": "pc-dimm", "id": "dimm9", "memdev": "mem9"})
        guest.until("test -d /sys/devices/system/cpu/cpu1")
        guest.run("echo 1 >/sys/devices/system/cpu/cpu1/online")
        guest.until("grep -q 1 /sys/devices/system/cpu/cpu1/online")
        blocks = "ls -d /sys/devices/system/memory/memory*"
        guest.until(f"for m in $({blocks}); do echo online_movable >$m/state; done; true")
        memory = guest.run("grep MemTotal /proc/meminfo")
        for release in ("11.1", "7.2", "10.0"):
            guest.upgrade(release)
            assert guest.run("grep MemTotal /proc/meminfo") == memory
            assert guest.run("cat /sys/devices/system/cpu/online") == "0-1"
            assert "ok" in guest.run(
                "taskset 2 sh -c 'i=0; while [ $i -lt 999 ]; do i=$((i+1)); done; echo o''k'"
            )
            kept = guest.machine.status()["kept"]
            assert any(k["name"] == "mem9" and k["held"] for k in kept), kept
        guest.upgrade("11.1")
        guest.device_gone("dimm9")
        guest.qmp.command("object-del", {"id": "mem9"})
        unplug_cpu(guest)
        for release in ("7.2", "10.0"):
            guest.upgrade(release)
            assert guest.run("cat /sys/devices/system/cpu/online") == "0"
            assert guest.run("grep MemTotal /proc/meminfo") == alone
            assert guest.qmp.command("query-memory-devices") == []
        # Migrated after this, 10.0 hangs under TCG, and 7.2 crashes.
        guest.qmp.command(
            "device_add", {"driver": empty[0]["type"], "id": "cpu9", **empty[0]["props"]}
        )
        guest.until("test -d /sys/devices/system/cpu/cpu1")
        unplug_cpu(guest)
        assert any("a CPU that was unplugged" in why for why in guest.refused("11.1"))
        assert guest.run("echo ali''ve") == "alive"


def unplug_cpu(guest: Guest) -> None:
    """There is an event for one of its parts only; it is told by the list."""
    guest.qmp.command("device_del", {"id": "cpu9"})
    folder = {"path": "/machine/peripheral"}
    wait_until(
        "unplugging the CPU",
        lambda: "cpu9" not in [d["name"] for d in guest.qmp.command("qom-list", folder)],
    )


def test_a_device_of_the_command_line_is_unplugged(segue: Segue, place: Path) -> None:
    """Also one without an id; what is left stays where it was."""
    image = disk(place / "first.raw")
    more = (
        *("-drive", f"if=none,id=d1,file={image},format=raw"),
        *("-device", "virtio-blk-pci,drive=d1,id=first,bus=port0"),
        *("-object", "rng-builtin,id=random"),
        *("-device", "virtio-rng-pci,rng=random,bus=port1"),
        *("-netdev", "user,id=net0", "-device", "virtio-net-pci,netdev=net0,id=nic,bus=port2"),
    )
    with Guest(segue, place, "7.2", *more) as guest:
        guest.disk_ready("/dev/vda")
        nic = guest.run("readlink -f /sys/class/net/eth0")
        rng = next(
            device["qdev_id"] or ""
            for bus in guest.qmp.command("query-pci")
            for outer in bus["devices"]
            for device in outer.get("pci_bridge", {}).get("devices", [])
            if device["id"]["device"] == 0x1044
        )
        assert rng == ""
        guest.device_gone("first")
        anonymous = guest.qmp.command("qom-list", {"path": "/machine/peripheral-anon"})
        name = next(c["name"] for c in anonymous if "rng" in c["type"])
        path = f"/machine/peripheral-anon/{name}"
        guest.qmp.command("device_del", {"id": path})
        guest.deleted(path=path)
        for release in ROUND:
            guest.upgrade(release)
            assert guest.run("ls /sys/block") == "" or "vda" not in guest.run("ls /sys/block")
            assert guest.run("readlink -f /sys/class/net/eth0") == nic
            assert "d1" not in [b["device"] for b in guest.qmp.command("query-block")]
        guest.device_gone("nic")
        guest.upgrade("10.0")
        guest.beats()


def test_a_chain_of_snapshots(segue: Segue, place: Path) -> None:
    """Made live on two disks, one of them a -drive; committed to the bottom on another QEMU."""
    old, new = disk(place / "old.qcow2", kind="qcow2"), disk(place / "new.qcow2", kind="qcow2")
    more = (
        *("-drive", f"if=none,id=old,file={old},format=qcow2,cache=none"),
        *("-device", "virtio-blk-pci,drive=old,id=disk-old"),
        *("-blockdev", f"qcow2,node-name=new,file.driver=file,file.filename={new}"),
        *("-device", "virtio-blk-pci,drive=new,id=disk-new"),
    )
    with Guest(segue, place, "7.2", *more) as guest:
        top = "new"
        for number, release in enumerate(ROUND):
            for name in ("vda", "vdb"):
                guest.run(f"echo {name} block {number} | dd of=/dev/{name} seek={number} bs=4k")
            guest.run("sync")
            for node, kind in (("old", "device"), (top, "node-name")):
                guest.qmp.command(
                    "blockdev-snapshot-sync",
                    {
                        kind: node,
                        "snapshot-file": str(place / f"{node}-{number}.qcow2"),
                        **({"snapshot-node-name": f"top{number}"} if node == top else {}),
                    },
                )
            top = f"top{number}"
            guest.upgrade(release)
            guest.run("echo 3 >/proc/sys/vm/drop_caches")
            for name in ("vda", "vdb"):
                for block in range(number + 1):
                    said = guest.run(f"dd if=/dev/{name} skip={block} bs=4k count=1 2>/dev/null")
                    assert f"{name} block {block}" in said
        depths = [b["inserted"]["backing_file_depth"] for b in guest.qmp.command("query-block")]
        assert depths == [3, 3]
        # Down into the first overlay, and the rest into the base.
        guest.job("block-commit", {"job-id": "j", "device": top, "base-node": "new"}, "j")
        guest.job("block-stream", {"job-id": "s", "device": "old"}, "s")
        guest.upgrade("11.1")
        depths = [b["inserted"]["backing_file_depth"] for b in guest.qmp.command("query-block")]
        assert sorted(depths) == [0, 0]
        guest.run("echo 3 >/proc/sys/vm/drop_caches")
        assert "vdb block 2" in guest.run("dd if=/dev/vdb skip=2 bs=4k count=1 2>/dev/null")
        assert "vda block 2" in guest.run("dd if=/dev/vda skip=2 bs=4k count=1 2>/dev/null")
        guest.beats()


def test_what_clients_set(segue: Segue, place: Path) -> None:
    one, two = disk(place / "one.raw"), disk(place / "two.raw", "8M")
    media = [disk(place / f"cd{n}.raw", "1M") for n in range(2)]
    for n, path in enumerate(media):
        path.write_bytes(f"medium {n}".encode().ljust(1 << 20, b"."))
    more = (
        *("-drive", f"if=none,id=one,file={one},format=raw"),
        *("-device", "virtio-blk-pci,drive=one,id=disk1"),
        *("-blockdev", f"raw,node-name=two,file.driver=file,file.filename={two}"),
        *("-device", "virtio-blk-pci,drive=two,id=disk2"),
        *("-device", "virtio-scsi-pci,id=scsi"),
        *("-drive", f"if=none,id=cd,file={media[0]},format=raw,media=cdrom,readonly=on"),
        *("-device", "scsi-cd,drive=cd,id=cdrom"),
        *("-netdev", "user,id=net0", "-device", "virtio-net-pci,netdev=net0,id=nic"),
        *("-device", "virtio-balloon-pci,id=balloon"),
        *("-device", "i6300esb,id=dog"),
    )
    with Guest(segue, place, "7.2", *more) as guest:
        set = guest.qmp.command
        guest.disk_ready("/dev/sr0")
        limits = {"bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 77, "iops_wr": 78}
        set("block_set_io_throttle", {"device": "one", **limits, "iops_rd_max": 99})
        set("block_resize", {"node-name": "two", "size": 24 << 20})
        set("set_link", {"name": "nic", "up": False})
        set("balloon", {"value": 200 << 20})
        set("migrate-set-parameters", {"downtime-limit": 1234, "max-bandwidth": 9999999})
        xbzrle = {"capability": "xbzrle", "state": True}
        set("migrate-set-capabilities", {"capabilities": [xbzrle]})
        set("set-action", {"watchdog": "none", "shutdown": "pause"})
        set("blockdev-change-medium", {"id": "cdrom", "filename": str(media[1])})
        guest.until("test $(cat /sys/class/net/eth0/carrier 2>/dev/null || echo 0) = 0")
        for release in ROUND:
            guest.upgrade(release)
            by_id = {b["qdev"]: b for b in set("query-block") if b.get("qdev")}
            inserted = next(b["inserted"] for q, b in by_id.items() if "disk1" in q)
            assert {k: inserted[k] for k in limits} == limits
            assert inserted["iops_rd_max"] == 99
            assert guest.run("cat /sys/block/vdb/size") == str((24 << 20) // 512)
            guest.run("ip link set eth0 up")
            assert guest.run("cat /sys/class/net/eth0/carrier") == "0"
            assert set("query-balloon")["actual"] == 200 << 20
            parameters = set("query-migrate-parameters")
            assert parameters["downtime-limit"] == 1234
            assert parameters["max-bandwidth"] == 9999999
            on = [c["capability"] for c in set("query-migrate-capabilities") if c["state"]]
            assert on == ["xbzrle"]
            guest.until("dd if=/dev/sr0 bs=2k count=1 2>/dev/null | grep -q 'medium 1'")
        set("set_link", {"name": "nic", "up": True})
        guest.until("test $(cat /sys/class/net/eth0/carrier) = 1")
        set("eject", {"id": "cdrom", "force": True})
        set("block_set_io_throttle", {"device": "one", **dict.fromkeys(limits, 0)})
        for release in ("10.0", "7.2"):
            guest.upgrade(release)
            by_id = {b["qdev"]: b for b in set("query-block") if b.get("qdev")}
            assert "inserted" not in by_id["cdrom"]
            assert next(b for q, b in by_id.items() if "disk1" in q)["inserted"]["iops_rd"] == 0
        guest.beats()
        guest.shell.send(b"poweroff -f\n")
        wait_until("pause at power-off", lambda: set("query-status")["status"] == "shutdown")


def test_a_port_added_while_running(segue: Segue, place: Path) -> None:
    with Guest(segue, place, "7.2") as guest:
        address = {"type": "unix", "data": {"path": str(place / "extra")}}
        guest.qmp.command(
            "chardev-add",
            {"id": "extra", "backend": {"type": "socket", "data": {"addr": address}}},
        )
        guest.qmp.command("chardev-add", {"id": "nothing", "backend": {"type": "null", "data": {}}})
        guest.qmp.command(
            "device_add", {"driver": "virtconsole", "id": "hvc", "chardev": "extra", "nr": 7}
        )
        client = guest.machine.connect(place / "extra")
        guest.until("test -c /dev/hvc1")
        guest.run("stty raw -echo </dev/hvc1")
        for number, release in enumerate(ROUND):
            guest.upgrade(release)
            guest.run(f"echo out {number} >/dev/hvc1")
            client.expect(f"out {number}".encode())
            client.send(f"in {number}\n".encode())
            assert guest.run("head -n 1 </dev/hvc1") == f"in {number}"
        labels = [c["label"] for c in guest.qmp.command("query-chardev")]
        assert {"extra", "nothing"} <= {*labels}
        guest.device_gone("hvc")
        guest.qmp.command("chardev-remove", {"id": "extra"})
        client.wait(lambda: client.closed or True, "the end")
        guest.upgrade("10.0")
        assert "extra" not in [c["label"] for c in guest.qmp.command("query-chardev")]


def test_what_human_monitors_are_told(segue: Segue, place: Path) -> None:
    """What is typed is seen by nobody but QEMU: it is described from what that tells of it."""
    image = disk(place / "typed.raw")
    monitor = ("-monitor", f"unix:{place}/monitor,server=on,wait=off")
    with Guest(segue, place, "7.2", *monitor) as guest:
        human = guest.machine.connect(place / "monitor")
        for line in (
            f"drive_add 0 if=none,id=typed,file={image},format=raw,cache=none",
            "object_add iothread,id=io7,poll-max-ns=12345",
            "device_add virtio-blk-pci,drive=typed,id=t1,bus=port1,serial=TYPED,iothread=io7",
        ):
            human.send(line.encode() + b"\n")
        guest.disk_ready("/dev/vda")
        assert guest.hmp("netdev_add user,id=spoken") == ""
        assert guest.hmp("device_add virtio-net-pci,netdev=spoken,id=t2,bus=port2,vectors=5") == ""
        assert guest.hmp("object_add rng-builtin,id=random") == ""
        guest.until("test -d /sys/class/net/eth0")
        mac = guest.run("cat /sys/class/net/eth0/address")
        for release in ROUND:
            guest.upgrade(release)
            assert guest.run("cat /sys/block/vda/serial") == "TYPED"
            told = guest.qmp.command("query-iothreads")
            assert [(t["id"], t["poll-max-ns"]) for t in told] == [("io7", 12345)]
            assert guest.run("cat /sys/class/net/eth0/address") == mac
        guest.device_gone("t1")
        guest.upgrade("10.0")
        human.send(b"netdev_add user,id=secret\n")
        wait_until("the back end", lambda: "secret" in guest.hmp("info network"))
        assert any("network 'secret'" in why for why in guest.refused("11.1"))


def test_what_cannot_be_kept_is_refused(segue: Segue, place: Path) -> None:
    image = disk(place / "disk.qcow2", kind="qcow2")
    more = (
        *("-blockdev", f"qcow2,node-name=d,file.driver=file,file.filename={image}"),
        *("-device", "virtio-blk-pci,drive=d,id=disk"),
    )
    with Guest(segue, place, "7.2", *more) as guest:
        do = guest.qmp.command
        do("block-dirty-bitmap-add", {"node": "d", "name": "lost"})
        assert any("dirty bitmap 'lost'" in why for why in guest.refused("10.0"))
        do("block-dirty-bitmap-remove", {"node": "d", "name": "lost"})
        do("block-dirty-bitmap-add", {"node": "d", "name": "kept", "persistent": True})

        address = {"type": "unix", "data": {"path": str(place / "nbd")}}
        do("nbd-server-start", {"addr": address})
        assert any("the NBD server" in why for why in guest.refused("10.0"))
        do("block-export-add", {"type": "nbd", "id": "x", "node-name": "d"})
        assert any("block export 'x'" in why for why in guest.refused("10.0"))
        do("nbd-server-stop")
        wait_until("the end of the export", lambda: not do("query-block-exports"))

        backup = disk(place / "backup.raw")
        do(
            "blockdev-add",
            {
                "driver": "raw",
                "node-name": "b",
                "file": {"driver": "file", "filename": str(backup)},
            },
        )
        do("blockdev-mirror", {"job-id": "m", "device": "d", "target": "b", "sync": "full"})
        assert any("job 'm'" in why for why in guest.refused("10.0"))
        do("block-job-cancel", {"device": "m"})
        wait_until("the end of the job", lambda: not do("query-jobs"))
        do("blockdev-del", {"node-name": "b"})

        do(
            "netdev_add",
            {
                "type": "tap",
                "id": "t",
                "script": "no",
                "downscript": "no",
                "ifname": f"sg{guest.machine.qemu_pid % 100000}",
            },
        )
        assert any("network 't'" in why for why in guest.refused("10.0"))
        do("netdev_del", {"id": "t"})
        guest.upgrade("10.0")
        told = do("query-named-block-nodes", {"flat": True})
        bitmaps = [b["name"] for n in told for b in n.get("dirty-bitmaps", ())]
        assert bitmaps == ["kept"]
        guest.beats()


def test_memory_whose_size_is_asked_for(segue: Segue, place: Path) -> None:
    with Guest(segue, place, "10.0") as guest:
        do = guest.qmp.command
        do("object-add", {"qom-type": "memory-backend-memfd", "id": "vmem", "size": 256 << 20})
        do(
            "device_add",
            {
                "driver": "virtio-mem-pci",
                "id": "vm0",
                "memdev": "vmem",
                "bus": "port2",
                "requested-size": 0,
            },
        )
        guest.run("echo online_movable >/sys/devices/system/memory/auto_online_blocks")
        do("qom-set", {"path": "vm0", "property": "requested-size", "value": 128 << 20})

        def size() -> int:
            devices = do("query-memory-devices")
            return int(devices[0]["data"]["size"])

        wait_until("plugging", lambda: size() == 128 << 20)
        memory = guest.run("grep MemTotal /proc/meminfo")
        for release in ("11.1", "10.0"):
            guest.upgrade(release)
            assert size() == 128 << 20
            assert guest.run("grep MemTotal /proc/meminfo") == memory
        assert any("virtio-mem" in why for why in guest.refused("7.2"))
        do("qom-set", {"path": "vm0", "property": "requested-size", "value": 192 << 20})
        wait_until("plugging more", lambda: size() == 192 << 20)
        do("qom-set", {"path": "vm0", "property": "requested-size", "value": 0})
        wait_until("unplugging all of it", lambda: size() == 0)
        guest.device_gone("vm0")
        do("object-del", {"id": "vmem"})
        guest.upgrade("7.2")
        guest.beats()


def test_usb(segue: Segue, place: Path) -> None:
    image = disk(place / "stick.raw")
    with Guest(segue, place, "7.2", "-device", "qemu-xhci,id=xhci", full=True) as guest:
        do = guest.qmp.command
        do(
            "blockdev-add",
            {
                "driver": "raw",
                "node-name": "stick",
                "file": {"driver": "file", "filename": str(image)},
            },
        )
        do(
            "device_add",
            {"driver": "usb-storage", "id": "u1", "drive": "stick", "bus": "xhci.0", "port": "3"},
        )
        do("device_add", {"driver": "usb-kbd", "id": "u2"})
        guest.disk_ready("/dev/sda")
        guest.write("on the stick", "/dev/sda")
        where = guest.run("readlink -f /sys/block/sda")
        for release in ROUND:
            guest.upgrade(release)
            assert guest.run("readlink -f /sys/block/sda") == where
            guest.run("echo 3 >/proc/sys/vm/drop_caches")
            assert "on the stick" in guest.run("head -c 12 /dev/sda")
        guest.device_gone("u1")
        guest.until("! test -b /dev/sda")
        guest.upgrade("10.0")


def test_every_mode_builds_the_machine_as_it_is_now(segue: Segue, place: Path) -> None:
    with Guest(segue, place, "11.1") as guest:
        guest.plug_disk(disk(place / "hot.raw"), "hot", "disk9", "port2")
        guest.qmp.command(
            "object-add", {"qom-type": "memory-backend-ram", "id": "mem9", "size": 128 << 20}
        )
        guest.qmp.command("device_add", {"driver": "pc-dimm", "id": "dimm9", "memdev": "mem9"})
        guest.disk_ready("/dev/vda")
        guest.write("in every mode", "/dev/vda")
        for mode in ("cpr-transfer", "cpr-exec", "migrate"):
            receipt = guest.machine.handed_over("--to", qemu("11.1"), "--force", "--mode", mode)
            assert receipt["mode"] == mode
            guest.run("echo 3 >/proc/sys/vm/drop_caches")
            assert "in every mode" in guest.run("head -c 13 /dev/vda")
            devices = guest.qmp.command("query-memory-devices")
            assert [d["data"]["id"] for d in devices] == ["dimm9"]
        done = segue("suspend", "linux", "--to", str(place / "suspended"))
        assert done.returncode == 5, done
        assert "what was changed since the start" in done.stderr
        guest.beats()
