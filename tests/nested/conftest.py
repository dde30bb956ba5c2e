"""Fixtures of the tests that only the nested bed can run (scripts/nested-bed)."""

from __future__ import annotations

from tests.qemu.conftest import place, segue

__all__ = ["place", "segue"]
