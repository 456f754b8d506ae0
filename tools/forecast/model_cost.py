"""What a model asks of a machine per token, from its header alone: bytes, FLOPs and pages."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from edgeroute.config import RunParams
from edgeroute.loaded import kv_shape
from edgeroute.models.base import Model, MoeHparams, MoeModel
from edgeroute.models.registry import describe
from edgeroute.runtime.gguf import GGUFFile, TensorInfo
from edgeroute.runtime.weights import TensorSpec, check_specs

HEAD = ("output.weight",)
ROUTER = "ffn_gate_inp"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Weights that a token is multiplied with, by the name of their type.

    `row_bytes` are their bytes by the length of a row too, for a product with short rows is
    slower per byte; `flops` those of one token.
    """

    row_bytes: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    flops: Mapping[str, float] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Bytes of all types."""
        return sum(sum(each.values()) for each in self.row_bytes.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class PageShape:
    """Experts as the pager sees them. `part_bytes` is of a part in the mean (gate, up, down)."""

    n_expert: int
    n_expert_used: int
    n_layer: int
    page_bytes: int
    n_parts: int

    @property
    def n_pages(self) -> int:
        """Experts over all layers."""
        return self.n_layer * self.n_expert

    @property
    def cycle_pages(self) -> int:
        """Experts that one token uses in all layers."""
        return self.n_layer * self.n_expert_used

    @property
    def part_bytes(self) -> int:
        """Bytes of one part."""
        return max(1, self.page_bytes // self.n_parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCost:
    """One token's work by kind, and what its keys and values take.

    `dense` are the matrices of layers, `head` that of the output, `router` and `experts` (only
    the chosen ones) those of layers with experts. `kv_cell_bytes` are stored per past token;
    `attended_cell_bytes` counts them once for every query head that reads them. `layer_work` are
    the dense matrices by layer, the head's behind them: what may stream, in the order of use.
    """

    name: str
    arch: str
    n_layer: int
    n_vocab: int
    dense: Work
    head: Work
    router: Work
    experts: Work
    layer_work: tuple[Work, ...]
    kv_cell_bytes: int
    attended_cell_bytes: int
    pages: PageShape | None = None

    @property
    def n_moe_layer(self) -> int:
        """Layers with experts."""
        return 0 if self.pages is None else self.pages.n_layer

    @property
    def weight_types(self) -> frozenset[str]:
        """Names of all types that a token is multiplied with."""
        kinds = (self.dense, self.head, self.router, self.experts)
        return frozenset(name for kind in kinds for name in kind.row_bytes)


def model_cost(file: GGUFFile, params: RunParams | None = None) -> ModelCost:
    """Add up a model's weights by type and kind; none of them is read.

    Args:
        file: its header is enough.
        params: for the type of keys and values.

    Raises:
        ModelFileError, UnsupportedModelError: this version cannot run the file.
    """
    model = describe(file)
    hparams = model.hparams
    sums = {kind: _Sum() for kind in ("dense", "head", "router", "experts")}
    layers = [_Sum() for _ in range(hparams.n_layer + 1)]
    for spec, info in check_specs(file, model.specs()):
        if spec.use not in ("mul_mat", "mul_mat_id"):
            continue
        kind = _kind(spec)
        n_used = hparams.moe.n_expert_used if kind == "experts" and hparams.moe else None
        sums[kind].add(info, n_used)
        if kind in ("dense", "head"):
            layers[_layer(spec.name, hparams.n_layer)].add(info, None)
    kv = kv_shape(hparams, params or RunParams())
    return ModelCost(
        name=file.path.name, arch=hparams.arch, n_layer=hparams.n_layer, n_vocab=hparams.n_vocab,
        dense=sums["dense"].work(), head=sums["head"].work(), router=sums["router"].work(),
        experts=sums["experts"].work(), layer_work=tuple(each.work() for each in layers),
        kv_cell_bytes=kv.bytes_per_cell,
        attended_cell_bytes=kv.bytes_per_cell * hparams.n_head // hparams.n_head_kv,
        pages=_pages(file, model, hparams.moe),
    )  # fmt: skip


def _kind(spec: TensorSpec) -> str:
    if spec.use == "mul_mat_id":
        return "experts"
    if spec.name in HEAD:
        return "head"
    return "router" if ROUTER in spec.name else "dense"


def _layer(name: str, n_layer: int) -> int:
    """The layer of a matrix; the head's is the one behind the last."""
    words = name.split(".")
    return int(words[1]) if words[0] == "blk" and words[1].isdigit() else n_layer


def _pages(file: GGUFFile, model: Model, moe: MoeHparams | None) -> PageShape | None:
    if moe is None or not isinstance(model, MoeModel):
        return None
    layers = [il for il in range(model.hparams.n_layer) if model.is_moe(il)]
    if not layers:
        return None
    tensors = [[file.tensors[name] for name in model.expert_tensors(il)] for il in layers]
    n_bytes = sum(info.nbytes for infos in tensors for info in infos)
    return PageShape(
        n_expert=moe.n_expert, n_expert_used=moe.n_expert_used, n_layer=len(layers),
        page_bytes=n_bytes // (len(layers) * moe.n_expert), n_parts=len(tensors[0]),
    )  # fmt: skip


class _Sum:
    """Bytes and FLOPs by type, being added up."""

    def __init__(self) -> None:
        self._row_bytes: dict[str, dict[int, int]] = {}
        self._flops: dict[str, float] = {}

    def add(self, info: TensorInfo, n_used: int | None) -> None:
        """Add a matrix; of one with slices, the number that a token uses."""
        rows = 1
        for extent in info.ne[1:]:
            rows *= extent
        n_bytes, n_values = info.nbytes, info.ne[0] * rows
        if n_used is not None:
            n_bytes = n_bytes // info.ne[2] * n_used
            n_values = n_values // info.ne[2] * n_used
        name = info.type.name
        of_type = self._row_bytes.setdefault(name, {})
        of_type[info.ne[0]] = of_type.get(info.ne[0], 0) + n_bytes
        self._flops[name] = self._flops.get(name, 0.0) + 2.0 * n_values

    def work(self) -> Work:
        """What was added."""
        return Work(row_bytes=self._row_bytes, flops=self._flops)
