"""Command lines of a QEMU that gives up its root or its user."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from segue.kept import confined
from segue.kept.base import Lending
from segue.kept.confined import ConfinedRule
from segue.kept.draft import Draft
from segue.qemu.binary import Binary
from segue.qemu.commandline import CommandLine


def binary(*version: int) -> Binary:
    none: frozenset[str] = frozenset()
    path = Path("/qemu")
    return Binary(path, version, "", "x86_64", "", {}, none, none, none, none, False)  # type: ignore[arg-type]


def instance(number: int, version: tuple[int, ...], *words: str) -> list[str]:
    draft = Draft(CommandLine.parse(["/qemu", *words]), binary(7, 2, 0))
    ConfinedRule().apply(draft)
    return draft.argv(Lending(number, binary(*version)))[1:]


OLD = ("-chroot", "/r", "-runas", "u")
NEW = ("-run-with", "chroot=/r", "-run-with", "user=u")


@pytest.mark.parametrize("words", [OLD, NEW])
@pytest.mark.parametrize(
    ("version", "given"),
    [
        ((7, 2, 0), OLD),
        ((9, 0, 0), ("-run-with", "chroot=/r", "-runas", "u")),
        ((10, 0, 0), NEW),
    ],
)
def test_each_release_has_words_of_its_own(
    words: tuple[str, ...], version: tuple[int, ...], given: tuple[str, ...]
) -> None:
    assert instance(2, version, *words) == list(given)
    assert instance(1, version, *words) == list(words)


def test_what_else_is_said_with_it_is_left_alone() -> None:
    words = ("-run-with", "async-teardown=on,chroot=/a,,b")
    assert instance(2, (10, 0, 0), *words) == list(words)
    assert instance(2, (7, 2, 0), *words) == ["-chroot", "/a,b", "-run-with", "async-teardown=on"]
    alone = ("-run-with", "async-teardown=on")
    assert instance(2, (7, 2, 0), *alone) == list(alone)


def test_a_display_at_a_path() -> None:
    for words, blocked in ((OLD, True), (("-runas", "u"), False)):
        draft = Draft(CommandLine.parse(["/qemu", *words, "-vnc", "unix:/s"]), binary(7, 2, 0))
        ConfinedRule().apply(draft)
        assert bool(draft.blockers) is blocked


def test_images_are_opened_once(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.touch()
    for given, made in (
        (("-drive", f"file={image}"), f"file={image},auto-read-only=off"),
        (("-hdb", str(image)), f"index=1,media=disk,file={image},auto-read-only=off"),
        (("-drive", f"file={image},readonly=on"), None),
        (("-drive", f"file={image},media=cdrom"), None),
        (("-drive", f"file={image},auto-read-only=on"), f"file={image},auto-read-only=off"),
        (("-drive", "if=none,id=empty"), None),
        (
            ("-blockdev", f"file,node-name=a,filename={image},auto-read-only=on"),
            f"file,node-name=a,filename={image},auto-read-only=off",
        ),
        (("-blockdev", f"file,node-name=a,filename={image}"), None),
        (("-device", "VGA"), None),
    ):
        (option,) = CommandLine.parse(["/qemu", *given]).options
        assert confined.opened_once(option).argv()[-1] == (made or given[-1])
    tree = {"driver": "raw", "file": {"driver": "file", "auto-read-only": True}, "node-name": "a"}
    (option,) = CommandLine.parse(["/qemu", "-blockdev", json.dumps(tree)]).options
    word = json.loads(confined.opened_once(option).argv()[-1])
    assert word == tree | {"file": {"driver": "file", "auto-read-only": False}}
