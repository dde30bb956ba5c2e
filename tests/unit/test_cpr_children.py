"""Children and timers that go on in another process, and the question whether it can."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import partial

import pytest

from segue.cpr import NoAnswer, Refused, State, section
from segue.cpr.aio import Child, ChildState, Timers, ask
from tests.unit.cprkit import Counter, moved, run


@section("children", version=1)
@dataclass(frozen=True)
class Children:
    child: ChildState


def test_a_child_is_known_by_its_pidfd() -> None:
    async def test() -> None:
        child = Child.spawn(["sh", "-c", "read status; exit $status"], stdin=subprocess.PIPE)
        assert child._popen is not None
        stdin = child._popen.stdin
        assert stdin is not None
        # As after exec(): the same child, by another object.
        received = moved(State(Children(child.suspend("child"))), Children)
        again = Child.restore(received.get(Children).child)
        assert again.pid == child.pid
        waiting = [asyncio.create_task(again.wait()) for _ in range(3)]
        stdin.write(b"7\n")
        stdin.close()
        assert [await task for task in waiting] == [7, 7, 7]
        # Whoever else waits learns that it has ended, and reaps nobody else.
        assert await child.wait() is None
        for one in (child, again):
            one.kill()

    run(test)


def wait_but_leave(child: Child) -> None:
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)


def test_a_child_that_ended_before_anybody_looked() -> None:
    async def test() -> None:
        child = Child.spawn(["sleep", "600"])
        child.kill(signal.SIGTERM)
        wait_but_leave(child)
        received = moved(State(Children(child.suspend("child"))), Children)
        again = Child.restore(received.get(Children).child)
        assert await again.wait() == -signal.SIGTERM
        assert await again.wait() == -signal.SIGTERM
        # One that was waited for is kept as what it is.
        received = moved(State(Children(again.suspend("child"))), Children)
        third = Child.restore(received.get(Children).child)
        assert await third.wait() == -signal.SIGTERM
        third.kill()
        assert await child.wait() is None

    run(test)


REUSE = """
import asyncio, os, signal, subprocess
from segue.cpr.aio import Child

async def main():
    child = Child.spawn(["true"])
    os.waitpid(child.pid, 0)  # somebody else reaps it, and its pid is free
    while True:
        with open("/proc/sys/kernel/ns_last_pid", "w") as last:
            last.write(str(child.pid - 1))
        other = subprocess.Popen(["sleep", "600"])
        if other.pid == child.pid:
            break
        other.kill()
        other.wait()
    child.kill()
    print(await child.wait(), other.poll(), flush=True)
    other.kill()
    other.wait()

asyncio.run(main())
"""


def test_a_pid_that_was_given_to_somebody_else_is_left_alone() -> None:
    # In a pid namespace of its own, where the next pid can be chosen.
    unshare = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    done = subprocess.run(
        [*unshare, sys.executable, "-c", REUSE], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("None None\n", "")


def test_timers_go_on() -> None:
    async def test() -> None:
        fired: list[str] = []
        both = asyncio.Event()

        def fire(name: str) -> None:
            fired.append(name)
            if len(fired) == 2:
                both.set()

        timers = Timers({name: partial(fire, name) for name in ("soon", "late", "never")})
        timers.set("soon", 0.01)
        timers.set("late", 0.02)
        timers.set("late", 0.03)
        timers.set("never", 0.01)
        timers.cancel("never")
        saved = timers.suspend()
        assert saved.keys() == {"soon", "late"}
        newer = Timers({name: partial(fire, name) for name in ("soon", "late")})
        newer.start(saved | {"gone": 0.0})
        await both.wait()
        assert fired == ["soon", "late"]
        assert newer.suspend() == {}

    run(test)


def test_a_timer_that_was_due_meanwhile_fires_at_once_and_may_set_itself_again() -> None:
    async def test() -> None:
        done = asyncio.Event()
        count = 0

        def tick() -> None:
            nonlocal count
            count += 1
            if count == 3:
                done.set()
            else:
                timers.set("tick", 0)

        timers = Timers({"tick": tick})
        timers.start({"tick": -5.0})
        await done.wait()
        assert timers.suspend() == {}

    run(test)


CODE = "from tests.unit.test_cpr_children import Children, resumed_with; resumed_with(Children)"


def resumed_with(*kinds: type) -> None:
    from segue.cpr import resumed

    with resumed() as arrival:
        assert arrival is not None
        arrival.load(*kinds)


def test_asking_makes_nobody_wait() -> None:
    async def test() -> None:
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0.001)

        other = asyncio.create_task(others())
        child = Child.spawn(["sleep", "600"])
        state = State(Children(child.suspend("child")))
        await ask(state, [sys.executable, "-c", CODE])
        assert turns > 5
        with pytest.raises(Refused, match="counter is unknown"):
            await ask(
                State(Children(child.suspend("child")), Counter(1)), [sys.executable, "-c", CODE]
            )
        with pytest.raises(NoAnswer, match="does not answer"):
            await ask(state, ["sleep", "600"], timeout=0.05)
        other.cancel()
        child.kill()
        await child.wait()

    run(test)
