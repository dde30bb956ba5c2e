"""Ask new code without making anybody wait for it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence

from segue.cpr.restart import TIMEOUT, Question
from segue.cpr.state import State


async def ask(
    state: State,
    argv: Sequence[str],
    env: Mapping[str, str] | None = None,
    *,
    timeout: float = TIMEOUT,
) -> None:
    """As segue.cpr.ask; the event loop goes on. Then `restart(state, argv, env, asked=True)`.

    `state` should be what the program would save now. What is saved afterwards has other numbers
    and bytes in it, but sections of the same versions and descriptors of the same kinds.
    """
    loop = asyncio.get_running_loop()
    with Question(state, argv, env, timeout=timeout) as question:
        answered = asyncio.Event()
        loop.add_reader(question.fileno(), answered.set)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await answered.wait()
        finally:
            loop.remove_reader(question.fileno())
        question.answer()
