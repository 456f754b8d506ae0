"""What a caller asks of a Runtime: checked, encoded, and made a Request, in the caller's thread."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgeroute.config import RunParams
from edgeroute.options import KNOWN, SAMPLING, Message, Options
from edgeroute.request import Outcome, Request
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.records import SamplingParams
from edgeroute.runtime.sampler import Sampler
from edgeroute.runtime.text_stream import TextStream

if TYPE_CHECKING:
    from edgeroute.adapters import Adapters
    from edgeroute.loaded import LoadedModel


class Asking:
    """Turns arguments into requests for one loaded model. Thread-safe: it changes nothing."""

    def __init__(self, loaded: "LoadedModel", params: RunParams) -> None:
        self._loaded = loaded
        self._params = params

    def request(
        self, prompt: str | None, options: Options, emit: Callable[[Outcome], None], *,
        streaming: bool,
    ) -> Request:  # fmt: skip
        """Check a call's arguments and encode its prompt.

        Raises:
            UsageError: an option is unknown or out of range, or the prompt does not fit.
            GrammarError, TemplateError: a constraint or the chat template cannot be used.
        """
        unknown = options.keys() - KNOWN
        if unknown:
            raise UsageError(f"generate has no option {', '.join(sorted(map(repr, unknown)))}")
        adapter = self.adapter(options.get("adapter"))
        if options.get("score") is not None and (streaming or not isinstance(adapter, str)):
            raise UsageError("score takes whole answers of adapter='auto', not streams or others")
        max_tokens = _count("max_tokens", options.get("max_tokens", 128))
        timeout_s = options.get("timeout_s")
        if timeout_s is not None and not 0 < timeout_s < 1e9:
            raise UsageError(f"timeout_s must be a positive number of seconds, got {timeout_s!r}")
        prefix = options.get("prefix", "exact")
        if prefix not in ("exact", "all", "off"):
            raise UsageError(f"prefix must be exact, all or off, got {prefix!r}")
        depth_full = self._wants_full(options.get("depth"))
        chosen: dict[str, Any] = {
            name: value for name, value in options.items() if name in SAMPLING and value is not None
        }
        params = SamplingParams(**chosen)
        stop = options.get("stop") or ()
        tokenizer = self._loaded.tokenizer
        text = TextStream(tokenizer.piece, (stop,) if isinstance(stop, str) else stop)
        ids = self._encode(prompt, options.get("messages"), options.get("prompt_ids"))
        return Request(
            prompt_ids=ids, max_tokens=max_tokens, sampler=Sampler(params, tokenizer, ids),
            text=text, emit=emit, streaming=streaming, prefix=prefix, adapter=adapter,
            speculate=bool(options.get("speculate", True)), depth_full=depth_full,
            deadline=None if timeout_s is None else time.monotonic() + timeout_s,
        )  # fmt: skip

    def adapter(self, asked: str | Mapping[str, float] | None) -> Mapping[str, float] | str | None:
        """Check what `generate` would take as `adapter`, and return it as factors by name.

        Raises:
            UsageError: there is no such adapter, or a factor is out of range.
        """
        if asked is None:
            return None
        adapters = self.adapters()
        from edgeroute.adapters import parse_adapter

        return parse_adapter(asked, adapters.store.knows)

    def adapters(self) -> "Adapters":
        """Return the library.

        Raises:
            UsageError: there is none.
        """
        found = self._loaded.adapters
        if found is None:
            raise UsageError("this Runtime has no adapters; open it with adapters=FOLDER")
        return found

    def _wants_full(self, asked: str | None) -> bool:
        """Check what `generate` would take as `depth`.

        Raises:
            UsageError: it is neither `full` nor what this Runtime was opened with.
        """
        if asked in (None, "full"):
            return asked == "full"
        if asked == self._params.depth:
            return False
        raise UsageError(
            f"depth must be full, or the plan that this Runtime was opened with "
            f"({self._params.depth!r}), got {asked!r}; open one with depth={asked!r}"
        )

    def _encode(
        self, prompt: str | None, messages: Sequence[Message] | None, ids: Sequence[int] | None
    ) -> list[int]:
        """Turn exactly one of prompt, messages and token ids into a prompt that fits."""
        if sum(each is not None for each in (prompt, messages, ids)) != 1:
            raise UsageError("pass exactly one of prompt, messages and prompt_ids")
        tokenizer, limit = self._loaded.tokenizer, self._params.n_ctx
        if prompt is not None:
            if not isinstance(prompt, str):
                raise UsageError(f"prompt must be a str, got {type(prompt).__name__}")
            found = tokenizer.encode(
                prompt, add_special=True, parse_special=False, max_tokens=limit
            )
        elif messages is not None:
            # Jinja costs 50 ms to import, which plain prompts need not pay.
            from edgeroute.runtime.template import encode_chat

            found = encode_chat(tokenizer, messages, max_tokens=limit)
        else:
            found = list(ids or ())
            n_vocab = tokenizer.n_vocab
            if any(
                isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < n_vocab for i in found
            ):
                raise UsageError(f"prompt_ids must be whole numbers from 0 to {n_vocab - 1}")
        if not found:
            raise UsageError("the prompt is empty, and this model adds no token of its own")
        if len(found) > limit:
            raise UsageError(f"the prompt has {len(found)} tokens, over n_ctx={limit}; raise n_ctx")
        return found


def _count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
        raise UsageError(f"{name} must be a whole number from 0 on, got {value!r}")
    return value
