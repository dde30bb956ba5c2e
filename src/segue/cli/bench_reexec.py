"""segue bench reexec: what it costs to replace a supervisor in place."""

from __future__ import annotations

import os
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segue.cli import output

if TYPE_CHECKING:
    from segue.bench.reexec import Reexec
    from segue.cli.parser import Commands

_DESCRIPTION = """\
Run `segue reexec` again and again on the Linux guest of the tests, and say how
long QMP and a console were silent, what the guest noticed by its own clock, and
what became of the supervisor's memory and descriptors."""


def declare(commands: Commands) -> None:
    parser = commands.add_parser(
        "reexec",
        help="what it costs to replace a supervisor in place",
        description=_DESCRIPTION,
    )
    parser.add_argument("--qemu", dest="reexec_qemu", metavar="BIN", help="the QEMU to use")
    parser.add_argument(
        "--runs", dest="reexec_runs", metavar="N", type=int, default=100, help="(default 100)"
    )
    parser.add_argument("--json", action="store_true", help="print an object")
    parser.set_defaults(run=run)


def run(arguments: Namespace) -> int:
    import asyncio

    from segue import bench
    from segue.bench.reexec import ReexecBench
    from segue.cli.bench import end_by_sigterm

    end_by_sigterm()
    qemu = bench.qemu(arguments.reexec_qemu) if arguments.reexec_qemu else bench.usual_pair()[0]
    measuring = ReexecBench(qemu, arguments.reexec_runs, _tell)
    with tempfile.TemporaryDirectory(prefix="segue-bench-") as place:
        os.environ["SEGUE_RUN_DIR"] = str(Path(place) / "run")
        asyncio.run(measuring.run(Path(place)))
    result = measuring.to_json()
    if arguments.json:
        output.print_json(result)
    else:
        _show(result)
    return 0


def _tell(number: int, run: Reexec) -> None:
    output.say(f"{number}: QMP silent for {output.seconds(run.qmp)}, in all {run.total:.3f} s")


def _show(result: dict[str, Any]) -> None:
    rows = [
        [name, *(output.seconds(figure[key]) for key in ("median", "low", "high", "maximum"))]
        for name, figure in result["figures"].items()
        if figure is not None
    ]
    print(f"{output.counted(result['runs'], 'reexec')} under {result['qemu']}")
    output.print_table(["", "median", "quartile", "quartile", "longest"], rows)
    for name in ("resident", "descriptors"):
        first, last = result[name][0], result[name][-1]
        shown = [output.size(each) if name == "resident" else str(each) for each in (first, last)]
        print(f"{name}: {shown[0]} at first, {shown[1]} at last")
    busy = " ".join(f"{load:g}" for load in result["load_averages"])
    print(f"load average {busy}")
