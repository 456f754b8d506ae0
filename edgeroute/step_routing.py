"""Answers written by two models, step by step: one pass at a time, on the engine thread.

The answer belongs to the main model's request: its tokens, its sampler, its grammar. The model
beside it follows, see `edgeroute.step_reader`. A token counts once it is committed; what is
drafted and refused was never seen by the sampler, the grammar or the listener.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from edgeroute.loaded import MAX_DRAFT
from edgeroute.request import Request
from edgeroute.runtime.errors import EdgerouteError, GrammarError
from edgeroute.runtime.sampler import Sampler, log_softmax
from edgeroute.skippers.step_bounds import StepBounds
from edgeroute.skippers.step_signals import glance
from edgeroute.skippers.steps import UNCHECKED, StepPart, StepPolicy, Who
from edgeroute.step_adapters import SmallAdapters
from edgeroute.step_check import Checker
from edgeroute.step_compute import main_compute, open_follower
from edgeroute.step_reader import Follower, Logits, Reader, StepModel
from edgeroute.step_remote import RemoteWriter
from edgeroute.step_state import Account, Draft, Phase, StepState

if TYPE_CHECKING:
    from edgeroute.scheduler import Scheduler
    from edgeroute.step_choice import StepChoice


class StepRouting:
    """Runs answers in steps for a Scheduler.

    Args:
        scheduler: computes with the main model, and ends requests.
        main: the model that answers belong to.
        other: the local model beside it, or what asks a remote one.
        same: whether both local models have one vocabulary.
        choice: names the policy of each request.
        adapters: of the local model beside the main one.
    """

    def __init__(
        self, scheduler: "Scheduler", main: StepModel, other: StepModel | RemoteWriter, *,
        same: bool, choice: "StepChoice", adapters: SmallAdapters,
    ) -> None:  # fmt: skip
        self._scheduler = scheduler
        self._main = main
        self._other = other if isinstance(other, StepModel) else None
        self._remote = other if isinstance(other, RemoteWriter) else None
        self._same = same
        self.choice = choice
        self.adapters = adapters
        self.new_bounds: Callable[[], StepBounds] = StepBounds
        """Makes what finds the ends of an answer's steps."""
        self._checker = Checker(main, same=same)
        self._phases: dict[Phase, Callable[[Request, StepState], None]] = {
            "choose": self._choose, "look": self._look, "write": self._write,
            "draft": self._draft, "check": self._check, "call": self._hear,
        }  # fmt: skip

    # a request's life

    def open(self, request: Request) -> bool:
        """Give a request its cells in the other model, if it is to be answered in steps.

        Returns:
            False while others hold those cells; ask again when one ends.
        """
        policy = self.choice.policy(request.asked_steps)
        sequence = request.sequence
        if policy is None or sequence is None:
            return True
        other = None
        if self._other is not None:
            other = open_follower(self._scheduler, self._other, request, same=self._same)
            if other is None:
                return False
        n_prompt = len(request.prompt_ids)
        main = Reader(
            self._main,
            sequence,
            n_prompt,
            main_compute(self._scheduler, self._main, request),
            request.lora,
        )
        request.steps = self._state(request, policy, main, other)
        self.choice.serve(request.id, policy, request.sampler.seed)
        return True

    def _state(
        self, request: Request, policy: StepPolicy, main: Reader, other: Follower | None
    ) -> StepState:
        def reads() -> tuple[int, int]:
            theirs = 0 if other is None else other.reader.n_read
            return (main.n_read, theirs) if self._main.who == "small" else (theirs, main.n_read)

        state = StepState(
            run=policy.begin(request.sampler.seed), main=main, other=other,
            account=Account(reads), bounds=self.new_bounds(),
        )  # fmt: skip
        state.small_lost = other is not None and not other.reader.has_room
        if request.other_sampler is not None:
            state.sampler = request.other_sampler(0)
        return state

    def end(self, request: Request) -> None:
        """Let go of what a request held; its parts of steps stay with it."""
        self.adapters.release(request)
        state = request.steps
        if state is None or state.ended:
            return
        state.ended = True
        self._note(state, state.account.close(state.who))
        if self._remote is not None:
            self._remote.end(state)
        if state.sampler is not None:
            state.sampler.close()
        if state.other is not None and self._other is not None:
            self._other.prefix.keep(state.other.reader.sequence)

    def saw(self, n_tokens: int, seconds: float) -> None:
        """Learn what a pass of the main model took, whatever it was for."""
        self._main.cost.observe(n_tokens, seconds)

    def stats(self) -> dict[str, object]:
        """Return what each model evaluated and what its passes cost, as plain JSON types."""
        models = [self._main] if self._other is None else [self._main, self._other]
        found = (
            self.choice.stats()
            | {
                "costs": {who: cost.to_dict() for who, cost in self.choice.costs.items()},
                "read": {model.who: model.n_read for model in models},
                "passes": {model.who: model.n_passes for model in models},
            }
            | self.adapters.stats()
        )
        return found if self._remote is None else found | {"remote": self._remote.stats()}

    # one pass

    def advance(self, request: Request) -> None:
        """Do what comes next for a request: at most one pass of one model."""
        state = request.steps
        if state is None or request.sequence is None:
            return
        try:
            self._phases[state.phase](request, state)
        except EdgerouteError as error:
            self._scheduler.fail(request, error)

    def _choose(self, request: Request, state: StepState) -> None:
        if not state.run.looks:
            self._begin(request, state, state.run.choose(None))
            return
        self._follow(request, state)
        if state.small_lost:  # nobody is there to look
            state.account.fell_back()
            self._begin(request, state, "large")
        else:
            state.phase = "look"
            self._look(request, state)

    def _look(self, request: Request, state: StepState) -> None:
        """Have the small model look at the step's first token; if it writes, that is drawn."""
        wants_hidden = state.run.wants_hidden
        logits = self._read(request, state, "small", hidden=wants_hidden)
        if logits is None:
            return
        position = len(state.main.tokens) - state.main.n_prompt
        hidden = self._small(state).hidden() if wants_hidden else None
        seen = glance(logits[0], state.account.index, position, hidden)
        state.account.looked(seen.entropy)
        self._begin(request, state, state.run.choose(seen), logits[0])

    def _begin(
        self, request: Request, state: StepState, who: Who, logits: Logits | None = None
    ) -> None:
        """Let a model write, from logits of its own if there are some."""
        if logits is None:
            self._follow(request, state)
        if who == "small" and state.small_lost:
            state.account.fell_back()
            who = "large"
        if who == "large" and self._remote is not None:
            state.who = "large"
            if self._remote.ask(request, state):
                state.phase = "call"
                return
            state.account.fell_back()
            who = "small"
        if self._remote is not None:
            self._remote.end(state)
        state.who = who
        if who == "small" and (state.run.check is not None or not self._direct):
            state.draft = Draft(bounds=state.bounds.copy())
            state.phase = "draft"
            if logits is not None:
                self._draft_token(request, state, logits)
            return
        state.phase = "write"
        if who == "small" and logits is not None:
            self._draw(request, state, logits)

    def _write(self, request: Request, state: StepState) -> None:
        """Decode a token that counts at once."""
        logits = self._read(request, state, state.who)
        if logits is None:
            return
        if state.run.watches and not state.switched:
            who = state.run.at_token(state.who, logits[0])
            if who != state.who and not (who == "small" and state.small_lost):
                state.who, state.switched = who, True
                return
        self._draw(request, state, logits[0])

    def _draw(self, request: Request, state: StepState, logits: Logits) -> None:
        state.switched = False
        token = request.sampler.sample(_fit(logits, request.sampler.n_vocab))
        self.commit(request, state, token, state.who)
        if request.sequence is None or state.phase != "write" or state.fix_left is None:
            return
        state.fix_left -= 1
        if state.fix_left <= 0 and (self._same or state.bounds.whole):
            state.fix_left = None
            self._begin(request, state, "small")

    def commit(self, request: Request, state: StepState, token: int, who: Who) -> None:
        """Make a token part of the answer; it may end the step, or the request."""
        self._note(state, state.account.wrote(who))
        piece = self._main.tokenizer.piece(token)
        request.model = who
        state.text += piece
        self._scheduler.commit(request, token)
        if request.sequence is not None and state.bounds.push(piece):
            self._note(state, state.account.close(who))
            state.account.index += 1
            state.phase, state.fix_left = "choose", None

    # drafts

    def _draft(self, request: Request, state: StepState) -> None:
        logits = self._small(state).read()
        if logits is not None:
            self._draft_token(request, state, logits[0])

    def _draft_token(self, request: Request, state: StepState, logits: Logits) -> None:
        """Draw a token that counts only once it was checked, or told to the main model."""
        draft, follower, sampler = state.draft, state.other, state.sampler
        assert draft is not None and follower is not None
        vocabulary = follower.reader.model.tokenizer
        logits = _fit(logits, vocabulary.n_vocab)
        token = int(logits.argmax()) if sampler is None else sampler.sample(logits)
        draft.steps[-1].append(token)
        follower.write(token)
        draft.ended = vocabulary.is_eog(token)
        ends = draft.ended
        if not ends:
            if sampler is not None:
                sampler.accept(token)
            ends = draft.bounds.push(vocabulary.piece(token))
        how = state.run.check or UNCHECKED
        whole = self._same or draft.bounds.whole
        unsure = how.sure > 0 and whole and float(np.exp(log_softmax(logits)[token])) < how.sure
        enough = draft.n_tokens >= how.defer
        left = min(MAX_DRAFT, self._main.n_ubatch - 1, request.n_left)
        full = draft.n_tokens >= left and whole
        if draft.ended or full or unsure or (ends and enough) or not follower.reader.has_room:
            state.phase = "check"
        elif ends:
            draft.steps.append([])

    def _check(self, request: Request, state: StepState) -> None:
        """Have the large model look at a draft, and make what it keeps part of the answer."""
        draft = state.draft
        assert draft is not None
        verdict = self._checker.judge(request, state, draft)
        if verdict is None:
            return
        state.draft, refused = None, verdict.n_kept < len(verdict.tokens)
        for i, token in enumerate(verdict.tokens[: verdict.n_kept]):
            if not request.sampler.admits(token):
                refused = True
                break
            verdict.before(i, state, request)
            self.commit(request, state, token, "small")
            if request.sequence is None:
                return
            verdict.after(i, state)
        else:
            i = verdict.n_kept
        state.main.cut(len(state.main.tokens) - 1)  # whose logits nobody has kept
        if refused:
            state.account.checked(verdict.score(i), len(verdict.tokens) - i)
            self._correct(request, state, verdict.row(i))
        elif state.phase == "check":  # the draft ended within a step
            self._begin(request, state, "small")

    def _correct(self, request: Request, state: StepState, logits: Logits | None) -> None:
        """Let the large model write on where it refused a token, with the logits it has for it."""
        how = state.run.check or UNCHECKED
        state.small_lost |= not self._direct and how is UNCHECKED  # its grammar went another way
        state.who, state.phase = "large", "write"
        state.fix_left = how.fix or None
        if logits is not None:
            self._draw(request, state, logits)

    # a remote model

    def _hear(self, request: Request, state: StepState) -> None:
        """Take a step of the remote model, once it is whole; write it here if there is none."""
        assert self._remote is not None
        told = self._remote.hear(request, state)
        if told is None:
            return
        if told.failed:
            state.account.fell_back()
            self._begin_here(request, state)
            return
        for token in told.tokens:
            if not request.sampler.admits(token):
                self._remote.end(state)
                self._begin_here(request, state)
                return
            self.commit(request, state, token, "large")
            if request.sequence is None:
                return
        eos = self._main.tokenizer.eos
        if told.ended and (eos is None or request.sampler.admits(eos)):
            self._scheduler.finish(request, "stop")
        elif told.ended:  # its grammar, which the remote model does not know, wants more
            self._begin_here(request, state)
        elif state.phase == "call":  # cut off within a step
            self._begin(request, state, "large")

    def _begin_here(self, request: Request, state: StepState) -> None:
        state.who, state.phase = "small", "write"
        self._write(request, state)

    # models

    def close(self) -> None:
        """End what runs elsewhere, and keep what policies learned; safe to call twice.

        Raises:
            OSError: what was learned could not be written.
        """
        if self._remote is not None:
            self._remote.close()
        self.choice.save()

    @property
    def _direct(self) -> bool:
        """Whether the small model writes in the answer's own vocabulary."""
        return self._other is None or self._same

    def _small(self, state: StepState) -> Reader:
        return state.main if state.other is None else state.other.reader

    def _read(
        self, request: Request, state: StepState, who: Who, *, hidden: bool = False
    ) -> Logits | None:
        """Have a model read what it has not read; None while there is more, or if stopped."""
        if who == self._main.who:
            return state.main.read(hidden=hidden)
        self._follow(request, state)
        return self._small(state).read(hidden=hidden)

    def _follow(self, request: Request, state: StepState) -> None:
        """Tell the other model what was written."""
        follower = state.other
        if follower is None:
            return
        told = follower.follow(state.main.tokens, state.text)
        n_vocab = follower.reader.model.forward.model.hparams.n_vocab
        if not follower.reader.has_room or max(told, default=0) >= n_vocab:
            state.small_lost = True
        elif state.sampler is not None and told:
            self._tell_sampler(request, state, state.sampler, told)

    def _tell_sampler(
        self, request: Request, state: StepState, sampler: Sampler, told: list[int]
    ) -> None:
        """Let what draws the other model's tokens know what it did not draw."""
        small = self._small(state)
        if not self._same and request.other_sampler is not None:
            # What was refused has been through its grammar, which cannot be taken back.
            sampler.close()
            state.n_samplers += 1
            sampler = state.sampler = request.other_sampler(state.n_samplers)
            told = small.tokens[small.n_prompt :]
        try:
            for token in told:
                sampler.accept(token)
        except GrammarError:  # its tokens cannot end where the answer's do
            state.small_lost = True

    def _note(self, state: StepState, part: StepPart | None) -> None:
        if part is not None:
            state.run.note(part)


def _fit(logits: Logits, n_vocab: int) -> Logits:
    """Return logits for just the tokens that a vocabulary has; a model may have more or fewer."""
    if len(logits) >= n_vocab:
        return logits[:n_vocab]
    return np.concatenate([logits, np.full(n_vocab - len(logits), -np.inf, np.float32)])
