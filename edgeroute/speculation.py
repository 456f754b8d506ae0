"""Several tokens in a pass: drafts, their verification's bookkeeping, and what it brought.

A draft's tokens are computed as pieces of one token each, in the order of their cells: keys and
values of all are written before any attention reads them, and every piece has the shapes that it
has alone, so its logits have the bits that plain decoding would have computed. A draft may be a
tree, several guesses for one place: each sees those that it follows, in cells behind the answer's,
and those of the branch that comes true are moved to where they would have been.

The answer is that of plain decoding, sampling included. A draft is a guess without a
distribution, a point mass, and for such a guess d the rule of speculative sampling is: keep d
with the probability p(d) that the model gives it, else draw from p without d. Drawing one token
from p and comparing it with d, or with each of several, does just that. So the request's own
sampler draws at every position, grammar and penalties included, with one random number per token
of the answer: the same seed gives the same text with and without speculation.
Source: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding".
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from edgeroute.config import RunParams
from edgeroute.drafters import (
    Drafter,
    Ends,
    LookupDrafter,
    Part,
    SelfDrafter,
    SmallDrafter,
    Spans,
    tokens_of,
)
from edgeroute.models.forward import Forward
from edgeroute.models.layered import LayeredForward
from edgeroute.request import Request
from edgeroute.runtime.depth import all_run
from edgeroute.skippers.guesses import Guess
from edgeroute.skippers.speculate import LENGTHS, Speculator
from edgeroute.speculation_shadow import MOST_GUESSES, Shadows
from edgeroute.stats import Speculated

if TYPE_CHECKING:
    from edgeroute.loaded import LoadedModel

PREPARE_SHARE: Final = 0.25
"""Of the seconds that the rest of an answer would take plainly, what preparing may take."""
EDGE_LAYERS: Final = 2
"""Layers at either end that a draft never leaves out where all are in memory."""
SKIP_EVERY: Final = 4
"""Of the others, one in so many is left out then."""


class Draft(NamedTuple):
    """Guesses, who made them, and the seconds it took."""

    source: str | None
    guesses: list[Guess]
    seconds: float


class Speculation:
    """Drafts for requests that decode alone. The engine thread owns it.

    Args:
        loaded: the model, and the small one if there is one.
        params: names the source, or `auto`.
        ends: see `Ends`.
    """

    def __init__(self, loaded: "LoadedModel", params: RunParams, ends: Ends) -> None:
        self._most = most = min(LENGTHS[-1], loaded.longest_draft)
        self._small: SmallDrafter | None = None
        self._drafters: dict[str, Drafter] = {}
        asked = params.speculate
        if asked in ("auto", "lookup"):
            self._drafters["lookup"] = LookupDrafter()
        if asked in ("auto", "self"):
            self._drafters["self"] = SelfDrafter(loaded.forward, PartOfModel(loaded), ends)
        drafts = loaded.small is not None and not params.steps_on  # else it writes steps
        if asked in ("auto", "small") and loaded.small is not None and drafts:
            n_vocab = loaded.model.hparams.n_vocab
            self._small = SmallDrafter(loaded.small, n_vocab, ends)
            self._drafters["small"] = self._small
        self._asked = asked
        watched = params.levers == "proven"
        self.policy = Speculator(most, forced=asked != "auto", watched=watched)
        self.total = Speculated()
        self._shadows: Shadows | None = None
        if asked == "auto":
            self._shadows = Shadows(lambda *judged: self.policy.observe_guess(*judged))

    def draft(self, request: Request) -> Draft:
        """Guess what follows a request's tokens, as many as pay; none for a plain pass."""
        if request.speculated is None:
            request.speculated = Speculated()
        most = min(self._most, request.max_tokens - len(request.token_ids) - 1)
        if most < 1:
            return Draft(None, [], 0.0)
        self._prepare(request)
        offers: dict[str, int] = {}
        for drafter in self._drafters.values():
            offers.update(drafter.offers(request, most))
        if self._shadows is not None:
            self._guess(request, offers, self._shadows)
        began = time.perf_counter()
        choice = self.policy.choose(offers)
        if choice.source is None:
            return Draft(None, [], 0.0)
        drafter = self._drafters[choice.source.partition(".")[0]]
        guesses = drafter.draft(request, choice.n_tokens)
        return Draft(choice.source, guesses, time.perf_counter() - began)

    def begin(self, request: Request, draft: Draft) -> None:
        """Count a pass that verifies a draft, before its tokens are sampled."""
        for count in self._counts(request):
            count.passes += 1
            count.drafted += len(draft.guesses)
            count.draft_s += draft.seconds
            count.on = self.policy.on
            if draft.source is not None and draft.guesses:
                count.sources[draft.source.partition(".")[0]] += len(draft.guesses)

    def accept(self, request: Request) -> None:
        """Count a drafted token that the model drew itself."""
        for count in self._counts(request):
            count.accepted += 1

    def learn(
        self, draft: Draft, right: Sequence[bool | None], seconds: tuple[float, float]
    ) -> None:
        """Note what a pass took, and what became of a draft.

        Args:
            draft: what was verified.
            right: of each guess, whether it was right; None where the answer did not get so far.
            seconds: of the pass, and how many of them were arithmetic.
        """
        pass_s, computing_s = seconds
        self.policy.observe_pass(len(draft.guesses) + 1, pass_s, computing_s)
        if draft.source is not None and any(each is not None for each in right):
            self.policy.observe_draft(draft.source, right, (draft.seconds, pass_s))

    def end(self, request: Request) -> None:
        """Forget a request."""
        for drafter in self._drafters.values():
            drafter.end(request)
        if self._shadows is not None:
            self._shadows.end(request.id)

    def stats(self) -> dict[str, object]:
        """Return what was drafted so far and what each source brings, as plain JSON types."""
        total = self.total.to_dict() | {"on": self.policy.on}
        return {"asked": self._asked, "longest": self._most} | total | {
            "sources": self.policy.stats()
        }  # fmt: skip

    def _guess(self, request: Request, offers: dict[str, int], shadows: Shadows) -> None:
        """Judge what look-up guessed, have it guess again, and offer it once it is known."""
        tokens = tokens_of(request)
        shadows.judge(request.id, tokens)
        for name in [name for name in offers if name.startswith("lookup.")]:
            guesses = self._drafters["lookup"].draft(request, MOST_GUESSES)
            shadows.note(request.id, name, len(tokens), [each.token for each in guesses])
            if not self.policy.judged(name):
                del offers[name]

    def _counts(self, request: Request) -> list[Speculated]:
        assert request.speculated is not None
        return [request.speculated, self.total]

    def _prepare(self, request: Request) -> None:
        """Let the small model read some of the prompt, where that promises to pay."""
        small, policy = self._small, self.policy
        if small is None or not policy.wants("small"):
            return
        if self._asked == "auto":
            left = (request.max_tokens - len(request.token_ids)) * (policy.plain_s or 0.0)
            if small.missing(request) * small.token_s > PREPARE_SHARE * left:
                return
        small.prepare(request)


class PartOfModel:
    """What a model's own drafts compute: where layers stream, those that do not.

    Where there is a bridge over just those that stream, it is crossed in their place. Of a
    request under a depth plan, the plan's steps count; the others left no keys.
    """

    def __init__(self, loaded: "LoadedModel") -> None:
        self._layers = loaded.layers
        forward = loaded.forward
        self._bridge = forward.bridge if isinstance(forward, LayeredForward) else None
        self._all = all_run(range(loaded.model.hparams.n_layer))
        self._found: dict[tuple[frozenset[int], Spans | None], Part | None] = {}

    def __call__(self, request: Request) -> Part | None:
        """Return what a request's drafts compute; None if nothing can be left out."""
        streamed = frozenset[int]() if self._layers is None else self._layers.streamed
        key = (streamed, None if request.depth is None else request.depth.spans)
        if key not in self._found:
            self._found.clear()
            self._found[key] = self._choose(*key)
        return self._found[key]

    def _choose(self, streamed: frozenset[int], depth: Spans | None) -> Part | None:
        bridge = self._bridge
        if bridge is not None and depth is None and streamed == bridge.block:
            return Part(bridge.spans, bridge.end)
        steps = self._all if depth is None else depth[0].steps
        if self._layers is None:
            middle = range(EDGE_LAYERS + 1, len(self._all) - EDGE_LAYERS, SKIP_EVERY)
            left_out = frozenset(middle) or frozenset((len(self._all) // 2,))
        elif len(self._all) in streamed:  # the head would have to be read for every guess
            return None
        else:
            left_out = streamed
        kept = tuple(step for step in steps if step.il not in left_out or not step.reads)
        if len(kept) == len(steps) or not any(step.reads for step in kept):
            return None
        return Part(Forward.spans(kept, "" if depth is None else depth[0].plan))
