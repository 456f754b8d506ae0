"""Prompts computed in part (FTP): what is saved, and what answers to questions about them lose.

Each question is put to the full model and to every rule of choice at the same share of tokens.
An answer is right where greedy decoding would write it whole: its tokens are the likeliest,
each after the ones before, which one pass over the answer tells.
"""

import contextlib
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from edgeroute.config import RunParams
from edgeroute.loaded import LoadedModel
from edgeroute.models.forward import Piece
from edgeroute.runtime.batch_shape import Span
from edgeroute.runtime.cells import Region, round_cells
from edgeroute.runtime.depth import Steps, all_run
from edgeroute.runtime.errors import ComputeError
from edgeroute.runtime.sampler import log_softmax
from edgeroute.runtime.template import encode_chat
from edgeroute.runtime.token_choice import BY_ATTENTION, TokenRule
from edgeroute.skippers.prune import BY_POSITION, at_random, pruned
from edgeroute.tools.accuracy import compare, wilson
from edgeroute.tools.bench import pairs, report
from edgeroute.tools.bench.prune_texts import LongQuestion, Messages, long_questions
from edgeroute.tools.bench.report import BenchParams, Criterion, Report

FULL, ATTENTION = "full", "attention"
TARGET_SAVED: Final = 0.15
TARGET_LOST: Final = 0.02
"""Source: issue of the lever, after FTP's own 1 to 4 % at 22 to 30 % of tokens left out."""
N_ANSWER: Final = 32
_SEED: Final = 5

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneParams:
    """What to measure.

    Attributes:
        keep: percent of a prompt's tokens computed, in layers that leave some out.
        first: first such layer; None is a third of the layers down.
        n_questions: questions asked.
        n_tokens: tokens of a prompt.
        n_ubatch: prompt tokens computed at once; None is all of them.
    """

    keep: int = 50
    first: int | None = None
    n_questions: int = 12
    n_tokens: int = 1000
    n_ubatch: int | None = None


@dataclass(frozen=True, slots=True)
class _Outcome:
    """One question under one rule: whether it was answered rightly, and how far from the full
    model's distributions its own were, in nats per token of the answer."""

    right: bool
    kl: float


class _Asker:
    """A model with cells for one prompt and its answer."""

    def __init__(self, loaded: LoadedModel, wanted: PruneParams) -> None:
        self._loaded, self._forward = loaded, loaded.forward
        region = loaded.kv.allocate(loaded.kv.n_cells)
        assert region is not None  # nothing else is there
        self._region: Region = region
        self._n_ubatch = wanted.n_ubatch or loaded.kv.n_cells
        n_layer = loaded.model.hparams.n_layer
        first = n_layer // 3 if wanted.first is None else wanted.first
        self._whole = all_run(range(n_layer))
        self._part = pruned(self._whole, wanted.keep, first)
        self._rule: TokenRule | None = None

    def encode(self, messages: Messages) -> list[int]:
        """Encode a conversation, a model without a template seeing its texts."""
        if self._loaded.tokenizer.chat_template is None:
            return self._loaded.encode("\n".join(each["content"] for each in messages))
        return encode_chat(self._loaded.tokenizer, messages)

    def prefill(self, tokens: list[int], rule: TokenRule | None) -> Logits:
        """Compute a prompt by a rule, all of it without any; return the last token's logits."""
        if rule is not None and rule is not self._rule:
            self._forward.graphs.clear()
            self._forward.token_rule = self._rule = rule
        steps = self._whole if rule is None else self._part
        logits: Logits | None = None
        for start in range(0, len(tokens), self._n_ubatch):
            part = tokens[start : start + self._n_ubatch]
            n_out = int(start + len(part) == len(tokens))
            logits = self._run(Piece(part, start, self._region, n_out=n_out), steps)
        assert logits is not None  # no prompt is empty
        return logits

    def seconds(self, tokens: list[int], rule: TokenRule | None) -> float:
        """Time a prompt; the uncounted run builds its graphs."""
        began = time.perf_counter()
        self.prefill(tokens, rule)
        return time.perf_counter() - began

    def ask(
        self, question: LongQuestion, rules: Mapping[str, TokenRule | None]
    ) -> dict[str, _Outcome]:
        """Put a question under every rule, the full model first."""
        tokens = self.encode(question.messages)
        answer = self._loaded.tokenizer.encode(
            question.answer, add_special=False, parse_special=False
        )
        full = self._likeliness(tokens, answer, None)
        found = {}
        for name, rule in rules.items():
            logs = full if rule is None else self._likeliness(tokens, answer, rule)
            kl = float((np.exp(full) * (full - logs)).sum(axis=1).mean())
            found[name] = _Outcome(bool((logs.argmax(axis=1) == answer).all()), kl)
        return found

    def _likeliness(
        self, tokens: list[int], answer: list[int], rule: TokenRule | None
    ) -> npt.NDArray[np.float64]:
        """Compute log-probabilities at each place of the answer, given what is right before it."""
        rows = [self.prefill(tokens, rule).copy()]
        if len(answer) > 1:
            piece = Piece(answer[:-1], len(tokens), self._region, n_out=len(answer) - 1)
            rows.append(self._run(piece, self._whole))
        return log_softmax(np.concatenate(rows).astype(np.float64))

    def _run(self, piece: Piece, steps: Steps) -> Logits:
        logits = self._forward.run([piece], [Span(steps, embed=True, output=True)])
        if logits is None:
            raise ComputeError("the computation was stopped")
        return logits


def run(params: BenchParams, progress: pairs.Progress, wanted: PruneParams) -> Report:
    """Measure the time of a prompt, and answers under every rule.

    Raises:
        ModelFileError, UnsupportedModelError, CapacityError: the model cannot be loaded.
    """
    rules: dict[str, TokenRule | None] = {
        FULL: None, ATTENTION: BY_ATTENTION, "position": BY_POSITION, "random": at_random(_SEED),
    }  # fmt: skip
    with _opened(params, wanted) as asker:
        count = lambda messages: len(asker.encode(messages))  # noqa: E731
        questions = list(long_questions(wanted.n_questions, _SEED, wanted.n_tokens, count))
        tokens = asker.encode(questions[0].messages)
        progress(f"prefill of {len(tokens)} tokens")
        timed = pairs.alternate({
            name: functools.partial(asker.seconds, tokens, rules[name])
            for name in (FULL, ATTENTION)
        }, params.plan, progress)  # fmt: skip
        found = []
        for i, question in enumerate(questions):
            found.append(asker.ask(question, rules))
            said = ", ".join(f"{name} {each.kl:.4f}" for name, each in found[-1].items())
            progress(f"question {i + 1}/{len(questions)} ({question.kind}): KL {said}")
    return _report(params, wanted, timed, found)


@contextlib.contextmanager
def _opened(params: BenchParams, wanted: PruneParams) -> Iterator[_Asker]:
    n_cells = round_cells(wanted.n_tokens + wanted.n_tokens // 8 + N_ANSWER)
    settings = RunParams(n_ctx=n_cells, n_ubatch=min(wanted.n_ubatch or n_cells, 4096),
                         threads=params.threads)  # fmt: skip
    with contextlib.closing(LoadedModel(params.path, settings)) as loaded:
        loaded.device.set_threads(params.threads)
        yield _Asker(loaded, wanted)


def _report(
    params: BenchParams, wanted: PruneParams, timed: Mapping[str, pairs.Series],
    found: Sequence[Mapping[str, _Outcome]],
) -> Report:  # fmt: skip
    rights = {name: {str(i): each[name].right for i, each in enumerate(found)}
              for name in found[0]}  # fmt: skip
    n_full = max(1, sum(rights[FULL].values()))
    rows, results, lost = [], list[dict[str, object]](), {}
    for name, right in rights.items():
        n_right = sum(right.values())
        low, high = wilson(n_right, len(found))
        paired = compare(right, rights[FULL])
        kl = float(np.mean([each[name].kl for each in found]))
        lost[name] = (sum(rights[FULL].values()) - n_right) / n_full
        rows.append((name, report.spread(timed[name], 2) if name in timed else "",
                     f"{n_right}/{len(found)} [{low:.2f} to {high:.2f}]",
                     f"{paired.losses}/{paired.wins}", f"{kl:.4f}"))  # fmt: skip
        results.append({
            "rule": name, "keep": 100 if name == FULL else wanted.keep, "n": len(found),
            "n_right": n_right, "lost": paired.losses, "won": paired.wins,
            "kl_nats": report.plain(kl),
            "prefill_s": timed[name].to_dict() if name in timed else None,
        })  # fmt: skip
    saved = 1 - pairs.ratio(timed[ATTENTION], timed[FULL])
    return Report(
        bench="prune", params=params,
        columns=("rule", "prefill s", "right", "lost/won", "KL of answer"),
        rows=tuple(rows), results=results,
        criteria=(
            Criterion(what="share of prefill time saved", value=saved, limit=TARGET_SAVED),
            Criterion(what="share of right answers lost", value=lost[ATTENTION],
                      limit=TARGET_LOST, at_most=True),
            Criterion(what="share that random choice loses beyond it",
                      value=lost["random"] - lost[ATTENTION], limit=0.0),
        ),
        notes=(f"{wanted.keep} % of the tokens computed in the layers that choose; every rule "
               "computes equally many",),
    )  # fmt: skip
