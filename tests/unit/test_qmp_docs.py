"""docs/qmp.md names every command and event of Segue's own, with every argument."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import pytest

from segue.qmp.commands import EVENTS, Members
from segue.service import Service

TEXT = (Path(__file__).parents[2] / "docs/qmp.md").read_text()


def documented(kind: str) -> dict[str, set[str]]:
    """Each heading of this kind, with the names that its list of arguments or members gives."""
    found = {}
    for section in re.split(r"^##+ ", TEXT, flags=re.MULTILINE):
        if heading := re.match(rf"`(\S+)` \({kind}\)\n", section):
            listed = re.search(r"\*\*(?:Arguments|Members):\*\*\n((?:[- ].*\n)+)", section)
            names = re.findall(r"^- `(\S+)` \(", listed[1] if listed else "", re.MULTILINE)
            found[heading[1]] = set(names)
    return found


def names(declared: dict[str, Members]) -> dict[str, set[str]]:
    return {name: set(members) for name, members in declared.items()}


def test_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEGUE_TESTING", raising=False)
    commands = Service(cast(Any, None)).commands()
    assert documented("Command") == names({c.name: c.arguments for c in commands.values()})


def test_events() -> None:
    assert documented("Event") == names(dict(EVENTS))
