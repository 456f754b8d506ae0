"""A model that writes, looks and reads for many answers at once, the steps of each by itself.

Answers share passes, each with cells of its own. What one asks next begins with what it asked
before, so that most of it is in its cells already; beginnings of prompts are copied. Many
answers in one pass make the last bits of logits depend on who shares it (see
RunParams.max_batch): good enough for an experiment, whose journal keeps what came out.
"""

import contextlib
import functools
import hashlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from edgeroute.config import RunParams
from edgeroute.loaded import LoadedModel
from edgeroute.models.forward import Forward, Piece
from edgeroute.runtime.cells import Region
from edgeroute.runtime.errors import CapacityError, ComputeError, UsageError
from edgeroute.runtime.kv_cache import KvCache
from edgeroute.runtime.template import encode_chat
from edgeroute.skippers.step_bounds import StepBounds
from edgeroute.skippers.step_signals import top_entropy
from edgeroute.step_check import JUDGE_PROMPT
from edgeroute.tools.questions import Question
from edgeroute.tools.step_play import MAX_TOKENS
from edgeroute.tools.step_tree import Ask, Node

N_CELLS: Final = 1024
PASS_TOKENS: Final = 256
"""Tokens of a pass, at most, where several answers have many to read."""
COPY_TOKENS: Final = 32
"""Tokens from which on it pays to copy cells of another answer."""
TEMPERATURE, TOP_P = 0.6, 0.95
"""Of random answers. Source: algorithms 4, the setting of both publications."""
_Needs = tuple[list[int], int]
"""Tokens to have in the cells, and of how many of the last the logits are wanted."""
_Work = Generator[_Needs, npt.NDArray[np.float32], Node]


@dataclass(slots=True)
class _Slot:
    """Cells of one answer, and the tokens that are in them."""

    region: Region
    tokens: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Job:
    """One ask on its way: what it needs next, and what it does with it."""

    slot: _Slot
    work: _Work
    tokens: list[int]
    n_out: int


class StepWriter:
    """One model of the pair, for answers in `n_slots` slots.

    Lifetime: `close` it before the model.

    Raises:
        CapacityError: the model is not in memory as a whole.
    """

    def __init__(self, loaded: LoadedModel, n_slots: int) -> None:
        if loaded.layers is not None or loaded.experts is not None:
            raise CapacityError(
                f"{loaded.file.path.name} does not fit the memory budget; steps are studied with "
                "models in memory only: raise --memory"
            )
        self.tokenizer = loaded.tokenizer
        self._kv = KvCache(loaded.device, loaded.kv.shape, n_slots * N_CELLS)
        self._forward = Forward(loaded.model, loaded.device, loaded.forward.weights, self._kv)
        self._kv.take_all()
        self._slots = [_Slot(Region(i * N_CELLS, N_CELLS)) for i in range(n_slots)]
        self._jobs: dict[int, _Job] = {}
        self.n_passes = 0
        self.n_tokens = 0

    @property
    def busy(self) -> bool:
        """Whether anything was asked and not answered."""
        return bool(self._jobs)

    @property
    def n_waiting(self) -> int:
        """Asks that are not answered yet."""
        return len(self._jobs)

    def encode(self, question: Question) -> list[int]:
        """Encode a question as a chat whose answer begins."""
        return encode_chat(self.tokenizer, question.messages)

    @functools.cached_property
    def judge_tail(self) -> list[int]:
        """The engine's question for a mark, as it follows a draft."""
        return self.tokenizer.encode(JUDGE_PROMPT, add_special=False, parse_special=False)

    def submit(self, slot: int, question: Question, prompt: list[int], ask: Ask) -> None:
        """Begin what is asked, in a slot that has nothing else to do."""
        assert slot not in self._jobs
        work = self._work(question, prompt, ask)
        tokens, n_out = next(work)
        if len(prompt) + MAX_TOKENS > N_CELLS - len(self.judge_tail):
            raise UsageError(f"a prompt of {len(prompt)} tokens leaves too few of {N_CELLS} cells")
        self._jobs[slot] = _Job(self._slots[slot], work, tokens, n_out)

    def advance(self) -> list[tuple[int, Node]]:
        """Compute one pass; return slots whose asks are answered by it."""
        pieces: list[Piece] = []
        chosen: list[int] = []
        for i in sorted(self._jobs, key=lambda i: self._slots[i].region.start):
            piece = self._missing(self._jobs[i])
            if pieces and len(piece.tokens) + sum(len(p.tokens) for p in pieces) > PASS_TOKENS:
                continue
            pieces.append(piece)
            chosen.append(i)
        logits = self._forward.run(pieces, borrow=True)
        if logits is None:
            raise ComputeError("the computation was stopped")
        self.n_passes += 1
        self.n_tokens += sum(len(piece.tokens) for piece in pieces)
        done, first = [], 0
        for i, piece in zip(chosen, pieces, strict=True):
            node = self._take(i, logits[first : first + piece.n_out])
            first += piece.n_out
            if node is not None:
                done.append((i, node))
        return done

    def _missing(self, job: _Job) -> Piece:
        """Return what a job's cells lack, the tokens whose logits are wanted included."""
        most = len(job.tokens) - job.n_out
        n = _n_common(job.slot.tokens, job.tokens, most)
        if most - n >= COPY_TOKENS:
            other = max(self._slots, key=lambda slot: _n_common(slot.tokens, job.tokens, most))
            n_there = _n_common(other.tokens, job.tokens, most)
            if n_there - n >= COPY_TOKENS:
                self._kv.copy(other.region, job.slot.region, n_there)
                n = n_there
        job.slot.tokens = job.tokens[:n]
        return Piece(tokens=job.tokens[n:], pos=n, region=job.slot.region, n_out=job.n_out)

    def _take(self, i: int, logits: npt.NDArray[np.float32]) -> Node | None:
        job = self._jobs[i]
        job.slot.tokens = list(job.tokens)
        try:
            job.tokens, job.n_out = job.work.send(logits)
        except StopIteration as finished:
            del self._jobs[i]
            node: Node = finished.value
            return node
        return None

    def _work(self, question: Question, prompt: list[int], ask: Ask) -> _Work:
        before = [*prompt, *ask.tokens]
        if ask.want == "write":
            return self._write(question, before, ask)
        if ask.want == "score":
            return self._score(before, ask.draft)
        if ask.want == "judge":
            digits = [self.tokenizer.encode(str(d), add_special=False, parse_special=False)[-1]
                      for d in range(10)]  # fmt: skip
            return _judge([*before, *ask.draft], self.judge_tail, digits)
        return _glance(before)

    def _write(self, question: Question, before: list[int], ask: Ask) -> _Work:
        """Write on to the step's end."""
        tokenizer, bounds = self.tokenizer, StepBounds()
        text = bytearray()
        for token in ask.tokens:
            text += tokenizer.piece(token)
            bounds.push(tokenizer.piece(token))
        written: list[int] = []
        pieces: list[str] = []
        seen: list[tuple[float, float, float]] = []
        top = 0.0
        ended = False
        while True:
            logits = (yield [*before, *written], 1)[0]
            n_before = len(ask.tokens) + len(written)
            token = int(logits.argmax()) if ask.sample is None else _drawn(
                logits, f"{ask.sample} {n_before} {question.text}")  # fmt: skip
            seen.append(signals(logits, token))
            top = top if written else top_entropy(logits)
            written.append(token)
            pieces.append(self._piece(token))
            text += pieces[-1].encode("latin-1")
            ended = not pieces[-1] or n_before + 1 >= MAX_TOKENS or question.stop.encode() in text
            if ended or bounds.push(pieces[-1].encode("latin-1")):
                break
        columns = [rounded(column) for column in zip(*seen, strict=True)]
        return Node(
            tokens=tuple(written), pieces=tuple(pieces),
            ended=ended, entropy=columns[0], top_entropy=(round(top, 4),), margin=columns[1],
            logprob=columns[2],
        )  # fmt: skip

    def _score(self, before: list[int], draft: Sequence[int]) -> _Work:
        """Tell how likely each token of a draft is, and what would have come in its place."""
        logits = yield [*before, *draft], len(draft) + 1
        own = [int(row.argmax()) for row in logits]
        seen = [signals(row, token) for row, token in zip(logits, [*draft, own[-1]], strict=True)]
        best = [logprob + float(row[top] - row[token]) for row, top, token, (_, _, logprob)
                in zip(logits, own, draft, seen, strict=False)]  # fmt: skip
        entropies, margins, logprobs = zip(*seen, strict=True)
        return Node(
            tokens=tuple(own), pieces=tuple(self._piece(token) for token in own),
            logprob=rounded(logprobs[:-1]), best=rounded(best), entropy=rounded(entropies),
            margin=rounded(margins),
        )  # fmt: skip

    def _piece(self, token: int) -> str:
        """Return a token's text, a character per byte; none of one that ends answers."""
        return "" if self.tokenizer.is_eog(token) else self.tokenizer.piece(token).decode("latin-1")

    def close(self) -> None:
        """Free graphs and cells; safe to call twice."""
        self._forward.close()
        self._kv.close()


def _n_common(have: Sequence[int], tokens: Sequence[int], most: int) -> int:
    """Return how many tokens both begin with, up to `most`."""
    pairs = zip(have[:most], tokens[:most], strict=False)
    n = min(most, len(have))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), n)


def _glance(before: list[int]) -> _Work:
    logits = (yield before, 1)[0]
    entropy, margin, logprob = (round(value, 4) for value in signals(logits, int(logits.argmax())))
    return Node(entropy=(entropy,), top_entropy=(round(top_entropy(logits), 4),),
                margin=(margin,), logprob=(logprob,))  # fmt: skip


def _judge(before: list[int], tail: list[int], digits: list[int]) -> _Work:
    logits = (yield [*before, *tail], 1)[0]
    marks = logits[digits].astype(np.float64)
    weights = np.exp(marks - marks.max())
    mark = float(weights @ np.arange(10) / weights.sum())
    return Node(mark=round(mark, 4), n_read=len(tail))


def rounded(values: Sequence[float]) -> tuple[float, ...]:
    """Return values as a journal keeps them."""
    return tuple(round(value, 4) for value in values)


def signals(logits: npt.NDArray[np.float32], token: int) -> tuple[float, float, float]:
    """Return entropy, margin of the likeliest token, and a token's log-probability, in nats.

    All at once, since they take as long as a tenth of a pass of the small model each.
    """
    top = int(logits.argmax())
    shifted = logits - logits[top]
    weights = np.exp(shifted)
    total = float(weights.sum(dtype=np.float64))
    entropy = np.log(total) - float(weights @ shifted) / total
    logprob = float(shifted[token]) - np.log(total)
    shifted[top] = -np.inf
    return max(0.0, float(entropy)), -float(shifted.max()), float(logprob)


def _drawn(logits: npt.NDArray[np.float32], seed: str) -> int:
    """Draw a token; equal logits and seeds give equal ones."""
    digest = hashlib.sha256(seed.encode()).digest()
    at = int.from_bytes(digest[:8], "little") / 2**64
    weights = np.exp((logits - logits.max()).astype(np.float64) / TEMPERATURE)
    order = np.argsort(-weights, kind="stable")
    share = np.cumsum(weights[order])
    n = int(np.searchsorted(share, TOP_P * share[-1])) + 1
    return int(order[np.searchsorted(share[:n], at * share[n - 1], side="right")])


@contextlib.contextmanager
def open_writer(path: Path, n_slots: int, threads: int = 1) -> Iterator[StepWriter]:
    """Load a model to write steps with."""
    params = RunParams(n_ctx=256, n_ubatch=256, threads=threads)
    with contextlib.closing(LoadedModel(path, params)) as loaded:
        loaded.device.set_threads(threads)
        with contextlib.closing(StepWriter(loaded, n_slots)) as writer:
            yield writer
