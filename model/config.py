"""What fixes the weights' shape or meaning. Saved in every release; batch and online read it from there alone."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from model.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerConfig:
    """Shape and meaning of one tower."""

    d_model: int = 64
    """Width of the encoder and of one token of the stored state."""
    state_tokens: int = 1
    """Tokens of a stored state: the last hidden state, then what learned queries read from the whole history."""
    num_layers: int = 2
    num_heads: int = 2
    ffn_factor: int = 4
    """Width of the feed-forward block as a multiple of d_model. Pointwise attention has none."""
    attention: str = "softmax"
    """softmax: a Transformer's. pointwise: HSTU's, which sums instead of averaging and gates the sum."""
    relative_bias: bool = False
    """Attention also sees how many events and how much time lie between two events. Padded, not packed: meant for
    histories of a few hundred events."""
    history_limit: int = 200
    """Most events the encoder reads; the latest are kept."""
    embedding_dim: int = 64
    """Width E of user and item embeddings."""
    head_hidden: int = 256
    hash_rows: int = 1024
    """Rows shared by all items outside the catalogue (and by catalogue items never trained on)."""
    category_limit: int = 8
    """Most values read of one item's list column."""
    context_dim: int = 64
    session_limit: int = 8
    """Most session events the head reads; the latest are kept."""
    subject_limit: int = 4
    """Most subject items the head reads; the most confident are kept."""
    query_dim: int = 0
    """Length of the query vector; 0 means requests carry none."""
    dropout: float = 0.2
    context_dropout: float = 0.5
    """Chance that a training example loses one part of its context."""
    state_dropout: float = 0.1
    """Chance that a training example sees the cold-start state instead of its own."""
    item_dropout: float = 0.05
    """Chance that a training example knows an item by its hash row only."""
    temperature: float = 0.07
    """Divides the cosine of user and item before the softmax."""
    compute_dtype: str = "float32"
    """dtype of the encoder's matrix products: float32 or bfloat16."""
    storage_codec: str = "float32"
    """How a state is stored: float32, float16 or int8 (model.state_codec)."""
    live_windows_h: tuple[float, ...] = ()
    """Spans before a request, in hours, over which an item's events are counted; none means no live features."""
    live_dim: int = 16
    """Width L of the live part that user and item vectors get behind their E values; read where there are windows."""
    live_bucket_s: int = 60
    """Counts are taken at whole multiples of so many seconds; a request sees the last one at or before it."""
    live_recent: int = 3
    """Most of a request's latest session events whose followers are scored; all of them count as had."""

    def __post_init__(self) -> None:
        at_least_one = (
            "d_model", "state_tokens", "num_layers", "num_heads", "ffn_factor", "history_limit", "embedding_dim",
            "head_hidden", "hash_rows", "category_limit", "context_dim", "session_limit", "subject_limit",
        )  # fmt: skip
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.query_dim < 0:
            raise ConfigError(f"query_dim must be 0 or more, got {self.query_dim}")
        if self.d_model % (2 * self.num_heads):
            raise ConfigError(
                f"d_model must be a multiple of 2 x num_heads (rotary positions turn pairs of channels), "
                f"got d_model={self.d_model}, num_heads={self.num_heads}"
            )
        for name in ("dropout", "context_dropout", "state_dropout", "item_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.attention not in ("softmax", "pointwise"):
            raise ConfigError(f"attention must be softmax or pointwise, got {self.attention!r}")
        if self.temperature <= 0:
            raise ConfigError(f"temperature must be above 0, got {self.temperature}")
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"compute_dtype must be float32 or bfloat16, got {self.compute_dtype!r}")
        if self.storage_codec not in ("float32", "float16", "int8"):
            raise ConfigError(f"storage_codec must be float32, float16 or int8, got {self.storage_codec!r}")
        if not isinstance(self.live_windows_h, list | tuple):
            raise ConfigError(f"live_windows_h must be a list of hours, got {self.live_windows_h!r}")
        object.__setattr__(self, "live_windows_h", tuple(self.live_windows_h))  # JSON has lists
        for name in ("live_dim", "live_bucket_s", "live_recent"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        windows = self.live_windows_h
        if list(windows) != sorted(set(windows)) or any(hours * 3600 < self.live_bucket_s for hours in windows):
            raise ConfigError(
                f"live_windows_h must rise and be at least live_bucket_s ({self.live_bucket_s} s) each, got {windows}"
            )

    @property
    def state_width(self) -> int:
        """Numbers of a stored state: its tokens, one after another."""
        return self.state_tokens * self.d_model

    @property
    def live_width(self) -> int:
        """L where there are live features, else 0: user vectors have E + L values."""
        return self.live_dim if self.live_windows_h else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of to_dict. Raises ConfigError on a name this version does not know."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"TowerConfig has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        return cls(**values)
