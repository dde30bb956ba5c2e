"""VFIO containers whose process has died: what they know of its addresses is made void.

    struct vfio_iommu_type1_dma_unmap    24 bytes    argsz, flags, iova, size

A QEMU that is started on a container tells the kernel where it has mapped guest RAM itself, which
is refused while the addresses of the one before are in force (linux/vfio.h).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterable

_CONTAINER = "/dev/vfio/vfio"
_UNMAP_DMA = 0x3B72
_ALL, _ADDRESSES_ONLY = 1 << 1, 1 << 2
_UNMAP = struct.Struct("=IIQQ")


def forget_addresses(descriptors: Iterable[int]) -> None:
    """In every container among `descriptors`; the devices' own mappings stay as they are."""
    request = _UNMAP.pack(_UNMAP.size, _ALL | _ADDRESSES_ONLY, 0, 0)
    for fd in descriptors:
        if os.readlink(f"/proc/self/fd/{fd}") == _CONTAINER:
            # Where the dead one had told nothing yet, there is nothing to forget.
            with contextlib.suppress(OSError):
                fcntl.ioctl(fd, _UNMAP_DMA, request)
