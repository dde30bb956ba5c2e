"""segue bench net: a guest's network through upgrades, and what goes through a user network."""

from __future__ import annotations

import os
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segue.cli import output

if TYPE_CHECKING:
    from segue.cli.parser import Commands

_RUNS = 10
_TRANSFERS = 3

_DESCRIPTION = """\
Ping a guest every two milliseconds while its QEMU is replaced, and say how long
the longest silence was and how many pings were lost: by Segue; by the same
handover with nobody between the two QEMUs and the tap; and by QEMU's own
cpr-transfer with the same tap. Then move data over user networking: QEMU's
slirp, passt alone, and passt behind Segue's relay. It takes root, and works in
a network namespace of its own."""


def declare(things: Commands) -> None:
    from segue.cli.bench import count

    parser = things.add_parser("net", help="a guest's network", description=_DESCRIPTION)
    parser.add_argument(
        "--qemu", metavar="OLD:NEW", help="which QEMU, and to which upgrades are (default: newest)"
    )
    parser.add_argument(
        "--runs", metavar="N", type=count, default=_RUNS, help=f"upgrades of each ({_RUNS})"
    )
    parser.add_argument(
        "--transfers",
        metavar="N",
        type=int,
        default=_TRANSFERS,
        help=f"over user networking, each way; 0 for none (default {_TRANSFERS})",
    )
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="draw when answers came into an .svg or .png (takes matplotlib)",
    )
    parser.add_argument("--json", action="store_true", help="print an object")
    parser.set_defaults(run=run)


def run(arguments: Namespace) -> int:
    import asyncio

    from segue import bench
    from segue.bench import host, net, picture, throughput
    from segue.cli.bench import end_by_sigterm, pair

    end_by_sigterm()
    if arguments.plot:
        bench.need_picture(arguments.plot)
    old, new = pair(arguments.qemu) if arguments.qemu else bench.usual_pair()
    bench.enter_namespace()
    with tempfile.TemporaryDirectory(prefix="segue-bench-") as name:
        os.environ["SEGUE_RUN_DIR"] = f"{name}/run"
        place = Path(name)
        found = asyncio.run(net.silences(old, new, arguments.runs, place, output.say))
        rates = []
        if arguments.transfers:
            throughput.need_route()
            rates = asyncio.run(throughput.rates(old, arguments.transfers, place, output.say))
    result = {
        "host": host.describe(),
        "from": str(old),
        "to": str(new),
        "taps": [one.to_json() for one in found],
        "user_networks": [one.to_json() for one in rates],
    }
    if arguments.plot:
        picture.draw_arrivals(result, arguments.plot)
    if arguments.json:
        output.print_json(result)
    else:
        show(result)
    return 0


def show(result: Mapping[str, Any]) -> None:
    print(f"{result['from']} to {result['to']}, pings every 2 ms")
    print("silence: the longest time without an answer, the median of all upgrades and the worst")
    _table(
        ("tap", "upgrades", "silence", "worst", "lost", "of"),
        [
            (
                one["way"],
                one["runs"],
                output.seconds(one["silence_seconds"]["median"]),
                output.seconds(one["silence_seconds"]["longest"]),
                one["pings_lost"],
                one["pings_sent"],
            )
            for one in result["taps"]
            if one["runs"]
        ],
    )
    rates = [one for one in result["user_networks"] if one["transfers"]]
    if rates:
        print()
        _table(
            ("user network", "to guest", "from guest"),
            [(one["way"], *map(_rate, one["bytes_per_second"].values())) for one in rates],
        )
    for one in (*result["taps"], *result["user_networks"]):
        if one["refused"]:
            print(f"{one['way']}: {one['refused']}")


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    output.print_table(head, rows, right="upgrades silence worst lost of")


def _rate(value: float) -> str:
    return f"{value / 1e6:.0f} MB/s"
