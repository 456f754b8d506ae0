"""Architectures by their name in GGUF; a new family is one file and one line here."""

import difflib
import importlib

from edgeroute.models.base import Model, ModelFactory
from edgeroute.runtime.errors import UnsupportedModelError
from edgeroute.runtime.gguf import GGUFFile

ARCHITECTURES: dict[str, tuple[str, str]] = {
    "llama": ("edgeroute.models.llama", "Llama"),
    "qwen2": ("edgeroute.models.qwen2", "Qwen2"),
    "qwen3": ("edgeroute.models.qwen3", "Qwen3"),
    "gemma3": ("edgeroute.models.gemma3", "Gemma3"),
    "deepseek": ("edgeroute.models.deepseek", "DeepSeek"),
    "deepseek2": ("edgeroute.models.deepseek2", "DeepSeek2"),
    "gpt-oss": ("edgeroute.models.gpt_oss", "GptOss"),
    "qwen2moe": ("edgeroute.models.qwen2moe", "Qwen2Moe"),
    "qwen3moe": ("edgeroute.models.qwen3moe", "Qwen3Moe"),
    "olmoe": ("edgeroute.models.olmoe", "Olmoe"),
}


def describe(file: GGUFFile) -> Model:
    """Read a file's architecture and hyperparameters.

    Raises:
        UnsupportedModelError: the architecture is not one of ARCHITECTURES.
        ModelFileError: its hyperparameters are missing or out of bounds.
    """
    arch = file.metadata.get_str("general.architecture")
    home = ARCHITECTURES.get(arch)
    if home is None:
        near = difflib.get_close_matches(arch, ARCHITECTURES, 1)
        hint = f"; did you mean {near[0]}" if near else ""
        raise UnsupportedModelError(
            f"{file.path.name} is a {arch[:40]!r} model; supported are "
            f"{', '.join(ARCHITECTURES)}{hint}"
        )
    factory: ModelFactory = getattr(importlib.import_module(home[0]), home[1])
    return factory(file)
