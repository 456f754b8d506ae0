"""Properties of a parsed grammar that decide whether llama.cpp can match it safely."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from edgeroute.runtime.errors import GrammarError
from edgeroute.runtime.gbnf import ROOT, Chars, Rules, Symbol

MAX_LEFT_DEPTH = 1000
MAX_LEFT_PATHS = 1_000_000
MAX_STACKS = 2000
MAX_STEPS = 24
MAX_WORK = 300_000
MAX_PROBES = 8

Place = tuple[int, int, int]
"""(rule, alternative, symbol)."""

Predicate = Callable[[Symbol, set[int]], bool]


def check(rules: Rules) -> None:
    """Refuse grammars that never end, recurse to the left, or explode while matching.

    Raises:
        GrammarError: the message names a rule and what to change.
    """
    _check_productive(rules)
    empty = _fixpoint(rules, lambda s, known: isinstance(s, int) and s in known)
    _check_left_recursion(rules, empty)
    matcher = _Matcher(rules)
    for index in sorted(_centre_recursive(rules)):
        matcher.check_rule(index)


def _check_productive(rules: Rules) -> None:
    ends = _fixpoint(rules, lambda s, known: isinstance(s, Chars) or s in known)
    if rules.ids[ROOT] not in ends:
        raise GrammarError("the grammar's root rule can never be completed; give it a way to end")


def _fixpoint(rules: Rules, good: Predicate) -> set[int]:
    """Rules with an alternative whose symbols are all good, given the rules found so far."""
    users: dict[int, set[int]] = {}
    for index, alternatives in enumerate(rules.alternatives):
        for symbols in alternatives:
            for symbol in symbols:
                if isinstance(symbol, int):
                    users.setdefault(symbol, set()).add(index)
    known: set[int] = set()
    todo = set(range(len(rules.names)))
    while todo:
        index = todo.pop()
        if index in known:
            continue
        if any(all(good(s, known) for s in symbols) for symbols in rules.alternatives[index]):
            known.add(index)
            todo |= users.get(index, set()) - known
    return known


def _leftmost(rules: Rules, empty: set[int], index: int) -> Iterator[int]:
    """Rules that may begin a match of this rule, with repeats."""
    for symbols in rules.alternatives[index]:
        for symbol in symbols:
            if not isinstance(symbol, int):
                break
            yield symbol
            if symbol not in empty:
                break


def _check_left_recursion(rules: Rules, empty: set[int]) -> None:
    """Refuse cycles of leftmost rules, and graphs of them that llama.cpp walks path by path."""
    edges = [list(_leftmost(rules, empty, i)) for i in range(len(rules.names))]
    depth = [0] * len(edges)
    paths = [0] * len(edges)
    state = [0] * len(edges)
    for first in range(len(edges)):
        todo = [first]
        while todo:
            index = todo[-1]
            if state[index] == 0:
                state[index] = 1
                for target in edges[index]:
                    if state[target] == 1:
                        raise GrammarError(
                            f"grammar rule {rules.names[target]!r} can begin with itself, or "
                            "repeats something that can be empty; rewrite it without"
                        )
                    if state[target] == 0:
                        todo.append(target)
                continue
            todo.pop()
            if state[index] == 1:
                state[index] = 2
                depth[index] = 1 + max((depth[t] for t in edges[index]), default=0)
                paths[index] = 1 + sum(paths[t] for t in edges[index])
    if max(depth) > MAX_LEFT_DEPTH or sum(paths) > MAX_LEFT_PATHS:
        raise GrammarError(
            f"the grammar's rules begin with each other in {sum(paths)} ways, up to {max(depth)} "
            f"deep; the limits are {MAX_LEFT_PATHS} and {MAX_LEFT_DEPTH}"
        )


def _centre_recursive(rules: Rules) -> set[int]:
    """Rules that contain themselves with something after it: only those grow the stack."""
    component = _components(rules)
    found = set()
    for index, alternatives in enumerate(rules.alternatives):
        for symbols in alternatives:
            for symbol in symbols[:-1]:
                if isinstance(symbol, int) and component[symbol] == component[index]:
                    found.add(index)
    return found


def _components(rules: Rules) -> list[int]:
    """Number the strongly connected components of the reference graph (Kosaraju)."""
    n = len(rules.names)
    forward = [
        [s for symbols in alternatives for s in symbols if isinstance(s, int)]
        for alternatives in rules.alternatives
    ]
    backward: list[list[int]] = [[] for _ in range(n)]
    for index, targets in enumerate(forward):
        for target in targets:
            backward[target].append(index)
    order: list[int] = []
    seen = [False] * n
    for first in range(n):
        todo = [(first, False)]
        while todo:
            index, done = todo.pop()
            if done:
                order.append(index)
            elif not seen[index]:
                seen[index] = True
                todo.append((index, True))
                todo += [(t, False) for t in forward[index] if not seen[t]]
    component = [-1] * n
    for first in reversed(order):
        reach = [first] if component[first] < 0 else []
        while reach:
            index = reach.pop()
            if component[index] < 0:
                component[index] = first
                reach += [t for t in backward[index] if component[t] < 0]
    return component


class _Matcher:
    """llama.cpp's matcher in small: sets of stacks, fed one character at a time.

    A stack is a number: 0 is the empty one, others are (place, stack below) pairs.
    """

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._nodes: list[tuple[Place, int]] = [((0, 0, 0), 0)]
        self._ids: dict[tuple[Place, int], int] = {}
        self._left = MAX_WORK
        self._owner = ""

    def check_rule(self, index: int) -> None:
        """Feed the characters that multiply parses most; refuse exponential growth."""
        self._owner = self._rules.names[index]
        stacks = self._settle(self._begin(index, 0))
        for _ in range(MAX_STEPS):
            best: set[int] = set()
            for code in self._probes(stacks):
                after = self._settle(self._feed(stacks, code))
                best = after if len(after) > len(best) else best
            if len(best) > MAX_STACKS:
                raise self._too_ambiguous()
            if not best:
                return
            stacks = best

    def _begin(self, index: int, below: int) -> list[int]:
        n = len(self._rules.alternatives[index])
        return [self._push((index, i, 0), below) for i in range(n)]

    def _push(self, place: Place, below: int) -> int:
        """The stack with a place on top; a place at its sequence's end is left out."""
        if place[2] >= len(self._rules.alternatives[place[0]][place[1]]):
            return below
        key = (place, below)
        if key not in self._ids:
            self._ids[key] = len(self._nodes)
            self._nodes.append(key)
        return self._ids[key]

    def _top(self, stack: int) -> Symbol:
        rule, alternative, at = self._nodes[stack][0]
        return self._rules.alternatives[rule][alternative][at]

    def _next(self, stack: int) -> int:
        (rule, alternative, at), below = self._nodes[stack]
        return self._push((rule, alternative, at + 1), below)

    def _settle(self, stacks: Iterable[int]) -> set[int]:
        """Replace rules on top by their alternatives until characters are on top."""
        settled: set[int] = set()
        seen: set[int] = set()
        todo = list(stacks)
        while todo:
            stack = todo.pop()
            if stack in seen:
                continue
            seen.add(stack)
            self._left -= 1
            if self._left < 0:
                raise self._too_ambiguous()
            top = self._top(stack) if stack else None
            if isinstance(top, int):
                todo += self._begin(top, self._next(stack))
            else:
                settled.add(stack)
        return settled

    def _feed(self, stacks: set[int], code: int) -> list[int]:
        tops = ((stack, self._top(stack)) for stack in stacks if stack)
        return [self._next(s) for s, top in tops if isinstance(top, Chars) and top.matches(code)]

    def _probes(self, stacks: set[int]) -> list[int]:
        """Characters worth trying: those that most tops ask for."""
        wanted: Counter[int] = Counter()
        for stack in stacks:
            top = self._top(stack) if stack else None
            if isinstance(top, Chars) and not top.negated:
                wanted.update(low for low, _ in top.ranges[:8])
        return [ord("a"), *(code for code, _ in wanted.most_common(MAX_PROBES))]

    def _too_ambiguous(self) -> GrammarError:
        return GrammarError(
            f"matching the grammar keeps too many parses apart near rule {self._owner!r}; "
            "factor out what its alternatives have in common"
        )
