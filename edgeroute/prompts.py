"""Prompts under way: which of them the next pass computes, and what comes of it.

A short prompt alone reads all weights for a few rows. Several in one pass take 2 to 8 % less time
at 72 tokens each, and 15 to 30 % less at 24, by the model: see tools/BENCHLOG.md. They share one
only where the bits of each are those that it would have alone, or where speed was asked for.
"""

import itertools
import time
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

from edgeroute.embedding import EmbedRequest, States
from edgeroute.models.forward import Piece
from edgeroute.passes import Logits
from edgeroute.request import Request, sequence_of
from edgeroute.row_bits import Rows
from edgeroute.runtime.batch_shape import Span
from edgeroute.runtime.errors import EdgerouteError
from edgeroute.runtime.sequence import (
    GEMM_ROWS,
    Sequence,
    chunk_classes,
    next_chunk_end,
)

if TYPE_CHECKING:
    from edgeroute.scheduler import Scheduler

MAX_JOINED: Final = 128
"""Tokens of a batch that shares a pass: a longer one gains less than 5 %, and the others wait."""
ROOM: Final = 3 / 4
"""Of `n_ubatch` that several batches may fill: each attends by itself, and what that gives takes
the rest of the compute buffer."""
MAX_LOOKED_AT: Final = 16
"""Prompts that are looked at for one pass."""
WORTH_WAITING: Final = 1 / 8
"""Of a batch: who can take over more from a prompt of this pass is computed after it."""


class Part(NamedTuple):
    """The next batch of one prompt: tokens `start` to `end` of its sequence."""

    request: Request
    sequence: Sequence
    start: int
    end: int

    @property
    def n_tokens(self) -> int:
        """Tokens of the batch."""
        return self.end - self.start

    @property
    def is_last(self) -> bool:
        """Whether the prompt is complete with it."""
        return self.end == len(self.sequence.tokens)

    def piece(self, *, wants_logits: bool) -> Piece:
        """Return what a pass computes of it; with logits where the prompt ends."""
        return Piece(tokens=self.sequence.tokens[self.start : self.end], pos=self.start,
                     region=self.sequence.region, n_out=int(wants_logits and self.is_last),
                     lora=self.request.lora)  # fmt: skip

    def computed(self) -> Sequence:
        """Return the sequence as it will be after the batch."""
        whole, more = self.sequence, chunk_classes(self.n_tokens).tobytes()
        return Sequence(whole.tokens, whole.region, self.end, whole.classes + more, whole.adapter)


class Prompts:
    """Requests whose prompts are computed. The engine thread owns it.

    Attributes:
        queue: in the order of their coming.
        n_passes: passes over prompts so far.
        n_batches: batches of prompts that they computed: more, where several shared a pass.
    """

    def __init__(self, scheduler: "Scheduler", states: States, rows: Rows) -> None:
        self._scheduler = scheduler
        self._states = states
        self._rows = rows
        self.queue: deque[Request] = deque()
        self.n_passes = 0
        self.n_batches = 0

    def advance(self) -> int:
        """Compute one pass; prompts that it completes get their first token.

        Returns:
            Batches of prompts that shared it.
        """
        first = self.queue[0]
        if isinstance(first, EmbedRequest):
            self._read_text(first)
            return 1
        parts = self._choose(self._part(first))
        logits = self._compute(parts)
        if logits is not None:
            self._hand_on(parts, logits)
        return len(parts)

    def _hand_on(self, parts: list[Part], logits: Logits) -> None:
        """Let those decode whose prompt is complete."""
        complete = [part.request for part in parts if part.is_last]
        for request, row in zip(complete, logits, strict=True):
            reason = request.interrupted()
            if reason is not None:  # the others let it not be stopped at once
                self._scheduler.finish(request, reason)
                continue
            self.queue.remove(request)
            self._scheduler.begin_answer(request, row)

    # which

    def _choose(self, first: Part) -> list[Part]:
        """Return what one pass computes: the first prompt's batch, and others that fit beside it.

        One whose rows are no whole groups comes last: behind it others would be grouped anew.
        """
        parts = [first]
        if self._rows.mixed or not _may_share(first.request):
            return parts
        room = int(ROOM * self._scheduler.n_ubatch) - first.n_tokens
        for request in itertools.islice(self.queue, 1, MAX_LOOKED_AT):
            if len(parts) == self._scheduler.max_batch or room <= 0:
                break
            if not _may_share(request):
                continue
            part = self._part(request)
            more = sorted([*parts, part], key=_has_rest)
            fits = part.n_tokens <= min(room, MAX_JOINED)
            keeps = self._rows.keep([each.n_tokens for each in more])
            if fits and keeps and not self._gains_by_waiting(part, parts):
                parts = more
                room -= part.n_tokens
        return parts

    def _part(self, request: Request) -> Part:
        """Return the next batch of a prompt, shortened by what others have computed of it."""
        sequence = sequence_of(request)
        if request.prefill_s == 0.0:
            self._take_over(request, sequence)
        start, n_ubatch = sequence.n_past, self._scheduler.n_ubatch
        return Part(request, sequence, start, next_chunk_end(start, len(sequence.tokens), n_ubatch))

    def _take_over(self, request: Request, sequence: Sequence) -> None:
        """Copy what those that run have computed of the same prompt meanwhile.

        Of several alike, as the choices of one request or chats with one system message are, the
        first computes what they share.
        """
        if request.depth is not None and request.depth.key is None:
            return
        others = [
            each.sequence for each in (*self.queue, *self._scheduler.decoding)
            if each.sequence and (each.depth is None or each.depth.key is not None)
        ]  # fmt: skip
        request.n_cached += self._scheduler.prefix.share(sequence, others, request.prefix)

    def _gains_by_waiting(self, part: Part, others: list[Part]) -> bool:
        """Whether a prompt could take over much of what a pass with these computes."""
        soon = [other.computed() for other in others]
        n = self._scheduler.prefix.shareable(part.sequence, soon, part.request.prefix)
        return n > WORTH_WAITING * part.n_tokens

    # computing

    def _compute(self, parts: list[Part], spans: tuple[Span, ...] | None = None) -> Logits | None:
        """Compute a pass; None where it failed or was stopped.

        Returns:
            F32 (n, n_vocab) for the n prompts that are complete with it, in their order. None of
            a pass in `spans`.
        """
        pieces = [part.piece(wants_logits=spans is None) for part in parts]
        requests, began = [part.request for part in parts], time.monotonic()
        logits = self._scheduler.prefill_pass(requests, pieces, spans)
        self._note(parts, time.monotonic() - began)
        if logits is None:
            self._end_stopped(requests)
            return None
        for part in parts:
            part.sequence.n_past = part.end
            part.sequence.classes += chunk_classes(part.n_tokens).tobytes()
        return logits

    def _note(self, parts: list[Part], seconds: float) -> None:
        """Count a pass, and share its time out by tokens."""
        self.n_passes += 1
        self.n_batches += len(parts)
        n_tokens = sum(part.n_tokens for part in parts)
        for part in parts:
            part.request.prefill_s += seconds * part.n_tokens / n_tokens

    def _end_stopped(self, requests: list[Request]) -> None:
        """End those that a stop was meant for, whose cells are undefined now.

        The others are computed again: theirs may have been meant for an earlier batch.
        """
        for request in requests:
            reason = request.interrupted()
            if reason is not None and request.sequence is not None:
                self._scheduler.finish(request, reason, keep=False)

    # texts to embed

    def _read_text(self, request: EmbedRequest) -> None:
        """Compute one batch of a text and take its hidden states."""
        scheduler = self._scheduler
        try:
            spans = self._states.spans()
        except EdgerouteError as error:
            scheduler.fail(request, error)
            return
        part = self._part(request)
        if self._compute([part], spans) is None:
            return
        request.add(scheduler.forward.residual(part.n_tokens))
        scheduler.check()
        if not part.is_last:
            return
        scheduler.n_embedded += 1
        try:
            more = request.next_input()
        except EdgerouteError as error:
            scheduler.fail(request, error)
            return
        scheduler.end_text(request, more=more)


def _has_rest(part: Part) -> bool:
    """Whether some rows of a batch are no whole group."""
    return part.n_tokens % GEMM_ROWS != 0


def _may_share(request: Request) -> bool:
    """Whether a prompt is computed by the plain model, so that others may share its passes."""
    plain = request.depth is None and request.lora is None
    return plain and not isinstance(request, EmbedRequest)
