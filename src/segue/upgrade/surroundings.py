"""What a transaction has of the supervisor, and of whoever else it concerns."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segue.errors import GuestLost
from segue.kept.base import Kept, Lending
from segue.qemu.instance import Instance
from segue.qemu.monitor import Event
from segue.upgrade.journal import Journal

Launch = Callable[
    [Lending, list[str], tuple[socket.socket, socket.socket], list[str], dict[str, str]], Instance
]


@dataclass(frozen=True)
class Surroundings:
    """What the supervisor lends to a transaction.

    `directory` is for sockets between instances. `checkpoint(phase)` is awaited at the beginning
    of each phase; tests stop there. `lend(back)` makes a lending for the target, or for the binary
    that runs, and `argv` what it is started with; `launch` and `adopt` are the supervisor's.
    `survey` describes what the machine has become, for `argv` and `spawn`, or raises Refused.
    `read_only` and `closed` narrow what clients may ask of the incumbent, and from `hush` or
    `closed` on they do not hear that it stops; `served(instance,
    events)` ends both, and says who answers them from then on, and which events that they have
    not been told are for them.
    `on_limbo` is told why, when for now nobody can know how it ends: the caller need not wait.
    """

    directory: Path
    spawn: Callable[[], Instance]
    lend: Callable[[bool], Lending]
    argv: Callable[[Lending], list[str]]
    launch: Launch
    adopt: Callable[[Instance], None]
    kept: Sequence[Kept]
    journal: Journal
    survey: Callable[[], Awaitable[None]]
    read_only: Callable[[], Awaitable[None]]
    closed: Callable[[], Awaitable[None]]
    hush: Callable[[], None]
    served: Callable[[Instance, Sequence[Event]], None]
    progress: Callable[[dict[str, Any]], None]
    checkpoint: Callable[[str], Awaitable[None]]
    on_limbo: Callable[[GuestLost], None]
