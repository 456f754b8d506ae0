"""Long texts with facts buried in them, and questions about them that have one exact answer."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from edgeroute.runtime.errors import UsageError

Messages = list[dict[str, str]]
Count = Callable[[Messages], int]
"""Tokens of a conversation as a model sees it."""

PEOPLE: Final = (
    "Mara", "Tomas", "Ines", "Jonas", "Petra", "Olaf", "Livia", "Bruno", "Wanda", "Emil", "Nora",
    "Felix", "Greta", "Oskar", "Tilda", "Anton", "Ruth", "Leon", "Ida", "Hugo",
)  # fmt: skip
PLACES: Final = (
    "harbour", "library", "bakery", "museum", "workshop", "greenhouse", "observatory", "mill",
    "station", "lighthouse", "archive", "theatre",
)  # fmt: skip
THINGS: Final = (
    "apples", "marbles", "stamps", "candles", "books", "lamps", "ropes", "bottles", "maps", "coins",
)  # fmt: skip
_FILLER: Final = (
    ("The grey", "A narrow", "The old", "A quiet", "The second", "An early", "The northern",
     "A small"),
    ("river", "road", "market", "winter", "garden", "bridge", "valley", "morning", "street",
     "orchard"),
    ("runs past", "was known for", "leads towards", "is older than", "lies behind",
     "never quite reached", "slowly changed"),
    ("the stone houses by the hill", "a row of tall trees", "the fields beyond the town",
     "several quiet courtyards", "the path that visitors prefer",
     "the usual noise of the square", "a long wall of red brick"),
    ("in most years", "according to the guide", "as the records say",
     "when the weather is fair", "for no clear reason", "since the flood", "after the summer"),
)  # fmt: skip
_SYSTEM: Final = "You answer from the given text."
_N_FACTS: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class LongQuestion:
    """A question about a long text: facts of its kind and of others among sentences that say
    nothing. `text` is the whole conversation, `answer` what a right reply begins with."""

    kind: str
    messages: Messages
    answer: str


def long_questions(n: int, seed: int, n_tokens: int, count: Count) -> Iterator[LongQuestion]:
    """Draw questions of equally many kinds: lookups of numbers and names, and small sums.

    Args:
        n: how many.
        seed: same seed and tokenizer, same questions.
        n_tokens: tokens that a conversation has at most, and nearly.
        count: counts them.

    Raises:
        UsageError: so many tokens do not hold the facts.
    """
    for i in range(n):
        rng = random.Random(f"{seed} {i}")
        facts, asked = _draw(rng)
        kind, question, answer = asked[i % len(asked)]
        yield LongQuestion(
            kind=kind, answer=answer, messages=_bury(rng, facts, question, (n_tokens, count))
        )


def _draw(rng: random.Random) -> tuple[list[str], list[tuple[str, str, str]]]:
    """Draw facts of every kind, and a question about each: its kind, itself, its answer."""
    people, places = rng.sample(PEOPLE, 2 * _N_FACTS + 2), rng.sample(PLACES, 2 * _N_FACTS)
    thing, other = rng.sample(THINGS, 2)
    codes, counts = rng.sample(range(100, 1000), _N_FACTS), rng.sample(range(11, 99), _N_FACTS)
    few = [rng.randrange(2, 9) for _ in range(2)]
    workers, owners, pair = people[:_N_FACTS], people[_N_FACTS:-2], people[-2:]
    facts = [f"The access code of the {p} is {c}." for p, c in zip(places, codes, strict=False)]
    facts += [f"{p} works at the {q}." for p, q in zip(workers, places[_N_FACTS:], strict=True)]
    facts += [f"{p} owns {c} {thing}." for p, c in zip(owners, counts, strict=True)]
    facts += [f"{p} has {c} {other}." for p, c in zip(pair, few, strict=True)]
    a, b, c = (rng.randrange(_N_FACTS) for _ in range(3))
    number = "Reply with the number only."
    asked = [
        ("code", f"What is the access code of the {places[a]}? {number}", str(codes[a])),
        ("count", f"How many {thing} does {owners[b]} own? {number}", str(counts[b])),
        ("name", f"Who works at the {places[_N_FACTS + c]}? Reply with the name only.", workers[c]),
        ("sum", f"{pair[0]} and {pair[1]} put their {other} together. How many {other} is that? "
                f"{number}", str(sum(few))),
    ]  # fmt: skip
    return facts, asked


def _bury(rng: random.Random, facts: list[str], question: str, size: tuple[int, Count]) -> Messages:
    """Put facts between sentences that say nothing, until a conversation is long enough."""
    n_tokens, count = size

    def whole(sentences: list[str]) -> Messages:
        content = f"Text: {' '.join(sentences)}\n\nQuestion: {question}"
        return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": content}]

    least = count(whole(facts))
    if least > n_tokens:
        raise UsageError(
            f"{n_tokens} tokens hold no text with {len(facts)} facts and a question, which take "
            f"{least}; ask for longer prompts"
        )
    filler: list[str] = []
    while count(whole(filler + facts)) <= n_tokens:
        filler.append(f"{' '.join(rng.choice(words) for words in _FILLER)}.")
    filler.pop()
    spots = sorted(rng.sample(range(len(filler) + len(facts)), len(facts)))
    for spot, fact in zip(spots, rng.sample(facts, len(facts)), strict=True):
        filler.insert(spot, fact)
    return whole(filler)
