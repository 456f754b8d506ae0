"""What the small model sees at the start of each step of answers that are written already."""

import base64
import contextlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeroute.config import RunParams
from edgeroute.loaded import LoadedModel
from edgeroute.models.forward import Piece
from edgeroute.runtime import machine
from edgeroute.runtime.errors import CapacityError, ComputeError
from edgeroute.runtime.template import encode_chat
from edgeroute.skippers.step_bounds import StepBounds
from edgeroute.skippers.step_signals import glance
from edgeroute.skippers.steps import Glance
from edgeroute.tools.step_tasks import Task

N_CTX, N_UBATCH = 4096, 512


class Watcher:
    """A model that reads answers as if it had written them.

    Attributes:
        n_embd: values of a hidden state.

    Lifetime: as long as the model.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        if loaded.layers is not None or loaded.experts is not None:
            raise CapacityError(
                f"{loaded.file.path.name} does not fit the memory budget; the small model of a "
                "pair is kept in memory: raise --memory"
            )
        self._loaded = loaded
        self._region = loaded.kv.take_all()
        self._n_ubatch = min(N_UBATCH, loaded.kv.n_cells)
        self._spans = loaded.forward.headless()
        self._held: list[int] = []
        self.n_embd = loaded.model.hparams.n_embd

    def watch(self, task: Task, answer: str) -> list[Glance]:
        """Return what the model sees at the start of each step of an answer to a task.

        Steps end where they would if this model wrote the text. Those beyond the context are
        left out.

        Raises:
            ComputeError: the computation failed.
        """
        loaded, tokenizer = self._loaded, self._loaded.tokenizer
        prompt = (loaded.encode(task.prompt or "") if task.messages is None
                  else encode_chat(tokenizer, task.messages))  # fmt: skip
        written = tokenizer.encode_more(answer)
        bounds, starts = StepBounds(), [0]
        for i, token in enumerate(written):
            if bounds.push(tokenizer.piece(token)) and i + 1 < len(written):
                starts.append(i + 1)
        return [
            self._glance([*prompt, *written[:start]], index, start)
            for index, start in enumerate(starts)
            if len(prompt) + start <= self._region.n_cells
        ]

    def _glance(self, tokens: list[int], index: int, position: int) -> Glance:
        """Read up to a step's start, less what is read already."""
        same = itertools.takewhile(
            lambda both: both[0] == both[1], zip(self._held, tokens[:-1], strict=False)
        )
        n = sum(1 for _ in same)
        logits: npt.NDArray[np.float32] | None = None
        n_fed = 0
        while n < len(tokens):
            fed = tokens[n : n + self._n_ubatch]
            piece = Piece(tokens=fed, pos=n, region=self._region)
            logits, n_fed = self._loaded.forward.run([piece], self._spans), len(fed)
            n += n_fed
        self._held = tokens
        if logits is None:
            raise ComputeError("the computation was stopped")
        hidden = self._loaded.forward.residual(n_fed)[-1]
        return glance(logits[0], index, position, hidden)


@contextlib.contextmanager
def open_watcher(small: Path, threads: int | None = None) -> Iterator[Watcher]:
    """Load a small model to watch answers with."""
    params = RunParams(n_ctx=N_CTX, n_ubatch=N_UBATCH, threads=threads)
    with contextlib.closing(LoadedModel(small, params)) as loaded:
        loaded.device.set_threads(threads or machine.usable_cores())
        yield Watcher(loaded)


def to_json(glances: Sequence[Glance]) -> list[dict[str, object]]:
    """Return glances as plain JSON types; hidden states as text."""
    return [
        {"index": each.index, "position": each.position, "entropy": each.entropy,
         "top_entropy": each.top_entropy, "margin": each.margin,
         "hidden": _to_text(each.hidden)}
        for each in glances
    ]  # fmt: skip


def from_json(values: Sequence[dict[str, Any]]) -> list[Glance]:
    """Return what `to_json` was given."""
    return [Glance(**value | {"hidden": _from_text(value["hidden"])}) for value in values]


def _to_text(hidden: npt.NDArray[np.float32] | None) -> str | None:
    return None if hidden is None else base64.b64encode(hidden.astype("<f4").tobytes()).decode()


def _from_text(text: str | None) -> npt.NDArray[np.float32] | None:
    if text is None:
        return None
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float32)
