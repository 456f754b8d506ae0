"""Traces as tables for other programs: CSV, or Parquet, written as the trace is read.

Two tables: what was routed, one row per choice, and beside it (`NAME.paging.csv`) what each
step cost, one row per step, where the trace tells.
"""

import contextlib
import csv
import importlib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from edgeroute.offload.trace_file import TraceReader
from edgeroute.offload.trace_records import Mark, Record, StepPaging, Trace, TraceStep
from edgeroute.runtime.extras import check_extra

GROUP_ROWS: Final = 1 << 17
"""Rows that are held at most before they are written."""

ROUTES: Final = {
    "step": "int64", "prefill": "bool", "layer": "int32", "token": "int32", "rank": "int32",
    "expert": "int32", "sequence": "int64", "domain": "string",
}  # fmt: skip
"""Columns of the first table and their types. `sequence` counts marks, 0 before the first;
`token` and `rank` are places in what the layer chose, n_expert_used for each token."""
PAGING: Final = {
    "step": "int64", "prefill": "bool", "seconds": "float64", "stall_s": "float64",
    "hits": "int64", "late": "int64", "misses": "int64", "demand_bytes": "int64",
    "prefetch_bytes": "int64", "n_turns": "int32", "is_broken": "bool", "sequence": "int64",
    "domain": "string",
}  # fmt: skip
"""Columns of the second table: those of `StepPaging`, `n_turns` for how many layers took turns."""

Columns = Mapping[str, npt.NDArray[Any] | str | int | float]
"""By column its values, or the one value of all rows."""


class _Sink(Protocol):
    """Takes rows of one table."""

    def write(self, columns: Columns, n_rows: int) -> None:
        """Append rows."""

    def close(self) -> None:
        """Finish the file."""


def export_csv(source: Trace | str | os.PathLike[str], path: str | os.PathLike[str]) -> list[Path]:
    """Write a trace, or a trace's file, as CSV; a file is never held whole.

    Args:
        source: the trace.
        path: of the table of routes; that of paging lies beside it.

    Returns:
        The files written.

    Raises:
        TraceError: the file is no trace, or a record contradicts its header.
        OSError: a file cannot be read or written.
    """
    return _export(source, Path(path), _CsvSink)


def export_parquet(
    source: Trace | str | os.PathLike[str], path: str | os.PathLike[str]
) -> list[Path]:
    """Write a trace, or a trace's file, as Parquet; a file is never held whole.

    Args and returns are those of `export_csv`.

    Raises:
        UsageError: pyarrow is not installed.
        TraceError: the file is no trace, or a record contradicts its header.
        OSError: a file cannot be read or written.
    """
    check_extra("Parquet", "pyarrow", otherwise="export CSV")
    return _export(source, Path(path), _ParquetSink)


def _export(
    source: Trace | str | os.PathLike[str], path: Path, make: type["_CsvSink | _ParquetSink"]
) -> list[Path]:
    with contextlib.ExitStack() as own:
        if isinstance(source, Trace):
            records: Iterator[Record] = source.records()
            meta = source.meta
        else:
            reader = own.enter_context(TraceReader(source))
            records, meta = reader, reader.meta
        routes: _Sink = make(path, ROUTES)
        own.callback(routes.close)
        paging: _Sink | None = None
        paging_path = path.with_suffix(f".paging{path.suffix}")
        number, sequence, label, prefill = -1, 0, "", False
        for record in records:
            if isinstance(record, Mark):
                sequence, label = sequence + 1, record.label
            elif isinstance(record, TraceStep):
                number, prefill = number + 1, record.prefill
                for columns, n_rows in _rows(record, meta.n_expert_used):
                    routes.write({**columns, "step": number, "prefill": prefill,
                                  "sequence": sequence, "domain": label}, n_rows)  # fmt: skip
            elif isinstance(record, StepPaging):
                if paging is None:
                    paging = make(paging_path, PAGING)
                    own.callback(paging.close)
                paging.write({**_cost(record), "step": number, "prefill": prefill,
                              "sequence": sequence, "domain": label}, 1)  # fmt: skip
    return [path] if paging is None else [path, paging_path]


def _rows(step: TraceStep, n_used: int) -> Iterator[tuple[Columns, int]]:
    """Choices of a step, a bounded number at a time."""
    layers, ends = np.array(step.layers), np.cumsum(step.sizes)
    starts = ends - step.sizes
    for at in range(0, step.flat.size, GROUP_ROWS):
        part = step.flat[at : at + GROUP_ROWS]
        index = np.arange(at, at + part.size)
        which = np.searchsorted(ends, index, side="right")
        place = index - starts[which]
        columns = {"layer": layers[which], "token": place // n_used, "rank": place % n_used,
                   "expert": part}  # fmt: skip
        yield columns, part.size


def _cost(record: StepPaging) -> Columns:
    names = ("seconds", "stall_s", "hits", "late", "misses", "demand_bytes", "prefetch_bytes",
             "is_broken")  # fmt: skip
    return {**{name: getattr(record, name) for name in names}, "n_turns": len(record.turns)}


class _CsvSink:
    def __init__(self, path: Path, columns: Mapping[str, str]) -> None:
        self._names = list(columns)
        self._file = path.open("w", newline="", encoding="utf-8")
        self._out = csv.writer(self._file)
        self._out.writerow(self._names)

    def write(self, columns: Columns, n_rows: int) -> None:
        plain = [_listed(columns[name], n_rows) for name in self._names]
        self._out.writerows(zip(*plain, strict=True))

    def close(self) -> None:
        self._file.close()


def _listed(column: npt.NDArray[Any] | str | int | float, n_rows: int) -> Iterable[Any]:
    if isinstance(column, np.ndarray):
        listed: list[Any] = column.tolist()
        return listed
    return itertools.repeat(int(column) if isinstance(column, bool) else column, n_rows)


class _ParquetSink:
    """Holds rows up to a group of GROUP_ROWS."""

    def __init__(self, path: Path, columns: Mapping[str, str]) -> None:
        self._arrow: Any = importlib.import_module("pyarrow")
        parquet: Any = importlib.import_module("pyarrow.parquet")
        schema = self._arrow.schema(
            [(name, self._arrow.type_for_alias(kind)) for name, kind in columns.items()]
        )
        self._schema = schema
        self._writer = parquet.ParquetWriter(str(path), schema, compression="zstd")
        self._parts: list[tuple[Columns, int]] = []
        self._n_rows = 0

    def write(self, columns: Columns, n_rows: int) -> None:
        if self._n_rows + n_rows > GROUP_ROWS:
            self._flush()
        self._parts.append((columns, n_rows))
        self._n_rows += n_rows

    def _flush(self) -> None:
        if not self._parts:
            return
        arrays = [self._joined(field.name, field.type) for field in self._schema]
        self._writer.write_table(self._arrow.Table.from_arrays(arrays, schema=self._schema))
        self._parts.clear()
        self._n_rows = 0

    def _joined(self, name: str, kind: Any) -> Any:
        """All values of a column, in Arrow's type."""
        arrow = self._arrow
        parts = [(columns[name], n_rows) for columns, n_rows in self._parts]
        if isinstance(parts[0][0], np.ndarray):
            return arrow.array(np.concatenate([part for part, _ in parts])).cast(kind)
        if len(parts) == self._n_rows:
            return arrow.array([value for value, _ in parts], type=kind)
        return arrow.chunked_array(
            [arrow.repeat(arrow.scalar(value, kind), n_rows) for value, n_rows in parts]
        )

    def close(self) -> None:
        try:
            self._flush()
        finally:
            self._writer.close()
