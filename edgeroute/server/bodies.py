"""Request bodies: their fields, types and bounds.

Every field that OpenAI knows is here, also those that mean nothing on one machine, so that a
client's habit is never taken for a mistake; `edgeroute.server.fields` says what becomes of them.
Any other field is refused, as OpenAI does.
"""

from typing import Annotated, Any, Final, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

MAX_CHOICES: Final = 16
MAX_ANSWERS: Final = 64
"""Prompts times choices of one request."""
MAX_INPUTS: Final = 2048
MAX_MESSAGES: Final = 2048
MAX_PARTS: Final = 256
"""Of one message."""

Name = Annotated[str, Meta(min_length=1, max_length=256)]
Word = Annotated[str, Meta(max_length=512)]
Count = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
Positive = Annotated[int, Meta(ge=1, le=(1 << 31) - 1)]
Ratio = Annotated[float, Meta(ge=0.0, le=1.0)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
Bias = Annotated[float, Meta(ge=-100.0, le=100.0)]
Stop = Annotated[str, Meta(min_length=1, max_length=1024)]
Seconds = Annotated[float, Meta(gt=0.0, le=86_400.0)]
Prompt = str | list[str | Count | list[Count]]


class Extension(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What only edgeroute knows; None leaves it to the model's settings."""

    depth: Name | None = None
    steps: Name | None = None
    adapter: Name | dict[Name, Annotated[float, Meta(ge=-100.0, le=100.0)]] | None = None
    small_adapter: Name | dict[Name, Annotated[float, Meta(ge=-100.0, le=100.0)]] | None = None
    speculate: bool | None = None
    session: Name | None = None
    prefix: Literal["exact", "all", "off"] | None = None
    stats: bool = True
    top_k: Count | None = None
    min_p: Ratio | None = None
    repeat_penalty: Annotated[float, Meta(ge=0.01, le=100.0)] | None = None
    grammar: Annotated[str, Meta(min_length=1, max_length=1 << 17)] | None = None
    timeout_s: Seconds | None = None


class StreamOptions(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What a stream holds beside the answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Body(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What chat and completions share."""

    model: Name | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Ratio | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Bias], Meta(max_length=1024)] | None = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=64)] | None = None
    user: Word | None = None
    metadata: Annotated[dict[str, Any], Meta(max_length=64)] | None = None
    edgeroute: Extension | None = None


class Part(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """A part of a message's content; only texts can be used."""

    type: Word
    text: str | None = None
    refusal: str | None = None
    image_url: Any = None
    input_audio: Any = None
    file: Any = None


class CalledFunction(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What an earlier answer called, its arguments as JSON text."""

    name: Name
    arguments: str = ""


class Called(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """A call in an earlier answer."""

    function: CalledFunction
    id: Word | None = None
    type: Literal["function"] = "function"
    index: int | None = None


class Message(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[Part], Meta(max_length=MAX_PARTS)] | None = None
    name: Word | None = None
    tool_calls: Annotated[list[Called], Meta(max_length=128)] | None = None
    tool_call_id: Word | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: Any = None
    function_call: Any = None


class SchemaFormat(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """A named JSON schema."""

    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    schema: dict[str, Any] | UnsetType = UNSET
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What an answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None


class ChatBody(Body, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[dict[str, Any]], Meta(max_length=128)] | None = None
    tool_choice: Word | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    store: bool | None = None
    service_tier: Word | None = None
    safety_identifier: Word | None = None
    prompt_cache_key: Word | None = None
    prompt_cache_retention: Word | None = None
    prediction: dict[str, Any] | None = None
    modalities: list[Word] | None = None
    reasoning_effort: Word | None = None
    verbosity: Word | None = None
    web_search_options: Any = None
    audio: Any = None
    functions: Any = None
    function_call: Any = None


class CompletionBody(Body, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """POST /v1/completions."""

    prompt: Prompt
    max_tokens: Count | None = None
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Meta(ge=1, le=20)] | None = None
    suffix: str | None = None


class EmbeddingBody(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """POST /v1/embeddings."""

    input: Prompt
    model: Name | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Positive | None = None
    user: Word | None = None


class FeedbackBody(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """POST /v1/feedback."""

    id: Name
    reward: Ratio
