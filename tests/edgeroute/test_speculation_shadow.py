"""Guesses judged without a pass."""

from edgeroute.speculation_shadow import MOST_GUESSES, MOST_KEPT, Shadows


def make() -> tuple[Shadows, list[tuple[str, int, int]]]:
    seen: list[tuple[str, int, int]] = []
    return Shadows(lambda *judged: seen.append(judged)), seen


def test_a_guess_is_judged_at_its_first_wrong_token() -> None:
    shadows, seen = make()
    shadows.note("r", "a", 2, [5, 6, 7])
    shadows.judge("r", [1, 2, 5])
    assert seen == []
    shadows.judge("r", [1, 2, 5, 9])
    assert seen == [("a", 2, 1)]
    shadows.judge("r", [1, 2, 5, 9, 9])
    assert len(seen) == 1


def test_a_guess_that_is_right_is_judged_when_all_of_it_came() -> None:
    shadows, seen = make()
    shadows.note("r", "a", 1, range(20))
    shadows.judge("r", [0, *range(MOST_GUESSES - 1)])
    assert seen == []
    shadows.judge("r", [0, *range(MOST_GUESSES)])
    assert seen == [("a", MOST_GUESSES, MOST_GUESSES)]


def test_requests_are_apart_and_forgotten() -> None:
    shadows, seen = make()
    shadows.note("r", "a", 0, [1])
    shadows.note("s", "b", 0, [1])
    shadows.end("r")
    shadows.end("r")
    for request in ("r", "s", "unknown"):
        shadows.judge(request, [1])
    assert seen == [("b", 1, 1)]


def test_old_guesses_do_not_pile_up() -> None:
    shadows, seen = make()
    tokens = [7] * 3
    for _ in range(MOST_KEPT + 5):
        shadows.note("r", "a", 0, [7] * MOST_GUESSES)
    shadows.judge("r", tokens)
    assert seen == [("a", 3, 3)] * 5
