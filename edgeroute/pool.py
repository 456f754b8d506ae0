"""A pool: several models behind one `generate`, the cheapest capable one asked first.

Profiles in the configuration say what each model can do; feedback corrects them. Models open on
demand under one byte budget.
"""

import dataclasses
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Unpack, cast

from edgeroute.loaded import budget_bytes
from edgeroute.options import KNOWN, Options
from edgeroute.pool_answer import (
    PoolGeneration,
    PoolSettings,
    PoolStream,
    PoolTry,
    Reason,
    Route,
    whole_answer,
)
from edgeroute.pool_async import Leaver, hear_thread
from edgeroute.pool_config import PoolParams, read_pool
from edgeroute.pool_learning import PoolLearner, Query
from edgeroute.pool_seats import Seat, seat_all
from edgeroute.pool_setup import check_known, run_params, state_path
from edgeroute.pool_shelf import SETTINGS, Shelf
from edgeroute.pool_text import chat_text
from edgeroute.runtime.closing import Closing
from edgeroute.runtime.errors import ClosedError, UsageError
from edgeroute.shelf_place import Place
from edgeroute.skippers.pool_choice import DIMENSIONS, Candidate, rank, rank_by_worth
from edgeroute.stats import Chunk, Generation

MAX_REMEMBERED: Final = 10_000
"""Answers that feedback is still taken for."""
DEFAULT_TOKENS: Final = 128
"""Of an answer whose `max_tokens` is not given, for its price."""
NOMINAL_READ: Final = 10e9
"""Bytes of weights per second that decoding is taken to read, until it was measured."""
NOMINAL_LOAD: Final = 1e9
"""Bytes per second that opening a model is taken to read, until it was measured."""
OF_ONE_MODEL: Final = frozenset({"score", "adapter", "small_adapter", "depth", "steps"})
"""Options of a Runtime that mean nothing here."""
OWN: Final = ("memory", "tolerance", "max_tries", "energy", "state")

Verify = Callable[[Generation], bool]
"""Tells whether an answer will do."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Plan:
    """Models to ask for a query, in order, and when there is no time left."""

    query: Query
    order: tuple[tuple[Candidate, Reason], ...]
    deadline: float | None
    options: Options

    def left(self, seat: Seat) -> Options:
        """The options of a Runtime: a configuration's, with the time that is left."""
        options = cast(Options, {**self.options, **seat.options})
        if self.deadline is not None:
            # At the deadline, the engine shall say so, as it does otherwise.
            options["timeout_s"] = max(1e-3, self.deadline - time.monotonic())
        return options

    def left_s(self) -> float | None:
        return None if self.deadline is None else self.deadline - time.monotonic()


class Pool(Closing):
    """Several models that answer as one; use it as a context manager or call `close`.

    Thread-safe. A call waits while answers that are being written leave no room for its model.

    Args:
        pool: a TOML file, or a mapping of the same shape; see `edgeroute.pool_config`.

    Raises:
        UsageError: the configuration or a setting is wrong; the message names the key.
        CapacityError: a model does not fit the budget, not even paged.
        ModelFileError, UnsupportedModelError: a model's file cannot be used.
        OSError: the saved state cannot be read.
    """

    def __init__(
        self, pool: str | Path | Mapping[str, Any], **settings: Unpack[PoolSettings]
    ) -> None:
        given: dict[str, Any] = dict(settings)
        check_known("setting", given, (*OWN, *SETTINGS))
        own = {name: given.get(name) for name in OWN if name != "state"}
        self.params: PoolParams = read_pool(pool, own)
        shared = {name: given.get(name) for name in SETTINGS}
        state = given.get("state")
        self._learner = PoolLearner(self.params, state_path(self.params, state))
        common = run_params(self.params, shared, state)
        self._n_ctx = common.n_ctx
        self._seats, models = seat_all(list(self.params.models.values()), common)
        self._shelf = Shelf(models, budget_bytes(common))
        self._lock = threading.Lock()  # of everything below, and of the learner
        self._remembered: OrderedDict[str, tuple[str, Query]] = OrderedDict()
        self._answers: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._last: Route | None = None
        try:
            self._shelf.check_paged()
        except BaseException:
            self._shelf.close()
            raise

    # one answer

    def generate(
        self, prompt: str | None = None, *, model: str | None = None,
        verify: Verify | None = None, **options: Unpack[Options],
    ) -> PoolGeneration:  # fmt: skip
        """Answer a prompt, or chat messages, by the cheapest capable model.

        Args:
            prompt: the prompt, where no messages are given.
            model: who shall answer; None leaves that to the pool.
            verify: called with an answer; where it says no, the next model is asked, up to
                `max_tries`. The last answer is returned even so, see `pool.tries`. What it says
                is also the feedback, which is then taken no more.
            options: as of `Runtime.generate`; `timeout_s` is for all tries together.

        Raises:
            UsageError: an option is unknown or out of range, or the prompt does not fit.
            CapacityError: there was no room for the model in time.
            ClosedError: the pool was closed.
        """
        return self._answer(prompt, self._plan(prompt, options, model), verify, None)

    async def agenerate(
        self, prompt: str | None = None, *, model: str | None = None,
        verify: Verify | None = None, **options: Unpack[Options],
    ) -> PoolGeneration:  # fmt: skip
        """Answer without blocking the event loop; cancelling the task cancels the answer.

        Arguments and errors are those of `generate`; `verify` is called in another thread.
        """
        leaver = Leaver(self._shelf.wake)

        def work(tell: Callable[[PoolGeneration], None]) -> None:
            tell(self._answer(prompt, self._plan(prompt, options, model), verify, leaver))

        async for answer in hear_thread(work, leaver):
            return answer
        raise ClosedError("the pool ended without an answer")

    def _answer(
        self, prompt: str | None, plan: "_Plan", verify: Verify | None, leaver: Leaver | None
    ) -> PoolGeneration:
        tries: list[PoolTry] = []
        for chosen, _ in plan.order:
            began = time.monotonic()
            seat = self._seats[chosen.name]
            left = None if leaver is None else leaver.left
            with self._shelf.lease(seat.place, plan.left_s(), left) as lease:
                runtime = lease.runtime
                wait_s = time.monotonic() - began
                try:
                    answer = whole_answer(runtime, prompt, plan.left(seat), leaver)
                except ClosedError:
                    lease.broke()
                    raise
            seconds = time.monotonic() - began
            accepted = None if verify is None else bool(verify(answer))
            tries.append(_try(chosen.name, (seconds, wait_s), answer, accepted))
            self._note(chosen.name, plan, answer, accepted)
            over = plan.deadline is not None and time.monotonic() >= plan.deadline
            if accepted is not False or over or answer.finish_reason == "cancelled":
                break
        return self._finish(plan, answer, tuple(tries))

    def stream(
        self, prompt: str | None = None, *, model: str | None = None, **options: Unpack[Options]
    ) -> "PoolStream":
        """Answer piece by piece; the last chunk's generation is a PoolGeneration.

        Arguments and errors are those of `generate`, raised here and not at the first piece.
        """
        return self._stream(prompt, self._plan(prompt, options, model), None)

    async def astream(
        self, prompt: str | None = None, *, model: str | None = None, **options: Unpack[Options]
    ) -> AsyncIterator[Chunk]:
        """Answer piece by piece on the event loop; closing the iterator cancels the rest."""
        leaver = Leaver(self._shelf.wake)

        def work(tell: Callable[[Chunk], None]) -> None:
            with self._stream(prompt, self._plan(prompt, options, model), leaver) as stream:
                for chunk in stream:
                    tell(chunk)

        async for chunk in hear_thread(work, leaver):
            yield chunk

    def _stream(self, prompt: str | None, plan: "_Plan", leaver: Leaver | None) -> PoolStream:
        name, began = plan.order[0][0].name, time.monotonic()
        seat = self._seats[name]
        left = None if leaver is None else leaver.left
        lease = self._shelf.lease(seat.place, plan.left_s(), left)
        try:
            runtime = lease.runtime
            wait_s = time.monotonic() - began
            stream = runtime.stream(prompt, **plan.left(seat))
            if leaver is not None:
                leaver.follow(stream)
        except BaseException as error:
            if isinstance(error, ClosedError):
                lease.broke()
            lease.close()
            raise

        def finish(answer: Generation) -> PoolGeneration:
            seconds = time.monotonic() - began
            self._note(name, plan, answer, None)
            return self._finish(plan, answer, (_try(name, (seconds, wait_s), answer, None),))

        return PoolStream(stream, lease, finish)

    def feedback(self, generation_id: str, reward: float) -> None:
        """Tell what an answer was worth, once: 0 useless, 1 perfect.

        Raises:
            UsageError: no such answer, its feedback was given before (also by `verify`), or
                another reward.
            OSError: it was learned, but could not be saved.
        """
        with self._lock:
            known = self._remembered.get(generation_id)
            if known is None:
                raise UsageError(
                    f"there is no answer {generation_id!r:.80} to learn from: feedback is taken "
                    f"once, for the last {MAX_REMEMBERED} answers that `verify` did not judge"
                )
            self._learner.learn(*known, reward)
            del self._remembered[generation_id]
            if self._learner.due:  # not in `generate`: a full disk must not cost an answer
                self._learner.save()

    @property
    def last(self) -> Route | None:
        """How the newest finished answer came about, whichever thread asked; None before."""
        return self._last

    def stats(self) -> dict[str, object]:
        """Return what the pool holds and has done, as plain JSON types."""
        with self._lock:
            models = {name: self._model_stats(name) for name in self.params.models}
        shelf = self._shelf
        return {
            "budget_bytes": shelf.budget_bytes,
            "used_bytes": shelf.used_bytes,
            "waiting": shelf.n_waiting,
            "evicted": shelf.n_evicted,
            "tolerance": self.params.tolerance,
            "energy": self.params.energy,
            "models": models,
        }

    def _model_stats(self, name: str) -> dict[str, object]:
        place, cost = self._place(name), self._learner.cost_s(name)
        joules = self._learner.joules_per_token(name)
        return {
            "state": place.state,
            "place": place.name,
            "bytes": place.n_bytes,
            "whole_bytes": place.whole_bytes,
            "running": place.n_leases,
            "opened": place.n_opened,
            "load_s": None if place.load_s is None else round(place.load_s, 6),
            "s_per_token": None if cost is None else round(cost, 6),
            "joules_per_token": None if joules is None else round(joules, 6),
            "answers": self._answers[name],
            "refused": self._refused[name],
            "rewards": round(self._learner.n_plays(name), 3),
        }

    def close(self) -> None:
        """End running answers with ClosedError, close all models, keep what was learned.

        Safe to call twice.

        Raises:
            OSError: what was learned could not be written; everything is closed even so.
        """
        self._shelf.close()
        with self._lock:
            self._learner.save()

    # choosing, and what is noted of it

    def _plan(self, prompt: str | None, options: Options, model: str | None) -> "_Plan":
        """Check a call as far as that needs no model, and rank the models for it."""
        check_known("option", options, sorted(KNOWN - OF_ONE_MODEL))
        asked = [each for each in ("messages", "prompt_ids") if options.get(each) is not None]
        if len(asked) + (prompt is not None) != 1:
            raise UsageError("pass exactly one of prompt, messages and prompt_ids")
        if asked == ["prompt_ids"] and model is None:
            raise UsageError("prompt_ids are of one model's vocabulary; name it by model=")
        if model is not None:
            check_known("model", (model,), self.params.models)
        timeout_s = options.get("timeout_s")
        if timeout_s is not None and not 0 < timeout_s < 1e9:
            raise UsageError(f"timeout_s must be a positive number of seconds, got {timeout_s!r}")
        text = prompt if isinstance(prompt, str) else chat_text(options.get("messages"))
        query = self._learner.look(text)
        with self._lock:
            order = self._rank(query, options.get("max_tokens", DEFAULT_TOKENS))
        if model is not None:
            order = tuple((each, "asked for") for each, _ in order if each.name == model)
        return _Plan(
            query=query, order=order[: self.params.max_tries], options=options,
            deadline=None if timeout_s is None else time.monotonic() + timeout_s,
        )  # fmt: skip

    def _rank(self, query: Query, max_tokens: object) -> "tuple[tuple[Candidate, Reason], ...]":
        n_tokens = max_tokens if isinstance(max_tokens, int) else DEFAULT_TOKENS
        n_tokens = min(max(1, n_tokens), self._n_ctx)
        costs = {name: self._cost_s(name) for name in self.params.models}
        prices = {name: n_tokens * each + self._load_s(name) for name, each in costs.items()}
        if not self.params.energy:
            return rank(self._learner.candidates(query, prices), self.params.tolerance)
        energies = {
            name: each * prices[name] / (n_tokens * costs[name]) if costs[name] > 0 else each
            for name, each in self._learner.energies(costs).items()
        }  # opening a model takes the watts of answering
        found = self._learner.candidates(query, prices, energies)
        return rank_by_worth(found, self.params.energy)

    def _cost_s(self, name: str) -> float:
        """Seconds per token, as measured, or as its bytes suggest."""
        place, cost = self._place(name), self._learner.cost_s(name)
        if cost is not None:
            return cost
        paged = place.whole_bytes - place.n_bytes
        return place.whole_bytes / NOMINAL_READ + paged / NOMINAL_LOAD

    def _load_s(self, name: str) -> float:
        """Seconds that opening a model takes where others must close for it."""
        place = self._place(name)
        load_s = place.n_bytes / NOMINAL_LOAD if place.load_s is None else place.load_s
        return load_s if self._shelf.must_evict(place.name) else 0.0

    def _place(self, name: str) -> Place:
        return self._shelf.places[self._seats[name].place]

    def _note(self, name: str, plan: "_Plan", answer: Generation, accepted: bool | None) -> None:
        """Learn what an answer cost, and what `verify` said of it; else await its feedback."""
        with self._lock:
            self._answers[name] += 1
            self._refused[name] += accepted is False
            if answer.stats.decode_tok_s > 0:
                self._learner.paid(name, 1 / answer.stats.decode_tok_s)
            self._learner.used(name, answer.stats.energy, answer.stats.n_generated)
            if accepted is not None:
                self._learner.learn(name, plan.query, float(accepted))
                return
            self._remembered[answer.id] = name, plan.query
            while len(self._remembered) > MAX_REMEMBERED:
                self._remembered.popitem(last=False)

    def _finish(
        self, plan: "_Plan", answer: Generation, tries: tuple[PoolTry, ...]
    ) -> PoolGeneration:
        chosen, why = plan.order[len(tries) - 1]
        weight = self.params.energy
        route = Route(
            model=chosen.name, why="refused before" if tries[1:] else why,
            demand={name: round(float(each), 6)
                    for name, each in zip(DIMENSIONS, plan.query.demand, strict=True)},
            stated=chosen.stated, shortfall=chosen.shortfall, price_s=chosen.price, tries=tries,
            joules_per_token=self._learner.joules_per_token(chosen.name) if weight else None,
            worth=chosen.worth(weight) if weight else None,
        )  # fmt: skip
        self._last = route
        parts = {each.name: getattr(answer, each.name) for each in dataclasses.fields(answer)}
        return PoolGeneration(**parts, pool=route)


def _try(
    name: str, seconds: tuple[float, float], answer: Generation, accepted: bool | None
) -> PoolTry:
    return PoolTry(
        model=name, seconds=seconds[0], wait_s=seconds[1], n_prompt=answer.stats.n_prompt,
        n_generated=answer.stats.n_generated, accepted=accepted,
    )  # fmt: skip
