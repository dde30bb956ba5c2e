"""A client cannot tell our QMP server from QEMU's own: the same bytes get the same answers."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from segue.qemu.monitor import Monitor
from segue.qmp.server import QmpServer
from tests.qemu import harness

NEGOTIATE = b'{"execute":"qmp_capabilities"}'
NEGOTIATE_OOB = b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}'
LAST = b'\n{"execute":"query-name","id":"the last"}'

NO_MESSAGES = [b"[]", b"1 ", b'"x"', b"null ", b"{}", b'"abc" 12 ', b"12", b"[1,[2,{}]]"]
NO_JSON = [
    *(b"nul ", b"}", b"]", b"{]", b":", b", ", b"[}", b"[{]}", b"{[}]", b'[{"a":1]}', b'{"a":1]'),
    *(b'{"a":}', b'{"a" 1}', b"{1:2}", b'{"a":1 "b"}', b"[1 2]", b"[1,]", b'{"a":1,}', b"{,}"),
    *(b"@", b"\xff", b"\0", b"N", b"%d ", b"01 ", b"-a", b"0.e5 ", b"1e+ ", b"0e5 ", b"-0.0e1]"),
    *(b"truefalse null,", b'{"execute":%s}', b'["x", %d]', b"-\n", b"1.5e+3 ", b"tru\xc3\xa9 "),
    *(b'"\xff"', b'"ab\x01"', b'"ab\\\x01"', b"\xc3\xa9 ", b"[0e5]", b"[1true]", b"[1-2]"),
    *(b'{"execute":"query-name"@}', b'{"execute":\xff"query-name"}', b'{"id":1,"foo":}'),
    *(b'{"execute":"x","id":tru}', b'{"execute":"x","id":A}', b'{"execute":"x" "id"}'),
    *(b'{"execute":"x","id":"x"\x00}', b'{"execute":"x","id":"x"\xfe}', b'{"a":"b\nc"}'),
    *(b'{"execute":"x","execute":"x"}', b'{"a":{"b":1,"b":2}}', b'{"execute":"x","id":NaN}'),
]
STRINGS = [
    *(b"\\uffff", b"\xef\xbf\xbf", b"\\ud83d", b"\\ud83dabc", b"\\ud83d\\u0041", b"\\uzzzz"),
    *(b"\\ud83d\\ude00", b"\xc3\xa9", b"\xc3", b"\xc0\x80", b"\\'", b"\\q", b"\\u0000", b"\x7f"),
    *(b"\xed\xa0\x80", b"\xef\xb7\x90", b"\\ufdd0", b"\xf0\x9f\x98\x80", b"\\u00e9\\/\\b\\\\"),
]
IDS = [
    *(b"null", b"0", b"-1.5", b"1e3", b'[1,{"a":null}]', b'"a"', b"'a\"b'", b"true", b"{'a':[]}"),
    *(b"false", b'""', b"[]", b"{}", b"-0", b"-0.0", b"0.1", b"1.5e300", b"1e-400", b"1e22"),
    *(b"9223372036854775808", b"18446744073709551615", b"-9223372036854775808"),
    b"[" * 500 + b"]" * 500,
    b'{"b":[true,{"id":0}],"a":{"execute":"quit"}}',
]
# To QEMU they are floating point. We give them back as they came.
LARGE_IDS = [b"18446744073709551616", b"-9223372036854775809", b"123456789012345678901234567890"]
COMMANDS = [
    b'{"execute":1}',
    b'{"execute":null,"id":2}',
    b'{"execute":"query-name","foo":1,"id":1}',
    b'{"execute":"query-name","arguments":[]}',
    b'{"execute":"query-name","arguments":null}',
    b'{"execute":"query-name","arguments":{"x":1}}',
    b'{"execute":"query-name","exec-oob":"query-name"}',
    b'{"exec-oob":"query-name","id":4}',
    b'{"exec-oob":"query-name"}',
    b'{"exec-oob":"nope","id":4}',
    b'{"exec-oob":1}',
    b'{"exec-oob":"migrate-pause","id":4}',
    b'{"exec-oob":"migrate-pause","arguments":{"a":4}}',
    b'{"exec-oob":"qmp_capabilities"}',
    b'{"execute":"nope","id":"a"}',
    b'{"execute":"x\xc3\xa9\\u00e9"}',
    b'{"execute":"","id":0}',
    b"{'execute':'query-name'}",
    b'{"execute":"qom-get","arguments":{"path":1}}',
    b'{"execute":"qom-get","arguments":{}}',
    b'{"execute":"device_add"}',
    b'{"execute":"getfd","arguments":{"fdname":"a"}}',
    b'{"execute":"human-monitor-command","arguments":{"command-line":"info name"}}',
    b'{"execute":"query-version"}{"execute":"query-status"}\r\n\r\n{"execute":"query-kvm"}',
    b'{"execute":"qmp_capabilities","id":1}',
    b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}',
    b'{"execute":"qmp_capabilities","arguments":{"enable":["foo"]}}',
    b'{"execute":"qmp_capabilities","arguments":{"enable":["oob",1]}}',
    b'{"execute":"qmp_capabilities","arguments":{"enable":"oob"}}',
    b'{"execute":"qmp_capabilities","arguments":{"enable":null}}',
    b'{"execute":"qmp_capabilities","arguments":{"x":1}}',
    b'{"execute":"qmp_capabilities","arguments":{"x":1,"enable":["foo"]}}',
]


def cases() -> Iterator[bytes]:
    negotiated = [
        *NO_MESSAGES,
        *NO_JSON,
        *(b'{"execute":"query-name","id":"%b"}' % string for string in STRINGS),
        *(b'{"execute":"query-name","id":%b}' % value for value in IDS),
        *COMMANDS,
    ]
    yield from (NEGOTIATE + case for case in negotiated)
    yield from (NEGOTIATE_OOB + b"\r\n" + case for case in COMMANDS)
    yield from COMMANDS
    yield from (b"@", b"[]", b"\0", b"{1:2}")


@contextmanager
def qemu(release: str, path: Path) -> Iterator[None]:
    """A machine without anything, whose QMP is at `path`.1 and `path`.2."""
    sockets = [arg for n in "12" for arg in ("-qmp", f"unix:{path}.{n},server=on,wait=off")]
    arguments = ["-M", "none", "-nodefaults", "-display", "none", "-name", "twin", *sockets]
    pid = Path(f"{path}.pid")
    # -daemonize: it returns when the sockets are there.
    subprocess.run(
        [harness.qemu(release), *arguments, "-daemonize", "-pidfile", str(pid)], check=True
    )
    try:
        yield
    finally:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(f"{path}.2")
            sock.sendall(NEGOTIATE + b'{"execute":"quit"}')
            while sock.recv(65536):
                pass


async def answers(path: str, data: bytes) -> list[Any]:
    reader, writer = await asyncio.open_unix_connection(path, limit=1 << 22)
    writer.write(data + LAST)
    lines: list[Any] = []
    while not lines or lines[-1].get("id") != "the last":
        line = await reader.readline()
        lines.append(json.loads(line) if line else {"id": "the last", "closed": True})
    writer.close()
    await writer.wait_closed()
    return lines


def alike(release: str, lines: list[Any]) -> list[Any]:
    """QEMU 11.1 says where broken JSON is broken, in new words; we say what 7.2 and 10.0 do."""
    if release == "11.1":
        for line in lines:
            error = line.get("error", {})
            if "JSON parse error" in error.get("desc", ""):
                error["desc"] = "JSON parse error"
    return lines


@pytest.mark.parametrize(
    ("release", "chunk"), [("7.2", 65536), ("7.2", 1), ("10.0", 65536), ("11.1", 65536)]
)
def test_same_answers_as_qemu(
    tmp_path: Path, release: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        upstream = socket.socket(socket.AF_UNIX)
        upstream.connect(f"{tmp_path}/q.1")
        monitor = await Monitor.connect(upstream)
        server = QmpServer({})
        server.upstream = monitor
        server.listen_unix(tmp_path / "ours")
        different = []
        for case in cases():
            theirs = alike(release, await answers(f"{tmp_path}/q.2", case))
            ours = alike(release, await answers(f"{tmp_path}/ours", case))
            if theirs != ours:
                different.append((case, theirs[1:], ours[1:]))
        for large in LARGE_IDS:
            case = NEGOTIATE + b'{"execute":"query-name","id":%b}' % large
            theirs = await answers(f"{tmp_path}/q.2", case)
            ours = await answers(f"{tmp_path}/ours", case)
            assert float(ours[2]["id"]) == theirs[2]["id"]
            assert ours[2]["id"] == int(large)
        server.close()
        monitor.close()
        assert different == []

    # 1: the server sees its input byte by byte.
    monkeypatch.setattr("segue.qmp.client.CHUNK", chunk)
    with qemu(release, tmp_path / "q"):
        asyncio.run(run())
