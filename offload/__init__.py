"""Floor 2: moves weights between disk, DRAM and devices, and owns the I/O threads.

May import: `edgeroute.runtime`. Never `models` or `skippers`.
"""
