"""Speeds that a plan may take for this machine's, so that no test measures any."""

from edgeroute.tools.forecast.records import Speeds, StoragePoint

SPEEDS = Speeds(
    name="this machine", memory_bytes=8 << 30, available_bytes=6 << 30,
    weight_bytes_s={"F32": 4e9}, prefill_flops_s={"F32": 5e10}, kv_bytes_s=4e9, graph_s=0.0,
    layer_s=1e-5, paged_layer_s=1e-5,
    storage=(StoragePoint(read_bytes=1 << 20, depth=1, bytes_s=1e8),), threads=2,
    origins={"weight_bytes_s": "measured"},
)  # fmt: skip
