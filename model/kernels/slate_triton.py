"""From scores to slates on the GPU: rules, the best candidates, their order, caps; a fixed sequence of small kernels.

    bring    the batch from page-locked memory, where the host writes it
    ready    clear the counts, mark the rows that a request excludes; filters and bids: what an item's scores are
             multiplied by, or NaN
    apply    one int32 key an item, in the utility's order; keys are counted by their upper 16 bits, a bin for each
             value (interaction_score_hopper does this as it goes)
    bound    from the counts, the least bin with which all keys from there on fit the pool, and where each bin begins
    gather   those keys into the pool, bin after bin
    order    a candidate's place is the number of candidates above it: those of higher bins, and those of its own that
             compare as higher; and it is taken where fewer than cap of its group stand above it
    within   with two caps, the same of those that were taken, in rounds
    place    a taken candidate's place in the slate is the number of taken ones above it

The first two need no scores; ready may run beside the kernels that make them.

The meaning is that of `retrieval.select.select` with a pool that may be less than full: the keys in it are always all
keys above some bound. Atomics add integers only, and the order in which candidates come into a bin leaves no trace, so
equal inputs give equal slates.

A key is the float's bits, made to sort as int32; INT32_MIN stands for "not allowed", below any finite number's key.
A candidate is int64: its key above, its row, the lower the larger, below (`retrieval.select.walk_keys`).

No size is read from the device, so a CUDA graph may hold the whole sequence: how many items there are, which requests
exclude what, and the caps are numbers in device memory.

A chain (`Work.is_chained`, compute capability 9 on): a kernel is launched while the one before it still runs, and waits
for its end before it touches memory that this one writes. As every kernel of a chain waits, the end of one is the end
of all before it. Those here let the next one begin after they have waited themselves: it may read at once what the
kernels before the last wrote.

Legend: as in model.retrieval; P pool, X excluded rows of all requests, Q places walked.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

NO_KEY = -(2**31)
_NO_KEY: tl.constexpr = tl.constexpr(NO_KEY)
_NO_CANDIDATE: tl.constexpr = tl.constexpr(-(2**63))
_ROW_BITS: tl.constexpr = tl.constexpr(0xFFFFFFFF)
BINS = 2**16
_BINS: tl.constexpr = tl.constexpr(BINS)
_HALF: tl.constexpr = tl.constexpr(BINS // 2)
_CHUNK: tl.constexpr = tl.constexpr(1024)
"""Bins that are summed side by side: of eight powers of two."""
CLEARED = 8192
_CLEARED: tl.constexpr = tl.constexpr(CLEARED)
"""Bins that a program clears."""
OTHERS = 256
"""Candidates that each one is compared with at a time."""


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
    excluded_X: torch.Tensor
    """i64: rows that are excluded; those past number 1 of `head` are not looked at."""
    excluded_of_X: torch.Tensor
    """i64: the requests they are of."""
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
    """i32: keys of each bin."""
    end_BC: torch.Tensor
    """i32: where in the pool a bin begins, then where its next candidate goes, in the end where it ends."""
    bound_B3: torch.Tensor
    """i32: the least bin in the pool, how many candidates are there, and whether they are all there are."""
    pool_BP: torch.Tensor
    pool_group_CBP: torch.Tensor
    """i64: the candidates' groups, of each cap."""
    ordered_BP: torch.Tensor
    group_CBP: torch.Tensor
    """The same in the candidates' order."""
    take_RBP: torch.Tensor
    """i32, of the last two rounds."""
    is_chained: bool
    """Whether a kernel may be launched before the end of the one before."""

    @classmethod
    def empty(cls, requests: int, items: int, pool: int, device: torch.device, is_chained: bool = False) -> "Work":
        """pool: a power of two."""

        def room(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            room(torch.int32, requests, items), room(torch.float32, requests, items),
            room(torch.int32, requests, items), room(torch.int32, requests, BINS), room(torch.int32, requests, BINS),
            room(torch.int32, requests, 3),
            room(torch.int64, requests, pool), room(torch.int64, 2, requests, pool),
            room(torch.int64, requests, pool), room(torch.int64, 2, requests, pool),
            room(torch.int32, 2, requests, pool), is_chained,
        )  # fmt: skip

    def chain(self) -> dict[str, bool]:
        """How a kernel that waits for the one before it is launched."""
        return {"CHAINED": True, "launch_pdl": True} if self.is_chained else {"CHAINED": False}


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


def bring(here: torch.Tensor, there: torch.Tensor, block: int = 512) -> None:
    """Copy page-locked memory to the device by a kernel, which the next may be chained to. Both i64, contiguous."""
    _bring_kernel[(triton.cdiv(len(here), block),)](here, there, len(here), BLOCK=block, num_warps=4)


def ready(rules: Rules, work: Work, block: int = 256, group: int = 4, *, is_first: bool = True) -> None:
    """Counts cleared, excluded rows marked, factors of all items.

    block, group: items and requests of a program. is_first: no kernel of the chain is before it.
    """
    requests, items = work.factor_BN.shape
    category, country, _ = rules.field_words
    marks = triton.cdiv(len(rules.excluded_X), 1024)
    cleared = requests * BINS // CLEARED
    tiles = triton.cdiv(items, block)
    _ready_kernel[(marks + cleared + tiles * triton.cdiv(requests, group),)](
        rules.mask_NW, rules.eligible_N, rules.budget_N, rules.attribute_NA, rules.bid_N, rules.bid_power_B,
        rules.required_BW, rules.forbidden_BW, rules.lower_BA, rules.upper_BA, rules.min_budget_B, rules.excluded_X,
        rules.excluded_of_X, rules.head, work.stamp_BN, work.factor_BN, work.count_BC, requests,
        work.factor_BN.stride(0), marks, cleared, tiles, W=rules.mask_NW.shape[1], SECOND_FIELD=category,
        THIRD_FIELD=category + country, A=rules.attribute_NA.shape[1], BLOCK=block, GROUP=group,
        num_warps=4, **({"CHAINED": work.is_chained} if is_first else work.chain()),
    )  # fmt: skip


def apply(score_BTN: torch.Tensor, rules: Rules, work: Work, block: int = 512) -> None:
    """Keys of all items, and their counts. score_BTN: f32. block: items of a program."""
    requests, tasks, items = score_BTN.shape
    _apply_kernel[(triton.cdiv(items, block), requests)](
        score_BTN, score_BTN.stride(0), score_BTN.stride(1), rules.weight_BT, rules.head, work.factor_BN,
        work.stamp_BN, work.key_BN, work.count_BC, work.key_BN.stride(0), T=tasks, BLOCK=block, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip


def bound(work: Work) -> None:
    """What of the keys fits the pool, and where it goes."""
    _bound_kernel[(len(work.key_BN),)](
        work.count_BC, work.end_BC, work.bound_B3, POOL=work.pool_BP.shape[1], num_warps=16, **work.chain(),
    )  # fmt: skip


def gather(groups: list[torch.Tensor], rules: Rules, work: Work, block: int = 512) -> None:
    """The best candidates into the pool. groups: i64 [N] of each cap."""
    requests, items = work.key_BN.shape
    _gather_kernel[(triton.cdiv(items, block), requests)](
        work.key_BN, work.end_BC, work.bound_B3, work.pool_BP, *_two(groups, work.pool_BP), work.pool_group_CBP,
        work.pool_group_CBP.stride(0), rules.head, items, CAPS=len(groups), POOL=work.pool_BP.shape[1], BLOCK=block,
        num_warps=4, **work.chain(),
    )  # fmt: skip


def order(caps: int, rules: Rules, work: Work) -> None:
    """Candidates in the order of the walk, with their groups, and which of them the walk takes; certain for one cap."""
    requests, pool = work.pool_BP.shape
    block = _candidates(8)
    _order_kernel[(triton.cdiv(pool, block), requests)](
        work.pool_BP, work.pool_group_CBP, work.count_BC, work.end_BC, work.bound_B3, rules.head, work.ordered_BP,
        work.group_CBP, work.take_RBP[0], work.group_CBP.stride(0), CAPS=caps, POOL=pool, BLOCK=block, OTHERS=OTHERS,
        num_warps=2, **work.chain(),
    )  # fmt: skip


def within(rounds: int, rules: Rules, work: Work) -> None:
    """Which candidates the walk takes under two caps: rounds after the first (`select.within_caps`)."""
    requests, pool = work.pool_BP.shape
    block = _candidates(16)
    for number in range(1, rounds + 1):
        _within_kernel[(triton.cdiv(pool, block), requests)](
            work.bound_B3, rules.head, work.group_CBP, work.group_CBP.stride(0), work.take_RBP[(number + 1) % 2],
            work.take_RBP[number % 2], POOL=pool, BLOCK=block, OTHERS=OTHERS, num_warps=4, **work.chain(),
        )  # fmt: skip


def _candidates(of_a_program: int) -> int:
    """As many on a GPU; Triton's interpreter, which runs programs one after the other, gets fewer and larger ones."""
    return 256 if triton.knobs.runtime.interpret else of_a_program


def place(caps: int, walked: int, rounds: int, work: Work, placed: Placed) -> None:
    """The slates' rows. caps, rounds: as in `within`."""
    requests, pool = work.pool_BP.shape
    last = rounds if caps > 1 else 0
    _place_kernel[(requests,)](
        work.bound_B3, work.ordered_BP, work.take_RBP[last % 2], work.take_RBP[(last + 1) % 2], placed.row_BQ,
        placed.utility_BQ, placed.length_B, placed.is_exact_B, placed.row_BQ.stride(0), CAPS=caps, WALKED=walked,
        POOL=pool, ROOM=triton.next_power_of_2(walked), num_warps=16, **work.chain(),
    )  # fmt: skip


def _two(tensors: list[torch.Tensor], other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    one, two = (*tensors, other, other)[:2]
    return one, two


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
def _bring_kernel(here, there, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(there + at, tl.load(here + at, at < count, cache_modifier=".cv"), at < count)


@triton.jit(do_not_specialize=["requests", "marks", "cleared", "tiles"])
def _ready_kernel(
    mask_NW, eligible_N, budget_N, attribute_NA, bid_N, power_B, required_BW, forbidden_BW, lower_BA, upper_BA,
    min_budget_B, excluded_X, excluded_of_X, head, stamp_BN, factor_BN, count_BC, requests, items, marks, cleared,
    tiles, W: tl.constexpr, SECOND_FIELD: tl.constexpr, THIRD_FIELD: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr,
    GROUP: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Excluded rows, or counts to clear, or BLOCK items for up to GROUP requests one after the other."""
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
    count = tl.load(head)
    run = tl.load(head + 2)
    program = tl.program_id(0)
    if program < marks:
        number = program * 1024 + tl.arange(0, 1024)
        is_there = number < tl.load(head + 1)
        excluded = tl.load(excluded_X + number, is_there, 0)
        of_request = tl.load(excluded_of_X + number, is_there, 0)
        tl.store(stamp_BN + of_request * items + excluded, tl.zeros([1024], tl.int32) + run, is_there)
    elif program < marks + cleared:
        at = (program - marks).to(tl.int64) * _CLEARED + tl.arange(0, _CLEARED)
        tl.store(count_BC + at, tl.zeros([_CLEARED], tl.int32))
    else:
        tile = (program - marks - cleared) % tiles
        start = (program - marks - cleared) // tiles * GROUP
        first = tile * BLOCK
        if first < count:
            row = (first + tl.arange(0, BLOCK)).to(tl.int64)
            is_row = row < count
            bid = tl.load(bid_N + row, is_row, 0.0)
            budget = tl.load(budget_N + row, is_row, 0.0)
            is_eligible = tl.load(eligible_N + row, is_row, 0) != 0
            for number in tl.range(start, tl.minimum(start + GROUP, requests)):
                request = number + tl.zeros([], tl.int64)
                allowed = is_row & is_eligible & (budget >= tl.load(min_budget_B + request))
                allowed &= _field_allows(
                    mask_NW, required_BW, forbidden_BW, row, is_row, request, W, 0, SECOND_FIELD, BLOCK
                )
                allowed &= _field_allows(
                    mask_NW, required_BW, forbidden_BW, row, is_row, request, W, SECOND_FIELD, THIRD_FIELD, BLOCK
                )
                allowed &= _field_allows(
                    mask_NW, required_BW, forbidden_BW, row, is_row, request, W, THIRD_FIELD, W, BLOCK
                )
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
    score_BTN, score_stride_b, score_stride_t, weight_BT, head, factor_BN, stamp_BN, key_BN, count_BC, items,
    T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    count = tl.load(head)
    first = tl.program_id(0) * BLOCK
    if first < count:
        request = tl.program_id(1).to(tl.int64)
        row = first + tl.arange(0, BLOCK)
        is_row = row < count
        factor = tl.load(factor_BN + request * items + row, is_row, float("nan"))
        is_free = tl.load(stamp_BN + request * items + row, is_row, 0) != tl.load(head + 2)
        utility = tl.zeros([BLOCK], tl.float32)
        for task in tl.static_range(T):
            at = score_BTN + request * score_stride_b + task * score_stride_t
            utility += tl.load(at + row, is_row, 0.0) * tl.load(weight_BT + request * T + task)
        utility = utility * factor + 0.0  # the sum makes -0.0 to 0.0
        allowed = (tl.abs(utility) < float("inf")) & is_free
        bits = utility.to(tl.int32, bitcast=True)
        key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        key = tl.where(allowed, key, _NO_KEY)
        tl.store(key_BN + request * items + row, key, is_row)
        at = count_BC + request * _BINS + (key >> 16) + _HALF
        tl.atomic_add(at, tl.full([BLOCK], 1, tl.int32), allowed, sem="relaxed")


@triton.jit
def _begin_bins(count, end, above, POOL: tl.constexpr):
    """Where a half of the bins begins in the pool, of their counts and how many keys are in higher bins.

    Gives the least bin that fits, how many keys fit with those above, and how many there are with those above, or
    some number past the pool. Bins are walked from the highest that has keys, until the pool or the keys end.
    """
    every = tl.arange(0, _HALF)
    has_keys = tl.load(count + every) > 0
    highest = tl.max(tl.where(has_keys, every, -1), 0)
    lowest = tl.min(tl.where(has_keys, every, _HALF), 0)
    chunk = highest // _CHUNK
    least = tl.zeros([], tl.int32) + _HALF
    fill = above
    while (chunk >= lowest // _CHUNK) & (above <= POOL):
        place = chunk * _CHUNK + tl.arange(0, _CHUNK)
        number = tl.load(count + place)
        start = above + tl.cumsum(number, 0, reverse=True) - number
        fits = start + number <= POOL
        tl.store(end + place, start, fits & (number > 0))
        least = (chunk + 1) * _CHUNK - tl.sum(fits.to(tl.int32), 0)
        fill += tl.sum(tl.where(fits, number, 0), 0)
        above += tl.sum(number, 0)
        chunk -= 1
    return least, fill, above


@triton.jit
def _bound_kernel(count_BC, end_BC, bound_B3, POOL: tl.constexpr, CHAINED: tl.constexpr):
    """One request. The bins of negative keys are looked at where all others fit."""
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
    request = tl.program_id(0).to(tl.int64)
    count = count_BC + request * _BINS
    end = end_BC + request * _BINS
    least, fill, above = _begin_bins(count + _HALF, end + _HALF, tl.zeros([], tl.int32), POOL)
    least += _HALF
    if above <= POOL:
        of_negative, fill, above = _begin_bins(count, end, above, POOL)
        least = tl.where(of_negative < _HALF, of_negative, least)
    tl.store(bound_B3 + request * 3, least)
    tl.store(bound_B3 + request * 3 + 1, fill)
    tl.store(bound_B3 + request * 3 + 2, (fill == above).to(tl.int32))


@triton.jit
def _gather_kernel(
    key_BN, end_BC, bound_B3, pool_BP, group_N, other_group_N, pool_group_CBP, group_stride, head, items,
    CAPS: tl.constexpr, POOL: tl.constexpr, BLOCK: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK
    count = tl.load(head)
    row = first + tl.arange(0, BLOCK)
    key = tl.load(key_BN + request * items + row, row < count, _NO_KEY)
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
    if first < count:
        bin_ = (key >> 16) + _HALF
        is_in = (key != _NO_KEY) & (bin_ >= tl.load(bound_B3 + request * 3))
        at = tl.atomic_add(end_BC + request * _BINS + bin_, tl.full([BLOCK], 1, tl.int32), is_in, sem="relaxed")
        at += request * POOL
        candidate = (key.to(tl.int64) << 32) | (row.to(tl.int64) ^ _ROW_BITS)
        tl.store(pool_BP + at, candidate, is_in)
        if CAPS > 0:
            tl.store(pool_group_CBP + at, tl.load(group_N + row, is_in, -1), is_in)
        if CAPS > 1:
            tl.store(pool_group_CBP + group_stride + at, tl.load(other_group_N + row, is_in, -1), is_in)


@triton.jit
def _row_of(candidate):
    return (candidate & _ROW_BITS) ^ _ROW_BITS


@triton.jit
def _same_group(group, mine, begin, POOL: tl.constexpr, BLOCK: tl.constexpr, OTHERS: tl.constexpr):
    """f32 [BLOCK, OTHERS], whose sum along each row is how many places before begin are of its group.

    begin: a multiple of OTHERS. Groups are loaded two steps ahead: a step alone is shorter than a load.
    """
    found = tl.zeros([BLOCK, OTHERS], tl.float32)
    column = tl.arange(0, OTHERS)
    theirs = tl.load(group + column)
    later = tl.load(group + min(OTHERS, POOL - OTHERS) + column)
    for start in tl.range(0, begin, OTHERS):
        last = tl.load(group + tl.minimum(start + 2 * OTHERS, POOL - OTHERS) + column)
        found += (theirs[None, :] == mine[:, None]).to(tl.float32)
        theirs = later
        later = last
    return found


@triton.jit
def _order_kernel(
    pool_BP, pool_group_CBP, count_BC, end_BC, bound_B3, head, ordered_BP, group_CBP, take_BP, group_stride,
    CAPS: tl.constexpr, POOL: tl.constexpr, BLOCK: tl.constexpr, OTHERS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """BLOCK places of the pool: what is before the first one's bin is above, what is past the last one's is not."""
    request = tl.program_id(1).to(tl.int64)
    pool = pool_BP + request * POOL
    group = pool_group_CBP + request * POOL
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    fill = tl.load(bound_B3 + request * 3 + 1)
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
    mine = tl.load(pool + number)
    if CAPS > 0:
        my_group = tl.load(group + number)
    if CAPS > 1:
        my_other = tl.load(group + group_stride + number)
    if tl.program_id(0) * BLOCK < fill:
        is_there = number < fill
        bin_ = (mine >> 48).to(tl.int32) + _HALF
        highest = request * _BINS + tl.max(tl.where(is_there, bin_, 0), 0)
        end = tl.load(end_BC + request * _BINS + tl.min(tl.where(is_there, bin_, _BINS - 1), 0))
        begin = (tl.load(end_BC + highest) - tl.load(count_BC + highest)) // OTHERS * OTHERS
        is_above = tl.zeros([BLOCK, OTHERS], tl.float32)  # floats count in one instruction less than integers
        if CAPS > 0:
            in_group = _same_group(group, my_group, begin, POOL, BLOCK, OTHERS)
        if CAPS > 1:
            in_other = _same_group(group + group_stride, my_other, begin, POOL, BLOCK, OTHERS)
        for start in tl.range(begin, end, OTHERS):
            other = start + tl.arange(0, OTHERS)
            is_more = (tl.load(pool + other, other < end, _NO_CANDIDATE)[None, :] > mine[:, None]).to(tl.float32)
            is_above += is_more
            if CAPS > 0:
                theirs = tl.load(group + other)
                in_group += is_more * (theirs[None, :] == my_group[:, None]).to(tl.float32)
            if CAPS > 1:
                theirs = tl.load(group + group_stride + other)
                in_other += is_more * (theirs[None, :] == my_other[:, None]).to(tl.float32)
        at = request * POOL + begin + tl.sum(is_above, 1).to(tl.int32)
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
    bound_B3, head, group_CBP, group_stride, before_BP, take_BP,
    POOL: tl.constexpr, BLOCK: tl.constexpr, OTHERS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
    request = tl.program_id(1).to(tl.int64)
    fill = tl.load(bound_B3 + request * 3 + 1)
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
    bound_B3, ordered_BP, take_BP, before_BP, row_BQ, utility_BQ, length_B, is_exact_B, stride,
    CAPS: tl.constexpr, WALKED: tl.constexpr, POOL: tl.constexpr, ROOM: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0).to(tl.int64)
    fill = tl.load(bound_B3 + request * 3 + 1)
    has_all = tl.load(bound_B3 + request * 3 + 2) != 0
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()
    number = tl.arange(0, POOL)
    is_there = number < fill
    candidate = tl.load(ordered_BP + request * POOL + number)
    take = is_there.to(tl.int32)
    settled = POOL
    if CAPS > 0:
        take = tl.where(is_there, tl.load(take_BP + request * POOL + number), 0)
    if CAPS > 1:
        before = tl.load(before_BP + request * POOL + number)
        settled = tl.min(tl.where(is_there & (take != before), number, POOL), 0)
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
