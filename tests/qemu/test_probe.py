"""Real releases: probed, compared with each other, and found outdated."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from segue.errors import Refused
from segue.qemu import mapped
from segue.qemu.binary import missing_devices, probe
from segue.qemu.monitor import Monitor
from segue.upgrade.compare import Description, describe, differences
from tests.qemu.harness import processes_with, qemu, wait_until

RELEASES = ("7.2", "10.0", "11.1")


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No test leaves a process; those that it starts are known by their environment."""
    variable = f"SEGUE_PROBE_TEST={tmp_path}"
    monkeypatch.setenv(*variable.split("=", 1))

    def others() -> list[int]:
        return [pid for pid in processes_with(variable) if pid != os.getpid()]

    yield
    wait_until("the end of all that was started", lambda: not others(), 10)


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("target", ["x86_64", "aarch64"])
@pytest.mark.parametrize("release", RELEASES)
def test_what_each_release_is(release: str, target: str, tmp_path: Path) -> None:
    """Scripts all, one with a dynamic loader; beside them lie modules of another release."""
    path = qemu(release, target)
    binary = asyncio.run(probe(path, cache_dir=tmp_path))
    assert str(binary.path) == path
    assert ".".join(map(str, binary.version[:2])) == release
    assert binary.version_text.startswith(release)
    assert binary.target == target
    assert binary.has_ignore_shared
    assert binary.has_pause_before_switchover
    assert binary.has_late_block_activate
    assert binary.has_display_update
    assert binary.deferred_irqfd is (release != "7.2")
    assert "none" in binary.displays
    name, alias = ("pc-q35-7.2", "q35") if target == "x86_64" else ("virt-7.2", "virt")
    machine, newest = binary.machine(name), binary.machine(alias)
    assert machine is not None
    assert newest is not None
    assert machine.default_ram_id == newest.default_ram_id
    assert newest.alias == alias
    assert newest.name.endswith(f"-{release}")
    assert ("qemu64" if target == "x86_64" else "cortex-a57") in binary.cpu_models
    # Of the file itself, as another reader has it, and not of the script or the loader.
    real = Path(path).parent / f"root/usr/bin/qemu-system-{target}"
    notes = subprocess.check_output(["readelf", "-n", real], text=True)
    assert f"Build ID: {binary.build_id}\n" in notes


def test_the_cache(tmp_path: Path) -> None:
    path = qemu("10.0")
    first = asyncio.run(probe(path, cache_dir=tmp_path))
    (file,) = tmp_path.iterdir()
    assert file.name == f"{first.build_id}.json"
    assert asyncio.run(probe(path, cache_dir=tmp_path)) == first
    written = file.read_text()
    file.write_text(json.dumps(json.loads(written) | {"displays": ["from-the-cache"]}))
    assert asyncio.run(probe(path, cache_dir=tmp_path)).displays == {"from-the-cache"}
    for damage in (
        written[:-100],
        "[]",
        json.dumps(json.loads(written) | {"format": 0}),
        json.dumps(json.loads(written) | {"version": "10.0.3"}),
        json.dumps(json.loads(written) | {"machines": [{"name": "q35"}]}),
        json.dumps(json.loads(written) | {"commands": None}),
    ):
        file.write_text(damage)
        assert asyncio.run(probe(path, cache_dir=tmp_path)) == first
        assert file.read_text() == written


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    asyncio.run(probe(qemu("10.0"), cache_dir=tmp_path / "file/probe"))
    assert (tmp_path / "file").read_text() == ""


def test_a_script_that_starts_qemu_as_its_child(tmp_path: Path) -> None:
    path = script(tmp_path / "qemu", f'{qemu("7.2")} "$@"\nexit $?')
    with pytest.raises(Refused, match="does not become QEMU") as caught:
        asyncio.run(probe(path, cache_dir=tmp_path / "cache"))
    assert "exec" in (caught.value.hint or "")


def test_a_stopped_qemu(tmp_path: Path) -> None:
    """It hangs before it has answered, and is killed all the same."""
    path = script(tmp_path / "qemu", f'kill -STOP $$\nexec {qemu("7.2")} "$@"')
    with pytest.raises(Refused, match="did not answer within"):
        asyncio.run(probe(path, limit=0.5, cache_dir=tmp_path / "cache"))


def test_the_first_words_of_a_qemu_that_fails(tmp_path: Path) -> None:
    path = script(tmp_path / "qemu", f'exec {qemu("7.2")} -device nonsense "$@"')
    with pytest.raises(Refused, match="'nonsense' is not a valid device model name"):
        asyncio.run(probe(path, cache_dir=tmp_path / "cache"))


@pytest.mark.parametrize("release", RELEASES)
def test_devices_that_a_release_lacks(release: str) -> None:
    types = ["virtio-blk-pci", "sga", "igb", "nonsense", "virtio-vga"]
    missing = asyncio.run(missing_devices(Path(qemu(release)), types))
    # igb came with 8.0, sga went with 8.0.
    assert missing == (["igb", "nonsense"] if release == "7.2" else ["nonsense", "sga"])


# ---------------------------------------------------------------------------------------------
# Machines of all kinds, described by each release.

DISK = "-drive if=none,id=d,file=/dev/zero,format=raw,readonly=on"
FIRMWARE = f"{Path(qemu('7.2')).parent}/root/usr/share/seabios/bios-microvm.bin"
MACHINES = {
    "q35": ("x86_64", f"""-M pc-q35-7.2 -m 128 -smp 2 -device pcie-root-port,id=rp,slot=1
        -device virtio-net-pci,bus=rp,id=nic -device nec-usb-xhci -device usb-tablet
        -device virtio-scsi-pci,id=scsi -device scsi-cd,bus=scsi.0 -device virtio-serial
        -chardev null,id=c -device virtconsole,chardev=c {DISK}
        -device virtio-blk-pci,drive=d,id=disk"""),
    "pc": ("x86_64", f"""-M pc-i440fx-7.2 -m 128 -cpu Nehalem -usb -device usb-tablet {DISK}
        -device lsi53c895a -device scsi-hd,drive=d -device pvpanic
        -device pci-bridge,chassis_nr=1,id=bridge -device e1000,bus=bridge,addr=3"""),
    "q35-memory": ("x86_64", """-M pc-q35-7.2 -smp 1,sockets=4,maxcpus=4
        -m 128,slots=4,maxmem=2G -object memory-backend-ram,id=more,size=128M
        -device pc-dimm,memdev=more,id=dimm -device intel-iommu
        -device qemu64-x86_64-cpu,socket-id=1,core-id=0,thread-id=0,id=cpu
        -device pxb-pcie,bus_nr=20,id=pxb"""),
    # Firmware of one release: other bytes would be another machine, and are told as that.
    "microvm": ("x86_64", f"""-M microvm -bios {FIRMWARE} -m 128 -smp 2 {DISK}
        -device virtio-blk-device,drive=d -device virtio-net-device"""),
    "virt": ("aarch64", f"""-M virt-7.2 -cpu cortex-a57 -m 128 -smp 2 {DISK}
        -device virtio-blk-pci,drive=d -device virtio-net-device
        -device usb-ehci -device usb-kbd"""),
}  # fmt: skip


@contextlib.contextmanager
def running(path: str | Path, *arguments: str) -> Iterator[tuple[int, socket.socket]]:
    """A QEMU's pid, and our end of its monitor."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        monitor = ["-chardev", f"socket,id=m,fd={theirs.fileno()}", "-qmp", "chardev:m"]
        argv = [path, "-display", "none", *arguments, *monitor]
        process = subprocess.Popen(argv, pass_fds=[theirs.fileno()], stderr=subprocess.DEVNULL)
        try:
            theirs.close()
            yield process.pid, ours
        finally:
            process.kill()
            process.wait()


def description(
    release: str, target: str, arguments: str, until: Callable[[str], bool] | None = None
) -> Description:
    """Of a fresh successor, or of an incumbent that runs until its `info pci` is like this."""

    async def described(end: socket.socket) -> Description:
        monitor = await Monitor.connect(end)
        try:
            while until and not until(await monitor.hmp("info pci")):  # noqa: ASYNC110
                await asyncio.sleep(0.01)  # no event tells what firmware does
            return await describe(monitor, target)
        finally:
            monitor.close()

    waiting = [] if until else ["-S", "-incoming", "defer"]
    with running(qemu(release, target), *arguments.split(), *waiting) as (_, end):
        return asyncio.run(described(end))


@pytest.mark.parametrize("kind", MACHINES)
def test_the_same_machine_on_every_release(kind: str) -> None:
    target, arguments = MACHINES[kind]
    found = {release: description(release, target, arguments) for release in RELEASES}
    for one in RELEASES:
        for other in RELEASES:
            assert differences(found[one], found[other]) == [], f"{one} → {other}"


@pytest.mark.parametrize("kind", ["q35", "pc"])
def test_a_running_guest_has_programmed_its_buses(kind: str) -> None:
    target, arguments = MACHINES[kind]
    # Firmware has numbered what is behind the bridges; a fresh QEMU shows zeros.
    incumbent = description("7.2", target, arguments, lambda pci: "secondary bus 1." in pci)
    assert differences(incumbent, description("11.1", target, arguments)) == []


PORT = "-device pcie-root-port,id=rp"


@pytest.mark.parametrize(
    ("incumbent", "successor", "words"),
    [
        ("-m 128", "-m 256", "RAM block pc.ram: 128 MiB on the incumbent, 256 MiB on"),
        ("-device virtio-rng-pci", "", "virtio-rng-pci at pcie.0"),
        ("", "-device virtio-rng-pci", "is only on the successor"),
        ("-device nvme,serial=x,id=n,addr=9", "-device nvme,serial=x,id=n,addr=a", "nvme (id n)"),
        (f"{PORT} -device nvme,serial=x,bus=rp", PORT, "device nvme at rp, addr = 00.0"),
        (
            f"{PORT} -device virtio-rng-pci,bus=rp",
            f"{PORT} -device virtio-balloon-pci,bus=rp",
            "virtio-balloon-pci at rp",
        ),
        ("-usb -device usb-kbd", "-usb -device usb-kbd,port=2", "device usb-kbd: at usb-bus.0"),
        ("-device pvpanic,ioport=0x505", "-device pvpanic,ioport=0x506", "pvpanic"),
        ("-smp 1", "-smp 2", "CPUs: 1 on the incumbent, 2 on the successor"),
        ("-smp 2,cores=2", "-smp 2,sockets=2", "CPU 1: core-id"),
        ("-cpu qemu64", "-cpu qemu64,+avx", "CPUID 0x1.0 ECX"),
        ("-cpu qemu64", "-cpu Nehalem", "Nehalem-x86_64-cpu on the successor"),
        ("-cpu max", "-cpu max", "each CPU: CPUID 0x7.0 EBX"),
    ],
)
def test_a_difference_is_named(incumbent: str, successor: str, words: str) -> None:
    base = "-M pc-q35-7.2 "
    old = description("7.2", "x86_64", base + incumbent)
    found = differences(old, description("11.1", "x86_64", base + successor))
    assert any(words in text for text in found), found


def test_another_machine_type() -> None:
    old = description("7.2", "x86_64", "-M pc-q35-7.2")
    found = differences(old, description("11.1", "x86_64", "-M pc-i440fx-7.2"))
    assert "machine type: pc-q35-7.2-machine on the incumbent, pc-i440fx-7.2" in found[0]


def test_an_arm_cpu_without_its_pmu() -> None:
    base = "-M virt-7.2 -cpu cortex-a57,pmu="
    old = description("7.2", "aarch64", base + "on")
    found = differences(old, description("11.1", "aarch64", base + "off"))
    assert found == ["each CPU: pmu is True on the incumbent, False on the successor"]


# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda copy: shutil.copy(qemu("10.0"), copy), "has changed"),
        (lambda copy: os.utime(copy, (1, 1)), None),
    ],
)
def test_outdated(tmp_path: Path, change: Callable[[Path], object], reason: str | None) -> None:
    path = Path(shutil.copy(qemu("11.1"), tmp_path / "qemu"))
    with running(path, "-M", "q35", "-S") as (pid, end):
        assert b"QMP" in end.recv(4096)
        started = mapped.remember(path, pid)
        assert started is not None
        # Neither the script nor the loader that the script executes.
        assert started.path.endswith("/root/usr/bin/qemu-system-x86_64")
        assert mapped.outdated(pid, path, started) is None
        change(path)
        assert mapped.outdated(pid, path, started) == (reason and f"{path} {reason}")
