"""The `key=value,key=value` text (or JSON) that most of QEMU's options take.

QEMU has three readers for it: QemuOpts (most options), keyval (`-machine`, `-blockdev`, ...)
and the old `-cpu` syntax. `Params` holds what any of them sees: an ordered list of keys and
values, each with the *form* it was written in, so that printing gives back the same text.
It never decides which reader QEMU will use: text that keyval would refuse (a bare word that
is not the first) is kept and printed as it was, and QEMU itself refuses it.

Facts are from util/qemu-option.c, util/keyval.c, util/cutils.c, qobject/json-lexer.c and
target/i386/cpu.c of QEMU 7.2 and 10.0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from itertools import starmap
from typing import Any, NamedTuple

from segue.errors import BadCommandLine
from segue.qemu.jsontree import (
    FALSE,
    TRUE,
    Value,
    dump_json,
    flatten,
    listify,
    load_json,
    put,
    sieve,
    to_text,
)

# Words that ask QEMU to list what there is.
HELP = frozenset({"help", "?"})


class Form(Enum):
    """How a parameter was spelled; the value says what precedes or replaces the key."""

    PAIR = "key=value"
    BARE = "value"  # the first word, whose key is implied by the option
    ON = "key"  # a short-form boolean
    OFF = "nokey"
    PLUS = "+key"  # -cpu only
    MINUS = "-key"  # -cpu only


class Param(NamedTuple):
    key: str
    value: str
    form: Form = Form.PAIR

    def __str__(self) -> str:
        match self.form:
            case Form.PAIR:
                return f"{self.key}={escape(self.value)}"
            case Form.BARE:
                return escape(self.value)
            case Form.ON:
                return self.key
            case Form.OFF:
                return f"no{self.key}"
            case Form.PLUS:
                return f"+{self.key}"
            case Form.MINUS:
                return f"-{self.key}"


@dataclass(frozen=True)
class Params:
    """The parameters of one option, immutable; changing methods give a new one.

    `json` is the text if they were written as JSON; `entries` are then the scalars in it, with
    dotted keys (`addr.type`, `fds.0`) and QEMU's text for each (`on`, `off`, a number, and an
    empty text for null).
    """

    entries: tuple[Param, ...] = ()
    implied: str | None = None
    json: str | None = None

    @classmethod
    def parse(cls, text: str, implied: str | None = None) -> Params:
        """Read `text` as QEMU would. `implied` is the key of a first word without one.

        Raises BadCommandLine for JSON that QEMU would not read.
        """
        if text.startswith("{"):
            tree = load_json(text)
            return cls(tuple(starmap(Param, flatten(tree))), implied, dump_json(tree))
        return cls(tuple(_split(text, implied)), implied)

    @classmethod
    def parse_cpu(cls, text: str) -> Params:
        """Read the argument of `-cpu`: `model[,+flag][,-flag][,flag=value][,flag]`."""
        model, *flags = text.split(",")
        entries = [Param("model", model, Form.BARE)]
        # strtok() merges empty words; a comma cannot be written in this syntax.
        for word in filter(None, flags):
            key, equals, value = word.partition("=")
            if equals:
                entries.append(Param(key, value))
            elif word[0] == "+":
                entries.append(Param(word[1:], "on", Form.PLUS))
            elif word[0] == "-":
                entries.append(Param(word[1:], "off", Form.MINUS))
            else:
                entries.append(Param(word, "on", Form.ON))
        return cls(tuple(entries), "model")

    @classmethod
    def of(
        cls, pairs: Iterable[tuple[str, Value]] | Mapping[str, Value], implied: str | None = None
    ) -> Params:
        """Build from keys and values; a first key that is `implied` is printed bare."""
        items = pairs.items() if isinstance(pairs, Mapping) else pairs
        entries = [_pair(key, to_text(value)) for key, value in items]
        if entries and entries[0].key == implied and _can_be_bare(entries[0].value):
            entries[0] = entries[0]._replace(form=Form.BARE)
        return cls(tuple(entries), implied)

    def __str__(self) -> str:
        if self.json is not None:
            return self.json
        texts = list(map(str, self.entries))
        # A last parameter of no letters is there only if a comma follows it.
        return ",".join(texts) + ("," if texts and not texts[-1] else "")

    def __contains__(self, key: object) -> bool:
        return any(entry.key == key for entry in self.entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.entries)

    def get(self, key: str, default: str | None = None) -> str | None:
        """The value that QEMU uses: the last one given."""
        for entry in reversed(self.entries):
            if entry.key == key:
                return entry.value
        return default

    def all(self, key: str) -> list[str]:
        return [entry.value for entry in self.entries if entry.key == key]

    def keys(self) -> list[str]:
        return list(dict.fromkeys(entry.key for entry in self.entries))

    def items(self) -> list[tuple[str, str]]:
        return [(entry.key, entry.value) for entry in self.entries]

    def boolean(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if value not in TRUE | FALSE:
            raise BadCommandLine(
                f"Parameter '{key}' expects 'on' or 'off'", f"write {key}=on or {key}=off"
            )
        return value in TRUE

    def number(self, key: str, default: int) -> int:
        """A non-negative whole number, decimal, 0x hexadecimal or 0 octal."""
        value = self.get(key)
        if value is None:
            return default
        match = re.fullmatch(r"\s*\+?(?:0[xX]([0-9a-fA-F]+)|(0[0-7]*)|([1-9][0-9]*))", value)
        if not match:
            raise BadCommandLine(f"Parameter '{key}' expects a number", f"it is '{value}'")
        hexadecimal, octal, decimal = match.groups()
        if hexadecimal:
            return int(hexadecimal, 16)
        return int(octal, 8) if octal else int(decimal)

    def size(self, key: str, default: int, default_suffix: str = "B") -> int:
        """A size in bytes."""
        value = self.get(key)
        return default if value is None else parse_size(value, default_suffix)

    def set(self, key: str, value: Value) -> Params:
        """Replace the value in place, dropping repetitions, or append it.

        In JSON an existing value keeps its type where the new text allows, and a new one has
        the type that was passed.
        """
        if self.json is not None:
            tree = load_json(self.json)
            put(tree, key, value)
            return self._of_tree(tree)
        new = _pair(key, to_text(value))
        kept: list[Param] = []
        done = False
        for entry in self.entries:
            if entry.key != key:
                kept.append(entry)
            elif not done:
                bare = entry.form is Form.BARE and _can_be_bare(new.value)
                kept.append(new._replace(form=Form.BARE) if bare else new)
                done = True
        return replace(self, entries=(*kept, *(() if done else (new,))))

    def update(self, pairs: Iterable[tuple[str, Value]] | Mapping[str, Value]) -> Params:
        result = self
        for key, value in pairs.items() if isinstance(pairs, Mapping) else pairs:
            result = result.set(key, value)
        return result

    def without(self, *keys: str) -> Params:
        """Drop these keys and what is nested in them (`addr` drops `addr.type` too)."""
        return self._filtered(lambda key: not _within(key, keys))

    def only(self, *keys: str) -> Params:
        """Keep these keys and what is nested in them."""
        return self._filtered(lambda key: _within(key, keys))

    def sub(self, prefix: str) -> Params:
        """What is nested in `prefix`, without it: of `file.driver`, `sub('file')` has `driver`."""
        head = prefix + "."
        return Params(
            tuple(
                Param(entry.key[len(head) :], entry.value)
                for entry in self.entries
                if entry.key.startswith(head)
            )
        )

    def rename(self, old: str, new: str) -> Params:
        """Give the values of `old` to the key `new`, where they stand. Text only."""
        if self.json is not None:
            value = self.get(old)
            return self if value is None else self.without(old).set(new, value)
        return replace(
            self,
            entries=tuple(
                _pair(new, entry.value) if entry.key == old else entry for entry in self.entries
            ),
        )

    def as_text(self) -> Params:
        """The same parameters as `key=value` text, which loses the types of JSON."""
        return self if self.json is None else Params.of(self.items(), self.implied)

    def tree(self) -> dict[str, Any]:
        """Nested dicts and lists: JSON as it is, text with a level for each dotted key."""
        if self.json is not None:
            return load_json(self.json)
        root: dict[str, Any] = {}
        for entry in self.entries:
            *path, last = entry.key.split(".")
            node = root
            for name in path:
                below = node.setdefault(name, {})
                if not isinstance(below, dict):
                    raise BadCommandLine(
                        f"Parameters '{name}.*' used inconsistently",
                        f"'{name}' cannot be a value and a group at once",
                    )
                node = below
            node[last] = entry.value
        return {name: listify(node) for name, node in root.items()}

    def cpu_features(self) -> dict[str, str]:
        """The flags of `-cpu` in QEMU's order of precedence: `flag=value`, then +flag, then -flag.

        Underscores become dashes, as on x86.
        """
        rank = {Form.PLUS: 1, Form.MINUS: 2}
        flags = sorted(
            (entry for entry in self.entries if entry.form is not Form.BARE),
            key=lambda entry: rank.get(entry.form, 0),
        )
        return {entry.key.replace("_", "-"): entry.value for entry in flags}

    def _filtered(self, keep: Callable[[str], bool]) -> Params:
        if self.json is not None:
            return self._of_tree(sieve(load_json(self.json), keep))
        return replace(self, entries=tuple(entry for entry in self.entries if keep(entry.key)))

    def _of_tree(self, tree: dict[str, Any]) -> Params:
        return Params(tuple(starmap(Param, flatten(tree))), self.implied, dump_json(tree))


def escape(value: str) -> str:
    return value.replace(",", ",,")


def _pair(key: str, value: str) -> Param:
    if "=" in key or "," in key:
        raise BadCommandLine(f"'{key}' cannot be the name of a parameter", "it has '=' or ','")
    return Param(key, value)


def _can_be_bare(value: str) -> bool:
    # keyval reads no escaped comma in a bare word, so none is written in one.
    return bool(value) and not set(value) & {",", "="} and value not in HELP


def _within(key: str, groups: tuple[str, ...]) -> bool:
    return any(key == group or key.startswith(group + ".") for group in groups)


def _split(text: str, implied: str | None) -> Iterator[Param]:
    """One entry a parameter, by the rules of get_opt_name_value() in util/qemu-option.c."""
    at = 0
    while at < len(text):
        stop = next((i for i in range(at, len(text)) if text[i] in "=,"), len(text))
        word = text[at:stop]
        if text[stop : stop + 1] == "=":
            value, at = _value(text, stop + 1)
            yield Param(word, value)
        elif implied is not None:
            value, at = _value(text, at)
            yield Param(implied, value, Form.BARE)
        else:
            if word.startswith("no"):
                yield Param(word[2:], "off", Form.OFF)
            else:
                yield Param(word, "on", Form.ON)
            at = stop + 1
        implied = None


def _value(text: str, at: int) -> tuple[str, int]:
    """The value that begins at `at`, and where the next parameter begins."""
    value = []
    while at < len(text):
        if text[at] == ",":
            at += 1
            if text[at : at + 1] != ",":
                break
        value.append(text[at])
        at += 1
    return "".join(value), at


# -- sizes --------------------------------------------------------------------------------

_SUFFIXES = "BKMGTPE"
_SIZE = re.compile(r"\s*\+?(?:0[xX]([0-9a-fA-F]+)|(\d+)(\.\d*)?)([a-zA-Z]?)", re.ASCII)


def parse_size(text: str, default_suffix: str = "M") -> int:
    """Bytes of a size as QEMU writes it: `512`, `2G`, `1.5G`, `0x1000`. Powers of 1024.

    Raises BadCommandLine. The rules, with their rounding, are do_strtosz()'s in util/cutils.c.
    """
    hint = "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-, exabytes"
    match = _SIZE.fullmatch(text)
    if not match or (match[4] and match[4].upper() not in _SUFFIXES):
        raise BadCommandLine(f"'{text}' is not a size", hint)
    hexadecimal, whole, fraction, suffix = match.groups()
    unit: int = 1024 ** _SUFFIXES.index((suffix or default_suffix).upper())
    if hexadecimal is not None:
        size = int(hexadecimal, 16) * unit
    else:
        # Exact, without the weight of the fractions module.
        above, below = float(f"0{fraction}0" if fraction else "0").as_integer_ratio()
        if above and unit == 1:
            raise BadCommandLine(f"'{text}' is not a whole number of bytes", hint)
        size = int(whole) * unit + (2 * above * unit + below) // (2 * below)
    if size >= 1 << 64:
        raise BadCommandLine(f"'{text}' is out of range", "a size is below 2^64 bytes")
    return size


def format_size(size: int) -> str:
    """The shortest exact text with a suffix, so that no default suffix applies to it."""
    power = 0
    while size and size % 1024 == 0 and power < len(_SUFFIXES) - 1:
        size //= 1024
        power += 1
    return f"{size}{_SUFFIXES[power]}"
