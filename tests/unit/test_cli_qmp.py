"""segue qmp: one command and what it returns (qmp-shell: tests/qemu/test_qmp_clients.py)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from segue.cli import main
from segue.cli.qmp import parse_arguments
from segue.errors import UsageError
from tests.unit.fake_supervisor import Failure, FakeSupervisor

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeSupervisor]:
    monkeypatch.setenv("SEGUE_RUN_DIR", str(tmp_path))

    def refuse(*_: object) -> None:
        raise Failure("Device 'x' not found")

    answers = {
        "query-name": {"name": "é"},
        "human-monitor-command": "line 1\r\nline 2\r\n",
        "query-commands": [{"name": "query-name"}],
        "device_del": refuse,
    }
    supervisor = FakeSupervisor("web", answers)
    yield supervisor
    supervisor.close()


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([], {}),
        (["a=b", "c=1", "d=true", "e=null", "f=1.5"], dict(a="b", c=1, d=True, e=None, f=1.5)),
        (["a.b.c=x", "a.b.d=y", "a.e=z"], {"a": {"b": {"c": "x", "d": "y"}, "e": "z"}}),
        (['a=[1,"x"]', 'b={"c":1}', 'd="1"'], {"a": [1, "x"], "b": {"c": 1}, "d": "1"}),
        (["a=", "b=x=y", "c=NaN", "d={x"], {"a": "", "b": "x=y", "c": "NaN", "d": "{x"}),
    ],
)
def test_arguments(pairs: list[str], expected: dict[str, Any]) -> None:
    assert parse_arguments(pairs) == expected


@pytest.mark.parametrize("pairs", [["a"], ["=a"], ["a..b=1"], ["a=1", "a=2"], ["a=1", "a.b=2"]])
def test_arguments_that_are_none(pairs: list[str]) -> None:
    with pytest.raises(UsageError):
        parse_arguments(pairs)


def test_one_command(supervisor: FakeSupervisor, capsys: Capture) -> None:
    assert main(["qmp", "web", "query-name", "a.b=1"]) == 0
    assert json.loads(capsys.readouterr().out) == {"name": "é"}
    assert supervisor.received == [("query-name", {"a": {"b": 1}})]


def test_a_text_is_printed_as_it_is(supervisor: FakeSupervisor, capsys: Capture) -> None:
    assert main(["qmp", "web", "human-monitor-command", "command-line=info name"]) == 0
    assert capsys.readouterr().out == "line 1\r\nline 2\r\n"
    assert supervisor.received[0][1] == {"command-line": "info name"}


def test_an_error_is_qemus_own(supervisor: FakeSupervisor, capsys: Capture) -> None:
    assert main(["qmp", "web", "device_del", "id=x"]) == 1
    assert capsys.readouterr().err == "segue: Device 'x' not found\n"
