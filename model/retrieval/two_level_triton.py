"""The steps of two-level retrieval on the GPU: Triton kernels with the meaning of `two_level.PLAIN`.

One pass over the codes serves all requests of a batch and writes no scores: rows that reach their request's threshold
are appended to its list by an atomic counter. The order within a list is therefore not fixed, its set is; the selection
that follows orders by utility and row.

A row that must not be found has the scale NaN, which reaches no threshold: deleted rows, and the padding that lets
kernels read whole tiles.

Legend: as in two_level; R rows of a tile, Q requests of a batch rounded up to a power of two.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from model.retrieval.two_level import ExactRows

LEAST_REQUESTS = 16
"""Least width of a matrix unit's product."""
MOST_REQUESTS = 64
"""Requests of one pass: more would cost registers that hide the memory's latency."""
GATHERED = 32
"""Survivors of a program of the second level."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Shape of a pass over the codes. No result depends on it."""

    rows: int = 128
    num_warps: int = 4
    num_stages: int = 4
    programs_per_unit: int = 4
    """Programs for each multiprocessor."""


TILES = Tiles()
SCAN_TILES = {16: Tiles(256, 8, 3, 2), 32: TILES, MOST_REQUESTS: Tiles(64, 4, 6, 4)}
"""Of `scan`, by requests of a pass rounded up; the fastest of those tried on an H100, at up to 256 channels."""


def sample_best(code_ME: torch.Tensor, scale_M: torch.Tensor, user_BE: torch.Tensor, group: int) -> torch.Tensor:
    """f32 [B, M / group]: best coarse score of each group of rows; -inf where none may be found.

    code_ME: i8, M a multiple of 128, E a power of two from 32 on. scale_M: f32. user_BE: i8. group: a power of two.
    """
    rows, width = code_ME.shape
    best_BG = scale_M.new_empty(len(user_BE), rows // group)
    for start, part_BE in _batches(user_BE):
        _sample_kernel[(rows // 128,)](
            code_ME, scale_M, part_BE, best_BG[start:], rows // group, len(part_BE),
            E=width, Q=_padded(len(part_BE)), R=128, GROUP=group, num_warps=4,
        )  # fmt: skip
    return best_BG


def scan(
    code_NE: torch.Tensor, scale_N: torch.Tensor, row_N: torch.Tensor | None, user_BE: torch.Tensor,
    threshold_B: torch.Tensor, capacity: int, tiles: Tiles | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """row_BC, i32: rows of coarse score at least threshold_B, -1 past them; count_B, i32: how many there are.

    code_NE: i8, N a multiple of the tile. row_N: i32, the row at each place; None: the place itself. A request of more
    than C = capacity rows has C of them in its list. tiles: by default those of SCAN_TILES; `fitting`.
    """
    row_BC, count_B = _lists(threshold_B, capacity)
    for start, part_BE in _batches(user_BE):
        requests = _padded(len(part_BE))
        shape = fitting(tiles or SCAN_TILES[requests], requests, code_NE.shape[1], _shared_bytes(code_NE.device))
        whole = len(code_NE) // shape.rows
        _scan_kernel[(min(whole, _programs(code_NE, shape)),)](
            code_NE, scale_N, scale_N if row_N is None else row_N, part_BE, threshold_B[start:], row_BC[start:],
            count_B[start:], whole, len(part_BE), capacity,
            E=code_NE.shape[1], Q=requests, R=shape.rows, HAS_ROWS=row_N is not None,
            STAGES=shape.num_stages, num_warps=shape.num_warps,
        )  # fmt: skip
    return row_BC, count_B


def fitting(tiles: Tiles, requests: int, width: int, shared_bytes: int) -> Tiles:
    """The tiles, with fewer rows where a processor's shared memory is too small for so many requests of a pass."""
    while tiles.rows > 16 and _wanted_bytes(tiles, requests, width) > shared_bytes:
        tiles = replace(tiles, rows=tiles.rows // 2)
    return tiles


def _wanted_bytes(tiles: Tiles, requests: int, width: int) -> int:
    """Shared memory that the compiler asks for, or a little more: codes under way, users, scores."""
    return tiles.num_stages * tiles.rows * width + requests * width + 4 * tiles.rows * requests + 2048


def _shared_bytes(device: torch.device) -> int:
    """Of a multiprocessor, for one program; without a GPU there is no bound."""
    if device.type != "cuda":
        return 2**63
    found: int = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"]
    return found


def probe(
    code_NE: torch.Tensor, scale_N: torch.Tensor, row_N: torch.Tensor, user_BE: torch.Tensor,
    threshold_B: torch.Tensor, start_BP: torch.Tensor, size_BP: torch.Tensor, capacity: int, tiles: Tiles = TILES,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """As `scan`, of each request's own P clusters: places start_BP up to start_BP + size_BP, i64."""
    row_BC, count_B = _lists(threshold_B, capacity)
    tiles = fitting(tiles, LEAST_REQUESTS, code_NE.shape[1], _shared_bytes(code_NE.device))
    probes = start_BP.shape[1]
    tile_end_BP = ((size_BP + tiles.rows - 1) // tiles.rows).cumsum(1)
    programs = max(1, _programs(code_NE, tiles) // len(user_BE))
    _probe_kernel[(programs, len(user_BE))](
        code_NE, scale_N, row_N, user_BE, threshold_B, start_BP, size_BP, tile_end_BP, row_BC, count_B, probes,
        capacity, E=code_NE.shape[1], R=tiles.rows, P=triton.next_power_of_2(probes), num_warps=tiles.num_warps,
    )  # fmt: skip
    return row_BC, count_B


def dots(exact: "ExactRows", row_BC: torch.Tensor, user_BE: torch.Tensor) -> torch.Tensor:
    """f32 [B, C]: dot product of each survivor's exact embedding with the user, summed in float32; -inf for row -1.

    user_BE: f32.
    """
    requests, capacity = row_BC.shape
    score_BC = torch.empty_like(row_BC, dtype=torch.float32)
    width = user_BE.shape[1]
    _dot_kernel[(triton.cdiv(capacity, GATHERED), requests)](
        *_sources(exact), row_BC, user_BE, score_BC, capacity, width,
        E=triton.next_power_of_2(width), C=GATHERED, HAS_TAIL=exact.tail_TF is not None, num_warps=4,
    )  # fmt: skip
    return score_BC


def gather(exact: "ExactRows", row_BC: torch.Tensor) -> torch.Tensor:
    """[B, C, F]: exact features of the survivors, zeros for row -1."""
    requests, capacity = row_BC.shape
    width = exact.head_HF.shape[1]
    feature_BCF = exact.head_HF.new_empty(requests, capacity, width)
    _gather_kernel[(triton.cdiv(capacity, GATHERED), requests)](
        *_sources(exact), row_BC, feature_BCF, capacity,
        F=triton.next_power_of_2(width), C=GATHERED, HAS_TAIL=exact.tail_TF is not None, num_warps=4,
    )  # fmt: skip
    return feature_BCF


def _batches(user_BE: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    return [(start, user_BE[start : start + MOST_REQUESTS]) for start in range(0, len(user_BE), MOST_REQUESTS)]


def _padded(requests: int) -> int:
    return max(LEAST_REQUESTS, 1 << (requests - 1).bit_length())


def _programs(tensor: torch.Tensor, tiles: Tiles) -> int:
    if not tensor.is_cuda:  # the interpreter: few, so that each takes several tiles
        return 2
    programs: int = torch.cuda.get_device_properties(tensor.device).multi_processor_count * tiles.programs_per_unit
    return programs


def _lists(threshold_B: torch.Tensor, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
    row_BC = torch.full((len(threshold_B), capacity), -1, dtype=torch.int32, device=threshold_B.device)
    return row_BC, torch.zeros_like(threshold_B, dtype=torch.int32)


def _sources(exact: "ExactRows") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
    """Head, tail (page-locked host memory, which kernels read over the bus), slots, rows of the head, width."""
    head, tail, slot = exact.head_HF, exact.tail_TF, exact.slot_N
    return head, head if tail is None else tail, head if slot is None else slot, len(head), head.shape[1]


@triton.jit
def _coarse(code_ptr, scale_ptr, user_EQ, place_R, E: tl.constexpr):
    """f32 [R, Q]: products of codes, exact in int32, times the rows' scales."""
    channel_E = tl.arange(0, E)
    code_RE = tl.load(code_ptr + place_R[:, None].to(tl.int64) * E + channel_E[None, :])
    scale_R = tl.load(scale_ptr + place_R)
    return tl.dot(code_RE, user_EQ, out_dtype=tl.int32).to(tl.float32) * scale_R[:, None]


@triton.jit
def _users(user_ptr, requests, E: tl.constexpr, Q: tl.constexpr):
    """i8 [E, Q], zeros past the requests."""
    request_Q = tl.arange(0, Q)
    channel_E = tl.arange(0, E)
    return tl.load(user_ptr + request_Q[None, :] * E + channel_E[:, None], request_Q[None, :] < requests, 0)


@triton.jit
def _append(row_ptr, count_ptr, capacity, row_R, keep_RQ, request_Q):
    """Each kept row goes into its request's list, at the place its counter gives it."""
    slot_RQ = tl.atomic_add(count_ptr + request_Q[None, :] + tl.zeros_like(keep_RQ).to(tl.int32), 1, keep_RQ, "relaxed")
    list_RQ = row_ptr + request_Q[None, :].to(tl.int64) * capacity
    tl.store(list_RQ + slot_RQ, row_R[:, None], keep_RQ & (slot_RQ < capacity))


@triton.jit
def _sample_kernel(
    code_ptr, scale_ptr, user_ptr, best_ptr, groups, requests,
    E: tl.constexpr, Q: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    score_RQ = _coarse(code_ptr, scale_ptr, _users(user_ptr, requests, E, Q), tile * R + tl.arange(0, R), E)
    score_RQ = tl.where(score_RQ == score_RQ, score_RQ, float("-inf"))
    best_GQ = tl.max(tl.reshape(score_RQ, [R // GROUP, GROUP, Q]), 1)
    group_G = tile * (R // GROUP) + tl.arange(0, R // GROUP)
    request_Q = tl.arange(0, Q)
    tl.store(best_ptr + request_Q[None, :] * groups + group_G[:, None], best_GQ, request_Q[None, :] < requests)


@triton.jit
def _scan_kernel(
    code_ptr, scale_ptr, item_ptr, user_ptr, threshold_ptr, row_ptr, count_ptr, tiles, requests, capacity,
    E: tl.constexpr, Q: tl.constexpr, R: tl.constexpr, HAS_ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    request_Q = tl.arange(0, Q)
    user_EQ = _users(user_ptr, requests, E, Q)
    threshold_Q = tl.load(threshold_ptr + request_Q, request_Q < requests, float("inf"))
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        place_R = tile * R + tl.arange(0, R)
        score_RQ = _coarse(code_ptr, scale_ptr, user_EQ, place_R, E)
        keep_RQ = score_RQ >= threshold_Q[None, :]
        if tl.max(tl.max(keep_RQ.to(tl.int32), 1), 0) > 0:
            row_R = tl.load(item_ptr + place_R) if HAS_ROWS else place_R
            _append(row_ptr, count_ptr, capacity, row_R, keep_RQ, request_Q)


@triton.jit
def _probe_kernel(
    code_ptr, scale_ptr, item_ptr, user_ptr, threshold_ptr, start_ptr, size_ptr, tile_end_ptr, row_ptr, count_ptr,
    probes, capacity, E: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Tiles of one request's clusters, numbered through; the tile's cluster is found by counting those that ended."""
    request = tl.program_id(1)
    request_Q = tl.arange(0, 16)
    probe_P = tl.arange(0, P)
    user_EQ = _users(user_ptr + request * E, 1, E, 16)
    threshold = tl.load(threshold_ptr + request)
    threshold_Q = tl.where(request_Q == 0, threshold, float("inf"))
    at = request * probes
    tile_end_P = tl.load(tile_end_ptr + at + probe_P, probe_P < probes, 2**62)
    tiles = tl.load(tile_end_ptr + at + probes - 1)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        cluster = tl.sum((tile_end_P <= tile).to(tl.int32), 0)
        before = tl.load(tile_end_ptr + at + cluster - 1, cluster > 0, 0)
        offset_R = (tile - before) * R + tl.arange(0, R)
        place_R = tl.load(start_ptr + at + cluster) + offset_R
        is_in_R = offset_R < tl.load(size_ptr + at + cluster)
        score_RQ = _coarse(code_ptr, scale_ptr, user_EQ, place_R, E)
        keep_RQ = (score_RQ >= threshold_Q[None, :]) & is_in_R[:, None]
        if tl.max(tl.max(keep_RQ.to(tl.int32), 1), 0) > 0:
            row_R = tl.load(item_ptr + place_R, is_in_R, -1)
            _append(row_ptr + request.to(tl.int64) * capacity, count_ptr + request, capacity, row_R, keep_RQ, request_Q)


@triton.jit
def _exact(
    head_ptr, tail_ptr, slot_ptr, head_rows, width, row_C, is_there_C, channel_E, columns, HAS_TAIL: tl.constexpr
):
    """[C, E] of the exact rows, from the head's memory or the tail's; zeros where no row is, and past the columns."""
    is_read = is_there_C[:, None] & (channel_E[None, :] < columns)
    if HAS_TAIL:
        slot_C = tl.load(slot_ptr + row_C, is_there_C, 0)
        is_head = slot_C[:, None] < head_rows
        head_at = slot_C[:, None].to(tl.int64) * width + channel_E[None, :]
        tail_at = (slot_C - head_rows)[:, None].to(tl.int64) * width + channel_E[None, :]
        head_CE = tl.load(head_ptr + head_at, is_read & is_head, 0.0)
        tail_CE = tl.load(tail_ptr + tail_at, is_read & ~is_head, 0.0)
        exact_CE = tl.where(is_head, head_CE, tail_CE)
    else:
        exact_CE = tl.load(head_ptr + row_C[:, None].to(tl.int64) * width + channel_E[None, :], is_read, 0.0)
    return exact_CE


@triton.jit
def _dot_kernel(
    head_ptr, tail_ptr, slot_ptr, head_rows, width, row_ptr, user_ptr, score_ptr, capacity, columns,
    E: tl.constexpr, C: tl.constexpr, HAS_TAIL: tl.constexpr,
):  # fmt: skip
    place_C = tl.program_id(0) * C + tl.arange(0, C)
    channel_E = tl.arange(0, E)
    at_C = tl.program_id(1).to(tl.int64) * capacity + place_C
    row_C = tl.load(row_ptr + at_C, place_C < capacity, -1)
    score_C = tl.full([C], float("-inf"), tl.float32)
    if tl.max(row_C, 0) >= 0:
        exact_CE = _exact(
            head_ptr, tail_ptr, slot_ptr, head_rows, width, row_C, row_C >= 0, channel_E, columns, HAS_TAIL
        )
        user_E = tl.load(user_ptr + tl.program_id(1) * columns + channel_E, channel_E < columns, 0.0)
        score_C = tl.where(row_C >= 0, tl.sum(exact_CE.to(tl.float32) * user_E[None, :], 1), float("-inf"))
    tl.store(score_ptr + at_C, score_C, place_C < capacity)


@triton.jit
def _gather_kernel(
    head_ptr, tail_ptr, slot_ptr, head_rows, width, row_ptr, feature_ptr, capacity,
    F: tl.constexpr, C: tl.constexpr, HAS_TAIL: tl.constexpr,
):  # fmt: skip
    place_C = tl.program_id(0) * C + tl.arange(0, C)
    channel_F = tl.arange(0, F)
    at_C = tl.program_id(1).to(tl.int64) * capacity + place_C
    row_C = tl.load(row_ptr + at_C, place_C < capacity, -1)
    exact_CF = _exact(head_ptr, tail_ptr, slot_ptr, head_rows, width, row_C, row_C >= 0, channel_F, width, HAS_TAIL)
    is_written = (place_C < capacity)[:, None] & (channel_F[None, :] < width)
    tl.store(feature_ptr + at_C[:, None] * width + channel_F[None, :], exact_CF, is_written)
