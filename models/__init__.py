"""Floor 2: what a model is. One file per architecture family, and the catalogue.

Sole right: knows tensor names and architectures; never asks where a weight lives.
May import: `edgeroute.runtime`. Never `offload` or `skippers`.
"""
