"""Which levers of a Runtime are on, why, and which of them were switched off because they lost.

Every lever that can be toggled between steps has a gate that watches it: prefetch and overlap are
compared in paired windows (`offload.prefetch_gate`, `offload.overlap_gate`), drafts by what their
tokens took (`skippers.speculate`), passes of several tokens by those of one (`run_ahead`), eviction
policies by replays of the latest routes, a depth plan by its divergence from the full model
(`depth_guard`). Here their verdicts come together.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from edgeroute.lever_proofs import Proof
    from edgeroute.loaded import LoadedModel
    from edgeroute.scheduler import Scheduler

Lever = dict[str, object]
_ASKED: Final = "asked for"


def lever_stats(loaded: "LoadedModel", scheduler: "Scheduler") -> dict[str, object]:
    """Return each lever that this model has, as plain JSON types.

    `on` says whether it is in use, `why` for which reason. `switched_off` says why a lever that
    was on is not any more, and `off_at_step` since which decode step.
    """
    found = {
        "prefetch": _prefetch(loaded), "policy": _policy(loaded), "overlap": _overlap(loaded),
        "speculation": _speculation(loaded, scheduler),
        "run_ahead": _run_ahead(loaded, scheduler), "depth": _depth(loaded),
        "steps": _steps(loaded, scheduler), "misses": _misses(loaded),
        "threads": _threads(loaded, scheduler),
    }  # fmt: skip
    return {"mode": loaded.params.levers} | {
        name: lever for name, lever in found.items() if lever is not None
    }


def why_no_drafts(loaded: "LoadedModel", speculate: str) -> str | None:
    """Say why a model drafts no tokens where RunParams.speculate is this; None if it does.

    Nothing is drafted unasked where a pass over k tokens costs k passes, and nothing at all
    where an answer could have other bits than without.
    """
    if speculate == "off":
        return "it is switched off"
    if loaded.model.hparams.moe is not None:
        return "with experts, several tokens in a pass may differ in their last bits"
    if loaded.longest_draft < 1:
        return "with float weights, several tokens in a pass differ in their last bits"
    if speculate == "auto" and loaded.layers is None:
        return "all weights are in memory, where a pass over k tokens costs about k passes"
    return None


def switched_off(levers: Mapping[str, Any]) -> list[str]:
    """Say in a sentence each what was switched off, for people.

    Args:
        levers: what `lever_stats` returned.
    """
    return [
        f"{name} was switched off: {each['switched_off']}"
        for name, each in levers.items()
        if isinstance(each, Mapping) and each.get("switched_off")
    ]


def proof_text(proof: "Proof") -> str:
    """Say what a proof says, as a gain with its interval."""
    setting = ", ".join(f"{name}={value}" for name, value in proof.settings.items())
    return (f"{setting} {proof.verdict}: {proof.gain:+.1%} [{proof.low:+.1%} to "
            f"{proof.high:+.1%}] over {proof.n_pairs} pairs")  # fmt: skip


def _why(loaded: "LoadedModel", lever: str, setting: object, auto: str) -> str:
    """Tell who decided on a lever: a proof, the caller, or nobody, and then what does now."""
    params, proof = loaded.params, loaded.levers.proofs.get(lever)
    if params.levers == "off":
        return "levers are off"
    if proof is not None:
        return f"proven: {proof_text(proof)}"
    return auto if setting in ("auto", None) else _ASKED


def _prefetch(loaded: "LoadedModel") -> Lever | None:
    if loaded.experts is None:
        return None
    setting, report = loaded.params.prefetch, loaded.experts.prefetch_report()
    why = _why(loaded, "prefetch", setting, "measured while running")
    forced = setting not in ("auto", "off") and loaded.params.levers == "asked"
    found: Lever = {
        "on": forced or report.state in ("on", "trial"), "setting": setting, "why": why,
        "trials": report.n_trials, "wins": report.n_wins,
    }  # fmt: skip
    if report.stall_on_s is not None and report.stall_off_s:
        found["gain"] = round(report.stall_off_s / max(report.stall_on_s, 1e-9) - 1, 4)
    if report.off_at_step is not None and not found["on"]:
        found |= {"switched_off": report.off_because, "off_at_step": report.off_at_step}
    return found


def _policy(loaded: "LoadedModel") -> Lever | None:
    if loaded.experts is None:
        return None
    setting, now = loaded.params.policy, loaded.experts.policy
    found: Lever = {
        "on": now != "lru", "setting": setting, "policy": now,
        "why": _why(loaded, "policy", setting, "its own latest routes, replayed"),
    }  # fmt: skip
    if setting not in ("auto", now):
        found["switched_off"] = f"replayed, {now} would have hit more than {setting}"
    return found


def _overlap(loaded: "LoadedModel") -> Lever | None:
    if loaded.experts is None:
        return None
    gate, setting = loaded.experts.overlap, loaded.params.overlap
    return {
        "on": gate.state in ("on", "trial", "forced"), "setting": setting,
        "why": _why(loaded, "overlap", setting, "measured while running"),
        "gain": None if gate.gain_ratio is None else round(gate.gain_ratio, 4),
        "trials": gate.n_trials, "wins": gate.n_wins,
    }  # fmt: skip


def _speculation(loaded: "LoadedModel", scheduler: "Scheduler") -> Lever | None:
    setting, speculation = loaded.params.speculate, scheduler.speculation
    if speculation is None:
        return {"on": False, "setting": setting, "why": why_no_drafts(loaded, setting)}
    policy = speculation.policy
    found: Lever = {
        "on": policy.on, "setting": setting,
        "why": _why(loaded, "speculate", setting, "measured while running"),
    }  # fmt: skip
    if policy.left_because and not policy.on:
        found |= {"switched_off": policy.left_because, "off_at_step": policy.left_at_pass}
    return found


def _run_ahead(loaded: "LoadedModel", scheduler: "Scheduler") -> Lever | None:
    if scheduler.run_ahead is None:
        return None
    setting = loaded.params.run_ahead
    why = _why(loaded, "run_ahead", setting, "measured while running")
    return {"setting": setting, "why": why} | scheduler.run_ahead.stats()


def _depth(loaded: "LoadedModel") -> Lever | None:
    plan = loaded.depth or loaded.no_depth
    if plan is None:
        return None
    stats, setting = plan.stats(), loaded.params.depth
    found: Lever = {"on": stats["on"], "setting": setting, "plan": stats["plan"],
                    "why": stats.get("reason", _ASKED)}  # fmt: skip
    guard = stats.get("guard")
    if isinstance(guard, Mapping) and not stats["on"]:
        found["switched_off"] = (
            f"plan {stats['plan']} is {guard['kl_nats']:.3g} nats from the full model, "
            f"{guard['promise_nats']:.3g} were promised ({guard['n_samples']} tokens scored)"
        )
    return found


def _steps(loaded: "LoadedModel", scheduler: "Scheduler") -> Lever | None:
    if scheduler.steps is None:
        return None
    setting = loaded.params.steps
    return {"on": True, "setting": setting,
            "why": _why(loaded, "steps", setting, "as calibrated, while it pays")}  # fmt: skip


def _misses(loaded: "LoadedModel") -> Lever | None:
    """Say what tokens may do without; nobody but the caller decides on what changes answers."""
    if not loaded.params.lossy:
        return None
    return {"on": loaded.experts is not None, "setting": loaded.params.lossy, "why": _ASKED}


def _threads(loaded: "LoadedModel", scheduler: "Scheduler") -> Lever:
    setting = loaded.params.threads
    return {"on": setting is None, "setting": setting, "threads": scheduler.threads.n_threads,
            "why": _why(loaded, "threads", setting, "measured while running")}  # fmt: skip
