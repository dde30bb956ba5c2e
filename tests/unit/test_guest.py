import shutil
import subprocess
from pathlib import Path

import pytest

from segue import guest
from segue.guest import Witness

AARCH64 = Path(__file__).parents[1] / "guests" / "aarch64"
# (committed binary, its build script, the assembler that the script calls)
BUILDS = [
    pytest.param(guest.image(), guest.image().with_name("build"), id="x86"),
    # What only tests use is checked where its cross assembler is; `make setup` installs it.
    *(
        [pytest.param(AARCH64 / "guest.bin", AARCH64 / "build", id="aarch64")]
        if shutil.which("aarch64-linux-gnu-as")
        else []
    ),
]

BOOT = b"\r\nsegue guest x86 1\r\nnonce 0badcafe tick 00000000\r\n"


def ticks(*numbers: int) -> bytes:
    return b"".join(b"tick %08d\r\n" % number for number in numbers)


@pytest.mark.parametrize(("binary", "build"), BUILDS)
def test_the_binary_comes_from_the_source(binary: Path, build: Path, tmp_path: Path) -> None:
    output = tmp_path / "guest"
    subprocess.run([build, output], check=True)
    assert output.read_bytes() == binary.read_bytes(), f"run {build}"


@pytest.mark.parametrize(("binary", "build"), BUILDS)
def test_it_is_tiny(binary: Path, build: Path) -> None:
    assert build.is_file()
    assert 0 < binary.stat().st_size < 4096


def test_the_image_can_be_booted_both_ways() -> None:
    image = guest.image().read_bytes()
    assert image.startswith(b"\x7fELF\x01")
    assert b"\x02\xb0\xad\x1b\0\0\0\0\xfe\x4f\x52\xe4" in image, "multiboot magic and checksum"
    assert b"\x12\0\0\0Xen\0" in image, "PVH's note"


def test_a_witness_of_a_sound_guest_has_nothing_to_say() -> None:
    witness = Witness()
    witness.feed(b"\x1bcSeaBIOS\r\n" + BOOT + ticks(1, 2) + b"got 61\r\ngot 0d\r\n" + ticks(3))
    assert witness.faults == []
    assert (witness.tick, witness.ticks) == (3, 3)
    assert (witness.nonce, witness.nonces) == ("0badcafe", 1)
    assert witness.heard == b"a\r"


def test_a_witness_does_not_mind_how_the_output_is_cut() -> None:
    output = BOOT + ticks(*range(1, 1001)) + b"nonce 0badcafe tick 00001000\r\n"
    witness = Witness()
    for start in range(0, len(output), 7):
        witness.feed(output[start : start + 7])
    assert (witness.tick, witness.nonces, witness.faults) == (1000, 2, [])


@pytest.mark.parametrize("cut", range(len("tick 00000041\r\n") + 1))
def test_a_witness_may_come_late(cut: int) -> None:
    witness = Witness()
    witness.feed(ticks(41)[cut:] + ticks(42, 43) + b"nonce 0badcafe tick 00000043\r\n")
    assert (witness.tick, witness.nonce, witness.faults) == (43, "0badcafe", [])


def test_the_counter_wraps() -> None:
    witness = Witness()
    witness.feed(ticks(99_999_999, 0, 1))
    assert witness.faults == []


@pytest.mark.parametrize(
    ("output", "fault"),
    [
        (ticks(1, 3), "tick 3 came after tick 1"),
        (ticks(1, 1), "tick 1 came after tick 1"),
        (ticks(1) + b"tick 0000002\r\n", "not a line of the guest: b'tick 0000002\\r'"),
        (ticks(1) + b"tick 00000002\n", "not a line of the guest: b'tick 00000002'"),
        (ticks(1) + b"\r\n", "not a line of the guest: b'\\r'"),
        (ticks(1) + b"BAD tick 00000002\r\n", "lost RAM, seen at tick 2"),
        (
            ticks(1) + b"nonce 0badcafe tick 00000002\r\n",
            "the nonce's tick 2 came after tick 1",
        ),
        (
            ticks(1) + b"nonce 12345678 tick 00000001\r\n",
            "nonce 0badcafe became 12345678 at tick 1",
        ),
    ],
)
def test_a_witness_sees(output: bytes, fault: str) -> None:
    witness = Witness()
    witness.feed(BOOT + output)
    assert witness.faults == [fault]


def test_a_reboot_cannot_pass_for_an_upgrade() -> None:
    witness = Witness()
    witness.feed(BOOT + ticks(1, 2) + b"segue guest x86 1\r\nnonce 12345678 tick 00000000\r\n")
    witness.feed(ticks(1, 2))
    assert witness.faults == ["booted again after tick 2"]
    assert witness.nonce == "12345678"
