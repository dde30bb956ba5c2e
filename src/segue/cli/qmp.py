"""segue qmp: one QMP command on a machine, or qemu.qmp's qmp-shell on its socket.

Arguments are written as in qmp-shell: `key=value`, with a dot for what is nested. A value that is
JSON is what it says, everything else is a text; `id='"7"'` is the text 7.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from segue import machines
from segue.cli import output
from segue.errors import UsageError

if TYPE_CHECKING:
    from segue.cli.parser import Commands

_DESCRIPTION = """\
Give one QMP command to a machine and print what it returns, as JSON (a text is
printed as it is). Without a command: qmp-shell, which knows every command by
<tab>. During an upgrade a command waits, and the new QEMU answers it."""

_EPILOG = """\
examples:
  segue qmp web query-block
  segue qmp web human-monitor-command command-line='info network'
  segue qmp web netdev_add type=user id=n1
  segue qmp web blockdev-add driver=file node-name=d1 filename=d cache.direct=true
  segue qmp web

QEMU's commands: https://www.qemu.org/docs/master/interop/qemu-qmp-ref.html"""


def declare(commands: Commands) -> None:
    parser = commands.add_parser(
        "qmp",
        help="give a QMP command, or open a QMP shell",
        usage="segue qmp [-h] NAME [COMMAND [KEY=VALUE...]]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.add_argument("name", metavar="NAME", help="the machine")
    parser.add_argument("qmp_command", metavar="COMMAND", nargs="?", help="a QMP command")
    parser.add_argument("pairs", metavar="KEY=VALUE", nargs="*", help="its arguments")
    parser.set_defaults(run=run)


def run(arguments: Namespace) -> int:
    machine = machines.find(arguments.name)
    if arguments.qmp_command is None:
        _shell(os.fspath(machine.directory.qmp))
    given = parse_arguments(arguments.pairs)
    from segue.cli import connection

    # A command may wait for the end of an upgrade, or be one: how long is for the user to say.
    answer = connection.ask(machine, arguments.qmp_command, given, timeout=None)
    if isinstance(answer, str):
        sys.stdout.write(answer)
    else:
        output.print_json(answer)
    return 0


def parse_arguments(pairs: Iterable[str]) -> dict[str, Any]:
    """
    >>> parse_arguments(["id=n1", "file.driver=raw", "size=512", "on=true"])
    {'id': 'n1', 'file': {'driver': 'raw'}, 'size': 512, 'on': True}

    Raises UsageError for what is no pair, or contradicts another one.
    """
    result: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        *path, last = key.split(".")
        if not equals or not all((*path, last)):
            raise UsageError(f"{pair!r} is no argument", hint="write KEY=VALUE")
        group = result
        for name in path:
            group = group.setdefault(name, {})
            if not isinstance(group, dict):
                raise UsageError(f"{name!r} has a value and members", hint="leave one of them out")
        if last in group:
            raise UsageError(f"{key!r} is given twice")
        group[last] = _value(text)
    return result


def _value(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_json)
    except ValueError:
        return text


def _no_json(constant: str) -> Any:
    raise ValueError(constant)


def _shell(path: str) -> None:
    """Become qmp-shell: it reads the terminal line by line, so nothing of ours can help it."""
    words = [sys.executable, "-m", "qemu.qmp.qmp_shell", path]
    sys.stdout.flush()
    os.execv(sys.executable, words)  # noqa: S606
