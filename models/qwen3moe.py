"""qwen3moe: Qwen3-30B-A3B and its like. qwen3's attention, experts instead of a feed-forward.

Source: llama.cpp, src/models/qwen3moe.cpp.
"""

from edgeroute.models.qwen3 import Qwen3


class Qwen3Moe(Qwen3):
    """The chosen experts' weights are divided by their sum, as in llama with experts."""

    arch = "qwen3moe"
    may_be_dense, may_be_moe = False, True
