"""segue completion: what a shell needs to complete our commands, options and machines' names."""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING

from segue.cli import parser
from segue.errors import SegueError

if TYPE_CHECKING:
    from segue.cli.parser import Commands

_DESCRIPTION = """\
Print a script that makes a shell complete the words of `segue`. It needs
shtab, installed beside Segue; without it you are told how."""

_EPILOG = """\
to have it in the shell that you are in:
  eval "$(segue completion bash)"
for good:
  segue completion bash > ~/.local/share/bash-completion/completions/segue
  segue completion zsh > ~/.zfunc/_segue      (with ~/.zfunc in $fpath)"""

# The names are looked up when Tab is pressed, by the command that is quick at it.
_MACHINES = {"bash": "_segue_machines", "zsh": "_segue_machines"}
_LIST = "segue ls 2>/dev/null | sed 1d | cut -d ' ' -f 1"
_PREAMBLE = {
    "bash": f'_segue_machines() {{ compgen -W "$({_LIST})" -- "$1"; }}',
    "zsh": f"_segue_machines() {{ compadd -- $({_LIST}) }}",
}


def declare(commands: Commands) -> None:
    command = commands.add_parser(
        "completion",
        help="print a completion script for your shell",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    command.add_argument("shell", choices=sorted(_PREAMBLE), help="the shell it is for")
    command.set_defaults(run=run)


def run(arguments: Namespace) -> int:
    try:
        import shtab
    except ImportError:
        raise SegueError(
            "completion scripts are made by shtab, which is not installed",
            hint=f"{sys.prefix}/bin/pip install shtab",
        ) from None
    root = parser.build()
    for action in _actions(root):
        if action.dest in ("to", "qemu"):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.dest == "name" and not action.option_strings:
            action.complete = _MACHINES  # type: ignore[attr-defined]
    print(shtab.complete(root, arguments.shell, preamble=_PREAMBLE[arguments.shell]))
    return 0


def _actions(root: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in root._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from command._actions
        else:
            yield action
