"""gpt-oss and DeepSeek-V2 in plain numpy, float32, written from their papers and model cards.

As in numpy_llama, whose reader and norms these use, nothing is shared with the engine. Keys and
values are unfolded for every head here, whatever form the file's projections have.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader

from tests.reference import numpy_llama as llama

Array = npt.NDArray[np.float32]
ALPHA, LIMIT = 1.702, 7.0  # of gpt-oss's activation


class NumpyFamily(llama.NumpyModel):
    """What both families share: rotation, attention over unfolded heads, chosen experts."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.header = GGUFReader(path)

    def key(self, name: str, default: Any = None) -> Any:
        field = self.header.get_field(f"{self.config.arch}.{name}")
        return default if field is None else field.contents()

    def rotated(self, x: Array, neighbours: bool, magnitude: float) -> Array:
        """Rotate pairs of all values of F32 (n, n_head, width) by position."""
        width = x.shape[-1]
        angles = np.arange(len(x))[:, None, None] * self._frequencies(width, False)
        turn = magnitude * np.exp(1j * angles)
        parts = (x[..., 0::2], x[..., 1::2]) if neighbours else np.split(x, 2, axis=-1)
        turned = (parts[0] + 1j * parts[1]) * turn
        if neighbours:
            both = np.stack([turned.real, turned.imag], axis=-1)
            return both.reshape(x.shape).astype(np.float32)
        return np.concatenate([turned.real, turned.imag], axis=-1).astype(np.float32)

    def attend(self, scores: Array, v: Array, window: int, sinks: Array | None) -> Array:
        """Mask F32 (n_head, n, n), take its softmax with or without sinks, and sum values."""
        n = len(v)
        ahead = np.arange(n)[None, :] - np.arange(n)[:, None]
        scores = np.where((ahead > 0) | (ahead <= -window), -np.inf, scores)
        top = scores.max(axis=-1, keepdims=True)
        weights = np.exp(scores - top)
        total = weights.sum(axis=-1, keepdims=True)
        if sinks is not None:
            total = total + np.exp(sinks[:, None, None] - top)
        return np.einsum("hqk,khd->qhd", weights / total, v).reshape(n, -1).astype(np.float32)

    def chosen(self, ranked_by: Array) -> npt.NDArray[np.intp]:
        """Rank experts, note how clear the choice was, and return the best of each token."""
        k = self.config.n_expert_used
        order = np.argsort(-ranked_by, axis=-1)
        ranked = np.take_along_axis(ranked_by, order, axis=-1)
        self.margins.append(ranked[:, k - 1] - ranked[:, k])
        return order[:, :k]


class NumpyGptOss(NumpyFamily):
    """Sinks, windows in every second layer, YaRN everywhere, biases on everything."""

    def _layer(self, il: int, x: Array) -> Array:
        p = f"blk.{il}"
        x = x + self._attention(il, self._norm(f"{p}.attn_norm", x))
        return x + self._experts(p, self._norm(f"{p}.post_attention_norm", x))

    def _attention(self, il: int, x: Array) -> Array:
        c, p, n = self.config, f"blk.{il}", len(x)
        q = self._linear(f"{p}.attn_q", x).reshape(n, c.n_head, -1)
        k = self._linear(f"{p}.attn_k", x).reshape(n, c.n_head_kv, -1)
        v = self._linear(f"{p}.attn_v", x).reshape(n, c.n_head_kv, -1)
        magnitude = 0.1 * np.log(c.factor) + 1.0
        q, k = self.rotated(q, False, magnitude), self.rotated(k, False, magnitude)
        k, v = (np.repeat(each, c.n_head // c.n_head_kv, axis=1) for each in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.float32(np.sqrt(q.shape[-1]))
        window = c.window if il % 2 == 0 else n
        out = self.attend(scores, v, window, self.weights[f"{p}.attn_sinks.weight"])
        return self._linear(f"{p}.attn_output", out)

    def _experts(self, p: str, h: Array) -> Array:
        w, scores = self.weights, self._linear(f"{p}.ffn_gate_inp", h)
        out = np.zeros_like(h)
        for t, experts in enumerate(self.chosen(scores)):
            weights = np.exp(scores[t, experts] - scores[t, experts].max())
            for e, weight in zip(experts, weights / weights.sum(), strict=True):
                gate, up = (
                    w[f"{p}.ffn_{part}_exps.weight"][e] @ h[t] + w[f"{p}.ffn_{part}_exps.bias"][e]
                    for part in ("gate", "up")
                )
                gate, up = np.minimum(gate, LIMIT), np.clip(up, -LIMIT, LIMIT)
                inner = gate / (1 + np.exp(-ALPHA * gate)) * (up + 1)
                down = w[f"{p}.ffn_down_exps.weight"][e] @ inner
                out[t] += weight * (down + w[f"{p}.ffn_down_exps.bias"][e])
        return out


class NumpyDeepSeek2(NumpyFamily):
    """Latent attention, shared experts, and either gate."""

    def _attention(self, il: int, x: Array) -> Array:
        c, p, n = self.config, f"blk.{il}", len(x)
        n_rot, n_lora = self.key("rope.dimension_count"), self.key("attention.kv_lora_rank")
        if f"{p}.attn_q_a.weight" in self.weights:
            q = self._norm(f"{p}.attn_q_a_norm", self._linear(f"{p}.attn_q_a", x))
            q = self._linear(f"{p}.attn_q_b", q)
        else:
            q = self._linear(f"{p}.attn_q", x)
        q = q.reshape(n, c.n_head, -1)
        both = self._linear(f"{p}.attn_kv_a_mqa", x)
        k, v = self.unfold(p, self._norm(f"{p}.attn_kv_a_norm", both[:, :n_lora]))
        k_pe = self.rotated(both[:, None, n_lora:], True, 1.0)
        q_pe = self.rotated(q[..., -n_rot:], True, 1.0)
        scores = np.einsum("qhd,khd->hqk", q[..., :-n_rot], k)
        scores = scores + np.einsum("qhd,kd->hqk", q_pe, k_pe[:, 0])
        mscale = self.key("rope.scaling.yarn_log_multiplier", 0.0) * np.log(c.factor) + 1.0
        scores = scores * np.float32(mscale**2 / np.sqrt(q.shape[-1]))
        return self._linear(f"{p}.attn_output", self.attend(scores, v, n, None))

    def unfold(self, p: str, latent: Array) -> tuple[Array, Array]:
        """Make keys without position and values of every head: F32 (n, n_head, width)."""
        w, n = self.weights, len(latent)
        if f"{p}.attn_k_b.weight" in w:
            k = np.einsum("nl,hld->nhd", latent, w[f"{p}.attn_k_b.weight"])
            return k, np.einsum("nl,hdl->nhd", latent, w[f"{p}.attn_v_b.weight"])
        kv = self._linear(f"{p}.attn_kv_b", latent).reshape(n, self.config.n_head, -1)
        n_v = self.key("attention.value_length")
        return kv[..., :-n_v], kv[..., -n_v:]

    def _experts(self, p: str, h: Array) -> Array:
        w, scores = self.weights, self._linear(f"{p}.ffn_gate_inp", h)
        if self.key("expert_gating_func", 1) == 2:
            probs = 1 / (1 + np.exp(-scores))
        else:
            probs = np.exp(scores - scores.max(axis=-1, keepdims=True))
            probs = probs / probs.sum(axis=-1, keepdims=True)
        chosen = self.chosen(probs + w.get(f"{p}.exp_probs_b.bias", np.float32(0)))
        out: Array = self._linear(f"{p}.ffn_down_shexp", self.inner(p, "_shexp", h))
        for t, experts in enumerate(chosen):
            weights = probs[t, experts]
            if self.key("expert_weights_norm", False):
                weights = weights / weights.sum()
            weights = weights * self.key("expert_weights_scale", 1.0)
            for e, weight in zip(experts, weights, strict=True):
                gate = w[f"{p}.ffn_gate_exps.weight"][e] @ h[t]
                up = w[f"{p}.ffn_up_exps.weight"][e] @ h[t]
                inner = llama._silu(gate) * up
                out[t] += weight * (w[f"{p}.ffn_down_exps.weight"][e] @ inner)
        return out

    def inner(self, p: str, suffix: str, h: Array) -> Array:
        """Gate and up of a feed-forward, joined."""
        gate = self._linear(f"{p}.ffn_gate{suffix}", h)
        joined: Array = llama._silu(gate) * self._linear(f"{p}.ffn_up{suffix}", h)
        return joined
