"""What a client may say to the QMP server on a real machine: any `id`, and how much of anything."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from segue.qmp.framing import MAX_MESSAGE
from segue.qmp.server import MAX_RELAYED
from tests.qemu.conftest import tiny, unharmed, watch
from tests.qemu.harness import Machine, Segue, qemu, wait_until
from tests.qemu.test_qmp import Raw, begun, closing, qmp

# As text, since 1 and 1.0 and true are equal to Python.
IDS = [
    *("null", "true", "false", "0", "-1", '""', '"a\\u00e9\\n\\u0000\\ud83d\\ude00"', "[]", "{}"),
    *("1.5", "-0.0", "1e+300", "18446744073709551615", "123456789012345678901234567890"),
    *('[1, [2, {"a": null}], []]', '{"b": 1, "a": {"execute": "quit", "id": 2}}'),
    "[" * 500 + "]" * 500,
    json.dumps("x" * 100_000),
]


class Lines:
    """A client that looks at the text of what it is answered."""

    def __init__(self, machine: Machine, *capabilities: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(machine.directory / "qmp.sock"))
        self._file = self.sock.makefile("rb")
        assert b"QMP" in self._file.readline()
        arguments = {"enable": list(capabilities)}
        self.send(json.dumps({"execute": "qmp_capabilities", "arguments": arguments}))
        assert self.line() == '{"return": {}}'

    def send(self, text: str) -> None:
        self.sock.sendall(text.encode())

    def line(self) -> str:
        """The next that is no event; empty at the end."""
        while '"event"' in (line := self._file.readline().decode().strip()):
            pass
        return line

    def close(self) -> None:
        self._file.close()
        self.sock.close()


@pytest.mark.parametrize("capability", ["", "oob"])
def test_any_id_through_an_upgrade(segue: Segue, place: Path, capability: str) -> None:
    """Asked before, while the commands wait and after it: each comes back in the same words."""
    guest = segue.start("guest", tiny(place, "7.2"))
    console = watch(guest, place)
    client = Lines(guest, *filter(None, [capability]))

    def ask() -> None:
        # One that has to wait for the new QEMU, and then the others.
        for id in IDS:
            add = '"qom-type": "rng-builtin", "id": "r"'
            client.send(f'{{"execute": "object-add", "arguments": {{{add}}}, "id": {id}}}')
            client.send(f'{{"id": {id}, "execute": "object-del", "arguments": {{"id": "r"}}}}')

    def answered() -> None:
        for id in IDS:
            for _ in range(2):
                assert client.line() == f'{{"return": {{}}, "id": {id}}}'

    ask()
    answered()
    asking, other, upgrade = begun(guest, "open", "10.0")
    with closing(asking, other):
        ask()
        other.send("x-segue-continue")
        assert asking.answer(upgrade)["return"]["result"] == "done"
        answered()
    guest.handed_over("--to", qemu("11.1"))
    ask()
    answered()
    client.close()
    unharmed(console)


def test_a_message_without_an_end(segue: Segue, place: Path) -> None:
    """100 MB of it: who sends them is told so and dropped. Nobody else notices, nor the memory."""
    guest = segue.start("guest", tiny(place, "7.2"))
    console = watch(guest, place)
    bystander = qmp(guest)
    with closing(bystander):
        before = peak(guest)
        for start, more in ((b'{"execute": "', b"x"), (b'{"id": [', b"1,"), (b"{", b" ")):
            client = Lines(guest)
            sent = 0
            client.send(start.decode())
            with pytest.raises(OSError):
                while sent < 100_000_000:
                    sent += client.sock.send(more * 50_000)
                    assert bystander.command("query-status")["running"]
            assert sent < 2 * MAX_MESSAGE
            told = json.loads(client.line())
            assert told["error"]["desc"] == "JSON token size limit exceeded"
            client.close()
        assert peak(guest) - before < 16 << 10
        guest.handed_over("--to", qemu("10.0"))
        assert bystander.command("query-status")["running"]
    unharmed(console)


def peak(machine: Machine) -> int:
    """The most memory that the supervisor ever took, in KiB."""
    status = Path(f"/proc/{machine.status()['supervisor_pid']}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def test_what_would_take_qemu_long_to_read(segue: Segue, place: Path) -> None:
    """Refused, and its client goes on; of what is just allowed QEMU does all."""
    guest = segue.start("guest", tiny(place, "10.0"))
    client = qmp(guest)
    with closing(client):
        for size in (MAX_RELAYED + 1, MAX_MESSAGE - 1000):
            answer = client.answer(client.send("object-add", secret(size)))
            assert answer["error"]["desc"].startswith("The command object-add has ")
            assert "word" not in objects(client)
        client.command("object-add", secret(MAX_RELAYED - 1000))
        assert "word" in objects(client)


def test_a_command_that_nobody_can_know_of(segue: Segue, place: Path) -> None:
    """QEMU dies with it; that is what its client is told, and it alone."""
    guest = segue.start("guest", tiny(place, "7.2"))
    pid = guest.qemu_pid
    client, other = Lines(guest), Lines(guest)
    os.kill(pid, signal.SIGSTOP)
    client.send('{"execute": "object-add", "arguments": {"qom-type": "x"}, "id": 7}')
    wait_until("its sending", lambda: unread_by(guest) > 50)
    os.kill(pid, signal.SIGKILL)
    told = json.loads(client.line())
    assert told["id"] == 7
    assert "cannot be known" in told["error"]["desc"]
    assert client.line() == other.line() == ""
    client.close()
    other.close()
    guest.wait()


def unread_by(machine: Machine) -> int:
    """Bytes in the queue of QEMU's end of its monitor's socket pair."""
    directory = Path(f"/proc/{machine.qemu_pid}/fd")
    words = machine.status()["instance_command"]
    (fd,) = re.findall(r"id=segue-monitor,fd=(\d+)", " ".join(words))
    inode = os.readlink(directory / fd)
    listed = subprocess.run(["ss", "-xH"], capture_output=True, text=True, check=True).stdout
    return sum(int(line.split()[2]) for line in listed.splitlines() if inode[8:-1] in line.split())


def secret(size: int) -> dict[str, Any]:
    return {"qom-type": "secret", "id": "word", "data": "x" * size}


def objects(client: Raw) -> list[str]:
    return [each["name"] for each in client.command("qom-list", {"path": "/objects"})]
