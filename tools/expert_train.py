"""Trains a small mixture of experts from nothing, to judge rules for experts by.

A real router learns what its weights mean together with its experts; a converted dense model's
does not. This one is tiny (six layers, 16 experts of which four run, letters for tokens) and
knows this Python's documentation and code a little, after half an hour on one core. The
`train` extra is needed.
"""

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Final

import click
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.tokenizer import Tokenizer
from edgeroute.tools import synth
from edgeroute.tools.convert.moe_text import code_documents, prose_documents
from edgeroute.tools.synth_tensors import tensors

SPEC: Final = replace(
    synth.ARCHITECTURES["qwen3moe"], n_layer=6, n_vocab=384, n_embd=128, n_ff=192, n_ff_exp=48,
    n_head=4, n_head_kv=2, n_embd_head=32, n_expert=16, n_expert_used=4, rope_base=1e6,
    rms_eps=1e-6, tied=False,
)  # fmt: skip
N_WINDOW, N_BATCH, MAX_CHARS = 256, 8, 40_000
LEARNING_RATE, MIN_RATE_RATIO, N_WARM, BALANCE = 4e-3, 0.05, 50, 0.01
BETAS, WEIGHT_DECAY, MAX_NORM = (0.9, 0.97), 0.05, 1.0
N_PROSE, N_CODE = 2_000_000, 3_000_000
"""Most tokens of each."""


class SmallMoe:
    """qwen3moe as in models/qwen3moe.py: all experts computed, those not chosen weigh nothing."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        deep = math.sqrt(2 * SPEC.n_layer)
        self.made: dict[str, Tensor] = {}
        for name, data, _ in tensors(SPEC):
            std = data.shape[-1] ** -0.5
            if "attn_output" in name or "ffn_down" in name:
                std /= deep
            elif name.startswith(("token_embd", "output.")):
                std = 0.03
            start = torch.ones(data.shape) if data.ndim == 1 else torch.randn(data.shape) * std
            self.made[name] = start.requires_grad_()
        angle = torch.outer(torch.arange(N_WINDOW).float(), self._frequencies())
        self.cos, self.sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (n_batch, n, n_vocab), and how unevenly experts are used, 1 at best."""
        x, uneven = self._weight("token_embd")[ids], torch.zeros(())
        for il in range(SPEC.n_layer):
            x = x + self._attention(il, self._norm(f"blk.{il}.attn_norm", x))
            y, mine = self._experts(il, self._norm(f"blk.{il}.ffn_norm", x))
            x, uneven = x + y, uneven + mine / SPEC.n_layer
        return self._norm("output_norm", x) @ self._weight("output").T, uneven

    def write(self, path: Path) -> None:
        """Put the weights into a file of SPEC's shape, in the place of its own."""
        with GGUFFile.open(path) as file:
            places = {name: info.offset for name, info in file.tensors.items()}
        with path.open("r+b") as out:
            for name, offset in places.items():
                out.seek(offset)
                out.write(self.made[name].detach().numpy().tobytes())

    def _weight(self, name: str) -> Tensor:
        return self.made[f"{name}.weight"]

    @staticmethod
    def _frequencies() -> Tensor:
        n = SPEC.n_embd_head
        exponents = -torch.arange(0, n, 2).float() / n
        found: Tensor = SPEC.rope_base**exponents
        return found

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self._weight(name), SPEC.rms_eps)

    def _heads(self, name: str, x: Tensor, n_head: int) -> Tensor:
        """Project to heads, (n_batch, n_head, n, n_embd_head), each as often as queries need it."""
        heads = (x @ self._weight(name).T).unflatten(-1, (n_head, -1)).transpose(1, 2)
        if name.endswith("_v"):
            return heads.repeat_interleave(SPEC.n_head // n_head, 1)
        heads = self._norm(f"{name}_norm", heads)
        half, n = SPEC.n_embd_head // 2, heads.shape[2]
        turned = torch.cat([-heads[..., half:], heads[..., :half]], -1)
        heads = heads * self.cos[:n] + turned * self.sin[:n]
        return heads.repeat_interleave(SPEC.n_head // n_head, 1)

    def _attention(self, il: int, x: Tensor) -> Tensor:
        p = f"blk.{il}.attn"
        q = self._heads(f"{p}_q", x, SPEC.n_head)
        k, v = (self._heads(f"{p}_{part}", x, SPEC.n_head_kv) for part in "kv")
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).flatten(2) @ self._weight(f"{p}_output").T

    def _experts(self, il: int, x: Tensor) -> tuple[Tensor, Tensor]:
        p = f"blk.{il}.ffn"
        probs = (x @ self._weight(f"{p}_gate_inp").T).softmax(-1)
        best, ids = probs.topk(SPEC.n_expert_used, -1)
        weights = torch.zeros_like(probs).scatter(-1, ids, best / best.sum(-1, keepdim=True))
        gate, up = (x @ self._weight(f"{p}_{part}_exps").flatten(0, 1).T for part in ("gate", "up"))
        act = (F.silu(gate) * up).unflatten(-1, (SPEC.n_expert, -1)) * weights[..., None]
        down = self._weight(f"{p}_down_exps").transpose(1, 2).flatten(0, 1)
        load = (weights > 0).float().mean((0, 1)) / SPEC.n_expert_used
        return act.flatten(2) @ down, SPEC.n_expert * (load.detach() * probs.mean((0, 1))).sum()


def read_text(path: Path) -> npt.NDArray[np.int64]:
    """Encode text that is not held out with a file's tokenizer, documents in a mixed order."""
    found: list[npt.NDArray[np.int64]] = []
    with GGUFFile.open(path) as file, Tokenizer.open(file) as tokenizer:
        for documents, most in ((prose_documents(1, False), N_PROSE),
                                (code_documents(1, False), N_CODE)):  # fmt: skip
            n_tokens = 0
            for text in documents:
                ids = tokenizer.encode(text[:MAX_CHARS], add_special=False, parse_special=False)
                found.append(np.array(ids, np.int64))
                n_tokens += len(ids)
                if n_tokens > most:
                    break
    np.random.default_rng(1).shuffle(found)
    return np.concatenate(found)


def train(model: SmallMoe, ids: npt.NDArray[np.int64], seconds: float) -> int:
    """Train for so long; returns the steps taken."""
    parameters = list(model.made.values())
    optimiser = torch.optim.AdamW([
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ], betas=BETAS)  # fmt: skip
    rng, began, step = np.random.default_rng(1), time.monotonic(), 0
    while (done := (time.monotonic() - began) / seconds) < 1:
        cosine = 0.5 * (1 + math.cos(math.pi * done))
        rate = LEARNING_RATE * (MIN_RATE_RATIO + (1 - MIN_RATE_RATIO) * cosine)
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / N_WARM)
        starts = rng.integers(0, len(ids) - N_WINDOW, N_BATCH)
        batch = torch.from_numpy(np.stack([ids[at : at + N_WINDOW + 1] for at in starts]))
        logits, uneven = model.forward(batch[:, :-1])
        nats = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimiser.zero_grad()
        (nats + BALANCE * uneven).backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimiser.step()
        if step % 50 == 0:
            click.echo(f"step {step}: {nats.item():.3f} nats", err=True)
        step += 1
    return step


@click.command()
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--minutes", default=35.0, show_default=True, type=click.FloatRange(0.01))
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1, 512))
def main(out: Path, minutes: float, threads: int) -> None:
    """Train a small mixture of experts and write it to the file OUT."""
    torch.set_num_threads(threads)
    synth.write(SPEC, out)
    model = SmallMoe(seed=1)
    n_steps = train(model, read_text(out), 60 * minutes)
    model.write(out)
    click.echo(f"{out}: {n_steps} steps of {N_BATCH * N_WINDOW} tokens")


if __name__ == "__main__":
    main()
