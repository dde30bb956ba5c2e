"""Commands and events of Segue's own: how they are declared, checked, and shown to clients.

A declaration is plain data, `name -> (Python type, required)`, and serves for two things: the
arguments are refused with the words that QEMU's own commands have for it, and `query-qmp-schema`
shows each command and event as QAPI's introspection does.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from segue.errors import CommandFailed, SegueError

if TYPE_CHECKING:
    from segue.qmp.client import Client

Handler = Callable[[dict[str, Any], "Client"], Awaitable[Any]]
Members = Mapping[str, tuple[type, bool]]

# Python's type: (QEMU's word in an error, QAPI's name of the type, its JSON type).
_TYPES: Mapping[type, tuple[str, str, str]] = {
    str: ("string", "str", "string"),
    bool: ("boolean", "bool", "boolean"),
    int: ("integer", "int", "int"),
    float: ("number", "number", "number"),
    list: ("array", "any", "value"),
    dict: ("object", "any", "value"),
}


@dataclass(frozen=True)
class Command:
    """A command that the supervisor answers.

    The handler gets the checked arguments and the client; what it returns is the `return` of the
    reply, a SegueError the `error`. It decides itself what to do during an upgrade: the gate is
    for relayed commands. `read_only` says that it may be given at any time.
    """

    name: str
    handler: Handler
    arguments: Members = field(default_factory=dict)
    read_only: bool = False
    doc: str = ""


# What the supervisor emits besides the instance's own events.
EVENTS: Mapping[str, Members] = {
    "SEGUE_UPGRADE": {"phase": (str, True), "state": (str, True), "seconds": (float, False)},
}

# Commands of QEMU's that take the descriptor that came with them.
TAKE_FD: Mapping[str, Members] = {
    "getfd": {"fdname": (str, True)},
    "add-fd": {"fdset-id": (int, False), "opaque": (str, False)},
}


class BadArguments(Exception):
    """The message is QEMU's."""


def check_arguments(members: Members, arguments: Mapping[str, Any]) -> None:
    """Raises BadArguments as QAPI's visitor does: in the order declared, then what is too much."""
    for name, (kind, required) in members.items():
        if name not in arguments:
            if required:
                raise BadArguments(f"Parameter '{name}' is missing")
        elif not _fits(arguments[name], kind):
            raise BadArguments(f"Invalid parameter type for '{name}', expected: {_TYPES[kind][0]}")
    for name in arguments:
        if name not in members:
            raise BadArguments(f"Parameter '{name}' is unexpected")


def _fits(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def error(desc: str, error_class: str = "GenericError") -> dict[str, Any]:
    return {"error": {"class": error_class, "desc": desc}}


def error_of(failure: SegueError) -> dict[str, Any]:
    """A reply that says what happened, what helps, and where the guest is."""
    asides = [failure.hint] if failure.hint else []
    if failure.guest:
        asides.append(f"guest is {failure.guest}")
    desc = f"{failure.what} ({'; '.join(asides)})" if asides else failure.what
    error_class = failure.error_class if isinstance(failure, CommandFailed) else "GenericError"
    return error(desc, error_class)


def schema(
    commands: Mapping[str, Members], events: Mapping[str, Members], known: set[str]
) -> list[dict[str, Any]]:
    """Entries for query-qmp-schema, with the types that they need and `known` has not.

    QEMU's own types have numbers for names, so ours cannot clash with them.
    """
    entries: dict[str, dict[str, Any]] = {}

    def members_type(name: str, members: Members) -> str:
        for kind, _ in members.values():
            _, qapi, json_type = _TYPES[kind]
            entries[qapi] = {"name": qapi, "meta-type": "builtin", "json-type": json_type}
        entries[name] = {
            "name": name,
            "meta-type": "object",
            "members": [
                {"name": member, "type": _TYPES[kind][1]} | ({} if required else {"default": None})
                for member, (kind, required) in members.items()
            ],
        }
        return name

    for name, members in commands.items():
        entries["any"] = {"name": "any", "meta-type": "builtin", "json-type": "value"}
        entries[name] = {
            "name": name,
            "meta-type": "command",
            "arg-type": members_type(f"{name}-arguments", members),
            "ret-type": "any",
        }
    for name, members in events.items():
        entries[name] = {
            "name": name,
            "meta-type": "event",
            "arg-type": members_type(f"{name}-data", members),
        }
    return [entry for name, entry in entries.items() if name not in known]
