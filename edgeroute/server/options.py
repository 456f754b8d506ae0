"""What a request asks, in the engine's words."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from edgeroute.engine import Runtime
from edgeroute.runtime.errors import (
    ContextError,
    DeadlineError,
    GrammarError,
    TemplateError,
    UsageError,
)
from edgeroute.server.bodies import Body, ChatBody, Extension, ResponseFormat
from edgeroute.server.errors import ApiError, as_api_error
from edgeroute.server.fields import check_fields
from edgeroute.server.records import ServerParams

SEED_MASK: Final = (1 << 63) - 1
ANY_OBJECT: Final[Mapping[str, object]] = {"type": "object"}
ENGINE_FIELDS: Final = (
    "depth", "steps", "speculate", "session", "prefix", "top_k", "min_p", "repeat_penalty",
    "grammar", "small_adapter",
)  # fmt: skip
"""Of the extension, what is an option of `Runtime.generate` under the same name."""


def extension(body: Body) -> Extension:
    """Return what a request says in edgeroute's own field."""
    return body.edgeroute or Extension()


def common_options(body: Body) -> dict[str, Any]:
    """Translate what chat and completions share; sampling is OpenAI's unless it is asked for.

    Raises:
        ApiError: 400, with the field at fault.
    """
    check_fields(body)
    asked = extension(body)
    found: dict[str, Any] = {"temperature": 1.0 if body.temperature is None else body.temperature}
    for name in ("top_p", "presence_penalty", "frequency_penalty"):
        _put(found, name, getattr(body, name))
    for name in ENGINE_FIELDS:
        _put(found, name, getattr(asked, name))
    if body.logit_bias:
        found["logit_bias"] = {_token_id(key): bias for key, bias in body.logit_bias.items()}
    if body.seed is not None:
        found["seed"] = body.seed & SEED_MASK
    if body.stop:
        found["stop"] = body.stop
    if asked.session is not None and (body.n or 1) > 1:
        raise ApiError(400, f"a session is one conversation, so that n must be 1, got {body.n}",
                       param="n")  # fmt: skip
    return found


def nth_seed(options: Mapping[str, Any], i: int) -> dict[str, Any]:
    """Return options of the i-th choice: each draws by itself, and all again by the same seed."""
    if "seed" not in options:
        return dict(options)
    return {**options, "seed": (options["seed"] + i) & SEED_MASK}


def max_tokens(asked: int | None, default: int | None, params: ServerParams) -> dict[str, int]:
    """Return the most tokens of an answer; the engine cuts that to what its context has left."""
    wanted = default if asked is None else asked
    limits = [each for each in (wanted, params.max_tokens) if each is not None]
    return {"max_tokens": min(limits, default=(1 << 31) - 1)}


def chat_max_tokens(body: ChatBody) -> int | None:
    """Return what a chat request says of the answer's length.

    Raises:
        ApiError: 400, it says it twice.
    """
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise ApiError(
            400, "max_tokens and max_completion_tokens mean the same; leave one of them out",
            param="max_tokens",
        )  # fmt: skip
    return body.max_completion_tokens if body.max_tokens is None else body.max_tokens


def format_options(asked: ResponseFormat | None) -> dict[str, Any]:
    """Translate `response_format` into a schema that the engine enforces, token by token.

    Raises:
        ApiError: 400, no schema came with it.
    """
    if asked is None or asked.type == "text":
        return {}
    if asked.type == "json_object":
        return {"json_schema": ANY_OBJECT}
    if asked.json_schema is None:
        raise ApiError(400, "Missing required parameter: 'response_format.json_schema'",
                       param="response_format.json_schema",
                       code="missing_required_parameter")  # fmt: skip
    if not isinstance(asked.json_schema.schema, dict):
        raise ApiError(400, "Missing required parameter: 'response_format.json_schema.schema'",
                       param="response_format.json_schema.schema",
                       code="missing_required_parameter")  # fmt: skip
    return {"json_schema": asked.json_schema.schema}


def check_bias(runtime: Runtime, options: Mapping[str, Any]) -> None:
    """Refuse biased tokens that the vocabulary does not have.

    Raises:
        ApiError: 400.
    """
    n_vocab = runtime.tokenizer.n_vocab
    for token_id in options.get("logit_bias", ()):
        if token_id >= n_vocab:
            raise ApiError(
                400, f"logit_bias names token {token_id}; the vocabulary has {n_vocab} tokens",
                param="logit_bias",
            )  # fmt: skip


def check_ids(runtime: Runtime, inputs: Sequence[str | Sequence[int]], field: str) -> None:
    """Refuse token ids that the vocabulary does not have; may take long.

    Raises:
        ApiError: 400.
    """
    n_vocab = runtime.tokenizer.n_vocab
    for i, ids in enumerate(inputs):
        if not isinstance(ids, str) and ids and max(ids) >= n_vocab:
            raise ApiError(400, f"{field} {i} has token {max(ids)}; the vocabulary has {n_vocab} "
                                "tokens", param=field)  # fmt: skip


def blame(error: Exception, prompt_field: str, options: Mapping[str, Any]) -> ApiError:
    """Say what a failure means to the client, with the field at fault where that is known.

    Args:
        error: what the engine raised.
        prompt_field: name of the field that has the prompt.
        options: as the engine got them.
    """
    if isinstance(error, ContextError):
        return ApiError(400, str(error), param=prompt_field, code="context_length_exceeded")
    if isinstance(error, GrammarError):
        by_schema = "response_format" if "json_schema" in options else "tools"
        asked = "edgeroute.grammar" if "grammar" in options and "tools" not in options else None
        return ApiError(400, str(error), param=asked or by_schema, code="invalid_grammar")
    if isinstance(error, TemplateError):
        return ApiError(400, str(error), param=prompt_field)
    if isinstance(error, UsageError):
        return ApiError(400, str(error))
    if isinstance(error, DeadlineError | TimeoutError):
        return ApiError(504, str(error) or "the answer took too long", code="timeout")
    return as_api_error(error)


def _put(found: dict[str, Any], name: str, value: object) -> None:
    if value is not None:
        found[name] = value


def _token_id(key: str) -> int:
    # Longer ones are no ids, and int() takes quadratic time for them.
    if not (key.isascii() and key.isdigit() and len(key) <= 10):
        raise ApiError(400, f"logit_bias is keyed by token ids, got {key!r:.80}",
                       param="logit_bias")  # fmt: skip
    return int(key)
