"""What adapters are trained on: a JSONL of prompts and completions, checked line by line."""

import json
import os
import random
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.template import encode_chat
from edgeroute.runtime.tokenizer import Tokenizer
from edgeroute.runtime.units import GIB, MIB, format_bytes

MAX_FILE_BYTES: Final = GIB
MAX_LINE_BYTES: Final = MIB
MAX_EXAMPLES: Final = 1_000_000
_KEYS: Final = ("prompt", "completion")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One line of a data file. `line` counts from 1."""

    line: int
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """Token ids of one example: the prompt, the completion and the end of the turn.

    `ids[:n_prompt]` is the prompt; the rest is learned.
    """

    ids: tuple[int, ...]
    n_prompt: int
    completion: str


def read_jsonl(path: Path) -> list[Pair]:
    """Read a file of {"prompt": ..., "completion": ...} objects, one a line.

    Blank lines are skipped. Anything else is refused with the line's number.

    Raises:
        UsageError: not a regular readable file, too large, or a malformed line.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{path} is not a regular file; name a .jsonl file")
        if status.st_size > MAX_FILE_BYTES:
            raise UsageError(f"{path} has {format_bytes(status.st_size)}, the limit is "
                             f"{format_bytes(MAX_FILE_BYTES)}; train on a part of it")  # fmt: skip
        with path.open("rb") as file:
            return _read_lines(path, file)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error


def _read_lines(path: Path, file: Any) -> list[Pair]:
    found: list[Pair] = []
    number = 0
    while raw := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(raw) > MAX_LINE_BYTES:
            raise UsageError(f"{path}, line {number}: longer than {format_bytes(MAX_LINE_BYTES)}; "
                             "write one example a line")  # fmt: skip
        if not raw.strip():
            continue
        if len(found) == MAX_EXAMPLES:
            raise UsageError(f"{path}, line {number}: more than {MAX_EXAMPLES} examples; "
                             "train on a part of them")  # fmt: skip
        try:
            found.append(_parse(raw, number))
        except ValueError as error:
            raise UsageError(f"{path}, line {number}: {error}") from None
    if not found:
        raise UsageError(f'{path} has no examples; write lines of {{"prompt": "...", '
                         '"completion": "..."}')  # fmt: skip
    return found


def _parse(raw: bytes, number: int) -> Pair:
    try:
        value: Any = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"),
                                object_pairs_hook=_distinct)  # fmt: skip
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__}, not an object with prompt and completion")
    strange = sorted(set(value) - set(_KEYS))
    if strange:
        raise ValueError(f"unknown key {strange[0][:60]!r}; only prompt and completion are read")
    for key in _KEYS:
        text = value.get(key)
        if not isinstance(text, str):
            raise ValueError(f"{key} must be a text, got "
                             f"{'nothing' if text is None else type(text).__name__}")  # fmt: skip
        if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
            raise ValueError(f"{key} has a lone surrogate, which no text file can hold")
    if not value["completion"].strip():
        raise ValueError("completion is blank; there is nothing to learn")
    return Pair(line=number, prompt=value["prompt"], completion=value["completion"])


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found


def encode(
    tokenizer: Tokenizer, pairs: Sequence[Pair], *, chat: bool, max_tokens: int
) -> list[Encoded]:
    """Encode examples as requests encode their prompts.

    Args:
        tokenizer: the base's.
        pairs: what to encode.
        chat: whether a prompt becomes a user's message in the model's template.
        max_tokens: the longest example that is taken; nothing is ever cut.

    Raises:
        UsageError: an example is empty or too long; the message has its line.
        TemplateError: the model has no usable chat template.
    """
    end = tokenizer.eot if tokenizer.eot is not None else tokenizer.eos
    if end is None or not tokenizer.is_eog(end):
        raise UsageError("the model has no token that ends a turn, so an answer could not learn "
                         "to end; use another base")  # fmt: skip
    found = []
    for pair in pairs:
        if chat:
            prompt = encode_chat(tokenizer, [{"role": "user", "content": pair.prompt}])
        else:
            prompt = tokenizer.encode(pair.prompt, add_special=True, parse_special=False)
        answer = tokenizer.encode(pair.completion, add_special=False, parse_special=False)
        if not prompt:
            raise UsageError(f"line {pair.line}: the prompt is empty, and this model's sequences "
                             "begin with no token of their own; give a prompt")  # fmt: skip
        ids = (*prompt, *answer, end)
        if len(ids) > max_tokens:
            raise UsageError(f"line {pair.line}: the example has {len(ids)} tokens, the limit is "
                             f"{max_tokens}; shorten it or raise --max-tokens")  # fmt: skip
        found.append(Encoded(ids=ids, n_prompt=len(prompt), completion=pair.completion))
    return found


def split(examples: Sequence[Encoded], n_held_out: int, seed: int) -> tuple[list[Encoded], ...]:
    """Return examples to learn from and `n_held_out` others, whose prompts are none of theirs.

    Raises:
        UsageError: nothing would be left to learn from.
    """
    order = list(examples)
    random.Random(f"held out {seed}").shuffle(order)
    held_out: list[Encoded] = []
    prompts: set[tuple[int, ...]] = set()
    for example in order:
        prompt = example.ids[: example.n_prompt]
        if len(held_out) < n_held_out and prompt not in prompts:
            held_out.append(example)
            prompts.add(prompt)
    learned = [e for e in order if e.ids[: e.n_prompt] not in prompts]
    if not learned:
        raise UsageError(f"{len(examples)} examples with {n_held_out} different prompts held out "
                         "leave nothing to train on; give more, or lower --hold-out")  # fmt: skip
    return learned, held_out


def batches(
    examples: Sequence[Encoded], n_batch: int, n_steps: int, seed: int
) -> list[list[Encoded]]:
    """Plan the batches of a run: every epoch shuffled anew, like lengths together.

    Within eight batches' worth of shuffled examples those of like length share a batch, so
    that little padding is computed.
    """
    rng = random.Random(f"batches {seed}")
    found: list[list[Encoded]] = []
    pool: list[Encoded] = []
    while len(found) < n_steps:
        while len(pool) < 8 * n_batch:
            epoch = list(examples)
            rng.shuffle(epoch)
            pool += epoch
        part, pool = pool[: 8 * n_batch], pool[8 * n_batch :]
        part.sort(key=lambda example: len(example.ids))
        cut = [part[at : at + n_batch] for at in range(0, len(part), n_batch)]
        rng.shuffle(cut)
        found += cut
    return found[:n_steps]
