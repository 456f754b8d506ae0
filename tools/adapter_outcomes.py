"""How every adapter of a suite answers every test prompt: what routers are replayed on."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.whole_file import replacing

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcomes:
    """How every arm answers every test prompt.

    Attributes:
        arms: names; the first is the base.
        contexts: (n_prompts, n_embd), the prompts' token embeddings, averaged.
        scores: (n_prompts, n_arms), what the task's verifier gives.
        labels: (n_prompts,), numbers into `tasks`.
        tasks: names.
        prompts: texts.
    """

    arms: tuple[str, ...]
    contexts: Floats
    scores: Floats
    labels: npt.NDArray[np.int64]
    tasks: tuple[str, ...]
    prompts: tuple[str, ...]

    def save(self, path: Path) -> None:
        """Write an .npz that `load_outcomes` reads, whole or not at all."""
        with replacing(path) as part, part.open("wb") as file:
            np.savez_compressed(
                file, arms=np.array(self.arms), contexts=self.contexts, outcomes=self.scores,
                labels=self.labels, tasks=np.array(self.tasks), prompts=np.array(self.prompts),
            )  # fmt: skip


def load_outcomes(path: Path) -> Outcomes:
    """Read what `Outcomes.save` wrote.

    Raises:
        UsageError: it is no such file.
    """
    try:
        with np.load(path, allow_pickle=False) as found:
            return Outcomes(
                arms=tuple(map(str, found["arms"])), contexts=found["contexts"],
                scores=found["outcomes"], labels=found["labels"].astype(np.int64),
                tasks=tuple(map(str, found["tasks"])), prompts=tuple(map(str, found["prompts"])),
            )  # fmt: skip
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{path} holds no outcomes of a suite: {str(error)[:120]}") from error
