"""segue bench: what an upgrade costs, each way, measured side by side.

What else can be measured is a command below it (`segue bench THING`), named in THINGS, whose module
is bench_THING.py with `declare(things)` as for any command. It prints as this one does: figures on
stdout, progress on stderr.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from argparse import ArgumentTypeError, Namespace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from segue.cli import output
from segue.errors import UsageError

if TYPE_CHECKING:
    from segue.bench import Case, Outcome, Subject
    from segue.cli.parser import Commands

THINGS: tuple[str, ...] = ("qmp", "net", "reexec")

_MODES = ("plain", "handover", "cpr-transfer", "cpr-exec", "migrate")
_LOADS = ("idle", "dirty", "disk", "net")
_RUNS = 10

_DESCRIPTION = """\
Upgrade a guest again and again, in each mode in turn, and say what that cost:
how long somebody outside waited for the guest, how long it was stopped, what
was lost, what it took of memory. `plain` is QEMU alone with no Segue around
it, which is the least that any of them can take. Measured is the Linux guest
of the tests (`make guest`), or a machine of yours, which is really upgraded."""

_EPILOG = """\
examples:
  segue bench --qemu 10.0:11.1 --runs 20
  segue bench --qemu 11.1:11.1 --ram 512M,8G --json >figures.json
  segue bench --qemu 11.1:11.1 --modes handover,migrate --load dirty
  segue bench --machine web --modes handover

A QEMU is a path, a program in PATH, or a release that `make releases` has
brought. Each cell is a median, with the quartiles or the sum where that says
more; segue's docs/benchmarks.md explains each column."""


def declare(commands: Commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure what an upgrade costs, in each mode",
        usage="segue bench [OPTIONS]" + "".join(f"\n       segue bench {t}" for t in THINGS),
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.add_argument(
        "--modes",
        metavar="M,M",
        type=_modes,
        default=list(_MODES),
        help=f"some of {', '.join(_MODES)} (default: all of them)",
    )
    parser.add_argument(
        "--qemu",
        metavar="OLD:NEW",
        action="append",
        default=[],
        help="from which QEMU to which; may be given several times (default: what is there)",
    )
    parser.add_argument(
        "--ram",
        metavar="SIZE,..",
        type=_sizes,
        default=[512 << 20],
        help="of the guest: 512M, 8G (default 512M)",
    )
    parser.add_argument(
        "--runs", metavar="N", type=count, default=_RUNS, help=f"of each (default {_RUNS})"
    )
    parser.add_argument(
        "--load",
        metavar="L,L",
        type=_loads,
        default=["idle"],
        help="what the guest does meanwhile: idle, dirty (rewrites a quarter of its memory all "
        "the time), disk (has just written 512 MiB that nobody has flushed), net (is pinged)",
    )
    parser.add_argument("--machine", metavar="NAME", help="measure this machine of yours")
    parser.add_argument(
        "--heartbeat",
        metavar="SOCKET",
        help="with --machine: where it prints `hb NUMBER NANOSECONDS` each millisecond",
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="draw the figures into an .svg or .png (takes matplotlib)"
    )
    parser.add_argument("--save", metavar="FILE", help="write the object of --json there as well")
    parser.add_argument("--json", action="store_true", help="print an object, with every run")
    parser.set_defaults(run=run)
    if THINGS:
        things = parser.add_subparsers(
            title="other things to measure", metavar="THING", dest="thing", prog="segue bench"
        )
        for name in THINGS:
            import_module(f"segue.cli.bench_{name}").declare(things)


def _modes(text: str) -> list[str]:
    return _some_of(text, _MODES)


def _loads(text: str) -> list[str]:
    return _some_of(text, _LOADS)


def _some_of(text: str, known: tuple[str, ...]) -> list[str]:
    words = text.split(",")
    for word in words:
        if word not in known:
            raise ArgumentTypeError(f"{word!r} is none of {', '.join(known)}")
    return list(dict.fromkeys(words))


def _sizes(text: str) -> list[int]:
    found = [re.fullmatch(r"(\d+)([MG])(i?B)?", word) for word in text.split(",")]
    if not all(found):
        raise ArgumentTypeError(f"{text!r}: sizes are like 512M or 8G")
    return [int(size[1]) << (20 if size[2] == "M" else 30) for size in found if size]


def count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise ArgumentTypeError(f"{text!r} is not a number of runs above zero")
    return int(text)


def end_by_sigterm() -> None:
    """As by Ctrl-C: the machines that were started for the bench end with it."""
    import signal

    # A script has what it starts with `&` ignore SIGINT, and asyncio cancels by that alone.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))


def run(arguments: Namespace) -> int:
    import asyncio
    import json

    from segue import bench
    from segue.cli import bench_table

    end_by_sigterm()
    if arguments.plot:
        bench.need_picture(arguments.plot)
    watcher = Progress()
    with tempfile.TemporaryDirectory(prefix="segue-bench-") as place:
        subjects = _subjects(arguments, Path(place))
        measuring = bench.Bench(subjects, arguments.runs, watcher)
        try:
            asyncio.run(measuring.run())
        finally:
            watcher.end()
    result = measuring.to_json()
    if arguments.save:
        Path(arguments.save).write_text(json.dumps(result, indent=1) + "\n")
    if arguments.plot:
        bench.draw(result, arguments.plot)
    if arguments.json:
        output.print_json(result)
    else:
        bench_table.show(result)
    return 0


def _subjects(arguments: Namespace, place: Path) -> list[Subject]:
    from segue import bench, machines

    if arguments.machine:
        machine = machines.find(arguments.machine)
        now = Path(str(machine.report["binary"]))
        pairs = [(now, new) for _, new in map(pair, arguments.qemu)] or [(now, now)]
        ram = int(machine.report["ram_bytes"])
        modes = [mode for mode in arguments.modes if mode != bench.PLAIN]
        beat = Path(arguments.heartbeat) if arguments.heartbeat else None
        cases = bench.combine(modes, pairs[:1], [ram], [bench.Load.IDLE])
        return [bench.OwnMachine(case, machine, beat) for case in cases]
    if arguments.heartbeat:
        raise UsageError("--heartbeat is for a machine of yours", hint="add --machine NAME")
    loads = [bench.Load(load) for load in arguments.load]
    if bench.Load.NET in loads:
        bench.enter_namespace()
    os.environ["SEGUE_RUN_DIR"] = str(place / "run")
    pairs = [pair(text) for text in arguments.qemu] or [bench.usual_pair()]
    cases = bench.combine(arguments.modes, pairs, arguments.ram, loads)
    return [bench.subject(case, place, number) for number, case in enumerate(cases)]


def pair(text: str) -> tuple[Path, Path]:
    from segue.bench import qemu

    old, _, new = text.partition(":")
    return qemu(old), qemu(new or old)


class Progress:
    """A line for each run; on a terminal one line that changes. With the time that is left.

    A bench.Watcher, without importing that at every start of `segue`.
    """

    def __init__(self) -> None:
        import sys

        self._stream = sys.stderr
        self._lively = output.is_lively(self._stream)
        self._began = time.monotonic()

    def starting(self, case: Case) -> None:
        self._say(f"starting a guest for {case.way}, {output.size(case.ram)}, {case.load}")

    def measured(self, done: int, total: int, outcome: Outcome) -> None:
        if done == 1:
            # Booting took its time; what is left is runs.
            self._began = time.monotonic()
        case = outcome.case
        text = f"{done}/{total} {case.way} {output.size(case.ram)} {case.load}: "
        if outcome.refused:
            text += "refused"
        elif outcome.runs:
            last = outcome.runs[-1]
            text += f"gap {output.seconds(last.gap)}, stopped {output.seconds(last.blackout)}"
        else:
            text += "undone, it took too long"
        if done > 1:
            left = (time.monotonic() - self._began) / (done - 1) * (total - done)
            text += f"; {output.seconds(round(left))} left" if left >= 1 else ""
        self._say(text)

    def _say(self, text: str) -> None:
        if self._lively:
            self._stream.write(f"\r\x1b[K{text[:79]}")
            self._stream.flush()
        else:
            output.say(text)

    def end(self) -> None:
        if self._lively:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
