"""Build any pass over a layer from its two sub-blocks: run, skipped, or a stand-in's.

A step that runs both is the layer as it always was: the same operations in the same order.
"""

from edgeroute.models import pruning
from edgeroute.models.base import Model
from edgeroute.models.standins import StandIn
from edgeroute.runtime.depth import Step
from edgeroute.runtime.errors import ComputeError
from edgeroute.runtime.ggml.api import Tensor
from edgeroute.runtime.graph import Builder


def build_step(b: Builder, model: Model, step: Step, x: Tensor, *, last: bool) -> Tensor:
    """Build one pass over a layer on the residual stream `x`, F32 [n_embd, n_tokens].

    Args:
        b: the graph.
        model: gives the sub-blocks.
        step: what becomes of them.
        x: the residual stream.
        last: drop the tokens whose logits are not wanted as soon as keys are written.

    Returns:
        F32 [n_embd, n_tokens or n_out].

    Raises:
        ComputeError: a stand-in is missing.
    """
    _enter(b, model, step)
    if pruning.n_kept(b, step) is not None:
        return pruning.build_pruned(b, model, step, x, last=last)
    joint = None
    if step.attn == step.ffn == "approximate":
        joint = StandIn.find(b, step.il, "layer")
    x = build_attn(b, model, step, x, last=last, joint=joint)
    if step.ffn == "run":
        return b.add(model.ffn_branch(b, step.il, x), x)
    if step.ffn == "approximate" and joint is None:
        return b.add(stand_in(b, model, step.il, "ffn", x), x)
    return x


def build_attn(
    b: Builder, model: Model, step: Step, x: Tensor, *, last: bool, joint: StandIn | None = None
) -> Tensor:
    """Build the first half of a pass: see build_step. `joint` stands for both halves."""
    _enter(b, model, step)
    branch: Tensor | None = None
    if step.attn == "run":
        branch = model.attn_branch(b, step.il, x)
    elif step.store:
        model.attn_branch(b, step.il, x)  # what nobody uses is not computed, but for the keys
    if joint is not None:
        branch = joint.build(b, x, model.hparams.norm_rms_eps)
    elif step.attn == "approximate":
        branch = stand_in(b, model, step.il, "attn", x)
    if last:
        x = b.select_outputs(x)
        branch = branch and b.select_outputs(branch)
    return x if branch is None else b.add(branch, x)


def _enter(b: Builder, model: Model, step: Step) -> None:
    """Tell the graph which pass over a layer follows."""
    b.kv_row = model.hparams.n_layer + step.repeat - 1 if step.repeat else None
    b.expert_rule, b.expert_value = step.expert_rule, step.expert_value


def stand_in(b: Builder, model: Model, il: int, part: str, x: Tensor) -> Tensor:
    """Build what a stand-in puts in the place of a sub-block: F32 [n_embd, n].

    Raises:
        ComputeError: there is none of that name.
    """
    found = StandIn.find(b, il, part)
    if found is None:
        raise ComputeError(
            f"plan {b.span.plan!r} approximates {part} of layer {il}, but has no stand-in for it"
        )
    return found.build(b, x, model.hparams.norm_rms_eps)
