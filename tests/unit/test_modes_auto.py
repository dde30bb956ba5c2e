"""Which mode `auto` takes, and why."""

from __future__ import annotations

from segue.errors import Blocker
from segue.upgrade.modes import AUTO, MODES, choose

AGAINST = (Blocker("device vfio-pci", "only QEMU itself can keep it", "use another mode"),)


def test_auto_takes_the_shortest_pause() -> None:
    mode, why = choose(AUTO, dict.fromkeys(MODES, ()))
    assert mode.name == "handover"
    assert why == "it has the shortest pause of those that keep everything"


def test_auto_says_what_stood_against_shorter_ones() -> None:
    judged = dict.fromkeys(MODES, ()) | {"handover": AGAINST, "migrate": AGAINST}
    mode, why = choose(AUTO, judged)
    assert mode.name == "cpr-transfer"
    assert why.endswith("keep everything; not handover: only QEMU itself can keep it")


def test_where_no_mode_would_work_the_reasons_are_those_of_handover() -> None:
    mode, why = choose(AUTO, dict.fromkeys(MODES, AGAINST))
    assert (mode.name, why) == ("handover", "no mode would work here")


def test_a_mode_that_was_asked_for_is_used_whatever_stands_against_it() -> None:
    mode, why = choose("cpr-exec", dict.fromkeys(MODES, AGAINST))
    assert (mode.name, why) == ("cpr-exec", "it was asked for")
