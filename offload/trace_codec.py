"""The format of a trace's file, record by record; every number is checked before it is used.

File (little endian): magic, version, header length, a JSON header (`TraceMeta`), then records:
marker, flags, a number, payload bytes, payload.

- Step: flags 1 prefill, 2 uniform; the number is of layers. The payload of a uniform step,
  where all traced layers chose equally many, is that number and then the ids, layer by layer;
  of any other step, (layer, number, ids) for each layer. Ids are uint8 up to 256 experts, else
  uint16, token after token.
- Mark: the payload is the label, in UTF-8.
- Paging of the step before: flag 1 broken; the number is of that step's layers. Seconds, stall,
  hits, late, misses, bytes by demand and by prefetch, then, where layers took turns, the largest
  group and a bit per layer.
- Pools, and what they counted: JSON. A run has few of them.

Version 1 has steps only.
"""

import json
import math
import struct
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from edgeroute.offload.counters import CounterSnapshot, LayerCount
from edgeroute.offload.trace_records import (
    MAX_LABEL,
    Counted,
    Ids,
    Mark,
    Pools,
    PoolState,
    Record,
    StepPaging,
    TraceError,
    TraceMeta,
    TraceStep,
)

MAGIC: Final = b"EDGETRAC"
VERSION: Final = 2
VERSIONS: Final = (1, 2)
"""Those that can be read; a file of version 1 may hold everything once its number is raised."""
MAX_HEADER_BYTES: Final = 1 << 16
MAX_PAYLOAD_BYTES: Final = 1 << 28
MAX_JSON_BYTES: Final = 1 << 22

_STEP, _MARK, _PAGING, _POOLS, _COUNTED = 0xE5, 0xE6, 0xE7, 0xE8, 0xE9
_MOST: Final = {_MARK: 4 * MAX_LABEL, _PAGING: 1 << 12, _POOLS: MAX_JSON_BYTES,
                _COUNTED: MAX_JSON_BYTES, _STEP: MAX_PAYLOAD_BYTES}  # fmt: skip
_HEAD: Final = struct.Struct("<BBHI")
_COUNT: Final = struct.Struct("<I")
_LAYER: Final = struct.Struct("<HI")
_COST: Final = struct.Struct("<ffIIIQQ")
_PREFILL, _UNIFORM = 1, 2
_BROKEN = 1
_MAX_COUNT: Final = (1 << 63) - 1
HEAD_BYTES: Final = _HEAD.size


class Head(NamedTuple):
    """The beginning of a record."""

    kind: int
    flags: int
    number: int
    n_bytes: int


def read_head(data: bytes, version: int, meta: TraceMeta) -> Head:
    """Check the beginning of a record.

    Raises:
        TraceError: it is none, or announces more than any record has.
    """
    head = Head(*_HEAD.unpack(data))
    if head.kind not in _MOST or (version == 1 and head.kind != _STEP):
        raise TraceError(f"no record begins with {head.kind:#x} in a trace of version {version}")
    flags = 3 if head.kind == _STEP else 1 if head.kind == _PAGING else 0
    if head.flags & ~flags or head.number > len(meta.layers):
        raise TraceError(f"a record has flags {head.flags} and number {head.number}, as none has")
    if head.n_bytes > _MOST[head.kind]:
        raise TraceError(f"a record of {head.n_bytes} B; the limit is {_MOST[head.kind]} B")
    return head


class Place:
    """Where in a trace a reader or writer stands: what the next record refers to."""

    def __init__(self) -> None:
        self.n_steps = 0
        self._n_layers: int | None = None  # of the step before, as long as its paging may come
        self._pools: Pools | None = None

    def unpack(self, head: Head, payload: bytes, meta: TraceMeta) -> Record:
        """Turn bytes into the record that they are.

        Raises:
            TraceError: they contradict the header or what came before.
        """
        record: Record
        if head.kind == _STEP:
            record = _unpack_step(payload, head, meta)
        elif head.kind == _MARK:
            record = Mark(step=self.n_steps, label=_text(payload))
        elif head.kind == _PAGING:
            record = self._unpack_paging(payload, head)
        elif head.kind == _POOLS:
            record = _unpack_pools(payload, self.n_steps, meta)
        else:
            record = self._unpack_counted(payload)
        self.passed(record)
        return record

    def passed(self, record: Record) -> None:
        """Stand behind a record."""
        if isinstance(record, TraceStep):
            self.n_steps += 1
            self._n_layers = len(record.layers)
        elif isinstance(record, StepPaging):
            self._n_layers = None
        elif isinstance(record, Pools):
            self._pools = record

    def _unpack_paging(self, payload: bytes, head: Head) -> StepPaging:
        if self._n_layers is None or head.number != self._n_layers:
            raise TraceError("a record of paging must follow its step, with as many layers")
        if len(payload) < _COST.size:
            raise TraceError(f"a record of paging has {len(payload)} B, not {_COST.size}")
        seconds, stall_s, hits, late, misses, demand, prefetch = _COST.unpack_from(payload)
        if not (0 <= seconds < math.inf and 0 <= stall_s < math.inf):
            raise TraceError(f"a step took {seconds} s, {stall_s} s of them waiting")
        turns, most = _unpack_turns(payload[_COST.size :], head.number)
        return StepPaging(
            step=self.n_steps - 1, seconds=seconds, stall_s=stall_s, hits=hits, late=late,
            misses=misses, demand_bytes=demand, prefetch_bytes=prefetch, turns=turns, most=most,
            is_broken=bool(head.flags & _BROKEN),
        )  # fmt: skip

    def _unpack_counted(self, payload: bytes) -> Counted:
        found = _json(payload)
        if self._pools is None or not isinstance(found, list):
            raise TraceError("counters in a trace must be a list, and follow their pools")
        if len(found) != len(self._pools.pools):
            raise TraceError(f"counters of {len(found)} pools; there are {len(self._pools.pools)}")
        kinds = [
            tuple(_snapshot(kind, pool) for kind in _kinds(entry))
            for entry, pool in zip(found, self._pools.pools, strict=True)
        ]
        return Counted(
            step=self.n_steps, pools=tuple((decode, prefill) for decode, prefill in kinds)
        )


def pack(record: Record, meta: TraceMeta, n_layers: int = 0) -> bytes:
    """Turn a record into the bytes of a file; `n_layers` are those of the step before.

    Raises:
        TraceError: a step is larger than a file may hold.
    """
    flags = number = 0
    if isinstance(record, TraceStep):
        kind, number = _STEP, len(record.layers)
        flags, payload = _pack_step(record, meta)
    elif isinstance(record, Mark):
        kind, payload = _MARK, record.label.encode()
    elif isinstance(record, StepPaging):
        kind, flags, number = _PAGING, _BROKEN * record.is_broken, n_layers
        payload = _pack_paging(record, n_layers)
    elif isinstance(record, Pools):
        kind, payload = _POOLS, _pack_pools(record)
    else:
        kind, payload = _COUNTED, _pack_counted(record)
    if len(payload) > _MOST[kind]:
        raise TraceError(
            f"a record of {len(payload)} B exceeds a trace's limit of {_MOST[kind]} B; "
            f"use a smaller n_ubatch"
        )
    return _HEAD.pack(kind, flags, number, len(payload)) + payload


# steps


def _pack_step(step: TraceStep, meta: TraceMeta) -> tuple[int, bytes]:
    prefill = _PREFILL if step.prefill else 0
    if step.layers == meta.layers and len(set(step.sizes)) == 1:
        ids = step.flat.astype(meta.file_type).tobytes()
        return prefill | _UNIFORM, _COUNT.pack(step.sizes[0]) + ids
    return prefill, b"".join(
        _LAYER.pack(layer, part.size) + part.astype(meta.file_type).tobytes()
        for layer, part in step.parts()
    )


def _unpack_step(payload: bytes, head: Head, meta: TraceMeta) -> TraceStep:
    """Split a payload by layers, every number checked."""
    if head.flags & _UNIFORM:
        layers, sizes, flat = _unpack_uniform(payload, head.number, meta)
    else:
        layers, sizes, flat = _unpack_mixed(payload, head.number, meta)
    if min(sizes, default=0) == 0 or int(flat.max()) >= meta.n_expert:
        raise TraceError(f"a step has no ids, or an expert beyond {meta.n_expert - 1}")
    return TraceStep(prefill=bool(head.flags & _PREFILL), layers=layers, sizes=sizes, flat=flat)


def _unpack_uniform(
    payload: bytes, n_layers: int, meta: TraceMeta
) -> tuple[tuple[int, ...], tuple[int, ...], Ids]:
    if n_layers != len(meta.layers) or len(payload) < _COUNT.size:
        raise TraceError("a uniform step must have every traced layer")
    (size,) = _COUNT.unpack_from(payload)
    if len(payload) != _COUNT.size + size * n_layers * meta.id_bytes:
        raise TraceError(f"a step of {len(payload)} B does not hold {n_layers} layers of {size}")
    flat = np.frombuffer(payload, meta.file_type, offset=_COUNT.size).astype(np.uint16)
    return meta.layers, (size,) * n_layers, flat


def _unpack_mixed(
    payload: bytes, n_layers: int, meta: TraceMeta
) -> tuple[tuple[int, ...], tuple[int, ...], Ids]:
    layers: list[int] = []
    parts: list[Ids] = []
    at = 0
    for _ in range(n_layers):
        if len(payload) - at < _LAYER.size:
            raise TraceError("a step ends inside a layer's head")
        layer, size = _LAYER.unpack_from(payload, at)
        at += _LAYER.size
        if layer not in meta.layers or layer in layers:
            raise TraceError(f"a step has layer {layer} twice, or it is none that was traced")
        if size * meta.id_bytes > len(payload) - at:
            raise TraceError(f"a step gives layer {layer} {size} ids, more than it holds")
        parts.append(np.frombuffer(payload, meta.file_type, size, at).astype(np.uint16))
        at += size * meta.id_bytes
        layers.append(layer)
    if at != len(payload) or not parts:
        raise TraceError(f"a step of {n_layers} layers has {len(payload) - at} B too many")
    return tuple(layers), tuple(part.size for part in parts), np.concatenate(parts)


# paging


def _pack_paging(record: StepPaging, n_layers: int) -> bytes:
    cost = _COST.pack(
        record.seconds, record.stall_s, record.hits, record.late, record.misses,
        record.demand_bytes, record.prefetch_bytes,
    )  # fmt: skip
    if not record.turns:
        return cost
    bits = np.zeros(n_layers, np.uint8)
    bits[list(record.turns)] = 1
    return cost + _COUNT.pack(record.most) + np.packbits(bits).tobytes()


def _unpack_turns(data: bytes, n_layers: int) -> tuple[tuple[int, ...], int]:
    """Read which layers took turns, and the largest group."""
    if not data:
        return (), 0
    if len(data) != _COUNT.size + (n_layers + 7) // 8:
        raise TraceError(f"a record of paging has {len(data)} B of turns for {n_layers} layers")
    (most,) = _COUNT.unpack_from(data)
    bits: npt.NDArray[np.uint8] = np.unpackbits(np.frombuffer(data, np.uint8, offset=_COUNT.size))
    turns = tuple(np.flatnonzero(bits).tolist())
    if not turns or turns[-1] >= n_layers or most < 1:
        raise TraceError("a record of paging has no turns where some must be, or too many")
    return turns, most


def _pack_pools(record: Pools) -> bytes:
    found = {
        "begins": record.begins, "group_bytes": record.group_bytes, "n_ahead": record.n_ahead,
        "pools": [
            {name: getattr(pool, name) for name in PoolState.__dataclass_fields__}
            for pool in record.pools
        ],
    }  # fmt: skip
    return json.dumps(found).encode()


def _unpack_pools(payload: bytes, step: int, meta: TraceMeta) -> Pools:
    found = _fields(_json(payload), {"begins", "group_bytes", "n_ahead", "pools"})
    if type(found["begins"]) is not bool or not isinstance(found["pools"], list):
        raise TraceError("pools in a trace: begins must be true or false, and pools a list")
    pools = tuple(_pool(entry, meta) for entry in found["pools"])
    layers = [layer for pool in pools for layer in pool.layers]
    if tuple(sorted(layers)) != meta.layers:
        raise TraceError("pools in a trace must have each traced layer once")
    return Pools(
        step=step, begins=found["begins"], pools=pools,
        group_bytes=_whole(found["group_bytes"], 1), n_ahead=_whole(found["n_ahead"], 0),
    )  # fmt: skip


def _pool(entry: Any, meta: TraceMeta) -> PoolState:
    found = _fields(entry, set(PoolState.__dataclass_fields__))
    layers, policy = found["layers"], found["policy"]
    if not isinstance(layers, list) or not layers or len(layers) > len(meta.layers):
        raise TraceError("a pool in a trace has no layers, or too many")
    if not isinstance(policy, str) or not 0 < len(policy) <= MAX_LABEL:
        raise TraceError("a pool in a trace has no policy")
    return PoolState(
        layers=tuple(_whole(layer, 0) for layer in layers),
        n_slots=_whole(found["n_slots"], 1, len(layers) * meta.n_expert), policy=policy,
        page_bytes=_whole(found["page_bytes"], 0), slot_bytes=_whole(found["slot_bytes"], 0),
    )  # fmt: skip


# counters


def _pack_counted(record: Counted) -> bytes:
    names = tuple(LayerCount.__dataclass_fields__)
    found = [
        [{name: [getattr(one, name) for one in kind.layers] for name in names} for kind in kinds]
        for kinds in record.pools
    ]
    return json.dumps(found).encode()


def _kinds(entry: Any) -> list[Mapping[str, Any]]:
    if not isinstance(entry, list) or len(entry) != 2:
        raise TraceError("a pool's counters are of decode and of prefill")
    names = set(LayerCount.__dataclass_fields__)
    return [_fields(kind, names) for kind in entry]


def _snapshot(kind: Mapping[str, Any], pool: PoolState) -> CounterSnapshot:
    n_layer = max(pool.layers) + 1
    columns: dict[str, list[Any]] = {}
    for name, values in kind.items():
        if not isinstance(values, list) or len(values) != n_layer:
            raise TraceError(f"counters in a trace: {name} must have {n_layer} layers")
        check = _seconds if name == "stall_s" else _whole
        columns[name] = [check(value) for value in values]
    layers = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return CounterSnapshot(
        layers=tuple(LayerCount(**layer) for layer in layers), page_bytes=pool.page_bytes
    )


# values


def _text(payload: bytes) -> str:
    try:
        return payload.decode()
    except UnicodeDecodeError as error:
        raise TraceError(f"a label in a trace is not UTF-8: {error}") from error


def _json(payload: bytes) -> Any:
    try:
        return json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"a record of a trace is not JSON: {error}") from error


def _fields(found: Any, names: set[str]) -> dict[str, Any]:
    if not isinstance(found, dict) or found.keys() != names:
        raise TraceError(f"a record of a trace must have exactly the fields {sorted(names)}")
    return found


def _whole(value: object, low: int = 0, high: int = _MAX_COUNT) -> int:
    if type(value) is not int or not low <= value <= high:
        raise TraceError(f"a trace has {str(value)[:40]!r}; expected {low} to {high}")
    return value


def _seconds(value: object) -> float:
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise TraceError(f"a trace has {str(value)[:40]!r} for seconds")
    return float(value)
