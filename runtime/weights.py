"""Where a weight lives, behind one protocol; and the plain answer: all of them, resident.

A model names the tensors it needs as TensorSpecs and asks a Weights for each. Paged stores
in offload/ answer the same protocol.
"""

import itertools
import mmap
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from edgeroute.runtime.device import Buffer, Device
from edgeroute.runtime.device_ops import supports_product
from edgeroute.runtime.errors import ModelFileError
from edgeroute.runtime.ggml import api
from edgeroute.runtime.ggml.api import Tensor, ggml
from edgeroute.runtime.gguf import GGMLType, GGUFFile, TensorInfo
from edgeroute.runtime.joints import Joint, Joints
from edgeroute.runtime.tensor import F32, Descriptors, new_tensor, place, place_all
from edgeroute.runtime.weight_load import Copy, ReadAhead, copy_all, rank

Use = Literal["mul_mat", "mul_mat_id", "get_rows", "elementwise"]

_CPU_TENSOR_ALIGNMENT = 32  # Source: ggml-impl.h, TENSOR_ALIGNMENT
_NOT_WEIGHTS = frozenset(
    GGMLType[name] for name in ("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K")
)  # ggml has no product for these, and does not check: it would call a null pointer
_GATHERED_BYTES = 1 << 20  # of longer products, the barriers that joining spares are below 0.5 %


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor a model needs: its name, extents (fastest first) and what reads it.

    `source` is the tensor in the file when that has another name (tied embeddings). Those that
    read one input, so that one product may serve them, have a `beside` in common; so have their
    biases.
    """

    name: str
    ne: tuple[int, ...]
    use: Use
    source: str | None = None
    required: bool = True
    beside: str | None = None

    @property
    def file_name(self) -> str:
        """Name of the tensor in the file."""
        return self.source or self.name


class Weights(Protocol):
    """Gives a model its tensors; where they are is not the model's business."""

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor that can be computed with now."""

    def get(self, name: str) -> Tensor | None:
        """Return a tensor, or None where the file has none of that name."""

    def joints(self, names: Sequence[str]) -> list[Joint]:
        """Join matrices of equal input where they lie side by side in memory; each name once.

        A joined product has the bits of the single ones and one barrier for all of them.
        """


def apart(weights: Weights, names: Sequence[str]) -> list[Joint]:
    """Answer `joints` where nothing is joined."""
    return [Joint(weights[name], (name,)) for name in names]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsPlan:
    """What loading will take, known from the header alone. Bytes.

    `mapped` stays in the file's pages, `copied` is allocated (repacked or not mappable). What
    is `plain` is mapped beside its repacked copy, see runtime/plain_weights.py.
    """

    mapped_bytes: int
    copied_bytes: int
    repacked: frozenset[str]
    plain: frozenset[str] = frozenset()


def check_specs(file: GGUFFile, specs: Sequence[TensorSpec]) -> list[tuple[TensorSpec, TensorInfo]]:
    """Match a model's needs with a file's tensors.

    Raises:
        ModelFileError: a required tensor is missing, or one has other extents or an
            unusable type.
    """
    found = []
    for spec in specs:
        info = file.tensors.get(spec.file_name)
        if info is None:
            if spec.required:
                raise ModelFileError(f"{file.path.name} has no tensor {spec.file_name}, which its "
                                     "architecture needs; the file is incomplete")  # fmt: skip
            continue
        if _strip(info.ne) != _strip(spec.ne):
            raise ModelFileError(
                f"tensor {spec.file_name} in {file.path.name} has extents {list(info.ne)}, "
                f"but its header's hyperparameters imply {list(spec.ne)}"
            )
        if info.type in _NOT_WEIGHTS:
            raise ModelFileError(
                f"tensor {spec.file_name} in {file.path.name} is {info.type.name}, which ggml "
                "cannot multiply with; convert the file again"
            )
        if spec.use == "elementwise" and info.type != F32:
            raise ModelFileError(
                f"tensor {spec.file_name} in {file.path.name} is {info.type.name}; "
                "norms and biases must be F32; convert the file again"
            )
        found.append((spec, info))
    return found


def _strip(ne: tuple[int, ...]) -> tuple[int, ...]:
    while len(ne) > 1 and ne[-1] == 1:
        ne = ne[:-1]
    return ne


class ResidentWeights:
    """All weights at once: mapped from the file where possible, repacked where it pays.

    Lifetime: tensors are valid until `close`; `file` must stay open that long.
    """

    def __init__(
        self, file: GGUFFile, device: Device, specs: Sequence[TensorSpec], *,
        rows_on_demand: bool = False, repack_experts: bool = True,
        also_plain: Container[GGMLType] = (),
    ) -> None:  # fmt: skip
        """Plan where each tensor goes; nothing is read yet.

        Args:
            file: the model.
            device: where to.
            specs: the tensors.
            rows_on_demand: leave tables of which only rows are read to the disk: they are
                mapped, but neither read ahead nor counted.
            repack_experts: False leaves what could be paged in the file's layout, as paged
                weights are, so that both have the same kernels and the same bits: experts, or
                all of a model that has none.
            also_plain: matrices of these types that are repacked are mapped from the file too.

        Raises:
            ModelFileError: see `check_specs`.
        """
        self._rows_on_demand = rows_on_demand
        self._repacks = {"mul_mat", "mul_mat_id"}
        if not repack_experts:
            self._repacks = {"mul_mat"} if any(s.use == "mul_mat_id" for s in specs) else set()
        self._file = file
        self._device = device
        self._pairs = check_specs(file, specs)
        self._descriptors = Descriptors(2 * len(self._pairs))
        self._tensors: dict[str, Tensor] = {}
        self._buffers: list[Buffer] = []
        self._joints = Joints()
        self._homes: dict[str, int | None] = {}
        self._ahead: ReadAhead | None = None
        for spec, info in self._pairs:
            tensor = new_tensor(self._descriptors, info.type, info.ne, spec.name)
            self._tensors[spec.name] = tensor
            self._homes[spec.name] = self._choose_home(spec, info)
        if device.is_cpu:
            self._gather()
        self.plain: dict[str, Tensor] = {}
        """Those of `also_plain`, by name."""
        for spec, info in self._pairs:
            if info.type in also_plain and self._is_twofold(spec, info):
                self.plain[spec.name] = new_tensor(self._descriptors, info.type, info.ne, spec.name)
        self.plan = self._make_plan()

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def get(self, name: str) -> Tensor | None:
        return self._tensors.get(name)

    def joints(self, names: Sequence[str]) -> list[Joint]:
        if not self._device.is_cpu:  # unproven on others
            return apart(self, names)
        return self._joints.find(names, self._tensors.get)

    @property
    def file(self) -> GGUFFile:
        """Where they come from."""
        return self._file

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """The file's entry of every tensor in use, by the model's name for it."""
        return {spec.name: info for spec, info in self._pairs}

    @property
    def specs(self) -> list[TensorSpec]:
        """What was asked for, and is there."""
        return [spec for spec, _ in self._pairs]

    def sizes(self) -> dict[str, int]:
        """Return the bytes that each tensor takes where it goes, by the model's name for it."""
        g = ggml()
        found = {}
        for spec, info in self._pairs:
            home = self._homes[spec.name]
            if home is None:
                found[spec.name] = info.nbytes
                continue
            align = g.ggml_backend_buft_get_alignment(home)
            size = g.ggml_backend_buft_get_alloc_size(home, self._tensors[spec.name])
            found[spec.name] = -(-size // align) * align
        return found

    def begin(self) -> ReadAhead:
        """Have the file read from now on; `load` does it too, if it was not done."""
        if self._ahead is None:
            wanted, copied, mapped = self._read_ahead(), [], []
            for spec, info in self._pairs:
                if self._homes[spec.name] is not None:
                    copied.append(info)
                elif info.name in wanted:
                    mapped.append(info)
            # A model that stays whole is mostly in the page cache, where asking took 7 % longer.
            order = [*sorted(copied, key=rank), *mapped] if self._rows_on_demand else []
            self._ahead = ReadAhead(self._file, order)
        return self._ahead

    def load(self) -> None:
        """Place every tensor: repacked ones are converted, others mapped and read ahead.

        Raises:
            CapacityError: not enough memory; what was allocated is freed by `close`.
            DeviceLostError: the device is gone.
        """
        reading = self.begin()
        by_home: dict[int | None, list[TensorInfo]] = {}
        names: dict[int | None, list[str]] = {}
        for spec, info in self._pairs:
            home = self._homes[spec.name]
            by_home.setdefault(home, []).append(info)
            names.setdefault(home, []).append(spec.name)
        for home, infos in by_home.items():
            tensors = [self._tensors[name] for name in names[home]]
            if home is None:
                self._map(tensors, infos)
            else:
                self._copy(home, tensors, infos)
        ahead, mapped = self._read_ahead(), by_home.get(None, [])
        if self.plain:
            twofold = [info for spec, info in self._pairs if spec.name in self.plain]
            self._map(list(self.plain.values()), twofold)
            mapped = mapped + twofold
        for info in mapped:
            if info.name in ahead:
                self._file.populate(info.offset, info.nbytes)
                reading.used(info)
        reading.close()

    def _read_ahead(self) -> set[str]:
        """Names in the file of what is read as a whole for every token."""
        return {
            spec.file_name
            for spec, _ in self._pairs
            if spec.use != "get_rows" or not self._rows_on_demand
        }

    def close(self) -> None:
        """Free buffers and descriptors; safe to call twice."""
        if self._ahead is not None:
            self._ahead.close()
        self._tensors.clear()
        self.plain.clear()
        self._joints.close()
        for buffer in self._buffers:
            buffer.free()
        self._buffers.clear()
        self._descriptors.free()

    def _map(self, tensors: list[Tensor], infos: list[TensorInfo]) -> None:
        """Use the file's own pages as one buffer."""
        file = self._file
        largest = max(info.nbytes for info in infos)
        first = min(info.offset for info in infos) // mmap.PAGESIZE * mmap.PAGESIZE
        end = max(info.offset + info.nbytes for info in infos)
        start = file.address(infos[0]) - infos[0].offset + first
        buffer = self._device.wrap_host_memory(start, end - first, largest)
        if buffer is None:
            self._copy(self._device.buffer_type, tensors, infos)
            return
        self._buffers.append(buffer)
        for tensor, info in zip(tensors, infos, strict=True):
            place(tensor, buffer, file.address(info))

    def _copy(self, home: int, tensors: list[Tensor], infos: list[TensorInfo]) -> None:
        """Write tensors into a buffer of type `home`; the file's pages are let go as we go."""
        g = ggml()
        buffer = place_all(tensors, self._device, home)
        self._buffers.append(buffer)
        g.ggml_backend_buffer_set_usage(buffer.pointer, api.USAGE_WEIGHTS)
        shared = self._mapped_sources()
        copies = [
            Copy(tensor, info, info.name in shared)
            for tensor, info in zip(tensors, infos, strict=True)
        ]
        copy_all(self._file, self._device, copies, self.begin())

    def _mapped_sources(self) -> set[str]:
        return {
            spec.file_name
            for spec, _ in self._pairs
            if self._homes[spec.name] is None or spec.name in self.plain
        }

    def _is_twofold(self, spec: TensorSpec, info: TensorInfo) -> bool:
        """Whether a tensor is repacked, and could be mapped as well."""
        home, mappable = self._homes[spec.name], self._device.info.host_pointers
        aligned = info.offset % _CPU_TENSOR_ALIGNMENT == 0
        return home in self._device.extra_buffer_types and mappable and aligned

    def _choose_home(self, spec: TensorSpec, info: TensorInfo) -> int | None:
        """Pick a buffer type: a repacking one that ggml says it can compute from, or the file."""
        if spec.use in self._repacks:
            for buffer_type in self._device.extra_buffer_types:
                by_id = spec.use == "mul_mat_id"
                if supports_product(self._device, buffer_type, info, by_id=by_id):
                    return buffer_type
        if not self._device.info.host_pointers or info.offset % _CPU_TENSOR_ALIGNMENT:
            return self._device.buffer_type
        return None

    def _gather(self) -> None:
        """Copy small matrices of one input, and their biases, to where they lie side by side.

        In a file, other tensors often stand between them.
        """
        families: dict[tuple[str, int], list[TensorInfo]] = {}
        for spec, info in self._pairs:
            if spec.beside is not None and self._homes[spec.name] is None:
                families.setdefault((spec.beside, info.type), []).append(info)
        scattered = {info.name for infos in families.values() if _may_gather(infos)
                     for info in infos}  # fmt: skip
        for spec, info in self._pairs:
            if info.name in scattered:
                self._homes[spec.name] = self._device.buffer_type

    def _make_plan(self) -> WeightsPlan:
        g = ggml()
        mapped: dict[str, int] = {}
        copied, repacked, ahead = 0, set(), self._read_ahead()
        for spec, info in self._pairs:
            home = self._homes[spec.name]
            if home is None and info.name in ahead:
                mapped[info.name] = info.nbytes
            elif home is None:
                continue
            else:
                copied += g.ggml_backend_buft_get_alloc_size(home, self._tensors[spec.name])
                if home != self._device.buffer_type:
                    repacked.add(spec.name)
                if spec.name in self.plain:
                    mapped[info.name] = info.nbytes
        return WeightsPlan(
            mapped_bytes=sum(mapped.values()), copied_bytes=copied, repacked=frozenset(repacked),
            plain=frozenset(self.plain),
        )  # fmt: skip


def _may_gather(infos: Sequence[TensorInfo]) -> bool:
    """Whether tensors are small enough to be copied, and do not lie side by side already."""
    order = sorted(infos, key=lambda info: info.offset)
    pairs = itertools.pairwise(order)
    return sum(info.nbytes for info in infos) <= _GATHERED_BYTES and any(
        one.offset + one.nbytes != other.offset for one, other in pairs
    )
