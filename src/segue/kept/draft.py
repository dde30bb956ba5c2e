"""A user's command line while the rules turn it into what instances are given.

A rule recognises options, takes them out, and puts a `Part` in their place; what no rule takes
is passed on as the user wrote it. Nothing is opened while rules are applied, so that a command
line can be judged without side effects: a kept object opens its host end in `start()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, cast

from segue.errors import Blocker
from segue.kept import confined, pagecache
from segue.kept.base import Kept, Lending, Part
from segue.qemu.binary import Binary
from segue.qemu.commandline import CommandLine, Option

T = TypeVar("T")


@dataclass(frozen=True)
class Note:
    """Something that an upgrade will not keep, said beforehand and in the receipt."""

    what: str
    why: str

    def to_json(self) -> dict[str, str]:
        return {"what": self.what, "why": self.why}


@dataclass(frozen=True)
class Words(Part):
    """Arguments that are the same for every instance."""

    words: tuple[str, ...]

    def arguments(self, lending: Lending) -> list[str]:
        return list(self.words)


@dataclass(frozen=True)
class Once(Part):
    """Arguments for the first instance, and others (or none) for those that follow."""

    first: tuple[str, ...]
    later: tuple[str, ...] = ()

    def arguments(self, lending: Lending) -> list[str]:
        return list(self.first if lending.first else self.later)


@dataclass(frozen=True)
class Computed(Part):
    """Arguments that depend on the instance."""

    compute: Callable[[Lending], list[str]]

    def arguments(self, lending: Lending) -> list[str]:
        return self.compute(lending)


@dataclass
class Draft:
    """`items` in the order of the command line; `kept` in the order of opening.

    `decisions` is what `decide` found. A machine that runs is described again, maybe by another
    version of Segue, with those that were made when it started: it is `recalled` then.
    """

    command_line: CommandLine
    binary: Binary
    items: list[Option | Part] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    decisions: dict[str, Any] = field(default_factory=dict)
    recalled: bool = False
    blockers: list[Blocker] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.items = list(self.command_line.options)

    def decide(self, name: str, now: Callable[[], T], *, otherwise: T) -> T:
        """What depends on more than the command line: a file that is there, a random value.

        It is found once, when the machine starts. `otherwise` is for machines that were started
        before this was asked: what was done in those days. It must be what JSON knows.
        """
        if self.recalled:
            return cast(T, self.decisions.get(name, otherwise))
        value = self.decisions[name] = now()
        return value

    def options(self, *names: str) -> list[Option]:
        return [i for i in self.items if isinstance(i, Option) and i.name in names]

    def flag(self, *names: str) -> bool:
        return bool(self.options(*names))

    def take(self, *names: str) -> list[Option]:
        """Remove the options of these names, and return them."""
        taken = self.options(*names)
        self.items = [i for i in self.items if i not in taken or isinstance(i, Part)]
        return taken

    def replace(self, old: Option, *new: Option | Part) -> None:
        index = next(n for n, item in enumerate(self.items) if item is old)
        self.items[index : index + 1] = new

    def add(self, *new: Option | Part) -> None:
        self.items.extend(new)

    def block(self, what: str, why: str, remedy: str) -> None:
        self.blockers.append(Blocker(what, why, remedy))

    def note(self, what: str, why: str) -> None:
        self.notes.append(Note(what, why))

    def argv(self, lending: Lending, items: Iterable[Option | Part] | None = None) -> list[str]:
        """What one instance is started with, the program first; `items` in place of our own."""
        words = [str(lending.target.path)]
        alone = confined.is_confined(self.command_line)
        for item in self.items if items is None else items:
            if isinstance(item, Part):
                words += item.arguments(lending)
            else:
                option = confined.opened_once(item) if alone else item
                words += pagecache.kept(option).argv()
        return words


class Rule(Protocol):
    def apply(self, draft: Draft) -> None: ...


def apply(draft: Draft, rules: Iterable[Rule]) -> Draft:
    for rule in rules:
        rule.apply(draft)
    return draft
