"""Loads every vocabulary of a folder with llama.cpp and puts it to use.

Run as a script in a process of its own: an abort in llama.cpp ends it, and the last name
printed tells on which file.
"""

import ctypes
import sys
from pathlib import Path

import llama_cpp

TEXT = (
    "Hello  world \n\n ab cd \t 日本 é \x01 <s> <|im_end|> [EMPTY_1] <0x41> 'tis 123456"
    + "".join(chr(code) for code in range(1, 0x180))
).encode()


@llama_cpp.llama_log_callback
def _silent(level: int, message: bytes, user: ctypes.c_void_p) -> None:
    """Drop one log line."""


def main(folder: Path) -> None:
    """Use the vocabularies in name order."""
    llama_cpp.llama_log_set(_silent, None)
    llama_cpp.llama_backend_init()
    for path in sorted(folder.iterdir()):
        print(path.name, flush=True)
        use(path)


def use(path: Path) -> None:
    """Tokenize with and without special tokens, and turn every token into text."""
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        print("not loaded", flush=True)
        return
    vocab = llama_cpp.llama_model_get_vocab(model)
    tokens = (llama_cpp.llama_token * 8192)()
    piece = ctypes.create_string_buffer(1 << 16)
    for special in (True, False):
        n = llama_cpp.llama_tokenize(vocab, TEXT, len(TEXT), tokens, 8192, special, special)
        llama_cpp.llama_detokenize(vocab, tokens, n, piece, len(piece), special, special)
    for token in range(llama_cpp.llama_vocab_n_tokens(vocab)):
        llama_cpp.llama_token_to_piece(vocab, token, piece, len(piece), 0, True)
    llama_cpp.llama_model_free(model)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
