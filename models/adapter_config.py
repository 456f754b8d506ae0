"""A PEFT adapter's settings, adapter_config.json: the ones that change results, all checked.

Source: huggingface/peft, tuners/lora/config.py and its use in tuners/lora/model.py.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edgeroute.models.adapter_data import open_regular
from edgeroute.models.adapter_json import one_line, parse_object
from edgeroute.models.adapter_records import MAX_ALPHA, MAX_RANK
from edgeroute.runtime.errors import AdapterFileError
from edgeroute.runtime.gguf_metadata import quote
from edgeroute.runtime.untrusted_json import show

MAX_CONFIG_BYTES: Final = 1 << 20

_REFUSED: Final = {
    "use_dora": "DoRA is not supported; train without it",
    "fan_in_fan_out": "transposed weights, as GPT-2's, are not supported",
    "use_qalora": "QA-LoRA is not supported",
    "lora_bias": "biases are not supported; train without it",
    "modules_to_save": "modules trained as a whole are not supported; leave it empty",
    "trainable_token_indices": "trained tokens are not supported; leave it empty",
    "layer_replication": "repeated layers are not supported",
    "target_parameters": "adapted experts are not supported; adapt attention only",
    "alora_invocation_tokens": "activated LoRA is not supported",
    "invocation_string": "activated LoRA is not supported",
}
"""Settings that must be absent, false or empty, and why."""

_REBASED: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that change the base weights, so that the adapter fits no other."""

_LITERAL = re.compile(r"\^?[A-Za-z0-9_]+(?:\\?\.[A-Za-z0-9_]+)*\$?")


class Patterns:
    """Values by module, as PEFT's rank_pattern and alpha_pattern give them.

    PEFT reads keys as regular expressions on a module's name or the end of it. Only names are
    taken here: an expression from a stranger can run for hours.
    """

    def __init__(self, values: Mapping[str, int | float]) -> None:
        """Index the values, of which the first that fits a module counts."""
        self._values: dict[str, tuple[int, int | float]] = {}
        for order, (key, value) in enumerate(values.items()):
            self._values.setdefault(key.replace("\\.", ".").rstrip("$"), (order, value))

    def get(self, module: str) -> int | float | None:
        """Return a module's value, or None where no key fits."""
        found = [
            self._values[key] for key in (f"^{module}", *endings(module)) if key in self._values
        ]
        return min(found)[1] if found else None


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftConfig:
    """The settings that scales and checks need.

    `targets` are module names or ends of them; None where the file gives an expression.
    """

    label: str
    rank: int
    alpha: float
    use_rslora: bool
    ranks: Patterns
    alphas: Patterns
    targets: frozenset[str] | None
    description: str

    def scale(self, module: str, rank: int) -> float:
        """Return the scale of a module whose matrices have this rank.

        Raises:
            AdapterFileError: the settings give it another rank.
        """
        wanted = self.ranks.get(module)
        if rank != (self.rank if wanted is None else wanted):
            raise AdapterFileError(
                f"{self.label}: module {quote(module)} has rank {rank} in the tensors, but "
                f"{self.rank if wanted is None else wanted} in adapter_config.json"
            )
        alpha = self.alphas.get(module)
        alpha = self.alpha if alpha is None else alpha
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def is_target(self, module: str) -> bool:
        """Whether the settings name this module, as far as they can tell."""
        return self.targets is None or any(end in self.targets for end in endings(module))


def endings(module: str) -> Iterator[str]:
    """Yield a module's name and its ends after each dot, longest first."""
    yield module
    while "." in module:
        module = module.split(".", 1)[1]
        yield module


def read_config(path: Path, label: str) -> PeftConfig:
    """Read and check adapter_config.json.

    Raises:
        AdapterFileError: missing, too large, not JSON, or a setting that cannot be honoured.
    """
    with open_regular(path, "the adapter's settings") as file:
        raw = bytearray()
        while more := file.read(MAX_CONFIG_BYTES + 1 - len(raw)):
            raw += more
    if len(raw) > MAX_CONFIG_BYTES:
        raise AdapterFileError(f"{label}: {path.name} has more than {MAX_CONFIG_BYTES} bytes")
    config = parse_object(bytes(raw), f"{label}: {path.name}")
    _refuse(config, label)
    return PeftConfig(
        label=label,
        rank=_rank(config.get("r"), "r", label),
        alpha=_alpha(config.get("lora_alpha"), "lora_alpha", label),
        use_rslora=_flag(config.get("use_rslora"), "use_rslora", label),
        ranks=Patterns(
            {
                key: _rank(value, f"rank_pattern[{quote(key)}]", label)
                for key, value in _pattern(config, "rank_pattern", label)
            }
        ),
        alphas=Patterns(
            {
                key: _alpha(value, f"alpha_pattern[{quote(key)}]", label)
                for key, value in _pattern(config, "alpha_pattern", label)
            }
        ),
        targets=_targets(config.get("target_modules"), label),
        description=one_line(config.get("description")),
    )


def _refuse(config: Mapping[str, object], label: str) -> None:
    """Refuse what changes results in a way that is not implemented."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterFileError(f"{label}: peft_type is {show(kind)}; only 'LORA' is supported")
    for key, reason in _REFUSED.items():
        if config.get(key):
            raise AdapterFileError(f"{label}: {key} is {show(config[key])}; {reason}")
    if config.get("bias") not in (None, "none"):
        raise AdapterFileError(
            f"{label}: bias is {show(config['bias'])}; trained biases are not supported, train "
            "with bias='none'"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_REBASED):
        raise AdapterFileError(
            f"{label}: init_lora_weights is {show(start)}, which changes the base model; save the "
            "adapter with path_initial_model_for_weight_conversion, which undoes it"
        )


def _rank(value: object, key: str, label: str) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise AdapterFileError(f"{label}: {key} is {show(value)}; 1 to {MAX_RANK} are supported")
    return value


def _alpha(value: object, key: str, label: str) -> float:
    """Check a finite factor; 0 would make an adapter that does nothing."""
    usable = type(value) in (int, float) and 0 < abs(value) <= MAX_ALPHA  # type: ignore[arg-type]
    if not usable:
        raise AdapterFileError(
            f"{label}: {key} is {show(value)}; a number other than 0 of at most {MAX_ALPHA:g} is "
            "wanted"
        )
    return float(value)  # type: ignore[arg-type]


def _flag(value: object, key: str, label: str) -> bool:
    if value is not None and not isinstance(value, bool):
        raise AdapterFileError(f"{label}: {key} is {show(value)}, but true or false is wanted")
    return bool(value)


def _pattern(config: Mapping[str, object], name: str, label: str) -> Iterator[tuple[str, object]]:
    """Yield a pattern's keys and values, refusing keys that are real expressions."""
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise AdapterFileError(f"{label}: {name} is {show(value)}, but an object is wanted")
    for key, number in value.items():
        if not _LITERAL.fullmatch(key):
            raise AdapterFileError(
                f"{label}: {name} has the key {quote(key)}, a regular expression; only module "
                "names and their ends are supported, write them out"
            )
        yield key, number


def _targets(value: object, label: str) -> frozenset[str] | None:
    if value is None or isinstance(value, str):
        return None
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise AdapterFileError(
            f"{label}: target_modules is {show(value)}, but a list of names or a text is wanted"
        )
    return frozenset(value)
