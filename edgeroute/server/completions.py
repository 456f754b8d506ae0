"""POST /v1/completions: texts or token ids in, what follows them out."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, cast

from edgeroute.engine import Runtime
from edgeroute.runtime.tokenizer import refuse_above
from edgeroute.server.asked import Begun, Fields, Shape
from edgeroute.server.bodies import MAX_ANSWERS, CompletionBody, Prompt
from edgeroute.server.errors import ApiError
from edgeroute.server.logprobs import Spelling, joined
from edgeroute.server.options import check_bias, check_ids, common_options, max_tokens, nth_seed
from edgeroute.server.records import ServerParams
from edgeroute.stats import Chunk

SHAPE: Final = Shape(
    endpoint="completions", prefix="cmpl", whole="text_completion", chunk="text_completion"
)
DEFAULT_MAX_TOKENS: Final = 16
"""OpenAI's."""


class CompletionQuestion:
    """A completion request whose fields are checked as far as no model is needed for it.

    Raises:
        ApiError: 400, with the field at fault.
    """

    prompt_field = "prompt"

    def __init__(self, body: CompletionBody, params: ServerParams) -> None:
        self._body, self._n = body, body.n or 1
        self._prompts = split_inputs(body.prompt, "prompt")
        n_answers = self._n * len(self._prompts)
        if n_answers > MAX_ANSWERS:
            raise ApiError(
                400, f"{len(self._prompts)} prompts with n={self._n} are {n_answers} answers, the "
                f"limit is {MAX_ANSWERS}; send several requests", param="prompt",
            )  # fmt: skip
        if body.best_of not in (None, 1, self._n):
            raise ApiError(400, f"best_of={body.best_of} is not supported: answers are not ranked "
                                "here; pass n", param="best_of",
                           code="unsupported_parameter")  # fmt: skip
        if body.echo and body.logprobs is not None:
            raise ApiError(400, "echo and logprobs together are not supported: a prompt's tokens "
                                "have no log-probabilities here", param="echo",
                           code="unsupported_parameter")  # fmt: skip
        self._options = common_options(body) | max_tokens(
            body.max_tokens, DEFAULT_MAX_TOKENS, params
        )
        if "session" in self._options and len(self._prompts) > 1:
            raise ApiError(400, "a session is one conversation; pass one prompt", param="prompt")
        if body.logprobs is not None:
            self._options["logprobs"] = body.logprobs

    def begin(self, runtime: Runtime) -> Sequence[Begun]:
        """Prepare all choices; see Question."""
        check_bias(runtime, self._options)
        check_ids(runtime, self._prompts, "prompt")
        if len(self._prompts) > 1:
            self._check_room(runtime)
        spelling = None if self._body.logprobs is None else Spelling(runtime.tokenizer)
        found = []
        for number, prompt in enumerate(self._prompts):
            options: Mapping[str, Any] = self._options | _prompt(prompt)
            echoed = self._echo(runtime, prompt)
            found += [
                Begun(nth_seed(options, i), TextChoice(echoed, spelling), number)
                for i in range(self._n)
            ]
        return found

    def _check_room(self, runtime: Runtime) -> None:
        """Refuse all before the first of them is being answered.

        Raises:
            ContextError: a prompt has more tokens than there is room for.
        """
        limit = runtime.params.n_ctx
        for prompt in self._prompts:
            if isinstance(prompt, str):
                runtime.tokenizer.encode(
                    prompt, add_special=True, parse_special=False, max_tokens=limit
                )
            else:
                refuse_above(len(prompt), limit)

    def _echo(self, runtime: Runtime, prompt: str | Sequence[int]) -> str:
        if not self._body.echo:
            return ""
        return prompt if isinstance(prompt, str) else runtime.tokenizer.decode(prompt)


class TextChoice:
    """A text as it is written.

    Args:
        echoed: the prompt, where the text begins with it.
        spelling: spells log-probabilities where they were asked for.
    """

    n_calls = 0

    def __init__(self, echoed: str, spelling: Spelling | None) -> None:
        self._texts = [echoed]
        self._spelling = spelling
        self._offset = 0
        self._logprobs: list[Fields | None] = []

    def begin(self) -> Iterable[Fields]:
        """Return the prompt, where it was asked for."""
        if self._texts[0]:
            yield _piece(self._texts[0])

    def take(self, chunk: Chunk) -> Iterable[Fields]:
        """Take a piece in; see Choice."""
        found = None
        if self._spelling is not None:
            found, self._offset = self._spelling.text(chunk.logprobs, self._offset)
        self._texts.append(chunk.text)
        self._logprobs.append(found)
        return [_piece(chunk.text, found)] if chunk.text or found is not None else []

    def plain(self, text: str) -> Fields | None:
        """Return what a stream shows of a text without figures; see Choice."""
        return _piece(text) if self._spelling is None else None

    def end(self) -> Iterable[Fields]:
        """Take the end in; see Choice."""
        return [_piece("")]

    def whole(self) -> Fields:
        """Return the whole text; see Choice."""
        return _piece("".join(self._texts), joined(self._logprobs))


def split_inputs(given: Prompt, field: str) -> list[str | list[int]]:
    """Take a text, several, token ids, or several lists of them, as a list of inputs.

    Raises:
        ApiError: 400, there is none, or kinds are mixed.
    """
    if isinstance(given, str):
        return [given]
    kinds = {type(each) for each in given}
    if kinds == {int}:
        return [cast("list[int]", given)]
    if len(kinds) != 1:
        problem = "is empty" if not given else "mixes texts, token ids or lists of them"
        raise ApiError(400, f"{field} {problem}; pass a text, token ids, or a list of one kind",
                       param=field)  # fmt: skip
    return cast("list[str | list[int]]", given)


def _prompt(prompt: str | Sequence[int]) -> dict[str, Any]:
    return {"prompt": prompt} if isinstance(prompt, str) else {"prompt_ids": prompt}


def _piece(text: str, logprobs: Fields | None = None) -> Fields:
    return {"text": text, "logprobs": logprobs}
