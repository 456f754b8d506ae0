"""The first thing that is done with a model file: its header, and its vocabulary aside.

Imports little on purpose: libllama needs longer for a vocabulary than anything else takes,
and what the rest of the engine imports is imported meanwhile.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from edgeroute.runtime.closing import Closing
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.tokenizer import Tokenizer


class Opening(Closing):
    """A model file, and its vocabulary as soon as that is read.

    Raises:
        ModelFileError: the file cannot be opened; a malformed vocabulary raises later, from
            `tokenizer`.
    """

    def __init__(self, path: Path) -> None:
        self.file = GGUFFile.open(path)
        self._aside = ThreadPoolExecutor(1, "edgeroute-vocab")
        self._vocabulary: Future[Tokenizer] = self._aside.submit(Tokenizer.open, self.file)

    @property
    def tokenizer(self) -> Tokenizer:
        """The vocabulary; waits for it.

        Raises:
            ModelFileError, UnsupportedModelError: llama.cpp could not use it safely.
        """
        return self._vocabulary.result()

    def close(self) -> None:
        """Close vocabulary and file, even when something else was refused meanwhile."""
        self._aside.shutdown()
        if self._vocabulary.exception() is None:
            self._vocabulary.result().close()
        self.file.close()
