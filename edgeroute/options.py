"""What callers may say: settings of a Runtime, options of one generation."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from edgeroute.runtime.records import PrefixMode, SamplingParams
from edgeroute.stats import Generation

MAX_TOOLS = 128

Message = Mapping[str, object]
Score = Callable[[Generation], float]
"""Tells what an answer is worth, 0 to 1."""


class Settings(TypedDict, total=False):
    """Keyword arguments of Runtime beyond the model; see RunParams."""

    memory: str | int | None
    threads: int | None
    n_ctx: int | None
    n_kv: int | None
    n_ubatch: int | None
    max_batch: int | None
    kv_type: str | None
    device: str | None
    device_memory: str | int | None
    host_experts: str | None
    policy: str | None
    prefetch: str | None
    drop_misses: float | None
    prefer_resident: float | None
    degrade_misses: float | None
    repack_experts: bool | None
    plain_prompts: bool | None
    io_threads: int | None
    read_bytes: str | int | None
    direct_io: bool | None
    sidecar: str | None
    overlap: str | None
    levers: str | None
    energy: str | None
    trace: str | None
    adapters: str | Path | Sequence[str | Path] | None
    adapter_slots: int | None
    adapter_state: str | None
    small: str | Path | None
    small_adapters: str | Path | Sequence[str | Path] | None
    depth: str | None
    depth_file: str | Path | None
    depth_max_kl: float | None
    run_ahead: str | None
    speculate: str | None
    steps: str | None
    steps_file: str | Path | None
    steps_state: str | Path | None
    remote: str | None
    remote_timeout_s: float | None
    sessions: str | Path | None
    sessions_bytes: str | int | None


class Options(TypedDict, total=False):
    """Keyword arguments of one generation; unknown ones are errors.

    `prefix` says which stored keys and values may serve the prompt: `exact` those with the
    bits a fresh run would compute (default), `all` whatever has equal tokens (for
    continuing a conversation at once), `off` none. `adapter` names a LoRA adapter, `auto` to
    choose one by the prompt, or several with a factor each: `{"a": 0.7, "b": 0.3}`. `score`
    is called with the whole answer of `auto`, and what it returns is given as feedback.
    `small_adapter` names an adapter of the small model's library, or several with a factor each,
    for what that model writes of an answer in steps.
    `speculate=False` keeps this answer from being drafted, which changes its speed only.
    `depth` is `full` for an answer by the whole model, or the name of the Runtime's plan, which
    is also what None means. `steps` says who writes the steps of this answer, as the setting of
    that name does for all. `session` names a conversation whose keys and values are kept on disk
    (see the setting `sessions`): the answer begins with those saved under that name, as far as
    `prefix` lets them serve, and saves its own when it ends.

    `tools` describes functions to a model whose chat template knows them, as JSON schemas:
    `[{"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}]`.
    A call then stands in the answer's text, in the syntax that the model was trained on;
    `edgeroute.server.tool_calls` makes a grammar for it and reads it. `shown_tokens` are
    texts of control tokens that are part of the answer's text.
    """

    messages: Sequence[Message] | None
    tools: Sequence[Mapping[str, object]] | None
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repeat_penalty: float
    presence_penalty: float
    frequency_penalty: float
    repeat_last_n: int
    logit_bias: Mapping[int, float]
    seed: int | None
    logprobs: int | None
    stop: Sequence[str] | str | None
    grammar: str | None
    json_schema: Mapping[str, object] | str | None
    shown_tokens: Sequence[str]
    timeout_s: float | None
    prefix: PrefixMode
    prompt_ids: Sequence[int] | None
    adapter: str | Mapping[str, float] | None
    small_adapter: str | Mapping[str, float] | None
    score: Score | None
    speculate: bool
    depth: str | None
    steps: str | None
    session: str | None


SAMPLING = frozenset(SamplingParams.__dataclass_fields__)
KNOWN = frozenset(Options.__annotations__)
