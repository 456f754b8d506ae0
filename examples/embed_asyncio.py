"""edgeroute on an event loop: several answers at once, one of them cancelled.

python examples/embed_asyncio.py [MODEL]
"""

import asyncio
import contextlib
import sys

import edgeroute


async def ask(runtime: edgeroute.Runtime, question: str) -> str:
    """Return a whole answer without blocking the loop."""
    messages = [{"role": "user", "content": question}]
    answer = await runtime.agenerate(messages=messages, max_tokens=24)
    return f"{question} -> {answer.text.strip()}"


async def give_up(runtime: edgeroute.Runtime, after: int) -> str:
    """Read some pieces of a long answer, then close it: what is left is not computed."""
    text = ""
    answer = runtime.astream("Once upon a time", max_tokens=500)
    async with contextlib.aclosing(answer) as pieces:
        async for chunk in pieces:
            text += chunk.text
            after -= 1
            if after == 0:
                break
    return f"gave up after: {text!r}"


async def main() -> None:
    """Run three at once; they decode together."""
    model = sys.argv[1] if len(sys.argv) > 1 else None
    runtime = await asyncio.to_thread(edgeroute.Runtime, model, n_ctx=1024, n_kv=4096)
    try:
        jobs = (ask(runtime, "Name one colour."), ask(runtime, "What is two plus two?"),
                give_up(runtime, 5))  # fmt: skip
        for line in await asyncio.gather(*jobs):
            print(line)
    finally:
        await asyncio.to_thread(runtime.close)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except edgeroute.EdgerouteError as error:
        sys.exit(f"edgeroute: {error}")
