"""A pool of models: who answers, under which budget, and what is learned of it."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import edgeroute
from edgeroute import Pool, Runtime, pool_learning
from edgeroute.pool_answer import PoolGeneration
from edgeroute.runtime.errors import CapacityError, ClosedError, ModelFileError, UsageError
from edgeroute.runtime.units import MIB
from edgeroute.tools.synth import make
from tests.edgeroute.layered_lab import plain_machine

NAMES = ("small", "middle", "large")
EASY, HARD = "Tell me about the sea.", "12 * 7 + 3 * 9 - 4 * 8 = how many?"
SHARED: dict[str, Any] = {"threads": 1, "n_ctx": 256, "n_ubatch": 64, "state": "off"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pool")
    found = {name: folder / f"{name}.gguf" for name in NAMES}
    for seed, path in enumerate(found.values()):
        make("llama", path, seed=seed + 1)
    return found


@pytest.fixture
def config(files: dict[str, Path]) -> dict[str, Any]:
    models = {
        name: {"path": str(files[name]), "capabilities": able, "cost": cost}
        for name, able, cost in zip(NAMES, (0.2, 0.5, 1.0), (0.01, 0.03, 0.1), strict=True)
    }
    return {"models": models}


@pytest.fixture(scope="module")
def one(files: dict[str, Path]) -> int:
    """Bytes of one model; all have as many."""
    each = {"models": {"a": {"path": str(files["small"]), "capabilities": 1}}}
    with Pool(each, memory="1GiB", **SHARED) as pool:
        return pool_bytes(pool, "a")


def stats(pool: Pool) -> dict[str, Any]:
    return pool.stats()


def pool_bytes(pool: Pool, name: str) -> int:
    found = stats(pool)["models"][name]["bytes"]
    assert isinstance(found, int)
    return found


def states(pool: Pool) -> dict[str, str]:
    return {name: each["state"] for name, each in stats(pool)["models"].items()}


def until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it never happened")


@pytest.fixture
def pool(config: dict[str, Any]) -> Iterator[Pool]:
    with Pool(config, memory="1GiB", **SHARED) as opened:
        yield opened


# who answers


def test_the_cheapest_capable_model_answers_and_says_why(pool: Pool) -> None:
    easy, hard = pool.generate(EASY, max_tokens=4), pool.generate(HARD, max_tokens=4)
    assert isinstance(easy, edgeroute.Generation)
    assert (easy.pool.model, easy.pool.why) == ("small", "cheapest capable")
    assert hard.pool.model == "large" and hard.pool.demand["math"] > 0.6
    assert pool.last is hard.pool
    assert states(pool) == {"small": "open", "middle": "closed", "large": "open"}
    told: Any = hard.pool.to_dict()
    assert told["n_generated"] == hard.stats.n_generated == 4 or hard.finish_reason == "stop"
    assert told["stated_shortfall"] == told["shortfall"] == 0


def test_answers_are_those_of_the_model_alone(pool: Pool, files: dict[str, Path]) -> None:
    with Runtime(files["large"], threads=1, n_ctx=256, n_ubatch=64) as alone:
        text = alone.generate(HARD, max_tokens=12).text
    assert pool.generate(HARD, max_tokens=12).text == text
    assert "".join(chunk.text for chunk in pool.stream(HARD, max_tokens=12)) == text


def test_a_named_model_answers_whatever_the_query(pool: Pool) -> None:
    found = pool.generate(EASY, model="middle", max_tokens=2)
    assert (found.pool.model, found.pool.why) == ("middle", "asked for")
    assert pool.generate(prompt_ids=[40, 41], model="large", max_tokens=1).pool.model == "large"


def test_the_last_message_and_the_system_decide(pool: Pool) -> None:
    def ask(*texts: str) -> str:
        roles = ("system", "user", "assistant", "user")
        chat = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        return pool._plan(None, {"messages": chat}, None).order[0][0].name

    assert ask("Be kind.", HARD, "119", EASY) == "small"
    assert ask("Be kind.", EASY, "It is blue.", HARD) == "large"
    assert ask(HARD, EASY, "It is blue.", EASY) == "large"


def test_a_stream_ends_with_the_whole_answer_and_its_route(pool: Pool) -> None:
    chunks = list(pool.stream(EASY, max_tokens=6))
    last = chunks[-1].generation
    assert isinstance(last, PoolGeneration) and last.pool.model == "small"
    assert last.text == "".join(chunk.text for chunk in chunks)
    assert stats(pool)["models"]["small"]["running"] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "smal"}, "did you mean small"),
        ({"max_token": 3}, "did you mean max_tokens"),
        ({"adapter": "auto"}, "no option"),
        ({"prompt_ids": [1]}, "exactly one"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": float("nan")}, "timeout_s"),
    ],
)
def test_a_call_that_no_model_takes_opens_none(
    pool: Pool, options: dict[str, Any], words: str
) -> None:
    for call in (pool.generate, pool.stream):
        with pytest.raises(UsageError, match=words):
            call(EASY, **options)  # type: ignore[operator]
    with pytest.raises(UsageError, match="vocabulary"):
        pool.generate(prompt_ids=[40])
    assert set(states(pool).values()) == {"closed"}


# verification and feedback


def test_a_refused_answer_goes_to_the_next_model_and_all_is_told(pool: Pool) -> None:
    seen: list[str] = []

    def verify(answer: edgeroute.Generation) -> bool:
        seen.append(answer.text)
        return len(seen) == 3

    found = pool.generate(EASY, verify=verify, max_tokens=3)
    assert [each.model for each in found.pool.tries] == list(NAMES)
    assert [each.accepted for each in found.pool.tries] == [False, False, True]
    assert (found.pool.model, found.pool.why) == ("large", "refused before")
    assert found.text == seen[-1]
    told: Any = found.pool.to_dict()
    assert told["n_generated"] == sum(each.n_generated for each in found.pool.tries)
    rewards = {name: each["rewards"] for name, each in stats(pool)["models"].items()}
    assert rewards == dict.fromkeys(NAMES, 1.0)
    with pytest.raises(UsageError, match="verify"):
        pool.feedback(found.id, 1.0)


def test_tries_are_bounded_and_the_last_answer_is_returned(config: dict[str, Any]) -> None:
    with Pool(config, memory="1GiB", max_tries=2, **SHARED) as pool:
        found = pool.generate(EASY, verify=lambda _: False, max_tokens=1)
    assert [each.model for each in found.pool.tries] == ["small", "middle"]
    assert found.pool.tries[-1].accepted is False


def test_a_verifier_may_ask_the_pool_and_its_errors_leave_it_whole(
    config: dict[str, Any], one: int
) -> None:
    """Its model is lent to nobody by then, even where the budget holds but one."""
    with Pool(config, memory=one, **SHARED) as pool:

        def judge(answer: edgeroute.Generation) -> bool:
            return bool(pool.generate("good?", model="large", max_tokens=1).token_ids) or True

        assert pool.generate(EASY, verify=judge, max_tokens=1).pool.model == "small"
        with pytest.raises(ZeroDivisionError):
            pool.generate(EASY, verify=lambda _: 1 // 0 > 0, max_tokens=1)
        assert pool.generate(EASY, model="small", max_tokens=1).pool.model == "small"


def test_feedback_moves_queries_to_another_model_and_survives(
    config: dict[str, Any], tmp_path: Path
) -> None:
    settings = SHARED | {"memory": "1GiB", "state": tmp_path / "pool.polar"}
    with Pool(config, **settings) as pool:
        for _ in range(12):
            found = pool.generate(EASY, max_tokens=1)
            pool.feedback(found.id, 0.0 if found.pool.model == "small" else 1.0)
        assert pool.generate(EASY, max_tokens=1).pool.model == "middle"
    with Pool(config, **settings) as pool:
        assert pool.generate(EASY, max_tokens=1).pool.model == "middle"


def test_what_was_learned_is_saved_now_and_then(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_learning, "SAVE_EVERY", 3)
    state = tmp_path / "new" / "pool.polar"
    with Pool(config, **SHARED | {"memory": "1GiB", "state": state}) as pool:
        for turn in range(3):
            assert not state.exists(), turn
            pool.feedback(pool.generate(EASY, max_tokens=1).id, 1.0)
        assert state.exists()


def test_feedback_is_taken_once_and_only_as_a_reward(pool: Pool) -> None:
    found = pool.generate(EASY, max_tokens=1)
    with pytest.raises(UsageError, match="outside"):
        pool.feedback(found.id, 2.0)
    pool.feedback(found.id, 1.0)
    for name in (found.id, "gen-0"):
        with pytest.raises(UsageError, match="no answer"):
            pool.feedback(name, 1.0)


# one budget


def test_one_model_at_a_time_where_the_budget_holds_one(config: dict[str, Any], one: int) -> None:
    with Pool(config, memory=one, **SHARED) as pool:
        for turn in range(6):
            pool.generate(EASY, model=NAMES[turn % 3], max_tokens=1)
            assert list(states(pool).values()).count("open") == 1
            assert stats(pool)["used_bytes"] <= one
        assert stats(pool)["evicted"] == 5
        assert {each["opened"] for each in stats(pool)["models"].values()} == {2}


def test_the_least_recently_used_model_makes_room(config: dict[str, Any], one: int) -> None:
    with Pool(config, memory=2 * one, **SHARED) as pool:
        for name in ("small", "middle", "small", "large"):
            pool.generate(EASY, model=name, max_tokens=1)
        assert states(pool) == {"small": "open", "middle": "closed", "large": "open"}


def test_a_model_that_would_push_others_out_has_its_loading_in_its_price(
    config: dict[str, Any], one: int
) -> None:
    """Else two kinds of queries in turn would open and close models at every one."""
    config["models"]["small"]["cost"] = config["models"]["middle"]["cost"] - 1e-9
    with Pool(config, memory=one, **SHARED) as pool:
        pool.generate(EASY, model="middle", max_tokens=1)
        assert pool.generate(EASY, max_tokens=1).pool.model == "middle"
    with Pool(config, memory=2 * one, **SHARED) as pool:
        pool.generate(EASY, model="middle", max_tokens=1)
        assert pool.generate(EASY, max_tokens=1).pool.model == "small"


def test_a_model_that_answers_is_never_closed(config: dict[str, Any], one: int) -> None:
    with Pool(config, memory=one, **SHARED) as pool, ThreadPoolExecutor(1) as other:
        with pool._shelf.lease("small") as lease:
            assert lease.runtime.generate(EASY, max_tokens=1).stats.n_prompt > 0
            asked = other.submit(pool.generate, EASY, model="large", max_tokens=1)
            until(lambda: stats(pool)["waiting"] == 1)
            time.sleep(0.05)
            assert not asked.done()
            assert states(pool) == {"small": "open", "middle": "closed", "large": "closed"}
        assert asked.result(60).pool.model == "large"
        assert states(pool) == {"small": "closed", "middle": "closed", "large": "open"}


def test_a_stream_is_read_to_its_end_after_its_model_made_room(
    config: dict[str, Any], one: int
) -> None:
    """Who reads one answer may ask for another in between, whatever the room."""
    with Pool(config, memory=one, **SHARED) as pool:
        whole = pool.generate(EASY, model="small", max_tokens=30).text
        stream = pool.stream(EASY, model="small", max_tokens=30)
        text = next(stream).text
        assert pool.generate(EASY, model="large", max_tokens=1).pool.model == "large"
        assert text + "".join(chunk.text for chunk in stream) == whole


def test_a_dropped_stream_lets_go_of_its_model(config: dict[str, Any], one: int) -> None:
    with Pool(config, memory=one, **SHARED) as pool:
        stream = pool.stream(EASY, model="small", max_tokens=200)
        next(stream)
        del stream
        assert pool.generate(EASY, model="large", max_tokens=1).pool.model == "large"
        with pool.stream(EASY, model="small", max_tokens=200) as closed:
            next(closed)
        assert list(closed) == []
        until(lambda: stats(pool)["models"]["small"]["running"] == 0)


def test_waiting_for_room_ends_with_the_time(config: dict[str, Any], one: int) -> None:
    with Pool(config, memory=one, **SHARED) as pool:
        with (
            pool._shelf.lease("small"),
            pytest.raises(CapacityError, match=r"'large'.*small .*raise timeout_s"),
        ):
            pool.generate(EASY, model="large", timeout_s=0.05)
        assert stats(pool)["waiting"] == 0
        assert pool.generate(EASY, model="large", timeout_s=60, max_tokens=1).text is not None


def test_open_models_answer_past_a_waiting_one_but_not_at_its_cost(
    config: dict[str, Any], one: int
) -> None:
    """Two are open and busy; one may go on, the other must make room and not be lent again."""
    with Pool(config, memory=2 * one, **SHARED) as pool, ThreadPoolExecutor(2) as others:
        with pool._shelf.lease("small"):
            with pool._shelf.lease("middle"):
                third = others.submit(pool.generate, EASY, model="large", max_tokens=1)
                until(lambda: stats(pool)["waiting"] == 1)
                assert pool.generate(EASY, model="small", max_tokens=1).pool.model == "small"
                blocked = others.submit(pool.generate, EASY, model="middle", max_tokens=1)
                until(lambda: stats(pool)["waiting"] == 2)
                time.sleep(0.05)
                assert not blocked.done() and not third.done()
            assert third.result(60).pool.model == "large"
            assert blocked.result(60).pool.model == "middle"
        assert {name: each["opened"] for name, each in stats(pool)["models"].items()} == {
            "small": 1, "middle": 2, "large": 1
        }  # fmt: skip


def test_many_threads_under_a_budget_of_two_models_all_get_their_answers(
    config: dict[str, Any], one: int
) -> None:
    with Pool(config, memory="1GiB", **SHARED) as pool:
        alone = {name: pool.generate(EASY, model=name, max_tokens=6).text for name in NAMES}
    over: list[int] = []
    with Pool(config, memory=2 * one, **SHARED) as pool:

        def ask(turn: int) -> tuple[str, str]:
            name = NAMES[(turn * 7 + turn // 5) % 3]
            if turn % 4:
                found = pool.generate(EASY, model=name, max_tokens=6).text
            else:
                found = "".join(each.text for each in pool.stream(EASY, model=name, max_tokens=6))
            over.append(int(stats(pool)["used_bytes"] > 2 * one))
            return name, found

        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(ask, range(60)))
        found = stats(pool)
    assert all(text == alone[name] for name, text in answers)
    assert not any(over)
    assert sum(each["opened"] for each in found["models"].values()) <= 60
    assert sum(each["answers"] for each in found["models"].values()) == 60
    assert found["waiting"] == 0


def test_a_model_too_large_for_the_budget_is_refused_with_numbers(config: dict[str, Any]) -> None:
    before = threading.active_count()
    with pytest.raises(CapacityError, match=r"'small' does not fit .*KiB"):
        Pool(config, memory="100KiB", **SHARED)
    config["models"]["large"]["memory"] = "2GiB"
    with pytest.raises(CapacityError, match=r"2 GiB, over the pool's 1 GiB"):
        Pool(config, memory="1GiB", **SHARED)
    assert threading.active_count() == before


def test_a_paged_model_is_opened_alone_and_answers_like_the_whole(
    config: dict[str, Any], one: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pager measures the process, where other models must not count once more."""
    plain_machine(monkeypatch)
    make("llama", tmp_path / "deep.gguf", n_layer=16)
    deep = {"path": str(tmp_path / "deep.gguf"), "capabilities": 1, "cost": 0.01}
    with Runtime(tmp_path / "deep.gguf", threads=1, n_ctx=256, n_ubatch=64) as alone:
        text = alone.generate(HARD, max_tokens=6).text
    part = one + 2 * MIB
    config["models"]["deep"] = deep | {"memory": part}
    with Pool(config, memory=part + one, **SHARED) as pool:
        assert states(pool)["deep"] == "open"  # it was tried
        assert stats(pool)["models"]["deep"]["whole_bytes"] > part
        pool.generate(EASY, model="small", max_tokens=1)
        assert states(pool)["deep"] == states(pool)["small"] == "open"
        pool.generate(EASY, model="middle", max_tokens=1)
        assert states(pool)["deep"] == "closed"  # of the two, the one used longest ago
        assert pool.generate(HARD, model="deep", max_tokens=6).text == text
        assert states(pool) == dict.fromkeys(NAMES, "closed") | {"deep": "open"}
    with pytest.raises(CapacityError, match=r"'deep' does not fit .*not even paged"):
        Pool({"models": {"deep": deep | {"memory": "1MiB"}}}, memory="1GiB", **SHARED)


# failures


def test_a_model_whose_file_went_is_an_error_and_room_for_others(
    config: dict[str, Any], tmp_path: Path, one: int
) -> None:
    moved = tmp_path / "gone.gguf"
    moved.write_bytes(Path(config["models"]["small"]["path"]).read_bytes())
    config["models"]["small"]["path"] = str(moved)
    with Pool(config, memory=one, **SHARED) as pool:
        content = moved.read_bytes()
        moved.write_bytes(content[: len(content) // 2])
        for _ in range(2):
            with pytest.raises(ModelFileError):
                pool.generate(EASY, max_tokens=1)
        assert stats(pool)["used_bytes"] == 0
        assert pool.generate(EASY, model="large", max_tokens=1).pool.model == "large"
        moved.write_bytes(content)
        assert pool.generate(EASY, model="small", max_tokens=1).pool.model == "small"


def test_a_model_whose_engine_stopped_is_opened_anew(pool: Pool) -> None:
    pool.generate(EASY, max_tokens=1)
    pool._shelf.places["small"].runtime.result().close()
    with pytest.raises(ClosedError):
        pool.generate(EASY, max_tokens=1)
    assert pool.generate(EASY, max_tokens=1).pool.model == "small"
    assert stats(pool)["models"]["small"]["opened"] == 2


def test_closing_ends_streams_and_waiting_calls(config: dict[str, Any], one: int) -> None:
    pool = Pool(config, memory=one, **SHARED)
    with ThreadPoolExecutor(1) as other:
        lease = pool._shelf.lease("small")
        stream = pool.stream(EASY, model="small", max_tokens=200)
        asked = other.submit(pool.generate, EASY, model="large", max_tokens=1)
        until(lambda: stats(pool)["waiting"] == 1)
        pool.close()
        with pytest.raises(ClosedError):
            asked.result(60)
    lease.close()
    try:
        assert list(stream)[-1].finish_reason is not None  # it may have been finished before
    except ClosedError:
        assert list(stream) == []
    pool.close()
    with pytest.raises(ClosedError):
        pool.generate(EASY, max_tokens=1)
    assert set(states(pool).values()) == {"closed"}
