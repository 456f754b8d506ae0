"""Most architectures in plain numpy, float32, written from their papers' formulas.

Shares nothing with the engine: it reads the file with the gguf package and dequantises
every matrix. Slow and clear; for models of a few layers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, quants

Array = npt.NDArray[np.float32]

SWA_PERIOD = 6  # gemma3: five windowed layers, then one that sees all
NORMALISED = ("llama", "qwen3moe")  # weights of the chosen experts add up to one


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What the header says, with the format's defaults."""

    arch: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    eps: float
    base: float
    base_swa: float
    window: int
    scaling: str
    factor: float
    n_ctx_orig: int
    n_expert_used: int


class NumpyModel:
    """A model's weights as float32, and its forward pass over a whole text at once."""

    def __init__(self, path: Path) -> None:
        reader = GGUFReader(path)
        self.config = _config(reader)
        self.weights: dict[str, Array] = {
            t.name: quants.dequantize(np.array(t.data), t.tensor_type).astype(np.float32)
            for t in reader.tensors
        }
        self.margins: list[Array] = []
        """Per layer with experts and token: the last chosen score less the first rejected."""

    def logits(self, tokens: list[int]) -> Array:
        """Logits after each token: float32 (n_tokens, n_vocab)."""
        c, w = self.config, self.weights
        x = w["token_embd.weight"][tokens]
        if c.arch == "gemma3":
            x = x * np.float32(np.sqrt(c.n_embd))
        for il in range(c.n_layer):
            x = self._layer(il, x)
        x = self._norm("output_norm", x)
        head = w.get("output.weight", w["token_embd.weight"])
        return x @ head.T + w.get("output.bias", np.float32(0))

    def _layer(self, il: int, x: Array) -> Array:
        gemma, p = self.config.arch == "gemma3", f"blk.{il}"
        out = self._attention(il, self._norm(f"{p}.attn_norm", x))
        x = x + (self._norm(f"{p}.post_attention_norm", out) if gemma else out)
        h = self._norm(f"{p}.ffn_norm", x)
        if f"{p}.ffn_gate_inp.weight" in self.weights:
            return x + self._experts(p, h)
        gate, up = self._linear(f"{p}.ffn_gate", h), self._linear(f"{p}.ffn_up", h)
        out = self._linear(f"{p}.ffn_down", (_gelu(gate) if gemma else _silu(gate)) * up)
        return x + (self._norm(f"{p}.post_ffw_norm", out) if gemma else out)

    def _experts(self, p: str, h: Array) -> Array:
        """Each token's best experts, weighted by the softmax of all scores, and a shared one."""
        c, w = self.config, self.weights
        scores = self._linear(f"{p}.ffn_gate_inp", h)
        probs = np.exp(scores - scores.max(axis=-1, keepdims=True))
        probs /= probs.sum(axis=-1, keepdims=True)
        order = np.argsort(-probs, axis=-1)
        ranked = np.take_along_axis(scores, order, axis=-1)
        self.margins.append(ranked[:, c.n_expert_used - 1] - ranked[:, c.n_expert_used])
        out = np.zeros_like(h)
        for t, chosen in enumerate(order[:, : c.n_expert_used]):
            weights = probs[t, chosen]
            if c.arch in NORMALISED:
                weights = weights / weights.sum()
            for expert, weight in zip(chosen, weights, strict=True):
                gate = w[f"{p}.ffn_gate_exps.weight"][expert] @ h[t]
                up = w[f"{p}.ffn_up_exps.weight"][expert] @ h[t]
                out[t] += weight * (w[f"{p}.ffn_down_exps.weight"][expert] @ (_silu(gate) * up))
        if f"{p}.ffn_gate_shexp.weight" in w:
            gate, up = self._linear(f"{p}.ffn_gate_shexp", h), self._linear(f"{p}.ffn_up_shexp", h)
            score = h @ w[f"{p}.ffn_gate_inp_shexp.weight"]
            shared = self._linear(f"{p}.ffn_down_shexp", _silu(gate) * up)
            out += shared / (1 + np.exp(-score))[:, None]
        return out

    def _attention(self, il: int, x: Array) -> Array:
        c, p, n = self.config, f"blk.{il}", len(x)
        swa = bool(c.window) and il % SWA_PERIOD < SWA_PERIOD - 1
        q, k = self._linear(f"{p}.attn_q", x), self._linear(f"{p}.attn_k", x)
        if c.arch == "olmoe":
            q, k = self._norm(f"{p}.attn_q_norm", q), self._norm(f"{p}.attn_k_norm", k)
        q, k = q.reshape(n, c.n_head, -1), k.reshape(n, c.n_head_kv, -1)
        v = self._linear(f"{p}.attn_v", x).reshape(n, c.n_head_kv, -1)
        if f"{p}.attn_q_norm.weight" in self.weights and c.arch != "olmoe":
            q, k = self._norm(f"{p}.attn_q_norm", q), self._norm(f"{p}.attn_k_norm", k)
        q, k = self._rotate(q, swa), self._rotate(k, swa)
        group = c.n_head // c.n_head_kv
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.float32(np.sqrt(q.shape[-1]))
        ahead = np.arange(n)[None, :] - np.arange(n)[:, None]  # key less query position
        hidden = (ahead > 0) | (ahead <= -c.window if swa else False)
        scores = np.where(hidden, -np.inf, scores)
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        out = np.einsum("hqk,khd->qhd", scores, v).reshape(n, -1).astype(np.float32)
        return self._linear(f"{p}.attn_output", out)

    def _rotate(self, x: Array, swa: bool) -> Array:
        """Rotate pairs by position: neighbours in llama, halves elsewhere."""
        c, width = self.config, x.shape[-1]
        angles = np.arange(len(x))[:, None] * self._frequencies(width, swa)[None, :]
        magnitude = 1.0
        if c.scaling == "yarn" and not swa:
            magnitude = 0.1 * np.log(c.factor) + 1.0
        cos, sin = (magnitude * f(angles)[:, None, :] for f in (np.cos, np.sin))
        out = np.empty(x.shape, np.float64)
        neighbours = c.arch == "llama"
        first = np.s_[..., 0::2] if neighbours else np.s_[..., : width // 2]
        second = np.s_[..., 1::2] if neighbours else np.s_[..., width // 2 :]
        out[first] = x[first] * cos - x[second] * sin
        out[second] = x[first] * sin + x[second] * cos
        return out.astype(np.float32)

    def _frequencies(self, width: int, swa: bool) -> npt.NDArray[np.float64]:
        """Radians per position of each pair, with the header's scaling."""
        c = self.config
        base = c.base_swa if swa else c.base
        plain = base ** (-np.arange(0, width, 2) / width)
        if "rope_freqs.weight" in self.weights:
            plain = plain / self.weights["rope_freqs.weight"]
        if swa or c.scaling == "none":
            return plain
        if c.scaling == "linear":
            return plain / c.factor

        # YaRN: pairs that turn more than 32 times over the original context keep their
        # frequency, those that turn less than once are interpolated, a ramp between.
        def pair(turns: float) -> float:
            return width * np.log(c.n_ctx_orig / (turns * 2 * np.pi)) / (2 * np.log(base))

        low, high = max(0, np.floor(pair(32.0))), min(width - 1, np.ceil(pair(1.0)))
        ramp = np.clip((np.arange(width // 2) - low) / max(0.001, high - low), 0, 1)
        return plain * (1 - ramp) + plain / c.factor * ramp

    def _linear(self, name: str, x: Array) -> Array:
        bias = self.weights.get(f"{name}.bias", np.float32(0))
        return x @ self.weights[f"{name}.weight"].T + bias

    def _norm(self, name: str, x: Array) -> Array:
        power = np.mean(x.astype(np.float64) ** 2, axis=-1, keepdims=True)
        scaled = x / np.sqrt(power + self.config.eps)
        return (scaled * self.weights[f"{name}.weight"]).astype(np.float32)


def _config(reader: GGUFReader) -> Config:
    def get(key: str, default: Any) -> Any:
        field = reader.get_field(key)
        return default if field is None else field.contents()

    arch = get("general.architecture", "")
    n_head = get(f"{arch}.attention.head_count", 0)
    n_ctx = get(f"{arch}.context_length", 0)
    return Config(
        arch=arch,
        n_layer=get(f"{arch}.block_count", 0),
        n_embd=get(f"{arch}.embedding_length", 0),
        n_head=n_head,
        n_head_kv=get(f"{arch}.attention.head_count_kv", n_head),
        eps=get(f"{arch}.attention.layer_norm_rms_epsilon", 0.0),
        base=get(f"{arch}.rope.freq_base", 10000.0),
        base_swa=get(f"{arch}.rope.freq_base_swa", 10000.0),
        window=get(f"{arch}.attention.sliding_window", 0),
        scaling=get(f"{arch}.rope.scaling.type", "none"),
        factor=get(f"{arch}.rope.scaling.factor", 1.0),
        n_ctx_orig=get(f"{arch}.rope.scaling.original_context_length", n_ctx),
        n_expert_used=get(f"{arch}.expert_used_count", 0),
    )


def _silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def _gelu(x: Array) -> Array:
    """The tanh approximation, which Gemma was trained with."""
    inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    return (0.5 * x * (1 + np.tanh(inner))).astype(np.float32)
