"""`adapter="auto"`: an adapter chosen by the prompt, and what feedback teaches about it.

The engine thread owns it. POLAR's router and cache controller live in offload/; here they
meet the store, the model's own token embeddings, and the file that keeps what was learned.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import platformdirs

from edgeroute.offload.adapter_store import AdapterStore
from edgeroute.offload.features import N_FIXED, PromptFeatures
from edgeroute.offload.mixing import dynmole, remix, softmax
from edgeroute.offload.polar import AdapterRouter, Choice, PolarParams
from edgeroute.offload.polar_state import read_state, write_state
from edgeroute.runtime.errors import UsageError

MAX_REMEMBERED = 10_000
"""Answers that feedback is still taken for."""
MAX_PROMPT_TOKENS = 512
"""Of a prompt, the last tokens that the choice looks at."""
SAVE_EVERY = 64
"""Rewards between two saves, beside the one at the end."""
D_FEATURES = 32
SAMPLES = (
    "Write a short story about a lighthouse keeper and the sea.",
    "Translate to French: the weather is fine today.",
    "def add(a, b):\n    return a + b\n",
    "Question: how many legs has a spider?\nAnswer:",
    "The quick brown fox jumps over the lazy dog.",
    "Summarise the following text in one sentence.\n",
    "What is 17 times 23?",
    "Dear Sir or Madam, I am writing to ask about the order.",
    '{"name": "Ada", "age": 36, "city": "Paris"}',
    "1. Wash the rice. 2. Boil the water. 3. Wait ten minutes.",
    "Explain how a bicycle stays upright.",
    "2024-05-17 08:31:02 ERROR disk full on /var/log",
    "SELECT price FROM goods WHERE stock > 0;",
    "Turn left, then go two metres ahead and stop.",
    "The cell is the smallest unit of life.",
    "<p>Hello, <b>world</b>!</p>",
)
"""Prompts of many kinds. What tells prompts apart is what is left of them without the mean of
these: pooled embeddings of any two prompts are nearly parallel (cosine 0.7 to 0.95)."""
POLICIES = ("auto", "auto:mix", "auto:mix:equal")
"""One adapter; several by the gate's entropy (DynMoLE); the N_EQUAL best, equally (ReMix)."""
N_EQUAL = 2

Embed = Callable[[Sequence[int]], npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One choice: the prompt's features F64 (d,), what was chosen, and the factors used."""

    x: npt.NDArray[np.float64]
    choice: Choice
    mixture: Mapping[str, float]

    def to_dict(self) -> dict[str, object]:
        """Tell why, as plain JSON types."""
        choice = self.choice
        return {
            "score": round(choice.score, 6),
            "predicted_reward": round(choice.mean, 6),
            "uncertainty": round(choice.width, 6),
            "paging_cost": round(choice.cost, 6),
            "forced": choice.forced,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingSetup:
    """What the router needs to know of the model and the library.

    Attributes:
        n_embd: width of a token embedding.
        encode: turns text into token ids.
        n_resident: adapters that the cache controller keeps in memory.
        identities: what tells an adapter's file from its successor, by name.
        state: where what was learned is kept; None keeps it nowhere.
        seed: of the order in which adapters equally good are tried.
    """

    n_embd: int
    encode: Callable[[str], list[int]]
    n_resident: int
    identities: Mapping[str, str]
    state: Path | None
    seed: int = 1


class AdapterRouting:
    """Chooses adapters for prompts, and keeps those in memory that the controller wants.

    Raises:
        PolarStateError: what was learned came from other features.
    """

    def __init__(self, store: AdapterStore, embed: Embed, setup: RoutingSetup) -> None:
        self._store, self._embed, self._setup = store, embed, setup
        self._features: PromptFeatures | None = None
        d = min(D_FEATURES, setup.n_embd + N_FIXED)
        params = PolarParams(d=d, space=f"pooled embeddings less samples', {setup.n_embd} to {d}")
        saved = None if setup.state is None else read_state(setup.state, set_aside=True)
        n, seed = setup.n_resident, setup.seed
        if saved is None:
            self._router = AdapterRouter(params, (), n, seed)
            for name, identity in setup.identities.items():
                self._router.add(name, params.first_load_s, identity)
        else:
            self._router = AdapterRouter.from_state(params, saved, setup.identities, n, seed)
        self._remembered: OrderedDict[str, Turn] = OrderedDict()
        self._n_unsaved = 0

    def choose(self, prompt_ids: Sequence[int], policy: str) -> Turn:
        """Choose for a prompt, and let the controller change what is kept in memory.

        Args:
            prompt_ids: the prompt.
            policy: one of POLICIES.
        """
        x = self.context(prompt_ids)
        choice = self._router.choose(x, self._store.placed)
        mixture = {} if choice.arm is None else {choice.arm: 1.0}
        if policy != "auto" and choice.arm is not None and not choice.forced:
            mixture = self._mixture(x, choice.arm, policy)
        plan = self._router.wanted()
        if plan is not None:
            self._store.keep(plan.names)
        return Turn(x=x, choice=choice, mixture=mixture)

    def _mixture(self, x: npt.NDArray[np.float64], arm: str, policy: str) -> dict[str, float]:
        """Mix the chosen adapter with those in memory, by their predicted rewards."""
        names = self._store.placed | {arm}
        gate = softmax(self._router.utilities(x, names))
        limit = self._store.n_together(names)
        return dynmole(gate, limit) if policy == "auto:mix" else remix(gate, N_EQUAL, limit)

    def context(self, prompt_ids: Sequence[int]) -> npt.NDArray[np.float64]:
        """Return a prompt's features, F64 (d,), as the router sees them."""
        if self._features is None:
            pools = [self._embed(self._setup.encode(text)).mean(axis=0) for text in SAMPLES]
            centre, d = np.mean(pools, axis=0), self._router.params.d
            self._features = PromptFeatures(self._setup.n_embd, d, centre=centre)
        pooled = self._embed(prompt_ids[-MAX_PROMPT_TOKENS:]).mean(axis=0)
        return self._features(pooled, len(prompt_ids))

    def add(self, name: str, identity: str) -> None:
        """Make an adapter a candidate; one of that name begins anew."""
        if name in self._router.names:
            self._router.remove(name)
        self._router.add(name, self._router.params.first_load_s, identity)

    def remove(self, name: str) -> None:
        """Forget an adapter."""
        self._router.remove(name)

    def paid(self, turn: Turn, seconds: float) -> None:
        """Enter what serving a choice cost beyond computing it: the load, and its prefill."""
        arm = turn.choice.arm
        if arm is not None and arm in self._router.names and turn.choice.bypass:
            self._router.paid(arm, seconds)

    def remember(self, request_id: str, turn: Turn) -> None:
        """Keep a choice until its reward comes."""
        self._remembered[request_id] = turn
        while len(self._remembered) > MAX_REMEMBERED:
            self._remembered.popitem(last=False)

    def feedback(self, request_id: str, reward: float) -> None:
        """Learn what an answer was worth, once.

        Raises:
            UsageError: no answer of that id was chosen for by `auto`, its reward was given
                already, or the reward is not a number from 0 to 1.
        """
        turn = self._remembered.get(request_id)
        if turn is None:
            raise UsageError(
                f"there is no answer {request_id!r:.80} to learn from: feedback is taken once, for "
                f"the last {MAX_REMEMBERED} answers of adapter='auto'"
            )
        arm = turn.choice.arm
        if arm is None or arm in self._router.names:  # not one that was removed meanwhile
            self._router.learn(turn.x, arm, reward)
            self._n_unsaved += 1
        del self._remembered[request_id]
        if self._n_unsaved >= SAVE_EVERY:
            self.save()

    def awaits(self, request_id: str) -> bool:
        """Tell whether an answer's feedback would be learned from."""
        return request_id in self._remembered

    def save(self) -> None:
        """Write what was learned since the last time."""
        if self._setup.state is not None and self._n_unsaved:
            self._setup.state.parent.mkdir(parents=True, exist_ok=True)
            write_state(self._setup.state, self._router.to_state())
            self._n_unsaved = 0

    def take_over(self, other: "AdapterRouting") -> None:
        """Have what another learned, for the same library, and the answers it remembers."""
        self._router, self._features = other._router, other._features
        self._remembered, self._n_unsaved = other._remembered, other._n_unsaved
        for name in set(self._router.names) - set(self._store.names):
            self._router.remove(name)

    def stats(self) -> dict[str, object]:
        """Return what the router has done, as plain JSON types."""
        return self._router.stats()


def state_path(model: Path, given: str | None) -> Path | None:
    """Return where the router of a model's adapters keeps what it learned.

    Args:
        model: the model's file.
        given: a path, `off` for nowhere, None for a file with the user's state.
    """
    if given == "off":
        return None
    if given is not None:
        return Path(given)
    key = hashlib.sha256(str(model.absolute()).encode()).hexdigest()[:16]
    folder = platformdirs.user_state_path("edgeroute", appauthor=False) / "adapters"
    return folder / f"{model.stem[:64]}-{key}.polar"
