"""The online eviction policies by name. A new one is one class and one row here."""

from collections.abc import Callable

from edgeroute.offload.eviction import (
    EvictionPolicy,
    LeastStale,
    Lru,
    Mru,
    PolicyParams,
    PoolShape,
    Random,
)
from edgeroute.offload.eviction_scored import Hobbit, Lfru, Lfu, Static
from edgeroute.runtime.errors import UsageError

Factory = Callable[[PoolShape, int, PolicyParams], EvictionPolicy]

POLICIES: dict[str, Factory] = {
    policy.name: policy for policy in (Lru, Lfu, Lfru, Hobbit, LeastStale, Static, Mru, Random)
}

_DEFAULT = PolicyParams()


def make_policy(
    name: str, shape: PoolShape, n_slots: int, params: PolicyParams = _DEFAULT
) -> EvictionPolicy:
    """Make a policy with no members yet.

    Raises:
        UsageError: there is no policy of that name; the message lists them.
    """
    if name not in POLICIES:
        raise UsageError(f"no eviction policy is called {name!r}; take one of {sorted(POLICIES)}")
    return POLICIES[name](shape, n_slots, params)
