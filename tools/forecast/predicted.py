"""The decode speed to expect when a model is loaded: by what is remembered, nothing measured."""

import contextlib
from pathlib import Path

from edgeroute.config import RunParams
from edgeroute.runtime.errors import EdgerouteError
from edgeroute.runtime.gguf import GGUFFile
from edgeroute.tools.forecast.calibrate import kept
from edgeroute.tools.forecast.forecast import Ask, forecast
from edgeroute.tools.forecast.hits import hit_model
from edgeroute.tools.forecast.model_cost import model_cost
from edgeroute.tools.forecast.placement import place
from edgeroute.tools.forecast.records import Range


def predicted_tok_s(
    model: Path | GGUFFile, params: RunParams, ask: Ask | None = None
) -> Range | None:
    """Forecast tokens per second of decoding by a kept calibration, in some 20 ms.

    An open file saves the reading of its header, which takes longer than all the rest.

    None without a calibration for so many threads and the file's disk, for another device than
    the processor, and for a file that cannot be run or does not fit.
    """
    if params.device != "cpu":
        return None
    path = model.path if isinstance(model, GGUFFile) else model
    speeds = kept(params.threads, path)
    if speeds is None:
        return None
    try:
        with contextlib.ExitStack() as own:
            file = model if isinstance(model, GGUFFile) else own.enter_context(GGUFFile.open(path))
            cost, placed = model_cost(file, params), place(file, params, smallest=False)
    except (EdgerouteError, OSError):
        return None  # whoever loads it is told why
    hits = None if cost.pages is None else hit_model(None, cost.pages, cost.arch)
    return forecast(placed, cost, speeds, hits, ask).decode_tok_s
