"""Floor 2: decides what not to compute. Pure functions of signals: no I/O, no ggml.

May import: `edgeroute.runtime` records. Never `models` or `offload`.
"""
