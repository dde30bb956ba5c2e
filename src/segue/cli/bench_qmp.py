"""segue bench qmp: what it costs a QMP client that a supervisor stands in between."""

from __future__ import annotations

import os
import tempfile
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segue.cli import output

if TYPE_CHECKING:
    from segue.cli.parser import Commands

_RUNS = 1000
_UPGRADES = 20

_DESCRIPTION = """\
Give QMP commands to a QEMU by itself and to one under Segue in turn, and say
how much longer an answer takes: for one client, and for one beside 49 others
who listen to events. Then give commands without a pause through upgrades, and
say how long the one waited that waited longest."""


def declare(things: Commands) -> None:
    from segue.cli.bench import count

    parser = things.add_parser("qmp", help="QMP round trips", description=_DESCRIPTION)
    parser.add_argument(
        "--qemu", metavar="OLD:NEW", help="which QEMU, and to which upgrades are (default: newest)"
    )
    parser.add_argument(
        "--runs", metavar="N", type=count, default=_RUNS, help=f"round trips (default {_RUNS})"
    )
    parser.add_argument(
        "--upgrades", metavar="N", type=count, default=_UPGRADES, help=f"default {_UPGRADES}"
    )
    parser.add_argument("--json", action="store_true", help="print an object")
    parser.set_defaults(run=run)


def run(arguments: Namespace) -> int:
    from segue import bench
    from segue.bench import qmp
    from segue.cli.bench import end_by_sigterm, pair

    end_by_sigterm()
    old, new = pair(arguments.qemu) if arguments.qemu else bench.usual_pair()
    with tempfile.TemporaryDirectory(prefix="segue-bench-") as name:
        os.environ["SEGUE_RUN_DIR"] = f"{name}/run"
        found = qmp.measure(old, new, arguments.runs, arguments.upgrades, Path(name), output.say)
    if arguments.json:
        output.print_json(found.to_json())
    else:
        show(found.to_json())
    return 0


def show(found: Mapping[str, Any]) -> None:
    print(f"QEMU {found['qemu_version']}, medians of {found['round_trips']} round trips")
    rows = [("QEMU alone", _ms(found["alone_seconds"]), "")]
    rows += [
        (f"through Segue, {who}", _ms(found["seconds"][name]), _ms(found["added_seconds"][name]))
        for name, who in (("one", "one client"), ("many", f"beside {found['listeners']} others"))
    ]
    output.print_table(("", "answer", "added"), rows, right="answer added")
    waits = f"longest {_ms(found['longest_wait_seconds'])}"
    waits += f", median of the longest {_ms(found['median_wait_seconds'])}"
    print(
        f"{found['commands_through_upgrades']} commands through "
        f"{output.counted(found['upgrades'], 'upgrade')}: one waited for {waits}"
    )


def _ms(seconds: float) -> str:
    """Of a thousandth of a millisecond, which `output.seconds` does not show."""
    return f"{seconds * 1000:.3f} ms"
