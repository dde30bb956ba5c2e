"""QEMU's command line: read as QEMU reads it, printed unchanged, asked and edited."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segue.errors import BadCommandLine
from segue.qemu.commandline import CommandLine, Option
from segue.qemu.options import Params
from segue.qemu.optiontable import OPTIONS, Syntax

# As people and programs write them: libvirt, Proxmox, quickemu, the Debian wiki, ...
COMMAND_LINES = sorted((Path(__file__).parent / "commandlines").glob("*.txt"))


def parse(text: str, **kwargs: Path) -> CommandLine:
    return CommandLine.parse(["qemu-system-x86_64", *shlex.split(text)], **kwargs)


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
without_file = sorted(OPTIONS.keys() - {"readconfig"})
arguments = st.one_of(
    words.filter(lambda word: not word.startswith("-")).map(lambda word: [word]),
    st.tuples(st.sampled_from(without_file), words, st.sampled_from(["-", "--"])).map(
        lambda t: [t[2] + t[0], *([t[1]] if OPTIONS[t[0]].takes_argument else [])]
    ),
    st.just(["-no-such-option"]),
)


@given(st.lists(arguments, max_size=6))
def test_every_command_line_prints_as_it_was(parts: list[list[str]]) -> None:
    argv = ["/usr/bin/qemu", *(word for part in parts for word in part)]
    command_line = CommandLine.parse(argv)
    assert CommandLine.parse(command_line.argv()) == command_line
    # -set is the one option that is applied to another.
    if "-set" not in argv and "--set" not in argv:
        assert command_line.argv() == argv


@pytest.mark.parametrize("path", COMMAND_LINES, ids=lambda path: path.stem)
def test_real_command_lines_print_as_they_were(path: Path) -> None:
    argv = shlex.split(path.read_text())
    command_line = CommandLine.parse(argv)
    assert command_line.argv() == argv
    assert all(option.known for option in command_line.options)
    for option in command_line.options:
        known = OPTIONS[option.name]
        if known.syntax in (Syntax.PARAMS, Syntax.CPU):
            again = option.with_params(option.params)
            assert again.params == option.params
            assert again.value == option.value


def test_option_names_are_canonical_and_spelling_is_kept() -> None:
    command_line = parse("-M pc --machine hpet=off -h disk.img")
    assert [option.name for option in command_line.options] == ["machine", "machine", "help", "hda"]
    assert [option.spelled for option in command_line.options] == ["-M", "--machine", "-h", ""]
    assert command_line.options[3].value == "disk.img"
    assert str(command_line.options[0]) == "-M pc"


def test_an_argument_is_taken_whatever_it_is() -> None:
    assert parse("-append -S -S").value("append") == "-S"
    assert parse("-append -S -S").flag("S")


def test_a_missing_argument_is_told_in_qemus_words() -> None:
    with pytest.raises(BadCommandLine, match="-m: requires an argument") as caught:
        parse("-S -m")
    assert caught.value.hint
    with pytest.raises(BadCommandLine):
        CommandLine.parse([])


def test_unknown_options_are_kept_with_a_word_that_looks_like_an_argument() -> None:
    command_line = parse("-brand-new value -other -S - ")
    assert [(o.name, o.value, o.known) for o in command_line.options] == [
        ("brand-new", "value", False),
        ("other", None, False),
        ("S", None, True),
        ("", None, False),
    ]


def test_machine_options_are_merged_in_order() -> None:
    command_line = parse(
        "-M q35,accel=tcg,kernel_irqchip=split -machine hpet=off -machine accel=kvm,smp.cpus=2"
    )
    assert str(command_line.machine()) == "q35,accel=kvm,kernel-irqchip=split,hpet=off,smp.cpus=2"
    assert command_line.machine_type == "q35"
    assert parse("-machine hpet=off -M pc").machine_type == "pc"
    assert str(parse("-machine hpet=off -M pc").machine()) == "pc,hpet=off"
    assert parse("-machine hpet=off").machine_type is None
    assert parse("").machine() == Params((), "type")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("", None),
        ("-m 512", 512 << 20),
        ("-m 2G", 2 << 30),
        ("-m size=1G,slots=2,maxmem=4G -m 3G", 3 << 30),
        ("-m slots=2,maxmem=4G", None),
        ("-m 0", None),
        ("-M q35,memory.size=1G", 1 << 30),
        ("-M q35,memory.size=1073741824", 1 << 30),
        ("-M q35,memory.size=1G -m 2G", 2 << 30),
    ],
)
def test_memory_size(text: str, size: int | None) -> None:
    assert parse(text).memory_size() == size


def test_merged_options() -> None:
    command_line = parse(
        "-m 1G,slots=2 -m maxmem=4G -M pc,memory.max-size=8G,smp.sockets=2 -smp 4,cores=2 -smp 6"
    )
    assert command_line.memory().items() == [("maxmem", "4G"), ("size", "1G"), ("slots", "2")]
    assert command_line.smp().items() == [("sockets", "2"), ("cpus", "6"), ("cores", "2")]
    named = parse("-name a,process=x -name debug-threads=on -name guest=b")
    assert named.name() == "b"
    assert parse("").name() is None


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("-enable-kvm", ["kvm"]),
        ("-accel kvm -accel tcg,thread=single", ["kvm", "tcg"]),
        ("-M q35,accel=kvm:tcg", ["kvm", "tcg"]),
        ("-enable-kvm -M accel=tcg", ["tcg"]),
        ("-M accel=tcg -M q35 -enable-kvm", ["kvm"]),
    ],
)
def test_accelerators(text: str, names: list[str]) -> None:
    assert parse(text).accelerators() == names


def test_flags_and_single_values() -> None:
    command_line = parse("-daemonize -pidfile /a -pidfile /b -nographic")
    assert command_line.daemonize
    assert command_line.pidfile == "/b"
    assert command_line.flag("display", "nographic")
    assert not command_line.flag("S")
    assert command_line.last("S") is None
    assert parse("").pidfile is None


def test_editing_gives_a_new_command_line() -> None:
    command_line = parse("-S -device a -device b -S")
    first, a, b, last = command_line.options
    assert command_line.without("S").options == (a, b)
    assert command_line.without(lambda option: option.value == "a", "S").options == (b,)
    # -S is there twice, and equal; the very object is meant.
    assert command_line.replace(last, Option.of("nodefaults")).options[0] is first
    assert command_line.replace(last).options == (first, a, b)
    assert command_line.replace(-1, b, a).options == (first, a, b, b, a)
    assert command_line.append(a).options[-1] is a
    with pytest.raises(ValueError, match="not on this command line"):
        command_line.replace(Option.of("S"))
    with pytest.raises(IndexError):
        command_line.replace(4)


def test_options_of_our_own() -> None:
    option = Option.of("device", Params.of({"driver": "e1000", "id": "a,b"}, "driver"))
    assert option.argv() == ["-device", "e1000,id=a,,b"]
    assert Option.of("M", "pc").name == "machine"
    assert Option.of("S").argv() == ["-S"]
    assert not Option.of("new").known
    assert Option.of("m", "1G").with_value("2G").argv() == ["-m", "2G"]


def test_params_have_each_options_own_syntax() -> None:
    assert parse("-cpu host,-avx").options[0].params.get("model") == "host"
    assert parse("-device e1000,id=x").options[0].id == "x"
    # QemuOpts takes the first id, though the last of every other key.
    assert parse("-chardev null,id=a,id=b").options[0].id == "a"
    assert parse("-vnc :1,password=on").options[0].params.get("vnc") == ":1"
    assert parse("-S").options[0].params == Params()
    assert parse("-kernel a=b").options[0].id is None
    with pytest.raises(TypeError):
        assert parse("-kernel a=b").options[0].params
    with pytest.raises(BadCommandLine, match="-blockdev: JSON parse error"):
        assert parse("-blockdev {").options[0].params


@pytest.mark.parametrize(
    "text",
    ["virtio.a=b,c=d", "driver=virtio,property=a,value=b,,c=d"],
)
def test_both_forms_of_global(text: str) -> None:
    params = parse(f"-global {text}").options[0].params
    assert params.items() == [("driver", "virtio"), ("property", "a"), ("value", "b,c=d")]


@pytest.mark.parametrize(
    ("text", "prints"),
    [
        ("-version", True),
        ("-cpu help", True),
        ("-M q35,help", True),
        ("-device e1000,?", True),
        ("-chardev help", True),
        ("-name help", False),
        ("-kernel help", False),
        ("-M q35 -m 1G", False),
        ("-device e1000,help=off", False),
        ("help", False),
    ],
)
def test_command_lines_that_only_print(text: str, prints: bool) -> None:
    assert parse(text).only_prints is prints


def test_by_id_and_all() -> None:
    command_line = parse("-device a,id=x -object b,id=x -device c,id=y")
    found = command_line.by_id("device", "y")
    assert found is not None
    assert found.params.get("driver") == "c"
    assert command_line.by_id("device", "z") is None
    assert len(command_line.all("device", "object")) == 3


# -- -set ---------------------------------------------------------------------------------


def test_set_is_applied_to_what_it_means() -> None:
    command_line = parse("-drive file=a,id=d -device x,id=d -set drive.d.file=b,c -m 1G")
    assert command_line.argv()[1:] == [
        *("-drive", "file=b,,c,id=d"),
        *("-device", "x,id=d"),
        *("-m", "1G"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "-set drive.d.file=b",
        "-set nonsense",
        """-device '{"driver":"x","id":"d"}' -set device.d.addr=3""",
        "-set device.d.addr=3 -device x,id=d",
    ],
)
def test_a_set_that_means_nothing_is_left_to_qemu(text: str) -> None:
    assert parse(text).argv()[1:] == shlex.split(text)


# -- -readconfig --------------------------------------------------------------------------


CONFIG = """\
# a comment
[machine]
  type = "q35"
  kernel_irqchip = "split"

[memory]
  size = "1G"
[smp-opts]
  cpus = "2"
[boot-opts]
  order = "d"
[device "net0"]
  driver = "virtio-net-pci"
  mac = "52:54:00:00:00:01"
  netdev = "user,0"
[chardev "c"]
  backend = "null"
[object "rng"]
  qom-type = "rng-random"
  filename = ""
[drive]
  file = "/x"
"""


def test_readconfig_is_replaced_by_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "vm.cfg").write_text(CONFIG)
    command_line = parse("-S -readconfig vm.cfg -m 2G", readconfig_base=tmp_path)
    assert command_line.argv()[1:] == [
        "-S",
        *("-machine", "q35,kernel_irqchip=split"),
        *("-m", "1G"),
        *("-smp", "2"),
        *("-boot", "d"),
        *("-device", "id=net0,driver=virtio-net-pci,mac=52:54:00:00:00:01,netdev=user,,0"),
        *("-chardev", "id=c,backend=null"),
        *("-object", "id=rng,qom-type=rng-random,filename="),
        *("-drive", "file=/x"),
        *("-m", "2G"),
    ]
    assert command_line.options[1].place == f"{tmp_path / 'vm.cfg'}:2"
    assert command_line.memory_size() == 2 << 30
    assert CommandLine.parse(command_line.argv()) == command_line


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('a = "b"\n', 1, "no group"),
        ("[machine]\ntype = q35\n", 2, "parse error"),
        ('[machine]\ntype="q35"\n', 2, "parse error"),
        ("[machine]\n  # not a comment\n", 2, "parse error"),
        ('[machine]\n\n[smbios]\ntype = "1"\n', 3, "no effect"),
        ('[no-such-group]\na = "b"\n', 1, "no effect"),
        ('[device]\na=b = "c"\n', 2, "name of a parameter"),
    ],
)
def test_what_cannot_be_an_option_is_refused_with_its_place(
    tmp_path: Path, text: str, line: int, reason: str
) -> None:
    path = tmp_path / "vm.cfg"
    path.write_text(text)
    with pytest.raises(BadCommandLine, match=reason) as caught:
        parse(f"-readconfig {path}")
    assert f"{path}:{line}" in caught.value.what
    assert caught.value.hint


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadCommandLine, match="No such file"):
        parse("-readconfig none.cfg", readconfig_base=tmp_path)


@pytest.mark.parametrize(
    ("config", "options", "added"),
    [
        ("[netdev]", "", "-net nic -net user"),
        ("[netdev]", "-nodefaults", ""),
        ("[netdev]", "-nic none", ""),
        ("[mon]", "", "-monitor vc:80Cx24C"),
        ("[mon]", "-nographic", "-serial mon:stdio"),
        ("[mon]", "-nographic -serial null", "-monitor stdio"),
        ("[mon]", "-monitor null", ""),
        ("[mon]", "-mon x", ""),
        ("[mon]", "-nodefaults", ""),
        ("[chardev]", "", ""),
    ],
)
def test_defaults_that_a_file_does_not_take_away_are_spelled_out(
    tmp_path: Path, config: str, options: str, added: str
) -> None:
    (tmp_path / "vm.cfg").write_text(config + "\n")
    command_line = parse(f"{options} -readconfig vm.cfg", readconfig_base=tmp_path)
    group = next(i for i, option in enumerate(command_line.options) if option.place)
    after = [word for option in command_line.options[group + 1 :] for word in option.argv()]
    assert shlex.join(after) == added
