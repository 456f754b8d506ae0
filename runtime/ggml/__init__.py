"""Typed ctypes binding to the ggml and llama libraries that llama-cpp-python ships.

`lib` finds and checks the libraries, `structs` mirrors C layouts, `api` declares the
functions. No other folder may import ctypes.
"""
