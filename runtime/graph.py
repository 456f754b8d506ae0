"""Graphs: built once per shape of batch, kept, fed through input tensors, run many times.

A Builder offers ggml's operations to the architectures in models/. A Graph is what comes out.
"""

import copy
from collections.abc import Sequence

from edgeroute.runtime.batch_shape import BatchShape, Segment, Span, group_segments
from edgeroute.runtime.built_graph import Graph, Pass
from edgeroute.runtime.cell_views import CellViews
from edgeroute.runtime.depth import ExpertRule
from edgeroute.runtime.ggml import api
from edgeroute.runtime.ggml.api import Tensor, ggml
from edgeroute.runtime.graph_inputs import Inputs, MaskSlot
from edgeroute.runtime.joints import Joint
from edgeroute.runtime.kv_cache import KvCache
from edgeroute.runtime.lora import LoraShape, LoraSlots
from edgeroute.runtime.lora_graph import LoraInputs, LoraUse
from edgeroute.runtime.tensor import (
    F16,
    F32,
    F32_BYTES,
    I32,
    I64,
    Descriptors,
    shape,
    strides,
)
from edgeroute.runtime.token_choice import BY_ATTENTION, TokenRule
from edgeroute.runtime.weights import Weights


class Builder:
    """Builds one graph: ggml's operations, the batch's inputs, and attention over the pool.

    Shapes in comments are ggml's, fastest dimension first.
    """

    def __init__(
        self, span: Span, batch: BatchShape, weights: Weights, kv: KvCache, n_nodes: int
    ) -> None:
        self.g = ggml()
        self.span = span
        self.batch = batch
        self.kv = kv
        self.weights = weights
        self.standins: Weights | None = None
        self.n_tokens = batch.n_tokens
        self.inputs = Inputs()
        self.kv_row: int | None = None
        """Where keys of this pass over a layer are, if not at the layer's own number."""
        self.expert_rule: ExpertRule = "all"
        self.expert_value = 0.0
        """Which of the chosen experts compute in this pass over a layer: see Step."""
        self.token_rule: TokenRule = BY_ATTENTION
        """Which tokens of a prompt a step computes that keeps a part of them."""
        self._tokens: Tensor | None = None
        self._passes: list[Pass] = []
        self._lora: LoraUse | None = None
        self._groups = group_segments(batch.segments)
        self._cell_views: list[tuple[Tensor, int]] = []
        self._descriptors = Descriptors(n_nodes, n_nodes)
        self.ctx = self._descriptors.ctx
        self.graph = self.g.ggml_new_graph_custom(self.ctx, n_nodes, False)

    def adapt(self, slots: LoraSlots) -> None:
        """Let linear layers add what the batch's adapters in `slots` ask for."""
        if self.batch.lora is not None:
            self._lora = LoraUse(slots)

    # several passes in one graph

    def following(self) -> "Builder":
        """Begin the next pass of the same graph, over the strongest token of each logits column.

        It has inputs of its own. The batch is of one token a sequence, all with logits.
        """
        tokens = self.g.ggml_argmax(self.ctx, self._passes[-1].logits)
        self.g.ggml_set_output(tokens)
        self._passes[-1].tokens = tokens
        other = copy.copy(self)
        other.inputs, other._tokens = Inputs(), tokens
        return other

    def end_pass(self, logits: Tensor) -> None:
        """Let one of several passes end in logits, which stay until the graph is run again."""
        self.g.ggml_set_output(logits)
        self.g.ggml_build_forward_expand(self.graph, logits)
        self._passes.append(Pass(self.inputs, logits))

    # inputs, made on first use

    def tokens(self) -> Tensor:
        """Token ids, I32 [n_tokens]."""
        if self._tokens is not None:
            return self._tokens
        if self.inputs.tokens is None:
            self.inputs.tokens = self._input(I32, "tokens", self.n_tokens)
        return self.inputs.tokens

    def pos(self) -> Tensor:
        """Positions, I32 [n_tokens]."""
        if self.inputs.pos is None:
            self.inputs.pos = self._input(I32, "pos", self.n_tokens)
        return self.inputs.pos

    def select_outputs(self, x: Tensor) -> Tensor:
        """Keep the columns whose logits are wanted: F32 [n_embd, n_out]."""
        if self.batch.n_out == shape(x)[1]:
            return x
        return self.g.ggml_get_rows(self.ctx, x, self.out_ids())

    def out_ids(self) -> Tensor:
        """Numbers of the tokens whose logits are wanted, I32 [n_out]."""
        if self.inputs.out_ids is None:
            self.inputs.out_ids = self._input(I32, "out_ids", self.batch.n_out)
        return self.inputs.out_ids

    def more(self, name: str, kind: int, *ne: int) -> Tensor:
        """Make an input of the caller's own, to be found in `Inputs.more`."""
        tensor = self.inputs.more[name] = self._input(kind, name, *ne)
        return tensor

    def _input(self, kind: int, name: str, *ne: int) -> Tensor:
        tensor = self.g.ggml_new_tensor_4d(self.ctx, kind, *(*ne, 1, 1, 1)[:4])
        self.g.ggml_set_name(tensor, name.encode())
        self.g.ggml_set_input(tensor)
        return tensor

    # operations

    def weight(self, name: str) -> Tensor:
        """Return a weight that must be there."""
        return self.weights[name]

    def linear(self, name: str, x: Tensor) -> Tensor:
        """Multiply with weight `name` and add its bias where the file has one."""
        y = self.g.ggml_mul_mat(self.ctx, self.weights[f"{name}.weight"], x)
        return self._finished(name, x, y)

    def linears(self, names: Sequence[str], x: Tensor) -> list[Tensor]:
        """Multiply with several weights of one input, as one product where they lie together.

        Returns:
            F32 [n_out, n] for each name; columns may be further apart than they are long.
        """
        found: dict[str, Tensor] = {}
        for joint in self.weights.joints([f"{name}.weight" for name in names]):
            whole = self.g.ggml_mul_mat(self.ctx, joint.tensor, x)
            stems = [name.removesuffix(".weight") for name in joint.names]
            if len(stems) == 1:
                found[stems[0]] = self._finished(stems[0], x, whole)
                continue
            bias = joint.bias if self._lora is None or self.batch.lora is None else None
            if bias is not None:
                whole = self.add(whole, bias)
            for stem, part in zip(stems, self._parts(self.weights, joint, whole), strict=True):
                found[stem] = self._finished(stem, x, part) if bias is None else part
        return [found[name] for name in names]

    def products(self, weights: Weights, names: Sequence[str], x: Tensor) -> list[Tensor]:
        """Multiply as `linears` does with matrices of another store: no biases, no adapters."""
        found: dict[str, Tensor] = {}
        for joint in weights.joints(names):
            whole = self.g.ggml_mul_mat(self.ctx, joint.tensor, x)
            found |= zip(joint.names, self._parts(weights, joint, whole), strict=True)
        return [found[name] for name in names]

    def _parts(self, weights: Weights, joint: Joint, whole: Tensor) -> list[Tensor]:
        """View each matrix's rows of a joined product."""
        if len(joint.names) == 1:
            return [whole]
        n, row, at = shape(whole)[1], strides(whole)[1], 0
        parts: list[Tensor] = []
        for name in joint.names:
            n_out = shape(weights[name])[1]
            parts.append(self.g.ggml_view_2d(self.ctx, whole, n_out, n, row, at))
            at += n_out * F32_BYTES
        return parts

    def _finished(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """Add to a product what adapters and the file's bias add."""
        lora, asked = self._lora, self.batch.lora
        place = None if lora is None else lora.slots.place(name)
        if lora is not None and asked is not None and place is not None and (n := shape(x)[1]):
            y = self.add(y, lora.delta(self.ctx, place, x, self._lora_inputs(n, asked)))
        bias = self.weights.get(f"{name}.bias")
        return y if bias is None else self.g.ggml_add(self.ctx, y, bias)

    def _lora_inputs(self, n: int, lora: LoraShape) -> LoraInputs:
        """Which slots compute `n` columns: all tokens, or those that get logits."""
        everything = n == self.n_tokens
        end = "" if everything else "_out"
        runs = tuple(segment.n_tokens for segment in self.batch.segments)
        return LoraInputs(
            self._once(f"lora_ids{end}", I32, lora.n_used, n),
            self._once(f"lora_factors{end}", F32, 1, lora.n_used, n) if lora.weighted else None,
            self._once("lora_rows", I32, lora.n_used * len(runs)),
            runs if everything else lora.outs or (n,),
        )

    def _once(self, name: str, kind: int, *ne: int) -> Tensor:
        found = self.inputs.more.get(name)
        return self.more(name, kind, *ne) if found is None else found

    def linear_id(self, name: str, x: Tensor, ids: Tensor, slots: Tensor) -> Tensor:
        """Multiply each token with the expert slices it chose, and add their biases if any.

        Args:
            name: stem of a weight [n_in, n_out, n_slot], with or without bias [n_out, n_expert].
            x: F32 [n_in, k or 1, n].
            ids: expert numbers I32 [k, n], which the bias goes by.
            slots: positions in the weight, I32 [k, n].

        Returns:
            F32 [n_out, k, n].
        """
        y = self.g.ggml_mul_mat_id(self.ctx, self.weights[f"{name}.weight"], x, slots)
        bias = self.weights.get(f"{name}.bias")
        return y if bias is None else self.g.ggml_add_id(self.ctx, y, bias, ids)

    def rms_norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        """Normalise columns to unit mean square, then scale by weight `name`."""
        y = self.g.ggml_rms_norm(self.ctx, x, eps)
        return self.g.ggml_mul(self.ctx, y, self.weights[f"{name}.weight"])

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """Add."""
        return self.g.ggml_add(self.ctx, a, b)

    def scale(self, x: Tensor, factor: float) -> Tensor:
        """Multiply by a number."""
        return self.g.ggml_scale(self.ctx, x, factor)

    def store_kv(self, il: int, k: Tensor, v: Tensor | None) -> None:
        """Write this batch's keys and values, each F32 [n_embd_head, n_head_kv, n_tokens].

        They enter the graph here, before any attention that reads them. `v` is None where
        values are the first part of the keys (KvShape.v_in_k).
        """
        if self.inputs.rows is None:
            self.inputs.rows = self._input(I64, "kv_rows", self.n_tokens)
        row = self._kv_row(il)
        turn_k, turn_v = self.kv.rotations[row]
        pairs = [(self.kv.k[row], self._rotate(k, turn_k))]
        if v is not None:
            pairs.append((self.kv.v[row], self._rotate(v, turn_v)))
        for cache, new in pairs:
            by_head = self.g.ggml_permute(self.ctx, new, 0, 2, 1, 3)
            written = self.g.ggml_set_rows(self.ctx, cache, by_head, self.inputs.rows)
            self.g.ggml_build_forward_expand(self.graph, written)

    def attend(
        self, il: int, q: Tensor, scale: float, *, swa: bool = False, sinks: Tensor | None = None
    ) -> Tensor:
        """Attend to the stored cells of each sequence.

        Each segment sees its own cells only, and its operation takes the path that it would
        take alone: the same bits come out whichever sequences share the batch.

        Args:
            il: layer.
            q: F32 [n_embd_head_k, n_head, n_tokens].
            scale: factor on the products.
            swa: use the sliding-window masks.
            sinks: F32 [n_head], a logit per head that takes weight and adds no value.

        Returns:
            F32 [n_embd_head_v * n_head, n_tokens].
        """
        g, ctx = self.g, self.ctx
        n_embd_head, n_head, _, _ = shape(q)
        row = self._kv_row(il)
        turn_k, turn_v = self.kv.rotations[row]
        q = self._rotate(q, turn_k)  # the products with rotated keys are the same
        nb, parts, first = strides(q), list[Tensor](), 0
        for group, mask in zip(self._groups, self._masks(swa), strict=True):
            n, n_tokens = len(group), group[0].n_tokens
            mine = g.ggml_view_4d(
                ctx, q, n_embd_head, n_head, n_tokens, n, nb[1], nb[2], n_tokens * nb[2],
                first * nb[2],
            )  # fmt: skip
            mine = g.ggml_permute(ctx, mine, 0, 2, 1, 3)
            k = self._cells(self.kv.k[row], group)
            v = self._value_cells(row, group)
            out = g.ggml_flash_attn_ext(ctx, mine, k, v, mask, scale, 0.0, 0.0)
            if sinks is not None:
                g.ggml_flash_attn_ext_add_sinks(out, sinks)
            g.ggml_prec_set_acc(out, api.PREC_F32)
            parts.append(g.ggml_reshape_2d(ctx, out, shape(out)[0] * n_head, n_tokens * n))
            first += n_tokens * n
        return self._rotate(self._joined(parts), turn_v)  # a Hadamard matrix is its own inverse

    def _joined(self, parts: list[Tensor]) -> Tensor:
        """Put the columns of all parts side by side: pairs first, so that few are copied often."""
        while len(parts) > 1:
            left, right = parts[::2], parts[1::2]
            pairs = zip(left, right, strict=False)
            alone = left[len(right) :]
            parts = [self.g.ggml_concat(self.ctx, a, b, 1) for a, b in pairs] + alone
        return parts[0]

    def _rotate(self, x: Tensor, rotation: Tensor | None) -> Tensor:
        """Multiply each `n` consecutive values of every column by the rotation [n, n]."""
        if rotation is None:
            return x
        g, ctx = self.g, self.ctx
        ne, nb, n = shape(x), strides(x), shape(rotation)[0]
        if nb[2] != ne[1] * nb[1]:  # a part of a joined product
            x = g.ggml_cont(ctx, x)
        flat = g.ggml_reshape_2d(ctx, x, n, ne[0] * ne[1] * ne[2] // n)
        turned = g.ggml_mul_mat(ctx, rotation, flat)
        g.ggml_mul_mat_set_hint(turned, api.HINT_HADAMARD)  # a fast transform, not a product
        return g.ggml_reshape_3d(ctx, turned, ne[0], ne[1], ne[2])

    def _masks(self, swa: bool) -> list[Tensor]:
        """Return one mask per group, F16 [n_kv, n_tokens, 1, n_segments]."""
        slots = self.inputs.masks_swa if swa else self.inputs.masks
        if not slots:
            for group in self._groups:
                n_kv, n_tokens = group[0].n_kv, group[0].n_tokens
                mask = self._input(F16, "mask", n_kv, n_tokens, 1, len(group))
                slots.extend(MaskSlot(mask, i * n_kv * n_tokens) for i in range(len(group)))
        return list(dict.fromkeys(slot.tensor for slot in slots))

    def keys(self, il: int) -> Tensor:
        """View the keys of a batch of one segment: [n_embd_head, n_kv, n_head_kv]."""
        (group,) = self._groups
        return self._cells(self.kv.k[self._kv_row(il)], group)

    def _kv_row(self, il: int) -> int:
        return il if self.kv_row is None else self.kv_row

    def _value_cells(self, row: int, group: tuple[Segment, ...]) -> Tensor:
        """View a group's values as [n_embd_head_v, n_kv, n_head_kv, n_segments]."""
        kv = self.kv.shape
        if not kv.v_in_k:
            return self._cells(self.kv.v[row], group)
        keys = self._cells(self.kv.k[row], group)
        ne, nb = shape(keys), strides(keys)
        view = self.g.ggml_view_4d(
            self.ctx, keys, kv.value_head, ne[1], ne[2], ne[3], nb[1], nb[2], nb[3], 0
        )
        self._cell_views.append((view, nb[1]))
        return view

    def _cells(self, cache: Tensor, group: tuple[Segment, ...]) -> Tensor:
        """View a group's cells as [n_embd_head, n_kv, n_head_kv, n_segments]."""
        n_embd_head, _, n_heads, _ = shape(cache)
        _, cell, head, _ = strides(cache)
        start = group[0].start
        step = group[1].start - start if len(group) > 1 else group[0].n_kv
        view = self.g.ggml_view_4d(
            self.ctx, cache, n_embd_head, group[0].n_kv, n_heads, len(group),
            cell, head, step * cell, start * cell,
        )  # fmt: skip
        self._cell_views.append((view, cell))
        return view

    def keep(self, value: Tensor, place: Tensor) -> None:
        """Copy a value to memory outside the graph, of equal shape, once it is computed."""
        copied = self.g.ggml_cpy(self.ctx, value, place)
        self.g.ggml_build_forward_expand(self.graph, copied)

    def finish(self, output: Tensor) -> Graph:
        """Close the graph over `output`."""
        self.g.ggml_set_output(output)
        self.g.ggml_build_forward_expand(self.graph, output)
        cells = CellViews(self._cell_views, self.batch.segments[0].start)
        return Graph(self.graph, self.inputs, output, self._descriptors, cells, passes=self._passes)
