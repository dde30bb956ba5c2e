"""Options that QEMU has under another name today, with which it must be called from then on."""

from __future__ import annotations

from functools import partial

from segue.kept.base import Lending
from segue.kept.draft import Computed, Draft
from segue.qemu.commandline import Option

# Since which release there is the new one (QEMU's docs/about/removed-features.rst).
_RENAMED = {
    "no-acpi": ((8, 0, 0), ("-machine", "acpi=off")),
    "no-hpet": ((8, 0, 0), ("-machine", "hpet=off")),
    "async-teardown": ((8, 1, 0), ("-run-with", "async-teardown=on")),
}


class RenamedRule:
    def apply(self, draft: Draft) -> None:
        for option in draft.options(*_RENAMED):
            draft.replace(option, Computed(partial(_words, option)))


def _words(option: Option, lending: Lending) -> list[str]:
    """The first instance is given what the user wrote."""
    since, new = _RENAMED[option.name]
    renamed = not lending.first and lending.target.version >= since
    return list(new) if renamed else option.argv()
