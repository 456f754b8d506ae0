"""Runs prompts through a model and records what it did: routes in a trace, figures beside it.

Greedy answers, one prompt after another, nothing reused between them. Ctrl-C ends the run; what
was recorded until then stays and counts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

from edgeroute.engine import Runtime
from edgeroute.options import Options, Settings
from edgeroute.runtime.cells import CELL_BUCKET
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.stats import Generation
from edgeroute.tools.profile.prompts import Prompt

TEMPLATE_TOKENS: Final = 64
"""What a chat template may add to a prompt, about."""

Progress = Callable[[str, int, int], None]
"""Takes a phase, and how much of it is done of how much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordParams:
    """What is recorded: greedy `tokens` after each prompt, with these settings of a Runtime.

    `chat` sends prompts as chat messages, False continues them as text; None: as the model has
    a template for.
    """

    tokens: int
    settings: Settings
    trace: Path | None = None
    chat: bool | None = None


@dataclass(slots=True, kw_only=True)
class Recorded:
    """Sums over the answers so far. `experts` and `layers` are the Runtime's own figures."""

    n_prompt_token: int = 0
    n_decode_token: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    n_prompt: int = 0
    interrupted: bool = False
    budget_bytes: int = 0
    memory_bytes: int = 0
    threads: int = 0
    experts: dict[str, Any] | None = None
    layers: dict[str, Any] | None = None
    layer_bytes: int = 0
    joules: float = 0.0
    energy_source: str | None = None
    energy_estimated: bool | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def decode_tok_s(self) -> float:
        """Tokens after each answer's first per second; 0 where there were none."""
        return self.n_decode_token / self.decode_s if self.decode_s > 0 else 0.0

    @property
    def prefill_tok_s(self) -> float:
        """Prompt tokens per second; 0 where there were none."""
        return self.n_prompt_token / self.prefill_s if self.prefill_s > 0 else 0.0

    def add(self, answer: Generation) -> None:
        """Count one answer, a part of one included."""
        stats = answer.stats
        self.n_prompt += 1
        self.n_prompt_token += stats.n_prompt - stats.n_cached
        self.n_decode_token += max(0, stats.n_generated - 1)
        self.prefill_s += stats.prefill_s
        self.decode_s += stats.decode_s
        self.layer_bytes += int((stats.layers or {}).get("bytes", 0))
        self._add_energy(stats.to_dict().get("energy"))

    def _add_energy(self, energy: object) -> None:
        if not isinstance(energy, dict) or not isinstance(energy.get("joules"), float | int):
            return
        self.joules += float(energy["joules"])
        self.energy_source = str(energy.get("source"))
        self.energy_estimated = bool(self.energy_estimated) or bool(energy.get("estimated"))


def record(
    model: Path, prompts: Sequence[Prompt], params: RecordParams, progress: Progress
) -> Recorded:
    """Answer all prompts and return what that took; routes go to `params.trace`.

    Raises:
        UsageError: the trace's file is in use, a prompt does not fit the context, or there is
            none.
        CapacityError: the budget is too small for the model.
        KeyboardInterrupt: before the first prompt was begun.
    """
    if not prompts:
        raise UsageError("there is nothing to record: no prompts")
    settings = dict(params.settings)
    if params.trace is not None:
        if params.trace.exists():
            raise UsageError(f"{params.trace} exists; record to another file, or analyse this one "
                             "by --from-trace")  # fmt: skip
        settings["trace"] = str(params.trace)
    chat = has_template(model) if params.chat is None else params.chat
    found = Recorded()
    with Runtime(model, **cast("Settings", settings)) as runtime:
        _check_lengths(runtime, prompts, params.tokens)
        for i, prompt in enumerate(prompts):
            if params.trace is not None:
                runtime.mark_trace(prompt.domain)

            def step(n: int, first: int = i * params.tokens) -> None:
                progress("recording", first + n, len(prompts) * params.tokens)

            answer, found.interrupted = _answer(runtime, prompt.text, (params.tokens, chat), step)
            if answer is not None:
                found.add(answer)
            if found.interrupted:
                break
            step(params.tokens)
        _read_stats(runtime, found)
    return found


def has_template(model: Path) -> bool:
    """Tell from the header whether a model was trained to chat."""
    with GGUFFile.open(model) as file:
        return bool(file.metadata.get_str("tokenizer.chat_template", None))


def context_for(n_token: int) -> int:
    """Return the smallest context that holds so many tokens, a template's among them."""
    return CELL_BUCKET * math.ceil((n_token + TEMPLATE_TOKENS) / CELL_BUCKET)


def _check_lengths(runtime: Runtime, prompts: Sequence[Prompt], tokens: int) -> None:
    """Refuse a prompt that is too long now, not after minutes."""
    for prompt in prompts:
        n = len(runtime.encode(prompt.text)) + tokens
        if context_for(n) > max(runtime.params.n_ctx, CELL_BUCKET):
            raise UsageError(
                f"a prompt of {prompt.domain!r} and {tokens} tokens of answer need a context of "
                f"{context_for(n)}, n_ctx is {runtime.params.n_ctx}: raise --n-ctx"
            )


def _answer(
    runtime: Runtime, text: str, how: tuple[int, bool], step: Callable[[int], None]
) -> tuple[Generation | None, bool]:
    """Return one answer, and whether Ctrl-C cut it."""
    tokens, chat = how
    options: Options = {"max_tokens": tokens, "temperature": 0.0, "prefix": "off"}
    if chat:
        options["messages"] = [{"role": "user", "content": text}]
    n, interrupted, answer = 0, False, None
    with runtime.stream(None if chat else text, **options) as stream:
        while True:
            try:
                for chunk in stream:
                    n += len(chunk.token_ids)
                    step(min(n, tokens))
                    answer = chunk.generation or answer
                return answer, interrupted
            except KeyboardInterrupt:
                stream.cancel()  # what was produced still comes, with its statistics
                interrupted = True


def _read_stats(runtime: Runtime, found: Recorded) -> None:
    stats = runtime.stats()
    found.budget_bytes = cast(int, stats["budget_bytes"])
    found.memory_bytes = cast(int, stats["memory_bytes"])
    found.threads = cast(int, stats["threads"])
    found.experts = cast("dict[str, Any] | None", stats.get("experts"))
    found.layers = cast("dict[str, Any] | None", stats.get("layers"))
    found.warnings = cast("list[str]", stats["warnings"])
