"""Which of several models answers a query: the cheapest that is capable of it.

A profile states what a model can do, 0 to 1 on a few dimensions; a query demands some of each.
What a model lacks, weighed and summed, is its shortfall. The cheapest model whose shortfall is
within a tolerance is taken, and where there is none, the one that lacks least. What feedback
taught comes in as numbers: how much better or worse than its profile a model did.

The demand is estimated from marks in the text: digits, operators, code, words of a few kinds,
length. That is a heuristic, and its words are English; in other languages only digits, marks
and length count. It is the prior that feedback corrects, not a measurement.

Source: HyDRA, arXiv 2605.17106, for profiles and shortfall matching. Departures: it predicts
the demand with a trained encoder and learns nothing afterwards.
"""

import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]

DIMENSIONS: Final = ("math", "code", "reasoning", "language", "instruction")
"""What profiles and demands are about, in the order of every vector here."""

MARGIN: Final = 0.02
"""Of shortfall: models that lack so little more than the best are as good, and price decides."""
MAX_CHARS: Final = 16384
"""Of a query, half from its start and half from its end, that is looked at."""
N_BUCKETS: Final = 256
"""Of hashed words."""
_MAX_WORDS: Final = 2048
_MOST: Final = 64
"""Marks of one kind beyond which more of them change nothing."""

Why = Literal["cheapest capable", "least shortfall", "most worth"]

_WORDS: Final = re.compile(r"\w+")
_MARKS: Final[tuple[tuple[str, float, str], ...]] = (
    ("math", 0.10, r"\d+"),
    ("math", 0.40, r"\d ?[-+*/^=×÷<>] ?\d"),
    ("math", 0.35, r"\b(?:sum|total|percent\w*|how many|how much|times|twice|half|average|"
                   r"equations?|solve|calculate|compute|integral|derivative|probability|"
                   r"fractions?|remainder|prime|theorem|prove|area|volume)\b"),
    ("code", 0.90, r"```"),
    ("code", 0.35, r"[{};]\s*$|=>|->|::|==|!=|\(\)|</\w"),
    ("code", 0.45, r"\b(?:def|class|return|import|function|const|void|struct|printf|lambda|elif|"
                   r"python|javascript|typescript|java|rust|golang|html|css|sql|bash|regex|"
                   r"code|program|script|bugs?|debug|compile\w*|stack ?trace|unit tests?|api)\b"),
    ("reasoning", 0.25, r"\b(?:why|how|explain|prove|proof|because|therefore|if|unless|suppose|"
                        r"assume|deduce|infer|compare|contrast|trade-?offs?|step by step|puzzle|"
                        r"logic\w*|consequences?|which of)\b"),
    ("reasoning", 0.05, r"[.?!](?:\s|$)"),
    ("language", 0.60, r"\b(?:translate|translation|paraphrase|rephrase|rewrite|proofread|"
                       r"grammar|summari[sz]e|poem|rhymes?|sonnet|essay|story|synonyms?|"
                       r"english|french|german|spanish|italian|chinese|japanese|arabic)\b"),
    ("instruction", 0.20, r"\b(?:must|exactly|at least|at most|no more than|only|never|always|"
                          r"do not|don't|without|format|json|yaml|table|bullets?|each|"
                          r"in \d+ words|step \d+)\b"),
    ("instruction", 0.20, r"^\s{0,8}(?:[-*]|\d{1,3}[.)]) "),
)  # fmt: skip
"""A dimension, what one mark of it weighs, and the mark. All run in linear time."""
_FOUND: Final = tuple(
    (DIMENSIONS.index(name), weight, re.compile(mark, re.MULTILINE))
    for name, weight, mark in _MARKS
)
_LANGUAGE: Final = DIMENSIONS.index("language")
_REASONING: Final = DIMENSIONS.index("reasoning")
_FOREIGN: Final = 4.0
"""Weight of the share of letters that are not ASCII."""
_LENGTH: Final = 0.1
"""Weight of every doubling of the length beyond 256 characters."""


def excerpt(text: str) -> str:
    """Return what is looked at of a query: all of it, or its start and its end."""
    half = MAX_CHARS // 2
    return text if len(text) <= MAX_CHARS else f"{text[:half]}\n{text[-half:]}"


def demand(text: str) -> Vector:
    """Estimate what a query asks of a model, F64 (n_dimensions,), each from 0 to below 1.

    Marks are counted and weighed to a sum s for each dimension; the demand is 1 - exp(-s). The
    same text gives the same demand everywhere.
    """
    text = excerpt(text).lower()
    sums = np.zeros(len(DIMENSIONS))
    for dimension, weight, mark in _FOUND:
        count = 0
        for _ in mark.finditer(text):
            count += 1
            if count == _MOST:
                break
        sums[dimension] += weight * count
    letters = sum(map(str.isalpha, text))
    foreign = sum(char.isalpha() and not char.isascii() for char in text)
    sums[_LANGUAGE] += _FOREIGN * foreign / max(1, letters)
    sums[_REASONING] += _LENGTH * math.log2(max(256, len(text)) / 256)
    found: Vector = 1 - np.exp(-np.minimum(sums, 8.0))
    return found


def hashed_words(text: str) -> Vector:
    """Hash a query's words to signed buckets, F64 (N_BUCKETS,): what it is about, unlearned.

    The same on every machine and in every process. A query without words gives zeros.
    """
    found = np.zeros(N_BUCKETS)
    for i, match in enumerate(_WORDS.finditer(excerpt(text).lower())):
        if i == _MAX_WORDS:
            break
        code = zlib.crc32(match[0].encode("utf-8", "replace"))
        found[code % N_BUCKETS] += 1 if code & 1 << 31 else -1
    return found


def shortfall(demanded: Vector, capabilities: Vector, weights: Vector) -> float:
    """Return what a model lacks for a query: Σ weight × max(0, demand - capability), at most 1.

    Args:
        demanded, capabilities: F64 (n_dimensions,), 0 to 1 each.
        weights: F64 (n_dimensions,), 0 or more each.
    """
    lacking = np.maximum(0.0, demanded - capabilities)
    return min(1.0, float(weights @ lacking))


def optimism(alpha: float, n_learned: float) -> float:
    """Return how many confidence widths a model is given on trust: alpha √ln(1 + n_learned).

    Nothing before the first feedback, so that profiles alone decide where nobody teaches; then
    more and more, so that a model which its profile sells short is tried in the end.
    """
    return alpha * math.sqrt(math.log1p(max(0.0, n_learned)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What is known of one model for one query.

    Attributes:
        name: of the model.
        price: seconds that its answer is expected to take.
        stated: its shortfall by its profile, 0 to 1.
        learned: reward by which it did better than its profile on such queries, -1 to 1.
        trust: reward it is given on trust beside that, 0 or more.
        energy: joules per token of its answer, against those of the dearest, 0 to 1.
    """

    name: str
    price: float
    stated: float
    learned: float = 0.0
    trust: float = 0.0
    energy: float = 0.0

    @property
    def shortfall(self) -> float:
        """What it lacks, as far as is known, 0 to 1."""
        return min(1.0, max(0.0, self.stated - self.learned - self.trust))

    def worth(self, weight: float) -> float:
        """What its answer is worth, 0 to 1, where energy weighs `weight` and accuracy the rest."""
        return (1.0 - weight) * (1.0 - self.shortfall) + weight * (1.0 - self.energy)


def rank(candidates: Sequence[Candidate], tolerance: float) -> tuple[tuple[Candidate, Why], ...]:
    """Order models by who should be asked first, and say why each stands where it does.

    First those whose shortfall is within `tolerance`, the cheapest first. Then the others, by
    shortfall; those within MARGIN of the least of them count as equal, and go by price.

    Raises:
        ValueError: there is no candidate, which is a bug of the caller's.
    """
    if not candidates:
        raise ValueError("a pool without models ranks nothing")
    capable = [each for each in candidates if each.shortfall <= tolerance]
    others = [each for each in candidates if each.shortfall > tolerance]
    capable.sort(key=lambda each: (each.price, each.shortfall, each.name))
    least = min((each.shortfall for each in others), default=0.0)

    def order(each: Candidate) -> tuple[float, float, str]:
        lack = each.shortfall if each.shortfall > least + MARGIN else least
        return lack, each.price, each.name

    others.sort(key=order)
    first: list[tuple[Candidate, Why]] = [(each, "cheapest capable") for each in capable]
    return (*first, *((each, "least shortfall") for each in others))


def rank_by_worth(
    candidates: Sequence[Candidate], weight: float
) -> tuple[tuple[Candidate, Why], ...]:
    """Order models by what their answers are worth in accuracy and energy, the best first.

    Args:
        candidates: with their energies, see `relative`.
        weight: of energy, above 0 to 1; of 0, `rank` knows more.

    Raises:
        ValueError: there is no candidate, which is a bug of the caller's.

    Source: GreenServ's reward, (1 - w) accuracy + w (1 - energy per token). Departures: energy is
    taken against the dearest model's instead of between least and most, so that two that cost
    nearly the same count so; and it is learned apart from accuracy, from every answer.
    """
    if not candidates:
        raise ValueError("a pool without models ranks nothing")
    found = sorted(candidates, key=lambda each: (-each.worth(weight), each.price, each.name))
    return tuple((each, "most worth") for each in found)


def relative(joules: Mapping[str, float]) -> dict[str, float]:
    """Set energies against the greatest of them, 0 to 1."""
    most = max(joules.values(), default=0.0)
    return {name: each / most if most > 0 else 0.0 for name, each in joules.items()}
