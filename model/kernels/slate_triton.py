"""From scores to slates on the GPU: rules, the best candidates, their order, caps; a fixed sequence of small kernels.

    begin    clear the counts, mark the rows that a request excludes
    allow    filters and bids: what an item's scores are multiplied by, or NaN
    apply    one int32 key an item, in the utility's order; keys are counted by their upper 16 bits
    gather   from the counts, the least key with which all keys from there on fit the pool; those keys into the pool
    order    a candidate's place is the number of candidates above it: no sort; and it is taken where fewer than cap of
             its group stand above it
    within   with two caps, the same of those that were taken, in rounds
    place    a taken candidate's place in the slate is the number of taken ones above it

The first two need no scores and run beside the kernels that make them.

The meaning is that of `retrieval.select.select` with a pool that may be less than full: the keys in it are always all
keys above some bound. Atomics add integers only, and the order in which candidates come into the pool leaves no
trace, so equal inputs give equal slates.

A key is the float's bits, made to sort as int32; INT32_MIN stands for "not allowed", below any finite number's key.
A candidate is int64: its key above, its row, the lower the larger, below (`retrieval.select.walk_keys`).

No size is read from the device, so a CUDA graph may hold the whole sequence: how many items there are, which requests
exclude what, and the caps are numbers in device memory.

Legend: as in model.retrieval; P pool, X excluded rows of all requests, Q places walked.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

NO_KEY = -(2**31)
_NO_KEY: tl.constexpr = tl.constexpr(NO_KEY)
_NO_CANDIDATE: tl.constexpr = tl.constexpr(-(2**63))
_ROW_BITS: tl.constexpr = tl.constexpr(0xFFFFFFFF)
LINES = 256
"""Counts of keys: 256 lines of 256 bins, a bin for each value of a key's upper 16 bits, and a total of each line."""
_LINES: tl.constexpr = tl.constexpr(LINES)
COUNTS = LINES * LINES + LINES + LINES
"""Counts of a request: the bins, the lines' totals, and the pool's fill and whether it holds all allowed items."""
_COUNTS: tl.constexpr = tl.constexpr(COUNTS)
_TOTALS: tl.constexpr = tl.constexpr(LINES * LINES)
_FILL: tl.constexpr = tl.constexpr(LINES * LINES + LINES)


@dataclass(frozen=True, slots=True)
class Rules:
    """What the requests of a batch ask, and the columns of the items they ask it of."""

    mask_NW: torch.Tensor
    eligible_N: torch.Tensor
    budget_N: torch.Tensor
    attribute_NA: torch.Tensor
    bid_N: torch.Tensor
    weight_BT: torch.Tensor
    bid_power_B: torch.Tensor
    required_BW: torch.Tensor
    forbidden_BW: torch.Tensor
    lower_BA: torch.Tensor
    upper_BA: torch.Tensor
    min_budget_B: torch.Tensor
    excluded_X2: torch.Tensor
    """i32: a row that is excluded, and the request it is of; those past number 1 of `head` are not looked at."""
    head: torch.Tensor
    """i32: items there are, excluded rows there are, this run's number (at least 1, another than the run's before), and
    the caps, one or two."""
    field_words: tuple[int, int, int]
    """Mask words of each field."""


@dataclass(frozen=True, slots=True)
class Work:
    """Memory of the sequence; what one run leaves here the next one overwrites."""

    stamp_BN: torch.Tensor
    """i32: the last run in which the request excluded the row."""
    factor_BN: torch.Tensor
    """f32: bid ** power, NaN where the item is not allowed."""
    key_BN: torch.Tensor
    count_BC: torch.Tensor
    pool_BP: torch.Tensor
    pool_group_CBP: torch.Tensor
    """i64: the candidates' groups, of each cap."""
    ordered_BP: torch.Tensor
    group_CBP: torch.Tensor
    """The same in the candidates' order."""
    take_RBP: torch.Tensor
    """i32, of the last two rounds."""

    @classmethod
    def empty(cls, requests: int, items: int, pool: int, device: torch.device) -> "Work":
        """pool: a power of two."""

        def room(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            room(torch.int32, requests, items), room(torch.float32, requests, items),
            room(torch.int32, requests, items), room(torch.int32, requests, COUNTS),
            room(torch.int64, requests, pool), room(torch.int64, 2, requests, pool),
            room(torch.int64, requests, pool), room(torch.int64, 2, requests, pool),
            room(torch.int32, 2, requests, pool),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Placed:
    """Where the slates are written; as `retrieval.select.Found`, in narrower integers."""

    row_BQ: torch.Tensor
    """i32, -1 past the end."""
    utility_BQ: torch.Tensor
    """f32, -inf past the end."""
    length_B: torch.Tensor
    """i32."""
    is_exact_B: torch.Tensor
    """i32, 0 or 1."""


def begin(rules: Rules, work: Work) -> None:
    """Clear the counts of the run before and mark excluded rows."""
    requests, items = work.stamp_BN.shape
    marks = triton.cdiv(len(rules.excluded_X2), 1024)
    cleared = triton.cdiv(requests * COUNTS, 4096)
    _begin_kernel[(marks + cleared,)](
        rules.excluded_X2, rules.head, work.stamp_BN, work.count_BC, requests * COUNTS, items, marks, num_warps=4,
    )  # fmt: skip


def allow(rules: Rules, work: Work, block: int = 256, group: int = 4) -> None:
    """Factors of all items. block, group: items and requests of a program."""
    requests, items = work.factor_BN.shape
    category, country, _ = rules.field_words
    _allow_kernel[(triton.cdiv(items, block), triton.cdiv(requests, group))](
        rules.mask_NW, rules.eligible_N, rules.budget_N, rules.attribute_NA, rules.bid_N, rules.bid_power_B,
        rules.required_BW, rules.forbidden_BW, rules.lower_BA, rules.upper_BA, rules.min_budget_B, rules.head,
        work.stamp_BN, work.factor_BN, requests, work.factor_BN.stride(0), W=rules.mask_NW.shape[1],
        SECOND_FIELD=category, THIRD_FIELD=category + country, A=rules.attribute_NA.shape[1], BLOCK=block, GROUP=group,
        num_warps=4,
    )  # fmt: skip


def apply(score_BTN: torch.Tensor, rules: Rules, work: Work, block: int = 512) -> None:
    """Keys of all items, and their counts. score_BTN: f32. block: items of a program."""
    requests, tasks, items = score_BTN.shape
    _apply_kernel[(triton.cdiv(items, block), requests)](
        score_BTN, score_BTN.stride(0), score_BTN.stride(1), rules.weight_BT, rules.head, work.factor_BN, work.key_BN,
        work.count_BC, work.key_BN.stride(0), T=tasks, BLOCK=block, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def gather(groups: list[torch.Tensor], rules: Rules, work: Work, block: int = 1024) -> None:
    """The best candidates into the pool. groups: i64 [N] of each cap."""
    requests, items = work.key_BN.shape
    _gather_kernel[(triton.cdiv(items, block), requests)](
        work.key_BN, work.count_BC, work.pool_BP, *_two(groups, work.pool_BP), work.pool_group_CBP,
        work.pool_group_CBP.stride(0), rules.head, items, CAPS=len(groups), POOL=work.pool_BP.shape[1], BLOCK=block,
        num_warps=4,
    )  # fmt: skip


def order(caps: int, rules: Rules, work: Work, block: int = 16, others: int = 256, warps: int = 8) -> None:
    """Candidates in the order of the walk, with their groups, and which of them the walk takes; certain for one cap."""
    requests, pool = work.pool_BP.shape
    _order_kernel[(triton.cdiv(pool, block), requests)](
        work.pool_BP, work.pool_group_CBP, work.count_BC, rules.head, work.ordered_BP, work.group_CBP,
        work.take_RBP[0], work.group_CBP.stride(0), CAPS=caps, POOL=pool, BLOCK=block, OTHERS=others,
        num_warps=warps,
    )  # fmt: skip


def within(rounds: int, rules: Rules, work: Work, block: int = 16, others: int = 256) -> None:
    """Which candidates the walk takes under two caps: rounds after the first (`select.within_caps`)."""
    requests, pool = work.pool_BP.shape
    for number in range(1, rounds + 1):
        _within_kernel[(triton.cdiv(pool, block), requests)](
            work.count_BC, rules.head, work.group_CBP, work.group_CBP.stride(0), work.take_RBP[(number + 1) % 2],
            work.take_RBP[number % 2], POOL=pool, BLOCK=block, OTHERS=others, num_warps=4,
        )  # fmt: skip


def place(caps: int, walked: int, rounds: int, work: Work, placed: Placed) -> None:
    """The slates' rows. caps, rounds: as in `within`."""
    requests, pool = work.pool_BP.shape
    last = rounds if caps > 1 else 0
    _place_kernel[(requests,)](
        work.count_BC, work.ordered_BP, work.take_RBP[last % 2], work.take_RBP[(last + 1) % 2], placed.row_BQ,
        placed.utility_BQ, placed.length_B, placed.is_exact_B, placed.row_BQ.stride(0), CAPS=caps, WALKED=walked,
        POOL=pool, ROOM=triton.next_power_of_2(walked), num_warps=16,
    )  # fmt: skip


def _two(tensors: list[torch.Tensor], other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    one, two = (*tensors, other, other)[:2]
    return one, two


@triton.jit
def _begin_kernel(excluded_X2, head, stamp_BN, count_BC, counts, items, marks):
    block = tl.program_id(0)
    if block < marks:
        number = block * 1024 + tl.arange(0, 1024)
        is_there = number < tl.load(head + 1)
        row = tl.load(excluded_X2 + 2 * number, is_there, 0)
        request = tl.load(excluded_X2 + 2 * number + 1, is_there, 0)
        run = tl.load(head + 2)
        tl.store(stamp_BN + request.to(tl.int64) * items + row, tl.zeros_like(row) + run, is_there)
    else:
        at = (block - marks) * 4096 + tl.arange(0, 4096)
        tl.store(count_BC + at, tl.zeros([4096], tl.int32), at < counts)


@triton.jit
def _bid_factor(bid, power):
    """bid ** power in f64, rounded to f32; a bid of 0 to the power of 0 is 1."""
    if power == 0.0:
        factor = tl.full(bid.shape, 1.0, tl.float32)
    elif power == 1.0:
        factor = bid
    else:
        some = tl.where(bid > 0.0, bid, 1.0).to(tl.float64)
        of_zero = tl.where(power > 0.0, 0.0, float("inf"))
        factor = tl.where(bid > 0.0, tl.math.exp2(power * tl.math.log2(some)).to(tl.float32), of_zero)
    return factor


@triton.jit
def _field_allows(
    mask_NW, required_BW, forbidden_BW, row, is_row, request,
    W: tl.constexpr, START: tl.constexpr, END: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Whether rows have none of the forbidden bits and, where any are required, one of those."""
    is_clear = tl.full([BLOCK], True, tl.int1)
    has = tl.full([BLOCK], False, tl.int1)
    is_asked = tl.full([BLOCK], False, tl.int1)
    for word in tl.static_range(START, END):
        required = tl.load(required_BW + request * W + word)
        forbidden = tl.load(forbidden_BW + request * W + word)
        mask = tl.load(mask_NW + row * W + word, is_row, 0)
        is_clear = is_clear & ((mask & forbidden) == 0)
        has = has | ((mask & required) != 0)
        is_asked = is_asked | (required != 0)
    return is_clear & (has | ~is_asked)


@triton.jit
def _allow_kernel(
    mask_NW, eligible_N, budget_N, attribute_NA, bid_N, power_B, required_BW, forbidden_BW, lower_BA, upper_BA,
    min_budget_B, head, stamp_BN, factor_BN, requests, items,
    W: tl.constexpr, SECOND_FIELD: tl.constexpr, THIRD_FIELD: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """BLOCK items, up to GROUP requests one after the other."""
    count = tl.load(head)
    run = tl.load(head + 2)
    first = tl.program_id(0) * BLOCK
    if first < count:
        row = (first + tl.arange(0, BLOCK)).to(tl.int64)
        is_row = row < count
        bid = tl.load(bid_N + row, is_row, 0.0)
        budget = tl.load(budget_N + row, is_row, 0.0)
        is_eligible = tl.load(eligible_N + row, is_row, 0) != 0
        last = tl.minimum(tl.program_id(1) * GROUP + GROUP, requests)
        for number in tl.range(tl.program_id(1) * GROUP, last):
            request = number + tl.zeros([], tl.int64)
            allowed = is_row & is_eligible & (budget >= tl.load(min_budget_B + request))
            allowed &= tl.load(stamp_BN + request * items + row, is_row, 0) != run
            allowed &= _field_allows(
                mask_NW, required_BW, forbidden_BW, row, is_row, request, W, 0, SECOND_FIELD, BLOCK
            )
            allowed &= _field_allows(
                mask_NW, required_BW, forbidden_BW, row, is_row, request, W, SECOND_FIELD, THIRD_FIELD, BLOCK
            )
            allowed &= _field_allows(mask_NW, required_BW, forbidden_BW, row, is_row, request, W, THIRD_FIELD, W, BLOCK)
            for attribute in tl.static_range(A):
                value = tl.load(attribute_NA + row * A + attribute, is_row, 0.0)
                lower = tl.zeros([BLOCK], tl.float32) + tl.load(lower_BA + request * A + attribute)
                upper = tl.zeros([BLOCK], tl.float32) + tl.load(upper_BA + request * A + attribute)
                is_open = (lower == float("-inf")) & (upper == float("inf"))
                allowed &= ((value >= lower) & (value <= upper)) | is_open
            factor = tl.where(allowed, _bid_factor(bid, tl.load(power_B + request)), float("nan"))
            tl.store(factor_BN + request * items + row, factor, is_row)


@triton.jit
def _apply_kernel(
    score_BTN, score_stride_b, score_stride_t, weight_BT, head, factor_BN, key_BN, count_BC, items,
    T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    count = tl.load(head)
    first = tl.program_id(0) * BLOCK
    if first < count:
        request = tl.program_id(1).to(tl.int64)
        row = first + tl.arange(0, BLOCK)
        is_row = row < count
        factor = tl.load(factor_BN + request * items + row, is_row, float("nan"))
        utility = tl.zeros([BLOCK], tl.float32)
        for task in tl.static_range(T):
            at = score_BTN + request * score_stride_b + task * score_stride_t
            utility += tl.load(at + row, is_row, 0.0) * tl.load(weight_BT + request * T + task)
        utility = utility * factor + 0.0  # the sum makes -0.0 to 0.0
        allowed = tl.abs(utility) < float("inf")
        bits = utility.to(tl.int32, bitcast=True)
        key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        key = tl.where(allowed, key, _NO_KEY)
        tl.store(key_BN + request * items + row, key, is_row)
        place = (key >> 16) + 32768
        counts = count_BC + request * _COUNTS
        tl.atomic_add(counts + place, tl.full([BLOCK], 1, tl.int32), allowed, sem="relaxed")
        line = tl.arange(0, _LINES)
        total = tl.histogram(tl.where(allowed, place // _LINES, 0), _LINES)
        # Line 0, of numbers below -2**126 and of what is not allowed, needs no total.
        tl.atomic_add(counts + _TOTALS + line, total, (total > 0) & (line > 0), sem="relaxed")


@triton.jit
def _bound(counts, POOL: tl.constexpr):
    """The least bin from which on all keys fit the pool, how many they are, and whether they are all there are."""
    place = tl.arange(0, _LINES)
    total = tl.load(counts + _TOTALS + place)
    line = tl.max(tl.where(tl.cumsum(total, 0, reverse=True) > POOL, place, 0), 0)
    above = tl.sum(tl.where(place > line, total, 0), 0)
    number = tl.load(counts + line * _LINES + place)
    fits = above + tl.cumsum(number, 0, reverse=True) <= POOL
    least = tl.min(tl.where(fits, place, _LINES), 0)
    fill = above + tl.sum(tl.where(place >= least, number, 0), 0)
    return line * _LINES + least, fill, (line == 0) & (least == 0)


@triton.jit
def _gather_kernel(
    key_BN, count_BC, pool_BP, group_N, other_group_N, pool_group_CBP, group_stride, head, items,
    CAPS: tl.constexpr, POOL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK
    count = tl.load(head)
    if first < tl.maximum(count, 1):
        counts = count_BC + request * _COUNTS
        bound, _, has_all = _bound(counts, POOL)
        if tl.program_id(0) == 0:
            tl.store(counts + _FILL + 1, has_all.to(tl.int32))
        row = first + tl.arange(0, BLOCK)
        key = tl.load(key_BN + request * items + row, row < count, _NO_KEY)
        is_in = (key != _NO_KEY) & ((key >> 16) + 32768 >= bound)
        ones = is_in.to(tl.int32)
        number = tl.sum(ones, 0)
        if number > 0:
            at = tl.atomic_add(counts + _FILL, number, sem="relaxed") + tl.cumsum(ones, 0) - ones
            candidate = (key.to(tl.int64) << 32) | (row.to(tl.int64) ^ _ROW_BITS)
            is_in &= at < POOL
            at += request * POOL
            tl.store(pool_BP + at, candidate, is_in)
            if CAPS > 0:
                tl.store(pool_group_CBP + at, tl.load(group_N + row, is_in, -1), is_in)
            if CAPS > 1:
                tl.store(pool_group_CBP + group_stride + at, tl.load(other_group_N + row, is_in, -1), is_in)


@triton.jit
def _row_of(candidate):
    return (candidate & _ROW_BITS) ^ _ROW_BITS


@triton.jit
def _order_kernel(
    pool_BP, pool_group_CBP, count_BC, head, ordered_BP, group_CBP, take_BP, group_stride,
    CAPS: tl.constexpr, POOL: tl.constexpr, BLOCK: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(1).to(tl.int64)
    fill = tl.minimum(tl.load(count_BC + request * _COUNTS + _FILL), POOL)
    first = tl.program_id(0) * BLOCK
    if first < fill:
        pool = pool_BP + request * POOL
        group = pool_group_CBP + request * POOL
        number = first + tl.arange(0, BLOCK)
        is_there = number < fill
        mine = tl.load(pool + number, is_there, _NO_CANDIDATE)
        above = tl.zeros([BLOCK, OTHERS], tl.int32)
        if CAPS > 0:
            my_group = tl.load(group + number, is_there, -1)
            in_group = tl.zeros([BLOCK, OTHERS], tl.int32)
        if CAPS > 1:
            my_other = tl.load(group + group_stride + number, is_there, -1)
            in_other = tl.zeros([BLOCK, OTHERS], tl.int32)
        for start in tl.range(0, fill, OTHERS):
            other = start + tl.arange(0, OTHERS)
            is_above = tl.load(pool + other, other < fill, _NO_CANDIDATE)[None, :] > mine[:, None]
            above += is_above.to(tl.int32)
            if CAPS > 0:
                theirs = tl.load(group + other, other < fill, -1)
                in_group += (is_above & (theirs[None, :] == my_group[:, None])).to(tl.int32)
            if CAPS > 1:
                theirs = tl.load(group + group_stride + other, other < fill, -1)
                in_other += (is_above & (theirs[None, :] == my_other[:, None])).to(tl.int32)
        at = request * POOL + tl.sum(above, 1)
        tl.store(ordered_BP + at, mine, is_there)
        if CAPS > 0:
            take = (tl.sum(in_group, 1) < tl.load(head + 3)) | (my_group < 0)
            if CAPS > 1:
                take &= (tl.sum(in_other, 1) < tl.load(head + 4)) | (my_other < 0)
                tl.store(group_CBP + at, my_group, is_there)
                tl.store(group_CBP + group_stride + at, my_other, is_there)
            tl.store(take_BP + at, take.to(tl.int32), is_there)


@triton.jit
def _within_kernel(
    count_BC, head, group_CBP, group_stride, before_BP, take_BP,
    POOL: tl.constexpr, BLOCK: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(1).to(tl.int64)
    fill = tl.minimum(tl.load(count_BC + request * _COUNTS + _FILL), POOL)
    first = tl.program_id(0) * BLOCK
    if first < fill:
        number = first + tl.arange(0, BLOCK)
        group = group_CBP + request * POOL
        mine = tl.load(group + number, number < fill, -1)
        my_other = tl.load(group + group_stride + number, number < fill, -1)
        above = tl.zeros([BLOCK, OTHERS], tl.int32)
        other_above = tl.zeros([BLOCK, OTHERS], tl.int32)
        for start in tl.range(0, tl.minimum(first + BLOCK, fill), OTHERS):
            other = start + tl.arange(0, OTHERS)
            is_above = other[None, :] < number[:, None]
            is_above &= tl.load(before_BP + request * POOL + other, other < fill, 0)[None, :] != 0
            theirs = tl.load(group + other, other < fill, -1)
            above += (is_above & (theirs[None, :] == mine[:, None])).to(tl.int32)
            theirs = tl.load(group + group_stride + other, other < fill, -1)
            other_above += (is_above & (theirs[None, :] == my_other[:, None])).to(tl.int32)
        take = (tl.sum(above, 1) < tl.load(head + 3)) | (mine < 0)
        take &= (tl.sum(other_above, 1) < tl.load(head + 4)) | (my_other < 0)
        tl.store(take_BP + request * POOL + number, take.to(tl.int32), number < fill)


@triton.jit
def _place_kernel(
    count_BC, ordered_BP, take_BP, before_BP, row_BQ, utility_BQ, length_B, is_exact_B, stride,
    CAPS: tl.constexpr, WALKED: tl.constexpr, POOL: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0).to(tl.int64)
    counts = count_BC + request * _COUNTS
    fill = tl.minimum(tl.load(counts + _FILL), POOL)
    has_all = tl.load(counts + _FILL + 1) != 0
    number = tl.arange(0, POOL)
    is_there = number < fill
    candidate = tl.load(ordered_BP + request * POOL + number, is_there, _NO_CANDIDATE)
    take = is_there.to(tl.int32)
    settled = POOL
    if CAPS > 0:
        take = tl.load(take_BP + request * POOL + number, is_there, 0)
    if CAPS > 1:
        before = tl.load(before_BP + request * POOL + number, is_there, 0)
        settled = tl.min(tl.where(take != before, number, POOL), 0)
    at = tl.cumsum(take, 0) - take
    length = tl.minimum(tl.sum(take, 0), WALKED)
    firm = tl.sum(tl.where(number < settled, take, 0), 0)
    is_exact = (firm >= WALKED) | (has_all & (settled == POOL))
    key = (candidate >> 32).to(tl.int32)
    utility = tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)
    is_taken = (take != 0) & (at < WALKED)
    tl.store(row_BQ + request * stride + at, _row_of(candidate).to(tl.int32), is_taken)
    tl.store(utility_BQ + request * stride + at, utility, is_taken)
    rest = tl.arange(0, ROOM)
    is_rest = (rest >= length) & (rest < WALKED)
    tl.store(row_BQ + request * stride + rest, tl.full([ROOM], -1, tl.int32), is_rest)
    tl.store(utility_BQ + request * stride + rest, tl.full([ROOM], float("-inf"), tl.float32), is_rest)
    tl.store(length_B + request, length)
    tl.store(is_exact_B + request, is_exact.to(tl.int32))
