"""Live item features: what the log says of an item at the time of a request, for training, evaluation and serving.

    score(request, item) = gate(request) cos(user, item) / temperature + psi(request) . phi(item, t)
                         + follows(recent, item, t) - had(recent, item)

phi is a small network over counts of the item's events in several windows before t, psi and the gate are linear in the
head's hidden layer; behind the E values of user and item vectors they are part of the same dot product. `follows` adds
to the items that others went on to from the request's latest items. It is never negative and zero for all but an item's
followers, and `had` takes from the session's own items alone: so the best k by the whole score are among those of the
session, the followers, and the best k + session_limit by the dot product.

All begins as a count: gate 0, psi . phi the log count of the shortest window, and with `follows` the log of a blend of
popularity and of what others went on to.

Counts are point in time: at a request they hold the positive events before the last multiple of `live_bucket_s`, and
nothing of the request's own bucket. An item's age is counted from its first event, not from a declared time of
publication: in logs where that is derived from the first event, it would tell the first click.

Legend: P positive events, I item rows, N catalogue items, W windows, F features of an item, G features of a pair,
L width of the live part, B requests, K recent items of a request, M draws.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from model.config import TowerConfig
from model.errors import DataError

Ints = NDArray[np.int64]
_SECOND_US = 1_000_000
HIDDEN = 64
"""Width of the two small networks."""
_SCALE = 4.0
"""Divides logarithms of counts, to about 1."""
_FOLLOW_US = 24 * 3600 * _SECOND_US
"""Longest gap between two events of a user of which the second is said to follow the first."""
_FOLLOW_HOURS = 3.0
"""A pair is counted over so long, and over the whole past."""


@dataclass(frozen=True, slots=True)
class CountIndex:
    """Events by key and bucket, to count the events of any key in any span of buckets."""

    place_P: torch.Tensor
    """i64 [P], key * span + bucket, rising."""
    span: int
    """Buckets there are, one more than the last event's."""

    @classmethod
    def build(cls, key_P: Ints, bucket_P: Ints, span: int) -> Self:
        """key_P: i64 at least 0. bucket_P: i64 in [0, span). Raises DataError where the two do not fit in 63 bits."""
        if len(key_P) and int(key_P.max()) >= 2**63 // span - 1:
            raise DataError(
                f"{int(key_P.max()) + 1} keys times {span} buckets are too many to count; longer buckets help"
            )
        return cls(torch.from_numpy(np.sort(key_P * span + bucket_P)), span)

    def before(self, key: torch.Tensor, bucket: torch.Tensor) -> torch.Tensor:
        """Events of smaller keys, and of the key in buckets before the given one: i64, for differences."""
        return torch.searchsorted(self.place_P, key * self.span + bucket.clamp(0, self.span - 1))

    def since(self, key: torch.Tensor, bucket: torch.Tensor, length: int | None = None) -> torch.Tensor:
        """Events of each key in the `length` buckets before the given one, None for all before: i64."""
        low = torch.zeros_like(bucket) if length is None else bucket - length
        return self.before(key, bucket) - self.before(key, low)


@dataclass(frozen=True, slots=True)
class LiveCounts:
    """The positive events of a log, arranged to be counted as of any bucket."""

    items: CountIndex
    """By item row."""
    pairs: CountIndex
    """By row of an item * I + row of the item that followed it."""
    sources: CountIndex
    """By row of the item that was followed."""
    seen: CountIndex
    """By user * I + item row."""
    item_P: torch.Tensor
    """i64 [P], item rows by time."""
    before_Q: torch.Tensor
    """i64 [buckets + 1], events before each bucket."""
    follower_S: torch.Tensor
    """i64 [S], items that ever followed an item, packed by the item followed."""
    follower_offsets_I: torch.Tensor
    """i64 [I + 1], where each item's followers begin."""
    num_rows: int
    """I"""
    origin_us: int
    bucket_us: int
    windows: tuple[int, ...]
    """Lengths in buckets."""

    @classmethod
    def build(
        cls,
        user_P: Ints,
        item_P: Ints,
        time_us_P: Ints,
        num_rows: int,
        config: TowerConfig,
        *,
        bucket_s: int | None = None,
        until_us: int | None = None,
    ) -> Self:
        """user_P, item_P, time_us_P: positive events, users one after another, each oldest event first.

        item_P: in [0, num_rows). bucket_s: instead of the config's. until_us: the latest time that can be asked for
        without standing for the log's end, which it is where left out.
        """
        bucket_us = (bucket_s or config.live_bucket_s) * _SECOND_US
        origin_us = int(time_us_P.min()) // bucket_us * bucket_us if len(time_us_P) else 0
        bucket_P = (time_us_P - origin_us) // bucket_us
        span = int(bucket_P.max(initial=0)) + 2
        if until_us is not None:
            span = max(span, (until_us - origin_us) // bucket_us + 1)
        follows_P = np.zeros(len(user_P), bool)
        follows_P[1:] = (user_P[1:] == user_P[:-1]) & (np.diff(time_us_P) <= _FOLLOW_US)
        second = np.flatnonzero(follows_P)
        pair_P = item_P[second - 1] * num_rows + item_P[second]
        distinct = np.unique(pair_P)
        return cls(
            items=CountIndex.build(item_P, bucket_P, span),
            pairs=CountIndex.build(pair_P, bucket_P[second], span),
            sources=CountIndex.build(item_P[second - 1], bucket_P[second], span),
            seen=CountIndex.build(user_P * num_rows + item_P, bucket_P, span),
            item_P=torch.from_numpy(item_P[np.argsort(bucket_P, kind="stable")]),
            before_Q=torch.from_numpy(np.searchsorted(np.sort(bucket_P), np.arange(span + 1))),
            follower_S=torch.from_numpy(distinct % num_rows),
            follower_offsets_I=torch.from_numpy(np.searchsorted(distinct // num_rows, np.arange(num_rows + 1))),
            num_rows=num_rows,
            origin_us=origin_us,
            bucket_us=bucket_us,
            windows=tuple(round(hours * 3600 * _SECOND_US / bucket_us) for hours in config.live_windows_h),
        )

    def to(self, device: torch.device | str) -> Self:
        """The same counts on a device."""
        moved: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in moved.items():
            if isinstance(value, CountIndex):
                moved[name] = CountIndex(value.place_P.to(device), value.span)
            elif isinstance(value, torch.Tensor):
                moved[name] = value.to(device)
        return type(self)(**moved)

    def bucket(self, time_us: torch.Tensor) -> torch.Tensor:
        """Bucket of a time, the first whose events a request of that time does not see. i64, the same shape.

        A time after the log's end is taken for its last bucket.
        """
        found = torch.div(time_us - self.origin_us, self.bucket_us, rounding_mode="floor")
        return found.clamp(0, self.items.span - 1)

    def length_of(self, hours: float) -> int:
        """Buckets in so many hours, at least 1."""
        return max(1, round(hours * 3600 * _SECOND_US / self.bucket_us))

    def total(self, bucket: torch.Tensor, length: int | None = None) -> torch.Tensor:
        """Events of all items in the `length` buckets before the given one, None for all before."""
        low = torch.zeros_like(bucket) if length is None else (bucket - length).clamp(min=0)
        return self.before_Q[bucket] - self.before_Q[low]

    def item_features(self, item: torch.Tensor, bucket: torch.Tensor) -> torch.Tensor:
        """What is counted of items as of buckets: f32 [..., F].

        item: i64 in [0, I). bucket: i64, of a shape that broadcasts to it. For each window and for the whole past:
        log(1 + count) and log((1 + count) / (1 + count of all items)); then whether the item has had an event, and
        log(1 + buckets since the first).
        """
        high, first = self.items.before(item, bucket), self.items.before(item, torch.zeros_like(bucket))
        parts = []
        for length in (*self.windows, None):
            low = first if length is None else self.items.before(item, bucket - length)
            log_count = torch.log1p((high - low).float())
            parts += [log_count, log_count - torch.log1p(self.total(bucket, length).float())]
        is_there = high > first
        place = self.items.place_P[first.clamp(max=max(len(self.items.place_P) - 1, 0))]
        age = torch.log1p((bucket - place % self.items.span).clamp(min=0).float()) * is_there
        return torch.stack([*parts, is_there.float(), age], -1)

    def pair_features(self, source: torch.Tensor, item: torch.Tensor, bucket: torch.Tensor) -> torch.Tensor:
        """What is counted of one item following another as of buckets: f32 [..., 4]; all zero where it never did.

        item: i64 in [0, I). source, bucket: i64, of shapes that broadcast to it. log(1 + count) and
        log((1 + count) / (1 + count of all followers)), for the last hours and for the whole past; the last value but
        one is log(1 + count) of the latter.
        """
        pair = source * self.num_rows + item
        parts = []
        for length in (self.length_of(_FOLLOW_HOURS), None):
            log_count = torch.log1p(self.pairs.since(pair, bucket, length).float())
            parts += [log_count, log_count - torch.log1p(self.sources.since(source, bucket, length).float())]
        return torch.stack(parts, -1) * (parts[2] > 0)[..., None]

    def followers(self, source_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All items that ever follow given ones, to be counted: (position in source_B, item), each i64 [R].

        A negative source has none.
        """
        row_B = source_B.clamp(min=0)
        length_B = (self.follower_offsets_I[row_B + 1] - self.follower_offsets_I[row_B]) * (source_B >= 0)
        position_R = torch.repeat_interleave(torch.arange(len(source_B), device=source_B.device), length_B)
        start_B = self.follower_offsets_I[row_B] - (length_B.cumsum(0) - length_B)
        place_R = torch.arange(len(position_R), device=source_B.device) + start_B[position_R]
        return position_R, self.follower_S[place_R]

    def draw(
        self, bucket_B: torch.Tensor, drawn: torch.Tensor, num_draws: int, hours: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Negatives of targets, and how often they were to be expected.

        Returns (items i64 [B, M], as `draw_items`; log of how often each item was expected among the M draws).
        """
        item_BM = self.draw_items(bucket_B, drawn, num_draws, hours)
        return item_BM, torch.log(self.expected_draws(item_BM, bucket_B, drawn, num_draws, hours)).float()

    def draw_items(self, bucket_B: torch.Tensor, drawn: torch.Tensor, num_draws: int, hours: float) -> torch.Tensor:
        """Negatives of targets, i64 [B, M]: half events of the `hours` before, half uniform among given rows.

        drawn: i64, those rows. Where those hours have no event, all draws are uniform.
        """
        size, length = len(bucket_B), self.length_of(hours)
        recent = num_draws // 2
        low_B1, total_B1 = (
            self.before_Q[(bucket_B - length).clamp(min=0)][:, None],
            self.total(bucket_B, length)[:, None],
        )
        device = bucket_B.device
        place_BM = low_B1 + (torch.rand(size, recent, device=device, dtype=torch.float64) * total_B1).long()
        uniform_BM = drawn[torch.randint(len(drawn), (size, num_draws), device=device)]
        recent_BM = self.item_P[place_BM.clamp(max=len(self.item_P) - 1)]
        recent_BM = torch.where(total_B1 > 0, recent_BM, uniform_BM[:, :recent])
        return torch.cat([recent_BM, uniform_BM[:, recent:]], 1)

    def expected_draws(
        self, item_BM: torch.Tensor, bucket_B: torch.Tensor, drawn: torch.Tensor, num_draws: int, hours: float
    ) -> torch.Tensor:
        """How often any items are expected among the draws of `draw_items`: f32 [B, M]."""
        length, recent = self.length_of(hours), num_draws // 2
        total_B1 = self.total(bucket_B, length)[:, None]
        count_BM = self.items.since(item_BM, bucket_B[:, None].expand_as(item_BM), length)
        share_I = torch.zeros(self.num_rows, device=item_BM.device)
        share_I[drawn] = 1.0 / len(drawn)
        from_recent = torch.where(total_B1 > 0, recent, 0) * count_BM / total_B1.clamp(min=1)
        from_uniform = torch.where(total_B1 > 0, num_draws - recent, num_draws) * share_I[item_BM]
        return from_recent + from_uniform


class LiveItems(nn.Module):
    """Counts to the live part of item vectors, and to what an item gains by following the request's latest items."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        num_features = 2 * (len(config.live_windows_h) + 1) + 2 + 1
        self.num_recent, self.width = config.live_recent, config.live_dim
        self.phi = nn.Sequential(nn.Linear(num_features, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, config.live_dim))
        self.shortcut = nn.Linear(num_features, config.live_dim, bias=False)
        num_inputs = num_features + 4 + 1 + config.live_recent
        self.pair = nn.Sequential(nn.Linear(num_inputs, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 1))
        self.pair_shortcut = nn.Linear(num_inputs, 1, bias=False)
        self.had = nn.Parameter(torch.tensor(4.0))  # e^4: had lately, an item is as good as one with 50 times less
        with torch.no_grad():
            # begin as a count: the first value of phi is the log count of the shortest window, that of psi is 1
            for value in (*self.phi[-1].parameters(), *self.pair[-1].parameters()):
                value.zero_()
            self.shortcut.weight.zero_()
            self.shortcut.weight[0, 0] = _SCALE
            # and as a blend: softplus(log(share of followers) - log(share of all)) is what makes log(the latter) the
            # log of their sum; less for what was clicked before the latest
            self.pair_shortcut.weight.zero_()
            self.pair_shortcut.weight[0, 1] = -_SCALE
            self.pair_shortcut.weight[0, num_features + 1 : num_features + 4 : 2] = _SCALE / 2
            self.pair_shortcut.weight[0, num_features + 6 :] = -2.0

    def forward(self, feature: torch.Tensor, is_known: torch.Tensor) -> torch.Tensor:
        """phi. feature: f32 [..., F], from item_features. is_known: bool [...], see ItemTower. Returns f32 [..., L]."""
        inputs = _joined(feature, is_known)
        vector: torch.Tensor = self.phi(inputs) + self.shortcut(inputs)
        return vector

    def follows(
        self,
        pair: torch.Tensor,
        feature: torch.Tensor,
        is_known: torch.Tensor,
        log_gap: torch.Tensor,
        place: torch.Tensor,
    ) -> torch.Tensor:
        """What items gain by following one of the request's latest items, as logits: f32 [...], at least 0.

        pair: f32 [..., 4], from pair_features. feature, is_known: of the following item. log_gap: f32 [...], log of 1 +
        seconds since the item followed. place: i64 [...] in [0, K), 0 for the latest. Zero where it never followed.
        """
        latest = F.one_hot(place, self.num_recent).float()
        inputs = torch.cat([_joined(feature, is_known), pair / _SCALE, log_gap[..., None] / _SCALE, latest], -1)
        gain: torch.Tensor = F.softplus((self.pair(inputs) + self.pair_shortcut(inputs))[..., 0])
        return gain * (pair[..., 2] > 0)


def _joined(feature: torch.Tensor, is_known: torch.Tensor) -> torch.Tensor:
    return torch.cat([feature / _SCALE, is_known[..., None].float()], -1)


@dataclass(frozen=True, slots=True)
class LiveRequests:
    """What the live part asks of requests."""

    bucket_B: torch.Tensor
    recent_BK: torch.Tensor
    """i64 [B, K], rows of the latest items since the last refresh, latest first; -1 for none. The first live_recent of
    them are followed, all count as had."""
    log_gap_BK: torch.Tensor
    """f32 [B, K], log of 1 + seconds since."""

    def to(self, device: torch.device | str) -> "LiveRequests":
        """The same requests on a device."""
        return LiveRequests(self.bucket_B.to(device), self.recent_BK.to(device), self.log_gap_BK.to(device))

    def without_recent(self) -> "LiveRequests":
        """The same requests, nothing known of the latest items."""
        return LiveRequests(self.bucket_B, torch.full_like(self.recent_BK, -1), self.log_gap_BK)

    @classmethod
    def joined(cls, parts: Sequence["LiveRequests"]) -> "LiveRequests":
        """Requests one part after another."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def rows(self, index: slice | torch.Tensor) -> "LiveRequests":
        """Some of the requests."""
        return LiveRequests(self.bucket_B[index], self.recent_BK[index], self.log_gap_BK[index])


def live_logits(
    live: LiveItems,
    counts: LiveCounts,
    requests: LiveRequests,
    psi_BL: torch.Tensor,
    item_BM: torch.Tensor,
    is_known_BM: torch.Tensor,
) -> torch.Tensor:
    """psi . phi + follows - had of given items for each request: f32 [B, M].

    psi_BL: logits, that is divided by the temperature. item_BM: i64 in [0, I).
    """
    bucket_B1 = requests.bucket_B[:, None]
    feature_BMF = counts.item_features(item_BM, bucket_B1)
    logit_BM = torch.einsum("bl,bml->bm", psi_BL, live(feature_BMF, is_known_BM))
    for k in range(live.num_recent):
        source_B1 = requests.recent_BK[:, k : k + 1]
        pair = counts.pair_features(source_B1.clamp(min=0), item_BM, bucket_B1) * (source_B1 >= 0)[..., None]
        b, m = torch.nonzero(pair[..., 2], as_tuple=True)
        gain = live.follows(
            pair[b, m], feature_BMF[b, m], is_known_BM[b, m], requests.log_gap_BK[b, k], torch.full_like(b, k)
        )  # fmt: skip
        logit_BM = logit_BM.index_put((b, m), gain, accumulate=True)
    had_BM = (item_BM[:, :, None] == requests.recent_BK[:, None, :]).any(-1)
    return logit_BM - live.had * had_BM


@torch.inference_mode()
def catalogue_logits(
    live: LiveItems, counts: LiveCounts, requests: LiveRequests, psi_BL: torch.Tensor, is_known_N: torch.Tensor
) -> torch.Tensor:
    """The same for the whole catalogue, items 0 to N - 1: f32 [B, N].

    The catalogue's features are made once for each bucket that the requests have.
    """
    num_items = len(is_known_N)
    bucket_G, group_B = torch.unique(requests.bucket_B, return_inverse=True)
    item_GN = torch.arange(num_items, device=psi_BL.device).expand(len(bucket_G), num_items)
    feature_GNF = counts.item_features(item_GN, bucket_G[:, None])
    phi_GNL = live(feature_GNF, is_known_N.expand(len(bucket_G), num_items))
    logit_BN = psi_BL @ phi_GNL[0].T if len(bucket_G) == 1 else torch.einsum("bl,bnl->bn", psi_BL, phi_GNL[group_B])
    for k in range(live.num_recent):
        b, item = counts.followers(requests.recent_BK[:, k])
        b, item = b[item < num_items], item[item < num_items]
        pair = counts.pair_features(requests.recent_BK[b, k], item, requests.bucket_B[b])
        gain = live.follows(
            pair, feature_GNF[group_B[b], item], is_known_N[item], requests.log_gap_BK[b, k], torch.full_like(b, k)
        )  # fmt: skip
        logit_BN.index_put_((b, item), gain, accumulate=True)
    b, place = torch.nonzero((requests.recent_BK >= 0) & (requests.recent_BK < num_items), as_tuple=True)
    had_BN = torch.zeros_like(logit_BN, dtype=torch.bool)
    had_BN[b, requests.recent_BK[b, place]] = True
    return logit_BN - live.had * had_BN


def time_chunks(bucket_B: Ints, most_requests: int, most_buckets: int) -> Iterator[Ints]:
    """Positions of requests in the order of their buckets, so many at a time, of at most so many buckets."""
    order = np.argsort(bucket_B, kind="stable")
    bucket_of = np.cumsum(np.diff(bucket_B[order], prepend=bucket_B[order[:1]]) > 0)  # numbered from 0
    start = 0
    while start < len(order):
        end = min(start + most_requests, int(np.searchsorted(bucket_of, bucket_of[start] + most_buckets)))
        yield order[start:end]
        start = end
