"""Plays a policy over the tree of a question: what the engine would do, and what it would cost.

Nothing is computed here. A play asks for nodes, one after another, and whoever drives it finds
them in a journal or has a model compute them. The passes of both models are counted as an engine
with two caches makes them: each model reads what it lacks when it is needed, in one pass.
"""

import re
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from edgeroute.skippers.step_bounds import StepBounds
from edgeroute.skippers.steps import (
    Agree,
    Floats,
    Glance,
    Judge,
    StepPart,
    StepPolicy,
    StepRun,
    Verify,
    Who,
)
from edgeroute.tools.questions import is_right
from edgeroute.tools.step_tree import Ask, Asked, Journal, Node

MAX_TOKENS: Final = 200
"""Tokens of an answer, at most; worked ones take half as many."""

_NUMBER: Final = re.compile(r"-?\d+(?:\.\d+)?")

Play = Generator[Ask, Node, "Played"]


@dataclass(slots=True)
class Passes:
    """What one model has read of a conversation, and the passes that took.

    Attributes:
        n_past: tokens of the answer that are in its cache; negative while it lacks a part of the
            question.
        sizes: how often it made a pass over so many tokens.
    """

    n_past: int
    sizes: Counter[int] = field(default_factory=Counter)

    def reach(self, n: int, n_more: int = 0) -> int:
        """Read the answer up to token `n`, and `n_more` others that are forgotten; return how many.

        Its next token is known then, as it is where the last pass went further and was cut.
        """
        size = n - self.n_past + n_more
        if size > 0:
            self.sizes[size] += 1
            self.n_past = n
        return max(0, size)

    def cut(self, n: int) -> None:
        """Forget tokens from `n` on."""
        self.n_past = min(self.n_past, n)


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """An answer under a policy.

    Attributes:
        text: of it.
        right: whether it is, in the form that was asked for.
        near: whether its last number is the right one, whatever the form.
        parts: who wrote what.
        sizes: for each model how often it made a pass over so many tokens.
        n_calls: how often the large model was asked for something, a step or a check.
    """

    text: str
    right: bool
    near: bool
    parts: tuple[StepPart, ...]
    sizes: dict[Who, Counter[int]]
    n_calls: int

    def n_tokens(self, who: Who) -> int:
        """Tokens of the answer that a model wrote."""
        return sum(part.n_tokens for part in self.parts if part.model == who)

    @property
    def n_refused(self) -> int:
        """Tokens that were drafted in vain."""
        return sum(part.n_refused for part in self.parts)


def play(asked: Asked, policy: StepPolicy, sample: int | None = None, draw: int = 0) -> Play:
    """Play a policy over one question, asking for nodes.

    Args:
        asked: the question.
        policy: who decides.
        sample: see Ask.
        draw: which of a policy's random choices.
    """
    run = policy.begin(int(asked.key[:12], 16) + (sample or 0) * 1009 + draw)
    return _Player(asked, run, sample).play()


def replay(journal: Journal, asked: Asked, policy: StepPolicy, sample: int | None = None,
           draw: int = 0) -> Played | None:  # fmt: skip
    """Play a policy from a journal alone; None if a node is missing there."""
    steps = play(asked, policy, sample, draw)
    try:
        ask = next(steps)
        while True:
            node = journal.find(asked.key, ask)
            if node is None:
                return None
            ask = steps.send(node)
    except StopIteration as done:
        played: Played = done.value
        return played


class _Player:
    """One answer on its way."""

    def __init__(self, asked: Asked, run: StepRun, sample: int | None) -> None:
        self._asked = asked
        self._run = run
        self._sample = sample
        self._passes: dict[Who, Passes] = {
            "small": Passes(-asked.n_own), "large": Passes(-asked.n_own)
        }  # fmt: skip
        self._tokens: list[int] = []
        self._pieces: list[str] = []
        self._parts: list[StepPart] = []
        self._bounds = StepBounds()
        self._index = 0
        self._inside = False
        self._refused: tuple[int, float] = 0, 0.0
        self._ended = False
        self._n_calls = 0
        self._read = dict.fromkeys(self._passes, 0)
        self._entropy: float | None = None

    def play(self) -> Play:
        while not self._ended:
            # a check that corrects a few tokens leaves the small model within a step
            who = "small" if self._inside else (yield from self._choose(()))
            if who == "large" or self._run.check is None:
                yield from self._write(who)
            elif isinstance(self._run.check, Judge):
                yield from self._judged(self._run.check.least)
            else:
                yield from self._verified(self._run.check)
        text = "".join(self._pieces).encode("latin-1").decode("utf-8", errors="replace")
        numbers = _NUMBER.findall(text)
        return Played(
            text=text, right=is_right(self._asked.question, text),
            near=numbers[-1:] == [self._asked.answer], parts=tuple(self._parts),
            sizes={who: passes.sizes for who, passes in self._passes.items()},
            n_calls=self._n_calls,
        )  # fmt: skip

    def _ask(self, who: Who, want: str, draft: Sequence[int] = (), behind: Sequence[int] = ()
             ) -> Generator[Ask, Node, Node]:  # fmt: skip
        self._n_calls += who == "large"
        node = yield Ask(who=who, want=want, tokens=(*self._tokens, *behind), draft=tuple(draft),  # type: ignore[arg-type]
                         sample=self._sample)  # fmt: skip
        return node

    def _reach(self, who: Who, n: int, n_more: int = 0) -> None:
        self._read[who] += self._passes[who].reach(n, n_more)

    def _choose(self, drafted: Sequence[int], n_before: int = 0) -> Generator[Ask, Node, Who]:
        """Ask the policy who writes the step that begins behind `drafted`."""
        position = len(self._tokens) + len(drafted)
        if not self._run.looks:
            self._entropy = None
            return self._run.choose(None)
        node = yield from self._ask("small", "glance", behind=drafted)
        self._reach("small", position)
        glance = Glance(index=self._index + n_before, position=position, entropy=node.entropy[0],
                        top_entropy=node.top_entropy[0], margin=node.margin[0])  # fmt: skip
        self._entropy = glance.entropy
        return self._run.choose(glance)

    def _spend(self, who: Who, start: int, n: int) -> None:
        """Count the passes in which a model writes `n` tokens from `start`."""
        for i in range(n):
            self._reach(who, start + i)

    def _keep(
        self, who: Who, node: Node, n: int, n_refused: int = 0, score: float | None = None
    ) -> None:
        """Take the first `n` tokens of a node into the answer."""
        self._tokens += node.tokens[:n]
        self._pieces += node.pieces[:n]
        self._ended = len(self._tokens) >= MAX_TOKENS or (node.ended and n == len(node.tokens))
        part = StepPart(index=self._index, model=who, n_tokens=n, n_refused=n_refused,
                        read_small=self._read["small"], read_large=self._read["large"],
                        entropy_nats=self._entropy, score=score)  # fmt: skip
        self._read = dict.fromkeys(self._passes, 0)
        self._parts.append(part)
        self._run.note(part)
        for piece in node.pieces[:n]:
            self._inside = not self._bounds.push(piece.encode("latin-1"))
            self._index += not self._inside

    def _write(self, who: Who) -> Generator[Ask, Node, None]:
        """Let a model write to the step's end, or until the policy names the other."""
        n_left = 1
        while n_left:
            node = yield from self._ask(who, "write")
            n, other = self._watch(who, node) if self._run.watches else (len(node.tokens), who)
            self._spend(who, len(self._tokens), n)
            self._keep(who, node, n)
            n_left, who = len(node.tokens) - n, other

    def _watch(self, who: Who, node: Node) -> tuple[int, Who]:
        """Ask the policy before every token but the first.

        Returns:
            How many are written until it names the other model, and that.
        """
        for i in range(1, len(node.tokens)):
            other = self._run.at_token(who, _like(node.margin[i]))
            if other != who:
                return i, other
        return len(node.tokens), who

    def _verified(self, check: Verify | Agree) -> Generator[Ask, Node, None]:
        """Let the small model draft, and the large one keep what it would have said itself."""
        drafts = [_sure(check, (yield from self._ask("small", "write")))]
        draft = list(drafts[0].tokens)
        ends: list[int] = []
        looked = [self._entropy]
        while len(draft) < check.defer and not (drafts[-1].ended or drafts[-1].stopped):
            if (yield from self._choose(draft, len(drafts))) == "large":
                break
            looked.append(self._entropy)
            ends.append(len(draft))
            drafts.append(_sure(check, (yield from self._ask("small", "write", behind=draft))))
            draft += drafts[-1].tokens
        start = len(self._tokens)
        self._spend("small", start, len(draft))
        score = yield from self._ask("large", "score", draft)
        self._reach("large", start + len(draft))
        logprobs = np.array(score.logprob, np.float32)
        if isinstance(check, Agree):
            n_kept = check.n_kept(logprobs, np.array(score.best, np.float32))
        else:
            n_kept = check.n_kept(logprobs, tuple(ends))
        for passes in self._passes.values():
            passes.cut(start + n_kept)
        if self._settle(drafts, looked, logprobs, n_kept):
            yield from self._correct(check, score, n_kept)

    def _settle(
        self, drafts: list[Node], looked: list[float | None], logprobs: Floats, n_kept: int
    ) -> bool:
        """Keep a draft's first tokens; return whether one was refused."""
        done = 0
        for node, entropy in zip(drafts, looked, strict=True):
            n, self._entropy = len(node.tokens), entropy
            mean = float(logprobs[done : done + n].mean())
            kept = min(n, n_kept - done)
            self._refused = 0, mean
            if kept == n:
                self._keep("small", node, n, score=mean)
                done += n
                continue
            self._refused = len(logprobs) - n_kept, mean
            if kept:
                self._keep("small", node, kept, *self._refused)
                self._refused = 0, mean
            return True
        return False

    def _correct(self, check: Verify | Agree, score: Node, i: int) -> Generator[Ask, Node, None]:
        """Let the large model write on from a refused token, as many tokens as the check says."""
        if check.fix == 1 and self._sample is None:  # the check has told it
            node = Node(tokens=score.tokens[i : i + 1], pieces=score.pieces[i : i + 1],
                        ended=not score.pieces[i])  # fmt: skip
        else:
            node = yield from self._ask("large", "write")
        n = min(check.fix or len(node.tokens), len(node.tokens))
        self._spend("large", len(self._tokens), n)
        self._keep("large", node, n, *self._refused)

    def _judged(self, least: float) -> Generator[Ask, Node, None]:
        """Let the small model draft a step, and the large one write it anew below a mark."""
        node = yield from self._ask("small", "write")
        start, n = len(self._tokens), len(node.tokens)
        self._spend("small", start, n)
        judged = yield from self._ask("large", "judge", node.tokens)
        self._reach("large", start + n, judged.n_read)
        if judged.mark >= least:
            self._keep("small", node, n, score=judged.mark)
            return
        self._passes["small"].cut(start)
        self._passes["large"].cut(start - 1)  # what it said after the step's first tokens is gone
        rest = yield from self._ask("large", "write")
        self._spend("large", start, len(rest.tokens))
        self._keep("large", rest, len(rest.tokens), n, judged.mark)


def _one_of(score: Node, i: int) -> Node:
    """Return what the large model would have written at a place of a draft."""
    tokens, pieces = score.tokens[i : i + 1], score.pieces[i : i + 1]
    return Node(tokens=tokens, pieces=pieces, ended=pieces == ("",))


def _sure(check: Verify | Agree, node: Node) -> Node:
    """Return what is drafted of a step: no more than a token of which its writer is unsure."""
    if not isinstance(check, Agree) or not check.sure:
        return node
    weak = np.flatnonzero(np.array(node.logprob) < np.log(check.sure))
    n = int(weak[0]) + 1 if len(weak) else len(node.tokens)
    if n == len(node.tokens):
        return node
    return Node(tokens=node.tokens[:n], pieces=node.pieces[:n], stopped=True)


def _like(margin: float) -> Floats:
    """Return logits with a margin: all that a policy takes from them."""
    return np.array([margin, 0.0], np.float32)
