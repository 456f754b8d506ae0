"""A dense llama or qwen2 file computed in numpy, float32, one layer's weights at a time."""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, quants

from edgeroute.models.registry import describe
from edgeroute.runtime.errors import UnsupportedModelError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.weights import check_specs

Array = npt.NDArray[np.float32]

ROWS_AT_ONCE: Final = 2048
"""Tokens, or rows of the output matrix, whose intermediate results exist at one time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedForward:
    """One layer's gated feed-forward: gate and up (n_ff, n_embd), down (n_embd, n_ff)."""

    gate: Array
    up: Array
    down: Array

    def hidden(self, u: Array) -> Array:
        """Return silu(gate u) * up u for normed inputs (n_tokens, n_embd): (n_tokens, n_ff)."""
        h = np.empty((len(u), len(self.gate)), np.float32)
        for at in range(0, len(u), ROWS_AT_ONCE):
            part = np.s_[at : at + ROWS_AT_ONCE]
            h[part] = silu(u[part] @ self.gate.T)
            h[part] *= u[part] @ self.up.T
        return h


class DenseModel:
    """The weights of a checked file and the parts of its forward pass.

    Raises:
        ModelFileError: hyperparameters or tensors are missing or do not fit each other.
        UnsupportedModelError: not of an architecture that edgeroute runs.

    Lifetime: `file` must stay open.
    """

    def __init__(self, file: GGUFFile) -> None:
        model = describe(file)
        check_specs(file, model.specs())
        self.file = file
        self.hparams = model.hparams
        self.neighbours = model.hparams.arch == "llama"
        """Whether rotary pairs are neighbours; else they are the two halves of a head."""

    def rows(self, name: str) -> npt.NDArray[np.uint8]:
        """Return a tensor as stored, a read-only view: (n_rows, bytes of a row)."""
        info = self.file.tensors[name]
        data = np.frombuffer(self.file.view(info), np.uint8)
        return data.reshape(-1, info.type.row_size(info.ne[0]))

    def decode(self, name: str, rows: npt.NDArray[np.uint8]) -> Array:
        """Dequantise rows of a tensor: (n_rows, n_in)."""
        kind = self.file.tensors[name].type
        try:
            values = quants.dequantize(rows, GGMLQuantizationType(kind))
        except (NotImplementedError, ValueError, KeyError) as error:
            raise UnsupportedModelError(
                f"tensor {name} in {self.file.path.name} is {kind.name}, which numpy cannot "
                "dequantise here; convert a file of another type (Q4_K, Q8_0, F16)"
            ) from error
        return np.ascontiguousarray(values, dtype=np.float32)

    def matrix(self, name: str) -> Array:
        """Dequantise a matrix: (n_out, n_in)."""
        return self.decode(name, self.rows(name))

    def vector(self, name: str) -> Array:
        """Return a norm or bias; zeros of width 1 where the file has none."""
        if name not in self.file.tensors:
            return np.zeros(1, np.float32)
        found: Array = self.matrix(name)[0]
        return found

    def embed(self, ids: npt.NDArray[np.int32]) -> Array:
        """Look token embeddings up: (n_tokens, n_embd)."""
        distinct, where = np.unique(ids, return_inverse=True)
        name = "token_embd.weight"
        found: Array = self.decode(name, self.rows(name)[distinct])[where.reshape(-1)]
        return found

    def norm(self, name: str, x: Array) -> Array:
        """Scale each row to unit power, then by the norm's weight."""
        power = np.einsum("ij,ij->i", x, x)[:, None] / np.float32(x.shape[1])
        scaled: Array = x / np.sqrt(power + np.float32(self.hparams.norm_rms_eps))
        scaled *= self.vector(f"{name}.weight")
        return scaled

    def feed_forward(self, il: int) -> FeedForward:
        """Dequantise one layer's feed-forward matrices."""
        p = f"blk.{il}.ffn"
        return FeedForward(gate=self.matrix(f"{p}_gate.weight"), up=self.matrix(f"{p}_up.weight"),
                           down=self.matrix(f"{p}_down.weight"))  # fmt: skip

    def add_attention(self, il: int, x: Array, n_window: int) -> None:
        """Add one layer's attention to the stream in place; windows do not see each other."""
        hp, p = self.hparams, f"blk.{il}.attn"
        w_q, w_k, w_v = (self.matrix(f"{p}_{part}.weight") for part in "qkv")
        b_q, b_k, b_v = (self.vector(f"{p}_{part}.bias") for part in "qkv")
        w_out = self.matrix(f"{p}_output.weight")
        cos, sin = self._rotation(n_window)
        ahead = np.triu(np.full((n_window, n_window), -np.inf, np.float32), 1)
        group, width = hp.n_head // hp.n_head_kv, hp.n_embd_head_k
        for at in range(0, len(x), n_window):
            u = self.norm(f"{p}_norm", x[at : at + n_window])
            q = self._rotate((u @ w_q.T + b_q).reshape(n_window, hp.n_head, width), cos, sin)
            k = self._rotate((u @ w_k.T + b_k).reshape(n_window, hp.n_head_kv, width), cos, sin)
            v = (u @ w_v.T + b_v).reshape(n_window, hp.n_head_kv, width)
            q = q.transpose(1, 0, 2).reshape(hp.n_head_kv, group, n_window, width)
            scores = q @ k.transpose(1, 2, 0)[:, None]
            scores *= np.float32(width**-0.5)
            scores += ahead
            out = _softmax(scores) @ v.transpose(1, 0, 2)[:, None]
            out = out.reshape(hp.n_head, n_window, width).transpose(1, 0, 2)
            x[at : at + n_window] += out.reshape(n_window, -1) @ w_out.T

    def logits(self, x: Array) -> Array:
        """Normalise the stream and project it to the vocabulary: (n_tokens, n_vocab)."""
        name = "token_embd.weight" if self.hparams.tied else "output.weight"
        u, stored = self.norm("output_norm", x), self.rows(name)
        found = np.empty((len(x), len(stored)), np.float32)
        for at in range(0, len(stored), ROWS_AT_ONCE):
            part = np.s_[at : at + ROWS_AT_ONCE]
            found[:, part] = u @ self.decode(name, stored[part]).T
        return found

    def _rotation(self, n_window: int) -> tuple[Array, Array]:
        """Cosines and sines by position and pair: (n_window, 1, n_embd_head / 2) each."""
        rope, width = self.hparams.rope, self.hparams.n_embd_head_k
        frequencies = rope.freq_scale * rope.freq_base ** (-np.arange(0, width, 2) / width)
        angles = np.arange(n_window)[:, None, None] * frequencies
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def _rotate(self, x: Array, cos: Array, sin: Array) -> Array:
        half = x.shape[-1] // 2
        first = np.s_[..., 0::2] if self.neighbours else np.s_[..., :half]
        second = np.s_[..., 1::2] if self.neighbours else np.s_[..., half:]
        out = np.empty_like(x)
        out[first] = x[first] * cos - x[second] * sin
        out[second] = x[first] * sin + x[second] * cos
        return out


def silu(x: Array) -> Array:
    """Return x * sigmoid(x)."""
    with np.errstate(over="ignore"):  # exp(-x) may be infinite: the quotient is then zero
        found: Array = x / (1 + np.exp(-x))
    return found


def _softmax(scores: Array) -> Array:
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return scores
