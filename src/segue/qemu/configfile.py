"""Files that QEMU reads by `-readconfig`: groups of `key = "value"` lines.

    [device "net0"]
      driver = "virtio-net-pci"

What counts as a line is as strict as in qemu_config_foreach() of util/qemu-config.c: a comment
begins in the first column, an empty line is empty, `=` has a blank before it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from segue.errors import BadCommandLine
from segue.qemu.options import Params

_GROUP_WITH_ID = re.compile(r'\[(\S{1,63})\s+"([^"]{1,63})"\]')
_GROUP = re.compile(r"\[([^\]]{1,63})\]")
_PAIR = re.compile(r'\s*(\S{1,63})\s+=\s*"([^"]{0,1023})"')


@dataclass(frozen=True)
class Section:
    """One group; `params` begins with `id` if it has one. `place` is `FILE:LINE`."""

    group: str
    params: Params
    place: str


def read_config(path: Path) -> tuple[Section, ...]:
    """All groups of the file in their order. Raises BadCommandLine naming file and line."""
    try:
        lines = path.read_text(errors="surrogateescape").split("\n")
    except OSError as error:
        raise BadCommandLine(
            f"-readconfig {path}: {error.strerror}", "the file must be readable by Segue too"
        ) from None
    sections: list[Section] = []
    for number, line in enumerate(lines, 1):
        place = f"{path}:{number}"
        if not line or line.startswith("#"):
            continue
        if match := _GROUP_WITH_ID.match(line):
            sections.append(Section(match[1], Params.of([("id", match[2])]), place))
        elif match := _GROUP.match(line):
            sections.append(Section(match[1], Params(), place))
        elif match := _PAIR.match(line):
            if not sections:
                raise BadCommandLine(f"{place}: no group defined", 'begin with [GROUP "ID"]')
            last = sections[-1]
            try:
                params = last.params.set(match[1], match[2])
            except BadCommandLine as error:
                raise BadCommandLine(f"{place}: {error.what}", error.hint) from None
            sections[-1] = Section(last.group, params, last.place)
        else:
            raise BadCommandLine(f"{place}: parse error", 'a line is KEY = "VALUE" or [GROUP "ID"]')
    return tuple(sections)
