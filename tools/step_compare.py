"""Tables of step policies from journals of `tools/step_study`, without a model.

Every policy is played again over the journals' nodes; questions of which a policy's nodes are
missing are left out for all. Seconds are modelled from what single passes cost, since steps that
policies share were computed once.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import click
import numpy as np
import numpy.typing as npt

from edgeroute.runtime.errors import EdgerouteError, UsageError
from edgeroute.skippers.steps import Who
from edgeroute.tools.accuracy import Doubles, bootstrap, wilson
from edgeroute.tools.step_play import Played, replay
from edgeroute.tools.step_tree import Journal, read_journals
from edgeroute.tools.step_tried import parse_tried


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What passes take, in seconds.

    Attributes:
        name: of the setting.
        small: a pass of the small model over one token.
        small_read: one over several, per token.
        large, large_token: a pass of the large model over k tokens takes large + k * large_token.
        call: before each thing that is asked of the large model.
    """

    name: str
    small: float
    small_read: float
    large: float
    large_token: float
    call: float = 0.0

    def seconds(self, played: Played) -> float:
        """Return what an answer takes, the head of its prompt being in both caches."""
        small, large = played.sizes["small"], played.sizes["large"]
        return (
            sum(n * (self.small if k == 1 else k * self.small_read) for k, n in small.items())
            + sum(n * (self.large + k * self.large_token) for k, n in large.items())
            + played.n_calls * self.call
        )


SETTINGS: Final = (
    Costs(name="resident", small=0.041, small_read=0.0178, large=0.025, large_token=0.044),
    Costs(name="paged", small=0.041, small_read=0.0178, large=0.345, large_token=0.044),
    Costs(name="remote", small=0.041, small_read=0.0178, large=0.020, large_token=0.001, call=0.3),
)
"""Of Qwen2.5-Coder 0.5B and 1.5B on one core; paged is five times the resident model's token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A policy over the common questions; figures a question are means.

    Attributes:
        policy: text of it.
        n: questions.
        accuracy, low, high: share of right answers and its 95 % interval.
        near: share of answers whose last number is right, whatever their form.
        share: of all tokens, those of the large model.
        tokens: of an answer.
        small_written, large_written: tokens that a model computed one at a time.
        small_read, large_read: tokens that it read several at a time.
        refused: tokens drafted in vain.
        passes: of the large model.
        calls: things asked of it.
        seconds: by setting.
        gain, gain_low, gain_high: accuracy beyond that of random choice at the same share of
            tokens, and its 95 % interval; None without policies to compare with.
    """

    policy: str
    n: int
    accuracy: float
    low: float
    high: float
    near: float
    share: float
    tokens: float
    small_written: float
    small_read: float
    large_written: float
    large_read: float
    refused: float
    passes: float
    calls: float
    seconds: dict[str, float]
    gain: float | None = None
    gain_low: float | None = None
    gain_high: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two policies on the same questions: the first's accuracy less the second's."""

    first: str
    second: str
    difference: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcomes:
    """What came of each question, F64 (n,), means over a policy's draws."""

    right: Doubles
    large: Doubles
    total: Doubles


Table = dict[str, list[list[Played]]]
"""For each policy, for each common question, an answer per draw."""


def gather(
    journal: Journal, policies: Sequence[str], *, sample: int | None = None, draws: int = 1,
    near: bool = False,
) -> Table:  # fmt: skip
    """Play policies on all questions whose nodes are there for every one of them.

    Args:
        journal: where answers come from.
        policies: texts, see `parse_tried`.
        sample: see Ask.
        draws: how many of a policy's random choices.
        near: whether an answer is right if its last number is, whatever its form.

    Raises:
        UsageError: there is no such question.
    """
    table: Table = {text: [] for text in policies}
    missing: Counter[str] = Counter()
    for asked in journal.asked.values():
        found: dict[str, list[Played]] = {}
        for text in policies:
            answers = [replay(journal, asked, parse_tried(text), sample, i) for i in range(draws)]
            whole = [dataclasses.replace(answer, right=answer.near) if near else answer
                     for answer in answers if answer is not None]  # fmt: skip
            if not whole:
                missing[text] += 1
                break
            found[text] = whole
        else:
            for spec, each in found.items():
                table[spec].append(each)
    if not any(table.values()):
        raise UsageError(
            f"no question was answered under all of {', '.join(table)}; missing first: "
            f"{dict(missing)}; play them by tools/step_study"
        )
    return table


def rows(table: Table, settings: Sequence[Costs] = SETTINGS, *, seed: int = 0) -> list[Row]:
    """Sum every policy up, and compare it with random choice where that was played."""
    outcomes = {spec: _outcomes(answers) for spec, answers in table.items()}
    gains = _gains(outcomes, seed)
    return [_row(spec, answers, settings, gains.get(spec)) for spec, answers in table.items()]


def pairs(table: Table, asked: Sequence[tuple[str, str]], *, seed: int = 0) -> list[Pair]:
    """Compare pairs of policies by a paired bootstrap over questions.

    Raises:
        UsageError: a policy is not in the table.
    """
    found = []
    for first, second in asked:
        for spec in (first, second):
            if spec not in table:
                raise UsageError(f"{spec} is not among the policies {', '.join(table)}")
        one, two = _outcomes(table[first]).right, _outcomes(table[second]).right

        def difference(picked: npt.NDArray[np.int64], gap: Doubles = one - two) -> Doubles:
            return np.asarray(gap[picked].mean(axis=1), np.float64)

        low, high = bootstrap(difference, len(one), seed)
        found.append(Pair(first=first, second=second, difference=float((one - two).mean()),
                          low=low, high=high))  # fmt: skip
    return found


def _outcomes(answers: Sequence[Sequence[Played]]) -> _Outcomes:
    def mean(of: Callable[[Played], float]) -> Doubles:
        return np.array([np.mean([of(played) for played in each]) for each in answers])

    return _Outcomes(
        right=mean(lambda played: played.right),
        large=mean(lambda played: played.n_tokens("large")),
        total=mean(lambda played: played.n_tokens("large") + played.n_tokens("small")),
    )


def _row(
    spec: str, answers: Sequence[Sequence[Played]], settings: Sequence[Costs],
    gain: tuple[float, float, float] | None,
) -> Row:  # fmt: skip
    every = [played for each in answers for played in each]
    n = len(answers)
    n_right = sum(float(np.mean([played.right for played in each])) for each in answers)
    low, high = wilson(round(n_right), n)

    def mean(of: Callable[[Played], float]) -> float:
        return round(float(np.mean([of(played) for played in every])), 3)

    def passes(who: Who, at_once: bool) -> float:
        return mean(lambda played: sum(
            k * times for k, times in played.sizes[who].items() if (k > 1) == at_once))  # fmt: skip

    n_large = sum(played.n_tokens("large") for played in every)
    n_tokens = n_large + sum(played.n_tokens("small") for played in every)
    above = {} if gain is None else dict(zip(("gain", "gain_low", "gain_high"), gain, strict=True))
    return Row(
        policy=spec, n=n, accuracy=round(n_right / n, 4), low=round(low, 4), high=round(high, 4),
        near=mean(lambda played: played.near), share=round(n_large / max(1, n_tokens), 4),
        tokens=round(n_tokens / len(every), 2),
        small_written=passes("small", False), small_read=passes("small", True),
        large_written=passes("large", False), large_read=passes("large", True),
        refused=mean(lambda played: played.n_refused),
        passes=mean(lambda played: played.sizes["large"].total()),
        calls=mean(lambda played: played.n_calls),
        seconds={each.name: mean(each.seconds) for each in settings}, **above,
    )  # fmt: skip


def _gains(outcomes: Mapping[str, _Outcomes], seed: int) -> dict[str, tuple[float, float, float]]:
    """Compare with random choice: a line through `small`, `large` and what lies between them."""
    line = [spec for spec in outcomes if spec in ("small", "large") or spec.startswith("random:")]
    if not {"small", "large"} <= set(line):
        return {}
    found = {}
    for spec, mine in outcomes.items():
        if spec in line:
            continue

        def gain(picked: npt.NDArray[np.int64], mine: _Outcomes = mine) -> Doubles:
            right, share = _at(mine, picked)
            theirs = [_at(outcomes[each], picked) for each in line]
            return right - _interpolated(share, theirs)

        n = len(mine.right)
        value = float(gain(np.arange(n)[None, :])[0])
        found[spec] = (round(value, 4), *(round(end, 4) for end in bootstrap(gain, n, seed)))
    return found  # type: ignore[return-value]


def _at(outcomes: _Outcomes, picked: npt.NDArray[np.int64]) -> tuple[Doubles, Doubles]:
    """Return accuracy and share of the large model's tokens, F64 (resamples,) each."""
    total = outcomes.total[picked].sum(axis=1)
    return outcomes.right[picked].mean(axis=1), outcomes.large[picked].sum(axis=1) / total


def _interpolated(share: Doubles, line: Sequence[tuple[Doubles, Doubles]]) -> Doubles:
    """Read accuracies off a line, another one for each resample."""
    rights = np.stack([right for right, _ in line])
    shares = np.stack([at for _, at in line])
    order = np.argsort(shares, axis=0, kind="stable")
    rights, shares = (np.take_along_axis(each, order, axis=0) for each in (rights, shares))
    return np.array([np.interp(at, shares[:, i], rights[:, i]) for i, at in enumerate(share)])


def show(found: Sequence[Row]) -> str:
    """Return rows as a table to read."""
    names = list(found[0].seconds)
    head = ["policy", "accuracy", "95 %", "near", "large", "tokens", "small 1+n", "large 1+n",
            "passes", "refused", *(f"{name} s" for name in names), "over random"]  # fmt: skip
    lines = [head]
    for row in found:
        gain = ""
        if row.gain is not None:
            gain = f"{row.gain:+.3f} [{row.gain_low:+.3f},{row.gain_high:+.3f}]"
        lines.append([
            row.policy, f"{row.accuracy:.3f}", f"[{row.low:.3f},{row.high:.3f}]",
            f"{row.near:.3f}", f"{row.share:.3f}", f"{row.tokens:.1f}",
            f"{row.small_written:.1f}+{row.small_read:.1f}",
            f"{row.large_written:.1f}+{row.large_read:.1f}", f"{row.passes:.1f}",
            f"{row.refused:.1f}", *(f"{row.seconds[name]:.2f}" for name in names), gain,
        ])  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def parse_costs(text: str) -> Costs:
    """Read `NAME=SMALL,SMALL_READ,LARGE,LARGE_TOKEN[,CALL]`, in seconds.

    Raises:
        UsageError: it is not written like that.
    """
    name, _, numbers = text.partition("=")
    try:
        values = [float(number) for number in numbers.split(",")]
        fields = dict(zip(("small", "small_read", "large", "large_token", "call"), values,
                          strict=False))  # fmt: skip
        if len(values) > 5 or not all(0 <= value < 1e6 for value in values):
            raise ValueError
        return Costs(name=name, **fields)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"costs are written NAME=SMALL,SMALL_READ,LARGE,LARGE_TOKEN[,CALL], got {text[:80]!r}"
        ) from error


@click.command()
@click.argument("journals", nargs=-1, required=True,
                type=click.Path(exists=True, dir_okay=False, path_type=Path))  # fmt: skip
@click.option("--policy", "policies", multiple=True, required=True, help="May be repeated.")
@click.option("--pair", "paired", multiple=True, help="Two policies to compare: A,B.")
@click.option("--costs", multiple=True,
              help="NAME=SMALL,SMALL_READ,LARGE,LARGE_TOKEN[,CALL] in seconds.")  # fmt: skip
@click.option("--kind", default=None, help="Questions of one kind only.")
@click.option("--near", is_flag=True, help="Let an answer be right if its last number is.")
@click.option("--sample", default=None, type=int, help="Which random answer.")
@click.option("--draws", default=1, show_default=True, help="Random choices of each policy.")
@click.option("--seed", default=0, show_default=True, help="Of the resampling.")
def main(**options: object) -> None:
    """Compare policies over JOURNALS; the last line printed is one JSON object."""
    try:
        _main(_Options(**options))  # type: ignore[arg-type]
    except EdgerouteError as error:
        raise click.ClickException(str(error)) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    journals: tuple[Path, ...]
    policies: tuple[str, ...]
    paired: tuple[str, ...]
    costs: tuple[str, ...]
    kind: str | None
    near: bool
    sample: int | None
    draws: int
    seed: int


def _main(options: _Options) -> None:
    journal = read_journals(options.journals)
    if options.kind is not None:
        journal.asked = {key: asked for key, asked in journal.asked.items()
                         if asked.kind == options.kind}  # fmt: skip
    table = gather(journal, options.policies, sample=options.sample, draws=options.draws,
                   near=options.near)  # fmt: skip
    settings = tuple(parse_costs(text) for text in options.costs) or SETTINGS
    found = rows(table, settings, seed=options.seed)
    asked = [(first, second) for first, _, second in (t.partition(",") for t in options.paired)]
    compared = pairs(table, asked, seed=options.seed)
    click.echo(show(found))
    for pair in compared:
        click.echo(f"{pair.first} - {pair.second}: {pair.difference:+.4f} "
                   f"[{pair.low:+.4f}, {pair.high:+.4f}]")  # fmt: skip
    click.echo(json.dumps({"rows": [asdict(row) for row in found],
                           "pairs": [asdict(pair) for pair in compared]}))  # fmt: skip


if __name__ == "__main__":
    main()
