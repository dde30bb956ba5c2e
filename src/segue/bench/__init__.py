"""segue bench: what an upgrade costs, measured, beside what QEMU alone needs for it.

cases       what is to be compared: how × from which QEMU to which × RAM × load
heartbeat   what somebody outside sees of a guest that beats a thousand times a second
pings       what somebody on its network sees
net         ... through upgrades on a tap, three ways
throughput  what goes through a user network, three ways
guest       the Linux guest that is measured: its files, its command line, its shell
subject     one machine under measurement, whoever runs it
supervised  ... run by `segue run`
plain       ... run by nobody but us: QEMU's own part, the calibration
figures     what one run gave, and what many gave
memory      what processes hold
host        the machine that all of it ran on
runs        the runs, interleaved
picture     a drawing of them (needs the extra `plot`)
"""

from pathlib import Path

from segue.bench.cases import PLAIN, Case, Load, combine
from segue.bench.figures import Figures, Summary
from segue.bench.guest import qemu, usual_pair
from segue.bench.picture import draw, need_picture
from segue.bench.pings import enter_namespace
from segue.bench.plain import Plain
from segue.bench.runs import Bench, Outcome, Watcher
from segue.bench.subject import Subject
from segue.bench.supervised import Embedded, OwnMachine

__all__ = [
    "PLAIN",
    "Bench",
    "Case",
    "Embedded",
    "Figures",
    "Load",
    "Outcome",
    "OwnMachine",
    "Plain",
    "Subject",
    "Summary",
    "Watcher",
    "combine",
    "draw",
    "enter_namespace",
    "need_picture",
    "qemu",
    "subject",
    "usual_pair",
]


def subject(case: Case, place: Path, number: int) -> Subject:
    """A machine of ours for this case; `place` is a directory, `number` one of its own."""
    return (Plain if case.way == PLAIN else Embedded)(case, place, number)
