"""llama and qwen2 files computed in torch, with low-rank adapters that gradients flow into.

The base's weights are dequantised once, are constant, and may be bfloat16; the residual
stream, norms, rotations, attention and adapters are F32. Sequences of a batch start at
position 0 and are padded on the right, where causality hides the padding from them.
Source: the forward of models/llama.py, which its logits are tested against.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edgeroute.models.base import Hparams
from edgeroute.runtime.errors import UnsupportedModelError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.tools.convert.moe import check_source
from edgeroute.tools.convert.moe_activations import DenseModel

PARTS: Final[Mapping[str, str]] = MappingProxyType(
    {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
     "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
)  # fmt: skip
"""Linear modules of a layer by short name, and what the file calls them."""

_GLOBAL: Final = frozenset({"token_embd.weight", "output_norm.weight", "output.weight",
                            "output.bias", "rope_freqs.weight"})  # fmt: skip


Turn = tuple[Tensor, Tensor]
"""Cosines and sines of positions, F32 (n_seq, 1, n_tokens, n_embd_head / 2) each."""


class LowRank:
    """The matrices of one adapter: for each layer and part A (rank, n_in) and B (n_out, rank).

    Rows of B are in the base file's order. A part's output gains scale * B A x.
    """

    def __init__(
        self, scale: float, pairs: Mapping[tuple[int, str], tuple[Tensor, Tensor]]
    ) -> None:
        self.scale = scale
        self.pairs = dict(pairs)

    def parameters(self) -> list[Tensor]:
        """Return all matrices in a fixed order."""
        return [matrix for key in sorted(self.pairs) for matrix in self.pairs[key]]

    def add(self, il: int, part: str, x: Tensor, out: Tensor) -> Tensor:
        """Return a part's output with the adapter's share."""
        pair = self.pairs.get((il, part))
        if pair is None:
            return out
        return out + F.linear(F.linear(x, pair[0]), pair[1]) * self.scale


@dataclass(slots=True, kw_only=True)
class _Layer:
    """Weights (n_out, n_in) in the base's type, vectors in F32."""

    matrices: dict[str, Tensor]
    biases: dict[str, Tensor]
    attn_norm: Tensor
    ffn_norm: Tensor


class Cache:
    """Keys and values of a batch, F32 (n_seq, n_head_kv, n_cells, n_embd_head) per layer."""

    def __init__(self, hparams: Hparams, n_seq: int, n_cells: int) -> None:
        shape = (n_seq, hparams.n_head_kv, n_cells, hparams.n_embd_head_k)
        self.k = [torch.zeros(shape) for _ in range(hparams.n_layer)]
        self.v = [torch.zeros(shape) for _ in range(hparams.n_layer)]

    def keep(self, rows: Tensor) -> None:
        """Drop all sequences but `rows`."""
        self.k = [k[rows] for k in self.k]
        self.v = [v[rows] for v in self.v]


class TorchLlama:
    """A dense llama or qwen2 model. The file may be closed once this is made.

    Args:
        file: the model.
        dtype: of the base's matrices, torch.float32 or torch.bfloat16.
        progress: called with a phase, how much of it is done, and of how much.
        first: the first layer that is read; those before it cannot be run.

    Raises:
        UnsupportedModelError: another architecture, experts, or a feature this has not.
        ModelFileError: a malformed file.
    """

    def __init__(
        self, file: GGUFFile, dtype: torch.dtype,
        progress: Callable[[str, int, int], None] = lambda *_: None, first: int = 0,
    ) -> None:  # fmt: skip
        check_trainable(file)
        dense = DenseModel(file)
        self.hparams = dense.hparams
        self.neighbours = dense.neighbours
        self.dtype = dtype
        self._embedding = self._matrix(dense, "token_embd.weight")
        self._head = self._embedding
        if not self.hparams.tied:
            self._head = self._matrix(dense, "output.weight")
        self._head_bias = _vector(dense, "output.bias")
        self._output_norm = torch.from_numpy(dense.vector("output_norm.weight").copy())
        self._frequencies = _frequencies(dense)
        self._layers: dict[int, _Layer] = {}
        for il in range(first, self.hparams.n_layer):
            progress("dequantise", il + 1 - first, self.hparams.n_layer - first)
            self._layers[il] = self._read_layer(dense, il)

    def width(self, part: str) -> tuple[int, int]:
        """Return (n_in, n_out) of a part."""
        n_out, n_in = next(iter(self._layers.values())).matrices[part].shape
        return int(n_in), int(n_out)

    def embed(self, ids: Tensor) -> Tensor:
        """Look token embeddings up: F32 (..., n_embd)."""
        found: Tensor = F.embedding(ids, self._embedding).float()
        return found

    def hidden(
        self, ids: Tensor, adapter: LowRank | None = None,
        cache: Cache | None = None, pos: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Run all layers.

        Args:
            ids: (n_seq, n_tokens).
            adapter: added to the base.
            cache: where keys and values go, and with `pos` come from.
            pos: (n_seq,) positions of single tokens after a prefill; None for a prefill,
                which starts at 0.

        Returns:
            The stream after the last norm, F32 (n_seq, n_tokens, n_embd).
        """
        at = torch.arange(ids.shape[1])[None] if pos is None else pos[:, None]
        turn = self.turn(at)
        x = self.embed(ids)
        for il in self._layers:
            x = x + self.attention(il, x, turn, adapter, cache, pos)
            x = x + self.feed_forward(il, x, adapter)
        return self.normed(x)

    def turn(self, pos: Tensor) -> Turn:
        """Return the cosines and sines of positions (..., n_tokens): F32, for each pair."""
        angles = pos[:, None, :, None] * self._frequencies
        return torch.cos(angles), torch.sin(angles)

    def heads(
        self, il: int, x: Tensor, turn: Turn, adapter: LowRank | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of a layer, rotated: (n_seq, n_heads, n_tokens, width).

        `x` is the residual stream before it, F32 (n_seq, n_tokens, n_embd).
        """
        n_seq, n_tokens, _ = x.shape
        u = self._norm(x, self._layers[il].attn_norm)
        q, k, v = (
            self._linear(il, part, u, adapter)
            .view(n_seq, n_tokens, -1, self.hparams.n_embd_head_k)
            .transpose(1, 2)
            for part in "qkv"
        )
        return self._rotate(q, turn), self._rotate(k, turn), v

    def project(self, il: int, heads: Tensor, adapter: LowRank | None = None) -> Tensor:
        """Return what attention adds to the stream, of what its heads found."""
        n_seq, _, n_tokens, _ = heads.shape
        return self._linear(il, "o", heads.transpose(1, 2).reshape(n_seq, n_tokens, -1), adapter)

    def feed_forward(self, il: int, x: Tensor, adapter: LowRank | None = None) -> Tensor:
        """Return what a layer's feed-forward adds to the stream `x`."""
        u = self._norm(x, self._layers[il].ffn_norm)
        gate, up = (self._linear(il, part, u, adapter) for part in ("gate", "up"))
        return self._linear(il, "down", F.silu(gate) * up, adapter)

    def normed(self, x: Tensor) -> Tensor:
        """Return the stream behind the last layer as the head takes it."""
        return self._norm(x, self._output_norm)

    def head_rows(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the rows of the head for some tokens, and their biases if it has any."""
        bias = self._head_bias
        return self._head[tokens].contiguous(), None if bias is None else bias[tokens]

    def logits(self, hidden: Tensor) -> Tensor:
        """Project rows of the stream to the vocabulary: F32 (..., n_vocab)."""
        found = F.linear(hidden.to(self.dtype), self._head).float()
        return found if self._head_bias is None else found + self._head_bias

    def attention(
        self, il: int, x: Tensor, turn: Turn, adapter: LowRank | None = None,
        cache: Cache | None = None, pos: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return what a layer's attention adds to the stream `x`: see `hidden`."""
        n_seq, n_tokens, _ = x.shape
        q, k, v = self.heads(il, x, turn, adapter)
        mask = None
        if cache is not None and pos is None:
            cache.k[il][:, :, :n_tokens], cache.v[il][:, :, :n_tokens] = k, v
        elif cache is not None and pos is not None:
            rows = torch.arange(n_seq)
            cache.k[il][rows, :, pos], cache.v[il][rows, :, pos] = k[:, :, 0], v[:, :, 0]
            k, v = cache.k[il], cache.v[il]
            mask = (torch.arange(k.shape[2])[None] <= pos[:, None])[:, None, None]
        group = self.hparams.n_head // self.hparams.n_head_kv
        if group > 1:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.project(il, out, adapter)

    def _linear(self, il: int, part: str, x: Tensor, adapter: LowRank | None) -> Tensor:
        layer = self._layers[il]
        out = F.linear(x.to(self.dtype), layer.matrices[part]).float()
        if part in layer.biases:
            out = out + layer.biases[part]
        return out if adapter is None else adapter.add(il, part, x, out)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        found: Tensor = F.rms_norm(x, (x.shape[-1],), weight, self.hparams.norm_rms_eps)
        return found

    def _rotate(self, x: Tensor, turn: Turn) -> Tensor:
        cos, sin = turn
        if self.neighbours:
            first, second = x[..., 0::2], x[..., 1::2]
        else:
            first, second = x.chunk(2, -1)
        a, b = first * cos - second * sin, first * sin + second * cos
        if self.neighbours:
            return torch.stack((a, b), -1).flatten(-2)
        return torch.cat((a, b), -1)

    def _read_layer(self, dense: DenseModel, il: int) -> _Layer:
        p = f"blk.{il}"
        biases = {part: _vector(dense, f"{p}.{name}.bias") for part, name in PARTS.items()}
        return _Layer(
            matrices={part: self._matrix(dense, f"{p}.{name}.weight")
                      for part, name in PARTS.items()},
            biases={part: bias for part, bias in biases.items() if bias is not None},
            attn_norm=torch.from_numpy(dense.vector(f"{p}.attn_norm.weight").copy()),
            ffn_norm=torch.from_numpy(dense.vector(f"{p}.ffn_norm.weight").copy()),
        )  # fmt: skip

    def _matrix(self, dense: DenseModel, name: str) -> Tensor:
        return torch.from_numpy(np.array(dense.matrix(name))).to(self.dtype)


def check_trainable(file: GGUFFile) -> None:
    """Refuse a model that TorchLlama cannot compute.

    Raises:
        UnsupportedModelError, ModelFileError: see TorchLlama.
    """
    check_source(file)
    _check_features(DenseModel(file))


def greedy(
    model: TorchLlama, prompts: Sequence[Sequence[int]], max_tokens: int,
    ends: frozenset[int], adapter: LowRank | None = None,
) -> list[list[int]]:  # fmt: skip
    """Answer prompts together, always with the likeliest token.

    Args:
        model: the base.
        prompts: token ids, at least one each.
        max_tokens: of an answer.
        ends: tokens that end an answer; they are not part of it.
        adapter: added to the base.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    longest = int(lengths.max())
    ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])
    with torch.inference_mode():
        cache = Cache(model.hparams, len(prompts), longest + max_tokens)
        hidden = model.hidden(ids, adapter, cache)
        open_rows = torch.arange(len(prompts))
        last, pos = hidden[open_rows, lengths - 1], lengths
        for _ in range(max_tokens):
            tokens = model.logits(last).argmax(-1)
            going = [token not in ends for token in tokens.tolist()]
            if not all(going):
                rows = torch.tensor(going)
                tokens, pos, open_rows = tokens[rows], pos[rows], open_rows[rows]
                cache.keep(rows)
            if not len(open_rows):
                break
            for row, token in zip(open_rows.tolist(), tokens.tolist(), strict=True):
                answers[row].append(token)
            last = model.hidden(tokens[:, None], adapter, cache, pos)[:, 0]
            pos = pos + 1
    return answers


def _vector(dense: DenseModel, name: str) -> Tensor | None:
    if name not in dense.file.tensors:
        return None
    return torch.from_numpy(dense.vector(name).copy())


def _frequencies(dense: DenseModel) -> Tensor:
    """Angles that one position adds, by rotary pair: F32 (n_embd_head / 2,)."""
    rope, width = dense.hparams.rope, dense.hparams.n_embd_head_k
    found = rope.freq_scale * rope.freq_base ** (-np.arange(0, width, 2) / width)
    if "rope_freqs.weight" in dense.file.tensors:
        found = found / dense.vector("rope_freqs.weight")
    return torch.from_numpy(found.astype(np.float32))


def _check_features(dense: DenseModel) -> None:
    hp, name = dense.hparams, dense.file.path.name
    known = {f"blk.{il}.{stem}.{kind}" for il in range(hp.n_layer)
             for stem in PARTS.values() for kind in ("weight", "bias")}  # fmt: skip
    known |= {
        f"blk.{il}.{stem}_norm.weight" for il in range(hp.n_layer) for stem in ("attn", "ffn")
    }
    strange = sorted(set(dense.file.tensors) - known - _GLOBAL)
    lacking = None
    if strange:
        lacking = f"the tensor {strange[0][:60]!r}"
    elif hp.rope.n_rot != hp.n_embd_head_k:
        lacking = f"rotation of {hp.rope.n_rot} of {hp.n_embd_head_k} values"
    elif hp.rope.ext_factor or not math.isclose(hp.rope.attn_factor, 1.0):
        lacking = "YaRN rope scaling"
    if lacking:
        raise UnsupportedModelError(f"{name} has {lacking}, which training does not know; "
                                    "train on a plain llama or qwen2 file")  # fmt: skip
