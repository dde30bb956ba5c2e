"""Every spelling of a character device gives what QEMU makes of it.

The ids and what is made by default are checked against real QEMU in tests/qemu.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segue.errors import BadCommandLine
from segue.qemu.chardevs import Chardev, Monitor, find_chardevs, from_compat, monitors, users
from segue.qemu.commandline import CommandLine
from segue.qemu.options import Params

COMMAND_LINES = Path(__file__).parent / "commandlines"


def parse(text: str) -> CommandLine:
    return CommandLine.parse(["qemu-system-x86_64", *shlex.split(text)])


def compat(text: str) -> Chardev:
    made = from_compat(text, "c")
    assert made is not None
    return made


@pytest.mark.parametrize(
    ("text", "backend", "params"),
    [
        ("null", "null", {}),
        ("stdio", "stdio", {}),
        ("pty", "pty", {}),
        ("pty:/run/tty", "pty", {"path": "/run/tty"}),
        ("msmouse", "msmouse", {}),
        ("braille", "braille", {}),
        ("vc", "vc", {}),
        ("vc:640x480", "vc", {"width": "640", "height": "480"}),
        ("vc:80Cx24C", "vc", {"cols": "80", "rows": "24"}),
        ("con:", "console", {}),
        ("COM1", "serial", {"path": "COM1"}),
        ("/dev/ttyS0", "serial", {"path": "/dev/ttyS0"}),
        ("/dev/parport0", "parallel", {"path": "/dev/parport0"}),
        ("file:/a,b=c", "file", {"path": "/a,b=c"}),
        ("pipe:/a,,b", "pipe", {"path": "/a,,b"}),
        ("unix:/a", "socket", {"path": "/a"}),
        (
            "unix:/a,,b,server=on,wait=off",
            "socket",
            {"path": "/a,b", "server": "on", "wait": "off"},
        ),
        ("unix:/a,server,nowait", "socket", {"path": "/a", "server": "on", "wait": "off"}),
        ("unix:path=/a,reconnect=2", "socket", {"path": "/a", "reconnect": "2"}),
        (
            "unix:name,abstract=on,tight=off",
            "socket",
            {"path": "name", "abstract": "on", "tight": "off"},
        ),
        ("unix:/a,id=x,logfile=/l", "socket", {"path": "/a", "logfile": "/l"}),
        ("tcp:host:23", "socket", {"host": "host", "port": "23"}),
        ("tcp::23,server", "socket", {"host": "", "port": "23", "server": "on"}),
        ("tcp:[::1]:23", "socket", {"host": "::1", "port": "23"}),
        ("tcp:h:1,nodelay", "socket", {"host": "h", "port": "1", "nodelay": "on"}),
        ("tcp:h:1,nodelay=off", "socket", {"host": "h", "port": "1", "nodelay": "off"}),
        ("tcp:h:1,delay=on", "socket", {"host": "h", "port": "1", "nodelay": "off"}),
        ("telnet:h:1", "socket", {"host": "h", "port": "1", "telnet": "on"}),
        ("tn3270:h:1", "socket", {"host": "h", "port": "1", "tn3270": "on"}),
        (
            "websocket::1,server=on",
            "socket",
            {"host": "", "port": "1", "server": "on", "websocket": "on"},
        ),
        ("udp:h:1", "udp", {"host": "h", "port": "1"}),
        ("udp::1@:2", "udp", {"host": "", "port": "1", "localaddr": "", "localport": "2"}),
        ("udp:h:1@l:2", "udp", {"host": "h", "port": "1", "localaddr": "l", "localport": "2"}),
        ("udp:h:1,x=y", "udp", {"host": "h", "port": "1"}),
    ],
)
def test_older_spellings(text: str, backend: str, params: dict[str, str]) -> None:
    plain = compat(text)
    assert (plain.backend, dict(plain.params.items())) == (backend, params)
    assert not plain.mux
    assert plain.monitor is None
    muxed = compat(f"mon:{text}")
    assert muxed.mux
    assert muxed.monitor == "readline"
    extra = {"signal": "off"} if text == "stdio" else {}
    assert dict(muxed.params.items()) == params | extra


def test_mux_may_be_asked_for_among_the_parameters() -> None:
    made = compat("unix:/a,mux=on")
    assert made.mux
    assert made.monitor == "readline"
    assert made.params.items() == [("path", "/a")]


@pytest.mark.parametrize("text", ["none", "chardev:x"])
def test_spellings_that_make_nothing(text: str) -> None:
    assert from_compat(text, "c") is None


@pytest.mark.parametrize(
    "text",
    [
        *("", "nonsense", "mon:none", "mon:chardev:x", "tcp:host", "tcp:", "udp:host", "udp:h:1@l"),
        *("vc:10", "ringbuf", "socket", "file", "unix", "stdio,x=y", "tcp:" + "h" * 65 + ":1"),
    ],
)
def test_spellings_that_qemu_refuses(text: str) -> None:
    with pytest.raises(BadCommandLine) as caught:
        from_compat(text, "c")
    assert caught.value.hint


paths = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)


@given(paths, st.booleans())
def test_any_path_survives_as_an_option(path: str, mux: bool) -> None:
    made = Chardev("c", "socket", Params.of({"path": path, "server": "on"}), mux=mux)
    again = find_chardevs(CommandLine("q", (made.to_option(),)))[0]
    assert (again.id, again.backend, again.params, again.mux) == (
        "c",
        "socket",
        made.params,
        mux,
    )


def ids(text: str) -> list[str]:
    return [chardev.id for chardev in find_chardevs(parse(text))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "compat_monitor0 serial0 parallel0"),
        ("-nographic", "serial0 parallel0"),
        ("-nodefaults", ""),
        ("-nodefaults -nographic", ""),
        ("-M none", "compat_monitor0"),
        ("-monitor none -serial none -parallel none", ""),
        ("-nodefaults -qmp null -monitor none -monitor null", "compat_monitor0 compat_monitor1"),
        ("-nodefaults -serial none -serial null -serial null", "serial1 serial2"),
        ("-nodefaults -parallel none -parallel null", "parallel0"),
        ("-nodefaults -serial null -chardev null,id=a -gdb null -debugcon null", None),
        ("-nodefaults -chardev null,id=a -serial chardev:a -monitor chardev:a", "a"),
        ("-qmp null", "compat_monitor0 serial0 parallel0"),
        ("-serial mon:null", "serial0 parallel0"),
        ("-device isa-serial -device isa-parallel", "compat_monitor0"),
        ("""-device '{"driver":"isa-serial"}' -monitor none""", "parallel0"),
        ("-global isa-parallel.a=b", "compat_monitor0 serial0"),
        ("-nodefaults -s", "gdb"),
        ("-nodefaults -gdb none -qtest null -usbdevice braille", "qtest braille"),
        ("-object monitor-qmp,id=m,chardev=a -chardev null,id=a", "a serial0 parallel0"),
    ],
)
def test_ids_in_the_order_of_making(text: str, expected: str | None) -> None:
    if expected is None:
        expected = "a serial0 debugcon gdb"
    assert ids(text) == expected.split()


def test_what_nographic_adds() -> None:
    def made(text: str) -> list[tuple[str, str, bool, str | None]]:
        found = find_chardevs(parse(text))
        assert all(chardev.origin is None for chardev in found)
        return [(c.id, c.backend, c.mux, c.monitor) for c in found if c.frontend != "parallel"]

    assert made("-nographic") == [("serial0", "stdio", True, "readline")]
    assert made("-nographic -device isa-serial") == [
        ("compat_monitor0", "stdio", False, "readline")
    ]
    assert made("-nographic -mon x") == [("serial0", "stdio", False, None)]
    assert find_chardevs(parse("-nographic"))[0].params.get("signal") == "off"
    assert made("") == [
        ("compat_monitor0", "vc", False, "readline"),
        ("serial0", "vc", False, None),
    ]


def test_nographic_cannot_be_daemonized_unless_everything_is_redirected() -> None:
    with pytest.raises(BadCommandLine, match="-nographic cannot be used with -daemonize"):
        ids("-nographic -daemonize")
    assert ids("-nographic -daemonize -serial none -parallel none -monitor none") == []


def test_where_each_comes_from() -> None:
    command_line = parse(
        "-chardev socket,path=/a,server,nowait,id=a,mux=on -nodefaults -serial none "
        "-serial pty -qmp-pretty unix:/q -monitor stdio -chardev tty,id=b,path=/dev/x"
    )
    found = {chardev.id: chardev for chardev in find_chardevs(command_line)}
    a, b = found["a"], found["b"]
    assert a.params.items() == [("path", "/a"), ("server", "on"), ("wait", "off")]
    assert (a.mux, a.frontend, a.index, a.origin) == (True, "chardev", 0, command_line.options[0])
    assert (b.backend, b.index) == ("serial", 1)
    qmp, monitor, serial = found["compat_monitor0"], found["compat_monitor1"], found["serial1"]
    assert (qmp.frontend, qmp.index, qmp.monitor, qmp.pretty) == ("qmp", 0, "control", True)
    assert (monitor.frontend, monitor.index, monitor.monitor) == ("monitor", 0, "readline")
    assert (serial.frontend, serial.index, serial.origin) == ("serial", 1, command_line.options[3])
    assert serial.origin is command_line.options[3]
    several = find_chardevs(parse("-nodefaults -qmp null -monitor null -qmp null -gdb null -s"))
    assert [(c.frontend, c.index) for c in several] == [
        *(("qmp", 0), ("monitor", 0), ("qmp", 1), ("gdb", 0), ("gdb", 1))
    ]


def test_gdb_is_a_server_whatever_it_says() -> None:
    [short] = find_chardevs(parse("-nodefaults -s"))
    assert dict(short.params.items()) == {
        "host": "",
        "port": "1234",
        "wait": "off",
        "nodelay": "on",
        "server": "on",
    }
    [long] = find_chardevs(parse("-nodefaults -gdb tcp::1,server=off,wait=on"))
    assert long.params.boolean("server", False)
    assert not long.params.boolean("wait", True)


@pytest.mark.parametrize(
    "text",
    [
        "-chardev null",
        "-chardev id=a",
        """-chardev '{"id":"a","backend":"null"}'""",
        "-qmp none",
        "-debugcon none",
        "-serial nonsense",
        "-chardev null,id=a,mux=maybe",
    ],
)
def test_what_qemu_would_refuse(text: str) -> None:
    with pytest.raises(BadCommandLine) as caught:
        ids(text)
    assert caught.value.hint


def test_monitors() -> None:
    command_line = parse(
        "-nodefaults -chardev null,id=a -mon a,mode=control,pretty=on -mon chardev=b "
        "-qmp unix:/q -monitor chardev:c -serial mon:pty -monitor none "
        "-object monitor-qmp,id=m,chardev=d,pretty=on -object monitor-hmp,id=n,chardev=e"
    )
    option = command_line.options
    assert monitors(command_line) == [
        Monitor("a", "control", True, option[2]),
        Monitor("b", "readline", False, option[3]),
        Monitor("compat_monitor0", "control", False, option[4]),
        Monitor("c", "readline", False, option[5]),
        Monitor("d", "control", True, option[8]),
        Monitor("e", "readline", False, option[9]),
        Monitor("serial0", "readline", False, option[6]),
    ]
    assert monitors(parse("-nographic")) == [Monitor("serial0", "readline")]
    assert monitors(parse("")) == [Monitor("compat_monitor0", "readline")]
    assert monitors(parse("-nodefaults")) == []
    with pytest.raises(BadCommandLine, match="unknown monitor mode"):
        monitors(parse("-mon a,mode=x"))


def test_who_uses_a_chardev() -> None:
    command_line = parse(
        "-chardev null,id=a -chardev null,id=a1 -device virtserialport,chardev=a,name=b "
        "-netdev vhost-user,id=n,chardev=a -serial chardev:a -mon a -kernel a -device x,id=a "
        """-object filter-mirror,id=f,netdev=n,outdev=a -device '{"driver":"y","chardev":"a"}' """
        "-chardev hub,id=h,chardevs.0=a -tpmdev emulator,id=t,chardev=a1"
    )
    found = users(command_line, "a")
    assert [option.name for option in found] == [
        *("device", "netdev", "serial", "mon", "object", "device", "chardev")
    ]
    assert [option.name for option in users(command_line, "a1")] == ["tpmdev"]
    assert users(command_line, "zz") == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("libvirt", "charmonitor charserial0 charchannel0 charchannel1"),
        ("proxmox", "qmp qmp-event qga0"),
        ("quickemu", "usbredirchardev1 ccid compat_monitor0 serial0 parallel0"),
        ("debian-wiki", "compat_monitor0 serial0 parallel0"),
        ("bare-disk", "serial0 parallel0"),
        ("kernel-developer", "serial0 parallel0 gdb"),
        ("old-spellings", "compat_monitor0 serial0"),
    ],
)
def test_real_command_lines(name: str, expected: str) -> None:
    argv = shlex.split((COMMAND_LINES / f"{name}.txt").read_text())
    assert [c.id for c in find_chardevs(CommandLine.parse(argv))] == expected.split()
