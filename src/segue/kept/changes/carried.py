"""Commands that the supervisor carries out on QEMU in a client's place.

What outlives an instance must be the supervisor's from the beginning: memory lies in a memfd of
ours, and a character device's far end is a broker's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from segue.errors import BadCommandLine
from segue.kept import chardev as keeping
from segue.kept.base import Lending
from segue.kept.broker import Broker
from segue.kept.draft import Draft
from segue.kept.ram import ORIGIN, GuestRam, RamRule
from segue.qemu.chardevs import Chardev
from segue.qemu.commandline import CommandLine, Option
from segue.qemu.jsontree import flatten
from segue.qemu.monitor import Monitor
from segue.qemu.options import Params

Reply = dict[str, Any]

# Members of the back ends that we keep; QEMU takes no text for these.
_TYPES = {
    bool: frozenset(
        "server wait telnet tn3270 websocket nodelay delay abstract tight ipv4 ipv6 append "
        "logappend mux signal".split()
    ),
    int: frozenset(("reconnect", "reconnect-ms", "to")),
}


def memory(draft: Draft, arguments: Mapping[str, Any]) -> GuestRam | None:
    """Ours for an `object-add` of a memory backend; None for what is left to QEMU."""
    if not str(arguments.get("qom-type", "")).startswith("memory-backend-"):
        return None
    try:
        option = Option.of("object", Params.of(list(flatten(dict(arguments)))))
        judged = Draft(CommandLine(draft.command_line.program, (option,)), draft.binary)
        RamRule().backend(judged, option)
    except BadCommandLine:
        return None  # QEMU says what is wrong with it
    found = judged.kept[:1]
    return found[0] if found and isinstance(found[0], GuestRam) else None


async def add_memory(monitor: Monitor, ram: GuestRam, arguments: Mapping[str, Any]) -> Reply:
    """Have QEMU use our memory in the place of its own. Raises SegueError."""
    await ram.start()
    try:
        lent = await monitor.execute("add-fd", {"opaque": "segue"}, fds=[ram.fd])
        try:
            given = {k: v for k, v in arguments.items() if k not in ORIGIN}
            given |= {
                "qom-type": "memory-backend-file",
                "size": ram.size,
                "mem-path": f"/proc/self/fd/{lent['fd']}",
                "share": True,
            }
            if arguments.get("prealloc"):
                given["prealloc"] = True
            reply = await monitor.relay({"execute": "object-add", "arguments": given})
        finally:
            await monitor.execute("remove-fd", {"fdset-id": lent["fdset-id"]})
    except BaseException:
        ram.close()
        raise
    if "error" in reply:
        ram.close()
    return reply


def chardev(arguments: Mapping[str, Any]) -> Chardev | None:
    """What a `chardev-add` means in the words of a command line; None if it cannot be read."""
    try:
        backend = arguments["backend"]
        kind, data = backend["type"], dict(backend.get("data") or {})
        params = {key: value for key, value in data.items() if not isinstance(value, dict)}
        if kind == "socket":
            address = data["addr"]
            params |= {{"str": "fd"}.get(key, key): value for key, value in address["data"].items()}
            params.setdefault("server", True)
            params["wait"] = False
        elif kind == "udp":
            params |= data["remote"]["data"]
            if "local" in data:
                params |= {
                    f"local{k}".replace("localhost", "localaddr"): v
                    for k, v in data["local"]["data"].items()
                }
        elif kind == "file":
            params["path"] = params.pop("out")
            if "in" in params:
                params["input-path"] = params.pop("in")
        elif kind in ("pipe", "serial", "parallel"):
            params["path"] = params.pop("device")
        if any(
            type(params[key]) is not wanted
            for wanted, keys in _TYPES.items()
            for key in keys.intersection(params)
        ):
            return None
        return Chardev(arguments["id"], kind, Params.of(list(flatten(params))))
    except (KeyError, TypeError, AttributeError):
        return None


def broker(found: Chardev | None, say: Callable[[str], None]) -> Broker | None:
    """What keeps it; None for what is left to QEMU."""
    if found is None or "fd" in found.params:
        return None
    try:
        kept = keeping.make(found, out=say, err=say) if keeping.is_kept(found) else None
    except BadCommandLine:
        return None  # QEMU says what is wrong with it
    return kept if isinstance(kept, Broker) else None


async def add_chardev(
    monitor: Monitor, command: str, kept: Broker, lending: Lending, arguments: Mapping[str, Any]
) -> Reply:
    """`chardev-add` or `chardev-change` with an end of ours. Raises SegueError."""
    await kept.start()
    try:
        words = Params.parse(kept.arguments(lending)[1], "backend")
        await monitor.execute("getfd", {"fdname": kept.name}, fds=[int(words.get("fd") or "")])
        data: dict[str, Any] = {
            "addr": {"type": "fd", "data": {"str": kept.name}},
            "server": False,
        }
        given = arguments["backend"].get("data", {})
        data |= {key: given[key] for key in ("logfile", "logappend") if key in given}
        backend = {"type": "socket", "data": data}
        reply = await monitor.relay(
            {"execute": command, "arguments": {"id": kept.name, "backend": backend}}
        )
    except BaseException:
        kept.close()
        raise
    if "error" in reply:
        kept.close()
    elif kept.filename.startswith("pty:"):
        reply["return"]["pty"] = kept.filename.removeprefix("pty:")
    return reply


def why_not(found: Chardev | None) -> str | None:
    """Why a character device that was added cannot be given to a successor."""
    if found is None:
        return "its arguments are not understood"
    if "fd" in found.params:
        return "its descriptor was lent to one QEMU"
    return keeping.unsupported(found)


def words(found: Chardev) -> list[str]:
    """For one that holds nothing outside of QEMU but a file, which is not begun anew."""
    params = found.params
    if found.backend == "file":
        params = params.set("append", True)
    if "logfile" in params:
        params = params.set("logappend", True)
    return replace(found, params=params).to_option().argv()
