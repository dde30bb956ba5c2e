"""The VNC display moves with the guest: its address, its name and its password."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.qemu.conftest import tiny, unharmed, watch
from tests.qemu.harness import Segue, qemu
from tests.qemu.viewer import Refused, Viewer, free_display


def test_a_name_and_a_password(segue: Segue, place: Path) -> None:
    port = free_display()
    vnc = f"127.0.0.1:{port - 5900},password=on"
    argv = tiny(place, "7.2", "-name", "blue", "-device", "VGA", "-vnc", vnc)
    guest = segue.start("guest", argv)
    console = watch(guest, place)
    with guest.qmp() as qmp:
        qmp.command("change-vnc-password", {"password": "word0"})
        for number, release in enumerate(("10.0", "11.1", "7.2")):
            before = Viewer(port, f"word{number}")
            guest.handed_over("--to", qemu(release))
            unharmed(console)
            before.ended()
            viewer = Viewer(port, f"word{number}")
            assert viewer.name == "QEMU (blue)"
            viewer.close()
            for wrong in (None, "wrong"):
                with pytest.raises(Refused):
                    Viewer(port, wrong).close()
            if number:
                word = {"protocol": "vnc", "password": f"word{number + 1}"}
                qmp.command("set_password", word)
            else:
                line = f"set_password vnc word{number + 1}"
                qmp.command("human-monitor-command", {"command-line": line})


def test_an_address_that_was_changed_and_a_password_that_expired(segue: Segue, place: Path) -> None:
    port, other = free_display(), free_display()
    vnc = f"127.0.0.1:{port - 5900},password=on"
    guest = segue.start("guest", tiny(place, "7.2", "-device", "VGA", "-vnc", vnc))
    with guest.qmp() as qmp:
        address = {"type": "inet", "host": "127.0.0.1", "port": str(other)}
        qmp.command("display-update", {"type": "vnc", "addresses": [address]})
        qmp.command("set_password", {"protocol": "vnc", "password": "word"})
        guest.handed_over("--to", qemu("10.0"))
        Viewer(other, "word").close()
        with pytest.raises(ConnectionRefusedError):
            Viewer(port, "word").close()
        qmp.command("expire_password", {"protocol": "vnc", "time": "now"})
        guest.handed_over("--to", qemu("11.1"))
        with pytest.raises(Refused):
            Viewer(other, "word").close()
