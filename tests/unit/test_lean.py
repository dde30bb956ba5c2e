"""What a supervisor must not have loaded: each of these is held for as long as its machine runs."""

from __future__ import annotations

import subprocess
import sys

_HEAVY = {
    *("ssl", "_ssl", "hashlib", "_hashlib", "shutil", "tempfile", "random", "lzma", "bz2"),
    *("email", "http", "xml", "multiprocessing", "statistics", "importlib.metadata"),
    *("qemu", "segue.bench", "segue.guest"),
}


def test_a_supervisor_loads_nothing_heavy() -> None:
    code = (
        "import segue.cli, segue.cli.run, segue.begin, sys; "
        "print(*(name for name, module in sys.modules.items() if module))"
    )
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert "segue.supervisor" in loaded
    assert _HEAVY.isdisjoint(loaded), sorted(_HEAVY.intersection(loaded))
