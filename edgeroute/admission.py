"""How requests get in: what they lease, whose cells they begin with, and who waits for whom."""

import time
from collections import deque
from typing import TYPE_CHECKING

from edgeroute.request import Request
from edgeroute.runtime.errors import EdgerouteError
from edgeroute.runtime.records import PrefixMode
from edgeroute.runtime.sequence import Sequence

if TYPE_CHECKING:
    from edgeroute.scheduler import Scheduler


class Admission:
    """Requests without cells yet. The engine thread owns it.

    Attributes:
        waiting: those that hold nothing.
        arriving: those whose adapters are held, and perhaps still loading.
    """

    def __init__(self, scheduler: "Scheduler") -> None:
        self._scheduler = scheduler
        self.waiting: deque[Request] = deque()
        self.arriving: list[Request] = []

    def admit(self) -> None:
        """Let waiting requests in, in order, while there are slots and cells for them.

        One whose adapter is still being loaded lets those behind it pass.
        """
        scheduler = self._scheduler
        adapters, steps = scheduler.adapters, scheduler.steps
        while self.waiting:
            request = self.waiting[0]
            try:
                if adapters is not None and not adapters.hold(request):
                    break
                if steps is not None and not steps.adapters.hold(request):
                    break
            except EdgerouteError as error:
                scheduler.fail(request, error)
                continue
            self.waiting.popleft()
            if request.max_tokens < 1:
                scheduler.finish(request, "length")
            else:
                self.arriving.append(request)
        for request in list(self.arriving):
            try:
                arrived = self._has_arrived(request)
            except EdgerouteError as error:
                scheduler.fail(request, error)
                continue
            if arrived and not self._open(request):
                return

    def _has_arrived(self, request: Request) -> bool:
        """Whether nothing of a request's is waited for any more: its adapters, its session."""
        adapters, sessions = self._scheduler.adapters, self._scheduler.sessions
        steps = self._scheduler.steps
        if adapters is not None and not adapters.has_arrived(request):
            return False
        if steps is not None and not steps.adapters.has_arrived(request):
            return False
        if sessions is None or request.session is None:
            return True
        return sessions.has_arrived(request, self._cells_of(request)[0])

    def _cells_of(self, request: Request) -> tuple[str | None, PrefixMode]:
        """Choose how deep a request is computed; return whose cells serve it, and which."""
        depth = self._scheduler.depth
        key = None if request.lease is None else request.lease.key
        reuse, request.depth = request.prefix, None
        if depth is not None and depth.on and not request.depth_full:
            request.depth = depth.begin()
            if request.depth.key is None:  # nobody knows yet what its keys will be
                reuse = "off"
            elif request.depth.key:
                key = f"{key or ''}|{request.depth.key}"
        return key, reuse

    def _open(self, request: Request) -> bool:
        """Give a request its cells; False while there are none."""
        scheduler = self._scheduler
        prefix, sessions = scheduler.prefix, scheduler.sessions
        key, reuse = self._cells_of(request)
        if request.turn is not None:  # cells of another adapter would have served otherwise
            request.n_common = prefix.longest_common(request.prompt_ids)
        sequence = None if sessions is None else sessions.take(request, key)
        if sequence is not None:
            sequence.tokens += request.token_ids
        else:
            # What it has answered already, where its device was lost, is read again.
            tokens = [*request.prompt_ids, *request.token_ids]
            sequence = prefix.open(tokens, request.n_cells, reuse, adapter=key)
        if sequence is None:
            if sessions is not None:
                sessions.blocked()
            return False
        self.arriving.remove(request)
        request.sequence = sequence
        request.n_cached = sequence.n_past
        if request.continued is None:
            request.started = time.monotonic()
        request.experts_before, request.layers_before = scheduler.spent()
        return self._enter(request, sequence)

    def _enter(self, request: Request, sequence: Sequence) -> bool:
        """Let a request run that has its cells; False where another model has none for it."""
        scheduler = self._scheduler
        if scheduler.steps is not None:
            try:
                opened = scheduler.steps.open(request)
            except EdgerouteError as error:
                scheduler.fail(request, error)
                return True
            if not opened:
                self.arriving.insert(0, request)
                request.sequence = None
                scheduler.prefix.keep(sequence)  # the cells that it found filled
                return False
        scheduler.enter(request)
        return True
