"""Sessions that survive a restart: the answers of uncached runs, or a request without them."""

import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from edgeroute import Generation, Runtime, paging, session_work, sessions
from edgeroute.cli import cli
from edgeroute.models.depth_file import fingerprint
from edgeroute.runtime import session_file
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.kv_cache import KvCache
from edgeroute.runtime.session_file import SessionFacts, SessionReader
from edgeroute.runtime.session_writer import SessionWriter
from edgeroute.session_folder import SessionFolder, default_folder
from edgeroute.skippers.plan import DepthPlan, LayerDepth
from edgeroute.tools import synth
from edgeroute.tools.depth_file import DepthContent, write_depth_file
from tests.edgeroute.adapter_lab import make as make_adapter
from tests.edgeroute.layered_lab import plain_machine
from tests.edgeroute.session_lab import (
    PROMPT,
    SETTINGS,
    ask,
    cells_accounted,
    same,
    settled,
    told,
)

# the same bits as without, whatever computes

Opener = Callable[..., Runtime]


def _plain(tmp: Path, patch: pytest.MonkeyPatch) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    synth.make("llama", tmp / "m.gguf")
    return tmp / "m.gguf", {}, {}


def _scarce(path: Path, short_bytes: int) -> int:
    """Return a budget that lacks so much of what all in memory would take, with either cache."""
    with Runtime(path, kv_type="q8_0", sessions="unused", **SETTINGS) as runtime:
        whole: Any = runtime.stats()["memory_bytes"]
    return int(whole) - short_bytes


def _streamed(tmp: Path, patch: pytest.MonkeyPatch) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    plain_machine(patch)
    synth.make("llama", tmp / "m.gguf", n_layer=6)
    return tmp / "m.gguf", {"memory": _scarce(tmp / "m.gguf", 2 << 20), "speculate": "off"}, {}


def _paged(tmp: Path, patch: pytest.MonkeyPatch) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))
    patch.setattr(paging, "psutil", SimpleNamespace(Process=lambda: process))
    spec = replace(
        synth.ARCHITECTURES["qwen3moe"], n_layer=6, n_embd=128, n_ff=128, n_ff_exp=128, n_head=2,
        n_head_kv=1, n_embd_head=64, n_expert=32, n_expert_used=3,
    )  # fmt: skip
    synth.write(spec, tmp / "m.gguf")
    return tmp / "m.gguf", {"memory": _scarce(tmp / "m.gguf", 16 << 20)}, {}


def _adapter(tmp: Path, patch: pytest.MonkeyPatch) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    path, _, _ = _plain(tmp, patch)
    (tmp / "lora").mkdir()
    make_adapter(tmp / "lora" / "style.gguf", path, rank=4, seed=1)
    library = {"adapters": str(tmp / "lora"), "adapter_state": "off"}
    return path, library, {"adapter": {"style": 0.7}}


def _depth(tmp: Path, patch: pytest.MonkeyPatch) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    path, _, _ = _plain(tmp, patch)
    skip = LayerDepth(attn="skip", ffn="skip")
    write_plans(path, {"some": (LayerDepth(), skip, LayerDepth())})
    return path, {"depth": "some"}, {}


def write_plans(model: Path, plans: dict[str, tuple[LayerDepth, ...]]) -> None:
    with GGUFFile.open(model) as file:
        stamp = fingerprint(file)
    made = tuple(DepthPlan(name=name, layers=each, compute=0.9) for name, each in plans.items())
    content = DepthContent(model=stamp, data="0" * 64, plans=made, tensors={})
    write_depth_file(model.with_suffix(".depth"), content)


KINDS = {"plain": _plain, "streamed": _streamed, "paged": _paged, "adapter": _adapter,
         "depth": _depth}  # fmt: skip


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_session_answers_with_the_bits_of_an_uncached_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, kv_type: str
) -> None:
    path, settings, options = KINDS[kind](tmp_path, monkeypatch)
    settings |= {"kv_type": kv_type, "sessions": str(tmp_path / "s")}
    longer = [*PROMPT, *range(20, 90)]
    with Runtime(path, **SETTINGS, **settings) as runtime:
        first = ask(runtime, session="a", **options)
        assert told(first)["restored_tokens"] == 0 and told(first)["saved"] is True
        cold = ask(runtime, longer, prefix="off", **options)
    with Runtime(path, **SETTINGS, **settings) as runtime:
        again = ask(runtime, session="a", **options)
        assert told(again)["restored_tokens"] == again.stats.n_cached >= 256
        assert told(again)["not_restored"] is None and told(again)["bytes"] > 0
        assert same(again, first)
        assert cells_accounted(runtime)
        stats: Any = runtime.stats()
        assert stats["memory"]["session staging"] == 3 * session_file.BLOCK_BYTES
        if kind == "paged":
            assert again.stats.experts is not None and again.stats.experts["misses"] > 0
        if kind == "streamed":
            assert stats["layers"]["streamed"] > 0
    with Runtime(path, **SETTINGS, **settings) as runtime:
        more = ask(runtime, longer, session="a", **options)
        assert told(more)["restored_tokens"] >= 256, told(more)
        assert same(more, cold)
    with Runtime(path, **SETTINGS, **settings) as runtime:
        continued = ask(runtime, [*longer, *more.token_ids, 9, 10], session="a", prefix="all",
                        **options)  # fmt: skip
        n_known = len(longer) + len(more.token_ids) - 1
        assert told(continued)["restored_tokens"] == n_known, told(continued)


def test_a_device_whose_memory_is_its_own_is_copied_by_the_engine_thread(
    tiny_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[str] = []
    for name in ("read_cells", "write_cells"):
        real = getattr(KvCache, name)

        def noted(self: KvCache, *args: Any, real: Any = real) -> None:
            copied.append(threading.current_thread().name)
            real(self, *args)

        monkeypatch.setattr(KvCache, name, noted)
    monkeypatch.setattr(KvCache, "is_host", False)
    monkeypatch.setattr(session_file, "BLOCK_BYTES", 1 << 16)
    monkeypatch.setattr(session_work, "BLOCK_BYTES", 1 << 16)
    with Runtime(tiny_path, sessions=folder, **SETTINGS) as runtime:
        first = ask(runtime, session="a")
    n_saved = len(copied)
    with Runtime(tiny_path, sessions=folder, **SETTINGS) as runtime:
        again = ask(runtime, session="a")
    assert told(again)["restored_tokens"] > 0 and same(again, first)
    assert n_saved > 5 and len(copied) > n_saved + 5
    assert set(copied) == {"edgeroute-engine"}


def test_several_sessions_at_once_beside_answers_without_one(tiny_path: Path, folder: str) -> None:
    prompts = [[3 + (5 + n) * i % 280 for i in range(150 + 9 * n)] for n in range(6)]

    def all_at_once(runtime: Runtime) -> list[Generation]:
        found: list[Any] = [None] * len(prompts)

        def call(n: int) -> None:
            extra = {"session": f"s{n % 4}"} if n < 5 else {}  # two share a name
            found[n] = ask(runtime, prompts[n], **extra)

        threads = [threading.Thread(target=call, args=(n,)) for n in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    with Runtime(tiny_path, **SETTINGS) as runtime:
        cold = [ask(runtime, prompt, prefix="off") for prompt in prompts]
    for _ in range(3):
        with Runtime(tiny_path, sessions=folder, **SETTINGS) as runtime:
            answers = all_at_once(runtime)
            assert all(same(a, b) for a, b in zip(answers, cold, strict=True))
            assert settled(runtime)["failed"] == 0 and cells_accounted(runtime)
    restored = [told(answer)["restored_tokens"] for answer in answers[1:4]]
    assert all(n >= 128 for n in restored)
    assert answers[5].stats.session is None


def test_answers_in_steps_keep_their_sessions(tmp_path: Path, folder: str) -> None:
    synth.make("llama", tmp_path / "large.gguf")
    synth.make("llama", tmp_path / "small.gguf", n_layer=1)
    settings = {**SETTINGS, "small": str(tmp_path / "small.gguf"), "steps": "random:0.5"}
    answers = []
    for _ in range(2):
        with Runtime(tmp_path / "large.gguf", sessions=folder, **settings) as runtime:
            answers.append(runtime.generate(prompt_ids=PROMPT, max_tokens=12, seed=3, session="a"))
            settled(runtime)
            assert runtime.sessions()[0].n_tokens > 300
    assert told(answers[1])["restored_tokens"] >= 256
    assert answers[1].token_ids == answers[0].token_ids


# nobody else's cells


def test_an_adapter_of_the_same_name_is_another(tmp_path: Path, folder: str) -> None:
    path, settings, _ = _adapter(tmp_path, pytest.MonkeyPatch())
    with Runtime(path, sessions=folder, **SETTINGS, **settings) as runtime:
        first = ask(runtime, session="a", adapter="style")
        ask(runtime, session="a")
    make_adapter(tmp_path / "lora" / "style.gguf", path, rank=4, seed=2)
    with Runtime(path, sessions=folder, **SETTINGS, **settings) as runtime:
        other = ask(runtime, session="a", adapter="style")
        assert told(other)["not_restored"] == "nothing is saved of this session yet"
        assert other.token_ids != first.token_ids
        assert same(other, ask(runtime, adapter="style", prefix="off"))
        half = ask(runtime, session="a", adapter={"style": 0.5})
        assert told(half)["restored_tokens"] == 0
        assert told(ask(runtime, session="a"))["restored_tokens"] >= 256  # without any
        settled(runtime)
        assert {each.name for each in runtime.sessions()} == {"a"}
        assert len(runtime.sessions()) == 4  # two adapters, a factor, and none
        assert runtime.remove_session("a") == 4 and not runtime.sessions()


def test_another_model_has_sessions_of_its_own(
    tmp_path: Path, tiny_path: Path, folder: str, saved: Generation
) -> None:
    synth.make("llama", tmp_path / "other.gguf", n_layer=2)
    with Runtime(tmp_path / "other.gguf", sessions=folder, **SETTINGS) as other:
        assert other.sessions() == [] and other.remove_session("a") == 0
        answer = ask(other, session="a")
        assert told(answer)["not_restored"] == "nothing is saved of this session yet"
    with Runtime(tiny_path, sessions=folder, **SETTINGS) as runtime:
        assert told(ask(runtime, session="a"))["restored_tokens"] > 0
    assert len(SessionFolder(Path(folder)).sessions()) == 2


@pytest.mark.parametrize("field", ["name", "model", "adapter", "plan", "shape", "numerics"])
def test_a_file_that_says_to_be_another_is_not_used(
    one: Runtime, saved: Generation, folder: str, field: str
) -> None:
    path = next(Path(folder).glob("*.session"))
    rewrite(path, facts=lambda facts: replace(facts, **{field: "other"}))
    answer = ask(one, session="a")
    assert "the saved session" in told(answer)["not_restored"]
    assert told(answer)["restored_tokens"] == 0 and same(answer, saved)


def rewrite(
    path: Path, facts: Callable[[SessionFacts], SessionFacts] = lambda facts: facts,
    data: Callable[[Any], Any] = lambda data: data,
) -> None:  # fmt: skip
    """Change a session file's contents, digests included."""
    with SessionReader(path) as reader:
        head = reader.head
        buffer = np.empty(session_file.BLOCK_BYTES, np.uint8)
        blocks = [reader.read_block(i, buffer).copy() for i in range(head.n_blocks(head.n_cells))]
    part = path.with_suffix(".part")
    with SessionWriter(part, facts(head.facts), head.tokens, head.classes, head.cell_bytes) as new:
        for block in blocks:
            new.add(data(block))
        new.commit(path)


def test_no_nan_gets_into_the_cache(one: Runtime, saved: Generation, folder: str) -> None:
    def poisoned(block: Any) -> Any:
        block[100:102] = (0x00, 0x7E)  # a NaN of 16 bits
        return block

    rewrite(next(Path(folder).glob("*.session")), data=poisoned)
    answer = ask(one, session="a")
    assert "no numbers" in told(answer)["not_restored"] and same(answer, saved)
    kv = one._loaded.kv
    pool = np.empty(kv.n_clear * kv.shape.bytes_per_cell, np.uint8)
    kv.read_cells(0, kv.n_clear, pool)
    assert np.isfinite(pool.view(np.float16)).all()


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "folder", "pipe"])
def test_a_damaged_file_costs_nothing_but_itself(
    one: Runtime, saved: Generation, folder: str, damage: str
) -> None:
    path = next(Path(folder).glob("*.session"))
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[:-1])
    elif damage == "flip":
        path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
        path.mkdir() if damage == "folder" or not hasattr(os, "mkfifo") else os.mkfifo(path)
    answer = ask(one, session="a")
    assert told(answer)["not_restored"] and told(answer)["restored_tokens"] == 0
    assert same(answer, saved) and cells_accounted(one)
    stats = settled(one)
    if damage == "folder":
        assert stats["failed"] == 1 and "a: " in stats["last_error"]
    else:
        assert stats["saved"] == 1  # the next save replaces it
        assert one.sessions()[0].n_tokens == 311


def test_a_pruned_plan_and_routers_say_that_nothing_can_be_kept(
    tmp_path: Path, folder: str
) -> None:
    path, _, _ = _plain(tmp_path, pytest.MonkeyPatch())
    pruned = LayerDepth(keep=50)
    write_plans(path, {"less": (LayerDepth(), pruned, pruned)})
    with Runtime(path, sessions=folder, depth="less", **SETTINGS) as runtime:
        answer = ask(runtime, session="a")
        assert told(answer)["not_restored"] == told(answer)["saved"] == sessions.UNKNOWN
        assert told(ask(runtime, session="a", depth="full"))["saved"] is True


# names, limits, folders


def test_names_are_checked_and_never_become_paths(tiny: Runtime, one: Runtime, folder: str) -> None:
    for name in ("", "../x", "a/b", ".a", "a" * 65, "ä", "a\n", "a b", 7, b"a", ["a"]):
        with pytest.raises(UsageError, match="session must be a name"):
            ask(one, session=name)
    with pytest.raises(UsageError, match="keeps no sessions"):
        ask(tiny, session="a")
    for use in (tiny.sessions, lambda: tiny.remove_session("a")):
        with pytest.raises(UsageError, match="sessions=FOLDER"):
            use()
    ask(one, session="Some.name_1-x")
    settled(one)
    files = list(Path(folder).iterdir())
    assert len(files) == 1 and "Some" not in files[0].name
    if os.name == "posix":
        assert Path(folder).stat().st_mode & 0o777 == 0o700
        assert files[0].stat().st_mode & 0o777 == 0o600
    listed = one.sessions()[0]
    assert (listed.name, listed.n_tokens, listed.n_bytes) == (
        "Some.name_1-x", 311, files[0].stat().st_size)  # fmt: skip
    assert abs(time.time() - listed.saved) < 60


@pytest.mark.parametrize("given", [{"sessions": ""}, {"sessions": 7}, {"sessions_bytes": "many"}])
def test_settings_are_checked(tiny_path: Path, given: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Runtime(tiny_path, **given)


def test_the_least_recently_used_leave_over_the_limit(tiny_path: Path, folder: str) -> None:
    with Runtime(tiny_path, sessions=folder, **SETTINGS) as runtime:
        ask(runtime, session="a")
        settled(runtime)
        size = runtime.sessions()[0].n_bytes
    with Runtime(tiny_path, sessions=Path(folder), sessions_bytes=int(2.5 * size),
                 **SETTINGS) as runtime:  # fmt: skip
        for name in ("b", "a", "c"):  # what is used again is no longer the oldest
            ask(runtime, session=name)
            settled(runtime)
            time.sleep(0.01)
        assert sorted(each.name for each in runtime.sessions()) == ["a", "c"]
    with Runtime(tiny_path, sessions=folder, sessions_bytes=size // 2, **SETTINGS) as runtime:
        answer = ask(runtime, session="d")
        assert "over the limit" in told(answer)["saved"]
        short = ask(runtime, [5, 6], max_tokens=2, session="e")
        assert "fewer than" in told(short)["saved"]


def test_what_dead_saves_left_is_cleared_away(
    one: Runtime, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(folder).mkdir()
    left, fresh, mine = (Path(folder) / f"{name}.part" for name in ("left", "fresh", "mine"))
    for each in (left, fresh):
        each.write_bytes(b"half")
    os.utime(left, (1, time.time() - 3600))
    facts = SessionFacts(name="x", model="", adapter="", plan="", shape="", numerics="")
    with SessionWriter(mine, facts, np.ones(1, np.int32), np.ones(1, np.uint8), 4):
        os.utime(mine, (1, time.time() - 3600))
        ask(one, session="a")
        settled(one)
        if os.name == "posix":
            assert not left.exists()
        assert fresh.exists() and mine.exists()


def test_a_model_that_is_slow_by_design_is_read_in_parts(
    tiny_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of one cell: the most parts that there can be."""
    monkeypatch.setattr(session_file, "BLOCK_BYTES", 1)
    monkeypatch.setattr(session_work, "BLOCK_BYTES", 1)
    answers = []
    for _ in range(2):
        with Runtime(tiny_path, sessions=folder, **SETTINGS) as runtime:
            answers.append(ask(runtime, session="a"))
    assert same(*answers) and told(answers[1])["restored_tokens"] >= 256
    assert math.isfinite(told(answers[1])["restore_s"])


def test_the_command_line_keeps_a_session(tiny_path: Path) -> None:
    def run(*arguments: str) -> Any:
        command = ["generate", "--raw", "-m", str(tiny_path), "-n", "4", *arguments]
        return CliRunner().invoke(cli, command)

    text = "Once upon a time there was a lighthouse. " * 12
    first = run(text, "--session", "command-line")
    assert "session command-line: nothing read back: nothing is saved" in first.stderr
    again = run(text, "--session", "command-line")
    assert "tokens read back in" in again.stderr and again.stdout == first.stdout
    assert "session must be a name" in run(text, "--session", "../x").stderr
    talk = CliRunner().invoke(cli, ["chat", "-m", str(tiny_path), "-n", "4", "--session", "talk",
                                    "--system", text, "--json"], input="Hello\n")  # fmt: skip
    assert talk.exit_code == 0, talk.output
    names = {each.name for each in SessionFolder(default_folder()).sessions()}
    assert {"command-line", "talk"} <= names
