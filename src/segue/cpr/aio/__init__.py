"""asyncio with nothing hidden: connections, children and timers that can be taken apart.

asyncio's transports and streams keep bytes in buffers of their own, differently in each Python.
These own their buffers, and stand on nothing of the event loop but `add_reader` and `call_at`.

    server = Server(Chat, listener)              each connection is a Chat(), a Protocol
    server.start()
    ...
    state = State(Daemon(server=server.suspend()))
    try:
        restart(state, argv)                     without an `await` in between
    except CprError:
        server.start()                           nothing was lost

and in the new code, `start()` after the block of `resumed()`:

    server = Server.restore(daemon.server, Chat)
"""

from segue.cpr.aio.asking import ask
from segue.cpr.aio.child import Child, ChildState
from segue.cpr.aio.connection import ConnectionState, Protocol
from segue.cpr.aio.server import Server, ServerState
from segue.cpr.aio.timers import Timers

__all__ = [
    "Child",
    "ChildState",
    "ConnectionState",
    "Protocol",
    "Server",
    "ServerState",
    "Timers",
    "ask",
]
