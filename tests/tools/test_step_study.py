"""Step policies played over a tree: the same answers as step by step, counted in full."""

import contextlib
import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edgeroute.runtime.errors import UsageError
from edgeroute.skippers.step_bounds import StepBounds
from edgeroute.skippers.step_policies import parse_steps
from edgeroute.skippers.step_signals import entropy, glance, margin
from edgeroute.skippers.steps import StepPart, Who
from edgeroute.tools import step_compare, step_study
from edgeroute.tools.questions import Draw, key_of, make_questions
from edgeroute.tools.step_compare import Costs, gather, pairs, parse_costs, rows
from edgeroute.tools.step_play import MAX_TOKENS, Passes, Played, play, replay
from edgeroute.tools.step_study import Study, Task
from edgeroute.tools.step_tree import Ask, Asked, Journal, Node, open_journal, read_journals
from edgeroute.tools.step_tried import parse_tried
from edgeroute.tools.step_writers import StepWriter, open_writer, signals
from edgeroute.tools.synth import make

QUESTION = make_questions(1, 1, ["words"], Draw(form="steps"))[0]
ASKED = Asked(key=key_of(QUESTION), kind="words", level=QUESTION.level, text=QUESTION.text,
              answer=QUESTION.answer, n_own=30)  # fmt: skip


# --- plays, over nodes made up here -------------------------------------------------------


def letters(text: str) -> tuple[int, ...]:
    return tuple(ord(letter) for letter in text)


SMALL = "one two.\n\nthree four.\n\nfive."
LARGE = "ONE TWO.\n\nTHREE FOUR.\n\nFIVE."
STEPS = (0, 10, 23, 28)


def answered(ask: Ask) -> Node:
    """A small model that writes lower case, a large one that writes upper case and dislikes `t`."""
    at = len(ask.tokens)
    if ask.want == "glance":
        return Node(entropy=(float(STEPS.index(at)),), top_entropy=(0.5,), margin=(1.0,))
    if ask.want == "score":
        own = [letter.upper() if letter == "t" else letter for letter in map(chr, ask.draft)]
        own += LARGE[at + len(own) :][:1]
        return Node(tokens=letters("".join(own)), pieces=tuple(own), best=(-0.1,) * len(ask.draft),
                    logprob=tuple(-9.0 if chr(t) == "t" else -0.1 for t in ask.draft))  # fmt: skip
    if ask.want == "judge":
        return Node(mark=3.0 if ord("t") in ask.draft else 8.0, n_read=20)
    text = SMALL if ask.who == "small" else LARGE
    end = next(end for end in STEPS if end > at)
    n = end - at
    return Node(
        tokens=letters(text[at:end]), pieces=tuple(text[at:end]), ended=end == STEPS[-1],
        entropy=(1.0,) * n, top_entropy=(0.5,),
        logprob=tuple(-1.0 if letter == "t" else -0.1 for letter in text[at:end]),
        margin=tuple(0.1 if letter in "tE" else 5.0 for letter in text[at:end]),
    )  # fmt: skip


def played(spec: str, draw: int = 0) -> Played:
    steps = play(ASKED, parse_tried(spec), draw=draw)
    try:
        ask = next(steps)
        while True:
            ask = steps.send(answered(ask))
    except StopIteration as done:
        found: Played = done.value
        return found


def n_read(found: Played, who: Who) -> int:
    return sum(k * n for k, n in found.sizes[who].items())


def test_one_model_alone_reads_everything_once() -> None:
    for spec, text, other in (("small", SMALL, "large"), ("large", LARGE, "small")):
        found = played(spec)
        assert found.text == text
        assert [(part.model, part.n_tokens) for part in found.parts] == [
            (spec, 10), (spec, 13), (spec, 5)
        ]  # fmt: skip
        # the question in one pass gives the first token, the last one is never read
        assert found.sizes[spec] == Counter({1: 27, 30: 1})  # type: ignore[index]
        assert not found.sizes[other]  # type: ignore[index]
        assert found.n_calls == (3 if spec == "large" else 0)


def test_a_glimpse_decides_and_the_reader_catches_up() -> None:
    found = played("glimpse:1.5")  # the steps' entropies are 0, 1 and 2 nats
    assert found.text == SMALL[:23] + LARGE[23:]
    assert [part.entropy_nats for part in found.parts] == [0, 1, 2]
    assert found.sizes["large"] == Counter({53: 1, 1: 4})
    assert n_read(found, "small") == 30 + 23
    assert [part.read_large for part in found.parts] == [0, 0, 57]


def test_a_query_is_decided_once() -> None:
    assert played("query:0").text == LARGE
    assert played("query:0.1").text == SMALL


def test_checked_drafts_keep_what_was_agreed() -> None:
    found = played("verify:-5:-5")
    assert found.text == "one TWO.\n\nTHREE FOUR.\n\nfive."
    assert [(p.index, p.model, p.n_tokens, p.n_refused) for p in found.parts] == [
        (0, "small", 4, 6), (0, "large", 6, 0), (1, "large", 13, 13), (2, "small", 5, 0)
    ]  # fmt: skip
    # two checks of whole drafts; what a check told of the next token costs no pass of its own
    assert found.sizes["large"] == Counter({40: 1, 1: 17, 14: 1, 6: 1})
    assert found.n_refused == 19
    assert found.n_calls == 5


def test_deferred_checks_read_several_steps_at_once() -> None:
    found = played("verify:-5:-99:100")
    assert found.text == SMALL
    assert found.sizes["large"] == Counter({58: 1})
    found = played("verify:-5:-5:11")
    assert found.text == "one TWO.\n\nTHREE FOUR.\n\nfive."
    assert found.parts[0].n_refused == 19


def test_a_check_may_correct_one_token_only() -> None:
    """The check has told the large model's own token: its correction costs no pass."""
    found = played("verify:-5:-5:0:1")
    assert found.text == "one Two.\n\nThree four.\n\nfive."
    assert [(p.index, p.model, p.n_tokens, p.n_refused) for p in found.parts] == [
        (0, "small", 4, 6), (0, "large", 1, 0), (0, "small", 5, 0),
        (1, "large", 1, 13), (1, "small", 12, 0), (2, "small", 5, 0),
    ]  # fmt: skip
    assert found.sizes["large"] == Counter({40: 1, 6: 1, 13: 2, 5: 1})
    assert played("exact").sizes["large"].total() == found.sizes["large"].total()
    assert played("verify:-5:-5:0:3").text == "one TWO.\n\nTHRee four.\n\nfive."


def test_drafts_end_with_a_token_of_which_the_small_model_is_unsure() -> None:
    found = played("exact:0:0.5")
    assert found.text == played("exact").text
    assert [(p.index, p.model, p.n_tokens, p.n_refused) for p in found.parts] == [
        (0, "small", 4, 1), (0, "large", 1, 0), (0, "small", 5, 0),
        (1, "large", 1, 1), (1, "small", 12, 0), (2, "small", 5, 0),
    ]  # fmt: skip
    assert found.sizes["large"] == Counter({35: 1, 6: 1, 1: 1, 13: 1, 5: 1})


def test_the_rest_is_handed_over() -> None:
    assert played("handover:-5:-5").text == "one " + LARGE[4:]
    assert played("offset:1.1").text == SMALL[:23] + LARGE[23:]
    for text in ("handover:-5", "exact:x", "offset:inf", "offset"):
        with pytest.raises(UsageError):
            parse_tried(text)


def test_a_judge_rewrites_whole_steps() -> None:
    found = played("judge:7")
    assert found.text == LARGE[:23] + SMALL[23:]
    assert found.n_refused == 23
    assert [part.score for part in found.parts] == [3, 3, 8]
    # a check reads the draft and the judge's 20 tokens; the draft is forgotten, and the token
    # before it read again
    assert found.sizes["large"][30 + 10 + 20] == 1


def test_margins_switch_within_a_step() -> None:
    found = played("margin:1:2")
    assert found.text == "one TWO.\n\nthree four.\n\nfive."  # handed back after four sure tokens
    assert sum(part.n_tokens for part in found.parts) == len(SMALL)


def test_parts_add_up_to_passes() -> None:
    for spec in ("random:0.5", "glimpse:1", "margin:1:2", "verify:-5:-5", "judge:7",
                 "verify:-1:-5:12"):  # fmt: skip
        found = played(spec)
        for who, read in (("small", sum(p.read_small for p in found.parts)),
                          ("large", sum(p.read_large for p in found.parts))):  # fmt: skip
            assert read == n_read(found, who), spec  # type: ignore[arg-type]
        assert sum(part.n_tokens for part in found.parts) == len(found.text)


def test_passes_are_counted_by_size() -> None:
    passes = Passes(-3)
    assert [passes.reach(0), passes.reach(0), passes.reach(5), passes.reach(5, 2)] == [3, 0, 5, 2]
    passes.cut(2)
    assert passes.reach(3) == 1
    assert passes.sizes == Counter({3: 1, 5: 1, 2: 1, 1: 1})


# --- journals -----------------------------------------------------------------------------


def filled(path: Path) -> Journal:
    journal = open_journal(path)
    journal.begin(ASKED)
    for spec in ("small", "large", "glimpse:1.5"):
        steps = play(ASKED, parse_steps(spec))
        with contextlib.suppress(StopIteration):
            ask = next(steps)
            while True:
                journal.add(ASKED.key, ask, answered(ask))
                ask = steps.send(answered(ask))
    return journal


def test_a_journal_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "steps.jsonl"
    journal = filled(path)
    with path.open("a") as file:
        file.write('{"q": "cut o')
    again = open_journal(path)
    assert again.nodes == journal.nodes and again.asked == {ASKED.key: ASKED}
    assert path.read_text().endswith("}\n")
    for spec in ("small", "large", "glimpse:1.5"):
        found = replay(again, ASKED, parse_steps(spec))
        assert found == played(spec)
    assert replay(again, ASKED, parse_steps("judge:7")) is None


def test_other_files_are_no_journals(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    head = json.dumps({"journal": "steps", "version": 1})
    for text in ("", "[]\n", '{"run": 1}\n', f"{head}\nnothing\n", f"{head}\n[1]\n",
                 f'{head}\n{{"q": 1}}\n', f'{head}\n{{"question": {{"key": 1}}}}\n',
                 f'{head}\n{{"q": "a", "ask": "b", "node": {{"colour": 1}}}}\n'):  # fmt: skip
        path.write_text(text)
        with pytest.raises(UsageError):
            read_journals([path])
    other = dataclasses.asdict(dataclasses.replace(ASKED, key="0" * 16))
    path.write_text(f"{head}\n{json.dumps({'question': other})}\n")
    with pytest.raises(UsageError, match="another prompt"):
        open_journal(path)


# --- tables -------------------------------------------------------------------------------


def made(right: bool, n_large: int) -> Played:
    parts = (StepPart(index=0, model="small", n_tokens=10 - n_large),
             StepPart(index=0, model="large", n_tokens=n_large))  # fmt: skip
    sizes: dict[Who, Counter[int]] = {"small": Counter({1: 10, 4: 2}), "large": Counter({3: 2})}
    return Played(text="", right=right, near=True, parts=parts, sizes=sizes, n_calls=2)


def test_rows_and_what_lies_above_random() -> None:
    n = 40
    table = {
        "small": [[made(i < 10, 0)] for i in range(n)],
        "large": [[made(i < 30, 10)] for i in range(n)],
        "random:0.5": [[made(i < 20, 5)] for i in range(n)],
        "good:1": [[made(i < 26, 5)] for i in range(n)],
        "even:1": [[made(i % 2 == 0, 5)] for i in range(n)],
    }
    found = {row.policy: row for row in rows(table, (parse_costs("x=1,0.5,2,0.25,10"),))}
    assert found["small"].accuracy == 0.25 and found["large"].share == 1
    row = found["good:1"]
    assert row.gain == pytest.approx(0.15) and row.gain_low is not None and row.gain_low > 0.03
    even = found["even:1"]
    assert even.gain == 0 and even.gain_low is not None and even.gain_low < 0
    assert found["small"].gain is None and found["small"].near == 1
    assert row.seconds == {"x": 10 + 4 + 2 * (2 + 0.75) + 20}
    assert (row.small_written, row.small_read, row.passes, row.large_read) == (10, 8, 2, 6)
    (pair,) = pairs(table, [("good:1", "random:0.5")])
    assert pair.difference == pytest.approx(0.15) and 0.03 < pair.low < 0.15 < pair.high < 0.3
    with pytest.raises(UsageError, match="not among"):
        pairs(table, [("good:1", "best")])


def test_costs_are_read() -> None:
    assert parse_costs("slow=1,2,3,4") == Costs(
        name="slow", small=1, small_read=2, large=3, large_token=4
    )
    for text in ("", "slow", "slow=1,2,3", "slow=1,2,3,x", "slow=1,2,3,4,5,6", "slow=1,2,3,-4",
                 "slow=1,2,3,nan"):  # fmt: skip
        with pytest.raises(UsageError):
            parse_costs(text)


def test_the_table_is_printed_from_a_journal(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    filled(path)
    options = [str(path), "--pair", "glimpse:1.5,small"]
    for spec in ("small", "large", "glimpse:1.5"):
        options += ["--policy", spec]
    done = CliRunner().invoke(step_compare.main, options)
    assert done.exit_code == 0, done.output
    assert [row["policy"] for row in json.loads(done.output.splitlines()[-1])["rows"]] == [
        "small", "large", "glimpse:1.5"
    ]  # fmt: skip
    done = CliRunner().invoke(step_compare.main, [str(path), "--policy", "judge:7"])
    assert done.exit_code == 1 and "judge:7" in done.output


# --- models -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[Who, Path]:
    folder = tmp_path_factory.mktemp("pair")
    paths: dict[Who, Path] = {"small": folder / "small.gguf", "large": folder / "large.gguf"}
    for seed, path in enumerate(paths.values()):
        make("llama", path, seed=seed + 3, n_layer=2)
    return paths


@contextlib.contextmanager
def open_pair(pair: dict[Who, Path], n_slots: int) -> Iterator[dict[Who, StepWriter]]:
    with contextlib.ExitStack() as own:
        yield {who: own.enter_context(open_writer(path, n_slots)) for who, path in pair.items()}


def one(writer: StepWriter, ask: Ask) -> Node:
    writer.submit(0, QUESTION, writer.encode(QUESTION), ask)
    while True:
        for _, node in writer.advance():
            return node


def test_signals_are_those_of_the_policies() -> None:
    logits = np.random.default_rng(1).normal(0, 4, 500).astype(np.float32)
    found = signals(logits, 7)
    seen = glance(logits, 0, 0)
    exact = logits.astype(np.float64)
    assert found[0] == pytest.approx(entropy(logits), abs=1e-4)
    assert found[1] == pytest.approx(margin(logits), abs=1e-4)
    assert (seen.entropy, seen.margin) == pytest.approx(found[:2], abs=1e-4)
    assert found[2] == pytest.approx(exact[7] - np.log(np.exp(exact).sum()), abs=1e-4)


def test_writing_looking_and_reading_agree(pair: dict[Who, Path]) -> None:
    with open_pair(pair, 1) as writers:
        writer = writers["small"]
        node = one(writer, Ask(who="small", want="write", tokens=()))
        bounds = StepBounds()
        ends = [bounds.push(piece.encode("latin-1")) for piece in node.pieces]
        assert not any(ends[:-1]) and (ends[-1] or node.ended)
        columns = (node.pieces, node.entropy, node.margin, node.logprob)
        assert {len(column) for column in columns} == {len(node.tokens)}
        looked = one(writer, Ask(who="small", want="glance", tokens=()))
        assert looked.entropy[0] == pytest.approx(node.entropy[0], abs=0.1)
        score = one(writer, Ask(who="small", want="score", tokens=(), draft=node.tokens))
        assert score.logprob == pytest.approx(node.logprob, abs=0.2)
        assert score.best == pytest.approx(node.logprob, abs=0.2)  # its own likeliest tokens
        half = len(node.tokens) // 2
        rest = one(writer, Ask(who="small", want="write", tokens=node.tokens[:half]))
        close = [i for i, gap in enumerate(node.margin) if gap < 1e-3]  # may fall either way
        sure = min([*close, len(node.tokens)])
        assert rest.tokens[: max(0, sure - half)] == node.tokens[half:sure]
        again = []
        for sample in (1, 1, 2):
            one(writer, Ask(who="small", want="glance", tokens=()))  # the same cells each time
            again.append(one(writer, Ask(who="small", want="write", tokens=(), sample=sample)))
        assert again[0] == again[1] != again[2]
        judged = one(writer, Ask(who="small", want="judge", tokens=(), draft=node.tokens[:5]))
        assert 0 <= judged.mark <= 9 and judged.n_read == len(writer.judge_tail)


def test_a_study_fills_the_journal_and_goes_on(pair: dict[Who, Path], tmp_path: Path) -> None:
    questions = make_questions(4, 1, ["words", "trace"], Draw(form="steps"))
    tasks = [Task(policy=text) for text in (
        "small", "large", "glimpse:5", "random:0.5", "verify:-12:-20", "verify:-12:-20:40",
        "judge:4.5", "margin:0.05:0.3",
    )]  # fmt: skip
    path = tmp_path / "steps.jsonl"
    with open_pair(pair, 2) as writers:
        Study(writers, open_journal(path), 2).run(questions, tasks, lambda: None)
        n_passes = writers["large"].n_passes
        again = Study(writers, open_journal(path), 2)
        again.run(questions, tasks, lambda: None)
        assert again.n_done == 4 and writers["large"].n_passes == n_passes
    table = gather(read_journals([path]), [task.policy for task in tasks])
    assert all(len(answers) == 4 for answers in table.values())
    for answers in table.values():
        for (answer,) in answers:
            assert answer.n_tokens("small") + answer.n_tokens("large") <= MAX_TOKENS
    assert all(answer.n_tokens("large") == 0 for (answer,) in table["small"])
    assert all(answer.n_tokens("small") == 0 for (answer,) in table["large"])


def test_the_command_takes_a_part_of_the_questions(pair: dict[Who, Path], tmp_path: Path) -> None:
    done = {}
    for part in ("0/2", "1/2"):
        path = tmp_path / f"{part[0]}.jsonl"
        found = CliRunner().invoke(step_study.main, [
            str(pair["small"]), str(pair["large"]), "small", "-n", "3", "--slots", "2",
            "--journal", str(path), "--shard", part, "--levels", "2"])  # fmt: skip
        assert found.exit_code == 0, found.output
        done[part] = set(read_journals([path]).asked)
    assert (len(done["0/2"]), len(done["1/2"])) == (1, 2)
    assert not done["0/2"] & done["1/2"]
    wrong = CliRunner().invoke(step_study.main, [
        str(pair["small"]), str(pair["large"]), "small", "--journal", str(tmp_path / "x"),
        "--shard", "2/2"])  # fmt: skip
    assert wrong.exit_code == 1 and "shard" in wrong.output
