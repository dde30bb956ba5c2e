"""The commit point: `cont` is sent to the successor, and what its answer means.

A `cont` without an answer is undone if it is proven that the guest did not run, and only then.
The proof is what QEMU says itself: in carrying out `cont` it sends the event RESUME, from its main
thread and straight into the socket, *before* it sets anything of the guest going (vm_prepare_start
in system/cpus.c, 7.2 to 11.1). So a successor that is dead or stands still, all of whose words
have been read, and that has not said RESUME, has run nothing. That covers a command that was not
read, one that QEMU's monitor thread read while its main loop hung (so whether it was read proves
nothing, and is not asked), and a death or a hang in the middle of it, where images are opened.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

from segue.errors import CommandFailed, GuestLost, InstanceDied, MonitorClosed, TimedOut
from segue.qemu.instance import Instance
from segue.qemu.monitor import Event
from segue.upgrade.surroundings import Surroundings


class Commit:
    """One `cont`. `limit` is for its answer, in seconds."""

    def __init__(self, successor: Instance, surroundings: Surroundings, limit: float) -> None:
        self.successor = successor
        self.surroundings = surroundings
        self.told: list[Event] = []
        self._limit = limit
        self._serving = False

    async def run(self) -> float:
        """The guest runs on the successor; when it was told to. Raises SegueError.

        GuestLost says that it may have run there; with all others it has not.
        """
        unlisten = self.successor.monitor.listen(self._successor_event)
        answer = self.successor.monitor.relay({"execute": "cont"})
        sent = time.time()
        try:
            reply = await self.outcome(answer)
        finally:
            unlisten()
        if "error" in reply:
            raise CommandFailed(f"cont on the successor: {reply['error']['desc']}")
        return sent

    def switch(self) -> None:
        """From now on all is the successor's."""
        self._serve()
        # What the running guest has already made it tell is for the clients too.
        self.surroundings.served(self.successor, self.told)

    def resume_told(self) -> Event | None:
        """What QEMU says before it runs a guest, if it has since it was told to."""
        return next((event for event in self.told if event["event"] == "RESUME"), None)

    async def outcome(self, answer: asyncio.Future[dict[str, Any]]) -> dict[str, Any]:
        """The commit point has been passed: only proof that the guest did not run goes back."""
        successor = self.successor
        try:
            try:
                async with asyncio.timeout(self._limit):
                    return await asyncio.shield(answer)
            except TimeoutError:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._limit):
                        await successor.hold_still()
                        if self.resume_told() is None and not answer.done():
                            await successor.kill()
                            raise TimedOut("the successor hung before it ran the guest") from None
                successor.go_on()
                tell_limbo(self.surroundings, "the successor does not answer")
                return await answer
        except MonitorClosed:
            if self.resume_told() is None:
                raise InstanceDied(
                    f"before it ran the guest, {(await successor.death()).what}"
                ) from None
            raise GuestLost(
                "the successor died after it was told to run the guest",
                hint="see the machine's qemu.log",
                guest="lost",
            ) from None

    def _successor_event(self, event: Event) -> None:
        """The guest runs from RESUME on, so it is served at once.

        QEMU answers `cont` later, by as much as the whole pause when the guest keeps it busy: in
        that time nobody would hear the guest.
        """
        self.told.append(event)
        if event["event"] == "RESUME":
            self._serve()

    def _serve(self) -> None:
        if not self._serving:
            self._serving = True
            for kept in self.surroundings.kept:
                kept.switch(self.successor.number)


def switch(successor: Instance, surroundings: Surroundings) -> None:
    """As `Commit.switch`, where nobody was told to run the guest, or it is told already."""
    Commit(successor, surroundings, 0).switch()


def tell_limbo(surroundings: Surroundings, what: str) -> None:
    """For now nobody can know how it ends."""
    surroundings.on_limbo(
        GuestLost(
            what,
            hint="the upgrade goes on when it does; `segue history` tells how it ended",
            guest=f"unknown: {what}",
        )
    )
