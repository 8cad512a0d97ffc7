"""Rows of a table's columns set by one launch, whatever their dtypes: bytes go from where they lie to their places.

Source: our own; a scatter and a gather, of which only the addresses differ.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

FIELDS = 4
"""int64 numbers of a column's move: source, target, bytes a row, and whether the source has the target's rows."""
_FIELDS: tl.constexpr = tl.constexpr(FIELDS)
_ROWS, _BYTES = 16, 64


@dataclass(frozen=True, slots=True)
class Moves:
    """Which rows of which columns; places in a block of int64 numbers."""

    column_at: int
    """Where the columns' moves begin, FIELDS numbers each."""
    columns: int
    row_at: int
    """Where the target's rows begin, each once."""
    rows: int


def move_rows(block: torch.Tensor, moves: Moves) -> None:
    """Set rows of some columns, on the current stream: target[row[n]] = source[row[n]], or source[n].

    block: int64, on the device of the addresses in it; see `Moves`. Nobody checks the addresses.
    """
    if moves.rows and moves.columns:
        grid = triton.cdiv(moves.rows, _ROWS), moves.columns
        _move_kernel[grid](block, moves.column_at, moves.row_at, moves.rows, _ROWS, _BYTES, num_warps=4)


@triton.jit(do_not_specialize=["column_at", "row_at", "rows"])
def _move_kernel(block, column_at, row_at, rows, ROWS: tl.constexpr, BYTES: tl.constexpr):
    move = block + column_at + tl.program_id(1) * _FIELDS
    source = tl.load(move).to(tl.pointer_type(tl.uint8))
    target = tl.load(move + 1).to(tl.pointer_type(tl.uint8))
    width, is_by_row = tl.load(move + 2), tl.load(move + 3) != 0
    place_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row_R = place_R < rows
    row_R = tl.load(block + row_at + place_R, mask=is_row_R, other=0)
    from_R = tl.where(is_by_row, row_R, place_R.to(tl.int64))
    for start in range(0, width.to(tl.int32), BYTES):
        byte_C = start + tl.arange(0, BYTES)
        is_in_RC = is_row_R[:, None] & (byte_C < width)[None, :]
        value_RC = tl.load(source + (from_R * width)[:, None] + byte_C[None, :], mask=is_in_RC)
        tl.store(target + (row_R * width)[:, None] + byte_C[None, :], value_RC, mask=is_in_RC)
