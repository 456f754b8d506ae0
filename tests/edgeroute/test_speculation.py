"""Drafted answers are plain ones: every source, resident and streamed, sampled and greedy."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgeroute import Runtime
from edgeroute.drafters import tokens_of
from edgeroute.request import Request
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import CapacityError, UsageError
from edgeroute.runtime.sequence import CLASS_SINGLE
from edgeroute.runtime.units import MIB
from edgeroute.skippers import guesses
from edgeroute.skippers.speculate import PLAIN, Choice, Speculator
from edgeroute.speculation import Speculation
from edgeroute.stats import Generation
from edgeroute.tools import synth
from tests.edgeroute.adapter_lab import make as make_adapter
from tests.edgeroute.layered_lab import plain_machine

PARAMS: dict[str, Any] = {"n_ctx": 512, "n_ubatch": 64, "threads": 1}
PROMPTS = [[*range(5, 40), *range(5, 30)], [7, 8, 9] * 30, list(range(300, 20, -2))]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.5, "seed": 3, "top_p": 0.9},
    {"temperature": 0.8, "seed": 4, "repeat_penalty": 1.3, "presence_penalty": 0.2},
    {"logprobs": 2, "logit_bias": {50: 3.0}},
]
N_TOKENS = 16
Guess = Callable[[Request, int], list[int]]


@pytest.fixture(autouse=True)
def _plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of tiny models stream."""
    plain_machine(monkeypatch)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers of 0.7 MiB."""
    found = tmp_path_factory.mktemp("speculation") / "model.gguf"
    synth.write(replace(synth.ARCHITECTURES["llama"], n_layer=6, weight_type="Q8_0"), found)
    return found


@pytest.fixture(scope="module")
def small_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, the same vocabulary."""
    found = tmp_path_factory.mktemp("speculation") / "small.gguf"
    spec = replace(synth.ARCHITECTURES["qwen2"], n_layer=2, pre="smollm", weight_type="Q8_0")
    synth.write(spec, found)
    return found


def _enough(path: Path, **settings: Any) -> int:
    """A layer and a half less than everything: two rooms, and about two layers that stay."""
    with Runtime(path, **(PARAMS | settings), speculate="off") as runtime:
        whole = runtime._loaded.plan.total_bytes
    return whole - 3 * path.stat().st_size // 14


@pytest.fixture(scope="module")
def small_bytes(path: Path, small_path: Path) -> int:
    """What the small model takes beside the large one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Device, "_find_extra_buffer_types", lambda *_: ())
        with Runtime(path, **PARAMS, small=small_path) as runtime:
            entries: Any = runtime.stats()["memory"]
            return sum(n for owner, n in entries.items() if owner.startswith("small model, "))


class _Fixed(Speculator):
    """Always the first offer, at a given length: what is tested is not when drafting pays."""

    def __init__(self, n_tokens: int) -> None:
        super().__init__(15)
        self._n_tokens = n_tokens

    def wants(self, name: str) -> bool:
        return True

    def choose(self, offers: Mapping[str, int]) -> Choice:
        for name, most in offers.items():
            return Choice(name, min(most, self._n_tokens))
        return PLAIN


class _Fake:
    """A drafter that says what a test wants."""

    def __init__(self, guess: Guess) -> None:
        self._guess = guess
        self.ended: list[str] = []

    def offers(self, request: Request, most: int) -> Mapping[str, int]:
        return {"fake": most}

    def draft(self, request: Request, n_tokens: int) -> list[guesses.Guess]:
        return guesses.chain(self._guess(request, n_tokens)[:n_tokens])

    def end(self, request: Request) -> None:
        self.ended.append(request.id)


def speculation_of(runtime: Runtime) -> Speculation:
    found = runtime._scheduler.speculation
    assert found is not None
    return found


def plant(runtime: Runtime, guess: Guess | None, n_tokens: int = 7) -> _Fake | None:
    """Draft always, and with `guess` where there is one."""
    speculation = speculation_of(runtime)
    speculation.policy = _Fixed(n_tokens)
    if guess is None:
        return None
    fake = _Fake(guess)
    speculation._drafters = {"fake": fake}
    speculation._small = None
    return fake


def knows(answers: Sequence[Generation], prompts: Sequence[list[int]], wrong: float = 0.0) -> Guess:
    """Guess what was answered before, each token wrong with some probability."""
    rng = random.Random(5)
    texts = [[*p, *a.token_ids] for p, a in zip(prompts, answers, strict=True)]

    def guess(request: Request, n_tokens: int) -> list[int]:
        tokens = tokens_of(request)
        whole = next((text for text in texts if text[: len(tokens)] == tokens), tokens)
        right = whole[len(tokens) : len(tokens) + n_tokens]
        return [t if rng.random() >= wrong else (t + 1) % 380 for t in right]

    return guess


def nonsense(request: Request, n_tokens: int) -> list[int]:
    rng = random.Random(len(tokens_of(request)))
    return [rng.randrange(380) for _ in range(n_tokens)]


def answer(runtime: Runtime, **options: Any) -> list[Generation]:
    options = {"max_tokens": N_TOKENS, "prefix": "off"} | options
    return [runtime.generate(prompt_ids=p, **options) for p in PROMPTS]


def ids(answers: Sequence[Generation]) -> list[tuple[int, ...]]:
    return [each.token_ids for each in answers]


def counts(generation: Generation) -> dict[str, Any]:
    found: Any = generation.stats.to_dict()["speculation"]
    return found  # type: ignore[no-any-return]


def reconciles(generation: Generation, *, ended: int = 0) -> bool:
    """Every token behind the first came from a pass or from an accepted guess."""
    found = counts(generation)
    n_behind = len(generation.token_ids) - 1 + ended
    return bool(
        found["passes"] + found["accepted"] == n_behind <= found["passes"] + found["drafted"]
    )


@pytest.fixture(scope="module")
def plain(path: Path) -> Iterator[list[list[Generation]]]:
    """Answers to every prompt with every set of options, undrafted, in memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Device, "_find_extra_buffer_types", lambda *_: ())
        with Runtime(path, **PARAMS, speculate="off") as runtime:
            yield [answer(runtime, **options) for options in OPTIONS]


@pytest.mark.parametrize("where", ["resident", "streamed"])
@pytest.mark.parametrize("source", ["lookup", "self", "small", "auto"])
def test_every_source_gives_the_plain_answers(
    source: str, where: str, path: Path, small_path: Path, small_bytes: int,
    plain: list[list[Generation]],
) -> None:  # fmt: skip
    settings: dict[str, Any] = {"speculate": source}
    more = 0
    if source in ("small", "auto"):
        settings["small"], more = small_path, small_bytes
    if where == "resident":
        if source == "auto":
            pytest.skip("drafts nothing, see below")
        runtime = Runtime(path, **PARAMS, **settings)
    else:
        runtime = Runtime(path, **PARAMS, **settings, memory=_enough(path) + more)
        assert runtime._loaded.layers is not None
    with runtime:
        speculation_of(runtime).policy = _Fixed(3) if source != "auto" else Speculator(15)
        for options, expected in zip(OPTIONS, plain, strict=True):
            found = answer(runtime, **options)
            assert ids(found) == ids(expected), options
            assert [f.logprobs for f in found] == [e.logprobs for e in expected]
            assert all(reconciles(each) for each in found)
        stats: Any = runtime.stats()["speculation"]
        assert stats["passes"] > 0
        if source != "auto":
            assert stats["drafted"] > 0 and stats["source"] == source


@pytest.mark.parametrize(
    ("wrong", "n_tokens"), [(0.0, 1), (0.0, 4), (0.0, 15), (0.3, 4), (0.2, 15), (1.0, 3)]
)
def test_good_bad_and_hopeless_guesses(
    wrong: float, n_tokens: int, path: Path, plain: list[list[Generation]]
) -> None:
    with Runtime(path, **PARAMS, memory=_enough(path)) as runtime:
        for options, expected in zip(OPTIONS, plain, strict=True):
            fake = plant(runtime, knows(expected, PROMPTS, wrong), n_tokens)
            found = answer(runtime, **options)
            assert ids(found) == ids(expected), options
            assert [f.logprobs for f in found] == [e.logprobs for e in expected]
            assert all(reconciles(each) for each in found)
            assert fake is not None and fake.ended == [each.id for each in found]
            accepted = sum(counts(each)["accepted"] for each in found)
            passes = sum(counts(each)["passes"] for each in found)
            n_behind = N_TOKENS - 1  # the prompt's pass gives the first
            if wrong == 0.0:
                assert passes == 3 * -(-n_behind // (n_tokens + 1)), options
            if wrong == 1.0:
                assert accepted == 0 and passes == 3 * n_behind


def test_random_guesses(path: Path, plain: list[list[Generation]]) -> None:
    with Runtime(path, **PARAMS, speculate="lookup") as runtime:
        plant(runtime, nonsense, 15)
        assert ids(answer(runtime)) == ids(plain[0])


def test_the_distribution_is_the_models_own(path: Path) -> None:
    """Two samples by other seeds: one drafted with a constant guess, one plain."""
    n, k = 90, 4
    tables = []
    with Runtime(path, **PARAMS, speculate="lookup") as runtime:
        guessed = runtime.generate(prompt_ids=PROMPTS[0], max_tokens=4).token_ids
        for drafted, guess in ((True, list(guessed[1:])), (False, list[int]())):
            plant(runtime, lambda request, n_tokens, guess=guess: guess)  # type: ignore[misc]
            table: dict[tuple[int, ...], int] = {}
            for seed in range(n):
                found = runtime.generate(
                    prompt_ids=PROMPTS[0], max_tokens=2, temperature=1.0, top_k=k,
                    seed=seed + 1000 * drafted,
                ).token_ids  # fmt: skip
                table[found[1:2]] = table.get(found[1:2], 0) + 1
            tables.append(table)
    drafted_n, plain_n = tables
    cells = drafted_n.keys() | plain_n.keys()
    assert len(cells) > 2
    chi2 = sum(
        (drafted_n.get(c, 0) - plain_n.get(c, 0)) ** 2 / (drafted_n.get(c, 0) + plain_n.get(c, 0))
        for c in cells
    )
    assert chi2 < 3 * len(cells) + 30, (chi2, tables)


def test_a_stop_string_inside_accepted_guesses(path: Path) -> None:
    letters = "root ::= [a-z]+"
    with Runtime(path, **PARAMS, memory=_enough(path)) as runtime:
        plant(runtime, lambda request, n_tokens: [])
        free = answer(runtime, grammar=letters)
        stops = [each.text[6:8] for each in free]

        def stopped(i: int) -> Generation:
            return runtime.generate(prompt_ids=PROMPTS[i], max_tokens=N_TOKENS, stop=[stops[i]],
                                    prefix="off", grammar=letters)  # fmt: skip

        expected = [stopped(i) for i in range(3)]
        plant(runtime, knows(free, PROMPTS), 15)
        for i, wanted in enumerate(expected):
            found = stopped(i)
            assert (found.text, found.token_ids) == (wanted.text, wanted.token_ids)
            assert found.finish_reason == wanted.finish_reason == "stop"
            assert len(found.token_ids) == 1 or reconciles(found)
        assert any(len(each.token_ids) > 2 for each in expected)


def test_an_end_inside_guesses_and_a_grammar(path: Path) -> None:
    """The grammar ends the answer after a few letters; the guesses would have gone on."""
    grammar = 'root ::= ("a" | "b") ("c" | "d") [e-h] "xyz" [0-9] [0-9]'
    with Runtime(path, **PARAMS, memory=_enough(path)) as runtime:
        for options in ({}, {"temperature": 2.0, "seed": 8}):
            plant(runtime, lambda request, n_tokens: [])
            expected = answer(runtime, grammar=grammar, **options)
            assert {each.finish_reason for each in expected} == {"stop"}
            going_on = [replace(each, token_ids=(*each.token_ids, 9, 9, 9)) for each in expected]
            for n_tokens in (2, 15):
                plant(runtime, knows(going_on, PROMPTS), n_tokens)
                found = answer(runtime, grammar=grammar, **options)
                assert ids(found) == ids(expected)
                assert [each.finish_reason for each in found] == ["stop"] * 3
                assert all(reconciles(each, ended=1) for each in found)


@pytest.mark.parametrize("max_tokens", [1, 2, 9, 500])
def test_the_ends_of_answer_and_context(max_tokens: int, path: Path) -> None:
    """A draft never goes behind the last token that may come, nor behind the last cell."""
    memory = _enough(path, n_ctx=256)
    with Runtime(path, **(PARAMS | {"n_ctx": 256}), memory=memory) as runtime:
        plant(runtime, lambda request, n_tokens: [])
        expected = answer(runtime, max_tokens=max_tokens)
        plant(runtime, knows(expected, PROMPTS), 15)
        found = answer(runtime, max_tokens=max_tokens)
        assert ids(found) == ids(expected)
        assert [each.finish_reason for each in found] == ["length"] * 3
        assert max_tokens == 1 or all(reconciles(each) for each in found)


def test_streamed_pieces_and_token_ids(path: Path, plain: list[list[Generation]]) -> None:
    with Runtime(path, **PARAMS, memory=_enough(path)) as runtime:
        plant(runtime, knows(plain[0], PROMPTS, 0.2), 6)
        for prompt, expected in zip(PROMPTS, plain[0], strict=True):
            chunks = list(runtime.stream(prompt_ids=prompt, max_tokens=N_TOKENS, prefix="off"))
            assert "".join(chunk.text for chunk in chunks) == expected.text
            assert tuple(i for chunk in chunks for i in chunk.token_ids) == expected.token_ids


def test_a_cancel_while_something_is_drafted(path: Path, plain: list[list[Generation]]) -> None:
    with Runtime(path, **PARAMS, memory=_enough(path)) as runtime:

        def cancels(request: Request, n_tokens: int) -> list[int]:
            if len(request.token_ids) >= 5:
                request.cancel()
            return nonsense(request, n_tokens)

        plant(runtime, cancels)
        found = answer(runtime)
        assert [each.finish_reason for each in found] == ["cancelled"] * 3
        assert ids(found) == [each.token_ids[:5] for each in plain[0]]
        stats: Any = runtime.stats()
        assert stats["kv_free_cells"] + stats["kv_kept_cells"] == stats["kv_cells"]
        plant(runtime, nonsense)
        assert ids(answer(runtime)) == ids(plain[0])


def test_several_requests_at_once(
    path: Path, small_path: Path, plain: list[list[Generation]]
) -> None:
    """They share passes, and the last one left is drafted again."""
    memory = _enough(path) + 4 * small_path.stat().st_size
    settings = PARAMS | {"n_kv": 1536, "memory": memory + MIB, "small": small_path}
    lengths = [N_TOKENS, 5, 11]
    with Runtime(path, **settings, speculate="small") as runtime:
        speculation_of(runtime).policy = _Fixed(4)
        opened = [
            runtime.stream(prompt_ids=p, max_tokens=n, prefix="off")
            for p, n in zip(PROMPTS, lengths, strict=True)
        ]
        ends = [list(stream)[-1].generation for stream in opened]
        for end, expected, n in zip(ends, plain[0], lengths, strict=True):
            assert end is not None and end.token_ids == expected.token_ids[:n]
        small: Any = speculation_of(runtime)._small
        assert not small._sequences and not small._verified


def test_a_request_may_decline(path: Path, plain: list[list[Generation]]) -> None:
    with Runtime(path, **PARAMS, memory=_enough(path)) as runtime:
        plant(runtime, knows(plain[0], PROMPTS))
        found = answer(runtime, speculate=False)
        assert ids(found) == ids(plain[0])
        assert all("speculation" not in each.stats.to_dict() for each in found)


def test_cells_of_accepted_guesses_are_those_of_single_tokens(
    path: Path, plain: list[list[Generation]]
) -> None:
    """The prefix cache reuses them where it would reuse those of a plain answer."""
    prompt, expected = PROMPTS[2], plain[0][2]
    longer = [*prompt, *expected.token_ids, 11, 12, 13]
    kept = []
    for guess in (nonsense, knows(plain[0], PROMPTS)):
        with Runtime(path, **PARAMS, memory=_enough(path)) as runtime:
            plant(runtime, guess)
            runtime.generate(prompt_ids=prompt, max_tokens=N_TOKENS)
            cells = runtime._scheduler.prefix._kept[0]
            assert cells.tokens.tolist() == [*prompt, *expected.token_ids[:-1]]
            assert set(cells.classes[len(prompt) :].tolist()) == {CLASS_SINGLE}
            again = runtime.generate(prompt_ids=longer, max_tokens=8)
            fresh = runtime.generate(prompt_ids=longer, max_tokens=8, prefix="off")
            reused = runtime.generate(prompt_ids=longer, max_tokens=8, prefix="all")
            assert again.token_ids == fresh.token_ids
            kept.append((again.stats.n_cached, reused.token_ids))
    assert kept[0] == kept[1]


def test_adapters_on_every_piece(path: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a.gguf", path, rank=8, alpha=64)
    memory = _enough(path, adapters=[adapter])
    with Runtime(path, **PARAMS, adapters=[adapter], memory=memory) as runtime:
        assert runtime._loaded.layers is not None
        plant(runtime, lambda request, n_tokens: [])
        expected = answer(runtime, adapter="a")
        assert ids(expected) != ids(answer(runtime))
        for wrong in (0.0, 0.4):
            plant(runtime, knows(expected, PROMPTS, wrong), 5)
            found = answer(runtime, adapter="a")
            assert ids(found) == ids(expected)
            assert all(reconciles(each) for each in found)


def test_drafts_of_resident_layers_read_nothing(path: Path) -> None:
    """And what is being read for the next pass stays."""
    with Runtime(path, **PARAMS, memory=_enough(path), speculate="self") as runtime:
        store = runtime._loaded.layers
        assert store is not None
        drafter = speculation_of(runtime)._drafters["self"]
        seen: list[tuple[int, ...]] = []

        def watched(request: Request, n_tokens: int) -> list[int]:
            for room in store._ring:  # what is read ahead arrives
                if room.ticket is not None:
                    store._transfer.wait(room.ticket)
            before = [room.holds for room in store._ring], store._transfer.stats.n_reads
            draft = drafter.draft(request, n_tokens)
            tokens = [each.token for each in draft]
            assert ([room.holds for room in store._ring], store._transfer.stats.n_reads) == before
            seen.append((len(draft), len(store.streamed)))
            return tokens

        plant(runtime, watched, 4)
        answer(runtime)
        assert seen and all(n == 4 or n_left for n, n_left in seen)


def test_a_small_model_that_is_the_same_is_always_right(path: Path) -> None:
    memory = _enough(path) + path.stat().st_size + 4 * MIB
    with Runtime(path, **PARAMS, memory=memory, small=path, speculate="small") as runtime:
        speculation_of(runtime).policy = _Fixed(5)
        found = answer(runtime)
        assert sum(counts(each)["accepted"] for each in found) >= 0.85 * 3 * (N_TOKENS - 1) * 5 / 6
        memory_by_owner: Any = runtime.stats()["memory"]
        assert any(owner.startswith("small model, ") for owner in memory_by_owner)
        assert sum(memory_by_owner.values()) <= memory


def test_the_small_model_reads_long_prompts_in_parts_and_keeps_its_cells(
    path: Path, small_path: Path
) -> None:
    prompt = [(7 * i) % 350 + 5 for i in range(400)]
    with Runtime(path, **PARAMS, small=small_path, speculate="small") as runtime:
        speculation_of(runtime).policy = _Fixed(4)
        small: Any = speculation_of(runtime)._small
        fed: list[int] = []
        feed = small._feed

        def watched(sequence: Any, tokens: list[int], *, n_out: int) -> Any:
            fed.append(len(tokens))
            return feed(sequence, tokens, n_out=n_out)

        small._feed = watched
        first = runtime.generate(prompt_ids=prompt, max_tokens=12, prefix="off")
        assert max(fed) <= 128 and sum(fed) >= len(prompt)
        fed.clear()
        second = runtime.generate(prompt_ids=prompt, max_tokens=12, prefix="off")
        assert first.token_ids == second.token_ids
        assert sum(fed) < 100


def test_auto_drafts_nothing_where_all_is_in_memory(path: Path) -> None:
    with Runtime(path, **PARAMS) as runtime:
        assert runtime._scheduler.speculation is None
        found = runtime.generate(prompt_ids=PROMPTS[0], max_tokens=4)
        assert "speculation" not in found.stats.to_dict()
        stats: Any = runtime.stats()["speculation"]
        assert stats["on"] is False and "in memory" in stats["why"]


@pytest.mark.parametrize(
    ("arch", "kind", "why"), [("llama", "F32", "float weights"), ("llama-moe", "Q8_0", "experts")]
)
def test_where_bits_would_differ_nothing_is_drafted(
    arch: str, kind: str, why: str, tmp_path: Path
) -> None:
    model = tmp_path / "model.gguf"
    synth.make(arch, model, weight_type=kind)
    with Runtime(model, **PARAMS, speculate="lookup") as runtime:
        assert runtime._scheduler.speculation is None
        stats: Any = runtime.stats()["speculation"]
        assert why in stats["why"]


def test_refusals(path: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="speculate must be one of"):
        Runtime(path, speculate="perhaps")
    with pytest.raises(UsageError, match="needs a small model"):
        Runtime(path, speculate="small")
    other = tmp_path / "other.gguf"
    synth.make("gemma3", other)
    with pytest.raises(UsageError, match="choose a smaller model of the same family"):
        Runtime(path, **PARAMS, small=other, speculate="small")
    fewer = tmp_path / "fewer.gguf"
    synth.write(replace(synth.ARCHITECTURES["llama"], n_vocab=320), fewer)
    Runtime(path, **PARAMS, small=fewer).close()
    with pytest.raises(CapacityError):
        Runtime(path, **PARAMS, small=path, memory=path.stat().st_size)
