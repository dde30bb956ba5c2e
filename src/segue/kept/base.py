"""What every kept object is to the supervisor and to the transaction.

An upgrade calls, in this order (all but `arguments` and `identity` must be quick and must not
wait: they run while the guest is paused or the successor waits for its first instruction):

    arguments(lending)   prepare: what the successor is given, with descriptors of its own
    hold()               the guest has stopped: nothing more flows towards it
    take_back()          what the incumbent had not read is taken out of its descriptors
    switch(number)       the successor's `cont` was sent: it is the one that is served now
  or
    give_back()          undo: the incumbent is the one that is served, as if nothing had been
    drop(number)         that instance is dead: what was only for it is closed
    close()              the machine has ended
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from segue.qemu.binary import Binary


@dataclass
class Lending:
    """What one instance is to be given: who it is, and the descriptors that it inherits.

    `number` counts the instances of a machine from 1. `target` is the binary that will run.
    """

    number: int
    target: Binary
    _inherited: set[int] = field(default_factory=set)

    @property
    def first(self) -> bool:
        return self.number == 1

    def inherit(self, fd: int) -> int:
        """Have the instance inherit `fd` under the same number; the supervisor keeps it too."""
        self._inherited.add(fd)
        return fd

    @property
    def descriptors(self) -> tuple[int, ...]:
        return tuple(sorted(self._inherited))


class Part(ABC):
    """Something on an instance's command line."""

    @abstractmethod
    def arguments(self, lending: Lending) -> list[str]:
        """The arguments for one instance; descriptors that it needs are given to `lending`."""


class Kept(Part):
    """Something that the supervisor owns and lends to each instance."""

    kind: str
    name: str

    def hold(self) -> None:  # noqa: B027
        """The guest has stopped: let nothing more flow towards it."""

    def take_back(self) -> None:  # noqa: B027
        """Take what the incumbent has not read; it will not read any more."""

    def switch(self, number: int) -> None:  # noqa: B027
        """Instance `number` runs the guest from now on: serve it."""

    def give_back(self) -> None:  # noqa: B027
        """The incumbent goes on: give it what was taken, and serve it again."""

    def drop(self, number: int) -> None:  # noqa: B027
        """Instance `number` is dead and reaped: close what was only for it."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What proves that this is the same object as before (inode, cookie, path)."""

    def held_by(self, pid: int) -> bool | None:
        """Whether /proc/PID/fd shows this object; None where an instance has no part in it."""
        return None

    def close(self) -> None:  # noqa: B027
        """The machine has ended: let go of everything, and remove what was made."""
