"""What can be wrong with a request, as opposed to the model, the registry or the store (`model.errors`).

TowerError
├── RequestError       the request is not what the loaded releases declare
├── DeadlineExceeded   the request's deadline passed before it was answered
├── Overloaded         too many requests wait
└── NotReady           no release is loaded yet
"""

from model.errors import TowerError


class RequestError(TowerError):
    """The request is not what the loaded releases declare. The message names wanted and found."""


class DeadlineExceeded(TowerError):
    """The request's deadline passed before it was answered."""


class Overloaded(TowerError):
    """Too many requests wait."""


class NotReady(TowerError):
    """No release is loaded yet."""
