"""Updates by the kernel leave in both tables what updates column by column leave, whatever fails in between."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from model.retrieval import movers
from model.retrieval.index import Behind, ItemTable, LiveIndex
from model.retrieval.movers import RowMover
from model.retrieval.rows import Deltas, Layout
from model.retrieval.scorer import DotScorer
from tests.model.retrieval.builders import VERSION, make_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def assert_alike(index: LiveIndex, other: LiveIndex) -> None:
    """The tables that are read hold the same bytes."""
    with index.pin() as one, other.pin() as two:
        assert (one.revision, one.table.count) == (two.revision, two.table.count)
        for name, buffer in one.table.named_buffers():
            part, wanted = buffer[: one.table.count], two.table.get_buffer(name)[: one.table.count]
            assert torch.equal(part.nan_to_num(-7), wanted.nan_to_num(-7)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_updates_by_the_kernel_are_those_column_by_column(dtype: torch.dtype) -> None:
    """Upserts, deletions and deltas over known, new and unknown items; the tables grow; unequal numbers of rows."""
    rng = np.random.default_rng(3)
    first = make_rows(rng, 20)
    by_column, by_kernel = (
        LiveIndex(first, DotScorer(), dtype=dtype, device=DEVICE, fused=fused) for fused in (False, True)
    )
    for step in range(12):
        ids = rng.permutation(np.arange(990, 1060))[: int(rng.integers(1, 20))].tolist()
        batch = make_rows(rng, int(rng.integers(1, 35)), first_id=int(rng.integers(1000, 1030)))
        money = torch.from_numpy(rng.integers(1, 9, len(ids)).astype(np.float32))
        for index in (by_column, by_kernel):
            if step % 3 == 0:
                index.upsert(batch)
            elif step % 3 == 1:
                index.change(Deltas(VERSION, ids, budget_R=money, eligible_R=money > 4))
            else:
                index.delete(VERSION, ids)
        assert_alike(by_kernel, by_column)


def test_the_kernel_writes_the_named_rows_alone() -> None:
    """17 rows in one step, 3 in the other, one of them in both, which is written last; the rest is untouched."""
    rng = np.random.default_rng(0)
    layout = Layout(embedding_dim=69, scalars=1, attributes=0)
    tables = [ItemTable(layout, 40, device=DEVICE) for _ in range(3)]
    for table in tables:
        for buffer in table.buffer_of.values():
            buffer.copy_(torch.from_numpy(rng.integers(0, 2 if buffer.dtype == torch.bool else 100, buffer.shape)))
    target, source, wanted = tables
    for name, buffer in wanted.buffer_of.items():
        buffer.copy_(target.buffer_of[name])
    taken_R, row_R = np.arange(39, 22, -1), np.array([5, 30, 0])
    columns = {"feature": torch.from_numpy(rng.random((3, 70), np.float32)), "eligible": torch.tensor([True] * 3)}
    RowMover(target.device).write(target, row_R, columns, source, [Behind(taken_R, {"feature", "mask", "bid"})])
    wanted.copy_rows(source, torch.from_numpy(taken_R).to(DEVICE), {"feature", "mask", "bid"})
    wanted.write(torch.from_numpy(row_R).to(DEVICE), {name: value.to(DEVICE) for name, value in columns.items()})
    for name, buffer in target.buffer_of.items():
        assert torch.equal(buffer, wanted.buffer_of[name]), name


def test_the_block_grows_and_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of graphs for 256 bytes and 1024, and larger ones; what they held before leaves no trace."""
    monkeypatch.setattr(movers, "GRAPHED", (256, 1024))
    rng = np.random.default_rng(1)
    rows = make_rows(rng, 40)
    by_column, by_kernel = (LiveIndex(rows, DotScorer(), device=DEVICE, fused=fused) for fused in (False, True))
    for count in (1, 30, 2, 40, 3):
        batch = make_rows(rng, count)
        for index in (by_column, by_kernel):
            index.upsert(batch)
        assert_alike(by_kernel, by_column)


def test_rows_rounded_for_their_users_are_so_by_the_table_s_device() -> None:
    """Their bids go by the block."""
    table = ItemTable(Layout(embedding_dim=4), 10, dtype=torch.int8, device=DEVICE)
    mover = RowMover(table.device)
    assert mover.takes(table, {"feature", "bid"}, 5, 5)
    table.feedback_EE = torch.zeros(4, 4)
    assert not mover.takes(table, {"feature", "bid"}, 5, 5)
    assert mover.takes(table, {"bid"}, 5, 5)


def test_larger_updates_go_column_by_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movers, "MOST_BYTES", 2000)
    calls: list[int] = []
    whole = RowMover.write

    def counted(self: RowMover, table: ItemTable, row_R: np.ndarray, *rest: object) -> None:
        calls.append(len(row_R))
        whole(self, table, row_R, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(RowMover, "write", counted)
    rng = np.random.default_rng(2)
    rows = make_rows(rng, 40)
    by_column, by_kernel = (LiveIndex(rows, DotScorer(), device=DEVICE, fused=fused) for fused in (False, True))
    for count in (3, 40, 4):
        batch = make_rows(rng, count)
        for index in (by_column, by_kernel):
            index.upsert(batch)
        assert_alike(by_kernel, by_column)
    assert calls == [3, 4]


def test_an_update_that_fails_halfway_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel has written bids when it breaks off; the next two updates, one a table, put them right."""
    rows = make_rows(np.random.default_rng(5), 20)
    by_column, by_kernel = (LiveIndex(rows, DotScorer(), device=DEVICE, fused=fused) for fused in (False, True))
    for index in (by_column, by_kernel):
        index.change(Deltas(VERSION, rows.item_ids[:1], bid_R=torch.ones(1)))  # both tables have the first rows now
    whole = RowMover.write

    def half(self: RowMover, table: ItemTable, *rest: object) -> None:
        whole(self, table, *rest)  # type: ignore[arg-type]
        raise OSError("broken off")

    monkeypatch.setattr(RowMover, "write", half)
    with pytest.raises(OSError, match="broken off"):
        by_kernel.change(Deltas(VERSION, rows.item_ids, bid_R=torch.full((20,), 77.0)))
    with pytest.raises(OSError, match="broken off"):
        by_kernel.delete(VERSION, rows.item_ids[:5])
    monkeypatch.undo()
    assert_alike(by_kernel, by_column)
    for item in rows.item_ids[:2]:
        for index in (by_column, by_kernel):
            index.change(Deltas(VERSION, [item], budget_R=torch.ones(1)))
        assert_alike(by_kernel, by_column)


def test_columns_are_moved_as_they_lie_side_by_side() -> None:
    part_RC = torch.arange(6).view(2, 3)[:, 1:]
    held_RC = movers._held(part_RC)
    assert held_RC.is_contiguous()
    assert held_RC.tolist() == [[1, 2], [4, 5]]
    assert movers._held(held_RC) is held_RC
