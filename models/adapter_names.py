"""Names of adapted weights: from Hugging Face's modules to the stems of a GGUF base.

Source: llama.cpp, gguf-py/gguf/tensor_mapping.py, and the converters of each architecture.
"""

import re
from collections.abc import Mapping
from typing import Final, Literal, NamedTuple

from edgeroute.models.adapter_records import BaseShapes
from edgeroute.runtime.errors import AdapterFileError
from edgeroute.runtime.gguf_metadata import quote

_ATTENTION: Final = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
_DENSE: Final = {
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GATE: Final = {"mlp.gate": "ffn_gate_inp"}
_LATENT: Final = {
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_b_proj": "attn_kv_b",
}


def _shared(module: str) -> dict[str, str]:
    return {f"mlp.{module}.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")}


LEAVES: Final[Mapping[str, Mapping[str, str]]] = {
    "llama": {**_ATTENTION, **_DENSE, "block_sparse_moe.gate": "ffn_gate_inp"},
    "qwen2": {**_ATTENTION, **_DENSE},
    "qwen3": {**_ATTENTION, **_DENSE},
    "gemma3": {**_ATTENTION, **_DENSE},
    "qwen2moe": {**_ATTENTION, **_DENSE, **_GATE, **_shared("shared_expert")},
    "qwen3moe": {**_ATTENTION, **_DENSE, **_GATE},
    "olmoe": {**_ATTENTION, **_GATE},
    "gpt-oss": {**_ATTENTION, "mlp.router": "ffn_gate_inp"},
    "deepseek": {**_ATTENTION, **_DENSE, **_GATE, **_shared("shared_experts")},
    "deepseek2": {**_ATTENTION, **_LATENT, **_DENSE, **_GATE, **_shared("shared_experts")},
}
"""Stem after "blk.N." by the module after "layers.N.", of each architecture."""

INTERLEAVED: Final = frozenset({"llama", "deepseek"})
"""Architectures whose converters reorder the rows of q and k for ggml's NORMAL rotation."""

PEFT_PREFIX: Final = "base_model.model."

_MODULE = re.compile(
    r"(?:model\.|language_model\.model\.|model\.language_model\.)?layers\.(0|[1-9][0-9]{0,3})\.(.+)"
)
_TENSOR = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")


class Target(NamedTuple):
    """What a tensor of a PEFT file belongs to: stem, side, and the module as PEFT names it."""

    stem: str
    side: Literal["A", "B"]
    module: str


def peft_target(name: str, base: BaseShapes, label: str) -> Target:
    """Find the base weight that a tensor of a PEFT file adapts.

    Raises:
        AdapterFileError: it is no LoRA matrix, or of a weight that cannot be adapted.
    """
    match = _TENSOR.fullmatch(name)
    if match is None or ".experts." in name:
        raise _refusal(label, name, _why_not(name))
    module = match[1].removeprefix(PEFT_PREFIX)
    place = _MODULE.fullmatch(module)
    if place is None:
        raise _refusal(label, name, _why_not(name))
    leaf = LEAVES.get(base.arch, {}).get(place[2])
    if leaf is None:
        known = ", ".join(LEAVES.get(base.arch, ())) or "none"
        raise _refusal(
            label, name, f"adapts a module that {base.arch} models have not; adaptable are {known}"
        )
    stem = f"blk.{place[1]}.{leaf}"
    _check_stem(stem, int(place[1]), name, base, label)
    return Target(stem, "A" if match[2] == "A" else "B", module)


_GGUF_TENSOR = re.compile(r"(.+)\.weight\.lora_([ab])")
_GGUF_STEM = re.compile(r"blk\.(0|[1-9][0-9]{0,3})\..+")


def gguf_target(name: str, base: BaseShapes, label: str) -> Target:
    """Find the base weight that a tensor of a GGUF adapter adapts.

    Raises:
        AdapterFileError: it is no LoRA matrix, or of a weight that cannot be adapted.
    """
    match = _GGUF_TENSOR.fullmatch(name)
    if match is None or "_exps." in name:
        raise _refusal(label, name, _why_not(name))
    place = _GGUF_STEM.fullmatch(match[1])
    if place is None:
        raise _refusal(label, name, _why_not(name))
    _check_stem(match[1], int(place[1]), name, base, label)
    return Target(match[1], "A" if match[2] == "a" else "B", match[1])


def heads_to_interleave(stem: str, base: BaseShapes) -> int:
    """Return how many heads' rows of B must be reordered for this weight; 0 for none."""
    if base.arch not in INTERLEAVED:
        return 0
    if stem.endswith(".attn_q"):
        return base.n_head
    return base.n_head_kv if stem.endswith(".attn_k") else 0


def _check_stem(stem: str, il: int, name: str, base: BaseShapes, label: str) -> None:
    if il >= base.n_layer:
        raise _refusal(
            label, name, f"adapts layer {il}, but the model has layers 0 to {base.n_layer - 1}; "
            "the adapter is for another base model",
        )  # fmt: skip
    if stem not in base.linears:
        raise _refusal(label, name, f"adapts {stem}, which this {base.arch} model does not have")


# Source: huggingface/peft, tuners/lora/layer.py, adapter_layer_names, and save_and_load.py.
_REASONS: Final = (
    ("lora_magnitude_vector", "belongs to DoRA, which is not supported; train it without use_dora"),
    (".experts.", "adapts single experts, which is not supported; adapt attention only"),
    ("_exps.", "adapts single experts, which is not supported; adapt attention only"),
    ("modules_to_save", "is a whole module trained beside LoRA (modules_to_save), not supported"),
    ("lm_head", "adapts the output head, which is not supported; leave it out of target_modules"),
    ("output.weight", "adapts the output head, which is not supported"),
    ("embed", "adapts or replaces the embeddings, which is not supported; leave them out"),
    ("token_embd", "adapts the embeddings, which is not supported"),
    (".base_layer.", "is a weight of the base model, which an adapter must not contain"),
    ("bias", "is a bias, which is not supported; train with bias='none' and lora_bias=False"),
    ("norm", "replaces a norm, which is not supported; leave norms out"),
)


def _why_not(name: str) -> str:
    found = next((reason for word, reason in _REASONS if word in name), None)
    return found or "is no LoRA matrix of a layer's linear weight; nothing can be done with it"


def _refusal(label: str, name: str, reason: str) -> AdapterFileError:
    return AdapterFileError(f"{label}: tensor {quote(name)} {reason}")
