"""PEFT adapters: a folder of adapter_config.json and adapter_model.safetensors, or the latter.

Source: huggingface/peft, utils/save_and_load.py; what llama.cpp's convert_lora_to_gguf.py makes
of such a folder is what is read here.
"""

import os
from pathlib import Path
from typing import Final

from edgeroute.models.adapter_config import PeftConfig, endings, read_config
from edgeroute.models.adapter_data import open_regular
from edgeroute.models.adapter_json import one_line
from edgeroute.models.adapter_names import LEAVES, heads_to_interleave, peft_target
from edgeroute.models.adapter_pairs import Part, make_pairs
from edgeroute.models.adapter_records import AdapterFile, BaseShapes, check_name
from edgeroute.models.adapter_safetensors import SafetensorsHeader, read_header
from edgeroute.runtime.errors import AdapterFileError

CONFIG_NAME: Final = "adapter_config.json"
DATA_NAME: Final = "adapter_model.safetensors"
PICKLE_NAME: Final = "adapter_model.bin"
_README_BYTES: Final = 16 << 10


def open_folder(path: Path, base: BaseShapes) -> AdapterFile:
    """Open a PEFT folder, which gives the adapter its name.

    Raises:
        AdapterFileError: a file is missing, malformed, or does not fit the base model.
    """
    data = path / DATA_NAME
    if not os.path.exists(data) and os.path.exists(path / PICKLE_NAME):
        raise pickle_refusal(path / PICKLE_NAME)
    name = check_name(Path(os.path.abspath(path)).name, path)
    return _open(path, data, path / CONFIG_NAME, name, base)


def open_file(path: Path, base: BaseShapes) -> AdapterFile:
    """Open a safetensors file with its settings beside it: NAME.json or adapter_config.json.

    A file with PEFT's own name is named after its folder.

    Raises:
        AdapterFileError: a file is missing, malformed, or does not fit the base model.
    """
    if path.name == DATA_NAME:
        return open_folder(path.parent, base)
    own = path.with_suffix(".json")
    config = own if os.path.exists(own) else path.parent / CONFIG_NAME
    if not os.path.exists(config):
        raise AdapterFileError(
            f"{path.name} has no settings beside it, neither {own.name} nor {CONFIG_NAME}; "
            "without them its scale is unknown"
        )
    return _open(path, path, config, check_name(path.stem, path), base)


def pickle_refusal(path: Path) -> AdapterFileError:
    """Say why a pickle is not read, and what to do."""
    return AdapterFileError(
        f"{str(path)!r} is a pickle, which can run code when it is read; save the adapter again "
        "with PEFT's save_pretrained, which writes safetensors"
    )


def _open(path: Path, data: Path, config_path: Path, name: str, base: BaseShapes) -> AdapterFile:
    config = read_config(config_path, name)
    header = read_header(data)
    parts = []
    for stored in header.tensors:
        target = peft_target(stored.name, base, name)
        parts.append(Part(stem=target.stem, side=target.side, module=target.module, stored=stored))
    pairs = make_pairs(
        name, parts, base,
        lambda a, rank: config.scale(a.module, rank),
        lambda stem: heads_to_interleave(stem, base),
    )  # fmt: skip
    _check_targets(config, parts, base)
    return AdapterFile(
        name=name,
        path=path,
        format="peft",
        tensors=tuple(pair.tensor for pair in pairs),
        n_bytes=sum(pair.a.nbytes + pair.b.nbytes for pair in pairs),
        description=_description(config, header, data.parent / "README.md"),
        data_path=data,
        identity=header.identity,
        pairs=pairs,
    )


def _check_targets(config: PeftConfig, parts: list[Part], base: BaseShapes) -> None:
    """Check that the tensors are of the modules that the settings name, and of all of them."""
    for part in parts:
        if not config.is_target(part.module):
            raise AdapterFileError(
                f"{config.label}: tensor {part.stored.name!r} adapts a module that target_modules "
                "in adapter_config.json does not name; PEFT would not apply it"
            )
    found = {end for part in parts for end in endings(part.module)}
    of_base = {
        module.rsplit(".", 1)[-1]
        for module, leaf in LEAVES[base.arch].items()
        if any(stem.endswith(f".{leaf}") for stem in base.linears)
    }
    for target in sorted(config.targets or ()):
        if target not in found and target.rsplit(".", 1)[-1] in of_base:
            raise AdapterFileError(
                f"{config.label}: target_modules names {target[:80]!r}, but the file has no tensor "
                "of it; it is incomplete"
            )


def _description(config: PeftConfig, header: SafetensorsHeader, readme: Path) -> str:
    return (
        config.description
        or one_line(header.metadata.get("description"))
        or _readme_description(readme)
    )


def _readme_description(path: Path) -> str:
    """Return the one-line `description` of a README's front matter; "" without one."""
    if not os.path.isfile(path):
        return ""
    with open_regular(path, "the adapter's description") as file:
        lines = (file.read(_README_BYTES) or b"").decode("utf-8", errors="replace").splitlines()
    if not lines or lines[0].strip() != "---":
        return ""
    for line in lines[1:]:
        if line.strip() == "---":
            break
        key, _, value = line.partition(":")
        if key == "description":
            return one_line(value.strip().strip("\"'"))
    return ""
