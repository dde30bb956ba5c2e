"""From a stream of bytes to JSON values, the way QEMU's own monitor reads them.

QMP has no framing: messages follow each other with or without a newline, and are as long as their
brackets say (qemu.qmp sends no newline, libvirt sends CR LF). What is accepted, when an error is
told, and where reading goes on after garbage is as in QEMU 7.2 to 11.1, found by talking to them
(tests/qemu/test_qmp_errors.py); the errors' words are those of 7.2 and 10.0 (11.1 has others for
broken JSON). That is why `raw_decode` in a loop would not do: it cannot tell a broken message
from half a message before all of it is there.

Two speeds. A regular expression finds the end of a message and `json` decodes it in C. Only where
`json` refuses, or is laxer than QEMU, does a parser of our own (jsontext.py) say what QEMU
would. Each byte is looked at once, however small the pieces that it comes in.

Limits, per message: 4 MiB (QEMU: 64 MiB), 256 Ki tokens (QEMU: 2 Mi) and 512 levels of nesting
(QEMU: 1024), for the sake of those who wait for the one thread meanwhile: it took 1.6 s to answer
a message of 60 MB, and 230 MiB.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from segue.qmp.jsontext import NUMBER, JsonError, decode

MAX_MESSAGE = 4 << 20
MAX_TOKENS = 256 << 10
MAX_NESTING = 512
# Numbers and keywords that are still growing are looked at anew with each read.
_MAX_WORD = 64 << 10
# Stray text is quoted in the error, but not all of it.
_MAX_QUOTED = 1000

# Repeated groups are not possessive, though they could be: until Python 3.11.5 such a group keeps
# what an iteration that failed in its middle had taken. Here they never go back anyway.
_DOUBLE = rb"(?:[\x20\x21\x23-\x5b\x5d-\xfd]++|\\[\x20-\xfd])*"
_SINGLE = rb"(?:[\x20-\x26\x28-\x5b\x5d-\xfd]++|\\[\x20-\xfd])*"
# What needs no second look inside brackets. A word counts only where its end is in sight. Of
# a few thousand at once: `re` takes hundreds of bytes for each.
_PLAIN = re.compile(
    rb'(?:[ \t\r\n,:]++|"%b"|(?:[a-z]++|%b)(?=[ \t\r\n,:{}\[\]])){0,2000}' % (_DOUBLE, NUMBER)
)
_STRING_REST = {ord('"'): re.compile(_DOUBLE), ord("'"): re.compile(_SINGLE)}
_SPACE = re.compile(rb"[ \t\r\n]*+")
_KEYWORD = re.compile(rb"[a-z]++")
_WHOLE_NUMBER = re.compile(NUMBER)
# As far as a number could still become one.
_NUMBER_SO_FAR = re.compile(
    rb"-?(?:0(?:\.(?:[0-9]++(?:[eE][+-]?[0-9]*+)?)?)?"
    rb"|[1-9][0-9]*+(?:\.(?:[0-9]++(?:[eE][+-]?[0-9]*+)?)?|[eE][+-]?[0-9]*+)?)?"
)
# What is skipped after a stray character.
_GARBAGE = re.compile(rb"[\x20-\x2b\x2d-\x39\x3b-\x5a\x5c\x5e-\x7a\x7c\x7e-\xfd]*+")


class Parsed(NamedTuple):
    """A value, or QEMU's words for why there is none. `fatal`: nothing more can be read."""

    value: Any = None
    error: str | None = None
    fatal: bool = False


class Framer:
    """Takes bytes as they come, gives JSON values and errors in order."""

    def __init__(self, unparsed: bytes = b"", recovering: bool = False) -> None:
        self._buffer = bytearray(unparsed)
        # Behind a stray character, before the next one at which QEMU starts again.
        self.recovering = recovering
        # How many bytes of the stream have been taken out of the buffer.
        self.consumed = 0
        self._begin()

    def _begin(self) -> None:
        self._at = 0
        self._braces = 0
        self._brackets = 0
        self._quote = 0
        self._token = 0
        self._exact = False

    def __len__(self) -> int:
        return len(self._buffer)

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def unparsed(self) -> bytes:
        """What has not been given out; with `recovering` all that another Framer needs."""
        return bytes(self._buffer)

    def next(self) -> Parsed | None:
        """The next value or error; None if more bytes are needed."""
        if self.recovering:
            end = self._match(_GARBAGE, 0)
            self._drop(end)
            if not self._buffer:
                return None
            self.recovering = False
        found = self._scan()
        if found is None and len(self._buffer) > MAX_MESSAGE:
            found = Parsed(error="JSON token size limit exceeded", fatal=True)
        return found

    def _match(self, pattern: re.Pattern[bytes], at: int) -> int:
        match = pattern.match(self._buffer, at)
        assert match is not None
        return match.end()

    def _drop(self, end: int) -> None:
        del self._buffer[:end]
        self.consumed += end

    def _scan(self) -> Parsed | None:
        """Go on from where the last read ended."""
        buffer = self._buffer
        while True:
            if self._quote:
                self._at = self._match(_STRING_REST[self._quote], self._at)
                if self._at >= len(buffer):
                    return None
                byte = buffer[self._at]
                if byte == 0x5C and self._at + 1 == len(buffer):
                    return None
                if byte != self._quote:
                    return self._stray(self._at + (2 if byte == 0x5C else 1))
                self._at += 1
                self._quote = 0
                if not self._inside():
                    return self._complete()
            if self._inside():
                while (end := self._match(_PLAIN, self._at)) > self._at:
                    self._at = end
            else:
                self._drop(self._match(_SPACE, 0))
                self._at = 0
            if self._at >= len(buffer):
                return None
            self._token = self._at
            byte = buffer[self._at]
            if byte in b"\"'":
                self._exact |= byte == 0x27
                self._quote = byte
                self._at += 1
                continue
            if byte in b"{}[],:":
                self._at += 1
                if byte in b"{}":
                    self._braces += 1 if byte == 0x7B else -1
                elif byte in b"[]":
                    self._brackets += 1 if byte == 0x5B else -1
                if self._braces + self._brackets > MAX_NESTING:
                    return self._error("JSON nesting depth limit exceeded", self._at)
            else:
                failed = self._word(byte)
                if self._at < 0:
                    self._at = self._token
                    return failed
                if failed:
                    return failed
            if not self._inside():
                return self._complete()

    def _word(self, byte: int) -> Parsed | None:
        """Step over a number or keyword; `_at` is -1 if its end has not come."""
        buffer = self._buffer
        start = self._at
        if 0x61 <= byte <= 0x7A:
            end = self._match(_KEYWORD, start)
        elif byte == 0x2D or 0x30 <= byte <= 0x39:
            end = self._match(_NUMBER_SO_FAR, start)
        else:
            return self._stray(start + 1)
        if end == len(buffer):
            self._at = -1
            if end - start > _MAX_WORD:
                return Parsed(error="JSON token size limit exceeded", fatal=True)
            return None
        if not 0x61 <= byte <= 0x7A:
            whole = _WHOLE_NUMBER.fullmatch(buffer, start, end)
            if whole is None:
                return self._stray(end + 1)
            if buffer[start:end].lstrip(b"-") == b"0" and 0x30 <= buffer[end] <= 0x39:
                return self._stray(end + 1)
        # Words that touch (`0e5` is 0, e, 5 to QEMU) are something else to `json`.
        self._exact = True
        self._at = end
        return None

    def _inside(self) -> bool:
        return self._braces >= 0 <= self._brackets and self._braces + self._brackets > 0

    def _complete(self) -> Parsed:
        message = bytes(memoryview(self._buffer)[: self._at])
        exact = self._exact
        self._drop(self._at)
        self._begin()
        if len(message) > MAX_TOKENS and MAX_TOKENS < sum(map(message.count, b"[{,:")):
            return Parsed(error="JSON token count limit exceeded")
        try:
            return Parsed(decode(message, exact))
        except JsonError as error:
            return Parsed(error=str(error))

    def _stray(self, end: int) -> Parsed:
        quoted = bytes(self._buffer[self._token : min(end, self._token + _MAX_QUOTED)])
        text = quoted.partition(b"\0")[0].decode(errors="replace")
        self.recovering = True
        return self._error(f"JSON parse error, stray '{text}'", end)

    def _error(self, text: str, end: int) -> Parsed:
        self._drop(end)
        self._begin()
        return Parsed(error=text)
