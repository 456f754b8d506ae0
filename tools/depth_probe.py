"""Scores depth plans against the full model, over text whose full pass is kept.

What lies below the first layer that a plan changes is the full model's, so that a plan's pass
begins there, with the residual stream that the full pass left.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from edgeroute.loaded import LoadedModel
from edgeroute.models.depth_file import DepthFile
from edgeroute.models.forward import Forward, Piece
from edgeroute.runtime.batch_shape import Span
from edgeroute.runtime.cells import Region
from edgeroute.runtime.depth import Step, Steps, all_run
from edgeroute.runtime.errors import CapacityError, ComputeError
from edgeroute.runtime.gguf import TensorInfo
from edgeroute.runtime.sampler import log_softmax
from edgeroute.runtime.weights import ResidentWeights
from edgeroute.skippers.plan import DepthPlan
from edgeroute.skippers.static import Costs

Floats = npt.NDArray[np.float32]

_ROWS_AT_ONCE: Final = 64  # of a vocabulary each
_BLOCK_TOKENS: Final = 32
_RUN: Final = Step(0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Score:
    """A plan's predictions beside the full model's, token by token: F32 (n_tokens,) each.

    Attributes:
        kl: divergence from the full model's distribution, nats.
        nats_full, nats: what the token that came costs under either.
        same: 1 where both hold the same token likeliest.
    """

    kl: Floats
    nats_full: Floats
    nats: Floats
    same: Floats

    @classmethod
    def join(cls, scores: Iterable["Score"]) -> "Score":
        """Put texts behind each other."""
        parts = list(scores)
        return cls(
            kl=np.concatenate([part.kl for part in parts]),
            nats_full=np.concatenate([part.nats_full for part in parts]),
            nats=np.concatenate([part.nats for part in parts]),
            same=np.concatenate([part.same for part in parts]),
        )

    @property
    def mean_kl(self) -> float:
        """Mean divergence; rounding may leave it a little below 0, which is 0."""
        return max(float(self.kl.mean(dtype=np.float64)), 0.0)

    @property
    def kl_error(self) -> float:
        """Standard error of the mean, by blocks of neighbours, which depend on each other."""
        n = len(self.kl) // _BLOCK_TOKENS
        if n < 2:
            return float(self.kl.std(dtype=np.float64))
        blocks = self.kl[: n * _BLOCK_TOKENS].reshape(n, -1).mean(axis=1, dtype=np.float64)
        return float(blocks.std(ddof=1)) / math.sqrt(n)

    @property
    def ppl_full(self) -> float:
        """Perplexity of the full model."""
        return math.exp(float(self.nats_full.mean(dtype=np.float64)))

    @property
    def ppl_ratio(self) -> float:
        """Perplexity over the full model's."""
        difference = float(self.nats.mean(dtype=np.float64) - self.nats_full.mean(dtype=np.float64))
        return math.exp(min(difference, 20.0))

    @property
    def top1(self) -> float:
        """Share of tokens where both hold the same one likeliest."""
        return float(self.same.mean(dtype=np.float64))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Window:
    """Text and what the full model makes of it.

    Attributes:
        tokens: n of them.
        states: residual stream before each layer and after the last, F32 (n_layer + 1, n,
            n_embd).
        logs: log-probabilities of the next token, F32 (n - 1, n_vocab).
    """

    tokens: tuple[int, ...]
    states: Floats
    logs: Floats


class Probe(Forward):
    """A forward whose residual stream between layers can be read and set.

    Takes all free cells of the model's pool. Lifetime: close it before the model.

    Raises:
        CapacityError: the model is not wholly in memory, or its cells are in use.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        if loaded.layers is not None or loaded.experts is not None:
            raise CapacityError(
                f"{loaded.file.path.name} does not fit the memory budget, but is computed hundreds "
                "of times here; raise --memory, or do this on a larger machine"
            )
        super().__init__(loaded.model, loaded.device, loaded.forward.weights, loaded.kv)
        region = loaded.kv.allocate(loaded.kv.n_cells)
        if region is None:
            raise CapacityError("all cells of the model's KV cache are needed; some are in use")
        self.region: Region = region
        self.n_layer = loaded.model.hparams.n_layer
        self._tokenizer = loaded.tokenizer

    def encode(self, text: str, special: bool) -> list[int]:
        """Turn text into token ids, `special` with what the model expects before a text."""
        return self._tokenizer.encode(text, add_special=special, parse_special=False)

    @contextlib.contextmanager
    def standing_in(self, file: DepthFile, plans: Iterable[DepthPlan]) -> Iterator[ResidentWeights]:
        """Load the stand-ins of some plans, as the engine does, until the block ends.

        Raises:
            DepthFileError: one is missing.
            CapacityError: not enough memory.
        """
        specs = [spec for plan in plans for spec in file.specs(plan.name, plan.approximated)]
        with contextlib.closing(ResidentWeights(file.file, self.device, specs)) as weights:
            weights.load()
            self.standins = weights
            try:
                yield weights
            finally:
                self.standins = None
                self.graphs.clear()

    def window(self, tokens: Sequence[int]) -> Window:
        """Run the full model over a text, layer by layer.

        Raises:
            ComputeError: the computation failed.
        """
        n, n_embd = len(tokens), self.model.hparams.n_embd
        states = np.empty((self.n_layer + 1, n, n_embd), np.float32)
        spans = [Span((), embed=True, output=False)]
        spans += [Span((step,), embed=False, output=False) for step in all_run(range(self.n_layer))]
        for i, span in enumerate(spans):
            self._compute(tokens, span)
            states[i] = self.residual(n)
        logits = self._compute(tokens, Span((), embed=False, output=True))
        return Window(tokens=tuple(tokens), states=states, logs=_logs(logits[:-1]))

    def score(self, window: Window, steps: Steps, plan: str = "") -> Score:
        """Compare a plan with the full model on a text that was run before.

        Args:
            window: of this model.
            steps: what the plan computes.
            plan: names its stand-ins.

        Raises:
            ComputeError: the computation failed, or a stand-in is missing.
        """
        logits = self.resume(window, steps, plan)
        ids = np.array(window.tokens[1:], np.int64)
        parts = [
            _compare(window.logs[at : at + _ROWS_AT_ONCE], logits[at : at + _ROWS_AT_ONCE],
                     ids[at : at + _ROWS_AT_ONCE])
            for at in range(0, len(ids), _ROWS_AT_ONCE)
        ]  # fmt: skip
        return Score.join(parts)

    def resume(self, window: Window, steps: Steps, plan: str = "") -> Floats:
        """Return a plan's logits after every token but the last, F32 (n - 1, n_vocab).

        Lifetime: valid until the next computation.
        """
        first = next((i for i, step in enumerate(steps) if step != _RUN._replace(il=i)), len(steps))
        span = Span(steps[first:], embed=False, output=True, plan=plan)
        return self._compute(window.tokens, span, window.states[first])[:-1]

    def _compute(self, tokens: Sequence[int], span: Span, state: Floats | None = None) -> Floats:
        n = len(tokens)
        piece = Piece(tokens=tokens, pos=0, region=self.region, n_out=n if span.output else 0)
        if state is not None:
            self._graph(span, self.shape([piece]))  # which makes the stream where there is none
            self.set_residual(state)
        logits = self.run([piece], [span], borrow=True)
        if logits is None:
            raise ComputeError("the computation was stopped")
        return logits


def _logs(logits: Floats) -> Floats:
    """Return log-probabilities, F32 (n_tokens, n_vocab), some rows at a time for their memory."""
    logs = np.empty(logits.shape, np.float32)
    for at in range(0, len(logits), _ROWS_AT_ONCE):
        logs[at : at + _ROWS_AT_ONCE] = log_softmax(logits[at : at + _ROWS_AT_ONCE])
    return logs


def _compare(wanted: Floats, logits: Floats, ids: npt.NDArray[np.int64]) -> Score:
    found, rows = log_softmax(logits), np.arange(len(ids))
    kl = np.einsum("ij,ij->i", np.exp(wanted), wanted - found)
    same = wanted.argmax(axis=1) == found.argmax(axis=1)
    return Score(kl=kl, nats_full=-wanted[rows, ids], nats=-found[rows, ids],
                 same=same.astype(np.float32))  # fmt: skip


def n_weights(info: TensorInfo) -> int:
    """Count the weights of a matrix."""
    return math.prod(info.ne)


def costs_of(loaded: LoadedModel, size: Callable[[TensorInfo], int] = n_weights) -> Costs:
    """Count the weights that one token is multiplied with, or what `size` gives for a matrix.

    Of routed experts, those that a token uses count.
    """
    hp, tensors = loaded.model.hparams, loaded.file.tensors
    attn, ffn, head = [0] * hp.n_layer, [0] * hp.n_layer, 0
    for spec in loaded.model.specs():
        info = tensors.get(spec.file_name)
        if info is None or spec.use not in ("mul_mat", "mul_mat_id"):
            continue
        n = size(info)
        if spec.use == "mul_mat_id" and hp.moe is not None:
            n = n * hp.moe.n_expert_used // hp.moe.n_expert
        if not spec.name.startswith("blk."):
            head += n
            continue
        _, il, name, *_ = spec.name.split(".")
        (ffn if name.startswith("ffn") else attn)[int(il)] += n
    return Costs(attn=tuple(attn), ffn=tuple(ffn), head=head)
