"""The engine thread's loop: admit, prefill, decode together, deliver.

Sequences join and leave between tokens. A prompt is computed alone, batch by batch, so
that its bits do not depend on who else is there; decoding sequences share one pass.
"""

import functools
import itertools
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from edgeroute.embedding import EmbedRequest, States
from edgeroute.models.forward import Forward, Piece
from edgeroute.offload.counters import LayerCount
from edgeroute.request import EngineState, Request, sequence_of, stoppable
from edgeroute.runtime.errors import ComputeError, EdgerouteError
from edgeroute.runtime.graph import Span
from edgeroute.runtime.ledger import COMPUTE_BUFFER, Ledger
from edgeroute.runtime.prefix import Mode, PrefixCache
from edgeroute.runtime.sequence import CLASS_SINGLE, Sequence, chunk_classes, next_chunk_end
from edgeroute.runtime.threads import ThreadPolicy
from edgeroute.speculation_pass import speculate
from edgeroute.stats import FinishReason

if TYPE_CHECKING:
    from edgeroute.adapters import Adapters
    from edgeroute.depth import DepthSource
    from edgeroute.depth_guard import DepthGuard
    from edgeroute.energy_book import EnergyBook
    from edgeroute.offload.expert_store import ExpertStore
    from edgeroute.offload.layer_store import LayerStore
    from edgeroute.sessions import Sessions
    from edgeroute.speculation import Speculation
    from edgeroute.step_routing import StepRouting

Logits = npt.NDArray[np.float32]
DECODE_SHARE: Final = 0.5
"""Time for answers under way, of what a batch of another's prompt took beyond a short pause."""
SHORT_PAUSE_S: Final = 0.25
"""Which a reader hardly minds: up to it prompts come first, so that answers share more passes."""


class Scheduler:
    """Runs requests over one Forward. Not thread-safe: the engine thread owns it."""

    def __init__(
        self, forward: Forward, ledger: Ledger, threads: ThreadPolicy, *, n_ctx: int,
        n_ubatch: int, max_batch: int, is_eog: Callable[[int], bool],
        experts: "ExpertStore | None" = None, adapters: "Adapters | None" = None,
        layers: "LayerStore | None" = None,
    ) -> None:  # fmt: skip
        self.forward = forward
        self.prefix = PrefixCache(forward.kv, n_ubatch)
        self.threads = threads
        self._ledger = ledger
        self._n_ctx = n_ctx
        self._n_ubatch = n_ubatch
        self._max_batch = max_batch
        self.is_eog = functools.cache(is_eog)  # asked of every token, and 15 us in libllama
        self._experts = experts
        self._layers = layers
        self._adapters = adapters
        self.speculation: Speculation | None = None
        self.depth: DepthSource | None = None
        self.depth_guard: DepthGuard | None = None
        self.steps: StepRouting | None = None
        self.sessions: Sessions | None = None
        self.energy: EnergyBook | None = None
        self._states = States(forward, ledger, n_ubatch)
        self._compute_bytes = forward.graphs.n_bytes
        self._waiting: deque[Request] = deque()
        self._arriving: list[Request] = []  # their adapters are held, perhaps still loading
        self._prefilling: deque[Request] = deque()
        self._decoding: list[Request] = []
        self._stepping: list[Request] = []  # two models write these, see StepRouting
        self._owed_s = 0.0  # that answers under way get before the next batch of a prompt
        self.stalled = False
        """Whether the last step had nothing to compute: adapters, or another machine, are waited
        for."""
        self.n_finished = 0
        self.n_embedded = 0
        self.n_decode_steps = 0
        self.n_decode_tokens = 0

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return any(self._groups)

    @property
    def _groups(self) -> tuple[deque[Request] | list[Request], ...]:
        """All requests, by how far they are."""
        return (self._waiting, self._arriving, self._prefilling, self._decoding, self._stepping)

    @property
    def doing(self) -> str:
        """Say what it works at, for people; any thread may ask."""
        n_answers = len(self._decoding) + len(self._stepping)
        return f"prompts: {len(self._prefilling)}, answers: {n_answers}, waiting: {self.n_waiting}"

    @property
    def n_running(self) -> int:
        """Requests that hold cells."""
        return len(self._prefilling) + len(self._decoding) + len(self._stepping)

    @property
    def n_waiting(self) -> int:
        """Requests without cells yet."""
        return len(self._waiting) + len(self._arriving)

    def submit(self, request: Request) -> None:
        """Queue a request."""
        request.max_tokens = min(request.max_tokens, self._n_ctx - len(request.prompt_ids) + 1)
        if self.energy is not None and not self.busy:
            self.energy.wake()
        self._waiting.append(request)
        self.stalled = False

    def step(self) -> None:
        """Do one round: at most one prefill batch, then one token for all that decode.

        A batch of a prompt may take as long as a hundred tokens: answers under way get their
        share of the time before the next one, or each new prompt would stop them all.
        """
        self._drop_interrupted()
        if self.sessions is not None:
            self.sessions.advance()
        if self.depth_guard is not None:
            self.depth_guard.advance(self._decoding)
        self._admit()
        here = [each for each in self._stepping if each.steps is None or each.steps.phase != "call"]
        self.stalled = not (self._prefilling or self._decoding or here)
        began = time.monotonic()
        if self._prefilling and (self._owed_s <= 0 or not self._decoding):
            self._prefill(self._prefilling[0])
            prefilled = time.monotonic()
            self._owed_s = DECODE_SHARE * (prefilled - began - SHORT_PAUSE_S)
            began = prefilled
        self._decode_all()
        self._owed_s -= time.monotonic() - began
        if self.steps is not None:
            for request in list(self._stepping):
                self.steps.advance(request)

    def _decode_all(self) -> None:
        """Compute one token, or a draft, for every answer under way."""
        running = list(self._decoding)
        if len(running) == 1 and self.speculation is not None and running[0].speculate:
            speculate(self, running.pop(), self.speculation)
        running.sort(key=lambda request: request.depth is None)  # a pass computes one plan
        for _, group in itertools.groupby(running, lambda request: request.depth):
            alike = list(group)
            for first in range(0, len(alike), self._max_batch):
                self._decode(alike[first : first + self._max_batch])
        self._decoding = [request for request in self._decoding if request.sequence is not None]

    def use_the_pause(self) -> None:
        """Do what is better done while nobody waits."""
        if self.depth_guard is not None:
            self.depth_guard.check()
        if self._experts is not None:
            self._experts.reconsider()

    def fail_all(self, error: BaseException) -> None:
        """End every request with `error`; nothing of theirs stays behind."""
        for group in self._groups:
            for request in group:
                self._fail(request, error)
            group.clear()

    # admission and leaving

    def _drop_interrupted(self) -> None:
        for group in self._groups:
            for request in [each for each in group if each.interrupted()]:
                group.remove(request)
                self._finish(request, request.interrupted() or "cancelled")

    def _admit(self) -> None:
        """Let waiting requests in, in order, while there are slots and cells for them.

        One whose adapter is still being loaded lets those behind it pass.
        """
        while self._waiting:
            request = self._waiting[0]
            try:
                if self._adapters is not None and not self._adapters.hold(request):
                    break
            except EdgerouteError as error:
                self._fail(self._waiting.popleft(), error)
                continue
            self._waiting.popleft()
            if request.max_tokens < 1:
                self._finish(request, "length")
            else:
                self._arriving.append(request)
        for request in list(self._arriving):
            try:
                arrived = self._adapters is None or self._adapters.has_arrived(request)
                if arrived and self.sessions is not None and request.session is not None:
                    arrived = self.sessions.has_arrived(request, self._cells_of(request)[0])
            except EdgerouteError as error:
                self._arriving.remove(request)
                self._fail(request, error)
                continue
            if arrived and not self._open(request):
                return

    def _cells_of(self, request: Request) -> tuple[str | None, Mode]:
        """Choose how deep a request is computed; return whose cells serve it, and which."""
        key = None if request.lease is None else request.lease.key
        reuse, request.depth = request.prefix, None
        if self.depth is not None and self.depth.on and not request.depth_full:
            request.depth = self.depth.begin()
            if request.depth.key is None:  # nobody knows yet what its keys will be
                reuse = "off"
            elif request.depth.key:
                key = f"{key or ''}|{request.depth.key}"
        return key, reuse

    def _open(self, request: Request) -> bool:
        """Give a request its cells; False while there are none."""
        key, reuse = self._cells_of(request)
        if request.turn is not None:  # cells of another adapter would have served otherwise
            request.n_common = self.prefix.longest_common(request.prompt_ids)
        sequence = None if self.sessions is None else self.sessions.take(request, key)
        if sequence is None:
            tokens = list(request.prompt_ids)
            sequence = self.prefix.open(tokens, request.n_cells, reuse, adapter=key)
        if sequence is None:
            if self.sessions is not None:
                self.sessions.blocked()
            return False
        self._arriving.remove(request)
        request.sequence = sequence
        request.n_cached = sequence.n_past
        request.started = time.monotonic()
        request.experts_before = self._spent()
        request.layers_before = self._layer_stats()
        if self.steps is not None:
            try:
                opened = self.steps.open(request)
            except EdgerouteError as error:
                self._fail(request, error)
                return True
            if not opened:
                self._arriving.insert(0, request)
                request.sequence = None
                self.prefix.keep(sequence)  # the cells that it found filled
                return False
        (self._prefilling if request.steps is None else self._stepping).append(request)
        return True

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request that runs by itself, with what it has."""
        self._leave(request)
        self._finish(request, reason)

    def fail(self, request: Request, error: BaseException) -> None:
        """End a request that runs by itself with an error."""
        self._leave(request)
        self._fail(request, error)

    def _finish(self, request: Request, reason: FinishReason, *, keep: bool = True) -> None:
        """Free what a request holds, then tell its listener."""
        if self.depth_guard is not None and request.depth is not None and request.sequence:
            self.depth_guard.note(request.sequence.tokens, len(request.prompt_ids))
        self._free(request, keep=keep)
        self.n_finished += 1
        if self._experts is not None:
            self._experts.end_sequence()
        request.finish(reason, EngineState(
            self._ledger.used_bytes, self.threads.n_threads, self._spent(), self._layer_stats(),
            None if self.energy is None else self.energy.settle(request),
        ))  # fmt: skip

    def _layer_stats(self) -> dict[str, int | float] | None:
        return None if self._layers is None else self._layers.stats()

    def _spent(self) -> LayerCount | None:
        return None if self._experts is None else self._experts.spent()

    def _fail(self, request: Request, error: BaseException) -> None:
        self._free(request, keep=False)
        self.n_finished += 1
        request.emit(error)

    def _free(self, request: Request, *, keep: bool) -> None:
        if self._adapters is not None:
            self._adapters.release(request)
        if self.speculation is not None:
            self.speculation.end(request)
        if self.steps is not None:
            self.steps.end(request)
        if self.sessions is not None:
            self.sessions.end(request)
        sequence, request.sequence = request.sequence, None
        if sequence is not None:
            known = request.depth is None or request.depth.key is not None
            if keep and known:
                held = None if self.sessions is None else self.sessions.save(request, sequence)
                self.prefix.keep(sequence, held)
            else:
                self.prefix.drop(sequence)
        request.sampler.close()

    # computing

    def _prefill(self, request: Request) -> None:
        """Compute one batch of a prompt; its last gives the first token."""
        sequence = sequence_of(request)
        if request.prefill_s == 0.0:
            self._share(request, sequence)
        self.threads.before_prefill()
        start, n = sequence.n_past, len(request.prompt_ids)
        end = next_chunk_end(start, n, self._n_ubatch)
        embeds = isinstance(request, EmbedRequest)
        try:
            spans = self._states.spans() if embeds else None
        except EdgerouteError as error:
            self.fail(request, error)
            return
        piece = Piece(tokens=request.prompt_ids[start:end], pos=start, region=sequence.region,
                      n_out=int(end == n and not embeds), lora=request.lora)  # fmt: skip
        began = time.monotonic()
        with stoppable(request, self.forward.device):
            logits = self._run([piece], [request], spans)
        request.prefill_s += time.monotonic() - began
        if logits is None:
            reason = request.interrupted()
            if reason is not None and request.sequence is not None:  # its cells are undefined
                self._leave(request)
                self._finish(request, reason, keep=False)
            return  # a stop meant for an earlier batch: this one is computed again
        sequence.n_past = end
        sequence.classes += chunk_classes(end - start).tobytes()
        if isinstance(request, EmbedRequest):
            self._embed(request, end - start)
        elif end == n:
            self._prefilling.remove(request)
            self._decoding.append(request)
            self.sample(request, logits[0])
            self._decoding = [each for each in self._decoding if each.sequence is not None]

    def _share(self, request: Request, sequence: Sequence) -> None:
        """Take over what those that run have computed of the same prompt meanwhile.

        Prompts are computed one after another, so that of several alike, as the choices of one
        request or chats with one system message are, the first computes what they share.
        """
        if request.depth is not None and request.depth.key is None:
            return
        others = [
            each.sequence for each in (*self._prefilling, *self._decoding)
            if each.sequence and (each.depth is None or each.depth.key is not None)
        ]  # fmt: skip
        request.n_cached += self.prefix.share(sequence, others, request.prefix)

    def _embed(self, request: EmbedRequest, n_tokens: int) -> None:
        """Take the hidden states of a batch; behind a text's last, others come first."""
        request.add(self.forward.residual(n_tokens))
        sequence = sequence_of(request)
        if sequence.n_past < len(request.prompt_ids):
            return
        self.n_embedded += 1
        try:
            more = request.next_input()
        except EdgerouteError as error:
            self.fail(request, error)
            return
        self._prefilling.remove(request)
        if not more:
            self._finish(request, "stop", keep=False)
            return
        request.sequence = None
        self.prefix.drop(sequence)
        self._arriving.append(request)

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
        logits = self.run_pass(pieces, batch)
        if logits is None:
            return
        self.n_decode_steps += 1
        self.n_decode_tokens += len(batch)
        for i, request in enumerate(batch):  # iterating over the array costs an IndexError
            sequence = sequence_of(request)
            sequence.n_past += 1
            sequence.classes.append(CLASS_SINGLE)
            self.sample(request, logits[i])

    def run_pass(self, pieces: list[Piece], batch: list[Request]) -> Logits | None:
        """Compute a decode pass, and let the number of threads follow what it took."""
        began = time.perf_counter() - self.stalled_s()
        logits = self._run(pieces, batch)
        if logits is not None:
            self.threads.observe(len(pieces), time.perf_counter() - self.stalled_s() - began)
        return logits

    def stalled_s(self) -> float:
        """Seconds spent waiting for a disk so far, which no number of threads would change."""
        stores = (self._experts, self._layers)
        return sum(store.stalled_s for store in stores if store is not None)

    def compute(
        self, request: Request, piece: Piece, spans: tuple[Span, ...] | None = None
    ) -> Logits | None:
        """Compute a piece for a request that runs by itself; None when that failed or stopped."""
        if len(piece.tokens) == 1 and spans is None:
            self.n_decode_steps += 1
            self.n_decode_tokens += 1
            return self.run_pass([piece], [request])
        self.threads.before_prefill()
        with stoppable(request, self.forward.device):
            return self._run([piece], [request], spans)

    def _run(
        self, pieces: list[Piece], requests: list[Request], spans: tuple[Span, ...] | None = None
    ) -> Logits | None:
        """Run a batch; a failed one fails its own requests only. None when it was stopped."""
        self.forward.device.set_threads(self.threads.n_threads)
        began = time.perf_counter()
        try:
            depth = requests[0].depth  # the same for all of them
            if depth is None or spans is not None:
                logits = self.forward.run(pieces, spans, borrow=True)
            else:
                logits = depth.run(self.forward, pieces)
            if self._adapters is not None or self.steps is not None:
                self._book_compute()
            if self.steps is not None and logits is not None:
                n_tokens = sum(len(piece.tokens) for piece in pieces)
                self.steps.saw(n_tokens, time.perf_counter() - began)
            if self.energy is not None:
                self.energy.passed(pieces, requests, time.perf_counter() - began)
            return logits
        except EdgerouteError as error:
            for request in requests:
                self._leave(request)
                self._fail(request, error)
            return None

    def _book_compute(self) -> None:
        """Enter what a mixture of adapters, or a draft's logits, made the compute buffer grow to.

        Raises:
            CapacityError: that is over the budget.
        """
        n_bytes = self.forward.graphs.n_bytes
        if n_bytes != self._compute_bytes:
            self._ledger.replace(COMPUTE_BUFFER, n_bytes)
            self._compute_bytes = n_bytes

    def _leave(self, request: Request) -> None:
        for group in (self._prefilling, self._decoding, self._stepping):
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
