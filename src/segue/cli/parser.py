"""The one argument parser, from which help, man pages and shell completion come.

Each command's module has `declare(commands)`, which adds its parser and sets `run`, a function
from the parsed arguments to the exit status.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import segue
from segue.errors import UsageError

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction["Parser"]

_DESCRIPTION = """\
Replace QEMU under a running guest: its memory stays where it is, and its consoles, disks and
clients notice nothing. Start a machine by `segue run -- QEMU ARGS...`, with the command line that
you have anyway; when a new QEMU is installed, `segue upgrade NAME` moves the guest into it."""

_EPILOG = """\
exit codes:
  0  done, or already current            5  refused, nothing was touched
  1  failed, the guest runs on           6  timed out, the guest runs on
  2  the command line is wrong           7  some of several machines failed
  3  the machine is not running          8  the guest is lost, or nobody can tell
  4  there is no such machine

Machines live in /run/segue (root) or $XDG_RUNTIME_DIR/segue; SEGUE_RUN_DIR names another place.
NO_COLOR is honoured."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line and a hint, as everything else does."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"{self.prog} --help")


class Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **options)

    def __call__(self, *_: object) -> NoReturn:
        print(f"segue {segue.__version__}")
        raise SystemExit(0)


def build() -> Parser:
    """The parser of all commands."""
    from segue.cli import check, console, demo, history, ls, run, show, stop, upgrade

    parser = Parser(prog="segue", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--version", action=Version, help="say which release this is")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", dest="command", required=True, parser_class=Parser
    )
    for command in (run, ls, show, check, upgrade, history, console, stop, demo):
        command.declare(commands)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, with `run` and for `segue run` also `qemu`: the words of QEMU's own.

    argparse never sees those: its REMAINDER treats `--`, and options in front, differently in
    each Python release. Raises UsageError; SystemExit after --help and --version.
    """
    parser = build()
    own, qemu = split_run(argv) if argv[:1] == ["run"] else (list(argv), [])
    if not own:
        parser.print_help(sys.stderr)
        raise UsageError("no command was given", hint="segue ls shows the machines that run")
    _suggest(parser, own[0])
    arguments = parser.parse_args(own)
    arguments.qemu = qemu
    return arguments


def split_run(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the words of `segue run` in ours and QEMU's; `--` may stand between, or not.

    >>> split_run(["run", "--name", "web", "--", "qemu", "-m", "1G"])
    (['run', '--name', 'web'], ['qemu', '-m', '1G'])
    """
    position = 1
    while position < len(argv):
        word = argv[position]
        if word == "--":
            return list(argv[:position]), list(argv[position + 1 :])
        if not word.startswith("-"):
            break
        position += 2 if word == "--name" else 1
    return list(argv[:position]), list(argv[position:])


def _suggest(parser: Parser, word: str) -> None:
    actions = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    commands = list(actions[0].choices)
    if word.startswith("-") or word in commands:
        return
    from difflib import get_close_matches

    close = get_close_matches(word, commands, n=1)
    raise UsageError(
        f"there is no command {word!r}",
        hint=f"did you mean segue {close[0]}?" if close else "segue --help lists them",
    )
