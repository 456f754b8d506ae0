"""Dr.LLM: small routers that choose, once per prompt, which layers to skip, run or repeat.

Each routed layer has a network of one hidden layer. It sees the prompt's hidden states as they
enter the layer, averaged over windows, and scores the three choices; the scores are averaged
over the windows. The choices hold for the whole request. Source: Dr.LLM (arXiv 2510.12773).

It departs from the paper in what a network is shown. Position 0 is left out: models keep a state
there that is hundreds of times larger than elsewhere. Every other state is divided by its root
mean square, so that no token outweighs the others. Windows cover all tokens; the paper drops
the rest of T / 8, which is the end of the question. Decisions are made at prefill only.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from edgeroute.runtime.depth import Step, Steps, n_repeats
from edgeroute.runtime.errors import DepthFileError

Floats = npt.NDArray[np.float32]
Choice = Literal["skip", "run", "repeat"]

CHOICES: Final[tuple[Choice, ...]] = get_args(Choice)
"""In the order of a router's scores."""

N_WINDOWS: Final = 8
N_HIDDEN: Final = 128
MAX_HIDDEN: Final = 4096
MAX_IN_A_ROW: Final = 2
"""Consecutive layers that may be skipped. Source: Dr.LLM, the moves of its search."""

PREFIX: Final = "router/"
LIMITS: Final = "router/limits"
"""I32 [4]: RouterLimits in the order of its fields."""

_PARTS: Final = ("w1", "b1", "w2", "b2")
_NAME: Final = re.compile(r"router/blk\.(0|[1-9]\d{0,3})\.(w1|b1|w2|b2)")
_SMALLEST_POWER: Final = 1e-12


class RouterLimits(NamedTuple):
    """What routers may not do, whatever they score.

    Attributes:
        first, last: layers at either end that always run once.
        max_skips, max_repeats: of one request.
    """

    first: int = 2
    last: int = 2
    max_skips: int = 6
    max_repeats: int = 1

    def allows(self, il: int, n_layer: int) -> bool:
        """Whether a layer may be anything but run once."""
        return self.first <= il < n_layer - self.last


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerRouter:
    """One layer's network: w1 F32 (n_hidden, n_embd), b1 (n_hidden,), w2 (3, n_hidden), b2 (3,)."""

    w1: Floats
    b1: Floats
    w2: Floats
    b2: Floats

    def scores(self, pooled: Floats) -> Floats:
        """Score the choices from windows, F32 (n_windows, n_embd): F32 (3,), higher is better."""
        hidden = gelu(pooled @ self.w1.T + self.b1)
        scores: Floats = np.asarray((hidden @ self.w2.T + self.b2).mean(axis=0), np.float32)
        return scores


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DepthRouter:
    """The routers of a model by layer, and what they may not do."""

    layers: Mapping[int, LayerRouter]
    limits: RouterLimits
    n_layer: int
    n_embd: int

    def sees(self, il: int) -> bool:
        """Whether a layer has a router, so that its input is needed."""
        return il in self.layers


def gelu(x: Floats) -> Floats:
    """Return GELU in its tanh form, which torch calls approximate="tanh"; F32 of the same shape."""
    inner = np.tanh(np.float32(0.7978845608) * (x + np.float32(0.044715) * x**3))
    found: Floats = np.asarray(np.float32(0.5) * x * (np.float32(1) + inner), np.float32)
    return found


def pool(states: Floats) -> Floats:
    """Average the prompt's states over windows.

    Args:
        states: hidden states that enter a layer, F32 (n_tokens, n_embd), from position 0 on.

    Returns:
        F32 (n_windows, n_embd): N_WINDOWS of them, fewer where there are fewer tokens, none for
        a prompt of one token. Neighbouring windows differ by at most one token.

    Raises:
        DepthFileError: they are not such an array.
    """
    if states.ndim != 2 or states.dtype != np.float32:
        raise DepthFileError(f"hidden states must be F32 (n_tokens, n_embd), got {states.dtype} "
                             f"{states.shape}")  # fmt: skip
    rest = states[1:]
    n_windows = min(N_WINDOWS, len(rest))
    if not n_windows:
        return np.empty((0, states.shape[1]), np.float32)
    power = np.einsum("ij,ij->i", rest, rest) / np.float32(rest.shape[1])
    normed = rest / np.sqrt(np.maximum(power, np.float32(_SMALLEST_POWER)))[:, None]
    return np.stack([part.mean(axis=0) for part in np.array_split(normed, n_windows)])


def choose(router: DepthRouter, il: int, states: Floats, taken: Sequence[Step]) -> Choice:
    """Decide what becomes of a layer.

    Args:
        router: the model's.
        il: the layer.
        states: what enters it; see `pool`.
        taken: the steps of the layers below, which count against the limits.

    Returns:
        The best scored choice that the limits allow; `run` where the layer has no router, the
        prompt is of one token, or a score is not a number.

    Raises:
        DepthFileError: the states are of another width.
    """
    layer = router.layers.get(il)
    pooled = pool(states)
    if pooled.shape[1] != router.n_embd:
        raise DepthFileError(
            f"the routers are for states of {router.n_embd} values, these have {pooled.shape[1]}"
        )
    if layer is None or not len(pooled):
        return "run"
    scores = layer.scores(pooled)
    if not np.isfinite(scores).all():
        return "run"
    allowed = legal(router.limits, il, router.n_layer, taken)
    return max(allowed, key=lambda choice: scores[CHOICES.index(choice)])


def legal(limits: RouterLimits, il: int, n_layer: int, taken: Sequence[Step]) -> tuple[Choice, ...]:
    """Return what a layer may become after those below; running it is always first."""
    if not limits.allows(il, n_layer):
        return ("run",)
    found: list[Choice] = ["run"]
    skipped = [step for step in taken if not step.reads]
    in_a_row = {step.il for step in skipped if step.il >= il - MAX_IN_A_ROW}
    if len(skipped) < limits.max_skips and len(in_a_row) < MAX_IN_A_ROW:
        found.append("skip")
    if n_repeats(taken) < limits.max_repeats:
        found.append("repeat")
    return tuple(found)


def steps_of(il: int, choice: Choice, taken: Sequence[Step]) -> Steps:
    """Return the steps of a layer after those below, whose repetitions are counted on."""
    if choice == "skip":
        return (Step(il, attn="skip", ffn="skip"),)
    if choice == "repeat":
        return (Step(il), Step(il, repeat=n_repeats(taken) + 1))
    return (Step(il),)


def steps_from(choices: Sequence[Choice]) -> Steps:
    """Return the steps of a whole pass, one choice per layer."""
    found: Steps = ()
    for il, choice in enumerate(choices):
        found += steps_of(il, choice, found)
    return found


def choices_of(steps: Sequence[Step], n_layer: int) -> tuple[Choice, ...]:
    """Return the choice per layer that steps made by `steps_from` come from."""
    found: list[Choice] = ["run"] * n_layer
    for step in steps:
        if step.repeat:
            found[step.il] = "repeat"
        elif not step.reads:
            found[step.il] = "skip"
    return tuple(found)


def executed_ratio(steps: Sequence[Step], n_layer: int) -> float:
    """Return passes over layers as a share of the model's layers; repetitions count."""
    return sum(step.reads for step in steps) / n_layer


# reading and writing arrays


def to_arrays(router: DepthRouter) -> dict[str, npt.NDArray[np.generic]]:
    """Return a router as named arrays, from which `from_arrays` makes an equal one."""
    found: dict[str, npt.NDArray[np.generic]] = {LIMITS: np.array(router.limits, np.int32)}
    for il, layer in sorted(router.layers.items()):
        for part in _PARTS:
            found[f"{PREFIX}blk.{il}.{part}"] = getattr(layer, part)
    return found


def from_arrays(
    arrays: Mapping[str, npt.NDArray[np.generic]], n_layer: int, n_embd: int
) -> DepthRouter:
    """Read a router from arrays that nobody vouches for.

    Args:
        arrays: `router/limits` and `router/blk.{il}.{w1,b1,w2,b2}`; shapes as in LayerRouter.
        n_layer, n_embd: of the model.

    Raises:
        DepthFileError: a name, type, shape or value is wrong, or a layer may not be routed.
    """
    limits = _read_limits(arrays.get(LIMITS), n_layer)
    parts: dict[int, dict[str, Floats]] = {}
    for name, array in arrays.items():
        if name == LIMITS:
            continue
        match = _NAME.fullmatch(name)
        if match is None:
            raise DepthFileError(f"{name[:60]!r} is not the name of a part of a depth router")
        il = int(match[1])
        if not limits.allows(il, n_layer):
            raise DepthFileError(
                f"layer {il} has a router, but of {n_layer} layers only {limits.first} to "
                f"{n_layer - limits.last - 1} may be routed"
            )
        parts.setdefault(il, {})[match[2]] = _read_array(name, array)
    if not parts:
        raise DepthFileError("a depth router needs at least one layer's network, there is none")
    layers = {il: _read_layer(il, found, n_embd) for il, found in sorted(parts.items())}
    return DepthRouter(layers=MappingProxyType(layers), limits=limits, n_layer=n_layer,
                       n_embd=n_embd)  # fmt: skip


def _read_limits(array: npt.NDArray[np.generic] | None, n_layer: int) -> RouterLimits:
    if array is None or array.shape != (4,) or array.dtype != np.int32:
        raise DepthFileError(f"{LIMITS} must be 4 whole numbers of 32 bits")
    first, last, max_skips, max_repeats = (int(value) for value in array.tolist())
    if min(first, last, max_skips, max_repeats) < 0 or max(max_skips, max_repeats) > n_layer:
        raise DepthFileError(f"{LIMITS} are {array.tolist()}; each must be 0 to {n_layer}")
    if first + last >= n_layer or first < 1 or last < 1:
        raise DepthFileError(
            f"{LIMITS} keep {first} and {last} layers; at least one at each end must stay, and of "
            f"{n_layer} one must be left to route"
        )
    return RouterLimits(first=first, last=last, max_skips=max_skips, max_repeats=max_repeats)


def _read_array(name: str, array: npt.NDArray[np.generic]) -> Floats:
    if array.dtype not in (np.float32, np.float16):
        raise DepthFileError(f"{name} is of type {array.dtype}; F32 or F16 is wanted")
    found = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(found).all():
        raise DepthFileError(f"{name} holds values that are not finite")
    return found


def _read_layer(il: int, parts: Mapping[str, Floats], n_embd: int) -> LayerRouter:
    missing = [part for part in _PARTS if part not in parts]
    if missing:
        raise DepthFileError(f"the router of layer {il} lacks {missing[0]}")
    n_hidden = parts["b1"].shape[0] if parts["b1"].ndim == 1 else 0
    if not 0 < n_hidden <= MAX_HIDDEN:
        raise DepthFileError(
            f"the router of layer {il} has b1 {parts['b1'].shape}; 1 to {MAX_HIDDEN} are wanted"
        )
    wanted = {"w1": (n_hidden, n_embd), "b1": (n_hidden,), "w2": (3, n_hidden), "b2": (3,)}
    for part, shape in wanted.items():
        if parts[part].shape != shape:
            raise DepthFileError(
                f"{part} of the router of layer {il} is {parts[part].shape}, wanted {shape}"
            )
    return LayerRouter(**{part: parts[part] for part in _PARTS})
