"""Benchmarks against raw llama.cpp: alternating runs, medians, spread, the machine's state.

May import everything below floor 5. llama_cpp is imported only by `peer` and `child`.
"""
