"""The command line as a whole: words, mistakes, help, streams that close, and how things look."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

import segue
from segue import cli
from segue.cli import main, output, parser
from segue.errors import Blocker, Refused, SegueError

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEGUE_RUN_DIR", str(tmp_path / "r"))
    return tmp_path / "r"


Ran = list[tuple[str | None, list[str], bool]]


@pytest.fixture
def supervisor(monkeypatch: pytest.MonkeyPatch) -> Ran:
    """What `segue run` would have started; QEMU ends with 7."""
    ran: Ran = []

    def run(name: str | None, argv: list[str], *, detach: bool, net_user: str) -> int:
        assert net_user == "auto"
        ran.append((name, argv, detach))
        return 0 if detach else 7

    module = types.ModuleType("segue.begin")
    module.__dict__["run"] = run
    monkeypatch.setitem(sys.modules, "segue.begin", module)
    monkeypatch.setattr(segue, "begin", module, raising=False)
    return ran


@pytest.mark.parametrize(
    ("words", "name", "detach"),
    [
        ("-- qemu -name web -m 1G", "web", False),
        ("qemu -name web -m 1G", "web", False),
        ("--name other -- qemu -name web -m 1G", "other", False),
        ("--name other qemu -name web -m 1G", "other", False),
        ("--name=other --detach qemu -name web -m 1G", "other", True),
        ("--detach --name other -- qemu -name web -m 1G", "other", True),
    ],
)
def test_what_follows_is_qemus_own(supervisor: Ran, words: str, name: str, detach: bool) -> None:
    assert main(["run", *words.split()]) == (0 if detach else 7)
    assert supervisor == [(name, ["qemu", "-name", "web", "-m", "1G"], detach)]


@pytest.mark.parametrize("words", ["--help", "--name x --detach", "--json", "--", "-- --"])
def test_words_that_look_like_ours_reach_qemu(supervisor: Ran, words: str) -> None:
    main(["run", "--name", "n", "--", "qemu", *words.split()])
    assert supervisor == [("n", ["qemu", *words.split()], False)]


def test_a_detached_machine_without_a_name_says_which_it_got(
    supervisor: Ran, capfd: Capture
) -> None:
    main(["run", "--detach", "qemu"])
    assert capfd.readouterr().out == f"qemu-{os.getpid()}\n"
    main(["run", "--detach", "--name", "web", "qemu"])
    main(["run", "qemu"])
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("words", "what", "hint"),
    [
        ("run", "which QEMU is to run", "segue run -- qemu-system-x86_64"),
        ("run --name", "--name: expected one argument", "segue run --help"),
        ("run --name web --", "which QEMU is to run", "segue run -- qemu-system-x86_64"),
        ("run -m 2G", "what does -m mean here?", "segue run --help"),
        ("run -m=2G", "what does -m=2G mean here?", "follow its name: segue run -- qemu"),
        ("--json ls", "what does --json mean here?", "hint: segue --help"),
        ("check web --mode fast", "invalid choice: 'fast'", "segue check --help"),
        ("ls --jsno", "what does --jsno mean here?", "segue ls --help"),
        ("upgrdae web", "there is no command 'upgrdae'", "did you mean segue upgrade?"),
        ("xyz", "there is no command 'xyz'", "segue --help lists them"),
        ("show", "the following arguments are required: NAME", "segue show --help"),
        ("show a/b", "'a/b' cannot be a machine's name", "at most 64"),
        ("stop web --timeout x", "'x' is not a number of seconds", "segue stop --help"),
        ("--unknown", "the following arguments are required: COMMAND", "segue --help"),
        ("demo --qemu no-such-qemu", "no program no-such-qemu in PATH", "--to ./no-such-qemu"),
    ],
)
def test_mistakes_end_in_two_lines(
    supervisor: Ran, capfd: Capture, words: str, what: str, hint: str
) -> None:
    assert main(words.split()) == 2
    out, err = capfd.readouterr()
    first, second = err.splitlines()
    assert not out and not supervisor
    assert first.startswith("segue: ") and what in first
    assert second.startswith("hint: ") and hint in second


def test_no_words_at_all(capfd: Capture) -> None:
    assert main([]) == 2
    out, err = capfd.readouterr()
    assert not out
    assert err.startswith("usage: segue") and "\nsegue: no command was given\nhint: " in err


def test_version(capfd: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capfd.readouterr().out == f"segue {segue.__version__}\n"


def test_each_command_is_a_module_with_help_that_fits(capfd: Capture) -> None:
    for words in ([], *([name] for name in parser.COMMANDS)):
        with pytest.raises(SystemExit) as caught:
            main([*words, "--help"])
        assert caught.value.code == 0
        text = capfd.readouterr().out
        assert max(map(len, text.splitlines())) <= 85, words
        assert text.startswith(f"usage: segue {' '.join(words)}")
    assert set(parser.COMMANDS) <= set(text_of_all())


def text_of_all() -> list[str]:
    return parser.build().format_help().split()


def test_one_command_parses_alike_alone_and_among_all() -> None:
    for name in parser.COMMANDS:
        assert described(parser.build([name]), name) == described(parser.build(), name)


def described(root: argparse.ArgumentParser, name: str) -> str:
    for action in root._actions:
        if isinstance(action, argparse._SubParsersAction):
            help_text: str = action.choices[name].format_help()
            return help_text
    raise AssertionError


@pytest.fixture
def ls_raises(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    def raises(error: BaseException) -> None:
        def run(_: object) -> int:
            raise error

        monkeypatch.setattr("segue.cli.ls.run", run)

    return raises


def test_errors_of_the_system_and_our_own_end_in_words(
    capfd: Capture, ls_raises: Callable[[BaseException], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    ls_raises(PermissionError(13, "Permission denied", "/run/segue/web"))
    assert main(["ls"]) == 1
    assert capfd.readouterr().err.startswith("segue: /run/segue/web: Permission denied\nhint: ")
    ls_raises(OSError(24, "Too many open files"))
    assert main(["ls"]) == 1
    assert capfd.readouterr().err == "segue: Too many open files\n"
    ls_raises(KeyError("x"))
    assert main(["ls"]) == 1
    assert "KeyError: 'x'\nhint: SEGUE_TRACEBACK=1" in capfd.readouterr().err
    monkeypatch.setenv("SEGUE_TRACEBACK", "1")
    with pytest.raises(KeyError):
        main(["ls"])
    ls_raises(KeyboardInterrupt())
    assert main(["ls"]) == cli.INTERRUPTED


def test_an_error_with_many_lines_is_told_in_few(
    capfd: Capture, ls_raises: Callable[[BaseException], None]
) -> None:
    blocker = Blocker("spice", "holds\nclients", "use\nVNC")
    ls_raises(Refused("no\nway", hint="turn\nback", guest="fine", blockers=(blocker,)))
    assert main(["ls"]) == 5
    assert capfd.readouterr().err.splitlines() == [
        "segue: no way",
        "  spice: holds clients; use VNC",
        "hint: turn back",
        "guest: fine",
    ]
    ls_raises(SegueError("just this"))
    assert main(["ls"]) == 1
    assert capfd.readouterr().err == "segue: just this\n"


@pytest.mark.parametrize("words", ["ls --json", "--help", "--version", "run --help"])
def test_a_reader_that_went_away_gets_no_complaint(words: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    ran = subprocess.run(
        [sys.executable, "-m", "segue", *words.split()], stdout=writing, stderr=subprocess.PIPE
    )
    os.close(writing)
    assert (ran.returncode, ran.stderr) == (cli.BROKEN_PIPE, b"")


def test_a_terminal_without_the_characters_is_no_reason_to_fail() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "segue", "show", "→"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        stderr=subprocess.PIPE,
    )
    assert ran.returncode == 2
    assert ran.stderr.startswith(b"segue: '?' cannot be a machine's name\n")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (512 << 20, "512 MiB"),
        (3 << 29, "1.5 GiB"),
        (8 << 30, "8 GiB"),
        (5 << 42, "20 TiB"),
        (5000 << 40, "5000 TiB"),
        (None, "-"),
    ],
)
def test_sizes(count: object, text: str) -> None:
    assert output.size(count) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.00456, "4.6 ms"), (0, "0.0 ms"), (1.25, "1.25 s"), (200, "3m 20s"), (None, "-")],
)
def test_durations(value: object, text: str) -> None:
    assert output.seconds(value) == text


@pytest.mark.parametrize(
    ("passed", "text"),
    [(0, "0s"), (59.9, "59s"), (60, "1m"), (7199, "1h"), (86400 * 9, "9d"), (-5, "0s")],
)
def test_ages(passed: float, text: str) -> None:
    assert output.age(1000.0, now=1000.0 + passed) == text


def test_ages_of_what_has_none() -> None:
    assert output.age(None) == "-"
    assert output.moment(None) == "-"
