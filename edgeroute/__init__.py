"""edgeroute: language models larger than the machine, with every trick measured.

Importing this package loads nothing but the version: public names resolve on
first use, so `import edgeroute.runtime` never pulls in the engine.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from edgeroute.embedding import Embeddings as Embeddings
    from edgeroute.engine import Runtime as Runtime
    from edgeroute.engine import generate as generate
    from edgeroute.pool import Pool as Pool
    from edgeroute.runtime.errors import EdgerouteError as EdgerouteError
    from edgeroute.stats import Chunk as Chunk
    from edgeroute.stats import Generation as Generation
else:
    _HOME = {
        "Chunk": "edgeroute.stats",
        "Embeddings": "edgeroute.embedding",
        "EdgerouteError": "edgeroute.runtime.errors",
        "Generation": "edgeroute.stats",
        "Pool": "edgeroute.pool",
        "Runtime": "edgeroute.engine",
        "generate": "edgeroute.engine",
    }

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_HOME[name]), name)


__all__ = [
    "Chunk",
    "EdgerouteError",
    "Embeddings",
    "Generation",
    "Pool",
    "Runtime",
    "__version__",
    "generate",
]
