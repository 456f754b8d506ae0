"""Whatever vocabulary passes the check, llama.cpp loads and uses without aborting."""

import os
import random
import struct
import subprocess
import sys
from pathlib import Path

from edgeroute.runtime.errors import EdgerouteError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.vocab_check import check_vocab
from tests.runtime import hostile_files as hostile

ORACLE = Path(__file__).with_name("vocab_oracle.py")

N_FILES = 300
MEANINGFUL = (
    *("<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "</s>", "<|tool_response>", "<unk>"),
    *("<|eot_id|>", "<|fim_prefix|>", "<end_of_turn>", "<|channel|>", "[EMPTY_3]", "<0x-1>"),
    *("<0x41>", "<0x0a>", "", " ", "\n", "▁", "a", "ab", "日本", "\x7f", "\U0010ffff", "Ġ"),
)
ALPHABET = "abcĠĊ<>x0 ▁é日\x01\n'"


def random_vocab(rng: random.Random) -> bytes:
    """A vocabulary that is odd in many ways, some of them malformed."""
    model = rng.choice(["gpt2", "llama"])
    texts = [t for t in MEANINGFUL if rng.random() < 0.3]
    for _ in range(rng.randrange(20)):
        texts.append("".join(rng.choices(ALPHABET, k=rng.randrange(1, 6))))
    if rng.random() < 0.95:
        texts = list(dict.fromkeys(texts))
    if model == "llama" or rng.random() < 0.2:
        texts += [text for text in hostile.BYTES if text not in texts or rng.random() < 0.001]
    rng.shuffle(texts)
    types = [random_type(text, rng) for text in texts]
    ggml = "tokenizer.ggml."
    pairs = {
        "tokens": hostile.strings(ggml + "tokens", texts),
        "token_type": rng.choice([None, hostile.ints(ggml + "token_type", types)]),
        "bos_token_id": random_id("bos", len(texts), rng),
        "eos_token_id": random_id("eos", len(texts), rng),
    }
    for name in ("unknown", "eot", "padding", "fim_pre", "seperator"):
        pairs[name] = random_id(name, len(texts), rng)
    for name in ("add_bos_token", "add_eos_token", "add_space_prefix"):
        if rng.random() < 0.5:
            pairs[name] = hostile.pair(ggml + name, hostile.BOOL, bytes([rng.randrange(2)]))
    if rng.random() < 0.5:
        pre = rng.choice(["default", "llama-bpe", "qwen2", "smollm", "gpt-2", "tekken", "bloom"])
        pairs["pre"] = hostile.pair(ggml + "pre", hostile.STRING, hostile.text(pre))
    if model == "gpt2":
        merges = [f"{rng.choice(ALPHABET)} {rng.choice(ALPHABET)}" for _ in range(5)]
        merges = [merge for merge in merges if merge.count(" ") == 1]
        pairs["merges"] = hostile.strings(ggml + "merges", merges)
    else:
        scores = [rng.choice([0.0, -1.0, 5.5, 3e38, float("inf")]) for _ in texts]
        payload = struct.pack(f"<{len(texts)}f", *scores)
        pairs["scores"] = hostile.array(ggml + "scores", hostile.F32, len(texts), payload)
    return hostile.vocab(model, **pairs)


def random_type(text: str, rng: random.Random) -> int:
    if text in hostile.BYTES and rng.random() < 0.9:
        return 6
    return rng.choice([0, 1, 1, 1, 2, 3, 4, 5]) if rng.random() < 0.999 else 6


def random_id(name: str, n_tokens: int, rng: random.Random) -> bytes | None:
    if rng.random() < 0.4:
        return None
    high = n_tokens if rng.random() < 0.05 else max(n_tokens - 1, 0)
    payload = struct.pack("<I", rng.randint(0, high))
    return hostile.pair(f"tokenizer.ggml.{name}_token_id", hostile.U32, payload)


def test_accepted_vocabularies_do_not_abort_llama_cpp(tmp_path: Path) -> None:
    n_accepted = 0
    for seed in range(N_FILES):
        path = tmp_path / f"{seed:04}.gguf"
        path.write_bytes(random_vocab(random.Random(seed)))
        try:
            with GGUFFile.open(path) as file:
                check_vocab(file)
            n_accepted += 1
        except EdgerouteError:
            path.unlink()
    done = subprocess.run(
        [sys.executable, str(ORACLE), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"llama.cpp died at {lines[-1:]}: {done.stderr[-1000:]}"
    assert n_accepted > N_FILES // 3
    assert lines.count("not loaded") == 0
