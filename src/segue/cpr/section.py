"""Sections: frozen dataclasses with a name and a version, and their way to JSON values and back.

What a field may be annotated with:

    bool  int  float  str  None              themselves (an int may stand where a float is declared)
    bytes                                    base64
    X | None                                 either
    tuple[X, ...]  tuple[X, Y]  dict[str, X] a list or map of the same
    an Enum                                  its value
    another frozen dataclass                 a map of its fields; its version is the section's
    Descriptor                               its name; the descriptor itself passes beside the data
    Any                                      JSON values as they are: None, bool, int, float, str,
                                             list and dict[str, ...] of those

Hooks, all optional. They must be pure: they run in a process that is only asked, too.

    def pre_save(self) -> Self                  what is saved in place of this one
    @classmethod
    def pre_load(cls, fields: dict[str, Any], version: int) -> dict[str, Any]
                                                an older version's JSON values made ours
    def post_load(self, version: int) -> Self   what is loaded in place of this one

`version` is the one that was written. Without `pre_load` an older version's missing fields take
their defaults. Any exception of a hook is a refusal.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any, NoReturn, TypeVar, Union

from segue.cpr.descriptor import Descriptor
from segue.cpr.errors import Misuse, Reason, Refused

T = TypeVar("T")
Find = Callable[[str], Descriptor]

_DECLARATION = "__cpr_section__"
_SCALARS = (bool, int, float, str)
# Deeper than anybody's data, and shallower than what json itself can read and write.
_MAX_NESTING = 100


@dataclass(frozen=True)
class Declaration:
    """What `section` was given. `oldest` is the oldest version that this code can read."""

    name: str
    version: int
    oldest: int
    optional: bool
    priority: int


def section(
    name: str,
    *,
    version: int,
    oldest: int | None = None,
    optional: bool = False,
    priority: int = 0,
) -> Callable[[type[T]], type[T]]:
    """Declare a frozen dataclass to be a section of a state.

    `oldest` is the oldest version that this code can read; without it, `version` alone. Code that
    does not know an `optional` section, or only an older version of it, ignores it with its
    descriptors (a subsection, in QEMU's words). Sections of higher `priority` are loaded first.
    Raises Misuse for what is no frozen dataclass.
    """
    oldest = version if oldest is None else oldest
    if not 1 <= oldest <= version:
        raise Misuse(f"section {name}: versions {oldest} to {version} make no sense")
    declared = Declaration(name, version, oldest, optional, priority)

    def declare(kind: type[T]) -> type[T]:
        parameters = getattr(kind, "__dataclass_params__", None)
        if parameters is None or not parameters.frozen:
            raise Misuse(
                f"section {name}: {kind.__name__} is not a frozen dataclass",
                "put @section above @dataclass(frozen=True)",
            )
        setattr(kind, _DECLARATION, declared)
        return kind

    return declare


def declaration(kind: type[Any]) -> Declaration:
    """Raises Misuse for a class that is no section."""
    # Not inherited: a subclass has other fields.
    declared = vars(kind).get(_DECLARATION)
    if not isinstance(declared, Declaration):
        raise Misuse(f"{kind.__name__} is not declared as a section", "use @segue.cpr.section")
    return declared


def pack(value: object) -> tuple[dict[str, Any], list[Descriptor]]:
    """A section as plain values, and the descriptors that its fields hold.

    Raises Misuse for a value that is not what its field declares, Refused by a hook.
    """
    name = declaration(type(value)).name
    saved = _hook(name, "pre_save", value)
    if type(saved) is not type(value):
        raise Misuse(f"section {name}: pre_save gave a {type(saved).__name__}")
    descriptors: list[Descriptor] = []
    packed: dict[str, Any] = _Pack(descriptors).dataclass(saved, f"section {name}")
    return packed, descriptors


def unpack(kind: type[T], fields: Any, version: int, find: Find) -> T:
    """The section that `fields` of `version` are. Raises Refused, Misuse for a bad declaration."""
    declared = declaration(kind)
    older = version < declared.version
    if older and isinstance(fields, dict):
        fields = _hook(declared.name, "pre_load", kind, fields, version)
    loaded = _Unpack(find, older).dataclass(kind, fields, f"section {declared.name}")
    loaded = _hook(declared.name, "post_load", loaded, version)
    if type(loaded) is not kind:
        raise Misuse(f"section {declared.name}: post_load gave a {type(loaded).__name__}")
    return loaded


def _hook(name: str, hook: str, owner: Any, *arguments: Any) -> Any:
    """What the hook gives; the first argument, or else the owner, where there is none."""
    method = getattr(owner, hook, None)
    if method is None:
        return arguments[0] if hook == "pre_load" else owner
    try:
        return method(*arguments)
    except Refused:
        raise
    except Exception as error:
        raise Refused(f"section {name}: {hook}: {error!r}") from error


def _fields(kind: type[Any]) -> dict[str, tuple[Any, bool]]:
    """Each field's annotation, and whether it has a default."""
    hashable: Any = kind
    return _read_fields(hashable)


@cache
def _read_fields(kind: Any) -> dict[str, tuple[Any, bool]]:
    hints = typing.get_type_hints(kind)
    missing = dataclasses.MISSING
    return {
        field.name: (
            hints[field.name],
            field.default is not missing or field.default_factory is not missing,
        )
        for field in dataclasses.fields(kind)
        if field.init
    }


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (Union, types.UnionType)


def _other_than_none(annotation: Any, where: str) -> Any:
    others = [one for one in typing.get_args(annotation) if one is not type(None)]
    if len(others) != 1:
        _undeclarable(annotation, where)
    return others[0]


def _item_types(annotation: Any, count: int) -> list[Any] | None:
    """The annotation of each item of a tuple; None where there must be another number of them."""
    items = list(typing.get_args(annotation))
    if len(items) == 2 and items[1] is Ellipsis:
        return [items[0]] * count
    return items if len(items) == count else None


def _value_type(annotation: Any, where: str) -> Any:
    key, value = typing.get_args(annotation)
    if key is not str:
        _undeclarable(annotation, where)
    return value


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """Raises Misuse where JSON would give back something else."""
    if depth > _MAX_NESTING:
        raise Misuse(f"{where} nests deeper than {_MAX_NESTING}")
    kind = type(value)
    if kind is list:
        return [_plain(item, where, depth + 1) for item in value]
    if kind is dict:
        for key in value:
            if type(key) is not str:
                raise Misuse(f"{where} has a {type(key).__name__} as a key, which JSON cannot")
        return {key: _plain(item, where, depth + 1) for key, item in value.items()}
    if value is not None and kind not in _SCALARS:
        raise Misuse(f"{where} holds a {kind.__name__}, which is no JSON value")
    return value


def _is_frozen(annotation: Any) -> bool:
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation)


def _undeclarable(annotation: Any, where: str) -> NoReturn:
    raise Misuse(f"{where} is declared as {annotation!r}, which cannot be kept")


class _Pack:
    def __init__(self, descriptors: list[Descriptor]) -> None:
        self._descriptors = descriptors

    def dataclass(self, value: Any, where: str) -> dict[str, Any]:
        return {
            name: self._value(getattr(value, name), annotation, f"{where}, {name}")
            for name, (annotation, _) in _fields(type(value)).items()
        }

    def _value(self, value: Any, annotation: Any, where: str) -> Any:
        if annotation is Any:
            return _plain(value, where)
        if annotation in (None, type(None)) or (value is None and _is_union(annotation)):
            return self._expect(value is None, None, value, annotation, where)
        if _is_union(annotation):
            return self._value(value, _other_than_none(annotation, where), where)
        origin = typing.get_origin(annotation)
        if origin is tuple:
            self._expect(isinstance(value, tuple), None, value, annotation, where)
            kinds = _item_types(annotation, len(value))
            if kinds is None:
                self._expect(False, None, value, annotation, where)
            return [
                self._value(item, kind, f"{where}[{number}]")
                for number, (item, kind) in enumerate(zip(value, kinds or (), strict=True))
            ]
        if origin is dict:
            self._expect(isinstance(value, dict), None, value, annotation, where)
            kind = _value_type(annotation, where)
            for key in value:
                self._expect(type(key) is str, None, key, str, f"{where}, a key")
            return {
                key: self._value(item, kind, f"{where}[{key!r}]") for key, item in value.items()
            }
        if not isinstance(annotation, type):
            _undeclarable(annotation, where)
        if annotation is bytes:
            self._expect(isinstance(value, bytes | bytearray), None, value, annotation, where)
            return base64.b64encode(value).decode("ascii")
        if annotation is float and type(value) is int:
            return float(value)
        if annotation in _SCALARS:
            return self._expect(type(value) is annotation, value, value, annotation, where)
        self._expect(type(value) is annotation, None, value, annotation, where)
        if isinstance(value, Descriptor):
            self._descriptors.append(value)
            return value.name
        if isinstance(value, Enum):
            return _plain(value.value, where)
        if _is_frozen(annotation):
            return self.dataclass(value, where)
        _undeclarable(annotation, where)

    @staticmethod
    def _expect(holds: bool, result: Any, value: Any, annotation: Any, where: str) -> Any:
        if not holds:
            raise Misuse(f"{where} is a {type(value).__name__}, declared as {_name(annotation)}")
        return result


class _Unpack:
    """`older`: fields may be missing that the version that was written did not have."""

    def __init__(self, find: Find, older: bool) -> None:
        self._find = find
        self._older = older

    def dataclass(self, kind: type[T], plain: Any, where: str) -> T:
        self._expect(isinstance(plain, dict), plain, kind, where)
        declared = _fields(kind)
        for name in plain:
            if name not in declared:
                raise Refused(f"{where} has a field {name}, which is unknown", reason=Reason.FIELDS)
        values = {}
        for name, (annotation, has_default) in declared.items():
            if name in plain:
                values[name] = self._value(plain[name], annotation, f"{where}, {name}")
            elif not (self._older and has_default):
                raise Refused(f"{where} lacks the field {name}", reason=Reason.FIELDS)
        try:
            return kind(**values)
        except (TypeError, ValueError) as error:
            raise Refused(f"{where}: {error}", reason=Reason.FIELDS) from error

    def _value(self, plain: Any, annotation: Any, where: str) -> Any:
        if annotation is Any:
            return plain
        if annotation in (None, type(None)) or (plain is None and _is_union(annotation)):
            self._expect(plain is None, plain, annotation, where)
            return None
        if _is_union(annotation):
            return self._value(plain, _other_than_none(annotation, where), where)
        origin = typing.get_origin(annotation)
        if origin is tuple:
            kinds = _item_types(annotation, len(plain)) if isinstance(plain, list) else None
            self._expect(kinds is not None, plain, annotation, where)
            return tuple(
                self._value(item, kind, f"{where}[{number}]")
                for number, (item, kind) in enumerate(zip(plain, kinds or (), strict=True))
            )
        if origin is dict:
            self._expect(isinstance(plain, dict), plain, annotation, where)
            kind = _value_type(annotation, where)
            return {
                key: self._value(item, kind, f"{where}[{key!r}]") for key, item in plain.items()
            }
        if not isinstance(annotation, type):
            _undeclarable(annotation, where)
        if annotation is bytes:
            return self._bytes(plain, where)
        if annotation in _SCALARS:
            self._expect(type(plain) is annotation, plain, annotation, where)
            return plain
        if annotation is Descriptor:
            self._expect(isinstance(plain, str), plain, annotation, where)
            return self._find(plain)
        if issubclass(annotation, Enum):
            try:
                return annotation(plain)
            except ValueError as error:
                raise Refused(f"{where}: {error}", reason=Reason.FIELDS) from error
        if _is_frozen(annotation):
            return self.dataclass(annotation, plain, where)
        _undeclarable(annotation, where)

    def _bytes(self, plain: Any, where: str) -> bytes:
        self._expect(isinstance(plain, str), plain, bytes, where)
        try:
            return base64.b64decode(plain, validate=True)
        except (binascii.Error, ValueError) as error:
            raise Refused(f"{where} is no base64: {error}", reason=Reason.FIELDS) from error

    @staticmethod
    def _expect(holds: bool, plain: Any, annotation: Any, where: str) -> None:
        if not holds:
            raise Refused(
                f"{where} is a {type(plain).__name__}, not {_name(annotation)}",
                reason=Reason.FIELDS,
            )


def _name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)
