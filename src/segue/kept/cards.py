"""Network cards whose other side is to be a `-netdev dgram` of ours, however they were spelled."""

from __future__ import annotations

from segue.kept.draft import Draft
from segue.qemu.commandline import Option
from segue.qemu.options import Params


def split(draft: Draft) -> None:
    """Each `-nic` in two, since it does not know `dgram`: all of them, for the cards' order."""
    for number, option in enumerate(draft.options("nic")):
        params = option.params
        if params.get("type") == "none":
            continue
        name = option.id or f"segue-nic{number}"
        card = [("type", "nic"), ("netdev", name)]
        for theirs, ours in (("model", "model"), ("mac", "macaddr")):
            value = params.get(theirs)
            if value is not None:
                card.append((ours, value))
        host = params.without("model", "mac").set("id", name)
        draft.replace(option, Option.of("netdev", host), Option.of("net", Params.of(card, "type")))


def name_of(draft: Draft, option: Option) -> str:
    return option.id or option.params.get("name") or f"segue-{option.name}{len(draft.kept)}"


def plugged_in(option: Option, name: str) -> tuple[str, ...]:
    """What is needed besides `-netdev dgram,id=NAME`: cards of `-net nic` are on hub 0."""
    if option.name != "net":
        return ()
    return ("-netdev", f"hubport,id=segue-hub-{name},hubid=0,netdev={name}")
