"""Which weights read the same input, so that their adapters' A matrices are one product."""

import re
from collections.abc import Iterable

from edgeroute.runtime.lora import LoraTarget

_SHARED = re.compile(r"(blk\.\d+\.)(?:(attn_[qkv])|(ffn_(?:gate|up)(?:_shexp)?))$")


def group_targets(targets: Iterable[LoraTarget]) -> list[list[LoraTarget]]:
    """Group the weights of a layer that are multiplied with one tensor: q, k, v; gate, up.

    A weight of another input in a group would cost time and change no result: the product is
    built once per input.
    """
    groups: dict[tuple[str, str, int], list[LoraTarget]] = {}
    for target in sorted(targets):
        found = _SHARED.match(target.name)
        if found is None:
            key = (target.name, "", target.n_in)
        else:
            part = "attn" if found[2] else "shexp" if target.name.endswith("_shexp") else "ffn"
            key = (found[1], part, target.n_in)
        groups.setdefault(key, []).append(target)
    return list(groups.values())
