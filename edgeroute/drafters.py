"""Who guesses what comes next: the text itself, a part of the model, or a smaller model.

Guesses are greedy and may be wrong: `edgeroute.speculation` has the model verify them. All of it
runs on the engine thread.
"""

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from edgeroute.models.forward import Branch, Forward, Piece
from edgeroute.models.layered import LayeredForward
from edgeroute.request import Request, stoppable
from edgeroute.runtime.batch_shape import Span, change_places
from edgeroute.runtime.cells import Region
from edgeroute.runtime.prefix import PrefixCache
from edgeroute.runtime.sequence import Sequence, next_chunk_end
from edgeroute.skippers.guesses import ROOT, Growth, Guess, above, chain
from edgeroute.skippers.lookup import Lookup
from edgeroute.small import N_UBATCH

if TYPE_CHECKING:
    from edgeroute.loaded import LoadedModel

CATCH_UP: Final = 32
"""Tokens that a small model may be behind and still draft at once."""

WIDTH: Final = 4
"""Guesses for one place at most, where several can be verified."""

Spans = tuple[Span, ...]
Ends = Callable[[int], bool]
"""Whether a token ends an answer, so that nothing needs to be guessed behind it."""


class Drafter(Protocol):
    """One way to guess the tokens that follow a request's own."""

    def offers(self, request: Request, most: int) -> Mapping[str, int]:
        """Return the sources that can draft now, at most `most` tokens, with how many each."""

    def draft(self, request: Request, n_tokens: int) -> list[Guess]:
        """Guess up to `n_tokens`; fewer where an end is guessed or the request was cancelled."""

    def end(self, request: Request) -> None:
        """Forget a request; safe to call for one that is unknown."""


class LookupDrafter:
    """What followed in prompt and answer when they last ended as they end now.

    Matches of different lengths are sources of their own, `lookup.N`: long ones deserve more.
    """

    def __init__(self) -> None:
        self._texts: dict[str, Lookup] = {}

    def offers(self, request: Request, most: int) -> Mapping[str, int]:
        """Return the source for the longest match; none without a match."""
        text = self._texts.setdefault(request.id, Lookup())
        text.extend(tokens_of(request)[len(text) :])
        length = text.match()
        return {f"lookup.{length}": most} if length else {}

    def draft(self, request: Request, n_tokens: int) -> list[Guess]:
        """Return what followed the match."""
        return chain(self._texts[request.id].propose(n_tokens))

    def end(self, request: Request) -> None:
        """Forget a request's text."""
        self._texts.pop(request.id, None)


class Part(NamedTuple):
    """What a request's own drafts compute.

    Where they cross a block by a bridge, that must know the stream before layer `entered` as the
    token before left it.
    """

    spans: Spans
    entered: int | None = None


class SelfDrafter:
    """The model itself with some of its steps left out, on the sequence's own keys and values.

    A draft's passes write keys and values at positions that are not the sequence's yet; the
    pass that verifies it writes those of all layers at each of them, before any is read again.

    Args:
        forward: the model.
        part: gives what a request's drafts compute now; None where nothing can be left out.
        ends: see `Ends`.
    """

    def __init__(
        self, forward: Forward, part: Callable[[Request], Part | None], ends: Ends
    ) -> None:
        self._forward = forward
        self._part = part
        self._ends = ends

    def offers(self, request: Request, most: int) -> Mapping[str, int]:
        """Offer always, unless nothing can be left out, or a bridge has no token before."""
        part, sequence = self._part(request), _sequence(request)
        ready = part is not None and self._goes_on(part, sequence.region, sequence.n_past)
        return {"self": most} if ready else {}

    def draft(self, request: Request, n_tokens: int) -> list[Guess]:
        """Decode with the steps that are left, and guess what is likeliest to be got to."""
        part, sequence = self._part(request), _sequence(request)
        if part is None:
            return []
        states = {ROOT: self._state(part, sequence.region, sequence.n_past - 1)}
        width = WIDTH if may_branch(self._forward, sequence, n_tokens) else 1
        growth = Growth(n_tokens, width)
        at: int | None = ROOT
        while at is not None and not request.interrupted():
            if at == ROOT or growth.bears(at):
                piece = piece_of(request, growth.guesses, at)
                before = ROOT if at == ROOT else growth.guesses[at].after
                logits = self._run(part, piece, states[before])
                if logits is None:
                    break
                growth.offer(at, self._likely(logits[0], width))
                states[at] = self._state(part, sequence.region, piece.cell)
            at = growth.grow()
        return growth.guesses

    def _run(
        self, part: Part, piece: Piece, before: npt.NDArray[np.float32] | None
    ) -> npt.NDArray[np.float32] | None:
        """Compute a token's draft; None where a stop was asked for, or nobody knows `before`."""
        forward = self._forward
        if part.entered is not None and isinstance(forward, LayeredForward):
            if before is None:
                return None
            forward.go_on_from(before)
        return forward.run([piece], part.spans, borrow=True)

    def _likely(self, logits: npt.NDArray[np.float32], width: int) -> list[tuple[int, float]]:
        """Return the likeliest tokens that end nothing, with their probabilities, best first."""
        best = np.argpartition(logits, -width)[-width:]
        best = best[np.argsort(-logits[best], kind="stable")]
        total = float(np.exp(logits - logits[best[0]]).sum())
        shares = np.exp(logits[best] - logits[best[0]]) / total
        found = zip(best.tolist(), shares.tolist(), strict=True)
        return [(token, share) for token, share in found if not self._ends(token)]

    def _goes_on(self, part: Part, region: Region, pos: int) -> bool:
        """Whether a bridge, if there is one, knows what came before `pos`."""
        return part.entered is None or self._state(part, region, pos - 1) is not None

    def _state(self, part: Part, region: Region, cell: int) -> npt.NDArray[np.float32] | None:
        """Return what was behind the block at a token of the last pass, for a bridge over it."""
        forward = self._forward
        if part.entered is None or not isinstance(forward, LayeredForward):
            return None
        return forward.state_before(part.entered, region, cell)

    def end(self, request: Request) -> None:
        """Nothing is kept."""


class SmallDrafter:
    """A smaller model of the same vocabulary, with keys and values of its own.

    It reads the prompt in batches, one per round, and after each verification what it missed.

    Args:
        small: the model; whoever opened it closes it, after this.
        n_vocab: tokens of the large model's vocabulary.
        ends: see `Ends`.
    """

    def __init__(self, small: "LoadedModel", n_vocab: int, ends: Ends) -> None:
        self._forward = small.forward
        self._n_vocab = min(n_vocab, small.model.hparams.n_vocab)
        self._prefix = PrefixCache(small.kv, N_UBATCH)
        self._sequences: dict[str, Sequence] = {}
        self._verified: dict[str, int] = {}
        """Leading cells that are known to hold the request's own tokens."""
        self._ends = ends
        self.token_s = 0.0
        """Seconds that reading a token of a prompt took, lately."""

    def missing(self, request: Request) -> int:
        """Return how many tokens of the request it has not read."""
        sequence = self._sequences.get(request.id)
        return len(tokens_of(request)) - (0 if sequence is None else self._agree(request, sequence))

    def prepare(self, request: Request) -> None:
        """Read one batch of what it is behind, unless it can catch up while it drafts."""
        sequence = self._open(request)
        if sequence is None or self.missing(request) <= CATCH_UP:
            return
        tokens = tokens_of(request)
        start = sequence.n_past
        end = next_chunk_end(start, len(tokens) - 1, N_UBATCH)
        began = time.perf_counter()
        with stoppable([request], self._forward.device):
            read = self._feed(sequence, tokens[start:end], n_out=0)
        if read is None:
            return
        self._verified[request.id] = end
        each_s = (time.perf_counter() - began) / (end - start)
        self.token_s += (each_s - self.token_s) / (2 if self.token_s else 1)

    def offers(self, request: Request, most: int) -> Mapping[str, int]:
        """Offer once the prompt is read."""
        known = request.id in self._sequences
        ready = known and self.missing(request) <= CATCH_UP
        return {"small": most} if ready else {}

    def draft(self, request: Request, n_tokens: int) -> list[Guess]:
        """Read what was missed, then decode greedily."""
        sequence = self._sequences[request.id]
        tokens = tokens_of(request)
        self._agree(request, sequence)
        self._verified[request.id] = len(tokens)
        feed: list[int] = tokens[sequence.n_past :]
        draft: list[int] = []
        while len(draft) < n_tokens and not request.interrupted():
            logits = self._feed(sequence, feed, n_out=1)
            if logits is None:
                break
            token = int(logits[0].argmax())
            if token >= self._n_vocab or self._ends(token):
                break
            draft.append(token)
            feed = [token]
        return chain(draft)

    def end(self, request: Request) -> None:
        """Keep a request's cells for a prompt that begins alike."""
        sequence = self._sequences.pop(request.id, None)
        self._verified.pop(request.id, None)
        if sequence is not None:
            sequence.classes = bytearray(sequence.n_past)
            self._prefix.keep(sequence)

    def _open(self, request: Request) -> Sequence | None:
        """Find a request's cells, or give it some; None while others hold them."""
        sequence = self._sequences.get(request.id)
        if sequence is None:
            sequence = self._prefix.open(list(tokens_of(request)), request.n_cells, "all")
            if sequence is not None:
                del sequence.tokens[sequence.n_past :]
                self._sequences[request.id] = sequence
                self._verified[request.id] = sequence.n_past
        return sequence

    def _agree(self, request: Request, sequence: Sequence) -> int:
        """Let go of cells that hold guesses which were refused; return how many are left.

        At least one of the request's tokens stays to be read.
        """
        tokens, fed = tokens_of(request), sequence.tokens
        n = self._verified[request.id]
        most = min(len(fed), len(tokens) - 1)
        while n < most and fed[n] == tokens[n]:
            n += 1
        n = min(n, most)
        del fed[n:]
        sequence.n_past = n
        return n

    def _feed(
        self, sequence: Sequence, tokens: list[int], *, n_out: int
    ) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]] | None":
        """Compute tokens behind those that a sequence has.

        None where a stop was asked for, or where this model does not know one of them.
        """
        if max(tokens) >= self._n_vocab:
            return None
        piece = Piece(tokens=tokens, pos=sequence.n_past, region=sequence.region, n_out=n_out)
        logits = self._forward.run([piece], borrow=True)
        if logits is not None:
            sequence.tokens += tokens
            sequence.n_past += len(tokens)
        return logits


def tokens_of(request: Request) -> list[int]:
    """Return prompt and answer so far."""
    return _sequence(request).tokens


def may_branch(forward: Forward, sequence: Sequence, n_tokens: int) -> bool:
    """Whether guesses behind a sequence may be a tree: each keeps the bits of the answer's own.

    Cells of the branch that comes true move to where a chain would have had them.
    """
    n_swa = forward.model.n_swa
    first, last = sequence.n_past + 1, sequence.n_past + n_tokens
    return (
        forward.kv.is_host and (n_swa is None or n_tokens < n_swa)
        and change_places(first, last, forward.device.n_threads)
    )  # fmt: skip


def piece_of(request: Request, guesses: list[Guess], at: int) -> Piece:
    """Describe a guess behind a request's tokens, or by ROOT the last of these, to a forward."""
    sequence = _sequence(request)
    if at == ROOT:
        return Piece(tokens=sequence.tokens[-1:], pos=sequence.n_past, region=sequence.region,
                     lora=request.lora)  # fmt: skip
    before, first = above(guesses, at), sequence.n_past + 1
    branch = None
    if len(before) < at:  # not all guesses so far are those that it follows
        branch = Branch(cell=first + at, n_shared=first, above=tuple(first + i for i in before))
    return Piece(tokens=(guesses[at].token,), pos=first + len(before), region=sequence.region,
                 lora=request.lora, branch=branch)  # fmt: skip


def _sequence(request: Request) -> Sequence:
    if request.sequence is None:
        raise RuntimeError(f"request {request.id} has left the engine")
    return request.sequence
