"""One way to be closed: everything that owns a C pointer is a context manager."""

from types import TracebackType
from typing import Self


class Closing:
    """Gives a class with `close` the `with` statement. `close` must be safe to call twice."""

    def close(self) -> None:
        """Free what the object owns."""
        raise NotImplementedError(f"{type(self).__name__} has no close()")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()
