"""The engine thread's loop: admit, prefill, decode together, deliver.

Sequences join and leave between tokens. Prompts are computed batch by batch, short ones in one
pass where their bits do not depend on who else is there; decoding sequences share one pass.
"""

import functools
import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from edgeroute.admission import Admission
from edgeroute.embedding import EmbedRequest, States
from edgeroute.models.forward import Forward, Piece
from edgeroute.passes import Logits, Passes
from edgeroute.prompts import Prompts
from edgeroute.request import EngineState, Request, sequence_of
from edgeroute.row_bits import Rows
from edgeroute.runtime.errors import ComputeError, DeviceLostError, EdgerouteError
from edgeroute.runtime.ledger import Ledger
from edgeroute.runtime.prefix import PrefixCache
from edgeroute.runtime.sequence import CLASS_SINGLE
from edgeroute.runtime.threads import ThreadPolicy
from edgeroute.speculation_pass import speculate
from edgeroute.stats import FinishReason

if TYPE_CHECKING:
    from edgeroute.adapters import Adapters
    from edgeroute.depth import DepthSource
    from edgeroute.depth_guard import DepthGuard
    from edgeroute.offload.device_tier import DeviceTier
    from edgeroute.offload.expert_store import ExpertStore
    from edgeroute.offload.layer_store import LayerStore
    from edgeroute.run_ahead import RunAhead
    from edgeroute.sessions import Sessions
    from edgeroute.speculation import Speculation

DECODE_SHARE: Final = 0.5
"""Time for answers under way, of what a batch of another's prompt took beyond a short pause."""
SHORT_PAUSE_S: Final = 0.25
"""Which a reader hardly minds: up to it each prompt comes first, and answers share more passes."""


class Scheduler(Passes):
    """Runs requests over one Forward. Not thread-safe: the engine thread owns it."""

    def __init__(
        self, forward: Forward, ledger: Ledger, threads: ThreadPolicy, *, n_ctx: int,
        n_ubatch: int, max_batch: int, rows: Rows, is_eog: Callable[[int], bool],
        experts: "ExpertStore | DeviceTier | None" = None, adapters: "Adapters | None" = None,
        layers: "LayerStore | None" = None,
    ) -> None:  # fmt: skip
        super().__init__(
            forward, ledger, threads, experts=experts, layers=layers, adapters=adapters
        )
        self.prefix = PrefixCache(forward.kv, n_ubatch)
        self._ledger = ledger
        self._n_ctx = n_ctx
        self.n_ubatch = n_ubatch
        self.max_batch = max_batch
        self.is_eog = functools.cache(is_eog)  # asked of every token, and 15 us in libllama
        self.speculation: Speculation | None = None
        self.run_ahead: RunAhead | None = None
        self.depth: DepthSource | None = None
        self.depth_guard: DepthGuard | None = None
        self.sessions: Sessions | None = None
        self.prompts = Prompts(self, States(forward, ledger, n_ubatch), rows)
        self._admission = Admission(self)
        self.decoding: list[Request] = []
        self._stepping: list[Request] = []  # two models write these, see StepRouting
        self._alive: dict[str, Request] = {}  # all of them, in whatever group, by their ids
        self._owed_s = 0.0  # that answers under way get before the next batch of a prompt
        self.stalled = False
        """Whether the last step had nothing to compute: adapters, or another machine, are waited
        for."""
        self.n_finished = 0
        self.n_embedded = 0

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._alive)

    @property
    def _groups(self) -> tuple[deque[Request] | list[Request], ...]:
        """All requests, by how far they are."""
        beginning = self._admission.waiting, self._admission.arriving
        return (*beginning, self.prompts.queue, self.decoding, self._stepping)

    @property
    def doing(self) -> str:
        """Say what it works at, for people; any thread may ask."""
        n_answers = len(self.decoding) + len(self._stepping)
        return (
            f"prompts: {len(self.prompts.queue)}, answers: {n_answers}, waiting: {self.n_waiting}"
        )

    @property
    def n_running(self) -> int:
        """Requests that hold cells."""
        return len(self.prompts.queue) + len(self.decoding) + len(self._stepping)

    @property
    def n_waiting(self) -> int:
        """Requests without cells yet."""
        return len(self._admission.waiting) + len(self._admission.arriving)

    def submit(self, request: Request) -> None:
        """Queue a request."""
        request.max_tokens = min(request.max_tokens, self._n_ctx - len(request.prompt_ids) + 1)
        if self.energy is not None and not self.busy:
            self.energy.wake()
        self._alive[request.id] = request
        self._admission.waiting.append(request)
        self.stalled = False

    def enter(self, request: Request) -> None:
        """Let a request run that got its cells."""
        (self.prompts.queue if request.steps is None else self._stepping).append(request)

    def step(self) -> None:
        """Do one round: at most one prefill batch, then one token for all that decode.

        A batch of a prompt may take as long as a hundred tokens: answers under way get their
        share of the time before the next one, or each new prompt would stop them all.
        """
        self._drop_interrupted()
        if self.sessions is not None:
            self.sessions.advance()
        if self.depth_guard is not None:
            self.depth_guard.advance(self.decoding)
        self._admission.admit()
        here = [each for each in self._stepping if each.steps is None or each.steps.phase != "call"]
        self.stalled = not (self.prompts.queue or self.decoding or here)
        began = time.monotonic()
        if self.prompts.queue and (self._owed_s <= 0 or not self.decoding):
            n_batches = self.prompts.advance()
            prefilled = time.monotonic()
            self._owed_s = DECODE_SHARE * (prefilled - began - n_batches * SHORT_PAUSE_S)
            began = prefilled
        self._decode_all()
        self._owed_s -= time.monotonic() - began
        if self.steps is not None:
            for request in list(self._stepping):
                self.steps.advance(request)

    def _decode_all(self) -> None:
        """Compute one token, or a draft, for every answer under way."""
        running = list(self.decoding)
        if len(running) == 1 and self.speculation is not None and running[0].speculate:
            speculate(self, running.pop(), self.speculation)
        for alike in self._by_plan(running):
            for first in range(0, len(alike), self.max_batch):
                self._decode(alike[first : first + self.max_batch])
        self._drop_ended()
        if self._experts is not None and self._experts.cannot_wait:
            self._experts.reconsider()

    def _by_plan(self, running: list[Request]) -> list[list[Request]]:
        """Split answers under way by their depth plans: a pass computes one."""
        if self.depth is None:
            return [running]
        running.sort(key=lambda request: request.depth is None)
        groups = itertools.groupby(running, lambda request: request.depth)
        return [list(group) for _, group in groups]

    def use_the_pause(self, nobody_waits: Callable[[], bool]) -> None:
        """Do what is better done while nobody waits, in small steps."""
        while nobody_waits() and self.forward.kv.clear_ahead():
            pass
        if self.depth_guard is not None:
            self.depth_guard.check()
        if self._experts is not None:
            self._experts.reconsider()

    def fail_all(self, error: BaseException) -> None:
        """End every request with `error`; nothing of theirs stays behind."""
        for request in list(self._alive.values()):
            self._leave(request)
            self._end(request, error)

    # a device that is gone

    def hand_over(self, error: BaseException) -> list[Request]:
        """Let go of all requests, as a device is lost.

        Returns:
            Those that may be submitted again, to another Scheduler; what they have said counts.
            Those that two models write are ended with `error`.
        """
        going = []
        for request in list(self._alive.values()):
            self._leave(request)
            if request.steps is not None or request.other_prompt_ids:
                self._end(request, error)
                continue
            self._let_go(request)
            if request.sequence is not None:
                self.prefix.drop(request.sequence)
            request.restart()
            going.append(request)
        self._alive.clear()
        return going

    def count_on(self, other: "Scheduler") -> None:
        """Begin to count where another ended, whose model this one's replaces."""
        self.n_finished += other.n_finished
        self.n_embedded += other.n_embedded
        self.n_decode_steps += other.n_decode_steps
        self.n_decode_tokens += other.n_decode_tokens

    # leaving

    def _drop_interrupted(self) -> None:
        for request in [each for each in self._alive.values() if each.interrupted()]:
            self.finish(request, request.interrupted() or "cancelled")

    def finish(self, request: Request, reason: FinishReason, *, keep: bool = True) -> None:
        """End a request that runs by itself, with what it has; `keep` its cells for later ones."""
        self._leave(request)
        self._finish(request, reason, keep=keep)

    def fail(self, request: Request, error: BaseException) -> None:
        """End a request that runs by itself with an error.

        Raises:
            DeviceLostError: a device is gone; the request may go on elsewhere, see `hand_over`.
        """
        if isinstance(error, DeviceLostError):
            raise error
        self.check()  # it may be what the error is about
        self._leave(request)
        self._end(request, error)

    def _finish(self, request: Request, reason: FinishReason, *, keep: bool = True) -> None:
        """Free what a request holds, then tell its listener."""
        if self.depth_guard is not None and request.depth is not None and request.sequence:
            self.depth_guard.note(request.sequence.tokens, len(request.prompt_ids))
        self._free(request, keep=keep)
        self.n_finished += 1
        if self._experts is not None:
            self._experts.end_sequence()
        request.finish(reason, EngineState(
            self._ledger.used_bytes, self.threads.n_threads, *self.spent(),
            None if self.energy is None else self.energy.settle(request),
        ))  # fmt: skip

    def _end(self, request: Request, error: BaseException) -> None:
        self._free(request, keep=False)
        self.n_finished += 1
        request.emit(error)

    def _let_go(self, request: Request) -> None:
        """Let all but the cells go of what a request holds."""
        if self.adapters is not None:
            self.adapters.release(request)
        if self.speculation is not None:
            self.speculation.end(request)
        if self.steps is not None:
            self.steps.end(request)
        if self.sessions is not None:
            self.sessions.end(request)

    def _free(self, request: Request, *, keep: bool) -> None:
        self._alive.pop(request.id, None)
        self._let_go(request)
        sequence, request.sequence = request.sequence, None
        if sequence is not None:
            known = request.depth is None or request.depth.key is not None
            if keep and known:
                held = None if self.sessions is None else self.sessions.save(request, sequence)
                self.prefix.keep(sequence, held)
            else:
                self.prefix.drop(sequence)
        request.sampler.close()

    def end_text(self, request: EmbedRequest, *, more: bool) -> None:
        """Free the cells of a text whose vector is known; `more` of its call wait for some."""
        self.prompts.queue.remove(request)
        if not more:
            self._finish(request, "stop", keep=False)
            return
        self.prefix.drop(sequence_of(request))
        request.sequence = None
        self._admission.arriving.append(request)

    # computing

    def begin_answer(self, request: Request, logits: Logits) -> None:
        """Let a request decode whose prompt is complete, and choose its first token."""
        self.decoding.append(request)
        self.sample(request, logits)
        self._drop_ended()

    def _drop_ended(self) -> None:
        self.decoding = [request for request in self.decoding if request.sequence is not None]

    def _decode(self, batch: list[Request]) -> None:
        """Compute one token for each request of a batch."""
        batch = [request for request in batch if request.sequence is not None]
        if not batch:
            return
        batch.sort(key=lambda request: sequence_of(request).region.start)
        pieces = []
        for request in batch:
            sequence = sequence_of(request)
            pieces.append(Piece(tokens=sequence.tokens[-1:], pos=sequence.n_past,
                                region=sequence.region, lora=request.lora))  # fmt: skip
        ahead = None if self.prompts.queue else self.run_ahead
        n = 1 if ahead is None else ahead.n_tokens_each(pieces, batch)
        if ahead is not None and n > 1:
            self._decode_several(pieces, batch, n, ahead)
        elif (logits := self.run_pass(pieces, batch)) is not None:
            self._choose(batch, logits)
        if ahead is not None:
            ahead.took(len(pieces), n)

    def _decode_several(
        self, pieces: list[Piece], batch: list[Request], n: int, ahead: "RunAhead"
    ) -> None:
        """Compute `n` tokens for each request; those behind an answer's end, or behind another
        token than the next pass was fed, count for nothing."""
        rows: list[Request | None] = [*batch]
        for logits, fed in self.run_several(pieces, batch, n, ahead) or ():
            if not any(rows):
                return
            self._choose(rows, logits)
            if fed is not None:
                rows = [each if each is not None and _goes_on(each, int(token)) else None
                        for each, token in zip(rows, fed, strict=True)]  # fmt: skip

    def _choose(self, rows: Sequence[Request | None], logits: Logits) -> None:
        """Choose the next token of each answer that a pass was computed for."""
        self.n_decode_steps += 1
        for i, request in enumerate(rows):  # iterating over the array costs an IndexError
            if request is not None:
                self.n_decode_tokens += 1
                sequence = sequence_of(request)
                sequence.n_past += 1
                sequence.classes.append(CLASS_SINGLE)
                self.sample(request, logits[i])

    def _leave(self, request: Request) -> None:
        for group in self._groups:
            if request in group:
                group.remove(request)

    def sample(self, request: Request, logits: Logits) -> None:
        """Choose a token, pass its text on, and end the request where it ends."""
        try:
            self.commit(request, request.sampler.sample(logits))
        except EdgerouteError as error:
            self.fail(request, error)
        except Exception as error:  # a bug met by one answer must not end those beside it
            told = ComputeError(f"an internal error ended this answer: {error!r:.200}")
            told.__cause__ = error
            self.fail(request, told)

    def commit(self, request: Request, token: int) -> None:
        """Make a token part of an answer, pass its text on, and end the request where it ends.

        Raises:
            GrammarError: the request's grammar does not admit it.
        """
        now = time.monotonic()
        if self.is_eog(token):
            request.add_end(token, now)
            self.finish(request, "stop")
            return
        request.sampler.accept(token)
        sequence = sequence_of(request)
        sequence.tokens.append(token)
        request.add_token(token, now)
        if request.text.stopped:
            self.finish(request, "stop")
        elif len(request.token_ids) >= request.max_tokens:
            self.finish(request, "length")


def _goes_on(request: Request, token: int) -> bool:
    """Whether an answer has not ended, and this is its last token."""
    return request.sequence is not None and request.sequence.tokens[-1] == token
