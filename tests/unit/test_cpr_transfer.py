"""A state goes to another process: one of the two owns it at any moment, however it ends."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from segue.cpr import (
    CprError,
    Descriptor,
    How,
    Misuse,
    Reason,
    Refused,
    State,
    TransferFailed,
    receive,
    section,
    transfer,
)


@section("pipes", version=1)
@dataclass(frozen=True)
class Pipes:
    ends: tuple[Descriptor, ...]
    note: str = ""


@section("pipes", version=2)
@dataclass(frozen=True)
class NewerPipes:
    ends: tuple[Descriptor, ...]


@dataclass
class Pair:
    ours: socket.socket
    theirs: socket.socket


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    ours.settimeout(7)
    with ours, theirs:
        yield Pair(ours, theirs)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def inheritable() -> set[int]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.get_inheritable(int(name)):
                found.add(int(name))
    return found


@contextmanager
def pipes(count: int) -> Iterator[State]:
    """A state with the read ends of pipes, each of which holds its number."""
    with ExitStack() as stack:
        ends = []
        for number in range(count):
            read, write = os.pipe()
            stack.callback(os.close, read)
            os.write(write, str(number).encode())
            os.close(write)
            ends.append(Descriptor(f"pipe{number}", read))
        yield State(Pipes(tuple(ends), "kept"))


def test_more_descriptors_than_fit_into_one_message(pair: Pair) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    before, standard = descriptors(), inheritable()
    try:
        for count in (0, 1, 250, 251, 777):
            with pipes(count) as state, ThreadPoolExecutor() as pool:
                sent = pool.submit(transfer, state, pair.ours)
                with receive(pair.theirs) as arrival:
                    assert arrival.how is How.TRANSFER
                    assert inheritable() == standard
                    received = arrival.load(Pipes).get(Pipes)
                    assert not sent.done()
                sent.result()
                assert received.note == "kept"
                for number, end in enumerate(received.ends):
                    assert not os.get_inheritable(end.fd)
                    assert os.read(end.fd, 10) == str(number).encode()
                    os.close(end.fd)
            assert pair.ours.gettimeout() == 7
            assert descriptors() == before
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def both(pair: Pair, state: State, *kinds: type, timeout: float = 30) -> list[CprError | None]:
    """What the sender and the receiver end with; what the receiver got is closed."""

    def send() -> CprError | None:
        try:
            transfer(state, pair.ours, timeout=timeout)
        except CprError as error:
            return error
        return None

    with ThreadPoolExecutor() as pool:
        sent = pool.submit(send)
        try:
            with receive(pair.theirs) as arrival:
                state = arrival.load(*kinds)
        except CprError as error:
            return [sent.result(), error]
        for end in state.get(Pipes).ends:
            os.close(end.fd)
        return [sent.result(), None]


def test_a_receiver_that_refuses_leaves_everything_to_the_sender() -> None:
    before = descriptors()
    with pipes(3) as state:
        for kinds, reason in (
            ((), Reason.UNKNOWN_SECTION),
            ((NewerPipes,), Reason.TOO_OLD),
        ):
            ours, theirs = socket.socketpair()
            with ours, theirs:
                errors = both(Pair(ours, theirs), state, *kinds)
            for error in errors:
                assert isinstance(error, Refused)
                assert error.reason is reason
        assert all(os.fstat(end.fd) for end in state.get(Pipes).ends)
    assert descriptors() == before


def test_a_receiver_that_fails_says_why(pair: Pair) -> None:
    before = descriptors()
    with pipes(2) as state, ThreadPoolExecutor() as pool:
        sent = pool.submit(transfer, state, pair.ours)
        with pytest.raises(ZeroDivisionError), receive(pair.theirs) as arrival:
            received = arrival.load(Pipes).get(Pipes)
            raise ZeroDivisionError("no luck")
        with pytest.raises(Refused, match="ZeroDivisionError: no luck") as error:
            sent.result()
        assert error.value.reason is Reason.FAILED
    # They may be in somebody's hands by now, who would close them again.
    for end in received.ends:
        os.close(end.fd)
    assert descriptors() == before


def test_a_receiver_that_does_not_load_is_not_ready(pair: Pair) -> None:
    with pipes(1) as state, ThreadPoolExecutor() as pool:
        sent = pool.submit(transfer, state, pair.ours)
        with pytest.raises(Refused, match="not loaded"), receive(pair.theirs):
            pass
        with pytest.raises(Refused, match="not loaded"):
            sent.result()


def test_a_sender_that_has_waited_too_long_keeps_it(pair: Pair) -> None:
    before = descriptors()
    with pipes(2) as state, ThreadPoolExecutor() as pool:
        sent = pool.submit(transfer, state, pair.ours, timeout=0.2)
        with (
            pytest.raises(TransferFailed, match="keeps what it has sent"),
            receive(pair.theirs) as arrival,
        ):
            received = arrival.load(Pipes).get(Pipes)
            with pytest.raises(TransferFailed, match="does not answer"):
                sent.result()
        for end in received.ends:
            os.close(end.fd)
    assert descriptors() == before


def test_a_receiver_that_has_waited_too_long_owns_nothing(pair: Pair) -> None:
    with (
        pytest.raises(TransferFailed, match="does not answer"),
        receive(pair.theirs, timeout=0.05),
    ):
        pass
    # And the sender, late, learns it.
    with pipes(1) as state, pytest.raises(TransferFailed):
        transfer(state, pair.ours)


def test_the_limit_of_open_files(pair: Pair) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = descriptors()
    with pipes(40) as state:
        # In this one process the limit is the sender's too: it leaves room for a few of the 40.
        used = {int(name) for name in os.listdir("/proc/self/fd")}
        free = [number for number in range(1000) if number not in used]
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (free[12], hard))
            sent, received = both(pair, state, Pipes)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for error in (sent, received):
            assert isinstance(error, Refused)
            assert "of 40 descriptors could not be received" in error.what
            assert "ulimit -n" in (error.hint or "")
        # The sender's own limit: nothing is sent.
        ours, theirs = socket.socketpair()
        with ours, theirs:
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
                with pytest.raises(CprError, match="Too many open files"):
                    transfer(state, ours)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            with pytest.raises(TransferFailed, match="keeps"), receive(theirs) as arrival:
                raise AssertionError(arrival)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            assert both(Pair(ours, theirs), state, Pipes) == [None, None]
    assert descriptors() == before


@pytest.mark.parametrize("extra", [-1, 1])
def test_a_message_with_one_descriptor_too_few_or_too_many(pair: Pair, extra: int) -> None:
    before = descriptors()
    with pipes(3) as state:
        fd = state.save()
        ends = [end.fd for end in state.get(Pipes).ends]
        socket.send_fds(pair.ours, [b"S"], [fd])
        socket.send_fds(pair.ours, [b"D"], ends[: 3 + extra] + [fd] * (extra > 0))
        with pytest.raises(Refused) as error, receive(pair.theirs):
            pass
        os.close(fd)
    assert error.value.reason is (Reason.DESCRIPTOR if extra < 0 else Reason.LEFT_OVER)
    assert descriptors() == before


def test_garbage_in_place_of_a_state(pair: Pair) -> None:
    before = descriptors()
    pair.ours.sendall(b"GET / HTTP/1.0\r\n\r\n")
    with pytest.raises(CprError), receive(pair.theirs):
        pass
    assert descriptors() == before


@pytest.mark.parametrize("answer", [b"?", b"+?", b"-\n", b"-[]\n", b"-{}\n", b"-no", b""])
def test_garbage_in_place_of_an_answer(pair: Pair, answer: bytes) -> None:
    before = descriptors()
    pair.theirs.sendall(answer)
    pair.theirs.shutdown(socket.SHUT_WR)
    with pipes(1) as state, pytest.raises(TransferFailed):
        transfer(state, pair.ours)
    assert descriptors() == before


def test_only_unix_stream_sockets() -> None:
    with socket.socket() as tcp, pytest.raises(Misuse):
        transfer(State(), tcp)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs, pytest.raises(Misuse), receive(ours):
        pass


RECEIVER = """
import os, signal, socket, sys
sys.path.insert(0, sys.argv[2])
from test_cpr_transfer import Pipes
from segue.cpr import receive
sock = socket.socket(fileno=int(sys.argv[1]))
with receive(sock) as arrival:
    pipes = arrival.load(Pipes).get(Pipes)
    print("loaded", flush=True)
    sys.stdin.readline()
print("mine", flush=True)
for end in pipes.ends:
    print(os.read(end.fd, 10).decode(), flush=True)
"""


@contextmanager
def receiver(sock: socket.socket) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", RECEIVER, str(sock.fileno()), str(Path(__file__).parent)],
        pass_fds=[sock.fileno()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        sock.close()
        yield process


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().rstrip()


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_another_process_owns_it_and_we_may_end(pair: Pair) -> None:
    with receiver(pair.theirs) as process, ThreadPoolExecutor() as pool:
        with pipes(3) as state:
            sent = pool.submit(transfer, state, pair.ours)
            assert said(process) == "loaded"
            go_on(process)
            sent.result()
        assert [said(process) for _ in range(4)] == ["mine", "0", "1", "2"]


def test_a_receiver_that_is_killed_leaves_everything_to_the_sender(pair: Pair) -> None:
    with receiver(pair.theirs) as process, ThreadPoolExecutor() as pool, pipes(1) as state:
        sent = pool.submit(transfer, state, pair.ours)
        assert said(process) == "loaded"
        process.kill()
        with pytest.raises(TransferFailed):
            sent.result()
        assert os.read(state.get(Pipes).ends[0].fd, 10) == b"0"


def test_a_sender_that_is_killed_leaves_everything_to_a_ready_receiver(pair: Pair) -> None:
    with receiver(pair.theirs) as process:
        with pipes(1) as state:
            child = os.fork()
            if child == 0:
                transfer(state, pair.ours)
                os._exit(0)
        pair.ours.close()
        assert said(process) == "loaded"
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        go_on(process)
        assert [said(process), said(process)] == ["mine", "0"]
