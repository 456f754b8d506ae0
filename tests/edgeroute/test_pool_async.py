"""A pool on an event loop and on the command line: the same answers, and nobody left waiting."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edgeroute import Pool
from edgeroute.cli import cli
from edgeroute.pool_answer import PoolGeneration
from edgeroute.pool_async import Leaver, hear_thread
from edgeroute.runtime.device import Device
from edgeroute.runtime.errors import CapacityError, ClosedError, UsageError
from edgeroute.tools.synth import make

NAMES = ("small", "middle", "large")
EASY, HARD = "Tell me about the sea.", "12 * 7 + 3 * 9 - 4 * 8 = how many?"
SHARED: dict[str, Any] = {"threads": 1, "n_ctx": 256, "n_ubatch": 64, "state": "off"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("pool")
    models = {}
    for seed, (name, able, cost) in enumerate(
        zip(NAMES, (0.2, 0.5, 1.0), (0.01, 0.03, 0.1), strict=True)
    ):
        make("llama", folder / f"{name}.gguf", seed=seed + 1)
        models[name] = {"path": str(folder / f"{name}.gguf"), "capabilities": able, "cost": cost}
    return {"models": models}


@pytest.fixture(scope="module")
def one(config: dict[str, Any]) -> int:
    """Bytes of one model; all have as many."""
    with Pool(config, memory="1GiB", **SHARED) as pool:
        return int(figures(pool)["small"]["bytes"])


@pytest.fixture
def pool(config: dict[str, Any]) -> Iterator[Pool]:
    with Pool(config, memory="1GiB", **SHARED) as opened:
        yield opened


def figures(pool: Pool) -> dict[str, Any]:
    found: Any = pool.stats()["models"]
    return dict(found)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(4000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never happened")


def idle(pool: Pool) -> bool:
    return not any(each["running"] for each in figures(pool).values())


def test_answers_are_those_of_a_synchronous_caller(pool: Pool) -> None:
    async def ask() -> tuple[PoolGeneration, list[Any]]:
        answer = await pool.agenerate(HARD, max_tokens=12)
        return answer, [chunk async for chunk in pool.astream(HARD, max_tokens=12)]

    expected = pool.generate(HARD, max_tokens=12)
    answer, chunks = asyncio.run(ask())
    assert (answer.text, answer.pool.model) == (expected.text, "large")
    assert "".join(chunk.text for chunk in chunks) == expected.text
    last = chunks[-1].generation
    assert isinstance(last, PoolGeneration) and last.pool.model == "large"
    pool.feedback(answer.id, 1.0)


def test_many_at_once_all_get_their_answers(config: dict[str, Any], one: int) -> None:
    """More than an event loop has threads, in a budget that holds two of three models."""
    with Pool(config, memory=2 * one, **SHARED) as pool:
        alone = {name: pool.generate(EASY, model=name, max_tokens=6).text for name in NAMES}

        async def ask() -> list[PoolGeneration]:
            calls = [pool.agenerate(EASY, model=NAMES[i % 3], max_tokens=6) for i in range(45)]
            return list(await asyncio.gather(*calls))

        for i, found in enumerate(asyncio.run(ask())):
            assert (found.pool.model, found.text) == (NAMES[i % 3], alone[NAMES[i % 3]])
        assert idle(pool)


def test_a_verifier_is_asked_beside_the_loop(pool: Pool) -> None:
    threads: list[int] = []

    def verify(answer: object) -> bool:
        threads.append(threading.get_ident())
        return len(threads) == 2

    async def ask() -> PoolGeneration:
        return await pool.agenerate(EASY, verify=verify, max_tokens=2)

    found = asyncio.run(ask())
    assert [each.accepted for each in found.pool.tries] == [False, True]
    assert found.pool.why == "refused before"
    assert threading.get_ident() not in threads


def test_cancelling_the_task_cancels_the_answer(pool: Pool) -> None:
    verdicts: list[object] = []

    async def leave() -> None:
        task = asyncio.create_task(
            pool.agenerate("x" * 120, model="small", max_tokens=120, verify=verdicts.append)
        )
        await until(lambda: figures(pool)["small"]["running"] == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: idle(pool))

    asyncio.run(leave())
    assert figures(pool)["middle"]["state"] == "closed", "no other model was asked"


def test_leaving_a_stream_gives_its_model_back(pool: Pool) -> None:
    async def leave() -> None:
        pieces = pool.astream("x" * 120, model="small", max_tokens=120)
        first = await anext(pieces)
        assert first.generation is None
        await pieces.aclose()  # type: ignore[attr-defined]
        await until(lambda: idle(pool))

    asyncio.run(leave())


def test_who_leaves_while_waiting_for_room_opens_no_model(
    config: dict[str, Any], one: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = Device.compute

    def slowly(device: Device, graph: int) -> bool:
        time.sleep(0.02)  # or the answer that holds the room is over before anybody waits for it
        return compute(device, graph)

    monkeypatch.setattr(Device, "compute", slowly)
    with Pool(config, memory=one, **SHARED) as pool:
        with pool.stream("x" * 120, model="small", max_tokens=120) as held:
            next(held)

            async def leave() -> None:
                task = asyncio.create_task(pool.agenerate(EASY, model="large", max_tokens=2))
                await until(lambda: pool.stats()["waiting"] == 1)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                await until(lambda: pool.stats()["waiting"] == 0)

            asyncio.run(leave())
        assert figures(pool)["large"]["opened"] == 0

        async def in_vain() -> None:
            await pool.agenerate(EASY, model="large", max_tokens=2, timeout_s=0.05)

        with pool.stream("x" * 120, model="small", max_tokens=120) as held:
            next(held)
            with pytest.raises(CapacityError):
                asyncio.run(in_vain())


def test_errors_come_to_the_caller(pool: Pool) -> None:
    async def ask(**options: Any) -> None:
        await pool.agenerate(EASY, **options)

    async def pieces(**options: Any) -> None:
        async for _ in pool.astream(EASY, **options):
            raise AssertionError("no piece should come")

    for wrong in ({"max_token": 3}, {"model": "smal"}, {"small_adapter": "a"}, {"min_p": 7}):
        for call in (ask, pieces):
            with pytest.raises(UsageError):
                asyncio.run(call(**wrong))
    pool.close()
    with pytest.raises(ClosedError):
        asyncio.run(ask())


def test_work_whose_listener_left_first_is_cancelled_as_it_begins() -> None:
    class Answer:
        cancelled = False

        def cancel(self) -> None:
            self.cancelled = True

    woken: list[bool] = []
    leaver, answer = Leaver(lambda: woken.append(True)), Answer()
    leaver.leave()
    leaver.follow(answer)
    assert answer.cancelled and leaver.left.is_set() and woken

    async def listen() -> list[int]:
        def work(tell: Callable[[int], None]) -> None:
            for i in range(3):
                tell(i)

        return [each async for each in hear_thread(work, Leaver(lambda: None))]

    assert asyncio.run(listen()) == [0, 1, 2]


def test_a_thread_that_outlives_its_loop_harms_nobody() -> None:
    go, done = threading.Event(), threading.Event()

    def work(tell: Callable[[int], None]) -> None:
        tell(1)
        go.wait(10)
        tell(2)  # to nobody
        done.set()

    async def listen() -> int:
        async for each in hear_thread(work, Leaver(lambda: None)):
            return each
        raise AssertionError("nothing came")

    assert asyncio.run(listen()) == 1
    go.set()
    assert done.wait(10)


# the command line


@pytest.fixture
def file(config: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "pool.toml"
    lines = ["[pool]", 'memory = "1GiB"']
    for name, each in config["models"].items():
        lines += [f"[models.{name}]", f"path = {json.dumps(each['path'])}",
                  f"capabilities = {each['capabilities']}", f"cost = {each['cost']}"]  # fmt: skip
    path.write_text("\n".join(lines))
    return path


def run(file: Path, *more: str) -> Result:
    words = ["generate", "--pool", str(file), "--n-ctx", "256", "-t", "1", "-n", "6", *more]
    return CliRunner().invoke(cli, words)


def test_generate_asks_the_pool_and_says_who_answered(
    file: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with Pool(config, memory="1GiB", threads=1, n_ctx=256, state="off") as pool:
        expected = {text: pool.generate(text, max_tokens=6).text for text in (EASY, HARD)}
    for text, model in ((EASY, "small"), (HARD, "large")):
        shown = run(file, "--raw", text)
        assert shown.exit_code == 0, shown.output
        assert shown.stdout == expected[text] + "\n"
        assert f"answered by {model}, cheapest capable" in shown.stderr
        told = json.loads(run(file, "--raw", text, "--json").stdout)
        assert (told["text"], told["model"]) == (expected[text], model)
        assert told["pool"]["tries"][0]["model"] == model and told["stats"]["n_generated"]
    named = json.loads(run(file, "--raw", EASY, "-m", "middle", "--json").stdout)
    assert (named["model"], named["pool"]["why"]) == ("middle", "asked for")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--adapter", "a"), "--adapter is for one model"),
        (("--small", "x"), "--small is for one model"),
        (("--steps", "small"), "two models"),
        (("--session", "a"), "--session is for one model"),
        (("--show-steps",), "--show-steps"),
        (("-m", "smal"), "did you mean small"),
        (("--memory", "1KiB"), "budget"),
    ],
)
def test_what_is_for_one_model_is_refused_by_name(
    file: Path, more: tuple[str, ...], words: str
) -> None:
    found = run(file, "--raw", EASY, *more)
    assert found.exit_code in (2, 4) and words in found.stderr


def test_a_file_that_is_no_pool_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("[models")
    for path in (broken, tmp_path / "none.toml"):
        found = run(path, "--raw", EASY)
        assert found.exit_code == 2 and path.name in found.stderr
