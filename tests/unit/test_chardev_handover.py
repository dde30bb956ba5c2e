"""No byte lost or doubled, in either direction, through handovers and their undoing."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from segue.kept import broker as broker_module
from segue.kept.broker import TO_CLIENT, TO_GUEST
from tests.unit.chardevs import Instance, Numbered, bed, run, turns, until

ENDS = ("commit", "undo after prepare", "undo after hold", "undo after take", "undo after switch")


@pytest.mark.parametrize("seed", range(6))
def test_numbered_streams_survive_handovers_and_undos(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)

    async def main() -> None:
        async with bed(tmp_path) as at:
            broker = at.broker
            client = await at.client()
            incumbent, number = at.instance(1), 1
            inward, outward = Numbered(chance, 400_000), Numbered(chance, 400_000)
            guest_got = bytearray()

            async def traffic(steps: int) -> None:
                for _ in range(steps):
                    match chance.randrange(5):
                        case 0:
                            inward.push(client.write)
                        case 1:
                            outward.push(incumbent.write)
                        case 2:
                            guest_got.extend(incumbent.read(chance.randrange(1, 5000)))
                        case 3:
                            client.read(chance.randrange(1, 5000))
                        case 4:
                            await turns(1)

            for end in ENDS * 4:
                await traffic(chance.randrange(50))
                number += 1
                successor = at.instance(number)
                await traffic(chance.randrange(20))
                assert successor.read() == b""
                if end != "undo after prepare":
                    outward.push(incumbent.write)  # the last words before STOP
                    broker.hold()
                    inward.push(client.write)
                    guest_got += incumbent.read(chance.randrange(1, 400))
                if end not in ("undo after prepare", "undo after hold"):
                    broker.take_back()
                    assert incumbent.read() == b""
                    assert successor.read() == b""
                if end in ("commit", "undo after switch"):
                    broker.switch(number)
                if end == "undo after switch":
                    inward.push(client.write)
                    await turns()
                    successor.read(chance.randrange(1, 2000))
                if end == "commit":
                    await turns()
                    incumbent.die()
                    incumbent = successor
                else:
                    successor.die()
                    broker.give_back()

            def flow() -> bool:
                inward.push(client.write)
                outward.push(incumbent.write)
                guest_got.extend(incumbent.read())
                client.read()
                return (
                    inward.done
                    and outward.done
                    and len(guest_got) >= len(inward.data)
                    and len(client.received) >= len(outward.data)
                )

            await until(flow)
            assert bytes(guest_got) == inward.data
            assert bytes(client.received) == outward.data

    run(main)


def test_what_the_incumbent_wrote_comes_before_the_successor(tmp_path: Path) -> None:
    async def main() -> None:
        async with bed(tmp_path) as at:
            broker = at.broker
            client = await at.client()
            first = at.instance(1)
            second = at.instance(2)
            first.write(b"one ")
            second.write(b"two ")
            broker.hold()
            first.write(b"more ")
            broker.take_back()
            first.write(b"last ")
            broker.switch(2)
            first.write(b"ghost")
            await client.expect(b"one more last two ")
            first.die()
            second.write(b"three")
            await client.expect(b"three")

    run(main)


def test_taken_back_bytes_come_before_newer_ones(tmp_path: Path) -> None:
    async def main() -> None:
        async with bed(tmp_path) as at:
            broker = at.broker
            client = await at.client()
            first = at.instance(1)
            client.write(b"abcdef")
            await first.expect(b"ab")
            second = at.instance(2)
            broker.hold()
            client.write(b"ghi")
            await until(lambda: broker.to_guest == b"ghi")
            broker.take_back()
            assert broker.to_guest == b"cdefghi"
            assert (first.read(), second.read()) == (b"", b"")
            broker.switch(2)
            assert (first.read(), second.read()) == (b"", b"cdefghi")
            client.write(b"jkl")
            await second.expect(b"jkl")
            # Its `cont` failed after all: it never ran, so all that it was sent goes back.
            second.die()
            broker.give_back()
            assert first.read() == b"cdefghijkl"

    run(main)


def test_nothing_reaches_a_successor_before_the_switch(tmp_path: Path) -> None:
    async def main() -> None:
        async with bed(tmp_path) as at:
            client = await at.client()
            first, second = at.instance(1), at.instance(2)
            client.write(b"x" * 100)
            await until(lambda: first.read())
            assert second.read() == b""

    run(main)


def test_a_slow_client_holds_up_the_guest_but_no_handover(tmp_path: Path) -> None:
    async def main() -> None:
        async with bed(tmp_path) as at:
            broker = at.broker
            client = await at.client()
            first = at.instance(1)
            output = Numbered(random.Random(1), 4 * TO_CLIENT)

            async def fill(instance: Instance) -> None:
                """Write until nothing is taken any more."""
                stalled = 0
                while stalled < 20:
                    before = output.at
                    output.push(instance.write, 50_000)
                    stalled = stalled + 1 if output.at == before else 0
                    await turns()

            await fill(first)
            assert TO_CLIENT <= len(broker.to_client) <= TO_CLIENT + (1 << 16)
            written = output.at
            assert written < len(output.data)
            second = at.instance(2)
            broker.hold()
            assert output.at == written
            assert len(broker.to_client) < TO_CLIENT + (1 << 20)
            broker.take_back()
            broker.switch(2)
            first.die()

            def flow() -> bool:
                output.push(second.write)
                client.read()
                return len(client.received) >= len(output.data)

            await until(flow)
            assert bytes(client.received) == output.data

    run(main)


def test_without_a_client_output_is_dropped_and_never_kept(tmp_path: Path) -> None:
    async def main() -> None:
        async with bed(tmp_path) as at:
            broker = at.broker
            instance = at.instance(1)
            written = 0
            while written < 3 * TO_CLIENT:
                written += instance.write(b"x" * 50_000)
                await turns()
            assert broker.to_client == b""
            await turns(10)
            client = await at.client()
            await until(lambda: broker.connected)
            instance.write(b"fresh")
            await client.expect(b"fresh")

    run(main)


def test_a_guest_that_does_not_read_stops_the_client_alone(tmp_path: Path) -> None:
    async def main() -> None:
        async with bed(tmp_path) as at:
            broker = at.broker
            client = await at.client()
            instance = at.instance(1)
            input_ = Numbered(random.Random(2), 2_000_000)
            stalled = 0
            while stalled < 20:
                before = input_.at
                input_.push(client.write, 50_000)
                stalled = stalled + 1 if input_.at == before else 0
                await turns()
            assert len(broker.to_guest) < 2 * TO_GUEST
            instance.write(b"still talking")
            await client.expect(b"still talking")
            # It vanishes; the next one is served although the first one's bytes still wait.
            client.close()
            await until(lambda: not broker.connected)
            client = await at.client()
            await until(lambda: broker.connected)
            instance.write(b"hello")
            await client.expect(b"hello")
            client.write(b"END")
            got = await instance.read_until(b"END")
            assert input_.data.startswith(got[:-3])

    run(main)


def test_a_client_that_vanishes_in_the_blackout_is_followed_by_another(tmp_path: Path) -> None:
    async def main() -> None:
        async with bed(tmp_path) as at:
            broker = at.broker
            client = await at.client()
            first, second = at.instance(1), at.instance(2)
            await until(lambda: broker.connected)
            broker.hold()
            client.write(b"from the first")
            client.close()
            await until(lambda: not broker.connected)
            broker.take_back()
            broker.switch(2)
            first.die()
            client = await at.client()
            client.write(b", from the next")
            await second.expect(b"from the first, from the next")
            second.write(b"welcome")
            await client.expect(b"welcome")

    run(main)


def test_last_words_of_an_instance_reach_the_client(tmp_path: Path) -> None:
    async def main() -> None:
        async with bed(tmp_path) as at:
            broker = at.broker
            client = await at.client()
            instance = at.instance(1)
            await until(lambda: broker.connected)
            words = b"Power down\r\n" * 30_000
            written = instance.write(words)
            while written < len(words):
                written += instance.write(words[written:])
                client.read(1)
                await turns()
            instance.die()

            async def read_all() -> None:
                await until(lambda: (client.read(), len(client.received) >= len(words))[1])

            await read_all()
            await broker.flush()
            assert bytes(client.received) == words

    run(main)


def test_undo_is_forgotten_when_the_successor_has_read_too_much(tmp_path: Path) -> None:
    async def main() -> None:
        async with bed(tmp_path) as at:
            broker = at.broker
            client = await at.client()
            at.instance(1)
            second = at.instance(2)
            broker.hold()
            broker.take_back()
            broker.switch(2)
            read = 0
            while read <= broker_module._UNDO + TO_GUEST:
                client.write(b"x" * 50_000)
                read += len(second.read())
                await turns()
            assert broker._since_switch == b""

    run(main)
