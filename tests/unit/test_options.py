"""Option text is read as QEMU reads it, and printed so that QEMU reads the same again."""

from __future__ import annotations

import json
import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from segue.errors import BadCommandLine
from segue.qemu.options import Form, Param, Params, format_size, parse_size

words = st.text(alphabet=string.ascii_letters + string.digits + ",=.-_+?/: é{", max_size=12)
keys = st.from_regex(r"[a-z][a-z0-9_-]{0,6}(\.[a-z0-9]{1,4}){0,2}", fullmatch=True)
implied_keys = st.none() | st.sampled_from(["type", "driver", "path"])


@given(words, implied_keys)
@example(",", None)
@example("a,,,", "path")
def test_printing_what_was_read_gives_the_same_text_a_reader_understands(
    text: str, implied: str | None
) -> None:
    if text.startswith("{"):
        text = "x" + text
    params = Params.parse(text, implied)
    assert Params.parse(str(params), implied) == params


@given(st.lists(st.tuples(keys, words), max_size=5), implied_keys)
def test_any_values_survive_being_printed_and_read(
    pairs: list[tuple[str, str]], implied: str | None
) -> None:
    params = Params.of(pairs, implied)
    assert Params.parse(str(params), implied).items() == pairs
    for key, value in pairs:
        assert value in Params.parse(str(params), implied).all(key)


@given(st.lists(st.tuples(keys, words), max_size=5), keys, words, implied_keys)
def test_what_was_set_is_what_is_read(
    pairs: list[tuple[str, str]], key: str, value: str, implied: str | None
) -> None:
    params = Params.of(pairs, implied)
    changed = Params.parse(str(params.set(key, value)), implied)
    assert changed.all(key) == [value]
    others = [pair for pair in pairs if pair[0] != key]
    assert [pair for pair in changed.items() if pair[0] != key] == others
    assert key not in changed.without(key)


names = st.text(alphabet=string.ascii_lowercase + "-", min_size=1, max_size=5)
trees = st.dictionaries(
    names,
    st.recursive(
        st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=8) | st.none(),
        lambda below: st.lists(below, max_size=3) | st.dictionaries(names, below, max_size=3),
        max_leaves=6,
    ),
    max_size=4,
)


@given(trees)
def test_json_stays_json_with_its_types(tree: dict[str, object]) -> None:
    params = Params.parse(json.dumps(tree))
    assert json.loads(str(params)) == tree
    assert Params.parse(str(params)) == params
    assert params.tree() == tree
    for key, value in params.items():
        assert json.loads(str(params.set(key, value))) == json.loads(
            str(params.set(key, value).set(key, value))
        )


def test_first_word_takes_the_implied_key_and_later_ones_are_booleans() -> None:
    params = Params.parse("socket,id=a,path=/x,,y,server,nowait", "backend")
    assert params.items() == [
        ("backend", "socket"),
        ("id", "a"),
        ("path", "/x,y"),
        ("server", "on"),
        ("wait", "off"),
    ]
    assert str(params) == "socket,id=a,path=/x,,y,server,nowait"
    assert params.boolean("server", False)
    assert not params.boolean("wait", True)


@pytest.mark.parametrize(
    ("text", "implied", "items"),
    [
        ("", "type", []),
        ("a=", None, [("a", "")]),
        ("a=b,", None, [("a", "b")]),
        ("a=b=c", None, [("a", "b=c")]),
        ("a,,b=c", "path", [("path", "a,b=c")]),
        ("a=x,,", None, [("a", "x,")]),
        ("a=,,,b=1", None, [("a", ","), ("b", "1")]),
        ("type=a,b=1", "type", [("type", "a"), ("b", "1")]),
        ("nodelay", None, [("delay", "off")]),
        ("no", None, [("", "off")]),
    ],
)
def test_corners_of_the_syntax(
    text: str, implied: str | None, items: list[tuple[str, str]]
) -> None:
    assert Params.parse(text, implied).items() == items


def test_last_value_wins() -> None:
    params = Params.parse("a=1,b=2,a=3")
    assert params.get("a") == "3"
    assert params.all("a") == ["1", "3"]
    assert params.keys() == ["a", "b"]
    assert params.get("c") is None
    assert params.get("c", "d") == "d"
    assert "b" in params
    assert "c" not in params


def test_setting_replaces_in_place_and_keeps_a_bare_word_bare_where_it_can() -> None:
    params = Params.parse("q35,accel=kvm,accel=tcg,hpet=off", "type")
    assert str(params.set("accel", "kvm")) == "q35,accel=kvm,hpet=off"
    assert str(params.set("type", "pc")) == "pc,accel=kvm,accel=tcg,hpet=off"
    assert str(params.set("usb", True)) == "q35,accel=kvm,accel=tcg,hpet=off,usb=on"
    path = Params.parse("/a", "path")
    assert str(path.set("path", "/a,b=c")) == "path=/a,,b=c"
    assert str(path.set("path", "")) == "path="
    assert str(path.set("path", "help")) == "path=help"


def test_dropping_and_keeping_take_what_is_nested_along() -> None:
    params = Params.parse("file,file.driver=raw,file.filename=/x,filename=/y", "driver")
    assert str(params.without("file")) == "file,filename=/y"
    assert str(params.only("driver", "file")) == "file,file.driver=raw,file.filename=/x"
    assert params.sub("file").items() == [("driver", "raw"), ("filename", "/x")]


def test_text_with_dotted_keys_is_a_tree() -> None:
    params = Params.parse("raw,file.driver=file,file.filename=/x,list.1=b,list.0=a", "driver")
    assert params.tree() == {
        "driver": "raw",
        "file": {"driver": "file", "filename": "/x"},
        "list": ["a", "b"],
    }
    with pytest.raises(BadCommandLine, match="inconsistently"):
        Params.parse("a=1,a.b=2").tree()


@pytest.mark.parametrize("name", ["a,b", "a=b"])
def test_a_key_that_cannot_be_written_is_refused(name: str) -> None:
    with pytest.raises(BadCommandLine):
        Params().set(name, "x")


def test_booleans_are_qemus() -> None:
    params = Params.parse("a=on,b=yes,c=true,d=y,e=off,f=no,g=false,h=n,i=maybe")
    assert [params.boolean(key, False) for key in "abcd"] == [True] * 4
    assert [params.boolean(key, True) for key in "efgh"] == [False] * 4
    assert params.boolean("z", True)
    with pytest.raises(BadCommandLine, match="'i' expects 'on' or 'off'"):
        params.boolean("i", True)


def test_numbers_are_c_numbers() -> None:
    params = Params.parse("a=12,b=0x1F,c=010,d=0,e=1k")
    assert [params.number(key, 7) for key in "abcdz"] == [12, 31, 8, 0, 7]
    with pytest.raises(BadCommandLine):
        params.number("e", 0)


def test_json_is_reached_by_dotted_keys_and_keeps_its_types() -> None:
    text = (
        '{"driver":"qcow2","read-only":false,"cache":{"direct":true},"file":'
        '{"driver":"file","filename":"/x,y"},"queues":[1,2],"backing":null}'
    )
    params = Params.parse(text, "driver")
    assert str(params) == text
    assert params.get("read-only") == "off"
    assert params.get("cache.direct") == "on"
    assert params.get("file.filename") == "/x,y"
    assert params.get("queues.1") == "2"
    assert params.get("backing") == ""
    changed = (
        params.set("read-only", "on").set("queues.1", "5").set("file.filename", "/z").set("new", 3)
    )
    assert json.loads(str(changed)) == {
        "driver": "qcow2",
        "read-only": True,
        "cache": {"direct": True},
        "file": {"driver": "file", "filename": "/z"},
        "queues": [1, 5],
        "backing": None,
        "new": 3,
    }
    assert json.loads(str(params.set("cache.no-flush", True)))["cache"]["no-flush"] is True
    assert "file.driver" not in params.without("file")
    assert params.only("file").keys() == ["file.driver", "file.filename"]
    assert str(params.only("driver").as_text()) == "qcow2"
    assert json.loads(str(params.without("queues.0", "cache.direct")))["queues"] == [2]
    assert "cache" not in json.loads(str(params.without("cache.direct")))


def test_json_names_may_have_dots() -> None:
    params = Params.parse('{"driver":"raw","file.filename":"/x"}')
    assert params.get("file.filename") == "/x"
    changed = params.set("file.filename", "/y")
    assert json.loads(str(changed)) == {"driver": "raw", "file.filename": "/y"}
    assert params.without("file").keys() == ["driver"]


def test_qemus_own_json_has_single_quotes() -> None:
    params = Params.parse("""{'driver':'e1000','id':"n'1",'x':'a"b\\'c'}""")
    assert params.items() == [("driver", "e1000"), ("id", "n'1"), ("x", "a\"b'c")]
    assert json.loads(str(params))["x"] == "a\"b'c"


@pytest.mark.parametrize(
    "text", ["{", '{"a":1,"a":2}', '{"a":NaN}', "{'a'}", '{"a":1}]', "{" + '"a":{' * 9999]
)
def test_bad_json_is_refused_with_a_reason(text: str) -> None:
    with pytest.raises(BadCommandLine, match="JSON parse error") as caught:
        Params.parse(text)
    assert caught.value.hint


def test_cpu_flags_print_as_they_were_and_rank_as_in_qemu() -> None:
    params = Params.parse_cpu("host,+vmx,-avx,avx=on,,tsc_freq=1000,check")
    assert str(params) == "host,+vmx,-avx,avx=on,tsc_freq=1000,check"
    assert params.get("model") == "host"
    assert params.entries[1] == Param("vmx", "on", Form.PLUS)
    # A minus outranks the rest, wherever it stands.
    assert params.cpu_features() == {
        "avx": "off",
        "tsc-freq": "1000",
        "check": "on",
        "vmx": "on",
    }
    assert str(params.set("model", "qemu64").without("vmx")) == (
        "qemu64,-avx,avx=on,tsc_freq=1000,check"
    )


@pytest.mark.parametrize(
    ("text", "suffix", "size"),
    [
        ("512", "M", 512 << 20),
        ("512", "B", 512),
        ("2G", "M", 2 << 30),
        ("2g", "M", 2 << 30),
        ("1.5G", "M", 3 << 29),
        ("1.k", "B", 1024),
        ("0.1k", "B", 102),
        ("0.5M", "M", 1 << 19),
        ("0x200", "B", 0x200),
        ("0x10k", "B", 0x4000),
        ("0x1e", "B", 0x1E),
        ("123B", "M", 123),
        ("0", "M", 0),
        ("1T", "M", 1 << 40),
        ("15E", "M", 15 << 60),
        (" 7", "B", 7),
    ],
)
def test_sizes(text: str, suffix: str, size: int) -> None:
    assert parse_size(text, suffix) == size


@pytest.mark.parametrize(
    "text", ["", "G", "-1", "1.5", "1.5B", "2GB", "0x1.8", "1e3", "16E", "2Q", ".5G", "½"]
)
def test_bad_sizes(text: str) -> None:
    with pytest.raises(BadCommandLine):
        parse_size(text, "B")


@given(st.integers(0, 2**64 - 1))
def test_printed_sizes_need_no_default_suffix(size: int) -> None:
    text = format_size(size)
    assert parse_size(text, "M") == parse_size(text, "B") == size
    assert text[-1].isalpha()
