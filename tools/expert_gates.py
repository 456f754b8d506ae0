"""A converted model whose gates' weights mean something, to judge rules for experts by.

`edgeroute convert moe` makes gates that rank experts and weigh them all alike, so that the
dense model comes out where all experts run. Rules that go by weights have nothing to go by
there. Here a gate's scores are spread until the softmax over them tells experts apart, as a
trained model's does, and the down projections are refitted, in closed form, to the weighted
sum of the chosen experts. It remains a converted dense model: no gate was ever trained.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Final

import click
import numpy as np
import numpy.typing as npt

from edgeroute.runtime.errors import EdgerouteError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.runtime.tokenizer import Tokenizer
from edgeroute.tools.convert.moe import MoeParams, check_source, plan_shape
from edgeroute.tools.convert.moe_activations import Array, DenseModel
from edgeroute.tools.convert.moe_gate import SCORE_SCALE
from edgeroute.tools.convert.moe_layers import Quality, Refactoring
from edgeroute.tools.convert.moe_text import TextParams, default_windows
from edgeroute.tools.convert.moe_writer import MoeWriter

DEFAULT_SPREAD: Final = 0.7
"""Standard deviation of a token's scores: the best of 16 then weighs four times the last."""
_CHECKED_ONE_IN: Final = 8


class Weighted(Refactoring):
    """Refactors like its base, but for chosen experts that are weighted by a softmax."""

    spread: float = DEFAULT_SPREAD

    def _gate(self, u: Array, truth: Array) -> Array:
        gate: Array = super()._gate(u, truth) * np.float32(self.spread / SCORE_SCALE)
        return gate

    def _weigh(self, h: Array, scores: Array, mask: npt.NDArray[np.bool_]) -> None:
        h *= np.repeat(_factors(scores) * mask, self._shape.n_ff_exp, axis=1)


def _factors(scores: Array) -> Array:
    """Softmax over the experts, one on average: (n_tokens, n_expert).

    The writer folds the number of experts into the down projections, here it is undone.
    """
    wide = np.exp(scores - scores.max(axis=1, keepdims=True))
    factors: Array = wide * (scores.shape[1] / wide.sum(axis=1, keepdims=True))
    return factors


def make(source: Path, out: Path, params: MoeParams, spread: float) -> Quality:
    """Convert the dense file `source` into the file `out`.

    Raises:
        UsageError, UnsupportedModelError: see `convert.moe.convert`.
        OSError: the target cannot be written; nothing of it is kept.
    """
    with GGUFFile.open(source) as file:
        check_source(file)
        model = DenseModel(file)
        shape = plan_shape(model, params)
        with Tokenizer.open(file) as tokenizer:

            def encode(text: str, special: bool) -> list[int]:
                return tokenizer.encode(text, add_special=special, parse_special=False)

            fit = default_windows(encode, TextParams(n_tokens=params.n_tokens))
            n_check = params.n_tokens // _CHECKED_ONE_IN
            check = default_windows(encode, TextParams(n_tokens=n_check), held_out=True)
        work = Weighted(model, shape, fit, check, repair=True, seed=params.seed)
        work.spread = spread
        with MoeWriter(model, shape, out) as writer:
            for il in range(shape.n_layer):
                writer.put_layer(il, work.layer(il))
                click.echo(f"layer {il + 1} of {shape.n_layer}", err=True)
            quality = work.quality()
            writer.finish()
    return quality


@click.command()
@click.argument("source", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--experts", default=40, show_default=True, help="Routed experts of a layer.")
@click.option("--shared", default=256, show_default=True, help="Neurons of the shared expert.")
@click.option("--used", default=16, show_default=True, help="Experts that run for each token.")
@click.option("--tokens", default=12288, show_default=True, help="Calibration tokens.")
@click.option("--spread", default=DEFAULT_SPREAD, show_default=True,
              help="Standard deviation of a token's scores.")  # fmt: skip
def main(
    source: Path, out: Path, experts: int, shared: int, used: int, tokens: int, spread: float
) -> None:
    """Convert the dense model SOURCE, with gates that weigh, into the file OUT."""
    params = MoeParams(n_expert=experts, n_shared=shared, n_used=used, n_tokens=tokens)
    try:
        quality = make(source, out, params, spread)
    except (EdgerouteError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(json.dumps(asdict(quality)))


if __name__ == "__main__":
    main()
