"""Character devices whose client outlives QEMU.

The broker stands between a host end (a socket, a pty, the terminal) and the instances. Each
instance has a socketpair of its own (`pair.py`); at an upgrade no byte is lost or doubled:

- `freeze`: a human monitor is treated as in `hold` and `take_back`, though the guest runs: what
  its clients type waits while two machines are compared.
- `hold`: nothing more is sent to the incumbent; whatever it has written is read, so that it has
  nothing left that it would want to write once its state is saved.
- `take_back`: what it has not read is taken out of its end, to be sent before anything newer.
  What it has read is in the state that it saves.
- `switch`: the incumbent's last output goes to the client first, then the successor is served.
  A successor is neither read nor written to before: a UART that is being reset would eat bytes.
- `give_back`: the incumbent is served again, with what was taken from it and, if a successor had
  been switched to already, with all that was sent there since.

Bounds. Output is read as soon as QEMU writes it (virtconsole drops what its socket does not
take). While a client is there, about `TO_CLIENT` bytes at most wait for it; then QEMU is read no
more, and the guest's device does what it always does when nobody reads. In a blackout the
incumbent is read regardless, which adds no more than a socket buffer. Without a client output is
dropped, as QEMU does. Up to `TO_GUEST` bytes of input wait here, then the client is read no more.

All state is bytes and descriptors: nothing hides in a stream object.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from segue.errors import SegueError
from segue.kept.base import Kept, Lending
from segue.kept.channel import Channel, Watches
from segue.kept.endpoints import Endpoint, Say
from segue.kept.pair import Pair
from segue.kept.prompt import Prompt
from segue.kept.viewer import Viewer
from segue.saved import Loader, Saver, raw

TO_CLIENT = 1 << 20
TO_GUEST = 4096  # CHR_READ_BUF_LEN
_PIECE = 65536
# A successor that was sent so much has read it, and so it runs: there is no undo any more.
_UNDO = 1 << 20
_RETRY = 1.0  # seconds

ReplaceBackend = Callable[[str, int], Awaitable[None]]


class Broker(Kept):
    """One character device: its host end, its client, its instances.

    `shared` are parameters that each instance gets too (mux, logfile), also when its backend is
    replaced. `gated`: a human monitor hears what is typed here, maybe beside others. With
    `presence`, QEMU sees no connection while no client is there, and the guest a closed port; a
    new client is given to QEMU by `replace_backend(id, fd)`, which raises SegueError where QEMU
    refuses, and is not called while an upgrade is in progress.
    """

    kind = "chardev"

    def __init__(
        self,
        name: str,
        endpoint: Endpoint,
        *,
        shared: dict[str, str] | None = None,
        monitor: bool = False,
        presence: bool = False,
        gated: bool = False,
        err: Say = lambda line: None,
    ) -> None:
        self.name = name
        self.endpoint = endpoint
        self.to_guest = bytearray()
        self.to_client = bytearray()
        self.on_client_change: Callable[[bool], None] | None = None
        self.on_break: Callable[[], None] | None = None
        self.replace_backend: ReplaceBackend | None = None
        self.shared = shared or {}
        self._prompt = Prompt() if monitor else None
        self._presence = presence
        self._gated = gated or monitor
        self._err = err
        self._pairs: dict[int, Pair] = {}
        self._serving: int | None = None
        # Until the incumbent is dead: what an undo after the switch would need.
        self._previous: int | None = None
        self._previous_prompt: Prompt | None = None
        self._since_switch = bytearray()
        self._held = False
        self._channel: Channel | None = None
        self._input_ended = False
        self._viewers: list[Viewer] = []
        self._watches = Watches()
        self._replacing: asyncio.Task[None] | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._refused = False
        self._flushed = asyncio.Event()
        endpoint.came = self._client_came
        endpoint.broke = self._client_broke

    # -- the machine's life ---------------------------------------------------------------

    def inherit(self, loader: Loader) -> None:
        self.endpoint.found = loader.within("end")
        while (sock := loader.socket(f"viewer{len(self._viewers)}")) is not None:
            self._viewers.append(Viewer(sock))

    def spare(self, on: bool) -> None:
        self.endpoint.spared = on

    async def start(self) -> None:
        await self.endpoint.start()

    def save(self, saver: Saver) -> dict[str, Any]:
        channel, prompt = self._channel, self._prompt
        for number, viewer in enumerate(self._viewers):
            saver.fd(f"viewer{number}", viewer.sock.fileno(), outlives=True)
        return {
            "endpoint": self.endpoint.save(saver.within("end")),
            "channel": None if channel is None else channel.save(saver.within("end")),
            "input_ended": self._input_ended,
            "to_guest": saver.bytes(self.to_guest),
            "to_client": saver.bytes(self.to_client),
            "viewers": [saver.bytes(viewer.pending) for viewer in self._viewers],
            "pairs": {
                str(number): pair.save(saver.within(f"pair{number}"))
                for number, pair in self._pairs.items()
            },
            "serving": self._serving,
            "prompt": None if prompt is None else prompt.save(saver.exact),
            "refused": self._refused,
        }

    async def load(self, data: dict[str, Any], loader: Loader) -> None:
        self._pairs = {
            int(number): Pair.load(pair, loader.within(f"pair{number}"))
            for number, pair in data["pairs"].items()
        }
        self._serving, self._refused = data["serving"], data["refused"]
        self._held = loader.held
        if data["prompt"] is not None and self._prompt is not None:
            self._prompt = Prompt.load(data["prompt"])
        self.to_guest += raw(data["to_guest"])
        for number, pending in enumerate(data["viewers"]):
            if (sock := loader.socket(f"viewer{number}")) is not None:
                self._viewers.append(Viewer(sock, raw(pending)))
        channel = await self.endpoint.load(data["endpoint"], data["channel"], loader.within("end"))
        if channel is not None:
            self._channel = channel
            self._input_ended = data["input_ended"]
            self.to_client += raw(data["to_client"])
        self._pump()

    @property
    def filename(self) -> str:
        return self.endpoint.filename(self._channel)

    def arguments(self, lending: Lending) -> list[str]:
        number = lending.number
        if (old := self._pairs.pop(number, None)) is not None:
            self._close_pair(old)
        absent = self._presence and not self.connected
        pair = Pair.dead() if absent else Pair.make()
        self._pairs[number] = pair
        # A socket counts as connected until QEMU has seen its end, which a port does not hear of
        # before the guest runs: it would stay open for good. What is `null` was never connected.
        backend = "null" if absent else "socket"
        options = {"id": self.name}
        theirs = lending.inherit(pair.theirs.fileno())
        if pair.ours is not None:
            lending.inherit(pair.ours.fileno())
            options["fd"] = str(theirs)
        options |= self.shared
        if "logfile" in options and not lending.first:
            options["logappend"] = "on"
        if self._serving is None:
            self._serving = number
        self._pump()
        text = ",".join(f"{key}={value.replace(',', ',,')}" for key, value in options.items())
        return ["-chardev", f"{backend},{text}"]

    def freeze(self) -> None:
        if self._gated:
            self.hold()
            self.take_back()

    def hold(self) -> None:
        self._held = True
        self._read_instance()
        self._pump()

    def take_back(self) -> None:
        pair = self._pair
        if pair is None or pair.ours is None:
            return
        self._read_instance()
        taken = pair.unread()
        self.to_guest[:0] = taken
        if self._prompt:
            self._prompt.taken_back(len(taken))

    def switch(self, number: int) -> None:
        self._read_instance()
        self._unwatch(self._pair)
        self._previous, self._serving = self._serving, number
        self._since_switch.clear()
        if self._prompt:
            self._previous_prompt, self._prompt = self._prompt, self._prompt.successor()
            self.to_guest[:0] = self._prompt.retyped
        self._release()

    def give_back(self) -> None:
        if self._previous is not None:
            self._unwatch(self._pair)
            self._serving = self._previous
            self.to_guest[:0] = self._since_switch
            if self._prompt:
                del self.to_guest[: len(self._prompt.retyped)]
                self._prompt = self._previous_prompt
            self._forget_previous()
        self._release()

    def drop(self, number: int) -> None:
        if number not in self._pairs:
            return
        if number == self._serving:
            # Its last words. Those of an incumbent after the switch are not wanted: its saved
            # state has them as not yet said, and the successor says them.
            self._read_instance()
            self._unwatch(self._pair)
            self._serving = None
        elif number == self._previous:
            self._forget_previous()
        self._close_pair(self._pairs.pop(number))
        self._pump()

    async def flush(self) -> None:
        """Wait until the client has been sent all that there is for it."""
        while self.to_client and self._channel is not None:
            self._flushed.clear()
            await self._flushed.wait()

    async def quiet(self) -> None:
        """Wait until no change of QEMU's backend is under way: before an upgrade begins."""
        if self._replacing is not None:
            await asyncio.wait([self._replacing])

    def close(self) -> None:
        if self._replacing is not None:
            self._replacing.cancel()
        if self._retry is not None:
            self._retry.cancel()
        if self._channel is not None:
            # What QEMU said until it was given another end.
            self._read_instance()
        if self._channel is not None:
            self._write_client()
        self._watches.close()
        if self._channel is not None:
            (self._channel.leave if self.endpoint.spared else self._channel.close)()
            self._channel = None
        for viewer in self._viewers:
            viewer.close(hang_up=not self.endpoint.spared)
        self._viewers.clear()
        for pair in self._pairs.values():
            pair.close()
        self._pairs.clear()
        self._serving = None
        self._forget_previous()
        self.endpoint.close()
        self._flushed.set()

    def identity(self) -> dict[str, Any]:
        client = self._channel.identity() if self._channel else None
        return {**self.endpoint.identity(), "client": client}

    def held_by(self, pid: int) -> bool | None:
        """None while nobody is there for QEMU to hold."""
        inodes = {f"socket:[{pair.inode}]" for pair in self._pairs.values() if pair.ours}
        if not inodes:
            return None
        directory = f"/proc/{pid}/fd"
        with contextlib.suppress(OSError):
            for fd in os.listdir(directory):
                with contextlib.suppress(OSError):
                    if os.readlink(f"{directory}/{fd}") in inodes:
                        return True
        return False

    # -- clients --------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """Whether QEMU would tell the guest that someone is there."""
        return self._channel is not None and self._channel.opens and not self._input_ended

    def attach(self, sock: socket.socket) -> None:
        """Show all output to one more client too, and let it type. The socket is ours now."""
        viewer = Viewer(sock)
        if self._prompt:
            viewer.feed(self._prompt.banner)
        self._viewers.append(viewer)
        self.changed()
        self._pump()

    def _client_came(self, channel: Channel) -> None:
        self._channel = channel
        self._input_ended = False
        if self._prompt:
            self.to_client += self._prompt.greeting(channel.returning)
        self._changed()

    def _client_left(self) -> None:
        channel, self._channel = self._channel, None
        if channel is None:
            return
        self._watches.forget(channel.reads, channel.writes)
        channel.close()
        self.to_client.clear()
        self._flushed.set()
        if self._prompt:
            self.to_guest += self._prompt.client_left()
        self.endpoint.left()
        self._changed()

    def _client_broke(self) -> None:
        if self.on_break:
            self.on_break()

    def _changed(self) -> None:
        if self.on_client_change and (self._channel is None or self._channel.opens):
            self.on_client_change(self.connected)
        self.changed()
        self._pump()

    # -- bytes ----------------------------------------------------------------------------

    @property
    def _pair(self) -> Pair | None:
        return None if self._serving is None else self._pairs.get(self._serving)

    def _release(self) -> None:
        self._held = False
        self._pump()

    def _forget_previous(self) -> None:
        self._previous = self._previous_prompt = None
        self._since_switch.clear()

    def _pump(self) -> None:
        """Move what can be moved, and wait for what cannot."""
        self._follow_client()
        self._write_instance()
        self._write_client()
        self._write_viewers()
        pair, channel = self._pair, self._channel
        if pair is not None and pair.broken and pair.ours is not None:
            self._unwatch(pair)
            pair.hang_up()
            self._follow_client()
        room = len(self.to_guest) < TO_GUEST
        if pair is not None and pair.ours is not None:
            fd = pair.ours.fileno()
            eager = self._held or channel is None or len(self.to_client) < TO_CLIENT
            self._watches.read(fd, self._on_instance if eager else None)
            blocked = bool(self.to_guest) and not self._held
            self._watches.write(fd, self._pump if blocked else None)
        if channel is not None:
            reading = room and not self._input_ended
            self._watches.read(channel.reads, self._on_client if reading else None)
            self._watches.write(channel.writes, self._pump if self.to_client else None)
            watched = channel.hangs_up and not reading and not self.to_client
            self._watches.hangup(channel.reads, self._client_left if watched else None)
        for viewer in self._viewers:
            self._watches.read(viewer.fd, self._on_viewers if room else None)
            self._watches.write(viewer.fd, self._pump if viewer.pending else None)

    def _on_instance(self) -> None:
        self._read_instance(_PIECE)
        self._pump()

    def _read_instance(self, size: int | None = None) -> None:
        """Read the instance that is served: one piece, or all that there is."""
        while (pair := self._pair) is not None:
            data = pair.receive(size) if size else pair.receive()
            if not data:
                return
            shown = self._prompt.output(data) if self._prompt else data
            for viewer in self._viewers:
                viewer.feed(shown)
            if self._channel is not None:
                self.to_client += shown
            if size:
                return

    def _write_instance(self) -> None:
        pair = self._pair
        while self.to_guest and not self._held and pair is not None:
            count = pair.send(self.to_guest[:_PIECE])
            if not count:
                return
            sent = self.to_guest[:count]
            if self._prompt:
                self._prompt.sent(sent)
            if self._previous is not None:
                self._since_switch += sent
                if len(self._since_switch) > _UNDO:
                    self._forget_previous()
            del self.to_guest[:count]

    def _on_client(self) -> None:
        channel = self._channel
        if channel is None:
            return
        try:
            data = channel.recv(TO_GUEST)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self.to_guest += data
            self._pump()
        elif channel.two_way:
            self._client_left()
        else:
            self._input_ended = True
            self._changed()

    def _write_client(self) -> None:
        while self.to_client and self._channel is not None:
            try:
                del self.to_client[: self._channel.send(self.to_client[:_PIECE])]
            except BlockingIOError:
                return
            except OSError:
                # It reads no more; whether it has gone altogether is found by reading.
                self.to_client.clear()
        self._flushed.set()

    def _on_viewers(self) -> None:
        for viewer in tuple(self._viewers):
            data = viewer.recv(TO_GUEST)
            if data:
                self.to_guest += data
            elif data is not None:
                self._lose_viewer(viewer)
        self._pump()

    def _write_viewers(self) -> None:
        for viewer in tuple(self._viewers):
            try:
                viewer.flush()
            except OSError:
                self._lose_viewer(viewer)

    def _lose_viewer(self, viewer: Viewer) -> None:
        self._watches.forget(viewer.fd)
        viewer.close()
        self._viewers.remove(viewer)
        self.changed()

    def _unwatch(self, pair: Pair | None) -> None:
        if pair is not None and pair.ours is not None:
            self._watches.forget(pair.ours.fileno())

    def _close_pair(self, pair: Pair) -> None:
        self._unwatch(pair)
        pair.close()

    # -- presence -------------------------------------------------------------------------

    def _follow_client(self) -> None:
        """Let QEMU see what the guest is to be told: that a client came, or went.

        And give it a connection in the place of one that it has shut down.

        Not while the guest is stopped: QEMU would write the news into a guest whose memory is
        another instance's already. A new connection waits until the upgrade is over.
        """
        pair = self._pair
        if self._held or pair is None or self._replacing is not None:
            return
        if self._previous is not None:
            return  # whether the guest runs is not known yet, and before it does QEMU tells nobody
        if self._presence and not self.connected:
            if pair.ours is not None:
                self._write_instance()
                self._unwatch(pair)
                pair.hang_up()
            self.to_guest.clear()
            self._refused = False
        elif pair.ours is None and len(self._pairs) == 1 and self.replace_backend is not None:
            if self._retry is None:
                self._replacing = asyncio.get_running_loop().create_task(
                    self._replace(self.replace_backend)
                )

    async def _replace(self, replace_backend: ReplaceBackend) -> None:
        number, pair = self._serving, None
        try:
            pair = Pair.make()
            await replace_backend(self.name, pair.theirs.fileno())
        except (SegueError, OSError) as error:
            # QEMU refuses while the guest is paused.
            if not self._refused:
                self._err(f"{self.name}: its client is not shown to the guest yet: {error}")
            self._refused = True
            self._retry = asyncio.get_running_loop().call_later(_RETRY, self._try_again)
            if pair is not None:
                pair.close()
            return
        except BaseException:
            if pair is not None:
                pair.close()
            raise
        finally:
            self._replacing = None
        self._refused = False
        if number is None or number not in self._pairs:
            pair.close()
            return
        self._close_pair(self._pairs[number])
        pair.inherited = False
        self._pairs[number] = pair
        self.changed()
        self._pump()

    def _try_again(self) -> None:
        self._retry = None
        self._pump()
