r"""The tiny x86 guest that `segue demo` and the tests upgrade, and a witness of what it says.

    qemu-system-x86_64 -M q35 -m 32 -nodefaults -display none -serial stdio -kernel IMAGE

Runs on pc, q35 and microvm, 8 MiB of RAM or more, TCG or KVM. Source: `x86.s`; `./build`
assembles it. Output format, version 1, on COM1 (on aarch64, where only the tests' twin of this
guest runs, on the PL011). Lines end in ``\r\n``; whatever precedes the banner is the firmware's:

    segue guest x86 1               the banner: machine, version of this format; once for each boot
    nonce 0123abcd tick 00000000    right after the banner and after each 1000th tick
    tick 00000001                   one line for each timer interrupt, about 1000 a second
    got 61                          a byte that it received, in hex
    BAD tick 00001234               RAM that it had written did not read back; not normal, ever

- Ticks are the guest's own interrupts, numbered in its RAM. While nobody reads its output it
  sleeps and numbers on, and catches up later: no number is ever left out. Eight decimal digits,
  so that 99999999 (after 27 hours) is followed by 00000000.
- The nonce is drawn at boot (TSC and clock), is never zero and stands in RAM alone: a guest that
  was started again has another one.
- Each tick checks one of 256 stamped pages, from 2 to 3 MiB of RAM (aarch64: from 2.5 to 3.5 MiB),
  and stamps it anew. The stamps are made of nonce and tick.
- Input is echoed as `got`, 16 bytes a tick at most; what arrives before the banner is lost. Four
  bytes are commands as well: ``q`` powers off (ACPI; isa-debug-exit, which `microvm,acpi=off`
  needs), ``r`` resets (keyboard controller; triple fault), ``h`` stops for good with interrupts
  off, ``p`` panics (isa pvpanic; not on aarch64).
  A command that the machine cannot do costs 32 to 96 late ticks, and the guest counts on.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from segue.guest.witness import Witness

__all__ = ["Witness", "image"]


def image() -> Path:
    """The x86 guest's binary, for QEMU's `-kernel`: an ELF file with multiboot and PVH entries."""
    return Path(str(resources.files(__name__) / "x86.elf"))
