"""Updates on their way into a table by kernels: one block of page-locked memory, one copy, two launches.

A search beside an update waits wherever their threads hand the interpreter's lock to and fro, and every call into
PyTorch is such a place. So numpy lays the rows side by side, and the block, its copy on the device and the views of
both are kept from update to update.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from numpy.typing import NDArray

from model.kernels.rows_triton import FIELDS, Moves, move_rows

if TYPE_CHECKING:
    from model.retrieval.index import Behind, ItemTable

LEAST_BYTES, MOST_BYTES = 2**20, 2**25
"""Of the block; a larger update goes into the table column by column from where it lies."""
ALIGNMENT = 16
NUMBER = 8
"""Bytes of an int64."""


@dataclass(frozen=True, slots=True)
class Block:
    """The same bytes in page-locked memory and on the device; on the CPU one memory is both."""

    here: torch.Tensor
    here_bytes: NDArray[np.uint8]
    there: torch.Tensor
    there_numbers: torch.Tensor

    @classmethod
    def empty(cls, size: int, device: torch.device) -> Self:
        """size: in bytes, whole int64 numbers."""
        is_cuda = device.type == "cuda"
        here = torch.zeros(size, dtype=torch.uint8, pin_memory=is_cuda)
        there = torch.zeros_like(here, device=device) if is_cuda else here
        return cls(here, here.numpy(), there, there.view(torch.int64))

    def first(self, size: int) -> Self:
        """The first so many bytes of it, for a smaller copy."""
        here, there = self.here[:size], self.there[:size]
        return type(self)(here, here.numpy(), there, there.view(torch.int64))

    def send(self) -> None:
        """Copy to the device, on the current stream."""
        if self.there is not self.here:
            self.there.copy_(self.here, non_blocking=True)


class RowMover:
    """Writes updates into tables of one device. Not for two threads at a time."""

    def __init__(self, device: torch.device) -> None:
        """Compiles the kernel."""
        self._device = device
        self._blocks: dict[int, Block] = {}
        """By size, powers of two: the first bytes of the largest."""
        block = self._room(LEAST_BYTES)
        move_rows(block.there_numbers, Moves(column_at=0, columns=1, row_at=FIELDS, rows=1))  # one row of no bytes
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()

    def takes(self, table: "ItemTable", rows: int, behind: int) -> bool:
        """Whether an update of so many rows, beside so many to take over, goes by the block."""
        bytes_a_row = NUMBER + sum(_width(buffer) for buffer in table.buffer_of.values())
        return rows * bytes_a_row + behind * NUMBER <= MOST_BYTES

    def write(
        self, table: "ItemTable", row_R: NDArray[np.int64], columns: dict[str, torch.Tensor], other: "ItemTable",
        behind: "list[Behind]",
    ) -> None:  # fmt: skip
        """Take over rows of another table, then write rows of some columns; on the current stream.

        columns: on the CPU, named without their axes. The stream must be done before the next call.
        """
        values = {name: _bytes(value) for name, value in table.stored(columns).items()}
        steps = [(part.row_R, table.changed_with(part.columns)) for part in behind]
        steps.append((row_R, list(values)))
        start = end = _aligned(NUMBER * sum(FIELDS * len(names) + len(rows) for rows, names in steps))
        value_at = {}
        for name, value in values.items():
            value_at[name] = end
            end += _aligned(len(value))
        block = self._room(end)
        here, there = block.here_bytes, block.there.data_ptr()
        for name, value in values.items():
            here[value_at[name] : value_at[name] + len(value)] = value
        numbers, place, launches = here[:start].view(np.int64), 0, []
        for step, (rows, names) in enumerate(steps):
            is_taken = step < len(behind)
            fields = [
                (
                    other.buffer_of[name].data_ptr() if is_taken else there + value_at[name],
                    table.buffer_of[name].data_ptr(), _width(table.buffer_of[name]), is_taken,
                )
                for name in names
            ]  # fmt: skip
            row_at = place + FIELDS * len(names)
            numbers[place:row_at] = np.array(fields, np.int64).reshape(-1)
            numbers[row_at : row_at + len(rows)] = rows
            launches.append(Moves(column_at=place, columns=len(names), row_at=row_at, rows=len(rows)))
            place = row_at + len(rows)
        block.send()
        for moves in launches:
            move_rows(block.there_numbers, moves)

    def _room(self, size: int) -> Block:
        """A block of at least so many bytes; what was in it is gone."""
        size = max(LEAST_BYTES // 2**8, 1 << (size - 1).bit_length())
        block = self._blocks.get(size)
        if block is None:
            largest = max(self._blocks, default=0)
            if size > largest:
                self._blocks = {size: Block.empty(size, self._device)}
            else:
                self._blocks[size] = self._blocks[largest].first(size)
            block = self._blocks[size]
        return block


def _width(buffer: torch.Tensor) -> int:
    """Bytes of a row."""
    return math.prod(buffer.shape[1:]) * buffer.element_size()


def _bytes(value: torch.Tensor) -> NDArray[np.uint8]:
    """A tensor's bytes, row after row. numpy has no bfloat16."""
    array = (value.view(torch.int16) if value.dtype == torch.bfloat16 else value).numpy()
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
