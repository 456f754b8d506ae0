"""Which policy writes the steps of an answer: the one asked for, or what was measured to pay."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from edgeroute.config import RunParams
from edgeroute.models.depth_file import fingerprint
from edgeroute.remote import RemoteModel
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.prefix import PrefixCache
from edgeroute.skippers.step_policies import parse_steps
from edgeroute.skippers.step_price import ALONE, PassCost, pays
from edgeroute.skippers.step_targets import LEARNING, TargetAccuracy
from edgeroute.skippers.steps import StepPolicy
from edgeroute.step_adapters import SmallAdapters
from edgeroute.step_memory import MAX_POLICIES, Marks, StepMemory, memory_path
from edgeroute.step_reader import StepModel
from edgeroute.step_remote import RemoteWriter
from edgeroute.step_routing import StepRouting
from edgeroute.steps_file import StepsFile, find_steps_file

if TYPE_CHECKING:
    from edgeroute.loaded import LoadedModel
    from edgeroute.scheduler import Scheduler

MAX_SERVED: Final = 4096
"""Answers that feedback may still come for."""
SAVE_EVERY: Final = 64
"""Answers of policies that learn between two saves, beside the one at the end."""
NOT_CALIBRATED: Final = (
    "the pair is not calibrated; `edgeroute calibrate --steps SMALL LARGE` measures what routing "
    "brings"
)


@dataclass(slots=True, kw_only=True, eq=False)
class StepChoice:
    """Names the policy of each request. The engine thread owns it.

    Attributes:
        default: what requests get that ask for nothing: `auto`, `off` or a policy's text.
        file: what was calibrated for the pair, if it was.
        costs: by model, what its passes cost now.
        memory: keeps what policies learn over restarts.

    Raises:
        OSError: what was learned before cannot be read, or a damaged file not be set aside.
    """

    default: str
    file: StepsFile | None
    costs: Mapping[str, PassCost]
    memory: StepMemory

    _served: OrderedDict[str, tuple[TargetAccuracy, int]] = field(
        default_factory=OrderedDict, init=False
    )
    """The last answers of policies that learn from feedback: by id, who decided with what seed."""
    _policies: OrderedDict[str, StepPolicy] = field(default_factory=OrderedDict, init=False)
    """Of at most MAX_POLICIES the learned state is kept; the one asked for longest ago goes."""
    _unsaved: bool = field(default=False, init=False)
    _n_until_save: int = field(default=SAVE_EVERY, init=False)
    _why: str = field(default=NOT_CALIBRATED, init=False)

    def __post_init__(self) -> None:
        self._policies.update((policy.spec, policy) for policy in self.memory.recall())

    def policy(self, asked: str | None) -> StepPolicy | None:
        """Return the policy of a request; None where one model writes all of it.

        Raises:
            UsageError: the policy needs weights that nobody has fitted.
        """
        spec: str | None = asked or self.default
        if spec == "auto":
            spec = self._calibrated()
        return None if spec in (None, "off") else self._find(str(spec))

    def _calibrated(self) -> str | None:
        """Return the calibrated policy's text while it pays here and now; None while not."""
        file = self.file
        point = None if file is None or file.chosen is None else file.point(file.chosen)
        if file is None or point is None:
            if file is not None:
                self._why = f"no policy reached {file.target:g} of the large model's accuracy"
            return None
        alone = file.point("large")
        load, against = point.workload, ALONE if alone is None else alone.workload
        gain = pays(load, self.costs["small"], self.costs["large"], alone=against)
        if gain is None:  # not measured in this run yet: what calibration saw stands for it
            gain = pays(load, file.costs["small"], file.costs["large"], alone=against)
        self._why = "" if gain else (
            f"{point.spec} would take longer than the large model alone at what their passes "
            "cost now"
        )  # fmt: skip
        return point.spec if gain else None

    def _find(self, spec: str) -> StepPolicy:
        policy = self._policies.pop(spec, None)
        if policy is None:
            learned = None if self.file is None else self.file.learned
            policy = parse_steps(spec, learned)
            # One policy may be written in several ways: what it learned is one.
            policy = self._policies.pop(policy.spec, policy)
            while len(self._policies) >= MAX_POLICIES:
                self._policies.popitem(last=False)
        self._policies[policy.spec] = policy
        return policy

    def serve(self, generation_id: str, policy: StepPolicy, seed: int) -> None:
        """Remember who decided an answer, if that learns from it or from its feedback."""
        if isinstance(policy, LEARNING):
            self._unsaved = True
            self._n_until_save -= 1
        if self._n_until_save <= 0:
            self._n_until_save = SAVE_EVERY
            try:
                self.save()
            except OSError as error:  # a full disk must not end answers; tried again later
                self.memory.failed(error)
        if isinstance(policy, TargetAccuracy):
            self._served[generation_id] = (policy, seed)
            while len(self._served) > MAX_SERVED:
                self._served.popitem(last=False)

    def feedback(self, generation_id: str, reward: float) -> bool:
        """Tell a policy what its answer was worth, 0 to 1; False if none of them wants to know.

        Raises:
            UsageError: the reward is out of range.
        """
        policy, seed = self._served.get(generation_id, (None, 0))
        taken = policy is not None and policy.feedback(seed, reward)
        self._served.pop(generation_id, None)
        self._unsaved |= taken
        return taken

    def save(self) -> None:
        """Write what was learned since the last time.

        Raises:
            OSError: it could not be written; the old file is untouched.
        """
        if self._unsaved:
            self.memory.save(each for each in self._policies.values() if isinstance(each, LEARNING))
            self._unsaved = False

    def take_over(self, other: "StepChoice") -> None:
        """Have what another learned from feedback, and the answers that it is still due for."""
        self._served, self._policies = other._served, other._policies
        self._unsaved = other._unsaved

    def stats(self) -> dict[str, object]:
        """Return what is asked for and what that is now, as plain JSON types."""
        spec = self._calibrated() if self.default == "auto" else self.default
        on = spec not in (None, "off")
        found: dict[str, object] = {"asked": self.default, "on": on, "policy": spec if on else None,
                                    "learned": self.memory.stats()}  # fmt: skip
        return found if on or not self._why else found | {"why": self._why}


def open_routing(
    scheduler: "Scheduler", loaded: "LoadedModel", params: RunParams, wake: Callable[[], None]
) -> StepRouting:
    """Make what writes answers with the two models that `params` name.

    Args:
        scheduler: runs the requests.
        loaded: the model, and the small one if there is one.
        params: name the pair; see RunParams.steps_on.
        wake: called from another thread when something of a remote model arrived.

    Raises:
        UsageError, StepsFileError: the endpoint's address or the steps file cannot be used.
        OSError: what policies learned cannot be read.
    """
    small = loaded.small
    main = StepModel(who="small" if small is None else "large", forward=loaded.forward,
                     prefix=scheduler.prefix, tokenizer=loaded.tokenizer,
                     n_ubatch=params.n_ubatch)  # fmt: skip
    if small is None:
        remote = RemoteModel(str(params.remote), wake, timeout_s=params.remote_timeout_s)
        file = _file(remote.name, loaded.file, params)
        writer = RemoteWriter(remote, loaded.tokenizer)
        choice = StepChoice(default=params.steps, file=file,
                            costs={"small": main.cost, "large": writer.cost},
                            memory=_memory(remote.name, loaded.file, params))  # fmt: skip
        return StepRouting(scheduler, main, writer, same=True, choice=choice,
                           adapters=SmallAdapters(None))  # fmt: skip
    prefix = PrefixCache(small.kv, params.n_ubatch)
    other = StepModel(who="small", forward=small.forward, prefix=prefix, tokenizer=small.tokenizer,
                      n_ubatch=params.n_ubatch)  # fmt: skip
    file = _file(loaded.file, small.file, params)
    choice = StepChoice(default=params.steps, file=file,
                        costs={"small": other.cost, "large": main.cost},
                        memory=_memory(loaded.file, small.file, params))  # fmt: skip
    same = small.tokenizer is loaded.tokenizer
    return StepRouting(scheduler, main, other, same=same, choice=choice,
                       adapters=SmallAdapters(small.adapters))  # fmt: skip


def _file(large: GGUFFile | str, small: GGUFFile, params: RunParams) -> StepsFile | None:
    """Find and read what was calibrated for a pair; a remote model goes by its name."""
    name = large if isinstance(large, str) else large.path
    path = find_steps_file(name, small.path, params.steps_file)
    if path is None:
        if params.steps.startswith("learned"):
            raise UsageError(f"steps={params.steps!r} needs weights; {NOT_CALIBRATED}")
        return None
    mark = large if isinstance(large, str) else fingerprint(large)
    return StepsFile.read(path, fingerprint(small), mark)


def _memory(large: GGUFFile | str, small: GGUFFile, params: RunParams) -> StepMemory:
    """Find what the policies of a pair learned before; a remote model goes by its name."""
    name = large if isinstance(large, str) else large.path

    def marks() -> Marks:
        mark = large if isinstance(large, str) else fingerprint(large)
        return Marks(small=fingerprint(small), large=mark)

    return StepMemory(memory_path(name, small.path, params.steps_state), marks)
