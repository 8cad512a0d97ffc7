"""Settings of one training run, and the defaults that fit a data set of a given size."""

from dataclasses import asdict, dataclass
from typing import Any

from model.config import TowerConfig
from model.dataset import DatasetDescription
from model.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class LogCounts:
    """Size of a training log."""

    events: int
    users: int
    items: int
    """Rows of the catalogue."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSettings:
    """How a tower is trained; what it is, is TowerConfig."""

    seed: int = 0
    epochs: int = 10
    """Passes over the training targets; early stopping may end sooner."""
    tokens_per_step: int = 4096
    """Most events the encoder reads in one step."""
    targets_per_history: int = 256
    """Most targets of one history in one step; further ones are left out at random."""
    loss: str = "softmax"
    """softmax: sampled, or full for small catalogues. gbce: gSASRec's, over uniform_negatives of each step."""
    gbce_calibration: float = 0.75
    """t of gBCE, 0 to 1."""
    full_softmax_items: int = 5_000
    """Catalogues up to this size use every trained item as a negative; larger ones are sampled."""
    in_batch_negatives: int = 1024
    """Positives of the same step that serve as negatives, at most."""
    uniform_negatives: int = 1024
    """Negatives drawn uniformly from the trained items."""
    mask_same_user: bool = True
    """A user's other positives of the step are no negatives. Off, the model learns what follows next. With live
    features: what the user had before the target is no negative."""
    live_negatives: int = 64
    """With live features: negatives of each target, half of them from the log just before it, half uniform."""
    live_negative_hours: float = 1.0
    """How much of the log before a target those of the first half are drawn from."""
    new_item_share: float = 0.0
    """With live features: share of histories that are read as weights of an earlier midnight would read them, items
    first seen since then by their hash row only; targets from before it are left out."""
    new_item_days: int = 7
    """How many midnights back that may be."""
    stale_share: float = 0.5
    """Share of examples whose state is as old as the last daily refresh; the others lag by a few events at most."""
    lag_share: float = 0.3
    """Share of the fresh examples that lag by 1 to session_limit events, which then form the session."""
    subject_share: float = 0.25
    """Share of examples given subject items: category neighbours of the positive, where items have categories."""
    half_life_days: float | None = None
    """Weight of a target halves with each such span before the log's end; None weighs all alike."""
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    """AdamW decay of matrices; embeddings, norms and biases are not decayed."""
    warmup_steps: int = 100
    final_rate: float = 0.05
    """Learning rate at the end of the cosine, as a share of the peak."""
    clip_norm: float = 1.0
    validation_share: float = 0.1
    """Share of users whose last positives are held out of the targets for early stopping."""
    validation_users: int = 2000
    """Most such users."""
    validation_hours: float = 24.0
    """With a time split: how much of the log's end is held out for those users."""
    patience: int = 3
    """Epochs without a better validation NDCG@20 after which training stops."""
    checkpoint_steps: int = 200
    """Steps between checkpoints; each epoch ends with one as well."""
    compile: bool = False
    """Compile the encoder and the head (torch.compile): some minutes at the start, then fewer, larger kernels."""
    max_minutes: float | None = None
    """Wall-clock limit; the learning rate is brought down in time for it."""
    max_users: int | None = None
    """Train on so many users, drawn with the seed."""
    max_target_users: int | None = None
    """Ask the targets of so many users only, drawn with the seed; the others' events are still counted, as negatives
    and by live features. For trials whose traffic is the whole log's."""
    max_events: int | None = None
    """Train on so many of the latest events."""

    def __post_init__(self) -> None:
        at_least_one = ("epochs", "tokens_per_step", "targets_per_history", "patience", "checkpoint_steps")
        for name in (*at_least_one, "live_negatives", "new_item_days", "max_users", "max_target_users", "max_events"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        for name in ("full_softmax_items", "in_batch_negatives", "uniform_negatives", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.in_batch_negatives + self.uniform_negatives < 1:
            raise ConfigError("in_batch_negatives and uniform_negatives must not both be 0")
        if self.loss not in ("softmax", "gbce"):
            raise ConfigError(f"loss must be softmax or gbce, got {self.loss!r}")
        if self.loss == "gbce" and not self.uniform_negatives:
            raise ConfigError("gbce needs uniform_negatives above 0")
        shares = ("stale_share", "lag_share", "subject_share", "final_rate", "validation_share", "new_item_share")
        for name in (*shares, "gbce_calibration"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in (
            "learning_rate",
            "clip_norm",
            "half_life_days",
            "max_minutes",
            "validation_hours",
            "live_negative_hours",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} must be above 0, got {value}")
        if self.seed < 0:
            raise ConfigError(f"seed must be 0 or more, got {self.seed}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def config_for(description: DatasetDescription, counts: LogCounts) -> TowerConfig:
    """A tower that fits the data set: width by the number of events, hash rows by the size of the catalogue."""
    width = 32 if counts.events < 50_000 else 64
    hash_rows = 64
    while hash_rows < min(counts.items // 8, 8192):
        hash_rows *= 2
    return TowerConfig(
        d_model=width,
        embedding_dim=width,
        context_dim=width,
        head_hidden=4 * width,
        hash_rows=hash_rows,
        context_dropout=0.5 if description.evaluation.split == "leave_one_out" else 0.3,
    )


def settings_for(description: DatasetDescription, counts: LogCounts, *, device: str = "cpu") -> TrainSettings:
    """Settings that fit the data set and the device; a CUDA device takes larger steps and softmaxes."""
    cuda = device.startswith("cuda")
    next_item = description.evaluation.split == "leave_one_out"
    return TrainSettings(
        epochs=30 if counts.events < 200_000 else 10,
        tokens_per_step=32_768 if cuda else 2048 if counts.events < 50_000 else 4096,
        full_softmax_items=100_000 if cuda else 5_000,
        mask_same_user=not next_item,
        stale_share=0.1 if next_item else 0.6,
        warmup_steps=min(100, max(10, counts.events // 40_000)),
    )
