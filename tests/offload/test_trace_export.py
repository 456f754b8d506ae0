"""Traces as tables: every row, in CSV and in Parquet, from memory and from a file."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest

from edgeroute.offload import trace_export
from edgeroute.offload.trace import (
    Mark,
    Record,
    StepPaging,
    Trace,
    TraceMeta,
    TraceWriter,
    make_step,
    read_trace,
)
from edgeroute.offload.trace_export import export_csv, export_parquet
from edgeroute.runtime.errors import UsageError

META = TraceMeta(
    model="tiny", n_layer=5, n_expert=60, n_expert_used=2, page_bytes=9, layers=(1, 2, 4)
)
RECORDS: list[Record] = [
    make_step(META, True, [(1, [5, 6, 7, 8]), (2, [1, 2])]),
    Mark(step=1, label='code, "C"'),
    make_step(META, False, [(4, [9, 10])]),
    StepPaging(step=1, seconds=0.5, stall_s=0.25, hits=1, late=0, misses=1, demand_bytes=9,
               prefetch_bytes=0, turns=(0,), most=7),
    Mark(step=2, label="größer"),
    make_step(META, False, [(4, [11, 10])]),
]  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with TraceWriter(tmp_path / "t", META) as writer:
        for record in RECORDS:
            writer.append(record)
    return tmp_path / "t"


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_csv_has_one_row_per_choice_and_one_per_step(path: Path, tmp_path: Path) -> None:
    routes, paging = export_csv(path, tmp_path / "t.csv")
    assert (routes.name, paging.name) == ("t.csv", "t.paging.csv")
    found = rows(routes)
    assert found[0] == ["step", "prefill", "layer", "token", "rank", "expert", "sequence",
                        "domain"]  # fmt: skip
    assert found[1:5] == [
        ["0", "1", "1", "0", "0", "5", "0", ""],
        ["0", "1", "1", "0", "1", "6", "0", ""],
        ["0", "1", "1", "1", "0", "7", "0", ""],
        ["0", "1", "1", "1", "1", "8", "0", ""],
    ]
    assert found[7] == ["1", "0", "4", "0", "0", "9", "1", 'code, "C"']
    assert found[-1] == ["2", "0", "4", "0", "1", "10", "2", "größer"] and len(found) == 11
    cost = dict(zip(*rows(paging), strict=True))
    assert cost == {
        "step": "1", "prefill": "0", "seconds": "0.5", "stall_s": "0.25", "hits": "1",
        "late": "0", "misses": "1", "demand_bytes": "9", "prefetch_bytes": "0", "n_turns": "1",
        "is_broken": "0", "sequence": "1", "domain": 'code, "C"',
    }  # fmt: skip


def test_a_trace_without_paging_makes_one_file(tmp_path: Path) -> None:
    steps = (make_step(META, False, [(1, [3, 4])]),)
    assert export_csv(Trace(meta=META, steps=steps), tmp_path / "t.csv") == [tmp_path / "t.csv"]
    assert len(rows(tmp_path / "t.csv")) == 3


def test_memory_and_file_make_the_same_tables(path: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "one.csv", tmp_path / "other.csv"
    export_csv(path, one)
    export_csv(read_trace(path), other)
    assert one.read_bytes() == other.read_bytes()


def test_large_steps_are_written_in_parts(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole.csv"
    export_csv(path, whole)
    monkeypatch.setattr(trace_export, "GROUP_ROWS", 3)
    export_csv(path, tmp_path / "parts.csv")
    assert (tmp_path / "parts.csv").read_bytes() == whole.read_bytes()


def test_parquet_holds_what_csv_does(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(trace_export, "GROUP_ROWS", 4)
    csvs = export_csv(path, tmp_path / "t.csv")
    found = export_parquet(path, tmp_path / "t.parquet")
    assert [one.name for one in found] == ["t.parquet", "t.paging.parquet"]
    assert parquet.ParquetFile(found[0]).num_row_groups == 3
    for one, other in zip(found, csvs, strict=True):
        table = parquet.read_table(one)
        names, *expected = rows(other)
        assert table.column_names == names
        columns = [table[name].to_pylist() for name in names]
        plain = [[str(int(v) if isinstance(v, bool) else v) for v in row]
                 for row in zip(*columns, strict=True)]  # fmt: skip
        assert plain == expected


def test_parquet_without_pyarrow_names_the_extra(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"edgeroute\[report\]"):
        export_parquet(path, tmp_path / "t.parquet")
    assert not (tmp_path / "t.parquet").exists()


def test_ids_of_all_sizes_are_kept(tmp_path: Path) -> None:
    meta = TraceMeta(model="m", n_layer=1, n_expert=65536, n_expert_used=1, page_bytes=0,
                     layers=(0,))  # fmt: skip
    ids = np.array([0, 255, 256, 65535])
    export_csv(Trace(meta=meta, steps=(make_step(meta, True, [(0, ids)]),)), tmp_path / "t.csv")
    assert [int(row[5]) for row in rows(tmp_path / "t.csv")[1:]] == ids.tolist()
