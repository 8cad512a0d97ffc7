"""Keeps the indexes of this process up to date: a thread for the item updates of each, one for the events where the
release has live item features.

A new index catches up before a request can see it, for CATCH_UP_S at most: Redis away or a long backlog must not keep a
release from serving, and the metrics tell.
"""

import logging
import threading
import time
from collections.abc import Callable
from time import monotonic

import redis

from model.errors import IndexBusy, StoreUnavailable
from model.event_log import show_time
from online.event_feed import EventFeed
from online.item_feed import RETRY_S, ItemFeed
from online.items import ServedItems
from online.stream import BATCH, connect

log = logging.getLogger(__name__)

CATCH_UP_S = 10.0
WAIT_MS = 1000
"""Longest wait for an entry."""


class Following:
    """The feeds of one index."""

    def __init__(
        self, items: ServedItems, client: redis.Redis, *, live_hours: float, max_events: int, now_us: Callable[[], int]
    ) -> None:
        """client: for these feeds alone."""
        self.items = items
        self._client, self._now_us = client, now_us
        self.updates = ItemFeed(client, items.index, is_strict=False)
        self.events: EventFeed | None = None
        if items.live is not None:
            self.events = EventFeed(client, items, live_hours=live_hours, max_events=max_events, now_us=now_us)
        self.updates_until_us = 0
        """When the item updates were last read to their end; 0 for never."""
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Catch up here, then follow in the background."""
        give_up_at = monotonic() + CATCH_UP_S
        steps = [self._take_updates, *([self._take_events] if self.events is not None else [])]
        for step in steps:
            try:
                while step(1) == BATCH and monotonic() < give_up_at:
                    pass
            except Exception as error:  # whatever it is, the release serves, and the thread tries again
                log.warning("feed of %s: %s; serving without", self.items.embedding_version, error)
            thread = threading.Thread(target=self._run, args=(step,), name="feed-items", daemon=True)
            self._threads.append(thread)
        counted = self.items.counted
        if self.events is not None and counted is not None:
            log.info(
                "feed of %s: %s events, whole from %s to %s%s", self.items.embedding_version, f"{self.events.kept:,}",
                show_time(counted.since_us), show_time(counted.until_us),
                ", less than the longest window: answers will say so" if counted.is_short else "",
            )  # fmt: skip
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End at once, or when a count is done."""
        self._stop.set()
        self._client.connection_pool.disconnect()  # whoever waits for an entry waits no more

    def join(self) -> None:
        """Wait for the end, and close the client."""
        for thread in self._threads:
            thread.join(timeout=5)
        self._client.close()

    def _take_updates(self, wait_ms: int) -> int:
        started_us = self._now_us()
        count = self.updates.step(wait_ms)
        if count < BATCH:
            self.updates_until_us = started_us if count else self._now_us()
        return count

    def _take_events(self, wait_ms: int) -> int:
        assert self.events is not None, "asked for where there are"
        return self.events.step(wait_ms)

    def _run(self, step: Callable[[int], int]) -> None:
        is_failing = False
        while not self._stop.is_set():
            try:
                step(WAIT_MS)
                is_failing = False
            except Exception as error:  # a thread that ends in silence would leave the index as it is for good
                if self._stop.is_set():
                    return
                is_expected = isinstance(error, StoreUnavailable | IndexBusy)
                if not is_failing or not is_expected:
                    log.warning(
                        "feed of %s: %s; trying again", self.items.embedding_version, error, exc_info=not is_expected
                    )
                is_failing = True
                self._stop.wait(RETRY_S)


class Feeds:
    """All of them."""

    def __init__(
        self, redis_url: str, *, live_hours: float, max_events: int,
        on_change: Callable[[list[Following]], None] = lambda following: None,
        now_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:  # fmt: skip
        """live_hours, max_events: see EventFeed. on_change: told all that are followed, whenever that changes."""
        self._url, self._live_hours, self._max_events = redis_url, live_hours, max_events
        self._on_change, self._now_us = on_change, now_us
        self._following: list[Following] = []

    def start(self, items: ServedItems) -> None:
        """Bring an index up to date and keep it so."""
        following = Following(
            items, connect(self._url), live_hours=self._live_hours, max_events=self._max_events, now_us=self._now_us
        )
        following.start()
        self._following.append(following)
        self._on_change(list(self._following))

    def stop(self, items: ServedItems) -> None:
        """Leave an index as it is."""
        for following in [each for each in self._following if each.items is items]:
            self._following.remove(following)
            following.stop()
            threading.Thread(target=following.join, daemon=True).start()
        self._on_change(list(self._following))

    def close(self) -> None:
        """Leave all as they are."""
        for following in self._following:
            following.stop()
        for following in self._following:
            following.join()
