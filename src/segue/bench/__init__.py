"""segue bench: what an upgrade costs, measured, beside what QEMU alone needs for it.

    cases       what is to be compared: how × from which QEMU to which × RAM × load
    heartbeat   what somebody outside sees of a guest that beats a thousand times a second
    guest       the Linux guest that is measured: its files, its command line, its shell
    subject     one machine under measurement, whoever runs it
    supervised  ... run by `segue run`
    plain       ... run by nobody but us: QEMU's own part, the calibration
    figures     what one run gave, and what many gave
    memory      what processes hold
    host        the machine that all of it ran on
    runs        the runs, interleaved
    table       how it is shown
"""

from segue.bench.cases import PLAIN, Case, Load
from segue.bench.figures import Figures, Summary
from segue.bench.runs import Bench, Outcome
from segue.bench.table import lines

__all__ = ["PLAIN", "Bench", "Case", "Figures", "Load", "Outcome", "Summary", "lines"]
