"""The errors that people and schedulers see.

A message says what it is about, what was found, what was wanted and what to do about it.
"""


class KithError(Exception):
    """The run failed or a gate refused it; the command ends with exit status 1."""

    exit_status = 1


class ConfigError(KithError):
    """The command line or the configuration is wrong; exit status 2, before any work."""

    exit_status = 2


class DatasetError(KithError):
    """A dataset is missing, incomplete, damaged or of another kind than was asked for."""


class FingerprintError(KithError):
    """Two datasets that do not belong together were given to one operation."""


class GateError(KithError):
    """A gate (recall, balanced books) refused to publish a finished run."""


class ImageError(Exception):
    """One image cannot be embedded: it becomes one row in `failures`, never an exit status.

    `reason` is a short stable code (see docs/images.md), the message is the text for people.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        return type(self), (self.reason, self.message)
