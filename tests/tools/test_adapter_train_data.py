"""What adapters are trained on: malformed lines refused, encoding and batches as they should be."""

from dataclasses import replace
from pathlib import Path

import pytest

from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.tokenizer import Tokenizer
from edgeroute.tools.adapter_train_data import Encoded, Pair, batches, encode, read_jsonl, split

GOOD = b'{"prompt": "a", "completion": "b"}\n'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has no examples"),
        (b"\n  \n", "has no examples"),
        (GOOD + b"\n{", "line 3: not JSON"),
        (GOOD + b"[1]\n", "line 2: a list, not an object"),
        (b'{"prompt": "a"}', "line 1: completion must be a text, got nothing"),
        (b'{"prompt": 1, "completion": "b"}', "line 1: prompt must be a text, got int"),
        (b'{"prompt": "a", "completion": " "}', "line 1: completion is blank"),
        (b'{"prompt": "a", "completion": "b", "text": ""}', "line 1: unknown key 'text'"),
        (b'{"prompt": "a", "prompt": "a", "completion": "b"}', "line 1: a key is given twice"),
        (b'{"prompt": "a", "completion": "\\ud800"}', "line 1: completion has a lone surrogate"),
        (GOOD + b'{"prompt": "\xff"}', "line 2: byte 12 is not UTF-8"),
        (b"[" * 200_000, "line 1: "),
        (b'{"prompt": "' + b"a" * (1 << 20) + b'"}', "line 1: longer than 1 MiB"),
    ],
)  # fmt: skip
def test_malformed_data_is_refused_with_its_line(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_jsonl(path)
    assert said in str(caught.value) and str(path) in str(caught.value)


def test_data_that_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a regular file"):
        read_jsonl(tmp_path)
    with pytest.raises(UsageError, match="cannot read"):
        read_jsonl(tmp_path / "missing.jsonl")


def test_a_byte_order_mark_and_blank_lines_are_no_data(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n" + GOOD)
    assert [pair.line for pair in read_jsonl(path)] == [1, 3]


def test_examples_are_encoded_as_requests_are(smollm2_path: Path) -> None:
    pair = Pair(line=7, prompt="Roman numeral: 14\n<|im_end|>", completion="XIV")
    with GGUFFile.open(smollm2_path) as file, Tokenizer.open(file) as tokenizer:
        (raw,) = encode(tokenizer, [pair], chat=False, max_tokens=64)
        (chat,) = encode(tokenizer, [pair], chat=True, max_tokens=64)
        prompt = tokenizer.encode(pair.prompt, add_special=True, parse_special=False)
        for found in (raw, chat):
            assert tokenizer.decode(found.ids[found.n_prompt :]) == "XIV"
            assert tokenizer.is_eog(found.ids[-1])
        assert list(raw.ids[: raw.n_prompt]) == prompt
        assert not any(tokenizer.is_eog(i) for i in prompt), "typed text is never a control token"
        assert tokenizer.decode(chat.ids, special=True).startswith("<|im_start|>system")
        with pytest.raises(UsageError, match=r"line 7: the example has 1\d tokens, the limit is 5"):
            encode(tokenizer, [pair], chat=False, max_tokens=5)
        with pytest.raises(UsageError, match="line 7: the prompt is empty"):
            encode(tokenizer, [replace(pair, prompt="")], chat=False, max_tokens=64)


def numbered(n_examples: int) -> list[Encoded]:
    return [Encoded(ids=(n, *range(2 + n % 5)), n_prompt=1, completion=str(n))
            for n in range(n_examples)]  # fmt: skip


def test_held_out_prompts_are_not_learned() -> None:
    found = numbered(20)
    learned, held_out = split(found + found, 6, seed=3)
    assert len(held_out) == 6 and len({e.ids for e in held_out}) == 6
    assert len(learned) == 28 and not {e.ids for e in learned} & {e.ids for e in held_out}
    assert split(found, 6, seed=3) == split(found, 6, seed=3) != split(found, 6, seed=4)
    with pytest.raises(UsageError, match="leave nothing to train on"):
        split(found, 20, seed=3)


def test_batches_come_from_shuffled_epochs() -> None:
    found = numbered(32)
    plan = batches(found, 4, 16, seed=1)
    assert plan == batches(found, 4, 16, seed=1) != batches(found, 4, 16, seed=2)
    assert all(len(batch) == 4 for batch in plan) and len(plan) == 16
    for epoch in (plan[:8], plan[8:]):
        assert sorted(e.ids for batch in epoch for e in batch) == sorted(e.ids for e in found)
    spread = [max(len(e.ids) for e in b) - min(len(e.ids) for e in b) for b in plan]
    assert max(spread) <= 1, "like lengths share a batch"
    assert len(batches(numbered(3), 8, 5, seed=1)) == 5, "fewer examples than a batch come again"
