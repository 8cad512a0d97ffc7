"""Every error the project raises.

TowerError
├── ConfigError        a setting or dataset description is wrong
├── DataError          a file or column is not what the description says
├── ShapeError         a tensor's shape or dtype is not what was wanted
├── CheckpointError    a release or checkpoint is missing, torn or altered
│   └── GoldenMismatch   a release's golden inputs give other outputs here
├── PointerConflict    the serving pointer moved under a writer
├── ReleaseNotReady    a release may not serve yet: states, items or servers are missing, or a canary is off
├── StoreUnavailable   the state store did not answer in time
├── StateMismatch      no resident release may answer with this row
├── IndexMismatch      an update or request is of another embedding_version than the item index
└── IndexBusy          an update waited too long for requests that still read the index, or a job for a stream
"""


class TowerError(Exception):
    """Any error of the project."""


class ConfigError(TowerError):
    """A setting or dataset description is wrong."""


class DataError(TowerError):
    """A file or column is not what the description says."""


class ShapeError(TowerError):
    """A tensor's shape or dtype is not what was wanted."""


class CheckpointError(TowerError):
    """A release or checkpoint is missing, torn or altered."""


class GoldenMismatch(CheckpointError):
    """A release's golden inputs give other outputs on this machine than when it was written."""


class PointerConflict(TowerError):
    """The serving pointer moved under a writer, or a lower epoch was offered."""


class ReleaseNotReady(TowerError):
    """A release may not serve yet; the message says which check refused it and by how much."""


class StoreUnavailable(TowerError):
    """The state store did not answer in time."""


class StateMismatch(TowerError):
    """No resident release may answer with the stored row, and the policy is strict."""


class IndexMismatch(TowerError):
    """An update or request is of another embedding_version than the item index; the message names both."""


class IndexBusy(TowerError):
    """An update waited too long for requests that still read what it is to replace, and nothing of it was applied; or
    all CUDA streams of the device stayed in use, and the request or update may come again."""
