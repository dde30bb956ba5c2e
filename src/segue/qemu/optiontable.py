"""Every option that QEMU 7.2 to 11.1 has, on x86_64 and aarch64 alike.

Taken from qemu-options.hx of 7.2 and 10.0 and from the option table inside Debian's 11.1
binaries. QEMU has one table for all its targets and never changed whether an option takes an
argument; it only added (8.1: run-with, 8.0: perfmap, jitdump, 10.0: shim) and removed (chroot,
runas, async-teardown, no-acpi, no-hpet, singlestep, portrait, rotate, audio-help, old-param),
so one table does for all releases.
"""

from __future__ import annotations

from enum import Enum
from types import MappingProxyType
from typing import NamedTuple


class Syntax(Enum):
    """How the argument is read."""

    PARAMS = "key=value,..."
    CPU = "model,+flag,flag=value"
    GLOBAL = "driver.property=value, or key=value,..."
    TEXT = "one text"


class Known(NamedTuple):
    takes_argument: bool
    syntax: Syntax = Syntax.TEXT
    implied: str | None = None


def _table() -> dict[str, Known]:
    flags = """
        S async-teardown audio-help daemonize enable-kvm enable-sync-profile full-screen help
        jitdump mem-prealloc no-acpi no-fd-bootchk no-hpet no-reboot no-shutdown no-user-config
        nodefaults nographic old-param only-migratable perfmap portrait preconfig s semihosting
        singlestep snapshot usb version win2k-hack xen-attach xen-domid-restrict
    """
    texts = """
        D L append bios cdrom chroot d debugcon dfilter dtb dump-vmstate echr fda fdb g gdb hda
        hdb hdc hdd incoming initrd k kernel loadvm mem-path monitor mtdblock parallel pflash
        pidfile prom-env qmp qmp-pretty qtest qtest-log readconfig rotate runas sd seed serial
        set shim usbdevice uuid vga watchdog-action xen-domid
    """
    params = """
        action add-fd compat drive iscsi msg overcommit rtc run-with smbios spice
    """
    implied = {
        "accel": "accel",
        "acpitable": "data",
        "audio": "driver",
        "audiodev": "driver",
        "blockdev": "driver",
        "boot": "order",
        "chardev": "backend",
        "device": "driver",
        "display": "type",
        "fsdev": "fsdriver",
        "fw_cfg": "name",
        "icount": "shift",
        "m": "size",
        "machine": "type",
        "mon": "chardev",
        "name": "guest",
        "net": "type",
        "netdev": "type",
        "nic": "type",
        "numa": "type",
        "object": "qom-type",
        "option-rom": "romfile",
        "plugin": "file",
        "sandbox": "enable",
        "semihosting-config": "enable",
        "smp": "cpus",
        "tpmdev": "type",
        "trace": "enable",
        "virtfs": "fsdriver",
        "vnc": "vnc",
    }
    return (
        {name: Known(False) for name in flags.split()}
        | {name: Known(True) for name in texts.split()}
        | {name: Known(True, Syntax.PARAMS) for name in params.split()}
        | {name: Known(True, Syntax.PARAMS, key) for name, key in implied.items()}
        | {"cpu": Known(True, Syntax.CPU, "model"), "global": Known(True, Syntax.GLOBAL)}
    )


OPTIONS = MappingProxyType(_table())

# Two spellings of one option.
ALIASES = MappingProxyType({"M": "machine", "h": "help"})

# The groups of a -readconfig file (and of -set) that stand for an option of another name.
GROUPS = MappingProxyType({"memory": "m", "smp-opts": "smp", "boot-opts": "boot"})
