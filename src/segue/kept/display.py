"""VNC: the address moves to the successor once the incumbent is dead; viewers reconnect.

A successor cannot bind a port that the incumbent still holds, so it is started with `-vnc none`
and the same options, and told the address by `display-update` (QEMU 7.1). What clients have said
through QMP since, a password or another address, it is told before anybody can connect.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any

from segue.kept.base import Kept, Lending
from segue.kept.draft import Draft
from segue.qemu.monitor import Monitor
from segue.qemu.options import Params
from segue.saved import Loader, Saver

# Windows and protocols that live inside QEMU's process.
_INSIDE = ("gtk", "sdl", "curses", "cocoa", "spice-app", "dbus", "egl-headless")
_HMP_PASSWORD = re.compile(r"\s*(?:set_password\s+vnc|change\s+vnc\s+password)\s+(\S+)")
_ADDRESS = ("vnc", "to", "reverse", "ipv4", "ipv6", "websocket")


class VncAddress(Kept):
    kind = "vnc"

    def __init__(self, params: Params, words: list[str]) -> None:
        self.name = params.get("vnc") or ""
        self._first = words
        self._later = Params.parse("none", "vnc")
        for key, value in params.without(*_ADDRESS).items():
            self._later = self._later.set(key, value)
        self._address: dict[str, Any] | None = None
        # The last command of each kind, with its arguments.
        self._said: dict[str, dict[str, Any]] = {}

    def arguments(self, lending: Lending) -> list[str]:
        return self._first if lending.first else ["-vnc", str(self._later)]

    def save(self, saver: Saver) -> dict[str, Any]:
        return {"address": self._address, "said": self._said}

    async def load(self, data: dict[str, Any], loader: Loader) -> None:
        self._address, self._said = data["address"], data["said"]

    async def learn(self, monitor: Monitor) -> None:
        for server in (await monitor.execute("query-vnc-servers"))[:1]:
            for address in server["server"][:1]:
                if address["family"] == "unix":
                    self._address = {"type": "unix", "path": address["service"]}
                else:
                    self._address = {
                        "type": "inet",
                        "host": address["host"],
                        "port": address["service"],
                    }

    def observe(
        self, command: str, arguments: dict[str, Any], fds: Sequence[int], answer: Any
    ) -> None:
        """A client's command was carried out."""
        if command == "human-monitor-command":
            if found := _HMP_PASSWORD.match(arguments["command-line"]):
                password = {"protocol": "vnc", "password": found[1]}
                self.observe("set_password", password, (), None)
            return
        if arguments.get("protocol", "vnc") != "vnc" or arguments.get("type", "vnc") != "vnc":
            return
        if arguments.get("display", "default") != "default":
            return  # a second server's, and its password has to be set anew
        match command:
            case "set_password" | "change-vnc-password":
                password = {"protocol": "vnc", "password": arguments["password"]}
                self._said["set_password"] = password
            case "expire_password":
                self._said[command] = arguments | {"time": _moment(arguments["time"])}
            case "display-update" if addresses := arguments.get("addresses"):
                self._address = addresses[0]
            case _:
                return
        self.changed()

    async def settle(self, monitor: Monitor) -> None:
        for command, arguments in self._said.items():
            await monitor.execute(command, arguments)
        if self._address is not None:
            await monitor.execute("display-update", {"type": "vnc", "addresses": [self._address]})

    def identity(self) -> dict[str, Any]:
        return {"address": self._address}


def _moment(when: str) -> str:
    """`+N` of `expire_password` as a point in time; the rest means the same later too.

    `now` above all: QEMU takes it as long ago, while the second that it is now has not passed yet.
    """
    return str(int(time.time()) + int(when[1:])) if when.startswith("+") else when


class DisplayRule:
    def apply(self, draft: Draft) -> None:
        for option in draft.options("display", "sdl", "curses", "spice", "full-screen"):
            kind = option.params.get("type") if option.name == "display" else option.name
            if kind in _INSIDE or kind == "spice":
                draft.block(
                    f"-{option.name} {option.value or ''}".rstrip(),
                    "this display lives inside the QEMU process",
                    "use -vnc, or -display none with a serial console",
                )
            elif kind == "vnc":
                params = Params.parse((option.value or "").removeprefix("vnc="), "vnc")
                self._vnc(draft, option, params)
        for option in draft.options("vnc"):
            self._vnc(draft, option, option.params)
        if not draft.flag("display", "nographic", "vnc", "spice", "sdl", "curses") and not any(
            isinstance(kept, VncAddress) for kept in draft.kept
        ):
            self._default(draft)

    def _vnc(self, draft: Draft, option: Any, params: Params) -> None:
        where = params.get("vnc") or ""
        if where == "none":
            return
        if params.boolean("reverse", False) or params.get("websocket") not in (None, "off"):
            draft.block(
                f"-vnc {option.value}",
                "only listening addresses without websocket can move to the successor",
                "use a plain -vnc address",
            )
            return
        kept = VncAddress(params, option.argv())
        draft.kept.append(kept)
        draft.replace(option, kept)
        draft.note(f"VNC viewers at {where}", "they are disconnected, and can reconnect at once")

    def _default(self, draft: Draft) -> None:
        """QEMU's own default display: a window where it has one, else VNC (qemu_create_..)."""
        windows = sorted(set(draft.binary.displays) & {"gtk", "sdl", "cocoa"})
        if windows:
            draft.block(
                "the default display",
                f"this QEMU opens a {windows[0]} window, which lives inside its process",
                "use -display none, -nographic or -vnc",
            )
            return
        params = Params.parse("localhost:0,to=99", "vnc")
        kept = VncAddress(params, ["-vnc", str(params)])
        draft.kept.append(kept)
        draft.add(kept)
        draft.note("VNC viewers", "they are disconnected, and can reconnect at once")
