"""Clients of QMP through upgrades: none is disconnected, each command is answered exactly once."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import ExecuteError

from tests.qemu.conftest import tiny, unharmed, watch
from tests.qemu.harness import LIMIT, Machine, Segue, qemu, wait_until

ROUND = ("10.0", "11.1", "7.2")


class Raw:
    """A client that speaks as libvirt does: several commands outstanding, `id` strings, lines.

    `answers` has every message with an id, by id; `events` the others.
    """

    def __init__(self, sock: socket.socket, name: str = "libvirt") -> None:
        self._sock = sock
        self._name = name
        self._sent = 0
        self.asked: list[str] = []
        self.order: list[str] = []
        self.answers: dict[str, dict[str, Any]] = {}
        self.events: list[dict[str, Any]] = []
        self.greeting: dict[str, Any] = {}
        self.closed = False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        self.wait(lambda: self.greeting)
        assert self.command("qmp_capabilities") == {}

    @classmethod
    def unix(cls, path: Path, name: str = "libvirt") -> Raw:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(path))
        return cls(sock, name)

    def _read(self) -> None:
        decoder, text = json.JSONDecoder(), ""
        while True:
            try:
                chunk = self._sock.recv(65536)
            except OSError:
                chunk = b""
            text += chunk.decode()
            with self._change:
                while text := text.lstrip():
                    try:
                        message, end = decoder.raw_decode(text)
                    except ValueError:
                        break
                    text = text[end:]
                    self._take(message)
                self.closed = not chunk
                self._change.notify_all()
            if not chunk:
                return

    def _take(self, message: dict[str, Any]) -> None:
        if "QMP" in message:
            self.greeting = message
        elif "id" in message:
            self.order.append(message["id"])
            self.answers[message["id"]] = message
        else:
            self.events.append(message)

    def send(self, command: str, arguments: dict[str, Any] | None = None, **more: Any) -> str:
        self._sent += 1
        name = f"{self._name}-{self._sent}"
        message = {"execute": command, "id": name} | ({"arguments": arguments} if arguments else {})
        self.asked.append(name)
        self._sock.sendall(json.dumps(message).encode() + b"\r\n")
        return name

    def wait(self, condition: Any, limit: float = LIMIT) -> None:
        with self._change:
            assert self._change.wait_for(condition, limit), (self.asked[-3:], self.order[-3:])

    def answer(self, name: str) -> dict[str, Any]:
        self.wait(lambda: name in self.answers or self.closed)
        return self.answers[name]

    def command(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        answer = self.answer(self.send(command, arguments))
        assert "return" in answer, answer
        return answer["return"]

    def names(self) -> list[str]:
        return [event["event"] for event in self.events]

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        self._thread.join(LIMIT)


def qmp(machine: Machine, name: str = "libvirt") -> Raw:
    return Raw.unix(machine.directory / "qmp.sock", name)


@contextlib.contextmanager
def closing(*clients: Raw) -> Iterator[None]:
    try:
        yield
    finally:
        for client in clients:
            client.close()


def test_qemu_qmps_own_client_through_three_upgrades(segue: Segue, place: Path) -> None:
    guest = segue.start("guest", tiny(place, "7.2"))
    console = watch(guest, place)
    with guest.qmp() as client:
        for release in ROUND:
            client.events.clear()
            guest.handed_over("--to", qemu(release))
            version = client.command("query-version")["qemu"]
            assert f"{version['major']}.{version['minor']}" == release
            client.event(phase="retire", state="end")
            # Of an upgrade a client is told once, and never what it was made of.
            assert {event["event"] for event in client.events} == {"SEGUE_UPGRADE"}
        with pytest.raises(ExecuteError, match="nope"):
            client.command("nope")
        client.events.clear()
        client.command("stop")
        client.command("cont")
        wait_until("events", lambda: len(client.events) == 2)
        assert [event["event"] for event in client.events] == ["STOP", "RESUME"]
    unharmed(console)


def test_libvirts_way_through_three_upgrades(segue: Segue, place: Path) -> None:
    """Many commands outstanding all the while, answered in their order, each once."""
    guest = segue.start("guest", tiny(place, "7.2"))
    console = watch(guest, place)
    client = qmp(guest)
    with closing(client):
        for release in ROUND:
            upgrade = threading.Thread(target=guest.handed_over, args=("--to", qemu(release)))
            upgrade.start()
            while upgrade.is_alive():
                names = [client.send("query-status") for _ in range(5)]
                names.append(client.send("qom-get", {"path": "/machine", "property": "type"}))
                for name in names:
                    assert "return" in client.answer(name)
            upgrade.join()
        assert client.order == client.asked
        assert "STOP" not in client.names() and "RESUME" not in client.names()
        assert client.greeting["QMP"]["version"]["qemu"]["major"] == 7
    unharmed(console)


def test_qmp_shell_through_three_upgrades(segue: Segue, place: Path) -> None:
    guest = segue.start("guest", tiny(place, "7.2"))
    console = watch(guest, place)
    ours, theirs = pty.openpty()
    shell = subprocess.Popen(
        [sys.executable, "-m", "segue", "qmp", "guest"],
        env={**segue.environment, "HOME": str(place), "TERM": "dumb"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    terminal = Terminal(ours)
    try:
        terminal.expect(rb"\(QEMU\) ")
        for release in ROUND:
            guest.handed_over("--to", qemu(release))
            terminal.say("query-version")
            major, _, minor = release.partition(".")
            terminal.expect(
                rb'"major": %b\b.*"minor": %b\b|"minor": %b\b.*"major": %b\b'
                % (major.encode(), minor.encode(), minor.encode(), major.encode())
            )
        terminal.say("")
        # Ctrl-D means the end to the line editor only, so not before its prompt.
        terminal.expect(rb"SEGUE_UPGRADE.*\(QEMU\) $")
        os.write(ours, b"\x04")
        assert shell.wait(LIMIT) == 0
    finally:
        if shell.poll() is None:
            shell.kill()
            shell.wait()
        terminal.close()
    unharmed(console)


class Terminal:
    """The other side of a pty, read all the time."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._data = bytearray()
        self._seen = 0
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while True:
            try:
                chunk = os.read(self._fd, 65536)
            except OSError:
                return
            with self._change:
                self._data += chunk
                self._change.notify_all()

    def say(self, line: str) -> None:
        self._seen = len(self._data)
        os.write(self._fd, line.encode() + b"\n")

    def expect(self, pattern: bytes) -> None:
        compiled = re.compile(pattern, re.DOTALL)
        with self._change:
            assert self._change.wait_for(lambda: compiled.search(self._data, self._seen), LIMIT), (
                bytes(self._data[self._seen :])
            )

    def close(self) -> None:
        self._thread.join(LIMIT)
        os.close(self._fd)


class Asker(threading.Thread):
    """A client that asks without end, and knows what every answer must be.

    Each round it makes an object, looks at it, and takes it away again. One that was made twice, or
    by a QEMU whose work was then thrown away, is an error at the next step.
    """

    def __init__(self, client: Raw, number: int) -> None:
        super().__init__(daemon=True)
        self.client = client
        self.number = number
        self.rounds = 0
        self.wrong: list[Any] = []
        self.ending = threading.Event()

    def run(self) -> None:
        client = self.client
        while not self.ending.is_set():
            name = f"object-{self.number}-{self.rounds}"
            path = f"/objects/{name}"
            made = {"qom-type": "rng-random", "id": name, "filename": "/dev/null"}
            asked = [
                client.send("object-add", made),
                client.send("qom-get", {"path": path, "property": "filename"}),
                client.send("query-status"),
                client.send("object-del", {"id": name}),
            ]
            answers = [client.answer(each) for each in asked]
            self.wrong += [answer for answer in answers if "return" not in answer]
            if not self.wrong and answers[1]["return"] != "/dev/null":
                self.wrong.append(answers[1])
            if not self.wrong and not answers[2]["return"]["running"]:
                self.wrong.append(answers[2])
            self.rounds += 1


def test_ten_clients_fire_through_twenty_upgrades(segue: Segue, place: Path) -> None:
    upgrades = 20
    guest = segue.start("guest", tiny(place, "7.2"))
    console = watch(guest, place)
    clients = [qmp(guest, f"client{number}") for number in range(10)]
    with closing(*clients):
        askers = [Asker(client, number) for number, client in enumerate(clients)]
        for asker in askers:
            asker.start()
        for number in range(upgrades):
            guest.handed_over("--to", qemu(ROUND[number % 3]))
        for asker in askers:
            asker.ending.set()
            asker.join(LIMIT)
        for asker, client in zip(askers, clients, strict=True):
            assert asker.wrong == []
            assert asker.rounds > upgrades
            assert not client.closed
            assert client.order == client.asked
            assert set(Counter(client.order).values()) == {1}
            assert {"STOP", "RESUME"}.isdisjoint(client.names())
    unharmed(console)


def begun(guest: Machine, phase: str, release: str) -> tuple[Raw, Raw, str]:
    """An upgrade that stands at the beginning of a phase: who asked for it, and somebody else."""
    asking, other = qmp(guest, "asking"), qmp(guest, "other")
    upgrade = asking.send("segue-upgrade", {"to": qemu(release), "force": True, "x-break": [phase]})
    asking.wait(
        lambda: any(
            event["event"] == "SEGUE_UPGRADE"
            and event["data"] == {"phase": phase, "state": "break"}
            for event in asking.events
        )
    )
    return asking, other, upgrade


@pytest.mark.parametrize("phase", ["open", "hold", "move", "commit"])
def test_what_would_change_the_machine_waits(segue: Segue, place: Path, phase: str) -> None:
    """Neither lost nor done by the QEMU that goes: the new one does it, and answers."""
    monitor = f"unix:{place}/monitor,server=on,wait=off"
    guest = segue.start("guest", tiny(place, "7.2", "-monitor", monitor))
    console = watch(guest, place)
    human = guest.connect(place / "monitor")
    human.expect(rb"\(qemu\) ")
    asking, other, upgrade = begun(guest, phase, "10.0")
    with closing(asking, other):
        made = {"qom-type": "rng-random", "id": "late", "filename": "/dev/null"}
        changing = other.send("object-add", made)
        reading, continuing = qmp(guest, "reading"), qmp(guest, "continuing")
        with closing(reading, continuing):
            read = reading.send("query-name")
            seen = len(human.data)
            human.send(b"stop\n")
            if phase in ("open", "hold"):
                # What changes nothing is answered at once, by the QEMU that runs the guest.
                assert "return" in reading.answer(read)
            assert changing not in other.answers
            continuing.send("x-segue-continue")
            assert asking.answer(upgrade)["return"]["result"] == "done"
            assert "return" in reading.answer(read)
            assert "return" in other.answer(changing)
            names = [entry["name"] for entry in other.command("qom-list", {"path": "/objects"})]
            assert names.count("late") == 1
            # The line typed at the human monitor was not lost either.
            human.expect(rb"stop", seen)
            wait_until(
                "the guest's stop", lambda: other.command("query-status")["status"] == "paused"
            )
            other.command("cont")
    unharmed(console)


def test_a_human_monitor_keeps_its_line(segue: Segue, place: Path) -> None:
    """A client with half a line typed sees neither a new banner nor its line gone."""
    monitor = f"unix:{place}/monitor,server=on,wait=off"
    guest = segue.start("guest", tiny(place, "7.2", "-monitor", monitor))
    console = watch(guest, place)
    human = guest.connect(place / "monitor")
    human.expect(rb"\(qemu\) ")
    for release in ROUND:
        human.send(b"info vers")
        human.expect(rb"info vers[^\r\n]*$")
        guest.handed_over("--to", qemu(release))
        seen = len(human.data)
        human.send(b"ion\n")
        human.expect(rb"%b\.\d" % re.escape(release.encode()), seen)
        human.expect(rb"\(qemu\) $", seen)
    assert human.data.count(b"QEMU ") == 1, human.data
    unharmed(console)


def test_every_control_monitor_of_the_command_line(segue: Segue, place: Path) -> None:
    """unix and TCP, -qmp, -qmp-pretty and -mon: all are served, and none is disconnected."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = tiny(
        place,
        "7.2",
        *("-qmp", f"unix:{place}/first,server=on,wait=off"),
        *("-qmp-pretty", f"unix:{place}/second,server=on,wait=off"),
        *("-qmp", f"tcp:127.0.0.1:{port},server=on,wait=off"),
        *("-chardev", f"socket,id=third,path={place}/third,server=on,wait=off"),
        *("-mon", "chardev=third,mode=control,pretty=on"),
    )
    guest = segue.start("guest", argv)
    console = watch(guest, place)
    clients = [Raw.unix(place / name, name) for name in ("first", "second", "third")]
    clients.append(Raw(socket.create_connection(("127.0.0.1", port)), "tcp"))
    # Any number at once, where QEMU serves one.
    clients.append(Raw.unix(place / "first", "again"))
    with closing(*clients):
        for release in ROUND:
            guest.handed_over("--to", qemu(release))
            for client in clients:
                version = client.command("query-version")["qemu"]
                assert f"{version['major']}.{version['minor']}" == release
                assert {"STOP", "RESUME"}.isdisjoint(client.names())
    unharmed(console)


def test_wait_on_is_waited_for(segue: Segue, place: Path) -> None:
    """`server=on,wait=on`: no guest before somebody has connected, as with QEMU."""
    argv = tiny(place, "7.2", "-qmp", f"unix:{place}/qmp,server=on,wait=on")
    guest = segue.start("guest", argv, wait=False)
    wait_until("the socket", (place / "qmp").exists)
    assert not (guest.directory / "status.json").exists()
    client = Raw.unix(place / "qmp")
    with closing(client):
        wait_until("the start", (guest.directory / "status.json").exists)
        assert client.command("query-status")["running"]
        console = watch(guest, place)
        guest.handed_over("--to", qemu("10.0"))
        assert client.command("query-status")["running"]
    unharmed(console)


def test_bad_clients_harm_themselves_alone(segue: Segue, place: Path) -> None:
    """One floods, one never reads, one sends half a message: the upgrade and the others go on."""
    guest = segue.start("guest", tiny(place, "7.2"))
    console = watch(guest, place)
    path = str(guest.directory / "qmp.sock")
    ending = threading.Event()

    def flood() -> None:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
            sock.sendall(b'{"execute":"qmp_capabilities"}' + b'{"execute":"x", "arguments":{"a":"')
            while not ending.is_set():
                sock.sendall(b"x" * 65536)

    def mute(sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            sock.sendall(b'{"execute":"qmp_capabilities"}')
            while not ending.is_set():
                sock.sendall(b'{"execute":"query-qmp-schema"}')

    half, deaf = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    client = qmp(guest)
    with half, deaf, closing(client):
        half.connect(path)
        half.sendall(b'{"execute":"qmp_capabilities"}{"execute":"query-')
        deaf.connect(path)
        threads = [threading.Thread(target=flood), threading.Thread(target=mute, args=(deaf,))]
        for thread in threads:
            thread.start()
        for release in ROUND:
            guest.handed_over("--to", qemu(release))
            assert client.command("query-status")["running"]
        half.sendall(b'name","id":1}')
        ending.set()
        deaf.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(LIMIT)
            assert not thread.is_alive()
        heard = b""
        while b'"id": 1' not in heard:
            chunk = half.recv(65536)
            assert chunk
            heard += chunk
    unharmed(console)


def test_a_console_whose_connection_is_yanked(segue: Segue, place: Path) -> None:
    """QEMU is given another one; ours to QEMU are not there for clients."""
    guest = segue.start("guest", tiny(place, "7.2"))
    console = watch(guest, place)
    with guest.qmp() as client:
        mine = {"type": "chardev", "id": "serial0"}
        assert client.command("query-yank") == [mine]
        with pytest.raises(ExecuteError, match="Instance not found"):
            client.command("yank", {"instances": [{"type": "chardev", "id": "segue-monitor"}]})
        client.command("yank", {"instances": [mine]})
        start = len(console.data)
        console.witness = None
        console.expect(rb"tick \d+\r\n", start)
        console.close()
        console = watch(guest, place)
        for release in ("10.0", "7.2"):
            guest.handed_over("--to", qemu(release))
            unharmed(console)
        start = len(console.data)
        console.witness = None
        console.send(b"r")
        console.expect(rb"segue guest x86", start)


def test_a_character_device_that_is_nonsense(segue: Segue, place: Path) -> None:
    """QEMU says so, and nobody waits for it."""
    guest = segue.start("guest", tiny(place, "7.2"))
    console = watch(guest, place)
    path = {"type": "unix", "data": {"path": str(place / "more")}}
    with guest.qmp() as client:
        for data in (
            {"addr": path, "websocket": "perhaps"},
            {"addr": path, "telnet": 7},
            {"addr": {"type": "inet", "data": {"host": "localhost", "port": []}}},
            {"addr": {"type": "unix", "data": {"path": "\x00x"}}},
        ):
            backend = {"type": "socket", "data": data}
            with pytest.raises(ExecuteError):
                client.command("chardev-add", {"id": "more", "backend": backend})
    guest.handed_over("--to", qemu("10.0"))
    unharmed(console)
