"""The latest requests as rows of numbers and configured names: nothing of what was asked."""

import itertools
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any, Final

from edgeroute.server.records import Job, Models
from edgeroute.stats import Generation, GenerationStats

N_RECENT: Final = 50
MAX_NAMES: Final = 256
"""Adapters that answers are counted for, of all models together."""
OTHERS: Final = "others"
MAX_NAME: Final = 120
"""Characters of an adapter's name, or of a mixture's, in a row."""


class Jobs:
    """Keeps what became of the last requests, and counts tokens. The event loop owns it.

    A request that ended leaves its figures only: the answers themselves are let go.

    Args:
        models: whose names may be told.
    """

    def __init__(self, models: Models) -> None:
        self._models = models
        self._running: dict[int, tuple[int, Job]] = {}
        self._recent: deque[dict[str, Any]] = deque(maxlen=N_RECENT)
        self._numbers = itertools.count(1)
        self._tokens: Counter[str] = Counter()
        self._answers: Counter[tuple[str, str]] = Counter()
        self._by_writer: Counter[tuple[str, str]] = Counter()

    def began(self, job: Job) -> None:
        """Note a request that is under way."""
        self._running[id(job)] = next(self._numbers), job

    def token(self, job: Job, n_tokens: int, seconds: float) -> None:
        """Count tokens."""
        self._tokens[self._name(job.model)] += n_tokens

    def ended(self, job: Job) -> None:
        """Keep the figures of a request and forget the rest."""
        known = self._running.pop(id(job), None)
        number = next(self._numbers) if known is None else known[0]
        model = self._name(job.model)
        self._recent.append(_row(number, model, job))
        for generation in job.generations:
            self._count(model, generation)

    def rows(self) -> list[dict[str, Any]]:
        """Return those under way, then the last that ended, newest first."""
        running = [_row(n, self._name(job.model), job) for n, job in self._running.values()]
        order = sorted(
            [*running, *self._recent], key=lambda row: (row["status"] is not None, -row["n"])
        )
        return order[:N_RECENT]

    @property
    def n_running(self) -> int:
        """Requests under way."""
        return len(self._running)

    def totals(self, model: str) -> dict[str, Any]:
        """Return what was counted of a model: tokens, answers by adapter, tokens by writer.

        An answer by several adapters counts for each of them.
        """
        return {
            "tokens": self._tokens[model],
            "answers": {who: n for (name, who), n in self._answers.items() if name == model},
            "tokens_by": {who: n for (name, who), n in self._by_writer.items() if name == model},
        }

    def _name(self, model: str) -> str:
        """Return the name of a model only if it is configured: others were made up by clients."""
        return model if model in self._models.names else "?"

    def _count(self, model: str, generation: Generation) -> None:
        told = generation.stats.adapters or {}
        used = told.get("used")
        for adapter in used if isinstance(used, Mapping) and used else ("none",):
            known = (model, adapter) in self._answers or len(self._answers) < MAX_NAMES
            self._answers[model, adapter if known else OTHERS] += 1
        for part in generation.stats.steps or ():
            self._by_writer[model, part.model] += part.n_tokens


def _row(number: int, model: str, job: Job) -> dict[str, Any]:
    answers = job.generations
    told = answers[-1].stats if answers else None
    end = job.ended if job.ended is not None else time.monotonic()
    return {
        "n": number,
        "endpoint": job.endpoint,
        "model": model,
        "adapter": (answers[-1].adapter or "")[:MAX_NAME] or None if answers else None,
        "status": job.status if job.ended is not None else None,
        "streaming": job.streaming,
        "seconds": round(end - job.created, 1 if job.ended is None else 3),
        "ttft_s": None if job.first_token is None else round(job.first_token - job.created, 4),
        "n_prompt": job.n_prompt,
        "n_cached": None if told is None else told.n_cached,
        "n_generated": job.n_generated,
        "tok_s": _speed(job, answers),
        "hit_ratio": None if told is None else _ratio(told.experts),
        "steps": _writers(answers),
        "layers": None if told is None else _layers(told),
    }


def _speed(job: Job, answers: Sequence[Generation]) -> float | None:
    """Tokens per second of a request: as the engine measured it, or as it goes so far."""
    if len(answers) == 1 and answers[0].stats.decode_tok_s > 0:
        return round(answers[0].stats.decode_tok_s, 2)
    first, last = job.first_token, job.last_token
    if first is None or last is None or last <= first:
        return None
    return round(max(0, job.n_generated - 1) / (last - first), 2)


def _ratio(figures: Mapping[str, Any] | None) -> float | None:
    return None if figures is None else figures.get("hit_ratio")


def _layers(told: GenerationStats) -> list[Any] | None:
    if told.depth is None:
        return None
    return [told.depth.get("layers_run"), told.depth.get("layers_total")]


def _writers(answers: Sequence[Generation]) -> dict[str, int] | None:
    """Tokens that each model of a pair wrote; None where one wrote alone."""
    parts = [part for each in answers for part in each.stats.steps or ()]
    if not parts:
        return None
    found: Counter[str] = Counter()
    for part in parts:
        found[part.model] += part.n_tokens
    return dict(found)
