"""Completion scripts and man pages come from the one argument parser, and are complete."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from segue.cli import main, parser

Capture = pytest.CaptureFixture[str]


def completed(script: Path, *words: str) -> set[str]:
    """What bash offers for the last of `words`."""
    quoted = " ".join(f"'{word}'" for word in words)
    code = (
        f'source {script}; segue() {{ {sys.executable} -m segue "$@"; }};'
        f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1};"
        f"_shtab_segue segue '{words[-1]}' '{words[-2]}'; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    return set(subprocess.check_output(["bash", "-c", code], text=True).split())


def test_bash_completes_commands_options_and_machines(
    tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEGUE_RUN_DIR", str(tmp_path / "run"))
    for name in ("web", "db"):
        (tmp_path / "run" / name).mkdir(parents=True)
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "segue.bash"
    script.write_text(capfd.readouterr().out)
    assert completed(script, "segue", "") >= set(parser.COMMANDS)
    assert completed(script, "segue", "upgrade", "--r") == {"--rehearse"}
    assert completed(script, "segue", "upgrade", "") >= {"web", "db"}
    (tmp_path / "qemu-x").touch()
    found = completed(script, "segue", "upgrade", "--to", f"{tmp_path}/qe")
    assert found == {f"{tmp_path}/qemu-x"}


def test_zsh_gets_a_script_of_its_own(capfd: Capture) -> None:
    assert main(["completion", "zsh"]) == 0
    script = capfd.readouterr().out
    assert script.startswith("#compdef segue")
    assert "_segue_machines()" in script


def test_without_shtab_there_is_a_hint(capfd: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 1
    assert f"hint: {sys.prefix}/bin/pip install shtab" in capfd.readouterr().err


def test_every_command_has_a_man_page(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "scripts" / "man"
    subprocess.run(
        [sys.executable, script, tmp_path], env=os.environ, stdout=subprocess.DEVNULL, check=True
    )
    names = {"segue", *(f"segue-{name}" for name in parser.COMMANDS)}
    assert {page.stem for page in tmp_path.iterdir()} == names
    page = (tmp_path / "segue-upgrade.1").read_text()
    assert r"\fB\-\-rehearse\fR" in page
    assert r"segue\-upgrade \- replace the QEMU of a machine" in page
