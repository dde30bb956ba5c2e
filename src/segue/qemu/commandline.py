"""QEMU's command line as a list of options that can be asked, changed and printed.

Parsing is QEMU's own (softmmu/vl.c of 7.2, system/vl.c of 10.0): `-option` and `--option` are
the same, a word without a dash is a disk image as if after `-hda`, an option that takes an
argument takes the next word whatever it is. `-readconfig` files are replaced by the options
they stand for, and `-set` is applied to the option it means, so that whoever rewrites options
sees one form of everything. Nothing else is interpreted, and unknown options are kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from segue.errors import BadCommandLine
from segue.qemu.configfile import Section, read_config
from segue.qemu.options import HELP, Form, Params, parse_size
from segue.qemu.optiontable import ALIASES, GROUPS, OPTIONS, Known, Syntax


@dataclass(frozen=True)
class Option:
    """One option. `spelled` is the user's own word for it, empty for a bare disk image.

    `place` tells where it stands if that is a file (`FILE:LINE`).
    """

    name: str
    value: str | None = None
    spelled: str = ""
    known: bool = True
    place: str | None = field(default=None, compare=False)

    @classmethod
    def of(cls, name: str, value: str | Params | None = None) -> Option:
        """An option that the user did not write."""
        name = ALIASES.get(name, name)
        return cls(name, None if value is None else str(value), f"-{name}", name in OPTIONS)

    @cached_property
    def params(self) -> Params:
        """The argument's keys and values; none without an argument.

        The syntax is the option's own; that of an unknown option is taken to be `key=value`.
        A `-global driver.property=value` has the keys `driver`, `property` and `value`.
        Raises BadCommandLine for JSON that cannot be read, TypeError for an option whose
        argument is one text, such as `-kernel`.
        """
        known = OPTIONS.get(self.name, Known(True, Syntax.PARAMS))
        if self.value is None:
            return Params((), known.implied)
        match known.syntax:
            case Syntax.TEXT:
                raise TypeError(f"-{self.name} takes no key=value parameters")
            case Syntax.CPU:
                return Params.parse_cpu(self.value)
            case Syntax.GLOBAL if match := re.match(r"([^.=]+)\.([^=]+)=", self.value):
                value = self.value[match.end() :]
                return Params.of([("driver", match[1]), ("property", match[2]), ("value", value)])
        try:
            return Params.parse(self.value, known.implied)
        except BadCommandLine as error:
            raise BadCommandLine(f"-{self.name}: {error.what}", error.hint) from None

    @property
    def id(self) -> str | None:
        """The first `id`, which is the one that QemuOpts takes; None if there is none."""
        known = OPTIONS.get(self.name)
        if known and known.syntax is not Syntax.PARAMS:
            return None
        return next(iter(self.params.all("id")), None)

    def with_params(self, params: Params) -> Option:
        return replace(self, value=str(params))

    def with_value(self, value: str | None) -> Option:
        return replace(self, value=value)

    def argv(self) -> list[str]:
        words = [self.spelled] if self.spelled else []
        return words if self.value is None else [*words, self.value]

    def __str__(self) -> str:
        return " ".join(self.argv())


@dataclass(frozen=True)
class CommandLine:
    """A program and its options, immutable; changing methods give a new one."""

    program: str
    options: tuple[Option, ...] = ()

    @classmethod
    def parse(cls, argv: Sequence[str], readconfig_base: Path | None = None) -> CommandLine:
        """Read a whole command line, program first.

        `readconfig_base` is the folder that names of `-readconfig` files are relative to.
        Raises BadCommandLine.
        """
        if not argv:
            raise BadCommandLine("no QEMU is named", "begin with qemu-system-x86_64 or its path")
        program, *words = argv
        options: list[Option] = []
        sections: list[Section] = []
        at = 0
        while at < len(words):
            option = _option(words, at)
            at += len(option.argv())
            if option.name == "readconfig":
                found = read_config((readconfig_base or Path()) / (option.value or ""))
                sections += found
                options += map(_option_of_section, found)
            else:
                options.append(option)
        options += _defaults_despite_config(options, sections)
        return cls(program, tuple(_apply_set(options)))

    def argv(self) -> list[str]:
        """The words to execute; parsing them gives this command line again."""
        return [self.program, *(word for option in self.options for word in option.argv())]

    def all(self, *names: str) -> list[Option]:
        return [option for option in self.options if option.name in names]

    def last(self, *names: str) -> Option | None:
        """The one that counts where QEMU knows only one of them."""
        found = self.all(*names)
        return found[-1] if found else None

    def value(self, name: str) -> str | None:
        option = self.last(name)
        return option.value if option else None

    def flag(self, *names: str) -> bool:
        return bool(self.all(*names))

    def by_id(self, name: str, identifier: str) -> Option | None:
        """The option of this name with this `id`."""
        return next((option for option in self.all(name) if option.id == identifier), None)

    def without(self, *unwanted: str | Callable[[Option], bool]) -> CommandLine:
        """Drop options by name or by a test."""

        def is_unwanted(option: Option) -> bool:
            return any(
                option.name == test if isinstance(test, str) else test(option) for test in unwanted
            )

        return replace(self, options=tuple(o for o in self.options if not is_unwanted(o)))

    def replace(self, old: Option | int, *new: Option) -> CommandLine:
        """Put `new` where `old` stands: the very object, or its position.

        Raises ValueError if `old` is not here.
        """
        if isinstance(old, Option):
            at = next((i for i, option in enumerate(self.options) if option is old), -1)
            if at < 0:
                raise ValueError(f"{old} is not on this command line")
        else:
            at = range(len(self.options))[old]
        return replace(self, options=(*self.options[:at], *new, *self.options[at + 1 :]))

    def append(self, *options: Option) -> CommandLine:
        return replace(self, options=(*self.options, *options))

    # -- what several options say together ------------------------------------------------

    def machine(self) -> Params:
        """All `-machine` merged as QEMU does: the later value of a key wins.

        Keys have dashes only (`kernel-irqchip`), as QEMU reads underscores as dashes.
        Options that QEMU turns into machine properties (`-kernel`, `-smp`, ...) are not in it.
        """
        merged = Params((), "type")
        for option in self.all("machine"):
            for key, value in option.params.items():
                head, dot, rest = key.partition(".")
                merged = merged.set(head.replace("_", "-") + dot + rest, value)
        machine_type = merged.get("type")
        if machine_type is None:
            return merged
        return Params.of([("type", machine_type), *merged.without("type").items()], "type")

    @property
    def machine_type(self) -> str | None:
        """As the user wrote it, which may be an alias; None for the binary's default."""
        return self.machine().get("type")

    def memory(self) -> Params:
        """All `-m` merged over `-machine memory.*`: size, slots, maxmem."""
        inherited = self.machine().sub("memory").rename("max-size", "maxmem")
        return self._merged("m", Params(inherited.entries, "size"))

    def memory_size(self) -> int | None:
        """Bytes of guest RAM that were asked for; None for the machine's default.

        A number without a suffix counts MiB (in `-machine memory.size` it counts bytes).
        """
        size = self._merged("m").get("size")
        if size is not None and parse_size(size, "B"):
            return parse_size(size + "M" if size[-1].isdigit() else size)
        size = self.machine().get("memory.size")
        return None if size is None else parse_size(size, "B")

    def smp(self) -> Params:
        """`-machine smp.*` and all `-smp`, merged."""
        return self._merged("smp", Params(self.machine().sub("smp").entries, "cpus"))

    def name(self) -> str | None:
        """The guest's name."""
        return self._merged("name").get("guest")

    def accelerators(self) -> list[str]:
        """In the order in which QEMU tries them; empty for the binary's default."""
        if accel := self.all("accel"):
            return [name for option in accel if (name := option.params.get("accel"))]
        names = ""
        for option in self.all("machine", "enable-kvm"):
            if option.name == "enable-kvm":
                names = "kvm"
            else:
                names = option.params.get("accel") or names
        return [name for name in names.split(":") if name]

    @property
    def daemonize(self) -> bool:
        return self.flag("daemonize")

    @property
    def pidfile(self) -> str | None:
        return self.value("pidfile")

    @property
    def only_prints(self) -> bool:
        """Whether QEMU will print a list or its version and exit: `-version`, `-cpu help`, ..."""
        return any(map(_asks_for_help, self.options))

    def _merged(self, name: str, start: Params | None = None) -> Params:
        """All options of one name whose QemuOpts list has merge_lists, as one."""
        merged = start if start is not None else Params((), OPTIONS[name].implied)
        for option in self.all(name):
            merged = merged.update(option.params.items())
        return merged


def _asks_for_help(option: Option) -> bool:
    if option.name in ("help", "version", "audio-help"):
        return True
    known = OPTIONS.get(option.name)
    if option.value is None or known is None:
        return False
    if known.syntax is not Syntax.PARAMS:
        return option.value in HELP and option.name in ("cpu", "d", "L", "vga")
    return any(
        (entry.form is Form.BARE and entry.value in HELP and option.name != "name")
        or (entry.form is Form.ON and entry.key in HELP)
        for entry in option.params.entries
    )


def _option(words: Sequence[str], at: int) -> Option:
    spelled = words[at]
    if not spelled.startswith("-"):
        return Option("hda", spelled)
    name = spelled[2:] if spelled.startswith("--") else spelled[1:]
    name = ALIASES.get(name, name)
    following = words[at + 1] if at + 1 < len(words) else None
    known = OPTIONS.get(name)
    if known is None:
        # No table can tell; a word that begins with a dash is hardly ever an argument.
        takes = following is not None and not following.startswith("-")
        return Option(name, following if takes else None, spelled, known=False)
    if not known.takes_argument:
        return Option(name, None, spelled)
    if following is None:
        raise BadCommandLine(f"{spelled}: requires an argument", f"see `-help` of QEMU for -{name}")
    return Option(name, following, spelled)


# Groups that QEMU acts on when they come from a file. It reads the others too and then
# forgets them, since it acts on those options while it reads the command line.
_EFFECTIVE = frozenset(
    """
    accel action add-fd audiodev boot-opts chardev device drive fsdev fw_cfg global icount iscsi
    machine memory mon name net netdev nic numa object rtc sandbox smp-opts spice vnc
    """.split()
)


def _option_of_section(section: Section) -> Option:
    if section.group not in _EFFECTIVE:
        raise BadCommandLine(
            f"{section.place}: [{section.group}] has no effect in a -readconfig file",
            "give it as an option on the command line",
        )
    name = GROUPS.get(section.group, section.group)
    params = Params.of(section.params.items(), OPTIONS[name].implied)
    return replace(Option.of(name, params), place=section.place)


def _defaults_despite_config(
    options: Sequence[Option], sections: Sequence[Section]
) -> list[Option]:
    """The default devices that QEMU adds although a file configures others.

    Only the *options* -mon, -net, -nic and -netdev take the default monitor and network away;
    the same in a file does not. As we turn groups into options, the defaults are spelled out.
    """
    groups = {section.group for section in sections}
    given = {option.name for option in options if option.place is None}
    if "nodefaults" in given:
        return []
    extra: list[Option] = []
    if groups & {"net", "nic", "netdev"} and not given & {"net", "nic", "netdev"}:
        extra += [Option.of("net", "nic"), Option.of("net", "user")]
    if "mon" in groups and not settles_monitor(options):
        if "nographic" not in given:
            extra.append(Option.of("monitor", "vc:80Cx24C"))
        elif settles_serial(options):
            extra.append(Option.of("monitor", "stdio"))
        else:
            extra.append(Option.of("serial", "mon:stdio"))
    return extra


# Since 11.1.
_MONITORS = frozenset({"monitor-qmp", "monitor-hmp"})


def settles_monitor(options: Sequence[Option]) -> bool:
    """Whether the user's options keep QEMU from adding a monitor of its own."""
    return any(
        option.name in {"monitor", "qmp", "qmp-pretty", "nodefaults"}
        or (option.name == "mon" and option.place is None)
        or (option.name == "object" and (option.params.get("qom-type") in _MONITORS))
        or (option.name in {"serial", "parallel"} and (option.value or "").startswith("mon:"))
        for option in options
    )


def settles_serial(options: Sequence[Option]) -> bool:
    """Whether the user's options keep QEMU from adding a serial port of its own."""
    return any(
        option.name in {"serial", "nodefaults"}
        or (option.name in {"device", "global"} and option.params.get("driver") == "isa-serial")
        for option in options
    )


def _apply_set(options: Sequence[Option]) -> list[Option]:
    """Apply each `-set group.id.key=value` to the option that it means.

    One that means none, or whose option is JSON (which QEMU does not find either), stays: QEMU
    says what is wrong with it.
    """
    result: list[Option] = []
    for option in options:
        match = re.match(r"([^.]+)\.([^.]+)\.([^=]+)=", option.value or "")
        if option.name != "set" or not match:
            result.append(option)
            continue
        group, identifier, key = match.groups()
        name = GROUPS.get(group, group)
        at = next((i for i, o in enumerate(result) if o.name == name and o.id == identifier), None)
        if at is None or result[at].params.json is not None:
            result.append(option)
        else:
            value = (option.value or "")[match.end() :]
            result[at] = result[at].with_params(result[at].params.set(key, value))
    return result
