"""What `segue bench net` makes of what it saw."""

from __future__ import annotations

from pathlib import Path

import pytest

from segue.bench.net import BARE, CPR, SEGUE, Found
from segue.bench.throughput import ALONE, RELAY, SLIRP, Rates
from segue.cli import bench_net


def test_the_table_has_each_way_and_says_why_one_is_missing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    taps = [
        Found(SEGUE, silences=[0.02, 0.04, 0.03], sent=1500),
        Found(BARE, silences=[0.4], lost=70, sent=500),
        Found(CPR, refused="QEMU has cpr-transfer since 10.0"),
    ]
    rates = [
        Rates(SLIRP, to_guest=[10e6, 30e6, 20e6], from_guest=[5e6]),
        Rates(ALONE, refused="passt is not installed"),
        Rates(RELAY, to_guest=[40e6], from_guest=[41e6]),
    ]
    bench_net.show(
        {
            "from": Path("/old"),
            "to": Path("/new"),
            "taps": [one.to_json() for one in taps],
            "user_networks": [one.to_json() for one in rates],
        }
    )
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["segue", "3", "30.0", "ms", "40.0", "ms", "0", "1500"] in said
    assert ["no", "guard", "1", "400.0", "ms", "400.0", "ms", "70", "500"] in said
    assert "cpr-transfer: QEMU has cpr-transfer since 10.0".split() in said
    assert ["slirp", "20", "MB/s", "5", "MB/s"] in said
    assert ["passt", "alone:", "passt", "is", "not", "installed"] in said
