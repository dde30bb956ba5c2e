"""How things look: tables, sizes, times, colour, and the lines that a mistake ends in."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

from segue.errors import Refused, SegueError


def prepare_streams() -> None:
    """A terminal that lacks a character shows `?` for it; it is no reason to fail.

    Nor is a stream that the caller has closed; and nothing of ours may be taken for it, least of
    all for the input of a guest on stdio.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number, which is this one
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def fail(error: SegueError) -> None:
    """Say on stderr what happened, what could be done, and where the guest is."""
    blockers = [b.to_json() for b in error.blockers] if isinstance(error, Refused) else []
    tell_failure(error.what, error.hint, error.guest, blockers)


def tell_failure(
    what: str,
    hint: str | None,
    guest: str | None = None,
    blockers: Iterable[Mapping[str, Any]] = (),
) -> None:
    say(f"segue: {one_line(what)}")
    for blocker in blockers:
        say(f"  {blocker_text(blocker)}")
    if hint:
        say(f"hint: {one_line(hint)}")
    if guest:
        say(f"guest: {one_line(guest)}")


def say(line: str) -> None:
    """One line on stderr. Who closed it does not want to know, and ends nothing by that."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        pass


def one_line(text: str) -> str:
    return " ".join(text.split())


def blocker_text(blocker: Mapping[str, Any]) -> str:
    return one_line(f"{blocker['what']}: {blocker['why']}; {blocker['remedy']}")


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]], right: str = "") -> None:
    """Aligned columns, two spaces between; the columns named in `right` are right-aligned."""
    cells = [list(head), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    to_the_right = set(right.split())
    for row in cells:
        line = "  ".join(
            cell.rjust(width) if name in to_the_right else cell.ljust(width)
            for cell, width, name in zip(row, widths, head, strict=True)
        )
        print(line.rstrip())


def print_fields(fields: Iterable[tuple[str, object]]) -> None:
    """`name  value` lines, the values under each other; those without a value are left out."""
    shown = [(name, str(value)) for name, value in fields if value not in (None, "")]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        print(f"{name.ljust(width)}  {value}")


def version(text: object) -> str:
    """A version without the packager's part: `10.0.2` of `10.0.2 (Debian 1:10.0.2+ds-2)`."""
    return str(text).partition(" ")[0] if text else "-"


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def size(count: object) -> str:
    """Bytes for a person: 512 MiB, 1.5 GiB."""
    if not isinstance(count, int):
        return "-"
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if value >= 100 or value == int(value) else f"{value:.1f} {unit}"


def seconds(value: object) -> str:
    """A duration for a person: 4.6 ms, 1.25 s, 3m 20s."""
    if not isinstance(value, int | float):
        return "-"
    if value < 1:
        return f"{value * 1000:.1f} ms"
    if value < 60:
        return f"{value:.2f} s"
    return f"{value // 60:.0f}m {value % 60:.0f}s"


def age(since: object, now: float | None = None) -> str:
    """How long ago a unix time was, in the one unit that matters: 12s, 5m, 3h, 8d."""
    if not isinstance(since, int | float):
        return "-"
    passed = max(0, int((time.time() if now is None else now) - since))
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if passed >= length:
            return f"{passed // length}{unit}"
    return f"{passed}s"


def moment(when: object) -> str:
    """A unix time in the user's own time zone."""
    if not isinstance(when, int | float):
        return "-"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))


def is_lively(stream: TextIO) -> bool:
    """Whether lines on `stream` may be rewritten: a terminal that understands it."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def colour(text: str, code: str, stream: TextIO) -> str:
    """`text` in colour where `stream` is a terminal and its user has not said NO_COLOR."""
    if os.environ.get("NO_COLOR") or not is_lively(stream):
        return text
    return f"\x1b[{code}m{text}\x1b[0m"


def good(text: str, stream: TextIO) -> str:
    return colour(text, "32", stream)


def bad(text: str, stream: TextIO) -> str:
    return colour(text, "31", stream)
