"""Checkpoint and restart for any Python daemon: a process that replaces itself and drops nothing.

Declare what must live on as sections, in the module that both the old and the new code import:

    @section("chat", version=2, oldest=1)
    @dataclass(frozen=True)
    class Chat:
        listener: Descriptor
        sequence: int
        rooms: dict[str, bytes]

    state = State(Chat(Descriptor.of("listener", sock), 7, {}))
    fd = state.save()                        # a sealed memfd
    chat = State.load(fd, Chat).get(Chat)    # Refused, with a reason, unless all is as it was

A program that can be replaced begins like this, and calls `restart` when it is to be:

    with resumed() as arrival:               # None where it was simply started
        from chat import Chat, serve
        chat = arrival.load(Chat).get(Chat) if arrival else Chat(listen(), 0, {})
    serve(chat)

    restart(State(chat), [sys.executable, "-m", "chat"])     # never returns, or raises

To another process, over a Unix socket: `transfer(State(chat), sock)`, and there
`with receive(sock) as arrival:`, which ends as the block above does.

`State.dump()` and `State.parse(data, *kinds, descriptors={name: fd})` are the same with bytes, for
state files and descriptors whose numbers have changed; `entries(data)` says which ones to fetch.

Standard library only; it knows nothing of QEMU, nor of the rest of Segue. docs/cpr-library.md
is its manual.
"""

from segue.cpr.arrival import Arrival, How, resumed
from segue.cpr.descriptor import Descriptor, Identity
from segue.cpr.errors import (
    CprError,
    ExecFailed,
    Misuse,
    NoAnswer,
    Reason,
    Refused,
    TransferFailed,
)
from segue.cpr.restart import Question, ask, restart
from segue.cpr.section import section
from segue.cpr.state import Entry, State, entries
from segue.cpr.transfer import receive, transfer

__all__ = [
    "Arrival",
    "CprError",
    "Descriptor",
    "Entry",
    "ExecFailed",
    "How",
    "Identity",
    "Misuse",
    "NoAnswer",
    "Question",
    "Reason",
    "Refused",
    "State",
    "TransferFailed",
    "ask",
    "entries",
    "receive",
    "restart",
    "resumed",
    "section",
    "transfer",
]
