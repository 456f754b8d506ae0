"""Put together what the engine thread runs, for what the model and the settings ask for."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from edgeroute.device_loss import devices_at_risk
from edgeroute.energy_book import open_book
from edgeroute.lever_guard import why_no_drafts
from edgeroute.row_bits import beside_prompts
from edgeroute.run_ahead import open_run_ahead
from edgeroute.runtime import machine
from edgeroute.runtime.threads import ThreadPolicy
from edgeroute.scheduler import Scheduler

if TYPE_CHECKING:
    from edgeroute.loaded import LoadedModel


def make_scheduler(
    loaded: "LoadedModel", meter: machine.LoadMeter, wake: Callable[[], None]
) -> Scheduler:
    """Return a Scheduler over a loaded model.

    Args:
        loaded: the model, whose `params` are the settings.
        meter: how busy the machine is; its first reading covers the time of loading.
        wake: called from other threads when something that was waited for has arrived.
    """
    params = loaded.params
    n_max = params.threads or loaded.levers.most_threads or machine.usable_cores()
    fixed = params.threads is not None
    policy = ThreadPolicy(n_max, meter, time.monotonic, fixed=fixed)
    scheduler = Scheduler(
        loaded.forward, loaded.ledger, policy, n_ctx=params.n_ctx,
        n_ubatch=params.n_ubatch, max_batch=params.max_batch or loaded.max_batch,
        rows=beside_prompts(loaded), is_eog=loaded.tokenizer.is_eog, experts=loaded.experts,
        adapters=loaded.adapters, layers=loaded.layers,
    )  # fmt: skip
    scheduler.devices = devices_at_risk(loaded)
    scheduler.compute_ledger = loaded.compute_ledger
    scheduler.energy = open_book(loaded, params.energy)
    if why_no_drafts(loaded, params.speculate) is None:
        # Models that do not draft should not wait for its import.
        from edgeroute.speculation import Speculation

        scheduler.speculation = Speculation(loaded, params, scheduler.is_eog)
    scheduler.run_ahead = open_run_ahead(loaded)
    if params.steps_on:
        # One model alone should not wait for what two need.
        from edgeroute.step_choice import open_routing

        scheduler.steps = open_routing(scheduler, loaded, params, wake)
    if loaded.depth is not None:
        from edgeroute.depth import Depth
        from edgeroute.depth_guard import DepthGuard

        scheduler.depth = loaded.depth
        if isinstance(loaded.depth, Depth):
            scheduler.depth_guard = DepthGuard(
                loaded.depth, loaded.forward, scheduler.prefix, params.n_ubatch
            )
    if params.sessions is not None:
        from edgeroute.sessions import open_sessions

        scheduler.sessions = open_sessions(loaded, params, scheduler.prefix, wake)
    return scheduler
