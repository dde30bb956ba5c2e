"""Options written as JSON: QEMU's dialect of it, and access by dotted keys.

A dotted key such as `file.filename` or `fds.0` leads through nested objects and lists; the
names of members may have dots themselves, and then the whole name is tried first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from segue.errors import BadCommandLine

# What a caller may set: JSON parameters keep the type, text parameters get QEMU's spelling.
Value = str | bool | int

TRUE = frozenset({"on", "yes", "true", "y"})
FALSE = frozenset({"off", "no", "false", "n"})


def to_text(value: Value) -> str:
    """QEMU's text for a value."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


_STRING = re.compile(r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'", re.DOTALL)


def load_json(text: str) -> dict[str, Any]:
    """An object in QEMU's JSON, which also has strings in single quotes.

    Raises BadCommandLine, also for a key that is given twice, as QEMU does.
    """
    try:
        tree = json.loads(
            _STRING.sub(_double_quoted, text),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
        )
    except (ValueError, RecursionError) as error:
        raise BadCommandLine(f"JSON parse error: {error}", f"in {text}") from None
    if not isinstance(tree, dict):
        raise BadCommandLine("JSON parse error: an object is expected", f"in {text}")
    return tree


def dump_json(tree: dict[str, Any]) -> str:
    return json.dumps(tree, separators=(",", ":"), ensure_ascii=False)


def _double_quoted(match: re.Match[str]) -> str:
    inner = re.sub(
        r"\\.|\"",
        lambda part: {'"': '\\"', "\\'": "'"}.get(part[0], part[0]),
        match[0][1:-1],
        flags=re.DOTALL,
    )
    return f'"{inner}"'


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        raise ValueError("duplicate key")
    return tree


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"invalid keyword '{name}'")


def flatten(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, dict):
        below: Iterable[tuple[Any, Any]] = node.items()
    elif isinstance(node, list):
        below = enumerate(node)
    else:
        yield prefix, "" if node is None else to_text(node)
        return
    for name, value in below:
        yield from flatten(value, _join(prefix, name))


def listify(node: Any) -> Any:
    """Objects whose names are all numbers become lists, as keyval has them."""
    if not isinstance(node, dict):
        return node
    below = {name: listify(value) for name, value in node.items()}
    if below and all(name.isdecimal() for name in below):
        return [below[name] for name in sorted(below, key=int)]
    return below


def _slots(node: Any, key: str) -> Iterator[tuple[Any, Any]]:
    """Every (container, index) that the dotted key can mean; the names in it may have dots."""
    if isinstance(node, list):
        head, _, rest = key.partition(".")
        if not head.isdecimal() or int(head) >= len(node):
            return
        if rest:
            yield from _slots(node[int(head)], rest)
        else:
            yield node, int(head)
    elif isinstance(node, dict):
        for name in list(node):
            if name == key:
                yield node, name
            elif key.startswith(name + "."):
                yield from _slots(node[name], key[len(name) + 1 :])


def put(tree: dict[str, Any], key: str, value: Value) -> None:
    slot = next(_slots(tree, key), None)
    if slot is not None:
        container, index = slot
        container[index] = _typed_as(container[index], value)
        return
    # A new key goes into the deepest group that exists.
    head, dot, _ = key.rpartition(".")
    while dot:
        for container, index in _slots(tree, head):
            if isinstance(container[index], dict):
                container[index][key[len(head) + 1 :]] = value
                return
        head, dot, _ = head.rpartition(".")
    tree[key] = value


def sieve(node: Any, keep: Callable[[str], bool], prefix: str = "") -> Any:
    """A copy with only those scalars whose dotted key is wanted, without groups that it emptied."""
    if isinstance(node, dict):
        members = {name: _join(prefix, name) for name in node}
        kept = {name: sieve(node[name], keep, key) for name, key in members.items()}
        return {
            name: below
            for name, below in kept.items()
            if _survives(node[name], below, keep, members[name])
        }
    if isinstance(node, list):
        keys = [_join(prefix, index) for index in range(len(node))]
        pairs = [(old, sieve(old, keep, key), key) for old, key in zip(node, keys, strict=True)]
        return [below for old, below, key in pairs if _survives(old, below, keep, key)]
    return node


def _survives(old: Any, new: Any, keep: Callable[[str], bool], key: str) -> bool:
    if isinstance(old, dict | list) and old:
        return bool(new)
    return keep(key)


def _join(prefix: str, name: object) -> str:
    return f"{prefix}.{name}" if prefix else str(name)


def _typed_as(old: Any, value: Value) -> Value:
    if not isinstance(value, str):
        return value
    if isinstance(old, bool) and value in TRUE | FALSE:
        return value in TRUE
    if isinstance(old, int) and not isinstance(old, bool) and re.fullmatch(r"-?\d+", value):
        return int(value)
    return value
