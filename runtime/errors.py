"""Every error that a user can meet, one sentence each.

Each message says what failed, the value, the limit and the remedy. The command line
maps classes to exit codes and the server to HTTP statuses; nobody parses messages.
"""


class EdgerouteError(Exception):
    """Root of every error that edgeroute raises on purpose."""


class UsageError(EdgerouteError, ValueError):
    """A caller passed a value that no model could accept."""


class ContextError(UsageError):
    """A prompt has more tokens than the context has room for."""


class GrammarError(UsageError):
    """A GBNF grammar or JSON schema cannot be used; nothing was generated."""


class ModelFileError(EdgerouteError):
    """A model file is malformed, truncated, or does not match its own header."""


class AdapterFileError(EdgerouteError):
    """An adapter is malformed, does not fit the model, or needs what cannot be applied."""


class DepthFileError(EdgerouteError):
    """A depth file, or a plan in it, is malformed or does not fit the model."""


class StepsFileError(EdgerouteError):
    """A steps file is malformed, or was made for another pair of models."""


class SessionFileError(EdgerouteError):
    """A saved session is damaged, or was made by another model; nothing of it was used."""


class UnsupportedModelError(EdgerouteError):
    """A well-formed model needs something this version cannot run."""


class TemplateError(EdgerouteError):
    """A chat template is malformed, oversized, too slow, or refused the messages."""


class LibraryError(EdgerouteError):
    """The ggml libraries are missing or are not the ones this version was written for."""


class CapacityError(EdgerouteError):
    """A request does not fit its byte budget; nothing was evicted or allocated.

    `smallest_bytes` is the smallest budget that would do, where that is known.
    """

    def __init__(self, message: str, smallest_bytes: int | None = None) -> None:
        super().__init__(message)
        self.smallest_bytes = smallest_bytes


class NeverFitsError(CapacityError):
    """What an open Runtime was asked for exceeds its own budget: waiting does not help."""


class ComputeError(EdgerouteError):
    """ggml reported a failed computation; the sequences in that batch are lost."""


class DeviceLostError(ComputeError):
    """A device stopped answering: what it held is lost, and the message names it."""


class DeadlineError(EdgerouteError, TimeoutError):
    """What was asked for was not ready within the time given."""


class CatalogueError(EdgerouteError):
    """A model name is unknown, or no source could deliver a file that passed its hash."""


class ClosedError(EdgerouteError):
    """The runtime was closed before or while the request ran."""
