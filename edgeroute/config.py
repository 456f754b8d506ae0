"""Settings of a run: one record, and the one place where their sources merge."""

import dataclasses
import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from edgeroute.runtime.energy_model import check_energy
from edgeroute.runtime.errors import UsageError
from edgeroute.runtime.records import KV_TYPE_NAMES
from edgeroute.runtime.units import parse_bytes

ENV_PREFIX = "EDGEROUTE_"
TEXTS = frozenset((
    "memory", "kv_type", "device", "policy", "prefetch", "trace", "adapter_state", "small",
    "speculate", "depth", "depth_file", "steps", "steps_file", "steps_state", "remote", "sessions",
    "sessions_bytes", "levers", "overlap", "read_bytes",
    "energy", "device_memory", "run_ahead", "host_experts", "sidecar",
))  # fmt: skip
PATHS = frozenset(("small", "depth_file", "steps_file", "steps_state", "sessions"))
LIBRARIES = frozenset(("adapters", "small_adapters"))
SPECULATE = ("auto", "off", "lookup", "self", "small")
LEVERS = ("proven", "asked", "off")
OVERLAP = ("auto", "on", "off")
RUN_AHEAD = ("auto", "off")
HOST_EXPERTS = ("auto", "on", "off")
SIDECAR = ("auto", "on", "off")
LOSSY = {"drop_misses": 1.0, "prefer_resident": 20.0, "degrade_misses": 1.0}
"""Settings by which tokens do without experts, or without their precision, and the largest value
of each: all of a token's weight, and more nats than a softmax in single precision has."""
READ_BYTES = (1 << 16, 1 << 22)
"""The shortest and the longest part that a page may be read in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunParams:
    """Settings of one Runtime. None means: measured on this machine.

    Attributes:
        memory: budget over weights, KV and compute buffers; bytes or text such as `2GiB`.
        threads: compute threads; given, the number is kept even on a busy machine.
        n_ctx: most tokens of one sequence, prompt and answer together.
        n_kv: cells of the KV pool that running and kept sequences share; None is n_ctx.
        n_ubatch: prompt tokens computed at once.
        max_batch: most sequences that decode, or prompts that are computed, in one pass. None is
            16, but 7 with plain weights of K- and I-types, 3 where weights are repacked (most
            quantised models) and 1 where they are floats: from 8, 4 or 2 on, ggml multiplies
            those by another kernel, quicker in sum but with other last bits, so that an answer
            would depend on who shares the pass. Set it where throughput counts more than that.
        kv_type: `f16` or `q8_0`.
        device: what computes: `cpu`; `auto`, the fastest that is proved to answer like the
            processor; or devices by ggml's names, by kind (`gpu`), or as `rpc:host:port`, several
            with commas between, which then share the layers.
        device_memory: what may be used of each device's own memory, bytes or text such as
            `2GiB`; None is what it has free, less a reserve.
        host_experts: where experts that a device has no room for are computed: `auto` wherever
            that is measured to be quicker, `off` always on the device, `on` always by the
            processor.
        policy: which expert leaves when another needs its slot; `auto` or a name, see
            `edgeroute.offload.eviction_registry`.
        prefetch: `auto` reads experts ahead while that is measured to pay, `off` never;
            the name of a predictor (`gate`, `eam`, `frequency`, or one that was trained,
            `learned:FILE`) by that one while it pays, and always with `levers="asked"`.
        drop_misses: share of a token's weight in a layer, 0 to 1, that experts may take with them
            which it does without while it decodes, because they would have to be read: those that
            weigh least. 0, the default, drops none. This changes answers, by what was in memory
            just then: equal prompts may get other answers. For paged mixtures of experts only;
            `edgeroute bench misses` measures what it costs and gains: 0.1 read 21 % fewer bytes
            for 0.07 nats of divergence on SmolLM2 refactored, half of its experts in memory.
        prefer_resident: how far below the last chosen expert, in nats of the router's rating, one
            that is in memory may lie to be taken for one that would have to be read, and how far
            above it the latter; never for the best. 0, the default, changes no choice. Changes
            answers as `drop_misses` does.
        degrade_misses: share of a token's weight in a layer, 0 to 1, that may come from copies of
            fewer bits, which `edgeroute convert copies` writes, of missing experts that weigh
            least. 0, the default, takes none. Changes answers as `drop_misses` does. The budget
            then holds an eighth fewer experts, for copies, so that small shares lose: on SmolLM2
            refactored, half of its experts in memory, 1 read 60 % fewer bytes for 0.06 nats of
            divergence, and 0.1 read 27 % more.
        repack_experts: False keeps the experts of a model that fits in the file's layout, as
            paged ones always are: slower to decode, and the same bits with and without paging.
        plain_prompts: True computes prompts from weights in the file's layout where those that
            are repacked are slower for it, and keeps both layouts if the budget holds them. Takes
            the bytes of the repacked matrices once more; on a model in Q4_K a third of a
            prompt's time less. Last bits of prompts are others.
        io_threads: reads of experts under way at once.
        read_bytes: the longest of them, as a number or text such as `1MiB`.
        direct_io: False reads weights through the page cache, True past it where the system can;
            None is True, unless a proof says otherwise.
        sidecar: `auto` reads paged experts from what `edgeroute convert pack` wrote beside the
            model, if that fits the model and takes fewer reads of the length that this disk is
            measured to like; `on` wherever it fits, `off` never.
        overlap: `auto` computes the experts that are in memory while others of their layer are
            read, as long as that is measured to pay; `on` always, with `levers="asked"`; `off`
            never.
        levers: `proven` uses, for what is left at `auto` or None, what `edgeroute bench levers`
            proved to win on this machine and model; whatever is on is watched, and switched off
            where it loses. `asked` takes the settings as they are given and watches nothing;
            `off` switches every lever off: no prefetch, policy `lru`, no overlap, no speculation,
            no running ahead, full depth, no steps.
        trace: a file to record which experts were chosen.
        adapters: LoRA adapters: a folder of them, one, or several. An empty tuple begins with
            none and lets them be added later.
        adapter_slots: adapters in memory at once, of each model; None is up to 8, as the budget
            allows.
        small: a smaller model, by name or path, kept in memory beside the model: it writes the
            easy steps of an answer, see `steps`, or else drafts, see `speculate`.
        small_adapters: LoRA adapters of the small model, for the steps that it writes; as
            `adapters`, but what there is when the Runtime opens is all there will be.
        steps: who writes the steps of an answer where there is a small model, or a remote one:
            `off` the model itself; a policy such as `verify:-0.5:-4` or `glimpse:1.2`, see
            `edgeroute.skippers.step_policies`; `auto` the policy that `edgeroute calibrate
            --steps` chose for the pair, while it is measured to pay.
        steps_file: what was calibrated for the pair, if not where `calibrate` put it.
        steps_state: the file where policies that learn while they run (`target`, `pace`,
            `accuracy`) keep what they learned; `off` for nowhere, None for one of the user's.
        remote: an OpenAI-compatible endpoint, `http://host:port/v1#model`, that writes the hard
            steps while the model here writes the easy ones. Its key, if it wants one, is read from
            the environment: EDGEROUTE_REMOTE_KEY.
        remote_timeout_s: how long a remote model may be silent before the model here writes on.
        run_ahead: `auto` computes up to four tokens of an answer in one pass where each is the
            strongest (temperature 0, no grammar) and all weights are in memory, as long as that
            is measured to pay; they come together then, at most 60 ms apart. Answers stay the
            same, bit for bit. `off` computes one.
        speculate: who drafts tokens, several of which the model then verifies in one pass;
            answers stay the same, bit for bit. `auto` does so where layers stream, by whichever
            source is measured to pay; `lookup` (what followed in the text before), `self` (a
            part of the model) and `small` always do; `off` never.
        adapter_state: the file where `adapter="auto"` keeps what feedback taught it; `off` for
            nowhere, None for one of the user's.
        depth: `full` computes every layer; a plan of the model's depth file leaves out what it
            names; `auto` takes the fastest plan within `depth_max_kl`, or none; `routed` lets
            routers decide for every prompt (see `tools/train_depth_router`).
        depth_file: where the plans are, if not where `edgeroute calibrate` put them.
        sessions: a folder for the keys and values of named sessions, which survive a restart
            there; None keeps none.
        sessions_bytes: what they may take on disk, as a number or text such as `8GiB`; the least
            recently used leave first. None is 4 GiB.
        depth_max_kl: divergence from the full model that `auto` accepts, nats per token; None is
            0.05.
        energy: where joules are from: `auto` counters that cost nothing to read (RAPL, a GPU's),
            else an estimate, which says so; `all` also sensors that a thread samples ten times a
            second (a Jetson's rails, a battery); `estimate`, or `estimate:WATTS` of a busy core;
            `off`.
    """

    memory: str | int | None = None
    threads: int | None = None
    n_ctx: int = 4096
    n_kv: int | None = None
    n_ubatch: int = 512
    max_batch: int | None = None
    kv_type: str = "f16"
    device: str = "cpu"
    device_memory: str | int | None = None
    host_experts: str = "auto"
    policy: str = "auto"
    prefetch: str = "auto"
    drop_misses: float = 0.0
    prefer_resident: float = 0.0
    degrade_misses: float = 0.0
    repack_experts: bool = True
    plain_prompts: bool = False
    io_threads: int | None = None
    read_bytes: str | int | None = None
    direct_io: bool | None = None
    sidecar: str = "auto"
    overlap: str = "auto"
    levers: str = "proven"
    energy: str = "auto"
    trace: str | None = None
    adapters: tuple[str, ...] | None = None
    adapter_slots: int | None = None
    adapter_state: str | None = None
    small: str | None = None
    small_adapters: tuple[str, ...] | None = None
    run_ahead: str = "auto"
    speculate: str = "auto"
    depth: str = "full"
    depth_file: str | None = None
    depth_max_kl: float | None = None
    steps: str = "auto"
    steps_file: str | None = None
    steps_state: str | None = None
    remote: str | None = None
    remote_timeout_s: float = 20.0
    sessions: str | None = None
    sessions_bytes: str | int | None = None

    def __post_init__(self) -> None:
        for name, low, high in (("threads", 1, 512), ("n_ctx", 32, 1 << 20), ("n_kv", 32, 1 << 22),
                                ("n_ubatch", 64, 4096), ("max_batch", 1, 256),
                                ("io_threads", 1, 64), ("adapter_slots", 1, 256)):  # fmt: skip
            value = getattr(self, name)
            if value is None and name not in ("n_ctx", "n_ubatch"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise UsageError(
                    f"{name} must be a whole number from {low} to {high}, got {value!r}"
                )
        if self.n_ubatch % 4:
            raise UsageError(f"n_ubatch must be a multiple of 4, got {self.n_ubatch}")
        if self.kv_type not in KV_TYPE_NAMES:
            raise UsageError(
                f"kv_type must be one of {', '.join(KV_TYPE_NAMES)}, got {self.kv_type!r}"
            )
        if self.n_kv is not None and self.n_kv < self.n_ctx:
            raise UsageError(f"n_kv must be at least n_ctx ({self.n_ctx}), got {self.n_kv}")
        for name in ("repack_experts", "plain_prompts"):
            if (given := getattr(self, name)) not in (True, False):
                raise UsageError(f"{name} must be true or false, got {given!r}")
        for name, known in (
            ("speculate", SPECULATE),
            ("levers", LEVERS),
            ("overlap", OVERLAP),
            ("run_ahead", RUN_AHEAD),
            ("host_experts", HOST_EXPERTS),
            ("sidecar", SIDECAR),
        ):
            if (value := getattr(self, name)) not in known:
                raise UsageError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if self.speculate == "small" and self.small is None:
            raise UsageError("speculate='small' needs a small model; name one by small=")
        kl, silence_s = self.depth_max_kl, self.remote_timeout_s
        if kl is not None and not _within(kl, 0, 100):
            raise UsageError(f"depth_max_kl must be a number of nats from 0 to 100, got {kl!r}")
        if not _within(silence_s, 0.01, 3600):
            raise UsageError(f"remote_timeout_s must be 0.01 to 3600 seconds, got {silence_s!r}")
        for name, most in LOSSY.items():
            if not _within(value := getattr(self, name), 0, most):
                raise UsageError(f"{name} must be a number from 0 to {most:g}, got {value!r}")
        if not isinstance(self.depth, str) or not self.depth:
            raise UsageError(f"depth must be full, auto or a plan's name, got {self.depth!r}")
        self._check_steps()
        for size in (self.memory, self.sessions_bytes, self.device_memory):
            if size is not None:
                parse_bytes(size)
        self._check_reads()
        check_energy(self.energy)
        if self.sessions is not None and (not isinstance(self.sessions, str) or not self.sessions):
            raise UsageError(f"sessions must be a folder, got {self.sessions!r}")
        if (self.policy, self.prefetch) != ("auto", "auto"):
            self._check_paging()

    def _check_reads(self) -> None:
        if self.direct_io not in (None, True, False):
            raise UsageError(f"direct_io must be true or false, got {self.direct_io!r}")
        low, high = READ_BYTES
        n_bytes = low if self.read_bytes is None else parse_bytes(self.read_bytes)
        if not low <= n_bytes <= high or n_bytes % 4096:
            raise UsageError(f"read_bytes must be a multiple of 4096 from {low} to {high}, "
                             f"got {self.read_bytes!r}")  # fmt: skip

    def _check_steps(self) -> None:
        if self.small is not None and self.remote is not None:
            raise UsageError("small and remote exclude each other: with remote, the model itself "
                             "is the small one of the pair")  # fmt: skip
        if self.small_adapters is not None:
            self._check_small_adapters()
        if self.steps in ("auto", "off"):
            return
        if self.small is None and self.remote is None:
            raise UsageError(f"steps={self.steps!r} needs two models; name a smaller one by "
                             "small=, or a larger one elsewhere by remote=")  # fmt: skip
        if self.speculate == "small":
            raise UsageError(f"the small model either drafts or writes steps: steps={self.steps!r} "
                             "and speculate='small' exclude each other")  # fmt: skip
        check_steps(self.steps, remote=self.remote is not None, same=True)

    def _check_small_adapters(self) -> None:
        if self.small is None:
            raise UsageError("small_adapters are for the small model of a pair; name one by "
                             "small=, or pass them as adapters=")  # fmt: skip
        if self.speculate == "small":
            raise UsageError("small_adapters are for steps that the small model writes, and with "
                             "speculate='small' it writes none; leave one of them out"
                             )  # fmt: skip

    @property
    def lossy(self) -> dict[str, float]:
        """The settings by which tokens do without experts, those that are on."""
        return {name: value for name in LOSSY if (value := getattr(self, name))}

    @property
    def steps_on(self) -> bool:
        """Whether two models may write the steps of an answer."""
        pair = self.small is not None or self.remote is not None
        return pair and self.steps != "off" and self.speculate != "small"

    def _check_paging(self) -> None:
        # What needs offload/ is imported only when somebody asks for it: it costs start-up.
        from edgeroute.offload.eviction_registry import POLICIES
        from edgeroute.offload.prefetch import LEARNED, PREDICTORS

        names = [each for each in PREDICTORS if each != "none"]
        for name, known in (
            ("policy", ["auto", *POLICIES]),
            ("prefetch", ["auto", "off", *names, f"{LEARNED}FILE"]),
        ):
            value = getattr(self, name)
            if name == "prefetch" and isinstance(value, str) and value.startswith(LEARNED):
                continue  # the file is checked against the model
            if value not in known:
                raise UsageError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def check_steps(spec: str, *, remote: bool, same: bool) -> None:
    """Refuse what cannot say who writes the steps of an answer.

    Args:
        spec: `auto`, `off` or a policy.
        remote: whether the large model is another machine's.
        same: whether both models have one vocabulary.

    Raises:
        UsageError: it is none, or its policy cannot be followed by such a pair.
    """
    if spec in ("auto", "off"):
        return
    # What needs skippers/ is imported only when somebody asks for it: it costs start-up.
    from edgeroute.skippers.step_policies import parse_steps

    name = spec.partition(":")[0] if isinstance(spec, str) else ""
    if name != "learned":  # its weights are checked with the steps file
        parse_steps(spec)
    if remote and name in ("verify", "agree", "judge", "margin"):
        raise UsageError(f"steps={spec!r} needs the large model's own logits, which a remote one "
                         "does not give; use glimpse, query, random or target")  # fmt: skip
    if not same and name == "margin":
        raise UsageError(f"steps={spec!r} changes the writer between tokens, so both models need "
                         "one vocabulary; use verify or glimpse")  # fmt: skip


def merge_settings(given: Mapping[str, object], env: Mapping[str, str] | None = None) -> RunParams:
    """Merge defaults, environment (`EDGEROUTE_N_CTX=2048`) and arguments, in rising order.

    An argument of None counts as not given.

    Raises:
        UsageError: an unknown setting, or a value out of range; the message names it.
    """
    known = {field.name: field.type for field in dataclasses.fields(RunParams)}
    values: dict[str, object] = {}
    for name in known:
        text = (os.environ if env is None else env).get(ENV_PREFIX + name.upper())
        if text is not None:
            values[name] = _from_text(name, text)
    for name, value in given.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}" if near else ""
            raise UsageError(f"there is no setting {name!r}{hint}")
        if value is not None:
            if name in LIBRARIES:
                value = _as_paths(name, value)
            elif name in PATHS and isinstance(value, os.PathLike):
                value = os.fspath(value)
            values[name] = value
    return RunParams(**values)  # type: ignore[arg-type]


def _within(value: object, low: float, high: float) -> bool:
    """Tell whether a value is a number within bounds."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and low <= value <= high  # type: ignore[operator]


def _as_paths(name: str, value: object) -> tuple[str, ...]:
    """Return paths as text; a lone one counts as a list of one."""
    each = [value] if isinstance(value, str | os.PathLike) else value
    if isinstance(each, Iterable):
        paths = list(each)
        if all(isinstance(path, str | os.PathLike) for path in paths):
            return tuple(os.fspath(path) for path in paths)
    raise UsageError(f"{name} must be a path or a list of paths, got {value!r:.200}")


def _from_text(name: str, text: str) -> object:
    """Read a setting from the environment; what it means there is what it means in Python."""
    if name in LIBRARIES:
        return _as_paths(name, text)
    if name in TEXTS:
        return text
    if name in ("depth_max_kl", "remote_timeout_s", *LOSSY):
        try:
            return float(text)
        except ValueError as error:
            name = ENV_PREFIX + name.upper()
            raise UsageError(f"{name} must be a number, got {text!r}") from error
    if not text.strip().isdigit():
        raise UsageError(f"{ENV_PREFIX}{name.upper()} must be a whole number, got {text!r}")
    return int(text)
