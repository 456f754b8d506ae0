"""Work for a client who may leave: it ends when he does."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.types import Receive

from edgeroute.server.errors import ApiError

T = TypeVar("T")


async def unless_left(
    receive: Receive, work: Coroutine[Any, Any, T], *minders: Coroutine[Any, Any, None]
) -> T:
    """Do some work, but drop it at once when the client leaves.

    Args:
        receive: of the request, whose body was read.
        work: is cancelled when the client leaves.
        minders: run beside it; it is cancelled when one of them raises.

    Raises:
        ApiError: 499, he left; otherwise what the work or a minder raises.
    """
    doing = asyncio.create_task(work)
    others = [asyncio.create_task(each) for each in (_until_left(receive), *minders)]
    try:
        await asyncio.wait((doing, *others), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            for other in others:
                if other.done():
                    other.result()
        return await doing
    finally:
        await _end((doing, *others))


async def merged(
    streams: Sequence[AsyncGenerator[T, None]],
) -> AsyncGenerator[tuple[int, T], None]:
    """Give what several streams bring, as it comes, each with its stream's number.

    The first error ends all.
    """
    if len(streams) == 1:  # the common case needs no queue
        async with aclosing(streams[0]) as only:
            async for each in only:
                yield 0, each
        return
    inbox: asyncio.Queue[tuple[int, T | Exception | None]] = asyncio.Queue()

    async def listen(i: int, stream: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    inbox.put_nowait((i, item))
        except Exception as error:  # the reader's, who is told below
            inbox.put_nowait((i, error))
        else:
            inbox.put_nowait((i, None))

    tasks = [asyncio.create_task(listen(i, each)) for i, each in enumerate(streams)]
    n_left = len(tasks)
    try:
        while n_left:
            i, item = await inbox.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                n_left -= 1
            else:
                yield i, item
    finally:
        await _end(tasks)


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ApiError(499, "the client left")


async def _end(tasks: Sequence["asyncio.Task[Any]"]) -> None:
    """Cancel tasks and wait for their end; what they raise then was told before, or is moot."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
