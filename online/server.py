"""One server process, put together: start, drain, stop."""

import gc
import logging
import platform
import threading
import time
from collections.abc import Callable
from concurrent import futures
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from wsgiref.simple_server import WSGIServer

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from model.errors import ConfigError
from model.release import Registry, Release
from online.canary import CanaryWatch
from online.feeds import Feeds
from online.head import ServingHead
from online.leases import LeaseHolder, new_server_id
from online.metrics import Metrics
from online.registry import Follower, load_release
from online.residents import Head, ResidentSet
from online.servicer import RECOMMENDER, SERVICE, BoundedPool, InPool, UserTower
from online.settings import Settings
from online.stores.redis import RedisStore

log = logging.getLogger(__name__)


class Server:
    """A running server. Health says SERVING from the first loaded release to the beginning of `drain`; that of the
    Recommender only while the serving release has its items."""

    def __init__(
        self,
        settings: Settings,
        *,
        reuse_port: bool = False,
        make_head: Callable[[Release], Head] = ServingHead,
        now_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        """Listens at once, so that health can be asked while releases load. `start` loads them.

        reuse_port: let other processes listen on the same port. Raises ConfigError for files or ports unfit for use.
        """
        if settings.device != "cpu" and not torch.cuda.is_available():
            raise ConfigError(f"device {settings.device} is asked for, and there is no CUDA here")
        self.settings = settings
        self.ready = threading.Event()
        """Set once a release is loaded."""
        self.metrics = Metrics()
        self.store = RedisStore(settings.redis_url, on_error=self.metrics.store_failed)
        registry = Registry(settings.registry)
        self.feeds = Feeds(
            settings.redis_url,
            live_hours=settings.live_hours,
            max_events=settings.live_events,
            on_change=self.metrics.fed,
            now_us=now_us,
        )
        self.follower = Follower(
            registry,
            poll_s=settings.poll_ms * 1e-3,
            before_change=lambda residents: self.lease.widen(residents),
            on_change=self._changed,
            on_refusal=lambda release_id, kind: self.metrics.release_refused(kind),
            load=partial(load_release, registry, make_head=make_head, device=settings.device),
            feed=self.feeds.start,
            end_feed=self.feeds.stop,
        )
        self._is_draining = False
        self._lock = threading.Lock()
        self._health = health.HealthServicer()
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)

        self.pool = BoundedPool(settings.threads, settings.max_queue, "embed")
        side_pool = futures.ThreadPoolExecutor(1, "side")
        reflection_pool = futures.ThreadPoolExecutor(2, "reflection")
        self._pools = [self.pool, side_pool, reflection_pool]
        self._server = grpc.server(self.pool, options=[("grpc.so_reuseport", int(reuse_port))])
        current: Callable[[], ResidentSet | None] = lambda: self.follower.current  # noqa: E731
        self.tower = UserTower(settings, current, self.store, self.metrics, self.pool, side_pool, now_us=now_us)
        self._server.add_generic_rpc_handlers((self.tower,))
        # Health and reflection stay out of the queue of requests: a busy server is not a dead one, and a reflection
        # stream that is left open must not hold a thread that embeds.
        health_pb2_grpc.add_HealthServicer_to_server(
            SimpleNamespace(Check=InPool(self._health.Check, side_pool), Watch=self._health.Watch), self._server
        )
        names = (SERVICE, RECOMMENDER, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflector = reflection.ReflectionServicer(names)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(
            SimpleNamespace(ServerReflectionInfo=InPool(reflector.ServerReflectionInfo, reflection_pool)), self._server
        )
        self.port = self._listen()
        self.canaries = CanaryWatch(
            current,
            self.store,
            every_s=settings.canary_s,
            store_timeout_s=settings.store_timeout_ms * 1e-3,
            on_checked=self.metrics.canaries_checked,
            on_change=lambda: self.lease.rewrite(),
            now_us=now_us,
        )
        host = platform.node() if settings.bind in ("0.0.0.0", "::") else settings.bind
        self.lease = LeaseHolder(
            registry,
            server_id=new_server_id(),
            address=f"{host}:{self.port}",
            lease_s=settings.lease_s,
            current=current,
            verdict_of=self.canaries.verdict_of,
            on_written=self.metrics.lease_written,
            on_failure=self.metrics.lease_failed,
            now_us=now_us,
        )
        self._metrics_server: WSGIServer = self.metrics.serve(settings.bind, settings.metrics_port)
        self.metrics_port: int = self._metrics_server.server_port
        self._server.start()

    def start(self) -> None:
        """Load what the pointer names and follow it. Returns without a release where there is none to load yet."""
        self.follower.start()
        self.lease.start()
        self.canaries.start()

    def drain(self) -> None:
        """Stop within notice_s + drain_s: say so, go on for a moment, take no more, finish what is in progress."""
        with self._lock:
            self._is_draining = True
            self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        time.sleep(self.settings.notice_s)
        self._server.stop(self.settings.drain_s).wait(self.settings.drain_s + 1)
        self._close()

    def stop(self) -> None:
        """Stop now, cutting off requests in progress. For tests."""
        self._server.stop(0).wait(5)
        self._close()

    def _close(self) -> None:
        self.follower.stop()
        self.feeds.close()
        self.canaries.stop()
        self.lease.stop()
        self._metrics_server.shutdown()
        self._metrics_server.server_close()
        for pool in self._pools:
            pool.shutdown(wait=False)

    def _changed(self, residents: ResidentSet) -> None:
        self.metrics.loaded(residents)
        self.canaries.look_now()
        with self._lock:
            if not self._is_draining:
                self._set_health(health_pb2.HealthCheckResponse.SERVING)
                if residents.serving.index is None:
                    self._health.set(RECOMMENDER, health_pb2.HealthCheckResponse.NOT_SERVING)
        if not self.ready.is_set():
            gc.collect()
            gc.freeze()  # what is loaded now stays; full collections need not walk it
            self.ready.set()

    def _set_health(self, status: Any) -> None:
        for name in ("", SERVICE, RECOMMENDER):
            self._health.set(name, status)

    def _listen(self) -> int:
        settings = self.settings
        host = f"[{settings.bind}]" if ":" in settings.bind else settings.bind
        address = f"{host}:{settings.port}"
        try:
            if settings.tls_cert is None or settings.tls_key is None:
                port: int = self._server.add_insecure_port(address)
            else:
                pair = Path(settings.tls_key).read_bytes(), Path(settings.tls_cert).read_bytes()
                port = self._server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        except (OSError, RuntimeError) as error:
            raise ConfigError(f"cannot listen on {address}: {error}") from None
        return port
