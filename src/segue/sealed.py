"""JSON that says whether it is as it was written: what a supervisor is taken up from.

An object whose last member is "checksum": the CRC-32, as eight hexadecimal digits, of the object's
text without that member.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

_MEMBER = ', "checksum": "%08x"}'
_LENGTH = len(_MEMBER % 0)


class Damaged(Exception):
    """It is not as it was written."""


def seal(record: Mapping[str, Any]) -> bytes:
    """Of a record that is not empty."""
    text = json.dumps(record)
    return (text[:-1] + _MEMBER % zlib.crc32(text.encode())).encode()


def unseal(data: bytes) -> dict[str, Any]:
    """Raises Damaged."""
    text = data[:-_LENGTH] + b"}"
    if data[-_LENGTH:] != (_MEMBER % zlib.crc32(text)).encode():
        raise Damaged("it is not as it was written")
    record: dict[str, Any] = json.loads(text)
    return record
