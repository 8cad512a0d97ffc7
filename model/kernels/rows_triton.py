"""Rows of a table's columns set by one launch, whatever their dtypes: bytes go from where they lie to their places.

Source: our own; a scatter and a gather, of which only the addresses differ.

All that a launch is to do is read from a block of int64 numbers on the device, so that a CUDA graph of it serves every
update:

    head    of each step, where its moves begin in the block and how many there are
    moves   a column's each: source's address, target's, bytes a row, where its rows begin in the block, how many there
            are, and whether the source has the target's rows or, if 0, those to move side by side
    rows    of the target, each once a move
"""

import torch
import triton
import triton.language as tl

STEPS = 2
HEAD, FIELDS = 2 * STEPS, 6
"""Numbers of the head and of a move."""
_FIELDS: tl.constexpr = tl.constexpr(FIELDS)
ROWS = 16
"""Of a program at a time."""
_BYTES = 128


def move_rows(block: torch.Tensor, step: int, programs: tuple[int, int]) -> None:
    """Do a step's moves, on the current stream: target[row[n]] = source[row[n]], or source[n].

    block: int64, on the device of the addresses in it. Nobody checks the addresses. programs: to share rows and columns
    among; any number does all.
    """
    _move_kernel[programs](block, step, ROWS, _BYTES, num_warps=4)


@triton.jit(do_not_specialize=["step"])
def _move_kernel(block, step, ROWS: tl.constexpr, BYTES: tl.constexpr):
    first, moves = tl.load(block + 2 * step), tl.load(block + 2 * step + 1).to(tl.int32)
    for place in range(tl.program_id(1), moves, tl.num_programs(1)):
        move = block + first + place * _FIELDS
        source = tl.load(move).to(tl.pointer_type(tl.uint8))
        target = tl.load(move + 1).to(tl.pointer_type(tl.uint8))
        width, row_at = tl.load(move + 2), tl.load(move + 3)
        rows, is_by_row = tl.load(move + 4).to(tl.int32), tl.load(move + 5) != 0
        for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
            place_R = start + tl.arange(0, ROWS)
            is_row_R = place_R < rows
            row_R = tl.load(block + row_at + place_R, mask=is_row_R, other=0)
            from_R = tl.where(is_by_row, row_R, place_R.to(tl.int64))
            for begin in range(0, width.to(tl.int32), BYTES):
                byte_C = begin + tl.arange(0, BYTES)
                is_in_RC = is_row_R[:, None] & (byte_C < width)[None, :]
                value_RC = tl.load(source + (from_R * width)[:, None] + byte_C[None, :], mask=is_in_RC)
                tl.store(target + (row_R * width)[:, None] + byte_C[None, :], value_RC, mask=is_in_RC)
