"""What the decisions for one answer share, whatever the policy."""

from edgeroute.runtime.errors import UsageError
from edgeroute.skippers.steps import Check, Floats, Glance, StepPart, Who


class PlainRun:
    """An answer that one model writes, or drafts for a check; other runs change what differs.

    Args:
        writer: of every step.
        check: of what the small model writes.
    """

    looks = False
    wants_hidden = False
    watches = False

    def __init__(self, writer: Who = "small", check: Check | None = None) -> None:
        self._writer: Who = writer
        self._check = check

    @property
    def check(self) -> Check | None:
        """How what the small model writes is checked before it counts; None: it is not."""
        return self._check

    def choose(self, glance: Glance | None) -> Who:
        """Name the writer of the step that begins."""
        return self._writer

    def at_token(self, writer: Who, logits: Floats) -> Who:
        """Name the writer of the next token inside a step: whoever writes it."""
        return writer

    def note(self, part: StepPart) -> None:
        """Learn nothing from a part that was written."""


class GlanceRun(PlainRun):
    """An answer whose steps are all glimpsed."""

    looks = True


def seen(glance: Glance | None) -> Glance:
    """Return the glance that a policy which looks was given.

    Raises:
        UsageError: it was given none.
    """
    if glance is None:
        raise UsageError("this policy decides from a glance at the step, and was given none")
    return glance


def number_text(value: float) -> str:
    """Return a number as a policy's text has it; `float` reads the same one."""
    return repr(float(value)).removesuffix(".0")
