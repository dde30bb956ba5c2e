"""What every kept object is to the supervisor and to the transaction.

A machine's life and an upgrade call, in this order (`hold` to `give_back` run while the guest
is paused, so they are plain functions that never wait):

    move_in(...)         where it may put files, and whom it may tell what happens
    inherit(loader)      what an earlier one left, where there was one
    start()              the machine starts: the host end is opened
    learn(monitor)       the first instance is up: values that it chose are noted
    quiet()              an upgrade begins: what is under way is finished first
    freeze()             the machine is to be compared: no client changes it any more
    arguments(lending)   prepare: what the successor is given, with descriptors of its own
    furnish(monitor)     it answers: what its command line could not give it, before it is compared
    hold()               the guest has stopped: nothing more flows towards it
    take_back()          what the incumbent had not read is taken out of its descriptors
    pass_on(number)      `cont` is about to be sent: what only one can have is the successor's
    switch(number)       the successor's `cont` was sent: it is the one that is served now
    settle(monitor)      the incumbent is dead: what could not be there twice moves over
  or
    restore()            undo, the successor is dead: what only one can have is the incumbent's
    give_back()          undo, after `freeze`: the incumbent is served, as if nothing had been
    drop(number)         that instance is dead: what was only for it is closed
    spare(on)            whether another is to inherit
    close()              the machine has ended

A supervisor can be replaced by another process, in two ways (docs/supervisor.md); the object is
then made again from the same command line, and `load` takes the place of `start`:

    save(saver)          plain data and descriptors from which it can be made again (saved.py)
    load(data, loader)   take up what `save` gave in another process
    changed              call it whenever what `save` gives, bytes aside, is another

An object that has nothing but what the command line says needs neither.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segue.kept.guard import Guard
from segue.qemu.binary import Binary
from segue.qemu.monitor import Monitor
from segue.saved import Loader, Saver


@dataclass
class Lending:
    """What one instance is to be given: who it is, and the descriptors that it inherits.

    `number` counts the instances of a machine from 1. `target` is the binary that will run;
    `cpu` is what it makes of the machine's CPU model, where that model floats. A later one waits
    for the state with the words `incoming`; `copies_ram` says that RAM is in that state, and comes
    into memory of its own.
    What `guard` is told to watch waits for an answer.
    """

    number: int
    target: Binary
    cpu: dict[str, Any] = field(default_factory=dict)
    incoming: tuple[str, ...] = ("-incoming", "defer")
    copies_ram: bool = False
    guard: Guard = field(default_factory=Guard)
    first_number: int | None = None
    numbers: dict[int, int] = field(default_factory=dict)

    @property
    def first(self) -> bool:
        return self.number == 1

    def inherit(self, fd: int) -> int:
        """Have the instance inherit `fd`; under which number. The supervisor keeps it too.

        It is the same number, but in a process that is there already and uses others: then they
        are counted from `first_number` on.
        """
        if self.first_number is None:
            return self.numbers.setdefault(fd, fd)
        return self.numbers.setdefault(fd, self.first_number + len(self.numbers))

    @property
    def descriptors(self) -> tuple[int, ...]:
        return tuple(sorted(self.numbers))


class Part(ABC):
    """Something on an instance's command line."""

    @abstractmethod
    def arguments(self, lending: Lending) -> list[str]:
        """The arguments for one instance; descriptors that it needs are given to `lending`."""


class Kept(Part):
    """Something that the supervisor owns and lends to each instance."""

    kind: str
    name: str
    # Set by the supervisor.
    changed: Callable[[], None] = staticmethod(lambda: None)

    def move_in(self, directory: Path, say: Callable[[str], None]) -> None:
        """The machine's run directory, and how to tell its user."""

    def inherit(self, loader: Loader) -> None:
        """Before `start`: what an earlier machine of this command line has left (store.py)."""

    def spare(self, on: bool) -> None:
        """Whether `close` is to leave what another machine will inherit as it is."""

    async def start(self) -> None:
        """Open the host end. Raises SegueError with the reason."""

    def save(self, saver: Saver) -> dict[str, Any]:
        """What `load` needs. Changes nothing: it is asked for again and again.

        Not called while the guest is paused for an upgrade. `saver.exact` is never true during
        an upgrade at all; otherwise there may be a successor, from before the state moves.
        """
        return {}

    async def load(self, data: dict[str, Any], loader: Loader) -> None:
        """In place of `start`: go on where the process that called `save` was.

        Where the state is not exact, a descriptor that is lost is made anew, or is done without.
        Raises SegueError if that cannot be.
        """

    async def learn(self, monitor: Monitor) -> None:
        """Note what the first instance chose, so that later ones are told the same."""

    async def quiet(self) -> None:
        """Finish what is under way, so that an upgrade can begin."""

    async def furnish(self, monitor: Monitor) -> None:
        """Give a successor by QMP what its command line could not. Raises SegueError."""

    def freeze(self) -> None:
        """Until `switch` or `give_back`, pass on nothing that could change the machine."""

    def hold(self) -> None:
        """The guest has stopped: let nothing more flow towards it."""

    def take_back(self) -> None:
        """Take what the incumbent has not read; it will not read any more."""

    def pass_on(self, number: int) -> None:
        """Give instance `number` what only one can have. Raises SegueError, which is undone."""

    def restore(self) -> None:
        """Take back what `pass_on` did, and what of `hold` the guest needs to run."""

    def switch(self, number: int) -> None:
        """Instance `number` runs the guest from now on: serve it."""

    async def settle(self, monitor: Monitor) -> None:
        """The incumbent is dead: set up on the successor what could not be there twice."""

    def give_back(self) -> None:
        """The incumbent goes on: give it what was taken, and serve it again."""

    def drop(self, number: int) -> None:
        """Instance `number` is dead and reaped: close what was only for it."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What proves that this is the same object as before (inode, cookie, path).

        Empty where there is none for now.
        """

    def held_by(self, pid: int) -> bool | None:
        """Whether /proc/PID/fd shows this object; None where an instance has no part in it."""
        return None

    def close(self) -> None:
        """The machine has ended: let go of everything, and remove what was made."""
