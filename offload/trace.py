"""Which experts each token chose, and what paging did: recorded, appended to a file, read back.

The names by which everybody uses traces. What they are made of is in `trace_records`, the
format of a file in `trace_codec`, files in `trace_file`, the live side in `trace_recorder`.
"""

from edgeroute.offload.trace_codec import MAGIC, VERSION
from edgeroute.offload.trace_file import TraceReader, TraceWriter, iter_trace, read_trace
from edgeroute.offload.trace_recorder import TraceRecorder
from edgeroute.offload.trace_records import (
    Counted,
    Ids,
    Mark,
    Pools,
    PoolState,
    Record,
    StepPaging,
    Trace,
    TraceError,
    TraceMeta,
    TraceStep,
    make_step,
    pages_of,
    sequences,
)

__all__ = [
    "MAGIC",
    "VERSION",
    "Counted",
    "Ids",
    "Mark",
    "PoolState",
    "Pools",
    "Record",
    "StepPaging",
    "Trace",
    "TraceError",
    "TraceMeta",
    "TraceReader",
    "TraceRecorder",
    "TraceStep",
    "TraceWriter",
    "iter_trace",
    "make_step",
    "pages_of",
    "read_trace",
    "sequences",
]
