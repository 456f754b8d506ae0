"""Which model an answer came from, for feedback that comes later."""

from collections import OrderedDict
from typing import Final

MAX_REMEMBERED: Final = 10_000


class Origins:
    """The last answers' models. Owned by the event loop."""

    def __init__(self) -> None:
        self._models: OrderedDict[str, str] = OrderedDict()

    def remember(self, generation_id: str, model: str) -> None:
        """Note where an answer came from; the oldest is forgotten."""
        self._models[generation_id] = model
        while len(self._models) > MAX_REMEMBERED:
            self._models.popitem(last=False)

    def find(self, generation_id: str) -> str | None:
        """Return the model's name, or None for an answer that is not known any more."""
        return self._models.get(generation_id)
