"""The comparison of two machines: what QEMU prints is read right, and each difference is named."""

from __future__ import annotations

import asyncio
import copy
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from segue.errors import CommandFailed, QemuError
from segue.qemu.monitor import Monitor
from segue.upgrade.compare import (
    Cpu,
    Description,
    Device,
    PciFunction,
    describe,
    differences,
    parse_qtree,
    parse_ramblock,
)

# As QEMU prints it, shortened.
TREE = """\
bus: main-system-bus
  type System
  dev: ioapic, id ""
    gpio-in "" 24
    version = 32 (0x20)
    mmio 00000000fec00000/0000000000001000
  dev: acpi-ged-x86, id ""
    mmio ffffffffffffffff/0000000000000018
  dev: q35-pcihost, id ""
    x-config-reg-migration-enabled = true
    bus: pcie.0
      type PCIE
      dev: pcie-root-port, id "rp"
        chassis = 0 (0x0)
        slot = 1 (0x1)
        addr = 04.0
        class PCI bridge, addr 00:04.0, pci id 1b36:000c (sub 0000:0000)
        bar 0: mem at 0xfebd7000 [0xfebd7fff]
        bus: rp
          type PCIE
          dev: virtio-net-pci, id "nic"
            addr = 00.0
            class Ethernet controller, addr 01:00.0, pci id 1af4:1041 (sub 1af4:1100)
            bus: virtio-bus
              type virtio-pci-bus
              dev: virtio-net-device, id ""
                mac = "52:54:00:12:34:56"
      dev: nec-usb-xhci, id ""
        addr = 05.0
        class USB controller, addr 00:05.0, pci id 1033:0194 (sub 1af4:1100)
        bus: usb-bus.0
          type usb-bus
          dev: usb-tablet, id ""
            port = ""
            serial = "42"
            addr 0.1, port 1, speed 480, name QEMU USB Tablet, attached
"""

BLOCKS_7_2 = """\
              Block Name    PSize              Offset               Used              Total
                  pc.ram    4 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000
    /rom@etc/acpi/tables    4 KiB  0x0000000011140000 0x0000000000020000 0x0000000000200000
              a b, c (d)    2 MiB  0x0000000011140000 0x0000000000200000 0x0000000000200000
"""

BLOCKS_11_1 = """\
              Block Name    PSize              Offset               Used              Total\
                HVA  RO
                  pc.ram    4 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000\
 0x00007f95b7e00000  rw
    /rom@etc/acpi/tables    4 KiB  0x0000000011140000 0x0000000000010000 0x0000000000200000\
 0x00007f95b5c00000  ro
              a b, c (d)    2 MiB  0x0000000011140000 0x0000000000200000 0x0000000000200000\
 0x00007f95b5c00000  rw
"""

NIC = Device("virtio-net-pci", "nic", "pcie.0", ("addr = 03.0",))
IOMMU = Device("intel-iommu", "", "main-system-bus", ("mmio fed90000/0230",))


def machine() -> Description:
    cpu = Cpu("qemu64-x86_64-cpu", {"core-id": 0}, {"CPUID 0x1.0 ECX": 1, "CPUID 0x1.0 EDX": 2})
    return Description(
        machine_type="pc-q35-7.2-machine",
        ram={"pc.ram": 512 << 20},
        pci=frozenset([PciFunction(0, 3, 0, (0x1AF4, 0x1000, 0x200))]),
        devices=Counter([NIC, IOMMU]),
        memory=frozenset([("dimm", "id=d0", "slot=0")]),
        cpus=(cpu, replace(cpu, place={"core-id": 1})),
    )


def test_the_tree_of_devices() -> None:
    root = ("addr = 04.0", "chassis = 0 (0x0)", "pci id 1b36:000c/0000:0000", "slot = 1 (0x1)")
    assert parse_qtree(TREE) == Counter(
        [
            Device("ioapic", "", "main-system-bus", ("mmio 00000000fec00000/0000000000001000",)),
            Device("acpi-ged", "", "main-system-bus"),
            Device("q35-pcihost", "", "main-system-bus"),
            Device("pcie-root-port", "rp", "pcie.0", root),
            Device("virtio-net-pci", "nic", "rp", ("addr = 00.0", "pci id 1af4:1041/1af4:1100")),
            Device("virtio-net-device", "", "virtio-bus"),
            Device("nec-usb-xhci", "", "pcie.0", ("addr = 05.0", "pci id 1033:0194/1af4:1100")),
            Device("usb-tablet", "", "usb-bus.0", ("on port 1",)),
        ]
    )


def test_what_the_guest_programs_is_no_difference() -> None:
    booted = TREE.replace("addr 01:00.0", "addr 00:00.0")
    booted = booted.replace("addr 0.1, port", "addr 0.5, port").replace("0xfebd7000", "0xffffffff")
    assert parse_qtree(booted) == parse_qtree(TREE)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("addr = 00.0", "addr = 01.0"),
        ("pci id 1af4:1041", "pci id 1af4:1000"),
        ("00000000fec00000", "00000000fec10000"),
        ("port 1, speed", "port 2, speed"),
        ("dev: usb-tablet", "dev: usb-mouse"),
        ('id "nic"', 'id "nix"'),
        ("bus: rp", "bus: rq"),
        ("slot = 1", "slot = 2"),
    ],
)
def test_what_tells_devices_apart(before: str, after: str) -> None:
    assert before in TREE
    assert parse_qtree(TREE.replace(before, after)) != parse_qtree(TREE)


def test_ram_blocks_of_old_and_new_releases() -> None:
    expected = {"pc.ram": 256 << 20, "/rom@etc/acpi/tables": 2 << 20, "a b, c (d)": 2 << 20}
    assert parse_ramblock(BLOCKS_7_2) == parse_ramblock(BLOCKS_11_1) == expected


def test_the_same_machine() -> None:
    assert differences(machine(), machine()) == []


def changed(**values: Any) -> list[str]:
    return differences(machine(), replace(machine(), **values))


def test_ram() -> None:
    assert changed(ram={"pc.ram": 1 << 30, "x": 3000}) == [
        "RAM block pc.ram: 512 MiB on the incumbent, 1 GiB on the successor",
        "RAM block x: none on the incumbent, 3000 bytes on the successor",
    ]
    assert changed(ram={}) == ["RAM block pc.ram: 512 MiB on the incumbent, none on the successor"]


def test_machine_type() -> None:
    assert changed(machine_type="pc-q35-8.0-machine") == [
        "machine type: pc-q35-7.2-machine on the incumbent, pc-q35-8.0-machine on the successor"
    ]


def test_pci() -> None:
    found = changed(pci=frozenset([PciFunction(0, 3, 0, (0x1AF4, 0x1041, 0x200))]))
    assert found == [
        "PCI function 00:03.0 [1af4 1000 0200] is only on the incumbent",
        "PCI function 00:03.0 [1af4 1041 0200] is only on the successor",
    ]


def test_devices() -> None:
    assert changed(devices=Counter([IOMMU])) == [
        "device virtio-net-pci (id nic) at pcie.0, addr = 03.0 is only on the incumbent"
    ]
    # QEMU itself loads into a successor with a device too many without a word.
    assert changed(devices=Counter([NIC, IOMMU, Device("pc-testdev", "", "isa.0")])) == [
        "device pc-testdev at isa.0 is only on the successor"
    ]
    assert changed(devices=Counter([NIC, NIC, IOMMU])) != []
    assert changed(devices=Counter([replace(NIC, address=("addr = 04.0",)), IOMMU])) == [
        (
            "device virtio-net-pci (id nic): at pcie.0, addr = 03.0 on the incumbent, "
            "at pcie.0, addr = 04.0 on the successor"
        )
    ]


def test_a_board_device_whose_address_a_release_no_longer_tells() -> None:
    assert changed(devices=Counter([NIC, replace(IOMMU, address=())])) == []
    assert changed(devices=Counter([NIC, replace(IOMMU, address=("mmio 1/2",))])) != []
    # That one is silent about one type is no excuse for another.
    moved = replace(NIC, address=("addr = 05.0",))
    assert len(changed(devices=Counter([moved, replace(IOMMU, address=())]))) == 1


def test_memory_devices() -> None:
    assert changed(memory=frozenset([("dimm", "id=d0", "slot=1")])) == [
        "memory device dimm id=d0 slot=0 is only on the incumbent",
        "memory device dimm id=d0 slot=1 is only on the successor",
    ]


def test_cpuid() -> None:
    cpus = machine().cpus
    features = {"CPUID 0x1.0 ECX": 0x30, "CPUID 0x1.0 EDX": 2}
    assert changed(cpus=tuple(replace(cpu, features=features) for cpu in cpus)) == [
        (
            "each CPU: CPUID 0x1.0 ECX is 0x00000001 on the incumbent, 0x00000030 on the successor"
            ", gone: bit 0, new: bits 4 5"
        )
    ]
    assert changed(cpus=(cpus[0], replace(cpus[1], features=features))) == [
        (
            "CPU 1: CPUID 0x1.0 ECX is 0x00000001 on the incumbent, 0x00000030 on the successor, "
            "gone: bit 0, new: bits 4 5"
        )
    ]


def test_a_word_that_one_release_does_not_know() -> None:
    cpus = machine().cpus

    def more(value: int) -> list[str]:
        words = {"CPUID 0x80000021.0 EAX": value}
        return changed(cpus=tuple(replace(c, features={**c.features, **words}) for c in cpus))

    assert more(0) == []
    assert more(0x41) != []


def test_bits_that_follow_from_the_topology() -> None:
    cpus = machine().cpus
    features = {"CPUID 0x1.0 ECX": 1, "CPUID 0x1.0 EDX": 2 | 1 << 28}
    features |= {"CPUID 0x80000001.0 ECX": 2}
    assert changed(cpus=tuple(replace(cpu, features=features) for cpu in cpus)) == []


def test_cpus() -> None:
    one, two = machine().cpus
    assert changed(cpus=(one,)) == ["CPUs: 2 on the incumbent, 1 on the successor"]
    assert changed(cpus=(one, replace(two, place={"core-id": 0, "die-id": 0}))) == [
        "CPU 1: core-id 1 on the incumbent, 0 on the successor"
    ]
    assert changed(cpus=(one, replace(two, type="max-x86_64-cpu"))) == [
        "CPU 1: qemu64-x86_64-cpu on the incumbent, max-x86_64-cpu on the successor"
    ]


def test_properties_of_other_architectures_are_compared_where_both_have_them() -> None:
    arm = Cpu("max-arm-cpu", {}, {"pmu": True, "legacy": 1})
    old = replace(machine(), cpus=(arm,))
    same = replace(old, cpus=(replace(arm, features={"pmu": True, "backcompat": False}),))
    assert differences(old, same) == []
    other = replace(old, cpus=(replace(arm, features={"pmu": False, "legacy": 1}),))
    assert differences(old, other) == [
        "each CPU: pmu is True on the incumbent, False on the successor"
    ]


class Answers(Monitor):
    """A monitor of answers given; what it is asked is kept."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers = answers
        self.asked: list[str] = []

    async def execute(
        self, command: str, arguments: dict[str, Any] | None = None, *_: Any, **__: Any
    ) -> Any:
        self.asked.append(command)
        words = [command, *(str(v) for v in (arguments or {}).values())]
        key = " ".join(words)
        if key not in self.answers:
            raise CommandFailed(f"{key}: not found", error_class="CommandNotFound")
        return copy.deepcopy(self.answers[key])


def answers() -> dict[str, Any]:
    cpu = "/machine/unattached/device[0]"
    return {
        "qom-get /machine type": "microvm-machine",
        "human-monitor-command info qtree": TREE,
        "human-monitor-command info ramblock": BLOCKS_7_2,
        "x-debug-query-block-graph": {
            "nodes": [
                {"id": 1, "type": "block-backend", "name": "vd0"},
                {"id": 2, "type": "block-driver", "name": "#block123"},
            ],
            "edges": [{"parent": 1, "child": 2, "name": "root"}],
        },
        "query-named-block-nodes True": [
            {"node-name": "#block123", "drv": "file", "file": "/disk"},
        ],
        "query-block": [{"device": "vd0", "qdev": "/machine/peripheral-anon/device[0]/x"}],
        "query-cpus-fast": [{"cpu-index": 0, "qom-path": cpu, "props": {"core-id": 0}}],
        "query-memory-devices": [
            {"type": "virtio-mem", "data": {"id": "vm", "memaddr": 1, "max-size": 9, "size": 4}},
            {"type": "dimm", "data": {"id": "d", "addr": 2, "slot": 0, "size": 8}},
        ],
        "qom-list /machine/peripheral": [
            {"name": "nic", "type": "child<virtio-net-pci>"},
            {"name": "d", "type": "child<pc-dimm>"},
            {"name": "type", "type": "string"},
        ],
        "qom-list /machine/peripheral-anon": [
            {"name": "device[0]", "type": "child<usb-tablet>"},
            {"name": "device[1]", "type": "child<loader>"},
        ],
        "qom-list /machine/unattached": [{"name": "device[0]", "type": "child<max-x86_64-cpu>"}],
        f"qom-get {cpu} feature-words": [
            {"cpuid-input-eax": 1, "cpuid-register": "EDX", "features": 5},
            {"cpuid-input-eax": 7, "cpuid-input-ecx": 1, "cpuid-register": "EAX", "features": 6},
        ],
    }


def test_describing_a_board_without_pci() -> None:
    monitor = Answers(answers())
    found = asyncio.run(describe(monitor, "x86_64"))
    assert found.machine_type == "microvm-machine"
    assert found.pci == frozenset()
    assert found.memory == {
        ("virtio-mem", "id=vm", "memaddr=1", "max-size=9"),
        ("dimm", "id=d", "addr=2", "slot=0", "size=8"),
    }
    # The user's devices that are on no bus are added, and no others once more.
    expected = parse_qtree(TREE) + Counter([Device("pc-dimm", "d", ""), Device("loader", "", "")])
    assert found.devices == expected
    features = {"CPUID 0x1.0 EDX": 5, "CPUID 0x7.1 EAX": 6}
    assert found.cpus == (Cpu("max-x86_64-cpu", {"core-id": 0}, features),)
    assert found.blocks == Counter(["drive vd0: file /disk"])


def test_block_graphs_are_compared() -> None:
    old = replace(machine(), blocks=Counter(["drive a: file /x", "drive b: empty"]))
    new = replace(machine(), blocks=Counter(["drive a: file /y", "drive b: empty"]))
    assert differences(old, new) == [
        "drive a: file /x is only on the incumbent",
        "drive a: file /y is only on the successor",
    ]


def test_only_commands_that_change_nothing() -> None:
    monitor = Answers(answers())
    asyncio.run(describe(monitor, "x86_64"))
    for command in monitor.asked:
        assert command.startswith("query-") or command in (
            "qom-get",
            "qom-list",
            "human-monitor-command",
            "x-debug-query-block-graph",
        )


@pytest.mark.parametrize("what", ["info qtree", "info ramblock"])
def test_an_answer_that_is_not_understood_is_no_equality(what: str) -> None:
    given = answers() | {f"human-monitor-command {what}": "unknown command: 'info'"}
    with pytest.raises(QemuError, match="not understood"):
        asyncio.run(describe(Answers(given), "x86_64"))
