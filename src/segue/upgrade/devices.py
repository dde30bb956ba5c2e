"""Which devices a running QEMU has been given."""

from __future__ import annotations

from segue.qemu.monitor import Monitor


async def types(monitor: Monitor) -> set[str]:
    """The QOM types of the user's devices, with and without an id."""
    found = set()
    for container in ("/machine/peripheral", "/machine/peripheral-anon"):
        for child in await monitor.execute("qom-list", {"path": container}):
            if child["type"].startswith("child<"):
                found.add(child["type"][len("child<") : -1])
    return found


def vfio(of: set[str]) -> list[str]:
    """Those types that are a host's hardware."""
    return sorted(name for name in of if name.startswith("vfio-"))
