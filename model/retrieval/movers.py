"""Updates on their way into a table by kernels: one block of page-locked memory, one CUDA graph.

A search beside an update waits while the update's thread holds the interpreter's lock. So the update is laid side by
side in memory that is there already, with the addresses it is for, and goes by one call: a graph copies the block to
the device and launches two kernels that read from it what they are to do. There is one graph a size, for all updates.
"""

import ctypes
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from model.kernels.rows_triton import FIELDS, HEAD, ROWS, move_rows
from model.retrieval.streams import captured

if TYPE_CHECKING:
    from model.retrieval.index import Behind, ItemTable

GRAPHED = (2**14, 2**16, 2**18, 2**20)
"""Bytes of the blocks that there are graphs for."""
PROGRAMS = 32, 12
"""Of a graph's launches, for rows and columns."""
MOST_BYTES = 2**25
"""Of a block; a larger update goes into the table column by column from where it lies."""
ALIGNMENT = 16
NUMBER = 8
"""Bytes of an int64."""
_memmove: Callable[[int, int, int], Any] = ctypes.CDLL(None).memmove  # lets other threads in, ctypes.memmove does not
_memmove.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class Block:
    """The same bytes in page-locked memory and on the device; on the CPU one memory is both."""

    here: torch.Tensor
    here_numbers: NDArray[np.int64]
    there: torch.Tensor
    there_numbers: torch.Tensor
    here_at: int
    there_at: int
    """Addresses."""

    @classmethod
    def empty(cls, size: int, device: torch.device) -> Self:
        """size: in bytes, whole int64 numbers."""
        is_cuda = device.type == "cuda"
        here = torch.zeros(size, dtype=torch.uint8, pin_memory=is_cuda)
        return cls._of(here, torch.zeros_like(here, device=device) if is_cuda else here)

    @classmethod
    def _of(cls, here: torch.Tensor, there: torch.Tensor) -> Self:
        numbers, there_numbers = here.numpy().view(np.int64), there.view(torch.int64)
        return cls(here, numbers, there, there_numbers, here.data_ptr(), there.data_ptr())

    def first(self, size: int) -> Self:
        """The first so many bytes of it, for a smaller copy."""
        here = self.here[:size]
        return self._of(here, here if self.there is self.here else self.there[:size])

    def send(self, programs: tuple[int, int]) -> None:
        """Copy to the device and do what it says, on the current stream."""
        if self.there is not self.here:
            self.there.copy_(self.here, non_blocking=True)
        move_rows(self.there_numbers, 0, programs)
        move_rows(self.there_numbers, 1, programs)


class RowMover:
    """Writes updates into tables of one device. Not for two threads at a time."""

    def __init__(self, device: torch.device) -> None:
        """Compiles the kernel and captures the graphs."""
        self._device = device
        largest = Block.empty(GRAPHED[-1], device)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # which fills it; the graphs run on other streams
        self._blocks = {size: largest.first(size) for size in GRAPHED}
        """By size; nothing else is kept of a larger one than the last."""
        self._graphs = {
            size: captured(device, lambda block=block: block.send(PROGRAMS))  # type: ignore[misc]
            for size, block in self._blocks.items()
            if device.type == "cuda"
        }

    def takes(self, table: "ItemTable", columns: Set[str], rows: int, behind: int) -> bool:
        """Whether an update of so many rows, beside so many to take over, goes by the block.

        Embeddings that are rounded number by number do not: they are on the table's device.
        """
        is_rounded_here = "feature" not in columns or table.feedback_EE is None
        return is_rounded_here and rows * (NUMBER + table.bytes_a_row) + behind * NUMBER <= MOST_BYTES

    def write(
        self, table: "ItemTable", row_R: NDArray[np.int64], columns: dict[str, torch.Tensor], other: "ItemTable",
        behind: "list[Behind]",
    ) -> None:  # fmt: skip
        """Take over rows of another table, then write rows of some columns; on the current stream.

        columns: on the CPU, named without their axes. The stream must be done before the next call.
        """
        values = {name: _held(value) for name, value in table.stored(columns).items()}
        taken = [(part, table.changed_with(part.columns)) for part in behind]
        moves = sum(len(names) for _, names in taken)
        row_at = HEAD + FIELDS * (moves + len(values))
        end = _aligned(NUMBER * (row_at + len(row_R) + sum(len(part.row_R) for part in behind)))
        value_at = []
        for value in values.values():
            value_at.append(end)
            end += _aligned(value.nbytes)
        size = next((size for size in GRAPHED if size >= end), 0) or 1 << (end - 1).bit_length()
        block = self._block(size)
        memmove = ctypes.memmove if size <= GRAPHED[-1] else _memmove
        numbers = [HEAD, moves, HEAD + FIELDS * moves, len(values)]
        place_of, place_in = table.place_of, other.place_of
        for part, names in taken:
            rows = len(part.row_R)
            for name in names:
                target, width = place_of[name]
                numbers += (place_in[name][0], target, width, row_at, rows, 1)
            memmove(block.here_at + NUMBER * row_at, part.row_R.ctypes.data, NUMBER * rows)
            row_at += rows
        for (name, value), start in zip(values.items(), value_at, strict=True):
            target, width = place_of[name]
            numbers += (block.there_at + start, target, width, row_at, len(row_R), 0)
            memmove(block.here_at + start, value.data_ptr(), value.nbytes)
        memmove(block.here_at + NUMBER * row_at, row_R.ctypes.data, NUMBER * len(row_R))
        block.here_numbers[: len(numbers)] = numbers
        graph = self._graphs.get(size)
        if graph is not None:
            graph.replay()
        else:
            most = max([1, len(row_R), *(len(part.row_R) for part in behind)])
            block.send((-(-most // ROWS), max(moves, len(values), 1)))

    def _block(self, size: int) -> Block:
        """A block of so many bytes; what was in it is gone."""
        block = self._blocks.get(size)
        if block is None:
            for larger in [kept for kept in self._blocks if kept > GRAPHED[-1]]:
                del self._blocks[larger]
            block = self._blocks[size] = Block.empty(size, self._device)
        return block


def _held(value: torch.Tensor) -> torch.Tensor:
    """The same on the CPU, row after row. Most are: to ask takes no call that other threads come in at."""
    return value if value.is_cpu and value.is_contiguous() else value.cpu().contiguous()


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
