"""User networks in passt's words, and which are left to slirp."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from segue.errors import SegueError
from segue.kept import passt, usernet
from segue.kept.base import Lending
from segue.kept.description import Description, describe
from segue.kept.passt import Found, Passt
from segue.kept.user import ForwardedPorts
from segue.kept.usernet import Untranslatable
from segue.qemu.binary import Binary
from segue.qemu.commandline import CommandLine
from segue.qemu.options import Params

DEFAULT = (
    "--quiet --mtu 1500 --address 10.0.2.15 --netmask 24 --gateway 10.0.2.2 "
    "--map-host-loopback 10.0.2.2 --mac-addr 52:55:0a:00:02:02 --dns 10.0.2.3 "
    "--dns-forward 10.0.2.3 "
)
NO_PORTS = "--tcp-ports none --udp-ports none"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("user", DEFAULT + NO_PORTS),
        ("user,id=n0,ipv6=off", DEFAULT.replace("1500", "1500 --ipv4-only") + NO_PORTS),
        ("user,ipv4=off", f"--quiet --mtu 1500 --ipv6-only {NO_PORTS}"),
        ("user,restrict=off", DEFAULT + NO_PORTS),
        (
            "user,restrict=on,hostfwd=tcp::2222-:22",
            f"{DEFAULT}--tcp-ports 0.0.0.0/2222:22 --udp-ports none",
        ),
        (
            "user,hostfwd=tcp::2222-:22,hostfwd=udp:127.0.0.1:53-10.0.2.15:5353",
            f"{DEFAULT}--tcp-ports 0.0.0.0/2222:22 --udp-ports 127.0.0.1/53:5353",
        ),
        (
            "user,hostfwd=:10.1.1.1:80-:8080,hostfwd=tcp::81-:81",
            f"{DEFAULT}--tcp-ports 10.1.1.1/80:8080 --tcp-ports 0.0.0.0/81:81 --udp-ports none",
        ),
        (
            (
                '{"type":"user","id":"n0","hostfwd":[{"str":"tcp::2222-:22"}],'
                '"dnssearch":[{"str":"a.example"},{"str":"b.example"}]}'
            ),
            f"{DEFAULT}--search|a.example b.example|--tcp-ports 0.0.0.0/2222:22 --udp-ports none",
        ),
        (
            "user,hostname=vm,domainname=example.org,dnssearch=lan",
            f"{DEFAULT}--hostname vm --search|example.org lan|{NO_PORTS}",
        ),
        (
            "user,net=192.168.76.0/24,dhcpstart=192.168.76.9,hostfwd=tcp::22-192.168.76.9:22",
            (
                "--quiet --mtu 1500 --address 192.168.76.9 --netmask 24 --gateway 192.168.76.2 "
                "--map-host-loopback 192.168.76.2 --mac-addr 52:55:c0:a8:4c:02 --dns 192.168.76.3 "
                "--dns-forward 192.168.76.3 --tcp-ports 0.0.0.0/22:22 --udp-ports none"
            ),
        ),
        (
            "user,net=172.16.5.5/255.255.0.0,host=172.16.0.1,dns=172.16.0.1",
            (
                "--quiet --mtu 1500 --address 172.16.2.15 --netmask 16 --gateway 172.16.0.1 "
                "--map-host-loopback 172.16.0.1 --mac-addr 52:55:ac:10:00:01 --dns 172.16.0.1 "
                f"--dns-forward 172.16.0.1 {NO_PORTS}"
            ),
        ),
    ],
)
def test_translated(text: str, words: str) -> None:
    expected: list[str] = []
    for n, part in enumerate(words.split("|")):
        expected += [part] if n % 2 else part.split()
    assert usernet.translate(Params.parse(text, "type")) == expected


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("user,guestfwd=tcp:10.0.2.100:80-cmd:cat", "guestfwd"),
        ("user,tftp=/srv,bootfile=pxe", "TFTP"),
        ("user,smb=/srv", "SMB"),
        ("user,restrict=on,hostfwd=udp::53-:53", "forwarded by UDP"),
        ("user,hostfwd=tcp::0-:22", "chooses no port"),
        ("user,hostfwd=tcp::22-10.0.2.99:22", "one address"),
        ("user,hostfwd=unix:/run/x-:22", "hostfwd=unix"),
        ("user,net=10.0.0.0", "no mask"),
        ("user,net=10.0.0.0/31", "31 bits"),
        ("user,dns=eins", "no IPv4 address"),
        ("user,ipv6-prefix=fd00::", "ipv6-prefix"),
        ("user,ipv4=off,ipv6=off", "neither"),
    ],
)
def test_left_to_slirp(text: str, why: str) -> None:
    with pytest.raises(Untranslatable, match=why):
        usernet.translate(Params.parse(text, "type"))


Judge = Callable[..., Description]


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Judge:
    monkeypatch.setattr(passt, "find", lambda: Found("/usr/bin/passt", "0.0~git20250503"))

    def judged(*words: str, net_user: str = "auto") -> Description:
        line = CommandLine.parse(["qemu-system-x86_64", *words])
        none: frozenset[str] = frozenset()
        path = Path("/usr/bin/qemu-system-x86_64")
        binary = Binary(path, (7, 2, 0), "7.2.0", "x86_64", "", {}, none, none, none, none, False)
        return describe(line, binary, net_user=net_user)

    return judged


def networks(description: Description) -> list[str]:
    return [kept.name for kept in description.kept if isinstance(kept, Passt)]


def others(description: Description) -> list[str]:
    return [str(option) for option in description.draft.options("netdev", "nic", "net")]


def notes(description: Description) -> list[str]:
    return [note.why for note in description.draft.notes if "user networking" in note.why]


def test_the_default_card_is_spelled_out(judge: Judge) -> None:
    found = judge("-m", "64")
    assert networks(found) == ["segue-nic0"]
    assert others(found) == ["-net nic,netdev=segue-nic0"]
    assert notes(found) == []


@pytest.mark.parametrize("words", [("-nodefaults",), ("-nic", "none"), ("-M", "microvm")])
def test_no_card_where_qemu_adds_none(judge: Judge, words: tuple[str, ...]) -> None:
    assert networks(judge(*words)) == []


def test_cards_keep_their_order(judge: Judge) -> None:
    found = judge(
        "-nic", "hubport,hubid=3,model=e1000", "-nic", "user,model=virtio,mac=52:54:0:0:0:1"
    )
    assert networks(found) == ["segue-nic1"]
    assert others(found) == [
        "-netdev hubport,hubid=3,id=segue-nic0",
        "-net nic,netdev=segue-nic0,model=e1000",
        "-net nic,netdev=segue-nic1,model=virtio,macaddr=52:54:0:0:0:1",
    ]


def test_what_passt_cannot_do_is_told(judge: Judge) -> None:
    found = judge("-nic", "user,smb=/srv,hostfwd=tcp::22-:22")
    assert networks(found) == []
    assert [kept.kind for kept in found.kept if kept.kind == "hostfwd"] == ["hostfwd"]
    [note] = notes(found)
    assert "will drop at an upgrade (passt starts no SMB server)" in note


def test_slirp_on_demand(judge: Judge) -> None:
    found = judge("-netdev", "user,id=n0", net_user="slirp")
    assert networks(found) == []
    (ports,) = [kept for kept in found.kept if isinstance(kept, ForwardedPorts)]
    assert ports.identity() == {}
    assert found.argv(Lending(2, found.draft.binary)).count("user,id=n0") == 1
    assert len(notes(found)) == 1


USERNET = """Hub -1 (n0):\r
  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r
  TCP[HOST_FORWARD]  11       127.0.0.1 46055       10.0.2.15    22     0     0\r
  UDP[HOST_FORWARD] 103               * 34334       10.0.2.15    24     0     0\r
  TCP[ESTABLISHED]   14       127.0.0.1 46055       10.0.2.15    22     0     0\r
\r
Hub 0 (#net012):\r
  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r
"""


@pytest.mark.parametrize(
    ("option", "text", "now"),
    [
        (
            "user,id=n0,hostfwd=tcp:127.0.0.1:0-:22",
            USERNET,
            ["tcp:127.0.0.1:46055-10.0.2.15:22", "udp::34334-10.0.2.15:24"],
        ),
        ("user,hostfwd=tcp::1-:1", USERNET.partition("Hub 0")[0].replace("n0", "#net1"), None),
        ("user,id=n0,hostfwd=unix:/s-:22", "Hub -1 (n0):\r\n", ["unix:/s-:22"]),
        ("user,id=n0,hostfwd=tcp::1-:1", "Hub -1 (n0):\r\n", []),
        ("user,id=n1,hostfwd=tcp::1-:1", USERNET, ["tcp::1-:1"]),
        ("user,id=n1,hostfwd=tcp::1-:1", "unknown command", ["tcp::1-:1"]),
    ],
)
def test_ports_that_are_forwarded_now(option: str, text: str, now: list[str] | None) -> None:
    (parsed,) = CommandLine.parse(["qemu-system-x86_64", "-netdev", option]).options
    ports = ForwardedPorts(parsed)
    ports.learn_from(text)
    now = ["tcp:127.0.0.1:46055-10.0.2.15:22", "udp::34334-10.0.2.15:24"] if now is None else now
    assert ports.identity() == ({"hostfwd": now} if now else {})


def test_passt_or_nothing(judge: Judge) -> None:
    with pytest.raises(SegueError, match="SMB"):
        judge("-netdev", "user,id=n0,smb=/srv", net_user="passt")


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("passt 0.0~git20250503.587980c-2+deb13u1", None),
        ("passt 0^20250611.g0293c6f-1.fc42", None),
        ("passt 2025_05_03.587980c", None),
        ("passt 0.0~git20230309.7c7625d-1", "2023-03-09, and old ones corrupt data"),
        ("passt unknown version", "does not tell its version"),
    ],
)
def test_which_passt_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, why: str | None
) -> None:
    program = tmp_path / "passt"
    program.write_text(f"#!/bin/sh\necho '{said}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    routes = tmp_path / "routes"
    routes.write_text("Iface\tDestination\tGateway\neth0\t00000000\t0102000A\n")
    monkeypatch.setattr(passt, "_ROUTES", routes)
    found = passt.find()
    if why is None:
        assert found == Found(str(program), said)
    else:
        assert isinstance(found, str) and why in found


def test_without_a_route_passt_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "passt"
    program.write_text("#!/bin/sh\necho passt 2025_05_03.587980c\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(passt, "_ROUTES", tmp_path / "none")
    assert "default route" in str(passt.find())
