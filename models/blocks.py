"""Building blocks that the architecture families share."""

from edgeroute.models.base import Hparams, Rope
from edgeroute.runtime.ggml import api
from edgeroute.runtime.ggml.api import Tensor
from edgeroute.runtime.ggml.structs import TensorStruct
from edgeroute.runtime.graph import Builder
from edgeroute.runtime.tensor import F32_BYTES, strides
from edgeroute.runtime.weights import TensorSpec, Use

ROPE_NORMAL, ROPE_NEOX = api.ROPE_NORMAL, api.ROPE_NEOX


def embed_tokens(b: Builder) -> Tensor:
    """Look token embeddings up: F32 [n_embd, n_tokens]."""
    return b.g.ggml_get_rows(b.ctx, b.weight("token_embd.weight"), b.tokens())


def split_heads(b: Builder, x: Tensor, n_embd_head: int, n_head: int) -> Tensor:
    """View [n_embd_head * n_head, n_tokens] as [n_embd_head, n_head, n_tokens]."""
    one, column = n_embd_head * F32_BYTES, strides(x)[1]
    return b.g.ggml_view_3d(b.ctx, x, n_embd_head, n_head, b.n_tokens, one, column, 0)


def queries_keys_values(b: Builder, il: int, x: Tensor) -> list[Tensor]:
    """Project normed input: F32 [n_embd_head * n_head, n_tokens] of q, k and v."""
    return b.linears([f"blk.{il}.attn_{part}" for part in "qkv"], x)


def rotate(b: Builder, x: Tensor, rope: Rope, mode: int, factors: str | None = None) -> Tensor:
    """Apply rotary positions to F32 [n_embd_head, n_head, n_tokens]."""
    weight = b.weights.get(factors) if factors else None
    return b.g.ggml_rope_ext(
        b.ctx, x, b.pos(), weight, rope.n_rot, mode, rope.n_ctx_orig, rope.freq_base,
        rope.freq_scale, rope.ext_factor, rope.attn_factor, rope.beta_fast, rope.beta_slow,
    )  # fmt: skip


def rotate_both(
    b: Builder, q: Tensor, k: Tensor, rope: Rope, mode: int, factors: str | None = None
) -> tuple[Tensor, Tensor]:
    """Apply rotary positions to queries and keys, by one operation where they lie side by side.

    The sines of a position are computed once then, and each head keeps its bits.
    """
    one, two = TensorStruct.from_address(q), TensorStruct.from_address(k)
    width, n_q, n, _ = one.ne
    n_k = two.ne[1]
    alike = one.view_src == two.view_src and list(one.nb) == list(two.nb) and width == two.ne[0]
    if one.view_src is None or not alike or two.view_offs != one.view_offs + n_q * one.nb[1]:
        return rotate(b, q, rope, mode, factors), rotate(b, k, rope, mode, factors)
    head, column = one.nb[1], one.nb[2]
    both = b.g.ggml_view_3d(
        b.ctx, one.view_src, width, n_q + n_k, n, head, column, one.view_offs
    )  # fmt: skip
    turned = rotate(b, both, rope, mode, factors)
    _, head, column, _ = strides(turned)
    return (
        b.g.ggml_view_3d(b.ctx, turned, width, n_q, n, head, column, 0),
        b.g.ggml_view_3d(b.ctx, turned, width, n_k, n, head, column, n_q * head),
    )


def swiglu(b: Builder, prefix: str, x: Tensor, suffix: str = "") -> Tensor:
    """Gated feed-forward with SiLU: down(silu(gate(x)) * up(x)); `suffix` ends the names."""
    gate, up = b.linears([f"{prefix}.ffn_gate{suffix}", f"{prefix}.ffn_up{suffix}"], x)
    return b.linear(f"{prefix}.ffn_down{suffix}", b.g.ggml_swiglu_split(b.ctx, gate, up))


def geglu(b: Builder, prefix: str, x: Tensor) -> Tensor:
    """Gated feed-forward with GELU: down(gelu(gate(x)) * up(x))."""
    gate, up = b.linears([f"{prefix}.ffn_gate", f"{prefix}.ffn_up"], x)
    return b.linear(f"{prefix}.ffn_down", b.g.ggml_geglu_split(b.ctx, gate, up))


def output_norm(b: Builder, x: Tensor, eps: float) -> Tensor:
    """Normalise what the last layer left: F32 [n_embd, n]."""
    return b.rms_norm("output_norm", x, eps)


def logits(b: Builder, x: Tensor, eps: float) -> Tensor:
    """Normalise and project to the vocabulary: F32 [n_vocab, n_out]."""
    return b.linear("output", output_norm(b, x, eps))


def spec(
    name: str, *ne: int, use: Use = "mul_mat", required: bool = True, beside: str | None = None
) -> TensorSpec:
    """Describe a tensor whose name in the file is `name`."""
    return TensorSpec(name=name, ne=ne, use=use, required=required, beside=beside)


def norm(name: str, width: int) -> TensorSpec:
    """Describe the weight of a norm."""
    return spec(f"{name}.weight", width, use="elementwise")


def bias(name: str, width: int, *, required: bool = False) -> TensorSpec:
    """Describe a bias."""
    part = name.rpartition("attn_")
    beside = f"{part[0]}attn_in" if part[2] in ("q", "k", "v") else None
    return spec(f"{name}.bias", width, use="elementwise", required=required, beside=beside)


def common_specs(hp: Hparams) -> list[TensorSpec]:
    """List embedding and head; a tied head is a second use of the embedding's bytes."""
    head = TensorSpec(
        name="output.weight", ne=(hp.n_embd, hp.n_vocab), use="mul_mat",
        source="token_embd.weight" if hp.tied else None,
    )  # fmt: skip
    embedding = spec("token_embd.weight", hp.n_embd, hp.n_vocab, use="get_rows")
    return [embedding, norm("output_norm", hp.n_embd), head]


def attention_specs(hp: Hparams, il: int) -> list[TensorSpec]:
    """List the four projections and the norm of one attention block."""
    p = f"blk.{il}"
    n_q = hp.n_embd_head_k * hp.n_head
    return [
        norm(f"{p}.attn_norm", hp.n_embd),
        spec(f"{p}.attn_q.weight", hp.n_embd, n_q, beside=f"{p}.attn_in"),
        spec(f"{p}.attn_k.weight", hp.n_embd, hp.n_embd_k_gqa, beside=f"{p}.attn_in"),
        spec(f"{p}.attn_v.weight", hp.n_embd, hp.n_embd_v_gqa, beside=f"{p}.attn_in"),
        spec(f"{p}.attn_output.weight", hp.n_embd_head_v * hp.n_head, hp.n_embd),
    ]


def ffn_specs(hp: Hparams, il: int) -> list[TensorSpec]:
    """List a gated feed-forward block and its norm."""
    p = f"blk.{il}"
    return [
        norm(f"{p}.ffn_norm", hp.n_embd),
        spec(f"{p}.ffn_gate.weight", hp.n_embd, hp.n_ff, beside=f"{p}.ffn_in"),
        spec(f"{p}.ffn_up.weight", hp.n_embd, hp.n_ff, beside=f"{p}.ffn_in"),
        spec(f"{p}.ffn_down.weight", hp.n_ff, hp.n_embd),
    ]
