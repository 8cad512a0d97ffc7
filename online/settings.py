"""Everything the service is told from outside, read once at start-up."""

import re
from dataclasses import dataclass

from model.errors import ConfigError

POLICIES = ("cold_start", "strict")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Settings of one server process. Raises ConfigError when built from nonsense."""

    registry: str
    """URI of the release registry."""
    redis_url: str
    bind: str = "127.0.0.1"
    """Address of the network interface, for requests and metrics."""
    port: int = 50051
    """0 picks a free port."""
    metrics_port: int = 9464
    """0 picks a free port."""
    workers: int = 1
    threads: int = 16
    """Requests taken in at once by one process; what waits meanwhile becomes one batch."""
    max_queue: int = 256
    """Requests of one process that may wait beyond those being worked on."""
    policy: str = "cold_start"
    """What to do without a usable state when the request does not say."""
    device: str = "cpu"
    """Where the item index is: cpu, cuda or cuda:N. Heads stay on the CPU."""
    live_hours: float = 168.0
    """How long events count for releases with live item features; as long as senders keep them in the stream."""
    live_events: int = 5_000_000
    """Most events that are kept to be counted, the latest; about 100 bytes each."""
    deadline_ms: float = 250.0
    """Time given to a request that sets no deadline."""
    store_timeout_ms: float = 50.0
    """Longest wait for Redis."""
    max_state_age_s: float | None = None
    """Oldest state that is used; None for any age."""
    poll_ms: float = 1000.0
    """How often the serving pointer is looked at."""
    lease_s: float = 30.0
    """How long the registry takes a silent server for alive; the lease is renewed every third of it."""
    canary_s: float = 10.0
    """How often the canary users are checked; 0 for never."""
    notice_s: float = 1.0
    """After SIGTERM: how long requests are still taken while health already says NOT_SERVING."""
    drain_s: float = 10.0
    """After that: how long requests in progress may take to end."""
    tls_cert: str | None = None
    """PEM file of the server's certificate chain."""
    tls_key: str | None = None

    def __post_init__(self) -> None:
        for name in ("workers", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("port", "metrics_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise ConfigError(f"{name} must be in [0, 65535], got {getattr(self, name)}")
        if not 0 < self.live_hours < float("inf"):
            raise ConfigError(f"live_hours must be above 0 h, got {self.live_hours}")
        if self.live_events < 1:
            raise ConfigError(f"live_events must be at least 1, got {self.live_events}")
        for name in ("deadline_ms", "store_timeout_ms", "poll_ms"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0 ms, got {getattr(self, name)}")
        if not 0 < self.lease_s < float("inf"):
            raise ConfigError(f"lease_s must be above 0 s, got {self.lease_s}")
        for name in ("max_queue", "canary_s", "notice_s", "drain_s"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.max_state_age_s is not None and not self.max_state_age_s > 0:
            raise ConfigError(f"max_state_age_s must be above 0, got {self.max_state_age_s}")
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ConfigError(f"device must be cpu, cuda or cuda:N, got {self.device!r}")
        if self.policy not in POLICIES:
            raise ConfigError(f"policy must be one of {', '.join(POLICIES)}, got {self.policy!r}")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("tls_cert and tls_key go together; one of them is missing")
