"""QEMU's character devices, whatever way the user spelled them, in one form.

A chardev is made by `-chardev`, by the older spelling that is the argument of `-serial`,
`-monitor`, `-qmp`, `-parallel`, `-debugcon`, `-gdb` and `-qtest` (`unix:PATH,server=on`,
`mon:stdio`, ...), or by QEMU itself when nothing is said. Its id is what `query-chardev` shows.

Facts are from chardev/char.c, chardev/char-socket.c, softmmu/vl.c and gdbstub/gdbstub.c of
QEMU 7.2 and 10.0, checked with `query-chardev` on 7.2.22, 10.0.2 and 11.1.3.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from segue.errors import BadCommandLine
from segue.qemu.commandline import CommandLine, Option, settles_monitor, settles_serial
from segue.qemu.options import Params
from segue.qemu.optiontable import OPTIONS, Syntax

MonitorMode = Literal["readline", "control"]

# Parameters of options other than -chardev that name a chardev.
_REFERENCES = frozenset(
    "chardev indev outdev primary_in secondary_in notify_dev".split(),
)
_COMPAT = ("serial", "parallel", "debugcon", "monitor", "qmp", "qmp-pretty", "gdb", "qtest")
_OLD_NAMES = {"tty": "serial", "parport": "parallel"}


@dataclass(frozen=True)
class Chardev:
    """One character device as QEMU makes it.

    `params` are the keys of `-chardev`, last one wins, without `backend`, `id` and `mux`.
    `monitor` is what the spelling itself connects to it: `mon:` and -monitor a `readline` one,
    -qmp a `control` one; what `-mon` adds is told by `monitors()`.
    `frontend` is the option that made it (`serial`, `monitor`, `qmp`, `parallel`, `debugcon`,
    `gdb`, `qtest`, `usb` or `chardev`), and `index` its number among those, for `serial` and
    `parallel` the number of the port. `origin` is None for one that QEMU adds by itself.
    With `mux`, QEMU has a second one beneath it, whose id is `ID-base`.
    """

    id: str
    backend: str
    params: Params = Params()  # noqa: RUF009 (it is immutable)
    mux: bool = False
    monitor: MonitorMode | None = None
    pretty: bool = False
    origin: Option | None = None
    frontend: str = "chardev"
    index: int = 0

    def to_option(self) -> Option:
        """The `-chardev` that makes it."""
        pairs = [("backend", self.backend), ("id", self.id), *self.params.items()]
        return Option.of(
            "chardev", Params.of(pairs + ([("mux", "on")] if self.mux else []), "backend")
        )


@dataclass(frozen=True)
class Monitor:
    """A monitor that a command line asks for, on the chardev of that id."""

    chardev: str
    mode: MonitorMode
    pretty: bool = False
    origin: Option | None = None


def from_compat(text: str, identifier: str) -> Chardev | None:
    """Read the older spelling; None for `none` and `chardev:ID`, which make no chardev.

    A host in brackets (`tcp:[::1]:23`) is read too; QEMU itself cannot, up to 11.1.
    Raises BadCommandLine where QEMU would refuse the text.
    """
    if text == "none" or text.startswith("chardev:"):
        return None
    mux = text.startswith("mon:")
    rest = text.removeprefix("mon:")
    kind, _, path = rest.partition(":")
    params: Params
    if rest in ("null", "pty", "msmouse", "wctablet", "braille", "testdev", "stdio"):
        backend = rest
        # Ctrl-C on a terminal that has the monitor too is the guest's.
        params = Params.of({"signal": "off"} if mux and rest == "stdio" else {})
    elif rest.startswith("vc"):
        backend, params = "vc", _vc(rest)
    elif rest == "con:":
        backend, params = "console", Params()
    elif kind in ("file", "pipe", "pty") and kind != rest:
        backend, params = kind, Params.of({"path": path})
    elif kind in ("tcp", "telnet", "tn3270", "websocket") and kind != rest:
        backend, params = "socket", _inet(text, kind, path)
    elif kind == "udp" and kind != rest:
        backend, params = "udp", _udp(text, path)
    elif kind == "unix" and kind != rest:
        backend, params = "socket", Params.parse(path, "path")
    elif rest.startswith(("/dev/parport", "/dev/ppi")):
        backend, params = "parallel", Params.of({"path": rest})
    elif rest.startswith(("/dev/", "COM")):
        backend, params = "serial", Params.of({"path": rest})
    else:
        raise BadCommandLine(
            f"'{text}' is not a valid char driver",
            "such as stdio, pty, null, unix:PATH,server=on,wait=off or tcp:HOST:PORT",
        )
    mux = params.boolean("mux", mux)
    return Chardev(
        identifier, backend, _normalised(params), mux, monitor="readline" if mux else None
    )


def find_chardevs(command_line: CommandLine) -> list[Chardev]:
    """All chardevs in the order in which QEMU makes them. Raises BadCommandLine."""
    return list(_find(command_line))


def monitors(command_line: CommandLine) -> list[Monitor]:
    """All monitors: of -mon, -monitor, -qmp and `-object monitor-*`, QEMU's own, then `mon:`."""
    named: list[Monitor] = []
    labels = _monitor_labels(command_line)
    for option in command_line.options:
        if option.name in ("monitor", "qmp", "qmp-pretty"):
            if label := next((label for o, label in labels if o is option), None):
                named.append(_compat_monitor(option, label))
        elif option.name == "mon" and (chardev := option.params.get("chardev")):
            mode = option.params.get("mode", "readline")
            if mode not in ("readline", "control"):
                raise BadCommandLine(
                    f"-mon: unknown monitor mode '{mode}'", "the modes are readline and control"
                )
            control: MonitorMode = "control" if mode == "control" else "readline"
            named.append(Monitor(chardev, control, option.params.boolean("pretty", False), option))
        elif option.name == "object" and (chardev := option.params.get("chardev")):
            # Since 11.1, where -mon is deprecated.
            kind = option.params.get("qom-type")
            if kind == "monitor-qmp":
                pretty = option.params.boolean("pretty", False)
                named.append(Monitor(chardev, "control", pretty, option))
            elif kind == "monitor-hmp":
                named.append(Monitor(chardev, "readline", False, option))
    own = [
        Monitor(chardev.id, chardev.monitor, chardev.pretty, chardev.origin)
        for chardev in _find(command_line)
        if chardev.monitor
        and (chardev.frontend not in ("monitor", "qmp") or chardev.origin is None)
    ]
    return named + own


def users(command_line: CommandLine, identifier: str) -> list[Option]:
    """The options that use the chardev: devices, network back ends, monitors, TPMs, ..."""

    def uses(option: Option) -> bool:
        if option.name in _COMPAT:
            return option.value == f"chardev:{identifier}"
        known = OPTIONS.get(option.name)
        if option.value is None or not known or known.syntax is not Syntax.PARAMS:
            return False
        return any(
            value == identifier
            and (key.startswith("chardevs.") if option.name == "chardev" else key in _REFERENCES)
            for key, value in option.params.items()
        )

    return [option for option in command_line.options if uses(option)]


# -- the older spelling -------------------------------------------------------------------


def _vc(text: str) -> Params:
    if not text.startswith("vc:"):
        return Params()
    if match := re.match(r"vc:(\d{1,7})x(\d{1,7})", text):
        return Params.of({"width": match[1], "height": match[2]})
    if match := re.match(r"vc:(\d{1,7})Cx(\d{1,7})", text):
        return Params.of({"cols": match[1], "rows": match[2]})
    raise BadCommandLine(f"'{text}' is not a size of a console", "vc:640x480 or vc:80Cx24C")


_HOST_PORT = r"(?:\[([^\]]+)\]|([^:]{1,64})|):([^%s]{1,32})(?=[%s]|$)"


def _host_port(text: str, address: str, stops: str) -> tuple[str, str, str]:
    """Host (empty for any), port, and what follows."""
    match = re.match(_HOST_PORT % (stops, stops), address)
    if not match:
        raise BadCommandLine(f"'{text}' has no port", "write HOST:PORT or :PORT")
    return match[1] or match[2] or "", match[3], address[match.end() :]


def _inet(text: str, kind: str, address: str) -> Params:
    host, port, rest = _host_port(text, address, ",")
    params = Params.parse(rest[1:])
    if kind != "tcp":
        params = params.set(kind, True)
    return Params.of([("host", host), ("port", port), *params.items()])


def _udp(text: str, address: str) -> Params:
    host, port, rest = _host_port(text, address, "@,")
    pairs = {"host": host, "port": port}
    if rest.startswith("@"):
        # QEMU reads no option after an address of udp:.
        local, localport, _ = _host_port(text, rest[1:], ",")
        pairs |= {"localaddr": local, "localport": localport}
    return Params.of(pairs)


def _normalised(params: Params) -> Params:
    """Plain pairs, each key once, with QEMU's two names for Nagle's algorithm made one."""
    pairs: dict[str, str] = {}
    for key, value in params.items():
        if key == "delay":
            # `nodelay` alone is read as `delay=off`.
            pairs["nodelay"] = "off" if params.boolean("delay", True) else "on"
        elif key not in ("id", "backend", "mux"):
            pairs[key] = value
    return Params.of(pairs)


# -- the whole command line ---------------------------------------------------------------


def _find(command_line: CommandLine) -> Iterator[Chardev]:
    labels = _monitor_labels(command_line)
    defaults = _defaults(command_line)
    named = {"chardev": 0, "monitor": 0, "qmp": 0}
    for option in command_line.options:
        if option.name == "chardev":
            yield replace(_chardev(option), index=named["chardev"])
            named["chardev"] += 1
            continue
        label = next((label for o, label in labels if o is option), None)
        if label is None:
            continue
        made = _compat(option, label)
        if made is not None:
            monitor = _compat_monitor(option, label)
            frontend = "monitor" if option.name == "monitor" else "qmp"
            yield replace(
                made,
                monitor=monitor.mode,
                pretty=monitor.pretty,
                frontend=frontend,
                index=named[frontend],
            )
            named[frontend] += 1
    if text := defaults.get("monitor"):
        default = _made_by_qemu(text, f"compat_monitor{len(labels)}", "monitor")
        yield replace(default, monitor="readline")
    yield from _numbered(command_line, "qtest", "qtest")
    for frontend in ("serial", "parallel"):
        if text := defaults.get(frontend):
            yield _made_by_qemu(text, f"{frontend}0", frontend)
        yield from _ports(command_line, frontend)
    yield from _numbered(command_line, "debugcon", "debugcon")
    for option in command_line.all("usbdevice"):
        if option.value == "braille":
            yield Chardev("braille", "braille", origin=option, frontend="usb")
    yield from _gdb(command_line)


def _chardev(option: Option) -> Chardev:
    params = option.params
    identifier, backend = option.id, params.get("backend")
    if params.json is not None:
        raise BadCommandLine("-chardev: QEMU reads no JSON here", "write backend,id=ID,key=value")
    if identifier is None:
        raise BadCommandLine("-chardev: no id specified", "add id=NAME")
    if backend is None:
        raise BadCommandLine(f'chardev: "{identifier}" missing backend', "begin with the backend")
    return Chardev(
        identifier,
        _OLD_NAMES.get(backend, backend),
        _normalised(params),
        params.boolean("mux", False),
        origin=option,
    )


def _compat(option: Option, identifier: str, text: str | None = None) -> Chardev | None:
    text = option.value or "" if text is None else text
    try:
        made = from_compat(text, identifier)
    except BadCommandLine as error:
        raise BadCommandLine(f"-{option.name}: {error.what}", error.hint) from None
    if made is None and text == "none" and option.name not in ("serial", "parallel", "gdb"):
        raise BadCommandLine(
            f"-{option.name}: 'none' is not a valid char driver", f"leave -{option.name} out"
        )
    return replace(made, origin=option) if made else None


def _made_by_qemu(text: str, identifier: str, frontend: str) -> Chardev:
    made = from_compat(text, identifier)
    assert made is not None
    return replace(made, frontend=frontend)


def _monitor_labels(command_line: CommandLine) -> list[tuple[Option, str]]:
    """The chardev of each -monitor, -qmp and -qmp-pretty; `-monitor none` counts for nothing."""
    labels: list[tuple[Option, str]] = []
    for option in command_line.all("monitor", "qmp", "qmp-pretty"):
        text = option.value or ""
        if option.name != "monitor" or not text.startswith("none"):
            compat = f"compat_monitor{len(labels)}"
            is_reference = text.startswith("chardev:")
            labels.append((option, text.removeprefix("chardev:") if is_reference else compat))
    return labels


def _compat_monitor(option: Option, chardev: str) -> Monitor:
    mode: MonitorMode = "readline" if option.name == "monitor" else "control"
    return Monitor(chardev, mode, option.name == "qmp-pretty", option)


def _ports(command_line: CommandLine, frontend: str) -> Iterator[Chardev]:
    """-serial and -parallel. A `-serial none` leaves its port out but keeps its number.

    (So since 9.0, and in the 7.2 of Debian; 7.2.0 gave the number to the next port.)
    """
    index = 0
    for option in command_line.all(frontend):
        made = _compat(option, f"{frontend}{index}")
        if made:
            yield replace(made, frontend=frontend, index=index)
        if frontend == "serial" or option.value != "none":
            index += 1


def _numbered(command_line: CommandLine, frontend: str, label: str) -> Iterator[Chardev]:
    for index, option in enumerate(command_line.all(frontend)):
        if made := _compat(option, label):
            yield replace(made, frontend=frontend, index=index)


def _gdb(command_line: CommandLine) -> Iterator[Chardev]:
    for index, option in enumerate(command_line.all("gdb", "s")):
        text = option.value if option.value is not None else "tcp::1234"
        if text.startswith("tcp:"):
            text += ",wait=off,nodelay=on,server=on"
        if made := _compat(option, "gdb", text):
            yield replace(made, frontend="gdb", index=index)


def _defaults(command_line: CommandLine) -> dict[str, str]:
    """What QEMU adds by itself, by front end, in the older spelling.

    Boards without a parallel port (raspi, ...) get none; here they seem to get one that goes
    nowhere, which changes nothing.
    """
    options = command_line.options
    if command_line.flag("nodefaults"):
        return {}
    bare_machine = command_line.machine_type == "none"
    serial = not settles_serial(options) and not bare_machine
    parallel = not bare_machine and not any(
        option.name == "parallel"
        or (option.name in ("device", "global") and option.params.get("driver") == "isa-parallel")
        for option in options
    )
    monitor = not settles_monitor(options)
    if not command_line.flag("nographic"):
        console = "vc:80Cx24C"
        wanted = {"monitor": monitor, "serial": serial, "parallel": parallel}
        return {frontend: console for frontend, on in wanted.items() if on}
    if command_line.daemonize and (serial or parallel or monitor):
        raise BadCommandLine(
            "-nographic cannot be used with -daemonize",
            "say where the ports and the monitor go, or use -display none",
        )
    added = {"parallel": "null"} if parallel else {}
    if serial and monitor:
        added["serial"] = "mon:stdio"
    elif serial:
        added["serial"] = "stdio"
    elif monitor:
        added["monitor"] = "stdio"
    return added
