"""Kernels run on the GPU where there is one, else in Triton's interpreter (tests/conftest.py)."""

from typing import Any

import numpy as np
import pytest
import torch


@pytest.fixture
def row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's matrix products take one row after the other, as if it were alone.

    They are numpy's, and those round a row by where it stands in the matrix, which a GPU's do not. Nothing on a GPU.
    """
    if torch.cuda.is_available():
        return
    from triton.runtime import interpreter

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        right = np.ascontiguousarray(b.data, dtype=d.data.dtype)
        rows = [np.ascontiguousarray(row, dtype=d.data.dtype) @ right for row in a.data]
        return interpreter.TensorHandle(np.stack(rows) + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
