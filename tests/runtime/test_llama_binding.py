"""The libllama binding: layouts equal llama-cpp-python's, errors are sentences."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgeroute.runtime.errors import ModelFileError
from edgeroute.runtime.ggml import llama as binding
from edgeroute.runtime.tokenizer import Tokenizer

# llama-cpp-python installs its own log callback on import, hence another process.
COMPARE = """
import ctypes, sys, warnings
warnings.simplefilter("ignore")
from llama_cpp import llama_cpp as theirs
from edgeroute.runtime.ggml import llama as ours
pairs = [
    (ours.ModelParams, theirs.llama_model_params),
    (ours.TokenData, theirs.llama_token_data),
    (ours.TokenDataArray, theirs.llama_token_data_array),
]
for mine, other in pairs:
    assert ctypes.sizeof(mine) == ctypes.sizeof(other), (mine, ctypes.sizeof(mine))
    for name, *_ in other._fields_:
        a, b = getattr(mine, name), getattr(other, name)
        assert (a.offset, a.size) == (b.offset, b.size), (mine, name, a, b)
    assert [f[0] for f in mine._fields_] == [f[0] for f in other._fields_]
print("equal")
"""


def test_struct_layouts_equal_llama_cpp_python() -> None:
    done = subprocess.run([sys.executable, "-c", COMPARE], capture_output=True, text=True)
    assert done.stdout == "equal\n", done.stderr


def test_numpy_candidates_have_the_c_layout() -> None:
    dtype = np.dtype(list(binding.TOKEN_DATA_FIELDS))
    fields = dtype.fields
    assert fields is not None
    for name, (_, offset) in ((n, f[:2]) for n, f in fields.items()):
        assert getattr(binding.TokenData, name).offset == offset
    import ctypes

    assert dtype.itemsize == ctypes.sizeof(binding.TokenData)


def test_binding_does_not_import_the_llama_cpp_package() -> None:
    code = (
        "import sys; from edgeroute.runtime.ggml.llama import llama; llama();"
        "print('llama_cpp' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_refused_file_gives_the_library_s_reason(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "not a model é.gguf"
    path.write_bytes(b"GGUF but not really")
    with pytest.raises(ModelFileError, match="not a model"):
        Tokenizer.open_unchecked(str(path))
    captured = capfd.readouterr()
    assert captured.err == "" and captured.out == ""
