"""Two-level retrieval, for catalogues that one exact pass is too slow for: int8 codes first, then exact rows.

    1. threshold   a fixed random sample of the codes is scored; the value that lets about `wanted` rows of all pass
    2. survivors   one pass over all codes keeps the rows that reach it, for a whole batch of requests at once and
                   without writing a score; or, with clusters, a pass over each request's nearest `probes` clusters
    3. exact       the survivors' exact rows are scored: by a dot product in float32, or by a scorer of `scorer.py`
    4. selection   filters, caps, exploration and top-k over the survivors, as in `select.py`

Exact rows may be split: the head's lie in the device's memory, the tail's in page-locked host memory, where kernels
read them over the bus; only survivors are read.

What the first level may lose is told. A coarse score is off by at most |u| |x - x'| + |u - u'| |x'| (Cauchy-Schwarz;
u' and x' are what the codes of user and item stand for). Where the last result of a dot product beats the threshold by
more than that, nothing that was left out can belong to the answer, and `is_certain_B` says so. `search(exact=True)`
lowers the threshold until it does.

The first level looks at scores, not at utilities, and the sample knows no filters: bids and filters that turn the order
over want a larger `wanted`. An index is a snapshot: build a new one and swap it in to change rows.

Legend: as in the package; W width of a code, M rows of the sample, C places for survivors, G clusters, P probes.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import nn

from model.errors import ConfigError, ShapeError
from model.retrieval.index import Columns
from model.retrieval.rows import ItemRows, Layout, check_version
from model.retrieval.rules import Plan, Requests
from model.retrieval.select import NOT_ALLOWED, ROUNDS, drawn, first_places, first_pool, walk_keys, within_caps

LEAST_WANTED = 2048
WANTED_PER_RESULT = 4
"""Survivors wanted at first, for each item the walk has to find."""
ROOM = 2
"""Places for survivors, in survivors wanted: how many pass is an estimate."""
WIDENINGS = 3
"""Times that `search` lowers the threshold, each to four times the survivors, before it answers with what there is."""
SAMPLE_ROWS, SAMPLE_SHARE = 65_536, 128
"""The sample is the larger of so many rows and this part of all."""
PADDING = 256
"""Codes are padded to whole tiles of any kernel, and by one tile more, which a cluster's last may reach into."""
PIECE = 2**20
"""Rows converted at a time."""
LEAST_WIDTH = 32
MOST_GROUP = 64
GROUPS_PER_RANK = 32
ROWS_PER_CLUSTER, ITERATIONS = 64, 8
"""k-means: rows it learns from for each cluster, and rounds."""
SLACK = 1e-5
"""Of rounding in float32, relative to the lengths of the vectors, in the bound on coarse scores."""


@dataclass(frozen=True, slots=True)
class ExactRows:
    """The items' exact features, in one memory or two."""

    head_HF: torch.Tensor
    """float, on the device."""
    tail_TF: torch.Tensor | None = None
    """The same dtype, in page-locked host memory where the device is a GPU; None: all rows are in the head."""
    slot_N: torch.Tensor | None = None
    """i32, where each row is: below H in the head, from H on in the tail."""

    @classmethod
    def split(cls, feature_NF: torch.Tensor, is_head_N: torch.Tensor | None) -> "ExactRows":
        """is_head_N: bool, on the features' device; None: all of them, without a copy."""
        if is_head_N is None or bool(is_head_N.all()):
            return cls(feature_NF)
        head, tail = is_head_N.nonzero()[:, 0], (~is_head_N).nonzero()[:, 0]
        tail_TF = torch.empty(
            len(tail), feature_NF.shape[1], dtype=feature_NF.dtype, pin_memory=feature_NF.device.type == "cuda"
        )
        for start in range(0, len(tail), PIECE):
            tail_TF[start : start + PIECE] = feature_NF[tail[start : start + PIECE]]
        slot_N = torch.empty(len(feature_NF), dtype=torch.int32, device=feature_NF.device)
        slot_N[torch.cat([head, tail])] = torch.arange(len(slot_N), dtype=torch.int32, device=slot_N.device)
        return cls(feature_NF[head], tail_TF, slot_N)

    def rows(self, row_BC: torch.Tensor) -> torch.Tensor:
        """[B, C, F]: the features of rows, zeros for row -1. On the CPU."""
        row = row_BC.clamp_min(0).long()
        if self.tail_TF is None or self.slot_N is None:
            feature_BCF = self.head_HF[row]
        else:
            slot, heads = self.slot_N[row].long(), len(self.head_HF)
            is_head = slot < heads
            feature_BCF = self.head_HF.new_empty(*slot.shape, self.head_HF.shape[1])
            feature_BCF[is_head] = self.head_HF[slot[is_head]]
            feature_BCF[~is_head] = self.tail_TF[slot[~is_head] - heads]
        return feature_BCF.masked_fill((row_BC < 0)[..., None], 0)


@dataclass(frozen=True, slots=True)
class Steps:
    """The steps that have a kernel of their own; the meaning is that of `PLAIN`."""

    sample_best: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
    scan: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    probe: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    dots: Callable[[ExactRows, torch.Tensor, torch.Tensor], torch.Tensor]
    gather: Callable[[ExactRows, torch.Tensor], torch.Tensor]


class TwoLevelFound(NamedTuple):
    """Slates of a batch, best first; places past `length_B` hold row -1 and utility -inf."""

    row_BK: torch.Tensor
    utility_BK: torch.Tensor
    length_B: torch.Tensor
    is_complete_B: torch.Tensor
    """All survivors had a place, and the walk over them found all that was asked, or all there is."""
    is_certain_B: torch.Tensor
    """Proven to be what a search of all rows would answer."""
    survivors_B: torch.Tensor
    """i32: rows that passed the first level."""


class TwoLevelIndex(nn.Module):
    """A snapshot of a catalogue, searched in two levels. Any number of threads may search."""

    code_NW: torch.Tensor
    scale_N: torch.Tensor
    sample_code_MW: torch.Tensor
    sample_scale_M: torch.Tensor
    row_N: torch.Tensor | None
    """i32: the row at each place of the codes; None: the place itself."""
    centroid_GE: torch.Tensor | None
    start_G: torch.Tensor | None
    """i64 [G + 1]: first place of each cluster."""

    def __init__(
        self, embedding_version: str, feature_NF: torch.Tensor, *, embedding_dim: int | None = None,
        scorer: nn.Module | None = None, clusters: int = 0, is_head_N: torch.Tensor | None = None,
        layout: Layout | None = None, columns: Columns | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        """feature_NF: float, embeddings and then scalars, on the device that searches; kept as it is where all is head.

        embedding_dim: E of the F columns; by default all. scorer: of the survivors; None: dot product in float32.
        clusters: of k-means, for searches that probe; 0: none. is_head_N: bool, whose exact rows stay on the device.
        layout, columns: what filters, caps and bids read, for searches with requests; rows that are not eligible never
        survive.
        Raises ShapeError, ConfigError, and IndexMismatch for a scorer of a release of another embedding_version.
        """
        super().__init__()
        rows, width = feature_NF.shape
        self.embedding_version, self.layout, self.columns = embedding_version, layout, columns
        if (version := getattr(scorer, "embedding_version", None)) is not None:
            check_version("a scorer", version, embedding_version)
        self.embedding_dim = width if embedding_dim is None else embedding_dim
        if not 1 <= self.embedding_dim <= width or not feature_NF.dtype.is_floating_point or not rows:
            raise ShapeError(
                f"wanted rows of {self.embedding_dim} float values and scalars, got {list(feature_NF.shape)} of "
                f"{feature_NF.dtype}"
            )
        if (layout is None) != (columns is None):
            raise ConfigError("rules need both layout and columns")
        if not 0 <= clusters <= rows:
            raise ConfigError(f"clusters must be in [0, {rows}], got {clusters}")
        self.rows = rows
        self.scorer = None if scorer is None else copy.deepcopy(scorer).to(feature_NF.device).eval()
        self.exact = ExactRows.split(feature_NF, is_head_N)
        embedding_NE = feature_NF[:, : self.embedding_dim]
        self.steps = steps_for(feature_NF.device)
        row_N: torch.Tensor | None = None
        centroid_GE: torch.Tensor | None = None
        start_G: torch.Tensor | None = None
        if clusters:
            centroid_GE, cluster_N = clustered(embedding_NE, clusters, seed)
            row_N = cluster_N.sort(stable=True).indices.int()
            start_G = torch.zeros(clusters + 1, dtype=torch.int64, device=feature_NF.device)
            start_G[1:] = cluster_N.bincount(minlength=clusters).cumsum(0)
        self.register_buffer("row_N", row_N)
        self.register_buffer("centroid_GE", centroid_GE)
        self.register_buffer("start_G", start_G)
        eligible_N = None if columns is None else columns.eligible_N
        code_NW, scale_N, self.code_error, self.code_length = _codes(embedding_NE, row_N, eligible_N)
        self.register_buffer("code_NW", code_NW)
        self.register_buffer("scale_N", scale_N)
        place_M = _sample(rows, seed).to(feature_NF.device)
        sample_code_MW, sample_scale_M = _padded(code_NW[place_M], scale_N[place_M])
        self.register_buffer("sample_code_MW", sample_code_MW)
        self.register_buffer("sample_scale_M", sample_scale_M)
        self.sampled = len(place_M)

    @classmethod
    def of_rows(
        cls, rows: ItemRows, *, dtype: torch.dtype = torch.float32, device: Any = "cpu", **options: Any
    ) -> "TwoLevelIndex":
        """An index of a batch of rows, with their rules. options: as in the constructor."""
        columns = Columns(
            torch.zeros(len(rows), 0), rows.mask_RW, rows.category_R, rows.advertiser_R, rows.attribute_RA, rows.bid_R,
            rows.budget_R, rows.eligible_R,
        )  # fmt: skip
        columns = Columns(*(getattr(columns, column.name).to(device) for column in fields(Columns)))
        return cls(
            rows.embedding_version, rows.feature_RF.to(device, dtype), embedding_dim=rows.layout.embedding_dim,
            layout=rows.layout, columns=columns, **options,
        )  # fmt: skip

    def search(
        self, user_BE: torch.Tensor, plan: Plan, requests: Requests | None = None, *, embedding_version: str,
        probes: int = 0, wanted: int | None = None, exact: bool = False,
    ) -> TwoLevelFound:  # fmt: skip
        """The slates of a batch; the threshold is lowered while one is not complete or, where asked, not certain.

        user_BE: float [B, E]. requests: on this device, their rows those of the index; None: no rules.
        probes: clusters to look into; 0: all rows. wanted: survivors to begin with. exact: only certain answers, for
        dot products without bids and probes.
        Raises IndexMismatch for users of another version, ShapeError, ConfigError.
        """
        check_version("a request", embedding_version, self.embedding_version)
        if exact and (probes or self.scorer is not None):
            raise ConfigError("only dot products over all rows can be certain: exact wants no probes and no scorer")
        wanted = first = default_wanted(plan) if wanted is None else wanted
        with torch.inference_mode():
            while True:
                found: TwoLevelFound = self(user_BE, plan, requests, wanted=wanted, probes=probes)
                is_done_B = found.is_certain_B if exact else found.is_complete_B
                is_last = wanted >= self.rows or not (exact or wanted < first * 4**WIDENINGS)
                if is_last or bool(is_done_B.all()):
                    return found
                wanted *= 4

    def forward(
        self, user_BE: torch.Tensor, plan: Plan, requests: Requests | None = None, *, wanted: int, probes: int = 0
    ) -> TwoLevelFound:
        """One pass of fixed shape, without waiting for the device: it may be captured as a CUDA graph. See `search`."""
        self._check(user_BE, plan, requests, probes)
        user_BE = user_BE.float()
        capacity = self.rows if wanted >= self.rows else min(self.rows, wanted * ROOM)
        code_BW, scale_B = quantised(user_BE, self.code_NW.shape[1])
        threshold_B = self.thresholds(code_BW, wanted)
        if probes:
            start_BP, size_BP = self._nearest(user_BE, probes)
            row_BC, count_B = self.steps.probe(
                self.code_NW, self.scale_N, self.row_N, code_BW, threshold_B, start_BP, size_BP, capacity
            )
        else:
            row_BC, count_B = self.steps.scan(self.code_NW, self.scale_N, self.row_N, code_BW, threshold_B, capacity)
        utility_BC = self._utilities(user_BE, row_BC, requests)
        is_kept_B = count_B <= capacity
        has_all_B = threshold_B.isneginf() & is_kept_B & (probes == 0)
        bound_B = self._bound(user_BE, code_BW, scale_B, threshold_B)
        if self.scorer is not None or probes:
            bound_B = torch.full_like(bound_B, torch.inf)
        elif requests is not None:
            is_plain_B = (requests.bid_power_B == 0) & (requests.weight_BT == 1).all(1)
            bound_B = torch.where(is_plain_B, bound_B, torch.inf)
        return self._select(utility_BC, row_BC, plan, requests, is_kept_B, has_all_B, bound_B, count_B)

    def thresholds(self, code_BW: torch.Tensor, wanted: int) -> torch.Tensor:
        """f32 [B]: the coarse score, before the user's scale, that about `wanted` rows reach; -inf lets all pass.

        The best of each group of the sample stands for its rows: of the few best of all, hardly two are in one group.
        """
        rank = max(1, round(wanted * self.sampled / self.rows))
        group = 1
        while group < MOST_GROUP and len(self.sample_scale_M) // (2 * group) >= GROUPS_PER_RANK * rank:
            group *= 2
        best_BG = self.steps.sample_best(self.sample_code_MW, self.sample_scale_M, code_BW, group)
        if wanted >= self.rows or rank > best_BG.shape[1]:
            return torch.full_like(best_BG[:, 0], -torch.inf)
        return best_BG.topk(rank, dim=1).values[:, -1].contiguous()

    def _check(self, user_BE: torch.Tensor, plan: Plan, requests: Requests | None, probes: int) -> None:
        if user_BE.dim() != 2 or user_BE.shape[1] != self.embedding_dim or not len(user_BE):
            raise ShapeError(f"users must have shape [B, {self.embedding_dim}], got {list(user_BE.shape)}")
        if requests is not None and (self.columns is None or len(requests) != len(user_BE)):
            raise ShapeError(f"wanted an index with rules and {len(user_BE)} requests, got {len(requests)}")
        if requests is None and (plan.caps or plan.explored):
            raise ConfigError("caps and exploration want requests")
        clusters = 0 if self.centroid_GE is None else len(self.centroid_GE)
        if not 0 <= probes <= clusters:
            raise ConfigError(f"probes must be in [0, {clusters}], the index's clusters, got {probes}")

    def _nearest(self, user_BE: torch.Tensor, probes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """First place and size of each user's nearest clusters, i64 [B, P]."""
        assert self.centroid_GE is not None
        assert self.start_G is not None
        cluster_BP = (user_BE @ self.centroid_GE.T).topk(probes, dim=1).indices
        start_BP = self.start_G[cluster_BP]
        return start_BP, self.start_G[cluster_BP + 1] - start_BP

    def _utilities(self, user_BE: torch.Tensor, row_BC: torch.Tensor, requests: Requests | None) -> torch.Tensor:
        """f32 [B, C]; what it is for row -1 is left open."""
        score_BTC: torch.Tensor
        if self.scorer is None:
            score_BTC = self.steps.dots(self.exact, row_BC, user_BE)[:, None]
        else:
            # A scorer takes the same items for all users; here each user has its own.
            one = self.scorer
            score_BTC = torch.func.vmap(lambda user_E, feature_CF: one(user_E[None], feature_CF)[0])(
                user_BE, self.steps.gather(self.exact, row_BC)
            )
        utility_BC: torch.Tensor
        if requests is None or self.columns is None:
            utility_BC = score_BTC[:, 0]
            return utility_BC
        if score_BTC.shape[1] != requests.weight_BT.shape[1]:
            raise ShapeError(
                f"the scorer has {score_BTC.shape[1]} tasks, the requests weigh {requests.weight_BT.shape[1]}"
            )
        factor_BC = self.columns.bid_N[row_BC.clamp_min(0)].double() ** requests.bid_power_B[:, None]
        utility_BC = (score_BTC * requests.weight_BT[:, :, None]).sum(1).float() * factor_BC.float()
        return utility_BC

    def _bound(
        self, user_BE: torch.Tensor, code_BW: torch.Tensor, scale_B: torch.Tensor, threshold_B: torch.Tensor
    ) -> torch.Tensor:
        """f32 [B]: no row below the threshold has an exact score above this."""
        coded_BE = code_BW[:, : self.embedding_dim].float() * scale_B[:, None]
        length_B, off_B = user_BE.norm(dim=1), (user_BE - coded_BE).norm(dim=1)
        error_B = length_B * self.code_error + off_B * self.code_length
        bound_B: torch.Tensor = threshold_B * scale_B + error_B + SLACK * length_B * self.code_length
        return bound_B

    def _select(
        self, utility_BC: torch.Tensor, row_BC: torch.Tensor, plan: Plan, requests: Requests | None,
        is_kept_B: torch.Tensor, has_all_B: torch.Tensor, bound_B: torch.Tensor, count_B: torch.Tensor,
    ) -> TwoLevelFound:  # fmt: skip
        """`select.select` over each request's own rows."""
        capacity = row_BC.shape[1]
        allowed_BC = row_BC >= 0 if requests is None else self._allowed(row_BC, requests)
        pool = first_pool(plan, capacity)
        top = walk_keys(utility_BC, allowed_BC, row_BC.long()).topk(pool, dim=1)
        row_BP, is_allowed_BP = row_BC.gather(1, top.indices).long(), top.values != NOT_ALLOWED
        columns = self.columns
        group_N = {} if columns is None else {"advertiser": columns.advertiser_N, "category": columns.category_N}
        groups = [(group_N[name][row_BP.clamp_min(0)], cap) for name, cap in plan.caps.items()]
        take_BP, is_settled_BP = within_caps(is_allowed_BP, groups, ROUNDS)
        pool_has_all_B = ~is_allowed_BP[:, -1] | (pool == capacity)
        found_B = (take_BP & is_settled_BP).sum(1) >= plan.walked
        is_complete_B = is_kept_B & (found_B | (has_all_B & pool_has_all_B & is_settled_BP.all(1)))
        place_BQ, is_taken_BQ = first_places(take_BP, plan.walked)
        utility_BQ = utility_BC.gather(1, top.indices.gather(1, place_BQ)).masked_fill(~is_taken_BQ, -torch.inf)
        row_BQ = row_BP.gather(1, place_BQ)
        is_certain_B = is_complete_B & (has_all_B | (utility_BQ[:, -1] > bound_B))
        if plan.explored and requests is not None:
            is_taken_BQ = drawn(row_BQ, is_taken_BQ, requests.seed_B, plan)
            place_BK, is_taken_BK = first_places(is_taken_BQ, plan.k)
            row_BK, utility_BK = row_BQ.gather(1, place_BK), utility_BQ.gather(1, place_BK)
        else:
            row_BK, utility_BK, is_taken_BK = row_BQ, utility_BQ, is_taken_BQ
        return TwoLevelFound(
            row_BK.masked_fill(~is_taken_BK, -1), utility_BK.masked_fill(~is_taken_BK, -torch.inf),
            is_taken_BK.sum(1), is_complete_B, is_certain_B, count_B,
        )  # fmt: skip

    def _allowed(self, row_BC: torch.Tensor, requests: Requests) -> torch.Tensor:
        """bool [B, C]: `Retrieval.allowed`, of each request's own rows."""
        assert self.columns is not None
        assert self.layout is not None
        columns, row = self.columns, row_BC.clamp_min(0).long()
        allowed_BC = (row_BC >= 0) & columns.eligible_N[row] & (columns.budget_N[row] >= requests.min_budget_B[:, None])
        for start, end in self.layout.spans():
            asks_B = torch.zeros(len(requests), dtype=torch.bool, device=row.device)
            has_BC = torch.zeros_like(allowed_BC)
            for word in range(start, end):
                mask_BC = columns.mask_NW[row, word]
                asks_B = asks_B | (requests.required_BW[:, word] != 0)
                has_BC = has_BC | ((mask_BC & requests.required_BW[:, word, None]) != 0)
                allowed_BC = allowed_BC & ((mask_BC & requests.forbidden_BW[:, word, None]) == 0)
            allowed_BC = allowed_BC & (has_BC | ~asks_B[:, None])
        for attribute in range(self.layout.attributes):
            value_BC = columns.attribute_NA[row, attribute]
            lower_B, upper_B = requests.lower_BA[:, attribute, None], requests.upper_BA[:, attribute, None]
            is_open_B = lower_B.isneginf() & upper_B.isposinf()
            allowed_BC = allowed_BC & (((value_BC >= lower_B) & (value_BC <= upper_B)) | is_open_B)
        if len(requests.excluded_X):
            place_X = (requests.excluded_of_X * self.rows + requests.excluded_X).sort().values
            place_BC = torch.arange(len(row), device=row.device)[:, None] * self.rows + row
            at_BC = torch.searchsorted(place_X, place_BC).clamp_max(len(place_X) - 1)
            allowed_BC = allowed_BC & (place_X[at_BC] != place_BC)
        return allowed_BC


def default_wanted(plan: Plan) -> int:
    """Survivors to begin with."""
    return max(LEAST_WANTED, WANTED_PER_RESULT * plan.walked)


# Codes


def quantised(value_NE: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """i8 [N, width], zeros past E, and f32 [N]: codes and the scale of each row, value = code * scale within scale / 2.

    value_NE: f32.
    """
    largest_N = value_NE.abs().amax(1)
    scale_N = torch.where(largest_N > 0, largest_N / 127, 1.0)
    code_NW = torch.zeros(len(value_NE), width, dtype=torch.int8, device=value_NE.device)
    code_NW[:, : value_NE.shape[1]] = (value_NE / scale_N[:, None]).round().clamp(-127, 127).to(torch.int8)
    return code_NW, scale_N


def _codes(
    embedding_NE: torch.Tensor, row_N: torch.Tensor | None, eligible_N: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """Codes and scales in the order of row_N, padded; the largest length of an error, and of what codes stand for."""
    rows, dim = embedding_NE.shape
    device = embedding_NE.device
    width = max(LEAST_WIDTH, 1 << (dim - 1).bit_length())
    padded = (-(-rows // PADDING) + 1) * PADDING
    code_NW = torch.zeros(padded, width, dtype=torch.int8, device=device)
    scale_N = torch.full((padded,), torch.nan, device=device)
    error, length = torch.zeros((), device=device), torch.zeros((), device=device)
    for start in range(0, rows, PIECE):
        piece = slice(start, min(rows, start + PIECE))
        row_R = torch.arange(piece.start, piece.stop, device=device) if row_N is None else row_N[piece].long()
        value_RE = embedding_NE[row_R].float()
        code_RW, scale_R = quantised(value_RE, width)
        coded_RE = code_RW[:, :dim].float() * scale_R[:, None]
        error = torch.maximum(error, (value_RE - coded_RE).norm(dim=1).amax())
        length = torch.maximum(length, coded_RE.norm(dim=1).amax())
        code_NW[piece] = code_RW
        scale_N[piece] = scale_R if eligible_N is None else scale_R.masked_fill(~eligible_N[row_R], torch.nan)
    return code_NW, scale_N, float(error), float(length)


def _sample(rows: int, seed: int) -> torch.Tensor:
    """i64: places drawn at random, on the CPU so that every device draws the same; all of a small catalogue."""
    random = torch.Generator().manual_seed(seed)
    size = max(SAMPLE_ROWS, rows // SAMPLE_SHARE)
    return torch.randperm(rows, generator=random) if size >= rows else torch.randint(rows, (size,), generator=random)


def _padded(code_MW: torch.Tensor, scale_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    more = -len(code_MW) % PADDING
    code_MW = torch.cat([code_MW, code_MW.new_zeros(more, code_MW.shape[1])])
    return code_MW, torch.cat([scale_M, scale_M.new_full((more,), torch.nan)])


def clustered(embedding_NE: torch.Tensor, clusters: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """centroid_GE, f32 of length 1, and cluster_N, i64: spherical k-means, learned from a sample of the rows."""
    rows = len(embedding_NE)
    random = torch.Generator().manual_seed(seed)
    sample = torch.randint(rows, (min(rows, ROWS_PER_CLUSTER * clusters),), generator=random)
    value_SE = embedding_NE[sample.to(embedding_NE.device)].float()
    first = torch.randperm(len(sample), generator=random)[:clusters].to(value_SE.device)
    centroid_GE = torch.nn.functional.normalize(value_SE[first], dim=1)
    for _ in range(ITERATIONS):
        nearest_S = _nearest_centroid(value_SE, centroid_GE)
        # index_put adds in a fixed order on every device.
        sum_GE = torch.zeros_like(centroid_GE).index_put_((nearest_S,), value_SE, accumulate=True)
        is_there_G = nearest_S.bincount(minlength=clusters) > 0
        centroid_GE = torch.where(is_there_G[:, None], torch.nn.functional.normalize(sum_GE, dim=1), centroid_GE)
    return centroid_GE, _nearest_centroid(embedding_NE, centroid_GE)


def _nearest_centroid(value_NE: torch.Tensor, centroid_GE: torch.Tensor) -> torch.Tensor:
    """i64 [N]; on a GPU by products in bfloat16: a cluster is where an item is put, not what it is."""
    dtype = torch.bfloat16 if value_NE.is_cuda else torch.float32
    centroid_EG = centroid_GE.to(dtype).T
    pieces = torch.split(value_NE, max(1, 2**28 // len(centroid_GE)))
    return torch.cat([(piece.to(dtype) @ centroid_EG).argmax(1) for piece in pieces])


# The steps in plain PyTorch


def _coarse(code_NW: torch.Tensor, scale_N: torch.Tensor, user_BW: torch.Tensor) -> torch.Tensor:
    """f32 [N, B]: products of codes, exact, rounded to float32 once, times the rows' scales."""
    dtype = torch.float32 if code_NW.shape[1] * 127**2 < 2**24 else torch.float64
    return (code_NW.to(dtype) @ user_BW.to(dtype).T).float() * scale_N[:, None]


def sample_best(code_MW: torch.Tensor, scale_M: torch.Tensor, user_BW: torch.Tensor, group: int) -> torch.Tensor:
    """f32 [B, M / group]: best coarse score of each group of rows; -inf where the scale is NaN."""
    score_MB = _coarse(code_MW, scale_M, user_BW)
    score_MB = score_MB.masked_fill(score_MB.isnan(), -torch.inf)
    return score_MB.view(len(score_MB) // group, group, len(user_BW)).amax(1).T.contiguous()


def scan(
    code_NW: torch.Tensor, scale_N: torch.Tensor, row_N: torch.Tensor | None, user_BW: torch.Tensor,
    threshold_B: torch.Tensor, capacity: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """row_BC, i32: rows of coarse score at least threshold_B, -1 past them; count_B, i32: how many there are.

    row_N: i32, the row at each place; None: the place itself. A request of more than C = capacity rows has the first C.
    """
    kept: list[list[torch.Tensor]] = [[] for _ in threshold_B]
    for start in range(0, len(code_NW), PIECE // 16):
        piece = slice(start, start + PIECE // 16)
        keep_BR = (_coarse(code_NW[piece], scale_N[piece], user_BW) >= threshold_B).T
        for own, keep_R in zip(kept, keep_BR, strict=True):
            own.append(keep_R.nonzero()[:, 0] + start)
    return _lists([torch.cat(own) for own in kept], row_N, capacity)


def probe(
    code_NW: torch.Tensor, scale_N: torch.Tensor, row_N: torch.Tensor, user_BW: torch.Tensor,
    threshold_B: torch.Tensor, start_BP: torch.Tensor, size_BP: torch.Tensor, capacity: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """As `scan`, of each request's own P clusters: places start_BP up to start_BP + size_BP, i64."""
    kept = []
    for b, (start_P, size_P) in enumerate(zip(start_BP.tolist(), size_BP.tolist(), strict=True)):
        place = torch.cat([torch.arange(start, start + size) for start, size in zip(start_P, size_P, strict=True)])
        score = _coarse(code_NW[place], scale_N[place], user_BW[b : b + 1])[:, 0]
        kept.append(place[score >= threshold_B[b]])
    return _lists(kept, row_N, capacity)


def _lists(places: list[torch.Tensor], row_N: torch.Tensor | None, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
    row_BC = torch.full((len(places), capacity), -1, dtype=torch.int32)
    for own_C, place in zip(row_BC, places, strict=True):
        own_C[: len(place)] = place[:capacity] if row_N is None else row_N[place[:capacity]]
    return row_BC, torch.tensor([len(place) for place in places], dtype=torch.int32)


def dots(exact: ExactRows, row_BC: torch.Tensor, user_BE: torch.Tensor) -> torch.Tensor:
    """f32 [B, C]: dot product of each survivor's exact embedding with the user; -inf for row -1. user_BE: f32."""
    feature_BCF = exact.rows(row_BC)[..., : user_BE.shape[1]].float()
    return (feature_BCF @ user_BE[:, :, None])[..., 0].masked_fill(row_BC < 0, -torch.inf)


def gather(exact: ExactRows, row_BC: torch.Tensor) -> torch.Tensor:
    """[B, C, F]: exact features of the survivors, zeros for row -1."""
    return exact.rows(row_BC)


PLAIN = Steps(sample_best, scan, probe, dots, gather)


def steps_for(device: torch.device) -> Steps:
    """Kernels on a GPU, plain PyTorch elsewhere."""
    if device.type != "cuda":
        return PLAIN
    from model.retrieval import two_level_triton as kernels

    return Steps(kernels.sample_best, kernels.scan, kernels.probe, kernels.dots, kernels.gather)
