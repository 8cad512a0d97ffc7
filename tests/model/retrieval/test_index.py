"""Live updates: what each one changes, what is refused, and that no request ever sees half of one."""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.index import torn_reads
from model.errors import DataError, IndexBusy, IndexMismatch, ShapeError
from model.retrieval import index as index_module
from model.retrieval import reference
from model.retrieval.index import DENSE, IndexHolder, LiveIndex, RowNumbers
from model.retrieval.rows import Deltas, ItemRows, Layout, read_rows, write_rows
from model.retrieval.rules import Plan, Request
from model.retrieval.scorer import DotScorer, InteractionScorer
from tests.model.retrieval.builders import LAYOUT, VERSION, make_plan, make_request, make_rows

SMALL = Layout(embedding_dim=1)


def rows_of(items: dict[int, float], version: str = VERSION, **columns: object) -> ItemRows:
    """Items and their score for the user [1]."""
    return ItemRows.build(version, SMALL, list(items), list(items.values()), **columns)  # type: ignore[arg-type]


def best(index: LiveIndex, k: int = 9, request: Request | None = None) -> list[int]:
    return index.search(np.ones((1, 1), np.float32), [request or Request()], Plan(k=k), VERSION).item_ids[0]


def test_each_update_changes_what_it_names_and_nothing_else() -> None:
    index = LiveIndex(rows_of({10: 1, 11: 2, 12: 3}), DotScorer())
    assert best(index) == [12, 11, 10]
    assert index.upsert(rows_of({13: 9, 10: 5})).changed == 2
    assert best(index) == [13, 10, 12, 11]
    deleted = index.delete(VERSION, [12, 99])
    assert (deleted.changed, deleted.unknown) == (1, 1)
    assert best(index) == [13, 10, 11]
    assert len(index) == 3
    index.change(Deltas(VERSION, [13, 11], bid_R=torch.tensor([1.0, 9.0])))
    assert best(index, request=Request(bid_power=1)) == [11, 13, 10]  # 18, 9, 5
    index.change(Deltas(VERSION, [10], eligible_R=torch.tensor([False])))
    assert best(index) == [13, 11]
    index.change(Deltas(VERSION, [11], budget_R=torch.tensor([7.0])))
    assert best(index, request=Request(min_budget=1)) == [11]
    assert index.revision == 6


def test_a_deleted_item_stays_away_until_it_is_brought_again() -> None:
    index = LiveIndex(rows_of({10: 1, 11: 2}), DotScorer())
    index.delete(VERSION, [11])
    late = index.change(Deltas(VERSION, [11, 10], eligible_R=torch.tensor([True, True])))
    assert (late.changed, late.unknown) == (1, 1)
    assert best(index) == [10]
    index.upsert(rows_of({12: 2, 11: 2}))
    assert best(index) == [11, 12, 10], "its old row, so before the newer item of the same score"


def test_updates_arriving_twice_change_nothing_more() -> None:
    index = LiveIndex(rows_of({10: 1, 11: 2}), DotScorer())
    for _ in range(2):
        index.change(Deltas(VERSION, [10], bid_R=torch.tensor([4.0])))
    assert best(index, request=Request(bid_power=1)) == [10, 11]
    assert index.copy_of_rows([10]).bid_R.tolist() == [4]


@pytest.mark.parametrize("seed", range(8))
def test_after_any_updates_the_index_answers_like_a_fresh_one(seed: int) -> None:
    """Random upserts, deletions and deltas; the table grows several times; ids as the reference over what is there."""
    rng = np.random.default_rng(seed)
    first = make_rows(rng, 20)
    index = LiveIndex(first, DotScorer())
    there = {item: place for place, item in enumerate(first.item_ids)}
    order = list(first.item_ids)
    for _ in range(12):
        batch = make_rows(rng, int(rng.integers(1, 15)), first_id=int(rng.integers(990, 1080)))
        index.upsert(batch)
        order += [item for item in batch.item_ids if item not in order]
        there.update((item, 0) for item in batch.item_ids)
        gone = rng.choice(order, 3, replace=False).tolist()
        index.delete(VERSION, gone)
        for item in gone:
            there.pop(item, None)
        some = rng.choice(order, 5, replace=False).tolist()
        index.change(Deltas(VERSION, some, bid_R=torch.from_numpy(rng.choice([0.25, 1, 4], 5).astype(np.float32))))
        rows = index.copy_of_rows([item for item in order if item in there])
        assert rows.item_ids == [item for item in order if item in there]
        request, plan = make_request(rng, rows), make_plan(rng, 30)
        plan = Plan(k=plan.k, advertiser_cap=plan.advertiser_cap, category_cap=plan.category_cap)  # draws go by row
        user_E = rng.integers(-2, 3, 4) / 2
        scores = reference.dot_scores(rows, user_E)
        wanted = [rows.item_ids[row] for row in reference.search(rows, scores, request, plan)]
        slates = index.search(user_E[None].astype(np.float32), [request], plan, VERSION)
        assert slates.item_ids == [wanted]


def test_a_version_that_differs_is_refused_by_both_names() -> None:
    index = LiveIndex(rows_of({10: 1}), DotScorer())
    other = "b" * 16
    both = f"{other}, the index of {VERSION}"
    with pytest.raises(IndexMismatch, match=both):
        index.search(np.ones((1, 1), np.float32), [Request()], Plan(k=1), other)
    with pytest.raises(IndexMismatch, match=both):
        index.upsert(rows_of({11: 1}, other))
    with pytest.raises(IndexMismatch, match=both):
        index.delete(other, [10])
    with pytest.raises(IndexMismatch, match=both):
        index.change(Deltas(other, [10], bid_R=torch.ones(1)))
    assert index.revision == 1


def test_bad_batches_are_refused_whole() -> None:
    index = LiveIndex(rows_of({10: 1}), DotScorer())
    with pytest.raises(DataError, match="11 comes twice"):
        ItemRows.build(VERSION, SMALL, [11, 11], [1, 2])
    with pytest.raises(DataError, match="those of item 12 are not"):
        rows_of({11: 1, 12: float("nan")})
    with pytest.raises(DataError, match=r"bid must be finite and at least 0, item 11 has -1\.0"):
        rows_of({11: 1}, bid_R=[-1])
    with pytest.raises(DataError, match="budget must be finite"):
        Deltas(VERSION, [10], budget_R=torch.tensor([float("inf")]))
    with pytest.raises(ShapeError, match=r"bid must have shape \[1\], got \[2\]"):
        Deltas(VERSION, [10], bid_R=torch.ones(2))
    with pytest.raises(ShapeError, match="the index has rows of"):
        index.upsert(make_rows(np.random.default_rng(0), 2))
    assert best(index) == [10]


def test_a_pinned_table_does_not_change_and_an_update_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One update fits beside a reader; the next would write into the table being read, and says so after its wait."""
    monkeypatch.setattr(index_module, "WAIT_S", 0.05)
    index = LiveIndex(rows_of({10: 1}), DotScorer())
    with index.pin() as pinned:
        before = {name: buffer.clone() for name, buffer in pinned.table.named_buffers()}
        index.upsert(rows_of({10: 3, 12: 1}))
        assert best(index) == [10, 12]
        assert index.rows_of([10, 12], pinned.table.count) == [0], "item 12 came later"
        with pytest.raises(IndexBusy, match="1 requests still read"):
            index.upsert(rows_of({11: 4}))
        assert all(torch.equal(buffer, before[name]) for name, buffer in pinned.table.named_buffers())
    assert best(index) == [10, 12], "nothing of the refused update"
    index.upsert(rows_of({11: 4}))
    assert best(index) == [11, 10, 12]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_updates_of_other_columns_one_after_the_other_are_all_kept(dtype: torch.dtype) -> None:
    """After each, both tables hold what an index has that never had the other table to catch up with."""
    rng = np.random.default_rng(4)
    rows = make_rows(rng, 30)
    index = LiveIndex(rows, DotScorer(), dtype=dtype)
    wanted = {item: (float(rows.bid_R[at]), float(rows.budget_R[at]), True) for at, item in enumerate(rows.item_ids)}
    feature_of = dict(zip(rows.item_ids, index.copy_of_rows(rows.item_ids).feature_RF.tolist(), strict=True))
    for step in range(60):
        ids = rng.permutation(rows.item_ids)[:5].tolist()
        money = rng.integers(1, 9, 5).astype(np.float32)
        there = [item for item in ids if wanted[item][2]]
        if step % 4 == 0:
            index.change(Deltas(VERSION, ids, bid_R=torch.from_numpy(money)))
            wanted |= {
                item: (float(bid), *wanted[item][1:]) for item, bid in zip(ids, money, strict=True) if item in there
            }
        elif step % 4 == 1:
            index.change(Deltas(VERSION, ids, budget_R=torch.from_numpy(money)))
            wanted |= {
                item: (wanted[item][0], float(budget), True)
                for item, budget in zip(ids, money, strict=True) if item in there
            }  # fmt: skip
        elif step % 4 == 2:
            applied = index.delete(VERSION, ids)
            assert (applied.changed, applied.unknown) == (len(there), 5 - len(there))
            wanted |= {item: (*wanted[item][:2], False) for item in ids}
        else:
            brought = make_rows(rng, 30)
            at_R = torch.tensor([item - 1000 for item in ids])
            picked = [getattr(brought, name) [at_R] for name in (
                "feature_RF", "mask_RW", "category_R", "advertiser_R", "attribute_RA", "bid_R", "budget_R", "eligible_R"
            )]  # fmt: skip
            index.upsert(ItemRows(VERSION, rows.layout, ids, *picked))
            wanted |= {
                item: (bid, budget, True)
                for item, bid, budget in zip(ids, picked[5].tolist(), picked[6].tolist(), strict=True)
            }  # fmt: skip
            feature_of |= dict(zip(ids, index.copy_of_rows(ids).feature_RF.tolist(), strict=True))
        found = index.copy_of_rows(rows.item_ids)
        assert found.item_ids == [item for item in rows.item_ids if wanted[item][2]]
        assert found.bid_R.tolist() == [wanted[item][0] for item in found.item_ids]
        assert found.budget_R.tolist() == [wanted[item][1] for item in found.item_ids]
        assert found.feature_RF.tolist() == [feature_of[item] for item in found.item_ids]
        assert len(index) == len(found)


def test_a_write_that_fails_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """It breaks off after some columns; the rows it touched are put right by the next update."""
    index = LiveIndex(rows_of({10: 1, 11: 2}), DotScorer(), capacity=8)
    index.upsert(rows_of({12: 3}))
    whole = index_module.ItemTable.write

    def half(self: index_module.ItemTable, row_R: torch.Tensor, columns: dict[str, torch.Tensor]) -> None:
        whole(self, row_R, {"feature": columns["feature"]})
        if "budget" in columns and columns["feature"][0, 0] == 100:
            raise OSError("broken off")
        whole(self, row_R, columns)

    monkeypatch.setattr(index_module.ItemTable, "write", half)
    with pytest.raises(OSError, match="broken off"):
        index.upsert(rows_of({10: 100, 13: 100}))
    monkeypatch.undo()
    assert best(index) == [12, 11, 10]
    for item in (14, 15):  # one update for each of the two tables
        index.upsert(rows_of({item: 0}))
        assert best(index, 3) == [12, 11, 10]


def test_no_read_is_torn() -> None:
    reads = torn_reads(3000)
    assert reads.answers >= 3000
    assert reads.torn == 0
    assert len(reads.revisions) > 50, "the writer was busy meanwhile"


class InPlace(LiveIndex):
    """Writes into the table that requests read."""

    def _write(self, row_R: NDArray[np.int64], columns: dict[str, torch.Tensor], count: int) -> None:
        if self._reading.table.capacity < 8 * 24:
            self._reading.table = self._reading.table.grown(8 * 24)
        self._reading.table.count = count
        self._reading.table.write(torch.from_numpy(row_R), columns)
        self._reading.revision += 1


def test_the_checker_finds_reads_torn_by_writing_in_place() -> None:
    reads = torn_reads(3000, make=lambda rows: InPlace(rows, DotScorer()))
    assert reads.torn > 0


def test_whole_indices_swap_and_each_answer_is_of_one() -> None:
    """Items of index A are 0 to 49, of B 100 to 149; readers ask whichever index they were given, by its version."""
    versions = {"a" * 16: 0, "b" * 16: 100}
    indices = [
        LiveIndex(rows_of({first + n: n for n in range(50)}, version), DotScorer())
        for version, first in versions.items()
    ]
    holder = IndexHolder(indices[0])
    stop, wrong, answers = threading.Event(), [], [0, 0]

    def read(reader: int) -> None:
        while not stop.is_set():
            index = holder.index
            slates = index.search(np.ones((1, 1), np.float32), [Request()], Plan(k=50), index.embedding_version)
            first = versions[slates.embedding_version]
            if sorted(slates.item_ids[0]) != list(range(first, first + 50)):
                wrong.append(slates)
            answers[reader] += 1

    readers = [threading.Thread(target=read, args=(reader,)) for reader in range(2)]
    for reader in readers:
        reader.start()
    while min(answers) < 100:
        time.sleep(1e-4)  # without, the readers wait for this thread's turn to end, each time a search gives up its own
        before = holder.index
        assert holder.swap(indices[before is indices[0]]) is before
        time.sleep(1e-4)  # readers need the interpreter too
    stop.set()
    for reader in readers:
        reader.join()
    assert not wrong
    with pytest.raises(IndexMismatch):
        holder.index.search(np.ones((1, 1), np.float32), [Request()], Plan(k=1), "c" * 16)


def test_the_caller_s_scorer_stays_as_it_is() -> None:
    """The index moves, casts and switches a copy; what becomes of the caller's own changes no answer."""
    rng = np.random.default_rng(0)
    rows, scorer = make_rows(rng, 20), InteractionScorer(4, 2, (8, 4))
    index = LiveIndex(rows, scorer)
    before = index.search(np.ones((1, 4), np.float32), [Request()], Plan(k=9), VERSION)
    assert scorer.training
    index.retrieval.to(torch.float64)
    assert {part.dtype for part in scorer.parameters()} == {torch.float32}
    index.retrieval.to(torch.float32)
    with torch.no_grad():
        scorer.out.bias.fill_(torch.nan)
    after = index.search(np.ones((1, 4), np.float32), [Request()], Plan(k=9), VERSION)
    assert after.item_ids == before.item_ids


def test_ids_beyond_the_rows_there_are_are_not_given() -> None:
    index = LiveIndex(rows_of({number: number for number in range(20)}), DotScorer())
    assert index.item_ids(18, 40) == [18, 19]
    assert index.item_ids(19) == [19]
    assert index.item_ids(20) == []


def test_growth_keeps_rows_and_room() -> None:
    index = LiveIndex(rows_of({0: 0}), DotScorer())
    for item in range(1, 40):
        index.upsert(rows_of({item: item}))
    assert best(index, 40) == list(range(39, -1, -1))
    with index.pin() as pinned:
        assert pinned.table.count == 40
        assert 40 <= pinned.table.capacity <= 60


def test_bfloat16_rows_are_scored() -> None:
    index = LiveIndex(rows_of({10: 1.0, 11: 1.001, 12: 2}), DotScorer(), dtype=torch.bfloat16)
    assert best(index) == [12, 10, 11], "1.001 is 1 in bfloat16"


@pytest.mark.parametrize(("dtype", "off"), [(torch.int8, 1 / 254), (torch.float8_e4m3fn, 1 / 16)])
def test_rows_of_8_bits_keep_a_scale_each(dtype: torch.dtype, off: float) -> None:
    """A row's largest number is exact, others are within half a step of it; rows move and grow with their scale."""
    layout = Layout(embedding_dim=4, scalars=1)
    rng = np.random.default_rng(0)
    embedding_RE = rng.standard_normal((30, 4)).astype(np.float32) * 10.0 ** rng.integers(-6, 6, (30, 1))
    embedding_RE[7] = 0
    index = LiveIndex(
        ItemRows.build(VERSION, layout, [0, 1], embedding_RE[:2], scalar_RS=[[0.5], [2]]), DotScorer(), dtype=dtype
    )
    for item in range(2, 30):
        index.upsert(ItemRows.build(VERSION, layout, [item], embedding_RE[item : item + 1], scalar_RS=[[item]]))
    rows = index.copy_of_rows(list(range(30)))
    largest = np.abs(embedding_RE).max(1)
    difference = np.abs(rows.feature_RF[:, :4].numpy() - embedding_RE)
    assert (difference <= off * 1.001 * largest[:, None]).all()
    assert np.allclose(np.abs(rows.feature_RF[:, :4].numpy()).max(1), largest, rtol=1e-6)
    assert rows.feature_RF[:, 4].tolist() == [0.5, 2, *range(2, 30)]
    user_BE = np.eye(4, dtype=np.float32)[:1]
    found = index.search(user_BE, [Request()], Plan(k=30), VERSION)
    by_value = np.argsort(-rows.feature_RF[:, 0].numpy(), kind="stable")
    assert found.row_BK[0].tolist() == by_value.tolist()
    assert np.array_equal(found.utility_BK[0], rows.feature_RF[:, 0].numpy()[by_value])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_rows_have_as_many_scalars_as_the_kernel_wants_and_show_their_own(dtype: torch.dtype) -> None:
    """What is past them is zero, also after updates and growth, and no reader but the kernels sees it."""
    layout, rng = Layout(embedding_dim=4, scalars=3), np.random.default_rng(0)
    embedding_RE, scalar_RS = rng.integers(-3, 4, (30, 4)), rng.integers(-3, 4, (30, 3))
    embedding_RE[:, 0] = 7  # int8 and float8 hold seven and multiples of its share
    parts = [
        ItemRows.build(VERSION, layout, items, embedding_RE[items].astype(np.float32), scalar_RS=scalar_RS[items])
        for items in (list(range(20)), list(range(10, 30)))
    ]
    scorer = InteractionScorer(4, 3, hidden=(8, 4))
    index = LiveIndex(parts[0], scorer, dtype=dtype)
    index.upsert(parts[1])
    with index.pin() as pinned:
        items = pinned.table.items()
        assert items.scalar_NS.shape == (pinned.table.capacity, 16)
        assert np.array_equal(items.scalar_NS[:30, :3].float().numpy(), scalar_RS)
        assert not items.scalar_NS[:, 3:].any()
        feature_NF = pinned.table.features(slice(30))
    assert feature_NF.shape == (30, 7)
    assert np.array_equal(feature_NF[:, 4:].float().numpy(), scalar_RS)
    found = index.search(np.ones((1, 4), np.float32), [Request()], Plan(k=30), VERSION)
    with torch.inference_mode():
        score_N = scorer(torch.ones(1, 4), feature_NF.float())[0, 0].numpy()
    assert found.row_BK[0].tolist() == np.argsort(-score_N, kind="stable").tolist()


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"int8 or float8_e4m3fn, got torch\.int32"):
        LiveIndex(rows_of({10: 1}), DotScorer(), dtype=torch.int32)


@pytest.mark.parametrize("ids", [[5, 6, 7], ["x", "y", "z"]])
def test_parquet_keeps_every_column(tmp_path: Path, ids: list[int] | list[str]) -> None:
    made = make_rows(np.random.default_rng(0), 3)
    rows = ItemRows(
        VERSION, LAYOUT, list(ids), made.feature_RF, made.mask_RW, made.category_R, made.advertiser_R,
        made.attribute_RA, made.bid_R, made.budget_R, made.eligible_R,
    )  # fmt: skip
    write_rows(rows, tmp_path / "rows.parquet")
    back = read_rows(tmp_path / "rows.parquet")
    assert (back.embedding_version, back.layout, back.item_ids) == (VERSION, LAYOUT, ids)
    for name in ("feature_RF", "mask_RW", "category_R", "advertiser_R", "attribute_RA", "bid_R", "eligible_R"):
        assert torch.equal(getattr(back, name).nan_to_num(-9), getattr(rows, name).nan_to_num(-9)), name


def test_parquet_of_ids_and_embeddings_alone_is_enough(tmp_path: Path) -> None:
    schema = pa.schema([("item_id", pa.int64()), ("embedding", pa.list_(pa.float32()))])
    table = pa.table({"item_id": [1, 2], "embedding": [[1, 0], [0, 1]]}, schema=schema)
    pq.write_table(table.replace_schema_metadata({"embedding_version": VERSION}), tmp_path / "rows.parquet")
    rows = read_rows(tmp_path / "rows.parquet")
    assert rows.layout == Layout(embedding_dim=2, words=(0, 0, 0))
    assert rows.bid_R.tolist() == [1, 1]
    pq.write_table(table, tmp_path / "nameless.parquet")
    with pytest.raises(DataError, match="must name its embedding_version"):
        read_rows(tmp_path / "nameless.parquet")
    ragged = pa.table({"item_id": [1, 2], "embedding": [[1, 0], [0]]}, schema=schema)
    pq.write_table(ragged.replace_schema_metadata({"embedding_version": VERSION}), tmp_path / "ragged.parquet")
    with pytest.raises(DataError, match="must all have one length"):
        read_rows(tmp_path / "ragged.parquet")


@pytest.mark.parametrize("others", [[], ["12", "x"], [-3, DENSE, 2**70], [12.5]])
def test_ids_of_all_kinds_have_their_rows(others: list[Any]) -> None:
    """Integers alone are looked up in an array, which grows; a string is not the number it spells."""
    ids = [5, 12, 1024, 5000, np.int64(7), DENSE - 1, *others]
    rows = RowNumbers()
    rows.add(ids[:3], 0)
    rows.add(ids[3:], 3)
    assert rows.of(ids).tolist() == list(range(len(ids)))
    assert rows.of([5000, 6, 7, 12, 1025]).tolist() == [3, -1, 4, 1, -1]
    for unknown in ("5", 5.5, -1, DENSE + 1, 2**70 + 1, None):
        assert rows.of([12, unknown]).tolist() == [1, -1]
    assert rows.of([]).tolist() == []
    rows.remove(ids[3:])
    assert rows.of(ids).tolist() == [0, 1, 2, *[-1] * (len(ids) - 3)]
    assert [rows.get(12), rows.get(5000)] == [1, None]


def test_numbers_past_the_largest_known_have_no_row() -> None:
    """The array is shorter than the ids that are asked for."""
    rows = RowNumbers()
    rows.add([1023], 0)
    assert rows.of([DENSE - 1, 1023, 1024]).tolist() == [-1, 0, -1]
