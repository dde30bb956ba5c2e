"""What makes a human monitor on a permanent socketpair look as it does on a socket of QEMU's own.

Plain QEMU greets each client with a banner and a prompt, and starts each with an empty line. On
a permanent pair an instance does so once, when it starts. So the banner is kept and shown to
each client; a successor's is swallowed, as its client has seen one; a line that the incumbent
had in its editor, which is part of no saved state, is typed again; and a line that a client left
unfinished is erased, or the next client's command would begin with it.
"""

from __future__ import annotations

from typing import Any

from segue.saved import raw, text

_PROMPT = b"(qemu) "
_END_OF_LINE, _BACKSPACE = b"\x05", b"\x7f"
# A banner is about 70 bytes; what goes on for longer is none.
_LONGEST_BANNER = 4096
# READLINE_CMD_BUF_SIZE in include/qemu/readline.h
_LONGEST_LINE = 4096


class Prompt:
    """The monitor of one instance. `banner` is empty until it has been printed.

    `retyped` is what has to be sent to it before anything else.
    """

    def __init__(self, retyped: bytes = b"", instead: bytes | None = None) -> None:
        self.banner = b""
        self.retyped = retyped
        self._instead = instead  # shown in place of the banner
        self._capturing: bytearray | None = bytearray()
        self._sent = bytearray()  # the last that was sent, to see what was taken back

    def greeting(self, returning: bool) -> bytes:
        """What a client sees when it comes, nothing if the banner is still to be printed."""
        return _PROMPT if returning and self.banner else self.banner

    def output(self, data: bytes) -> bytes:
        """What a client is shown of this output."""
        if self._capturing is None:
            return data
        self._capturing += data
        end = self._capturing.find(_PROMPT)
        if end < 0:
            if len(self._capturing) <= _LONGEST_BANNER:
                return b""
            shown, self._capturing = bytes(self._capturing), None
            return shown
        end += len(_PROMPT)
        self.banner, rest = bytes(self._capturing[:end]), bytes(self._capturing[end:])
        self._capturing = None
        return (self.banner if self._instead is None else self._instead) + rest

    @property
    def line(self) -> bytearray:
        """What was sent and not yet ended by Return."""
        last = max(self._sent.rfind(b"\r"), self._sent.rfind(b"\n"))
        return self._sent[last + 1 :]

    def sent(self, data: bytes | bytearray) -> None:
        self._sent += data
        del self._sent[:-_LONGEST_LINE]

    def taken_back(self, count: int) -> None:
        """The last `count` bytes that were sent were not read; they will be sent again."""
        if count:
            del self._sent[-count:]

    def successor(self) -> Prompt:
        """The monitor of the next instance, for a client that has seen this one's banner."""
        line = self.line
        instead = None
        if self.banner:
            instead = b"\r\n" + _PROMPT if line else b""
        return Prompt(_edited(line), instead)

    def save(self, exact: bool) -> dict[str, Any]:
        if not exact:
            return Prompt._known(self.banner).save(True)
        return {
            "banner": text(self.banner),
            "retyped": text(self.retyped),
            "instead": None if self._instead is None else text(self._instead),
            "capturing": None if self._capturing is None else text(self._capturing),
            "sent": text(self._sent),
        }

    @classmethod
    def _known(cls, banner: bytes) -> Prompt:
        """One of which nothing is known but that it has greeted."""
        prompt = cls()
        if banner:
            prompt.banner, prompt._capturing = banner, None
        return prompt

    @classmethod
    def load(cls, data: dict[str, Any]) -> Prompt:
        instead, capturing = data["instead"], data["capturing"]
        prompt = cls(raw(data["retyped"]), None if instead is None else raw(instead))
        prompt.banner = raw(data["banner"])
        prompt._capturing = None if capturing is None else bytearray(raw(capturing))
        prompt._sent = bytearray(raw(data["sent"]))
        return prompt

    def client_left(self) -> bytes:
        """What has to be typed to leave an empty line to the next client."""
        line = self.line
        return _END_OF_LINE + _BACKSPACE * len(line) if line else b""


def _edited(line: bytearray) -> bytes:
    """The line as it stood in the editor: empty where keys were used that are not understood."""
    result = bytearray()
    for byte in line:
        if byte in b"\b\x7f":
            del result[-1:]
        elif byte >= 32:
            result.append(byte)
        else:
            return b""
    return bytes(result)
