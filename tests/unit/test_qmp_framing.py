"""Bytes to messages: however they are cut, whatever is wrong with them."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segue.qmp import framing
from segue.qmp.framing import Framer, Parsed
from segue.qmp.jsontext import decode

CHARACTERS = st.characters(codec="utf-8", exclude_characters="\ufffe\uffff").filter(
    lambda c: ord(c) & 0xFFFE != 0xFFFE and not 0xFDD0 <= ord(c) <= 0xFDEF
)
TEXT = st.text(CHARACTERS, max_size=8)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(TEXT, VALUES, max_size=4)
# What JSON and QEMU's lexer care about, in any order.
GARBAGE = st.lists(
    st.sampled_from(
        [
            *(b"{", b"}", b"[", b"]", b",", b":", b'"', b"'", b"\\", b"\n", b" ", b"\0", b"\xff"),
            *(b"\xc3", b"-", b"0", b"1.", b"5e", b"nul", b"true", b"A", b"%", b"\\u00", b"{}"),
        ]
    )
    | st.binary(max_size=4),
    max_size=20,
).map(b"".join)


def parse(*pieces: bytes) -> list[Parsed]:
    framer = Framer()
    found = []
    for piece in pieces:
        framer.feed(piece)
        while (parsed := framer.next()) is not None:
            found.append(parsed)
            if parsed.fatal:
                return found
    return found


def cut(data: bytes, at: list[int]) -> list[bytes]:
    places = [0, *sorted(place % (len(data) + 1) for place in at), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(places)]


@given(
    st.lists(
        st.tuples(OBJECTS, st.booleans(), st.sampled_from([b"", b"\n", b"\r\n", b" \t"])),
        max_size=5,
    ),
    st.lists(st.integers(0, 4000), max_size=10),
)
def test_messages_come_out_as_they_went_in(
    messages: list[tuple[dict[str, Any], bool, bytes]], places: list[int]
) -> None:
    data = b"".join(
        json.dumps(value, ensure_ascii=ascii_only, indent=4 if after else None).encode() + after
        for value, ascii_only, after in messages
    )
    assert [p.value for p in parse(*cut(data, places))] == [value for value, _, _ in messages]


def test_cut_in_the_middle_of_a_token() -> None:
    """Python 3.11.2's possessive groups went wrong here."""
    data = b'{"": {"0": null, "": 0.0}, "\\"": [-1.5e+3, true], "\\\\": "\\u00e9"}'
    for at in range(len(data)):
        assert parse(data[:at], data[at:]) == [Parsed(json.loads(data))], at
    assert parse(*(data[n : n + 1] for n in range(len(data)))) == [Parsed(json.loads(data))]


@given(GARBAGE, st.lists(st.integers(0, 100), max_size=6))
def test_it_does_not_matter_where_garbage_is_cut(data: bytes, places: list[int]) -> None:
    assert parse(*cut(data, places)) == parse(data)


@given(GARBAGE)
def test_a_client_can_always_start_afresh(data: bytes) -> None:
    """A byte that is in no UTF-8 ends whatever came before, as with QEMU."""
    assert parse(data + b'\xff{"execute": "stop"}')[-1] == Parsed({"execute": "stop"})


@given(VALUES)
def test_both_parsers_agree(value: Any) -> None:
    message = json.dumps(value).encode()
    assert decode(message, exact=True) == decode(message) == value


@given(GARBAGE)
def test_half_a_message_can_be_given_to_another_framer(data: bytes) -> None:
    first = Framer()
    first.feed(data)
    before = []
    while (parsed := first.next()) is not None:
        before.append(parsed)
    second = Framer(first.unparsed(), first.recovering)
    rest = b' "x"}]} {}'
    second.feed(rest)
    while (parsed := second.next()) is not None:
        before.append(parsed)
    assert before == parse(data + rest)


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"{'a': 'b\"c', \"d\": 'e\\'f'}", {"a": 'b"c', "d": "e'f"}),
        (b'{"a": "\\ud83d\\ude00\xc0\x80"}', {"a": "\U0001f600\0"}),
        (b'{"a": 1e400, "b": -1e400}', {"a": 1.7976931348623157e308, "b": -1.7976931348623157e308}),
        (b'{"a": ' + b"9" * 5000 + b"}", {"a": 1.7976931348623157e308}),
    ],
)
def test_what_json_alone_would_not_take(data: bytes, value: Any) -> None:
    assert parse(data) == [Parsed(value)]


def test_nesting_is_limited() -> None:
    deep = b"[" * framing.MAX_NESTING + b"]" * framing.MAX_NESTING
    assert [p.error for p in parse(deep)] == [None]
    assert parse(b"[" + deep)[0].error == "JSON nesting depth limit exceeded"


def test_deep_and_wrong_is_an_error_and_no_more() -> None:
    deep = b"[" * 500 + b"'" + b"'" + b"]" * 500
    assert [p.error for p in parse(deep)] in ([None], ["JSON nesting depth limit exceeded"])


def test_tokens_are_limited() -> None:
    many = b"[" + b"0," * framing.MAX_TOKENS + b"0]"
    assert [p.error for p in parse(many)] == ["JSON token count limit exceeded"]


@pytest.mark.parametrize(
    ("start", "filling"), [(b'{"a": "', b"x"), (b"[", b"1,"), (b"'", b'\\"'), (b"{", b" ")]
)
def test_size_is_limited(monkeypatch: pytest.MonkeyPatch, start: bytes, filling: bytes) -> None:
    monkeypatch.setattr(framing, "MAX_MESSAGE", 10_000)
    parsed = parse(start, *[filling * 100] * 300)
    assert parsed[0] == Parsed(error="JSON token size limit exceeded", fatal=True)


@pytest.mark.timeout(30)
def test_long_messages_in_small_pieces_are_not_read_again_and_again() -> None:
    text = b'{"a": "' + b"x" * (3 << 20) + b'", "b": [' + b"1, " * 50_000 + b"2]}"
    framer = Framer()
    for at in range(0, len(text), 32):
        framer.feed(text[at : at + 32])
        parsed = framer.next()
    assert parsed is not None
    assert len(parsed.value["a"]) == 3 << 20


def test_a_word_without_end_is_not_waited_for() -> None:
    framer = Framer()
    framer.feed(b"1" * 100_000)
    assert framer.next() == Parsed(error="JSON token size limit exceeded", fatal=True)
