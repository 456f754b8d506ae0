"""A conversation: who said what, how to go on, and what is dropped when it grows too long."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgeroute.commands.generate_shared import SAMPLING, Answer, check_options, listen, pick
from edgeroute.runtime.errors import ContextError, EdgerouteError, UsageError

if TYPE_CHECKING:
    from edgeroute.engine import Options, Runtime

Message = dict[str, str]

_WHOLE = ("top_k", "seed", "max_tokens")
SETTABLE = (*SAMPLING, "max_tokens")


@dataclass(slots=True, kw_only=True)
class ChatSession:
    """One conversation with one model.

    Attributes:
        model: the model's name, for /save and --json.
        options: sampling options and max_tokens, by name; None is the engine's own choice.
        write: gets the text of answers; `note` gets remarks about the conversation.
        system: the system message, which is never dropped.
        adapter: what answers, as `generate` takes it.
        small_adapter: the same of the small model's steps.
        session: where keys and values are kept from one run to the next, as `generate` takes it.
        turns: user and assistant messages in turn.
    """

    runtime: "Runtime"
    model: str
    options: dict[str, Any]
    write: Callable[[str], None]
    note: Callable[[str], None]
    system: str | None = None
    adapter: str | dict[str, float] | None = None
    small_adapter: str | dict[str, float] | None = None
    session: str | None = None
    turns: list[Message] = field(default_factory=list)
    last: Answer | None = None
    n_answers: int = 0
    n_generated: int = 0
    n_dropped: int = 0

    @property
    def messages(self) -> list[Message]:
        """The whole conversation as the model sees it."""
        head = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*head, *self.turns]

    def ask(self, text: str) -> None:
        """Say something and stream the answer; an interrupted one is kept as far as it came.

        Raises:
            EdgerouteError: the request was refused; the conversation is as before, less
                what was dropped to make room.
        """
        self.turns.append({"role": "user", "content": text})
        try:
            self._make_room()
            answer = listen(self.runtime, None, self._request(), self.write)
        except BaseException:
            self.turns.pop()
            raise
        self.last = answer
        self.n_answers += 1
        self.n_generated += len(answer.token_ids)
        self.write("" if answer.text.endswith("\n") else "\n")
        for each in answer.stats.get("continued", ()):
            self.note(each)
        if answer.text:
            self.turns.append({"role": "assistant", "content": answer.text})
        else:
            self.turns.pop()
            self.note("nothing was said; your message is taken back")
        if answer.finish_reason == "cancelled" and answer.text:
            self.note("stopped; what was said is kept (/undo takes it back)")
        elif answer.finish_reason == "length":
            self.note(f"the answer was cut at {len(answer.token_ids)} tokens (/set max_tokens)")

    def retry(self) -> None:
        """Answer the last message again.

        Raises:
            UsageError: there is none.
            EdgerouteError: as `ask`; the earlier answer is back then.
        """
        turns = list(self.turns)
        while self.turns and self.turns[-1]["role"] != "user":
            self.turns.pop()
        if not self.turns:
            self.turns = turns
            raise UsageError("there is nothing to answer again; say something first")
        if not self.options.get("temperature"):
            self.note("the temperature is 0, so the answer repeats itself (/set temperature 0.8)")
        text = self.turns.pop()["content"]
        try:
            self.ask(text)
        except EdgerouteError:
            self.turns = turns
            raise
        if self.last is not None and not self.last.text:
            self.turns = turns
            self.note("the earlier answer stays")

    def undo(self) -> int:
        """Take the last message and its answer back; return how many messages went."""
        n = len(self.turns)
        while self.turns and self.turns.pop()["role"] != "user":
            pass
        return n - len(self.turns)

    def set(self, key: str, text: str) -> None:
        """Set an option from its text; `none` gives the engine's own choice.

        Raises:
            UsageError: no such option, or a value out of range; nothing was changed.
        """
        value: int | float | None = None
        try:
            if text.lower() != "none":
                value = int(text) if key in _WHOLE else float(text)
        except ValueError:
            kind = "a whole number" if key in _WHOLE else "a number"
            raise UsageError(f"{key} takes {kind}, got {text!r}") from None
        if key == "max_tokens" and (value is None or value < 1):
            raise UsageError(f"max_tokens must be a whole number from 1 on, got {text!r}")
        check_options({**self.options, key: value})
        self.options[key] = value

    def save(self, path: Path) -> None:
        """Write the conversation as JSON.

        Raises:
            OSError: the file cannot be written.
        """
        content = {"model": self.model, "messages": self.messages}
        path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", "utf-8")

    def load(self, path: Path) -> None:
        """Go on with a saved conversation instead of this one.

        Raises:
            OSError: the file cannot be read.
            UsageError: it is not a saved conversation; this one is as before.
        """
        from edgeroute.runtime.template import check_messages

        try:
            found = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise UsageError(f"{path} is not a saved conversation: {error}") from None
        messages = check_messages(found.get("messages") if isinstance(found, dict) else found)
        system = messages.pop(0)["content"] if messages[0]["role"] == "system" else None
        for i, message in enumerate(messages):
            if message["role"] not in ("user", "assistant"):
                raise UsageError(f"{path}: turn {i} is by {message['role']!r}, not user, assistant")
        self.system = system
        self.turns = [{"role": m["role"], "content": m["content"]} for m in messages]

    def _request(self) -> "Options":
        options = pick(self.options, SETTABLE)
        # Continue from the cells of the turn before, whatever batches they came from.
        more = {"messages": self.messages, "prefix": "all", "adapter": self.adapter,
                "small_adapter": self.small_adapter,
                "session": self.session}  # fmt: skip
        return cast("Options", options | more)

    def _make_room(self) -> None:
        """Drop the oldest turns until the prompt leaves room for an answer."""
        n_ctx = self.runtime.params.n_ctx
        room = n_ctx - min(int(self.options["max_tokens"]), n_ctx // 4)
        n_before = len(self.turns)
        while len(self.turns) > 1 and not self._fits(room):
            del self.turns[0]
            while len(self.turns) > 1 and self.turns[0]["role"] != "user":
                del self.turns[0]
        dropped = n_before - len(self.turns)
        if dropped:
            self.n_dropped += dropped
            self.note(f"the conversation outgrew n_ctx={n_ctx}: its {dropped} oldest messages "
                      "were dropped")  # fmt: skip

    def _fits(self, room: int) -> bool:
        """Count the prompt's tokens by a request that generates none."""
        try:
            counted = self.runtime.generate(messages=self.messages, max_tokens=0)
        except ContextError:
            return False
        return counted.stats.n_prompt <= room
