"""The two engines as the benchmarks use them: what is timed, and nothing else."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from edgeroute.engine import Runtime, Settings
from edgeroute.runtime.errors import UsageError
from edgeroute.tools.bench.peer import Peer, PeerParams
from edgeroute.tools.bench.text import text_tokens

Stamps = list[tuple[float, int]]
"""Times by time.monotonic, which processes share, and how many tokens arrived then."""


class Ours:
    """A Runtime; all that a user's call passes through is timed."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self._runtime = Runtime(path, **settings)
        self._n_ctx = self._runtime.params.n_ctx

    def text(self, n_tokens: int) -> list[int]:
        """Tokens of the fixed text."""
        return text_tokens(self._runtime.encode, n_tokens)

    def decode(self, prompt: list[int], n_tokens: int) -> tuple[float, int]:
        """Decode greedily: tokens per second after the first, and how many there were."""
        stats = self._runtime.generate(prompt_ids=prompt, max_tokens=n_tokens, temperature=0.0,
                                       seed=1, prefix="off").stats  # fmt: skip
        return stats.decode_tok_s, stats.n_generated

    def prefill(self, prompt: list[int]) -> float:
        """Compute a prompt: tokens per second."""
        answer = self._runtime.generate(
            prompt_ids=prompt, max_tokens=1, temperature=0.0, prefix="off"
        )
        return answer.stats.prefill_tok_s

    def together(self, prompts: Sequence[list[int]], n_tokens: int) -> float:
        """Decode all prompts at once, one thread each: tokens per second while all decode.

        Raises:
            UsageError: the sequences never decoded at the same time.
        """

        def listen(prompt: list[int]) -> Stamps:
            seen: Stamps = []
            for chunk in self._runtime.stream(prompt_ids=prompt, max_tokens=n_tokens,
                                              temperature=0.0, seed=1, prefix="off"):  # fmt: skip
                if chunk.token_ids:
                    seen.append((time.monotonic(), len(chunk.token_ids)))
            return seen

        with ThreadPoolExecutor(len(prompts)) as pool:
            return overlap_rate(list(pool.map(listen, prompts)))

    def stream(self, prompt: list[int], seconds: float) -> Stamps:
        """Decode for a time, beginning anew where an answer ends; note when tokens arrived.

        The first and the last stamp are the ends of that time and have no tokens.
        """
        stamps: Stamps = [(time.monotonic(), 0)]
        end = stamps[0][0] + seconds
        while (left := end - time.monotonic()) > 0:
            for chunk in self._runtime.stream(
                prompt_ids=prompt, max_tokens=self._n_ctx - len(prompt), temperature=0.0,
                prefix="all", timeout_s=left,
            ):  # fmt: skip
                if chunk.token_ids:
                    stamps.append((time.monotonic(), len(chunk.token_ids)))
        stamps.append((time.monotonic(), 0))
        return stamps

    def close(self) -> None:
        """Free everything."""
        self._runtime.close()


class Theirs:
    """llama.cpp driven by llama_decode and argmax."""

    def __init__(self, path: Path, params: PeerParams) -> None:
        self._peer = Peer(path, params)

    def decode(self, prompt: list[int], n_tokens: int) -> tuple[float, int]:
        """Decode greedily exactly `n_tokens`: tokens per second after the first."""
        peer = self._peer
        peer.clear()
        token = int(np.argmax(peer.prefill(prompt)))
        began = time.perf_counter()
        for i in range(n_tokens - 1):
            token = int(np.argmax(peer.step(token, len(prompt) + i)))
        return (n_tokens - 1) / (time.perf_counter() - began), n_tokens

    def prefill(self, prompt: list[int]) -> float:
        """Compute a prompt: tokens per second."""
        self._peer.clear()
        began = time.perf_counter()
        self._peer.prefill(prompt)
        return len(prompt) / (time.perf_counter() - began)

    def together(self, prompts: Sequence[list[int]], n_tokens: int) -> float:
        """Decode one token of each sequence a batch: tokens per second in sum."""
        peer = self._peer
        peer.clear()
        rows = [peer.prefill(prompt, seq=seq) for seq, prompt in enumerate(prompts)]
        tokens = [int(np.argmax(row)) for row in rows]
        began = time.perf_counter()
        for i in range(n_tokens - 1):
            tokens = np.argmax(peer.step_all(tokens, len(prompts[0]) + i), axis=1).tolist()
        return len(prompts) * (n_tokens - 1) / (time.perf_counter() - began)

    def stream(self, prompt: list[int], seconds: float) -> Stamps:
        """Decode for a time, two tokens at least; begin anew where the context is full."""
        stamps: Stamps = [(time.monotonic(), 0)]
        n_ctx = self._peer.params.n_ctx
        pos, token = n_ctx, 0
        end = stamps[0][0] + seconds
        while len(stamps) < 3 or time.monotonic() < end:
            if pos >= n_ctx:
                self._peer.clear()
                token, pos = int(np.argmax(self._peer.prefill(prompt))), len(prompt)
            token = int(np.argmax(self._peer.step(token, pos)))
            pos += 1
            stamps.append((time.monotonic(), 1))
        return stamps

    def close(self) -> None:
        """Free everything."""
        self._peer.close()


def overlap_rate(streams: Sequence[Stamps]) -> float:
    """Tokens per second in sum while every stream is under way.

    Each stream's own rate between its own first and last stamp in that interval: tokens of one
    pass arrive one after another, and counting to one common end would lose those of the
    last pass that come after the stream which ends it, 3 of 4.

    Raises:
        UsageError: a stream has no interval between two stamps there.
    """
    if not all(streams):
        raise UsageError("a sequence produced no text; decode more tokens or use another model")
    start = max(stream[0][0] for stream in streams)
    end = min(stream[-1][0] for stream in streams)
    if end <= start:
        raise UsageError("the sequences did not overlap; decode more tokens (--tokens)")
    return sum(_own_rate([(at, n) for at, n in stream if start <= at <= end]) for stream in streams)


def _own_rate(stamps: Stamps) -> float:
    """Tokens per second after the first stamp."""
    if len(stamps) < 2 or stamps[-1][0] <= stamps[0][0]:
        raise UsageError("the sequences overlapped for too few tokens; decode more (--tokens)")
    return sum(n for _, n in stamps[1:]) / (stamps[-1][0] - stamps[0][0])


def rate_after(stamps: Stamps, lead_s: float) -> float:
    """Tokens per second from `lead_s` after the first stamp until the last.

    Where none arrived in that time, what one would have made: the rate was below that.
    """
    start, end = stamps[0][0] + lead_s, stamps[-1][0]
    if end <= start:  # one token took longer than the lead and the window
        start = stamps[0][0]
    return max(1, sum(n for at, n in stamps if at > start)) / (end - start)
