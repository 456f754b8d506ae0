"""Floor 1: ggml, files, memory, sequences, sampling, records.

Sole right: the only folder that uses ctypes or holds a C pointer.
May import: nothing else of this project.
"""
