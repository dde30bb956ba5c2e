"""One JSON text to a value, with QEMU's extensions and QEMU's words for each mistake.

`json` does the work where it agrees with QEMU. The parser below is for the rest: duplicate keys,
single quotes, `\\'`, strings that are no Unicode to QEMU (a client's message is passed on, and
QEMU answers what it cannot parse without an `id`: nobody would know whose answer it is), and
whatever is wrong. Of QEMU's representations, numbers beyond 64 bits become floating point there,
and so do those here that `json` will not convert.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from typing import Any

_EXPONENT = rb"(?:[eE][+-]?[0-9]++)"
NUMBER = rb"-?(?:0(?:\.[0-9]++%b?)?|[1-9][0-9]*+(?:\.[0-9]++)?%b?)" % (_EXPONENT, _EXPONENT)

# The parser takes about 1 µs a byte; what is larger is refused in general words.
_MAX_EXPLAINED = 64 << 10

_TOKEN = re.compile(
    rb"[ \t\r\n]*+("
    rb'"(?:[^"\\]++|\\.)*"|'
    rb"'(?:[^'\\]++|\\.)*'|"
    rb"[{}\[\],:]|[a-z]++|%b)" % NUMBER,
    re.DOTALL,
)
_FOUR_HEX = re.compile(rb"[0-9a-fA-F]{4}")
_ESCAPES = dict(zip(b"\"'\\/bfnrt", "\"'\\/\b\f\n\r\t", strict=True))
_KEYWORDS = {b"true": True, b"false": False, b"null": None}
# Surrogates and the code points that Unicode has set aside for no character.
_LAST_OF_PLANES = "".join(
    chr(plane << 16 | last) for plane in range(17) for last in (0xFFFE, 0xFFFF)
)
_NOT_UNICODE = re.compile(f"[\ud800-\udfff\ufdd0-\ufdef{_LAST_OF_PLANES}]")


class JsonError(Exception):
    pass


class _Unlike(Exception):
    """`json` would give something else than QEMU."""


def decode(message: bytes, exact: bool = False) -> Any:
    """The value of one message; `exact` if it has what `json` is known to see differently.

    Raises JsonError with QEMU's text.
    """
    if not exact:
        try:
            value = _DECODER.decode(message.decode())
            if not message.isascii() or b"\\u" in message:
                _check_unicode(value)
            return value
        except (ValueError, RecursionError, _Unlike):
            pass
    if len(message) > _MAX_EXPLAINED:
        raise JsonError("JSON parse error, invalid syntax")
    return _Parser(message).parse()


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _Unlike
    return value


def _float(text: str) -> float:
    """As near as a finite number comes: `inf` would not be JSON when it is sent on."""
    value = float(text)
    return value if math.isfinite(value) else math.copysign(sys.float_info.max, value)


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_float=_float)


def _check_unicode(value: Any) -> None:
    if _NOT_UNICODE.search(json.dumps(value, ensure_ascii=False)):
        raise _Unlike


class _Parser:
    """Recursive descent; `json` takes deeper nesting than Python's stack allows here."""

    def __init__(self, message: bytes) -> None:
        self._tokens = self._split(message)
        self._token = b""
        self._advance()

    @staticmethod
    def _split(message: bytes) -> Iterator[bytes]:
        at = 0
        while match := _TOKEN.match(message, at):
            yield match[1]
            at = match.end()

    def _advance(self) -> bytes:
        taken, self._token = self._token, next(self._tokens, b"")
        return taken

    def _pop(self) -> bytes:
        if not self._token:
            raise JsonError("JSON parse error, premature EOI")
        return self._advance()

    def parse(self) -> Any:
        try:
            return self._value()
        except RecursionError:
            raise JsonError("JSON nesting depth limit exceeded") from None

    def _value(self) -> Any:
        token = self._pop()
        if token == b"{":
            return self._object()
        if token == b"[":
            return self._array()
        return _scalar(token)

    def _object(self) -> dict[str, Any]:
        members: dict[str, Any] = {}
        if self._token == b"}":
            self._pop()
            return members
        while True:
            key = self._value()
            if not isinstance(key, str):
                raise JsonError("JSON parse error, key is not a string in object")
            if self._pop() != b":":
                raise JsonError("JSON parse error, missing : in object pair")
            value = self._value()
            if key in members:
                raise JsonError("JSON parse error, duplicate key")
            members[key] = value
            separator = self._pop()
            if separator == b"}":
                return members
            if separator != b",":
                raise JsonError("JSON parse error, expected separator in dict")

    def _array(self) -> list[Any]:
        items: list[Any] = []
        if self._token == b"]":
            self._pop()
            return items
        while True:
            items.append(self._value())
            separator = self._pop()
            if separator == b"]":
                return items
            if separator != b",":
                raise JsonError("JSON parse error, expected separator in list")


def _scalar(token: bytes) -> Any:
    if token[0] in b"\"'":
        return _string(token)
    if token in _KEYWORDS:
        return _KEYWORDS[token]
    if token.isalpha():
        raise JsonError(f"JSON parse error, invalid keyword '{token.decode()}'")
    if token in b"{}[],:":
        raise JsonError("JSON parse error, expecting value")
    if len(token) > 20 or not token.lstrip(b"-").isdigit():
        return _float(token.decode())
    return int(token)


def _string(token: bytes) -> str:
    text = []
    body = token[1:-1]
    at = 0
    while at < len(body):
        if body[at] != 0x5C:
            end = body.find(b"\\", at)
            end = len(body) if end < 0 else end
            text.append(_plain(body[at:end]))
            at = end
        elif body[at + 1] == 0x75:
            character, at = _unicode_escape(body, at)
            text.append(character)
        elif body[at + 1] in _ESCAPES:
            text.append(_ESCAPES[body[at + 1]])
            at += 2
        else:
            raise JsonError("JSON parse error, invalid escape sequence in string")
    return "".join(text)


def _plain(piece: bytes) -> str:
    """QEMU's modified UTF-8: a NUL is C0 80."""
    try:
        text = piece.replace(b"\xc0\x80", b"\0").decode()
    except UnicodeDecodeError:
        text = "\uffff"
    if _NOT_UNICODE.search(text):
        raise JsonError("JSON parse error, invalid UTF-8 sequence in string")
    return text


def _unicode_escape(body: bytes, at: int) -> tuple[str, int]:
    """The character of the `\\uXXXX` at `at`, or of a surrogate pair there, and where it ends."""
    code = _hex(body[at + 2 : at + 6])
    end = at + 6
    if 0xD800 <= code < 0xDC00:
        low = _hex(body[end + 2 : end + 6]) if body[end : end + 2] == b"\\u" else -1
        if 0xDC00 <= low < 0xE000:
            code = 0x10000 + ((code & 0x3FF) << 10 | low & 0x3FF)
            end += 6
    if code < 0 or _NOT_UNICODE.match(chr(code)):
        quoted = body[at:end].decode(errors="replace")
        raise JsonError(f"JSON parse error, {quoted} is not a valid Unicode character")
    return chr(code), end


def _hex(digits: bytes) -> int:
    return int(digits, 16) if _FOUR_HEX.fullmatch(digits) else -1
