"""CPU models whose meaning differs between releases: what later instances are told."""

from __future__ import annotations

import pytest

from segue.kept.values import Values, wishes


@pytest.mark.parametrize(
    ("model", "props"),
    [
        ("max", {}),
        ("max,avx2=off,level=0xd", {"avx2": False, "level": "0xd"}),
        ("host,+x2apic,-avx2,x2apic=off", {"x2apic": True, "avx2": False}),
    ],
)
def test_what_a_cpu_option_asks_for(model: str, props: dict[str, object]) -> None:
    assert wishes(model) == props


def test_the_next_instance_is_told_what_differs_and_what_the_user_said() -> None:
    model = "max,-avx2,+x2apic,gone=off"
    values = Values(model, cpu={"avx2": False, "x2apic": False, "sse": True, "gone": False})
    target = {"avx2": False, "x2apic": True, "sse": True, "fred": True}
    assert values.cpu_arguments(target) == "max,avx2=off,x2apic=off,fred=off"


@pytest.mark.parametrize(
    ("machine", "said"), [("pc-q35-7.2", "host"), ("microvm", "host,x-arch-cap-always-on=off")]
)
def test_what_a_versioned_machine_type_switches_on_for_an_older_cpu_stays_on(
    machine: str, said: str
) -> None:
    values = Values("host", machine, cpu={"sse": True})
    assert values.cpu_arguments({"sse": True, "x-arch-cap-always-on": True}) == said


def test_a_feature_that_is_gone_is_missed_and_a_switch_is_not() -> None:
    shown = {"pcommit": True, "rdpid": True, "cmp_legacy": True, "sse": True, "avx2": False}
    values = Values("max", cpu={**shown, "x-intel-pt-auto-level": True, "pmu": True})
    assert values.cpu_lacks({"sse": True, "pcommit": False, "pmu": False}) == ["pcommit", "rdpid"]
