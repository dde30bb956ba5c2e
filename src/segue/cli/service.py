"""segue service: a machine from its file, in the foreground, as systemd wants it."""

from __future__ import annotations

import os
import shlex
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from segue import machines
from segue.errors import NoSuchMachine, UsageError

if TYPE_CHECKING:
    from segue.cli.parser import Commands

_DESCRIPTION = """\
Start the machine whose QEMU command line is in the file /etc/segue/machines/NAME
(for others than root: ~/.config/segue/machines/NAME; SEGUE_CONFIG_DIR names
another place than segue), and stay until it ends. If its QEMU runs already,
without a supervisor, the machine is taken up again (`segue recover`). In the
file, words are as a shell would split them; lines may end anywhere between
words; # begins a comment."""


def declare(commands: Commands) -> None:
    parser = commands.add_parser(
        "service",
        help="start a machine from its file, or take it up again (for systemd)",
        description=_DESCRIPTION,
    )
    parser.add_argument("name", metavar="NAME", help="the machine")
    parser.set_defaults(run=run)


def run(arguments: Namespace) -> int:
    from segue import begin

    name = machines.check_name(arguments.name)
    try:
        orphaned = machines.find_any(name).state == "orphaned"
    except NoSuchMachine:
        orphaned = False
    if orphaned:
        return begin.recover(name, detach=False)
    return begin.run(name, words(directory() / name), detach=False, stay=True)


def directory() -> Path:
    """Where the files of this user's machines are."""
    if chosen := os.environ.get("SEGUE_CONFIG_DIR"):
        return Path(chosen) / "machines"
    if os.geteuid() == 0:
        return Path("/etc/segue/machines")
    base = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "segue/machines"


def words(path: Path) -> list[str]:
    """The command line in a file. Raises UsageError."""
    try:
        found = shlex.split(path.read_text(), comments=True)
    except OSError as error:
        raise UsageError(
            f"{path}: {error.strerror}", hint="put QEMU's command line there"
        ) from None
    except ValueError as error:
        raise UsageError(f"{path}: {error}", hint="quote as for a shell") from None
    if not found:
        raise UsageError(f"{path} is empty", hint="put QEMU's command line there")
    return found
