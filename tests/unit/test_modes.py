"""Which modes stand open to a machine, and to one with a VFIO device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from segue.qemu.binary import Binary
from segue.upgrade import modes
from segue.upgrade.modes import Facts

ARGV = ("qemu-system-x86_64", "-machine", "aux-ram-share=on")


def binary(*version: int) -> Binary:
    major, minor, micro = version
    return Binary(
        Path("/usr/bin/qemu-system-x86_64"),
        (major, minor, micro),
        f"{major}.{minor}.{micro}",
        target="x86_64",
        build_id=str(version),
        machines={},
        capabilities=frozenset(),
        commands=frozenset(),
        cpu_models=frozenset(),
        displays=frozenset(),
        deferred_irqfd=False,
    )


def facts(running: tuple[int, ...], target: tuple[int, ...], *vfio: str, kvm: bool = True) -> Facts:
    return Facts(binary(*running), binary(*target), ARGV, vfio, kvm)


def possible(judged: Facts) -> list[str]:
    return [name for name, blockers in modes.judge(judged).items() if not blockers]


def test_without_vfio_all_that_both_know() -> None:
    new = facts((11, 1, 3), (11, 1, 3))
    assert possible(new) == ["handover", "cpr-transfer", "cpr-exec", "migrate"]
    assert possible(replace(new, running=binary(7, 2, 0))) == ["handover", "migrate"]
    assert modes.choose("auto", modes.judge(new))[0].name == "handover"


def test_a_reason_that_holds_for_both_is_told_once() -> None:
    old = facts((7, 2, 0), (7, 2, 0))
    assert len(modes.judge(old)["cpr-transfer"]) == 1


def test_a_vfio_device_leaves_qemus_own_modes() -> None:
    with_vfio = facts((11, 1, 3), (11, 1, 3), "vfio-pci")
    assert possible(with_vfio) == ["cpr-transfer", "cpr-exec"]


def test_which_are_not_chosen_for_anybody_since_they_cannot_be_undone() -> None:
    with_vfio = facts((11, 1, 3), (11, 1, 3), "vfio-pci")
    judged = modes.judge(with_vfio)
    mode, why = modes.choose("auto", judged, with_vfio.vfio)
    assert "none can be undone" in why
    [blocker] = judged[mode.name]
    assert blocker.what == "device vfio-pci"
    assert "lost" in blocker.why
    assert "--mode cpr-transfer" in blocker.remedy
    assert modes.choose("cpr-transfer", judged, with_vfio.vfio)[0].name == "cpr-transfer"


@pytest.mark.parametrize(
    ("running", "target", "kvm"),
    [((11, 1, 3), (11, 1, 3), False), ((10, 0, 2), (11, 1, 3), True), ((7, 2, 0), (7, 2, 0), True)],
)
def test_and_none_where_they_would_lose_it(
    running: tuple[int, ...], target: tuple[int, ...], kvm: bool
) -> None:
    judged = modes.judge(facts(running, target, "vfio-pci", kvm=kvm))
    assert all(judged.values())
    assert all(blocker.remedy for blockers in judged.values() for blocker in blockers)
