"""One model on the processor alone, and its layers spread over the processor and two servers."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeroute.config import RunParams
from edgeroute.loaded import kv_shape
from edgeroute.models.base import Model
from edgeroute.models.forward import Forward
from edgeroute.models.registry import describe
from edgeroute.models.split import SplitForward, homes_of
from edgeroute.runtime.device import Device
from edgeroute.runtime.device_group import DeviceGroup
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.kv_cache import KvCache
from edgeroute.runtime.placed_weights import PlacedWeights
from edgeroute.runtime.placement import Placement
from edgeroute.runtime.weights import ResidentWeights
from edgeroute.tools.bench.rpc_servers import RpcServer
from tests.edgeroute.paged_lab import Step

STEPS: list[Step] = [
    [("a", 150, 3)], [("a", 40, 0)], [("a", 17, 17)], [("a", 1, 1)], [("b", 33, 1)],
    [("a", 1, 1), ("b", 1, 1)], [("a", 2, 1), ("b", 3, 0)], [("a", 1, 1), ("b", 1, 1)],
]  # fmt: skip
N_TOKENS, N_CELLS = 160, 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Layers in thirds by a letter each, `c` the processor, `a` and `b` servers; and the head's."""

    layers: str
    head: str

    def placement(self, devices: dict[str, Device], n_layer: int) -> Placement:
        letters = [self.layers[il * len(self.layers) // n_layer] for il in range(n_layer)]
        used = sorted({*letters, self.head})
        return Placement(
            cpu=devices["c"], devices=tuple(devices[each] for each in used),
            of_layer=tuple(used.index(each) for each in letters), of_head=used.index(self.head),
        )  # fmt: skip


SPREADS = (
    Spread(layers="aab", head="b"), Spread(layers="cab", head="c"), Spread(layers="aba", head="b"),
    Spread(layers="acb", head="a"), Spread(layers="a", head="a"), Spread(layers="a", head="c"),
)  # fmt: skip


class Bench:
    """A model file, opened by `alone` or `spread`, both without repacked weights."""

    def __init__(self, path: Path, servers: Sequence[RpcServer], **params: Any) -> None:
        self.params = RunParams(n_ctx=512, threads=1, **params)
        with contextlib.ExitStack() as own:
            self.file = own.enter_context(GGUFFile.open(path))
            self.devices = {"c": own.enter_context(Device.open("cpu"))}
            for letter, server in zip("ab", servers, strict=False):
                self.devices[letter] = own.enter_context(Device.open(server.name))
            self.group = DeviceGroup([*list(self.devices.values())[1:], self.devices["c"]])
            self.group.set_threads(1)
            self._own = own.pop_all()
        self.model: Model = describe(self.file)

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *_: object) -> None:
        self._own.close()

    @contextlib.contextmanager
    def alone(self) -> Iterator[Forward]:
        cpu = self.devices["c"]
        with contextlib.ExitStack() as own:
            weights = ResidentWeights(self.file, cpu, self.model.specs(), repack_experts=False)
            own.callback(weights.close)
            weights.load()
            kv = KvCache(cpu, kv_shape(self.model.hparams, self.params), N_CELLS)
            own.callback(kv.close)
            forward = Forward(self.model, cpu, weights, kv)
            own.callback(forward.close)
            yield forward

    @contextlib.contextmanager
    def spread(self, how: Spread, n_repeat: int = 0) -> Iterator[SplitForward]:
        hparams = self.model.hparams
        placement = how.placement(self.devices, hparams.n_layer)
        with contextlib.ExitStack() as own:
            weights = own.enter_context(PlacedWeights(
                self.file, self.model.specs(), homes_of(placement), repack_experts=False
            ))  # fmt: skip
            weights.load()
            rows = [placement.device(il) for il in range(hparams.n_layer)]
            rows += [rows[1]] * n_repeat
            kv = KvCache(rows, kv_shape(hparams, self.params, n_repeat), N_CELLS)
            own.callback(kv.close)
            forward = SplitForward(self.model, self.group, placement, weights, kv)
            own.callback(forward.close)
            forward.reserve(N_TOKENS, 512)
            yield forward
