"""The one argument parser, from which help, man pages and shell completion come.

Each command's module has `declare(commands)`, which adds its parser and sets `run`, a function
from the parsed arguments to the exit status.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

import segue
from segue.errors import UsageError

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction["Parser"]

# In the order of --help. Each is a module of this package.
COMMANDS = (
    "run",
    "ls",
    "show",
    "check",
    "upgrade",
    "history",
    "console",
    "qmp",
    "suspend",
    "resume",
    "reexec",
    "recover",
    "service",
    "stop",
    "demo",
    "bench",
    "completion",
)

_DESCRIPTION = """\
Replace QEMU under a running guest: its memory stays where it is, and its
consoles, disks and clients notice nothing. Start a machine by `segue run --
QEMU ARGS...`, with the command line that you have anyway; when a new QEMU is
installed, `segue upgrade NAME` moves the guest into it."""

_EPILOG = """\
exit codes:
  0  done, or already current            5  refused, nothing was touched
  1  failed, the guest runs on           6  timed out, the guest runs on
  2  the command line is wrong           7  some of several machines failed
  3  the machine is not running          8  the guest is lost, or nobody can tell
  4  there is no such machine

Machines live in /run/segue (root) or $XDG_RUNTIME_DIR/segue; SEGUE_RUN_DIR
names another place. NO_COLOR is honoured.
"""


class _Help(argparse.RawDescriptionHelpFormatter):
    """80 columns: asking for the terminal's width imports shutil, at every start (5 ms)."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=80)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line and a hint, as everything else does."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"{self.prog} --help")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        # Now, where it can still be dealt with that nobody reads the help.
        sys.stdout.flush()
        super().exit(status, message)


class Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(f"segue {segue.__version__}")
        parser.exit()


def build(names: Sequence[str] = COMMANDS) -> Parser:
    """The parser of all commands, or only of some: importing all of them takes 10 ms more."""
    parser = Parser(prog="segue", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--version", action=Version, help="say which release this is")
    commands = parser.add_subparsers(
        title="commands",
        metavar="COMMAND",
        dest="command",
        required=True,
        parser_class=Parser,
        prog="segue",  # found out by itself, it would cost the import of shutil
    )
    for name in names:
        import_module(f"segue.cli.{name}").declare(commands)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, with `run`, and for `segue run` also `words`: QEMU's own.

    argparse never sees those: its REMAINDER treats `--`, and options in front, differently in
    each Python release. Raises UsageError; SystemExit after --help and --version.
    """
    own, qemu = split_run(argv) if argv[:1] == ["run"] else (list(argv), [])
    if not own:
        build().print_help(sys.stderr)
        raise UsageError("no command was given", hint="segue ls shows the machines that run")
    if own[0] in COMMANDS or own[0] == "--version":
        parser = build([name for name in own[:1] if name in COMMANDS])
    else:
        _suggest(own[0])
        parser = build()
    arguments, unknown = parser.parse_known_args(own)
    if unknown:
        command = f"segue {own[0]}" if own[0] in COMMANDS else "segue"
        hint = f"{command} --help"
        if own[0] == "run":
            hint += "; QEMU's options follow its name: segue run -- qemu-system-x86_64 ARGS..."
        raise UsageError(f"what does {' '.join(unknown)} mean here?", hint=hint)
    arguments.words = qemu
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
        position += 2 if word in ("--name", "--net-user") else 1
    return list(argv[:position]), list(argv[position:])


def _suggest(word: str) -> None:
    if word.startswith("-"):
        return
    from difflib import get_close_matches

    close = get_close_matches(word, COMMANDS, n=1)
    raise UsageError(
        f"there is no command {word!r}",
        hint=f"did you mean segue {close[0]}?" if close else "segue --help lists them",
    )
