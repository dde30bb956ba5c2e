"""Incumbent and successor, compared before the switch: would the guest find the same machine?

An extra device on the successor loads without complaint, and other CPU features do too, so that
QEMU's own checks are not enough. Each side is described by read-only commands, all sent at once;
the incumbent's guest runs meanwhile.

What is compared, and why it is comparable between releases (found on 7.2, 10.0 and 11.1; with the
incumbent's guest booted and the successor fresh, `-S -incoming defer`):

- RAM blocks by name, and their largest size (a resizable block's current size is moved). Firmware
  is such a block too: a successor with other firmware of another size is refused here.
- The root buses as `query-pci` shows them. Bus numbers behind bridges are the guest's doing, and
  a fresh QEMU lists nothing there, so those devices are compared by the next.
- Every device on a bus, the board's too: type, id, bus and the properties that are an address,
  from HMP's `info qtree`. Raw QOM paths are numbered anew in each release (of 318 paths 76 were
  on one side only), while this tree was the same for all machine types that were tried.
  The user's devices without a bus come from /machine/peripheral and peripheral-anon.
- Memory devices with their slots and addresses.
- The block graph: what each drive, and each device with a disk, lies on, and the user's nodes
  (kept/changes/graph.py).
- CPUs: their number, type and place, and on x86 each CPUID word. A word that one release does not
  know counts as 0, which it is for all named models: 11.1's `max` has bits in leaf 0x80000021 for
  which 7.2 has no word, and a guest would see them appear.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from segue.errors import CommandFailed, QemuError
from segue.kept.changes import graph
from segue.qemu.monitor import Monitor

# Board devices that a later release calls by another name, and that load each other's state.
_RENAMED = {"acpi-ged-x86": "acpi-ged"}  # 10.0

# Properties in `info qtree` that say where a device is, of all kinds of buses.
_ADDRESS = frozenset(
    "addr port channel scsi-id lun unit nr nsid cad iobase iobase2 ioport irq index address reg "
    "slot chassis chassis_nr bus_nr node base firstport masterbus".split()
)
_DEV = re.compile(r'dev: (.*), id "(.*)"$')
_PROPERTY = re.compile(r"(\S+) = (.*)$")
_PCI = re.compile(r"class .*, addr \S+, pci id (\S+) \(sub (\S+)\)$")
_USB = re.compile(r"addr \S+, port (\S+), speed ")
_BLOCK = re.compile(
    r"^ *(\S.*?) +\d+ [KMGT]?i?B +0x[0-9a-f]+ +0x[0-9a-f]+ +0x([0-9a-f]+)", re.MULTILINE
)
_UNMAPPED = "mmio ffffffffffffffff/"
# What a CPU object has that is no feature of it, or cannot be read.
_NO_FEATURES = frozenset(("realized", "hotplugged", "hotpluggable", "start-powered-off"))
# Bits that follow from the topology, which is compared: 7.2 sets them as the guest asks, later
# releases in the word itself. HTT and CmpLegacy.
_TOPOLOGY = {"CPUID 0x1.0 EDX": 1 << 28, "CPUID 0x80000001.0 ECX": 1 << 1}

Features = Mapping[str, int | bool]


@dataclass(frozen=True, order=True)
class PciFunction:
    """On a root bus; `ids` are vendor, device, class and, where it has them, the subsystem's."""

    bus: int
    slot: int
    function: int
    ids: tuple[int, ...]

    def __str__(self) -> str:
        where = f"{self.bus:02x}:{self.slot:02x}.{self.function:x}"
        return f"{where} [{' '.join(f'{i:04x}' for i in self.ids)}]"


@dataclass(frozen=True, order=True)
class Device:
    """`address`: texts such as `addr = 03.0`, as QEMU prints them; `bus` is empty for none."""

    type: str
    id: str
    bus: str
    address: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.type} (id {self.id})" if self.id else self.type

    @property
    def where(self) -> str:
        return ", ".join(([self.bus] if self.bus else []) + list(self.address)) or "no bus"


@dataclass(frozen=True)
class Cpu:
    """`features`: CPUID words by `leaf.subleaf register` on x86, else the CPU's properties."""

    type: str
    place: Mapping[str, int]
    features: Features


@dataclass(frozen=True)
class Description:
    machine_type: str
    ram: Mapping[str, int]
    pci: frozenset[PciFunction]
    devices: Counter[Device]
    memory: frozenset[tuple[str, ...]]
    cpus: tuple[Cpu, ...]
    blocks: Counter[str] = field(default_factory=Counter)


async def describe(monitor: Monitor, target: str) -> Description:
    """What the guest of one instance has; `target` is QEMU's name of the architecture.

    Raises QemuError if an answer cannot be understood: nothing is silently left out.
    """
    machine, tree, blocks, pci, memory, cpus, *children = await asyncio.gather(
        monitor.execute("qom-get", {"path": "/machine", "property": "type"}),
        monitor.hmp("info qtree"),
        monitor.hmp("info ramblock"),
        _optional(monitor, "query-pci"),
        _optional(monitor, "query-memory-devices"),
        monitor.execute("query-cpus-fast"),
        *(
            monitor.execute("qom-list", {"path": f"/machine/{folder}"})
            for folder in ("peripheral", "peripheral-anon", "unattached")
        ),
    )
    types = {
        f"/machine/{folder}/{child['name']}": child["type"][len("child<") : -1]
        for folder, listed in zip(
            ("peripheral", "peripheral-anon", "unattached"), children, strict=True
        )
        for child in listed
        if child["type"].startswith("child<")
    }
    devices = parse_qtree(tree)
    ram = parse_ramblock(blocks)
    if not devices or not ram:
        raise QemuError(
            "QEMU's description of its machine is not understood",
            hint="this release prints `info qtree` or `info ramblock` in another way",
        )
    devices.update(_without_bus(types, devices))
    return Description(
        machine_type=machine,
        ram=ram,
        pci=frozenset(_pci(pci)),
        devices=devices,
        memory=frozenset(_memory(memory)),
        cpus=await _cpus(monitor, cpus, types, target),
        blocks=Counter((await graph.read(monitor)).lines()),
    )


def differences(incumbent: Description, successor: Description) -> list[str]:
    """One sentence for each; empty if the guest would find the machine that it knows."""
    found: list[str] = []
    if incumbent.machine_type != successor.machine_type:
        found.append(
            f"machine type: {incumbent.machine_type} on the incumbent, "
            f"{successor.machine_type} on the successor"
        )
    found += _ram_differences(incumbent.ram, successor.ram)
    found += _set_differences("PCI function", incumbent.pci, successor.pci)
    found += _device_differences(incumbent.devices, successor.devices)
    found += _set_differences(
        "memory device",
        {" ".join(words) for words in incumbent.memory},
        {" ".join(words) for words in successor.memory},
    )
    found += _cpu_differences(incumbent.cpus, successor.cpus)
    for here, there, where in (
        (incumbent, successor, "incumbent"),
        (successor, incumbent, "successor"),
    ):
        found += [f"{one} is only on the {where}" for one in sorted(here.blocks - there.blocks)]
    return found


def parse_ramblock(text: str) -> dict[str, int]:
    """Name → largest size in bytes, from HMP's `info ramblock`."""
    return {name: int(size, 16) for name, size in _BLOCK.findall(text)}


def parse_qtree(text: str) -> Counter[Device]:
    """Every device of HMP's `info qtree`, in which each level of bus or device is indented."""
    found: list[tuple[str, str, str, list[str]]] = []
    # What encloses a line: its indentation, and a bus's name or a device's index in `found`.
    path: list[tuple[int, str | int]] = []
    for raw in text.splitlines():
        line = raw.lstrip()
        indent = len(raw) - len(line)
        while path and path[-1][0] >= indent:
            path.pop()
        if line.startswith("bus: "):
            path.append((indent, line[len("bus: ") :]))
        elif match := _DEV.match(line):
            bus = next((name for _, name in reversed(path) if isinstance(name, str)), "")
            path.append((indent, len(found)))
            found.append((_RENAMED.get(match[1], match[1]), match[2], bus, []))
        elif path and isinstance(inside := path[-1][1], int) and (words := _address(line)):
            found[inside][3].append(words)
    return Counter(Device(kind, id, bus, tuple(sorted(at))) for kind, id, bus, at in found)


def _address(line: str) -> str | None:
    if line.startswith("mmio "):
        return None if line.startswith(_UNMAPPED) else line
    if match := _PCI.match(line):
        return f"pci id {match[1]}/{match[2]}"
    # A USB device's address is the guest's doing, the port where it is plugged in is not.
    if match := _USB.match(line):
        return f"on port {match[1]}"
    if (match := _PROPERTY.match(line)) and match[1] in _ADDRESS:
        # A USB device's is what the user asked for, if anything.
        return None if line.startswith('port = "') else line
    return None


def _without_bus(types: Mapping[str, str], known: Iterable[Device]) -> Iterable[Device]:
    on_bus = {(device.type, device.id) for device in known}
    on_bus_types = {device.type for device in known}
    for path, kind in types.items():
        folder, _, name = path.removeprefix("/machine/").partition("/")
        if folder == "peripheral" and (kind, name) not in on_bus:
            yield Device(kind, name, "")
        elif folder == "peripheral-anon" and kind not in on_bus_types:
            yield Device(kind, "", "")


def _pci(buses: Sequence[Mapping[str, Any]] | None) -> Iterable[PciFunction]:
    for bus in buses or ():
        for device in bus["devices"]:
            ids = device["id"]
            numbers = [ids["vendor"], ids["device"], device["class_info"]["class"]]
            numbers += [ids[k] for k in ("subsystem-vendor", "subsystem") if k in ids]
            yield PciFunction(bus["bus"], device["slot"], device["function"], tuple(numbers))


def _memory(devices: Sequence[Mapping[str, Any]] | None) -> Iterable[tuple[str, ...]]:
    for device in devices or ():
        data = device["data"]
        # A virtio-mem's `size` is what the guest has plugged of it at this moment.
        keys = ["id", "addr", "memaddr", "slot", "node", "max-size"]
        keys += [] if device["type"] == "virtio-mem" else ["size"]
        yield (device["type"], *(f"{key}={data[key]}" for key in keys if key in data))


async def _cpus(
    monitor: Monitor, listed: Sequence[Mapping[str, Any]], types: Mapping[str, str], target: str
) -> tuple[Cpu, ...]:
    listed = sorted(listed, key=lambda cpu: cpu["cpu-index"])
    paths = [cpu["qom-path"] for cpu in listed]
    if target in ("x86_64", "i386"):
        features = await asyncio.gather(*(_cpuid(monitor, path) for path in paths))
    else:
        # Dozens of properties, one round trip each; a board gives all its CPUs the same.
        features = [await _properties(monitor, paths[0])] + [{}] * (len(paths) - 1)
    return tuple(
        Cpu(types.get(cpu["qom-path"], ""), cpu.get("props", {}), words)
        for cpu, words in zip(listed, features, strict=True)
    )


async def _cpuid(monitor: Monitor, path: str) -> dict[str, int | bool]:
    words = await monitor.execute("qom-get", {"path": path, "property": "feature-words"})
    return {
        f"CPUID {word['cpuid-input-eax']:#x}.{word.get('cpuid-input-ecx', 0)} "
        f"{word['cpuid-register']}": word["features"]
        for word in words
    }


async def _properties(monitor: Monitor, path: str) -> dict[str, int | bool]:
    listed = await monitor.execute("qom-list", {"path": path})
    names = [
        entry["name"]
        for entry in listed
        if entry["type"] in ("bool", "uint32", "uint64") and entry["name"] not in _NO_FEATURES
    ]
    values = await asyncio.gather(
        *(_optional(monitor, "qom-get", {"path": path, "property": name}) for name in names)
    )
    return {name: value for name, value in zip(names, values, strict=True) if value is not None}


async def _optional(monitor: Monitor, command: str, arguments: dict[str, Any] | None = None) -> Any:
    """None where this board or target has no such thing (query-pci without PCI, say)."""
    try:
        return await monitor.execute(command, arguments)
    except CommandFailed:
        return None


def _ram_differences(incumbent: Mapping[str, int], successor: Mapping[str, int]) -> Iterable[str]:
    for name in sorted(incumbent.keys() | successor.keys()):
        old, new = incumbent.get(name), successor.get(name)
        if old != new:
            yield f"RAM block {name}: {_size(old)} on the incumbent, {_size(new)} on the successor"


def _set_differences(what: str, incumbent: Iterable[Any], successor: Iterable[Any]) -> list[str]:
    old, new = set(incumbent), set(successor)
    return [f"{what} {one} is only on the incumbent" for one in sorted(old - new)] + [
        f"{what} {one} is only on the successor" for one in sorted(new - old)
    ]


def _device_differences(incumbent: Counter[Device], successor: Counter[Device]) -> list[str]:
    # A release may no longer tell where it maps a board device (intel-iommu from 10.0 on), or to
    # which node a virtio-mem belongs (11.1; it is compared as a memory device). Types of which one
    # side tells nothing are compared without it.
    told = [
        {d.type for d in devices if any(map(_is_untold, d.address))}
        for devices in (incumbent, successor)
    ]
    untold = told[0] ^ told[1]
    old = _without_untold(incumbent, untold)
    new = _without_untold(successor, untold)
    gone, added = sorted((old - new).elements()), sorted((new - old).elements())
    found = []
    for device in gone:
        other = next((d for d in added if (d.type, d.id) == (device.type, device.id)), None)
        if other is None:
            found.append(f"device {device} at {device.where} is only on the incumbent")
        else:
            added.remove(other)
            found.append(
                f"device {device}: at {device.where} on the incumbent, "
                f"at {other.where} on the successor"
            )
    return found + [f"device {d} at {d.where} is only on the successor" for d in added]


def _is_untold(address: str) -> bool:
    return address.startswith(("mmio ", "node = "))


def _without_untold(devices: Counter[Device], types: set[str]) -> Counter[Device]:
    result: Counter[Device] = Counter()
    for device, count in devices.items():
        if device.type in types:
            kept = tuple(text for text in device.address if not _is_untold(text))
            result[replace(device, address=kept)] += count
        else:
            result[device] += count
    return result


def _cpu_differences(incumbent: Sequence[Cpu], successor: Sequence[Cpu]) -> list[str]:
    if len(incumbent) != len(successor):
        return [f"CPUs: {len(incumbent)} on the incumbent, {len(successor)} on the successor"]
    # Most often all CPUs differ in the same way, which is said once.
    found: dict[str, list[int]] = {}
    for index, (old, new) in enumerate(zip(incumbent, successor, strict=True)):
        for text in _one_cpu(old, new):
            found.setdefault(text, []).append(index)
    return [
        f"{'each CPU' if len(where) == len(incumbent) else f'CPU {_numbers(where)}'}: {text}"
        for text, where in found.items()
    ]


def _one_cpu(old: Cpu, new: Cpu) -> Iterable[str]:
    if old.type != new.type:
        yield f"{old.type} on the incumbent, {new.type} on the successor"
        return
    for key in sorted(old.place.keys() & new.place.keys()):
        if old.place[key] != new.place[key]:
            yield (f"{key} {old.place[key]} on the incumbent, {new.place[key]} on the successor")
    for name in sorted(old.features.keys() | new.features.keys()):
        if name.startswith("CPUID "):
            seen = ~_TOPOLOGY.get(name, 0)
            before, after = old.features.get(name, 0) & seen, new.features.get(name, 0) & seen
            if before != after:
                yield (
                    f"{name} is {before:#010x} on the incumbent, {after:#010x} on the successor"
                    f"{_bits(' gone', before & ~after)}{_bits(' new', after & ~before)}"
                )
        elif name in old.features and name in new.features:
            before, after = old.features[name], new.features[name]
            if before != after:
                yield f"{name} is {before} on the incumbent, {after} on the successor"


def _bits(what: str, word: int) -> str:
    bits = [str(bit) for bit in range(32) if word >> bit & 1]
    return f",{what}: bit{'s' if len(bits) > 1 else ''} {' '.join(bits)}" if bits else ""


def _numbers(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def _size(size: int | None) -> str:
    if size is None:
        return "none"
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit and size % unit == 0:
            return f"{size // unit} {name}"
    return f"{size} bytes"
