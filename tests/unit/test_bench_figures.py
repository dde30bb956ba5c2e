"""What is computed from a guest's beats: each figure from beats of which it is known."""

from __future__ import annotations

import pytest

from segue.bench import Figures
from segue.bench.figures import ratio, summaries, summarise
from segue.bench.heartbeat import Beats


def beating(*stretches: tuple[float, float], pace: float = 0.001) -> Beats:
    """A guest that beats in these stretches of time, and keeps its numbers through the breaks."""
    beats, number, clock = Beats(), 0, 0
    for begin, end in stretches:
        for step in range(round((end - begin) / pace)):
            beats.feed(b"hb %d %d\n" % (number, clock), begin + step * pace)
            number, clock = number + 1, clock + round(pace * 1e9)
    return beats


def test_the_gap_is_the_longest_wait_that_touches_the_upgrade() -> None:
    beats = beating((0, 1), (1.05, 2), (2.2, 3))
    assert beats.gap(0.9, 1.5) == pytest.approx(0.051)
    assert beats.gap(1.02, 1.03) == pytest.approx(0.051), "it began and ended within"
    assert beats.gap(0.2, 0.8) == pytest.approx(0.001)


def test_no_gap_is_told_where_no_beat_came_after_it() -> None:
    beats = beating((0, 1))
    assert beats.gap(0.9, 1.5) is None
    assert beats.gap(-1, 0.5) is None
    assert Beats().gap(0, 1) is None


def test_the_guests_own_clock_stands_still_in_the_blackout() -> None:
    assert beating((0, 1), (1.05, 2)).own_gap(0.9, 1.5) == pytest.approx(0.001)


def test_beats_that_are_missing_and_that_come_twice_are_lost() -> None:
    beats = Beats()
    for number in (0, 1, 4, 4, 5):
        beats.feed(b"hb %d 0\n" % number, 0)
    assert beats.lost == 3
    assert beats.garbled == 0


def test_lines_may_come_in_pieces_and_with_the_nonce_between() -> None:
    beats = Beats()
    for piece in (b"hb 1", b"000 5\r\nnonce ab", b"cd\r\nhb 1001 6\r\nhb"):
        beats.feed(piece, 0)
    assert (beats.lost, beats.garbled, beats.nonces) == (0, 0, {b"abcd"})
    assert list(beats.clocks) == [5, 6]


def test_what_no_guest_says_is_garbled_but_not_the_end_of_a_line_at_first() -> None:
    beats = Beats()
    beats.feed(b"b 7 1\nhb 8 1\nhb 9hb 10 2\nhb 11 2\n", 0)
    assert beats.garbled == len(b"hb 9hb 10 2")
    assert beats.lost == 2


def test_no_brownout_where_the_guest_is_at_once_as_it_was() -> None:
    beats = beating((0, 1), (1.05, 2))
    assert beats.brownout(0, 0.99, 1.1) == pytest.approx(0, abs=0.002)


def test_brownout_lasts_until_no_wait_is_longer_than_before() -> None:
    beats = beating((0, 1), (1.05, 1.1), (1.12, 1.15), (1.17, 2))
    assert beats.brownout(0, 0.99, 1.1) == pytest.approx(0.12, abs=0.003)


def test_brownout_lasts_until_as_many_beats_come_as_before() -> None:
    """None of the waits is long, but the guest is at half its rate for 0.3 s."""
    beats = beating((0, 1))
    number = len(beats.arrived)
    times = [1.05 + step * 0.0019 for step in range(160)]
    times += [times[-1] + (step + 1) * 0.001 for step in range(500)]
    for when in times:
        beats.feed(b"hb %d 0\n" % number, when)
        number += 1
    assert beats.brownout(0, 0.99, 1.1) == pytest.approx(0.3, abs=0.02)


def test_brownout_is_unknown_while_it_has_not_ended() -> None:
    assert beating((0, 1), (1.05, 1.1), (1.2, 1.25)).brownout(0, 0.99, 1.1) is None


def test_summary_of_many_and_of_none() -> None:
    summary = summarise([5.0, 1.0, 3.0, 100.0])
    assert summary is not None
    assert (summary.median, summary.minimum, summary.maximum, summary.total) == (4, 1, 100, 109)
    assert (summary.low, summary.high) == (2.5, 28.75)
    assert summarise([]) is None


def test_figures_that_nobody_could_tell_do_not_count() -> None:
    found = summaries([Figures(total=1, gap=0.02), Figures(total=2), Figures(total=3, gap=0.04)])
    assert found["gap"] is not None and found["gap"].median == pytest.approx(0.03)
    assert found["brownout"] is None
    assert ratio(found["gap"], found["total"]) == 0.015
    assert ratio(found["gap"], found["brownout"]) is None
