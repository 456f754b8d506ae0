"""What an engine says to event loops: gathered by its thread, in order, with one wake for all."""

import asyncio
import threading
from typing import Any

import pytest

from edgeroute.mailbag import Inbox, Mailbag
from edgeroute.request import Outcome
from edgeroute.stats import Chunk


def chunks(n: int) -> list[Outcome]:
    return [Chunk(text=str(i)) for i in range(n)]


class Loop:
    """Counts how often it is woken; closed, it refuses as asyncio's does."""

    def __init__(self, *, closed: bool = False) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._closed = closed

    def call_soon_threadsafe(self, *call: Any) -> None:
        if self._closed:
            raise RuntimeError("Event loop is closed")
        self.calls.append(call)

    def run(self) -> None:
        for do, *args in self.calls:
            do(*args)


def test_its_owner_gathers_for_several_listeners_and_wakes_a_loop_once() -> None:
    bag, loop, heard = Mailbag(), Loop(), dict[str, list[Outcome]](a=[], b=[])
    bag.own()
    said = chunks(3)
    for each in said:
        for name in heard:
            bag.send(loop, heard[name].append, each)  # type: ignore[arg-type]
    assert not loop.calls
    bag.empty()
    assert len(loop.calls) == 1
    loop.run()
    assert heard == {"a": said, "b": said}
    bag.empty()
    assert len(loop.calls) == 1  # nothing is told twice


def test_each_loop_hears_what_is_its_own() -> None:
    bag, loops, heard = Mailbag(), (Loop(), Loop()), (list[Outcome](), list[Outcome]())
    bag.own()
    said = chunks(2)
    for loop, ears, each in zip(loops, heard, said, strict=True):
        bag.send(loop, ears.append, each)  # type: ignore[arg-type]
    bag.empty()
    for loop in loops:
        loop.run()
    assert heard == ([said[0]], [said[1]])


def test_what_another_thread_says_leaves_at_once() -> None:
    bag, loop, heard = Mailbag(), Loop(), list[Outcome]()
    bag.own()
    (said,) = chunks(1)
    other = threading.Thread(target=bag.send, args=(loop, heard.append, said))
    other.start()
    other.join()
    assert len(loop.calls) == 1
    loop.run()
    assert heard == [said]


def test_a_loop_that_closed_meanwhile_keeps_nothing_from_the_others() -> None:
    bag, gone, loop, heard = Mailbag(), Loop(closed=True), Loop(), list[Outcome]()
    bag.own()
    said = chunks(2)
    bag.send(gone, heard.append, said[0])  # type: ignore[arg-type]
    bag.send(loop, heard.append, said[1])  # type: ignore[arg-type]
    bag.empty()
    loop.run()
    assert heard == [said[1]]


def test_an_inbox_gives_what_came_before_and_while_somebody_waits() -> None:
    async def main() -> list[Outcome]:
        inbox = Inbox(asyncio.get_running_loop())
        said = chunks(3)
        inbox.put(said[0])
        inbox.put(said[1])
        first = [await inbox.get(), await inbox.get()]
        waiting = asyncio.create_task(inbox.get())
        await asyncio.sleep(0)
        assert not waiting.done()
        inbox.put(said[2])
        assert [*first, await waiting] == said
        return said

    assert len(asyncio.run(main())) == 3


def test_who_stops_waiting_loses_nothing() -> None:
    async def main() -> None:
        inbox = Inbox(asyncio.get_running_loop())
        waiting = asyncio.create_task(inbox.get())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        (said,) = chunks(1)
        inbox.put(said)
        assert await inbox.get() is said

    asyncio.run(main())
