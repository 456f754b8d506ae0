"""Answers written by two models as paths in a tree, every node of which is computed once.

A node is what one model does with one beginning of an answer: write on to the end of the step,
look at it, or read what the other drafted. Policies that come to the same beginning share what
follows. Nodes go to a journal line by line, so that a run that was stopped goes on, and so that
any policy whose nodes are all there can be played again without a model.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from edgeroute.runtime.errors import UsageError
from edgeroute.skippers.steps import Who
from edgeroute.tools.questions import KINDS, Question, key_of

Want = Literal["write", "glance", "score", "judge"]
"""What a model does: writes to the step's end, looks at the next token only, gives its
log-probabilities of a draft, or marks it."""

HEAD: Final = {"journal": "steps", "version": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What a policy wants to know next.

    Attributes:
        who: the model.
        want: see Want.
        tokens: of the answer so far.
        draft: what the other wrote behind them, of a `score` or `judge`.
        sample: which random answer; None is the likeliest token each time.
    """

    who: Who
    want: Want
    tokens: tuple[int, ...]
    draft: tuple[int, ...] = ()
    sample: int | None = None

    @property
    def key(self) -> str:
        """Name it among those of a question."""
        said = " ".join(map(str, self.tokens)) + "|" + " ".join(map(str, self.draft))
        digest = hashlib.sha256(said.encode()).hexdigest()[:20]
        return f"{self.who} {self.want} {self.sample} {digest}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What a model answered.

    Attributes:
        tokens: written, an end-of-answer token included; of a score, what it would have written
            in place of each drafted token and behind the last.
        pieces: text of each of these tokens, a character per byte; none of one that ends the
            answer.
        ended: whether the answer ends with the last token.
        stopped: whether a draft ended within its step, since its writer was unsure.
        entropy, top_entropy, margin: of the distribution that each written token was drawn from,
            over all and over the 20 likeliest, in nats; of a glance one each.
        logprob: of each written or drafted token, in nats.
        best: of a score, the log-probability of what it would have written in each place.
        mark: the expected mark of a judge, 0 to 9.
        n_read: tokens of the judge's own text.
    """

    tokens: tuple[int, ...] = ()
    pieces: tuple[str, ...] = ()
    ended: bool = False
    stopped: bool = False
    entropy: tuple[float, ...] = ()
    top_entropy: tuple[float, ...] = ()
    margin: tuple[float, ...] = ()
    logprob: tuple[float, ...] = ()
    best: tuple[float, ...] = ()
    mark: float = 0.0
    n_read: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A question in a journal.

    Attributes:
        key: of it, see `key_of`.
        kind, level, text, answer: of the question.
        n_own: tokens of its prompt behind those that all prompts of its kind begin with.
    """

    key: str
    kind: str
    level: int
    text: str
    answer: str
    n_own: int

    @property
    def question(self) -> Question:
        """The question itself, to judge answers by."""
        return Question(kind=self.kind, level=self.level, form="steps", text=self.text,
                        answer=self.answer, cue="", example=KINDS[self.kind].example)  # fmt: skip


@dataclass(slots=True)
class Journal:
    """Nodes by question, and the file that new ones are added to.

    Attributes:
        path: the file; None keeps them in memory only.
        asked: questions by key, in the order in which they came.
        nodes: by the question's key and the ask's.
    """

    path: Path | None = None
    asked: dict[str, Asked] = field(default_factory=dict)
    nodes: dict[tuple[str, str], Node] = field(default_factory=dict)

    def find(self, key: str, ask: Ask) -> Node | None:
        """Return a node if it is known: a glance is where the small model wrote on from there."""
        node = self.nodes.get((key, ask.key))
        if node is None and ask.want == "glance":
            node = self.nodes.get((key, dataclasses.replace(ask, want="write").key))
        return node

    def begin(self, asked: Asked) -> None:
        """Note a question, once."""
        if asked.key not in self.asked:
            self.asked[asked.key] = asked
            self._write({"question": asdict(asked)})

    def add(self, key: str, ask: Ask, node: Node) -> None:
        """Note a node of a question that was begun."""
        self.nodes[key, ask.key] = node
        said = {name: value for name, value in asdict(node).items() if value not in ((), 0, False)}
        self._write({"q": key, "ask": ask.key, "node": said})

    def _write(self, line: dict[str, object]) -> None:
        if self.path is None:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, separators=(",", ":")) + "\n")


def open_journal(path: Path) -> Journal:
    """Read a journal to go on with, or begin one; a last line that was cut off is dropped.

    Raises:
        UsageError: the file is no journal of steps.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(HEAD) + "\n", encoding="utf-8")
    journal = read_journals([path])
    text = path.read_bytes()
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        with path.open("r+b") as file:
            file.truncate(whole)
    journal.path = path
    return journal


def read_journals(paths: Sequence[Path]) -> Journal:
    """Read journals as one, leaving out last lines that were cut off.

    Raises:
        UsageError: a file is no journal of steps.
    """
    journal = Journal()
    for path in paths:
        head, *lines = path.read_text(encoding="utf-8").split("\n")
        if _parsed(path, head) != HEAD:
            raise UsageError(f"{path} is no journal of steps; give another file")
        for line in lines[:-1]:  # what follows the last line break is empty, or was cut off
            _take(journal, path, _parsed(path, line))
    return journal


def _parsed(path: Path, line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{path} holds a line that is no JSON: {line[:60]!r}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path} holds a line that is no object: {line[:60]!r}")
    return found


def _take(journal: Journal, path: Path, line: dict[str, Any]) -> None:
    try:
        if "question" in line:
            asked = Asked(**line["question"])
            if key_of(asked.question) != asked.key:
                raise UsageError(
                    f"{path} asks {asked.text[:60]!r} with another prompt than it has now; "
                    "begin another journal"
                )
            journal.asked[asked.key] = asked
        else:
            fields: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in line["node"].items()
            }
            journal.nodes[str(line["q"]), str(line["ask"])] = Node(**fields)
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} holds a line that is no step: {str(line)[:60]!r}") from error
