"""What runs in a worker process: the same prompts again, and how far answers may be apart."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from edgeroute.config import merge_settings
from edgeroute.engine import Options, Runtime, Settings
from edgeroute.lever_guard import switched_off, why_no_drafts
from edgeroute.loaded import LoadedModel
from edgeroute.models.depth_file import DepthFile, find_depth_file
from edgeroute.models.forward import Piece
from edgeroute.runtime import machine
from edgeroute.runtime.errors import ComputeError, UsageError
from edgeroute.skippers.plan_json import plans_from_json
from edgeroute.stats import Generation
from edgeroute.steps_file import find_steps_file
from edgeroute.tools.bench.text import PROMPTS, TEXT
from edgeroute.tools.levers.candidates import Facts
from edgeroute.tools.perplexity import Scorer, compare, scorer_of, windows

N_CTX: Final = 1024
KL_CTX, KL_WINDOWS = 256, 4
LONG_CHARS: Final = 2400
TURN_TOKENS: Final = (8, 64)
"""Fewest and most tokens of a turn."""
PARAGRAPHS: Final = tuple(TEXT.split("\n\n")[i] for i in (0, 3, 5))
LINES: Final = (PROMPTS[1], PROMPTS[2], PROMPTS[4])
"""Prompts of prose and code, so that answers are of both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one run computes: prompts, tokens of each answer, and those of one that goes first."""

    prompts: tuple[str, ...]
    n_tokens: int
    n_warm: int = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What one run took, and what it answered."""

    decode_s: float
    n_decode: int
    prefill_s: float
    n_prefill: int
    token_ids: tuple[tuple[int, ...], ...]
    switched_off: tuple[str, ...]

    @property
    def token_s(self) -> float:
        """Seconds per decoded token."""
        return self.decode_s / self.n_decode

    @property
    def prompt_token_s(self) -> float:
        """Seconds per token of prompts."""
        return self.prefill_s / self.n_prefill


class LeverRunner:
    """A Runtime that answers prompts one after the other."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self._runtime = Runtime(path, **settings)

    def run(self, work: Work, options: Mapping[str, Any]) -> Sample:
        """Answer greedily.

        Raises:
            UsageError: the model ends its answers at once, so that there is nothing to time.
        """
        self._answer(work.prompts[0], work.n_warm, options)
        found = [self._answer(prompt, work.n_tokens, options) for prompt in work.prompts]
        stats = [each.stats for each in found]
        n_decode = sum(max(0, each.n_generated - 1) for each in stats)
        if not n_decode:
            raise UsageError("the model ends its answers at once: there is nothing to measure")
        levers = cast("Mapping[str, Any]", self._runtime.stats()["levers"])
        return Sample(
            decode_s=sum(each.decode_s for each in stats), n_decode=n_decode,
            prefill_s=sum(each.prefill_s for each in stats),
            n_prefill=sum(each.n_prompt - each.n_cached for each in stats),
            token_ids=tuple(each.token_ids for each in found),
            switched_off=tuple(switched_off(levers)),
        )  # fmt: skip

    def _answer(self, prompt: str, n_tokens: int, options: Mapping[str, Any]) -> Generation:
        given = cast("Options", {"max_tokens": n_tokens, "prefix": "off", **options})
        return self._runtime.generate(prompt, **given)

    def close(self) -> None:
        """Free everything."""
        self._runtime.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What a turn took per decoded token, and the tokens."""

    token_s: float
    token_ids: tuple[int, ...]


class TurnRunner:
    """A Runtime that goes on with one answer for some tokens whenever it is its turn.

    What is in memory of the answer so far is not computed again, so that a turn decodes at once.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        self._runtime = Runtime(path, **settings)
        self._ids: list[int] = []
        self._prompts: tuple[str, ...] = ()
        self._at = 0

    def begin(self, prompts: Sequence[str], at: int, n_warm: int = 16) -> None:
        """Begin the answer to one of some prompts, counted around; nothing of it is timed."""
        self._prompts, self._at = tuple(prompts), at
        self._restart()
        self._go_on(n_warm)

    def turn(self, n_tokens: int) -> Turn:
        """Decode some tokens more, greedily; where the answer has ended, of the next prompt's.

        What others did before that is nobody's load: it was their turn.

        Raises:
            UsageError: the model ends its answers at once, so that there is nothing to time.
        """
        self._runtime._scheduler.threads.resume()
        for _ in range(1 + len(self._prompts)):
            found = self._go_on(1 + n_tokens)  # the first token is the prompt's
            n_decode = found.stats.n_generated - 1
            if found.finish_reason != "length":
                self._at += 1
                self._restart()
            if n_decode > 0:
                return Turn(token_s=found.stats.decode_s / n_decode, token_ids=found.token_ids)
        raise UsageError("the model ends its answers at once: there is nothing to measure")

    def close(self) -> None:
        """Free everything."""
        self._runtime.close()

    def _restart(self) -> None:
        self._ids = self._runtime.encode(self._prompts[self._at % len(self._prompts)])

    def _go_on(self, n_tokens: int) -> Generation:
        found = self._runtime.generate(prompt_ids=self._ids, max_tokens=n_tokens, prefix="all")
        self._ids = [*self._ids, *found.token_ids]
        return found


class Judge:
    """Opens a model for what is asked once: which levers it has, how far settings take it."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self._path, self._settings = path, settings

    def facts(self, small: str | None) -> Facts:
        """Tell which levers there are, with these settings, and with a small model beside."""
        given: dict[str, object] = {**self._settings, "small": small}
        params = merge_settings(given)
        with contextlib.closing(LoadedModel(self._path, params)) as loaded:
            path = find_depth_file(loaded.file)
            plans: tuple[str, ...] = ()
            if path is not None:
                with DepthFile(path, loaded.file, loaded.model.hparams) as source:
                    found = plans_from_json(source.plans, loaded.model.hparams.n_layer)
                    plans = tuple(plan.name for plan in found if plan.speed and plan.speed > 1)
            beside, steps, shares = loaded.small, False, False
            if beside is not None:
                shares = beside.tokenizer is loaded.tokenizer
                pair = loaded.file.path, beside.file.path
                steps = find_steps_file(*pair, params.steps_file) is not None
            moe = loaded.model.hparams.moe is not None
            return Facts(
                pages="experts" if loaded.experts else "layers" if loaded.layers else None,
                drafts=why_no_drafts(loaded, "lookup") is None,
                repacks=moe and loaded.experts is None and bool(loaded.plan.weights.repacked),
                twofold=loaded.experts is None and bool(loaded.plan.weights.repacked),
                sidecar=_reads_sidecar(loaded), cores=machine.usable_cores(), plans=plans,
                small=small, shares=shares, steps=steps,
                adapters=tuple(loaded.adapters.store.names) if loaded.adapters else (),
            )  # fmt: skip

    def divergence(self, off: Settings, on: Settings) -> float:
        """Return the mean divergence of one configuration from another, nats per token.

        On the benchmarks' own text, which no calibration has seen.
        """
        cut = windows(self._path, [TEXT], KL_CTX)[:KL_WINDOWS]
        with contextlib.ExitStack() as own:
            theirs, mine = (self._scorer(own, settings) for settings in (off, on))
            return compare(theirs, mine, cut).kl_nats

    def close(self) -> None:
        """Nothing is held between calls."""

    def _scorer(self, own: contextlib.ExitStack, settings: Settings) -> Scorer:
        given: dict[str, object] = {**self._settings, **settings}
        params = merge_settings(given | {"n_ctx": KL_CTX, "n_kv": None, "n_ubatch": KL_CTX})
        loaded = own.enter_context(contextlib.closing(LoadedModel(self._path, params)))
        loaded.device.set_threads(params.threads or machine.usable_cores())
        depth = loaded.depth
        if depth is None:
            return scorer_of(loaded)
        region = loaded.kv.allocate(loaded.kv.n_cells)
        if region is None:
            raise ComputeError("scoring needs all cells of the model's KV cache")

        def score(window: Sequence[int]) -> Any:
            piece = Piece(tokens=window, pos=0, region=region, n_out=len(window))
            logits = depth.begin().run(loaded.forward, [piece])
            if logits is None:
                raise ComputeError("the computation was stopped")
            return logits

        return score


def _reads_sidecar(loaded: LoadedModel) -> bool:
    """Tell whether packed pages lie beside the model that can be read, in use or not."""
    if loaded.experts is None:
        return False
    return loaded.experts.stats()["sidecar"] in ("used", "no fewer reads")
