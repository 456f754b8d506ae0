"""Pieces of GBNF that several grammars are made of."""


def literal(text: str) -> str:
    """A GBNF literal."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + escaped.replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r") + '"'


def class_char(c: str) -> str:
    """A character inside a GBNF character class."""
    if c in '"\n\t\r':
        return literal(c)[1:-1]
    return c if c.isalnum() else f"\\x{ord(c):02X}"


def text_rules(stem: str, marker: str, after: str = "", *, may_end: bool = False) -> dict[str, str]:
    """Return rules of a text up to the first marker in it, and of what follows that.

    There is one for each part of the marker that may have begun; `{stem}-0` is the first.

    Args:
        stem: what their names begin with.
        marker: not empty.
        after: rule of what follows it.
        may_end: whether the text may also end without a marker.
    """
    letters = sorted(set(marker))
    rules = {}
    for k in range(len(marker)):
        ahead = {c: _longest_begin(marker, marker[:k] + c) for c in letters}
        ways = [
            f"{literal(c)} {after if n == len(marker) else f'{stem}-{n}'}".rstrip()
            for c, n in ahead.items()
            if n
        ]
        others = "".join(class_char(c) for c, n in ahead.items() if n)
        ends = ['""'] if may_end else []
        rules[f"{stem}-{k}"] = " | ".join([*ends, f"[^{others}] {stem}-0", *ways])
    return rules


def _longest_begin(marker: str, seen: str) -> int:
    """How many of the last characters seen are a marker's first ones."""
    return next(n for n in range(len(seen), -1, -1) if marker.startswith(seen[len(seen) - n :]))
