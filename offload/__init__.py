"""Floor 2: moves weights between disk, DRAM and devices, and owns the I/O threads.

May import: `edgeroute.runtime`. Never `models` or `skippers`.

Pure logic, no threads, no bytes: `page_table` (over `slot_book`) says which page is in which
slot, asking a policy of `eviction_registry` whom to evict; `prefetch` predicts and
`prefetch_gate` decides whether that pays; `trace` records what was asked for, `replay` runs
it through the same page table, and `eviction_cliff` warns when slots are too few for recency.
"""
