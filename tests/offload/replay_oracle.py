"""The slow way to replay: through the live page table itself, request by request."""

from collections.abc import Sequence

from edgeroute.offload.page_table import PageTable


def run_slowly(table: PageTable, steps: Sequence[tuple[bool, Sequence[Sequence[int]]]]) -> None:
    """Lease, load and release the pages of each (prefill, pages per layer)."""
    for prefill, wanted in steps:
        table.begin_step(prefill)
        for pages in wanted:
            for page in table.acquire(pages)[1]:
                table.loaded(page.page)
            table.release(pages)
