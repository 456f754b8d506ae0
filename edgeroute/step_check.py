"""The large model looks at what the small one drafted: what of it stays, and how good it was."""

import functools
from dataclasses import dataclass
from typing import Final

import numpy as np

from edgeroute.request import Request
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.sampler import log_softmax
from edgeroute.runtime.tokenizer import Tokenizer
from edgeroute.skippers.steps import Agree, Verify
from edgeroute.step_reader import Logits, StepModel
from edgeroute.step_state import Draft, StepState

JUDGE_PROMPT: Final = (
    "\n\nHow correct and useful is the last step above, from 0 (wrong) to 9 (certainly right)? "
    "Mark: "
)
"""Read by the large model behind a drafted step; its next token's digits are the mark."""
N_MARKS: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Verdict:
    """What becomes of a draft.

    Attributes:
        tokens: the draft in the main model's vocabulary.
        n_kept: leading tokens that stay.
        n_fed: leading tokens that the main model has read.
        rows: F32 (n, n_vocab), its logits for each token; None where it made none.
        scores: by the place of a step's first token, what the check said of that step.
    """

    tokens: list[int]
    n_kept: int
    n_fed: int = 0
    rows: Logits | None = None
    scores: dict[int, float]

    def score(self, i: int) -> float | None:
        """Return what the check said of the step that the i-th token is in."""
        return next((self.scores[at] for at in sorted(self.scores, reverse=True) if at <= i), None)

    def row(self, i: int) -> Logits | None:
        """Return the large model's logits for the i-th token."""
        return None if self.rows is None or i >= len(self.rows) else self.rows[i]

    def before(self, i: int, state: StepState, request: Request) -> None:
        """Note what is known of a token before it becomes part of the answer."""
        if i in self.scores:
            state.account.checked(self.scores[i], 0)
        if self.rows is not None:
            request.sampler.note(self.rows[i], self.tokens[i])

    def after(self, i: int, state: StepState) -> None:
        """Count a token as read by the main model, if it was."""
        if i < self.n_fed:
            state.main.keep()


class Checker:
    """Checks drafts with the main model.

    Args:
        main: the model.
        same: whether drafts are in its vocabulary.
    """

    def __init__(self, main: StepModel, *, same: bool) -> None:
        self._main = main
        self._same = same

    def judge(self, request: Request, state: StepState, draft: Draft) -> Verdict | None:
        """Return what becomes of a draft; None while the model has more to read, or was stopped.

        Raises:
            UsageError: marks are asked for, and digits are no tokens of the vocabulary.
        """
        steps = self._in_main(state, draft)
        tokens = [token for step in steps for token in step][: request.n_left]
        check = state.run.check
        if check is None or not tokens:
            return Verdict(tokens=tokens, n_kept=len(tokens), scores={})
        starts = list(np.cumsum([0, *map(len, steps[:-1])]))
        if isinstance(check, Verify | Agree):
            return self._verify(request, state, tokens, [int(start) for start in starts])
        return self._mark(state, tokens, check.least, ended=draft.ended)

    def _in_main(self, state: StepState, draft: Draft) -> list[list[int]]:
        """Return a draft's steps in the main model's vocabulary."""
        if self._same or state.other is None:
            return draft.steps
        theirs, ours = state.other.reader.model.tokenizer, self._main.tokenizer
        steps = [
            ours.encode_more(b"".join(map(theirs.piece, step)).decode(errors="replace"))
            for step in draft.steps
        ]
        if draft.ended:
            steps[-1].append(_end_of(ours))
        return steps

    def _verify(
        self, request: Request, state: StepState, tokens: list[int], starts: list[int]
    ) -> Verdict | None:
        check = state.run.check
        assert isinstance(check, Verify | Agree)
        last_counts = len(tokens) < request.n_left and not self._main.tokenizer.is_eog(tokens[-1])
        fed = tokens if last_counts else tokens[:-1]  # nothing is asked about what follows an end
        rows = state.main.read(fed)
        if rows is None:
            return None
        rows = rows[: len(tokens)]
        logprobs, best = np.empty((2, len(tokens)), np.float32)
        for i, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            logs = log_softmax(row)
            logprobs[i], best[i] = logs[token], logs.max()
        starts = [start for start in starts if start < len(tokens)]
        ends = [*starts[1:], len(tokens)]
        scores = {
            start: round(float(logprobs[start:end].mean()), 6)
            for start, end in zip(starts, ends, strict=True)
            if end > start  # a step without text is none in the large model's vocabulary
        }
        n_kept = (check.n_kept(logprobs, best) if isinstance(check, Agree)
                  else check.n_kept(logprobs, tuple(ends[:-1])))  # fmt: skip
        return Verdict(tokens=tokens, n_kept=n_kept, n_fed=len(fed), rows=rows, scores=scores)

    def _mark(
        self, state: StepState, tokens: list[int], least: float, *, ended: bool
    ) -> Verdict | None:
        text = tokens[:-1] if ended else tokens
        n_cells = len(state.main.tokens) + len(text) + len(self._question)
        if n_cells > state.main.sequence.region.n_cells:  # too near the answer's end to ask
            return Verdict(tokens=tokens, n_kept=0, scores={})
        logits = state.main.read([*text, *self._question], n_out=1)
        if logits is None:
            return None
        shares = np.exp(log_softmax(logits[0][list(self._digits)].astype(np.float64)))
        mark = float(shares @ np.arange(N_MARKS))
        n_kept = len(tokens) if mark >= least else 0
        return Verdict(tokens=tokens, n_kept=n_kept, n_fed=len(text), scores={0: round(mark, 6)})

    @functools.cached_property
    def _question(self) -> list[int]:
        return self._main.tokenizer.encode_more(JUDGE_PROMPT)

    @functools.cached_property
    def _digits(self) -> tuple[int, ...]:
        found = [self._main.tokenizer.encode_more(str(digit)) for digit in range(N_MARKS)]
        if any(len(ids) != 1 for ids in found):
            raise UsageError(
                "steps='judge' needs digits that are tokens of their own in the large model's "
                "vocabulary; use verify instead"
            )
        return tuple(ids[0] for ids in found)


def _end_of(tokenizer: Tokenizer) -> int:
    """Return the token by which a model ends its turn.

    Raises:
        UsageError: it has none.
    """
    for token in (tokenizer.eot, tokenizer.eos):
        if token is not None:
            return token
    raise UsageError("the large model's vocabulary has no token that ends an answer")
