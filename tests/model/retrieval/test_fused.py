"""The fused search against the eager one, over ties, filters, caps and draws; and what it tells of itself."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed")
from model.errors import ShapeError
from model.retrieval import reference
from model.retrieval.fused import Block, FusedSearch, Shape, interaction_weights, kind_of, pool_of
from model.retrieval.index import LiveIndex, groups_of
from model.retrieval.rows import ItemRows, Layout
from model.retrieval.rules import Plan, Request, Requests
from model.retrieval.scorer import DotScorer, InteractionScorer
from model.retrieval.select import Found, select_exactly
from tests.model.retrieval.builders import VERSION, make_plan, make_request, make_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Layout(embedding_dim=1, words=(1, 1, 1))


def fused_search(
    index: LiveIndex, user_BE: torch.Tensor, requests: list[Request], plan: Plan, batch: int | None = None
) -> tuple[Found, FusedSearch]:
    """Two runs of a fresh FusedSearch, which agree."""
    with index.pin() as pinned:
        table = pinned.table
        asked = Requests.build(requests, index.layout, lambda ids: index.rows_of(ids, table.count))
        shape = Shape(plan, batch or len(requests), len(requests[0].task_weights), len(asked.excluded_X) + 3)
        search = FusedSearch(index.retrieval, table, shape)
        found, again = (search.search(user_BE, asked, table.count) for _ in range(2))
        assert all(torch.equal(one, two) for one, two in zip(found, again, strict=True))
    return found, search


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 7, 60, 400]), st.integers(1, 4))
def test_rows_and_utilities_are_those_of_the_eager_search(seed: int, count: int, batch: int) -> None:
    """Sizes, wishes, caps and quotas at random; most utilities tie with others; the table has room to spare."""
    rng = np.random.default_rng(seed)
    rows, plan = make_rows(rng, count), make_plan(rng, 60)
    requests = [make_request(rng, rows) for _ in range(batch)]
    user_BE = torch.from_numpy(rng.integers(-2, 3, (batch, 4)).astype(np.float32) / 2)
    index = LiveIndex(rows, DotScorer(), capacity=count + 50, device=DEVICE)
    wanted = index.search(user_BE, requests, plan, VERSION)
    found, _ = fused_search(index, user_BE, requests, plan, batch + 1)
    for b in range(batch):
        if bool(found.is_exact_B[b]):
            assert found.row_BK[b].tolist() == wanted.row_BK[b].tolist()
            assert np.array_equal(found.utility_BK[b].numpy(), wanted.utility_BK[b])
            assert int(found.length_B[b]) == (wanted.row_BK[b] >= 0).sum()
    assert len(plan.caps) == 2 or bool(found.is_exact_B.all()), "so few items fit the pool, and one cap is settled"


def test_the_mlp_s_own_utilities_are_walked_as_the_reference_walks_them() -> None:
    """3,000 items, a pool of 1,024: keys, filters and rows, one request after the other."""
    rng = np.random.default_rng(5)
    layout = Layout(embedding_dim=64, scalars=2, attributes=1)
    rows = ItemRows.build(
        VERSION, layout, list(range(3000)), rng.standard_normal((3000, 64)) / 4,
        scalar_RS=rng.standard_normal((3000, 2)), mask_RW=rng.integers(0, 8, (3000, 3)),
        category_R=rng.integers(-1, 9, 3000),
        advertiser_R=rng.integers(-1, 60, 3000), attribute_RA=rng.choice([0, 1, np.nan], (3000, 1)),
        bid_R=rng.random(3000) * 3, budget_R=rng.random(3000) * 9, eligible_R=rng.random(3000) < 0.9,
    )  # fmt: skip
    torch.manual_seed(0)
    scorer = InteractionScorer(64, 2, (32, 16), tasks=2).to(torch.bfloat16)
    index = LiveIndex(rows, scorer, dtype=torch.bfloat16, device=DEVICE)
    requests = [
        Request(task_weights=(1, 0.5), bid_power=power, required={"category": [0, 1]}, ranges={0: (0, 5)},
                min_budget=1, seen=rng.integers(0, 3000, 200).tolist())
        for power in (0, 0.7, 1)
    ]  # fmt: skip
    plan = Plan(k=150, advertiser_cap=4)
    assert pool_of(plan) == 1024
    user_BE = torch.from_numpy(rng.standard_normal((3, 64)).astype(np.float32))
    found, search = fused_search(index, user_BE, requests, plan)
    assert search.weights is not None
    assert found.is_exact_B.all()
    utility_BN, allowed_BN = utilities_of(search)
    for b, request in enumerate(requests):
        allowed = [reference.is_allowed(rows, n, request) for n in range(3000)]
        assert allowed_BN[b].tolist() == allowed
        wanted = reference.slate(rows, utility_BN[b].double().numpy(), allowed, plan, request.seed)
        assert found.row_BK[b].tolist() == wanted
    with index.pin() as pinned, torch.inference_mode():
        asked = Requests.build(requests, layout, lambda ids: []).to(DEVICE)
        eager_BN = index.retrieval.utilities(pinned.table.used(), user_BE.to(DEVICE), asked).cpu()
    assert float(((utility_BN - eager_BN).abs() / eager_BN.clamp_min(1e-6))[allowed_BN].max()) < 0.05


def utilities_of(search: FusedSearch) -> tuple[torch.Tensor, torch.Tensor]:
    """Utilities and what is allowed, of the last run; on the CPU."""
    utility_BN, allowed_BN = search.utilities(search.table.count)
    return utility_BN.cpu(), allowed_BN.cpu()


def test_what_does_not_fit_the_pool_is_told() -> None:
    """5,000 items of one advertiser above all others, and 5,000 items of one utility: neither slate can be known."""
    plan = Plan(k=10, advertiser_cap=1)
    for scores, advertisers in (
        ([2.0] * 5000 + [1.0] * 20, [0] * 5000 + list(range(1, 21))),
        ([1.0] * 5000, list(range(5000))),
        (np.linspace(3, 2, 5020).tolist(), [0] * 5000 + list(range(1, 21))),
    ):
        rows = ItemRows.build(VERSION, SMALL, list(range(len(scores))), scores, advertiser_R=advertisers)
        index = LiveIndex(rows, DotScorer(), device=DEVICE)
        found, search = fused_search(index, torch.ones(1, 1), [Request()], plan)
        assert found.is_exact_B.tolist() == [False]
        with index.pin() as pinned:
            utility_BN, allowed_BN = utilities_of(search)
            groups = {name: value_N.cpu() for name, value_N in groups_of(pinned.table.used()).items()}
        wanted = index.search(np.ones((1, 1), np.float32), [Request()], plan, VERSION)
        exact = select_exactly(utility_BN, allowed_BN, groups, torch.tensor([0]), plan)
        assert exact.row_BK.tolist() == wanted.row_BK.tolist(), "the keys that are left give the slate"


def test_an_excluded_row_is_free_again_for_the_next_batch() -> None:
    rows = ItemRows.build(VERSION, SMALL, [10, 11, 12], [3, 2, 1])
    index = LiveIndex(rows, DotScorer(), device=DEVICE)
    plan = Plan(k=2)
    with index.pin() as pinned:
        search = FusedSearch(index.retrieval, pinned.table, Shape(plan, 2, 1, 8))
        slates = []
        for seen in ([], [10], [11, 12], []):
            asked = Requests.build([Request(seen=seen), Request()], SMALL, lambda ids: index.rows_of(ids, 3))
            slates.append(search.search(torch.ones(2, 1), asked, 3).row_BK.tolist())
    assert [slate_BK[0] for slate_BK in slates] == [[0, 1], [1, 2], [0, -1], [0, 1]]
    assert all(slate_BK[1] == [0, 1] for slate_BK in slates)


def test_runs_are_numbered_again_after_the_last_number() -> None:
    index = LiveIndex(ItemRows.build(VERSION, SMALL, [10, 11], [2, 1]), DotScorer(), device=DEVICE)
    with index.pin() as pinned:
        search = FusedSearch(index.retrieval, pinned.table, Shape(Plan(k=1), 1, 1, 4))
        for seen, wanted in (([], 0), ([10], 1), ([], 0)):
            search.run = 2**31 - 2 if not seen and search.run == 0 else search.run
            asked = Requests.build([Request(seen=seen)], SMALL, lambda ids: index.rows_of(ids, 2))
            assert search.search(torch.ones(1, 1), asked, 2).row_BK.tolist() == [[wanted]]
    assert search.run == 2


def test_signed_zeros_and_the_largest_numbers_go_in_order() -> None:
    scores = [-0.0, 0.0, -1.0, 3e38, -3e38, 0.0, 1e-38, -1e-38]
    index = LiveIndex(ItemRows.build(VERSION, SMALL, list(range(8)), scores), DotScorer(), device=DEVICE)
    found, _ = fused_search(index, torch.ones(1, 1), [Request()], Plan(k=8))
    assert found.row_BK.tolist() == [[3, 6, 0, 1, 5, 7, 2, 4]]
    assert found.is_exact_B.tolist() == [True]


@pytest.mark.parametrize("share_of_positive", [0.0, 0.2, 1.0])
def test_utilities_of_all_magnitudes_come_in_order(share_of_positive: float) -> None:
    """3,000 items, a pool of 1,024 of them: bins of every quarter, most with one key, one with 300."""
    rng = np.random.default_rng(int(share_of_positive * 10))
    scores = 2.0 ** rng.uniform(-120, 120, 3000)
    scores[:300] = rng.integers(2000, 2008, 300) / 1024  # 1.953 to 1.960: one bin
    scores[rng.random(3000) >= share_of_positive] *= -1
    rows = ItemRows.build(VERSION, SMALL, list(range(3000)), scores, advertiser_R=rng.integers(-1, 400, 3000))
    index = LiveIndex(rows, DotScorer(), device=DEVICE)
    plan = Plan(k=200, advertiser_cap=2)
    found, _ = fused_search(index, torch.ones(1, 1), [Request()], plan)
    allowed = [True] * 3000
    assert found.is_exact_B.tolist() == [True]
    assert found.row_BK[0].tolist() == reference.slate(rows, rows.feature_RF[:, 0].double().numpy(), allowed, plan, 0)


def test_nothing_allowed_and_no_items() -> None:
    rows = ItemRows.build(VERSION, SMALL, [10, 11], [2, 1], eligible_R=[False, False])
    found, _ = fused_search(LiveIndex(rows, DotScorer(), device=DEVICE), torch.ones(1, 1), [Request()], Plan(k=3))
    assert found.row_BK.tolist() == [[-1, -1, -1]]
    assert found.is_exact_B.tolist() == [True]
    empty = LiveIndex(ItemRows.build(VERSION, SMALL, [], []), DotScorer(), capacity=4, device=DEVICE)
    found, _ = fused_search(empty, torch.ones(1, 1), [Request()], Plan(k=2, advertiser_cap=1))
    assert found.row_BK.tolist() == [[-1, -1]]
    assert found.is_exact_B.tolist() == [True]


def test_plans_of_a_kind_share_a_search_and_caps_are_numbers() -> None:
    """Caps and counts of results differ from batch to batch; one search answers all, two more the other kinds."""
    rng = np.random.default_rng(7)
    rows = make_rows(rng, 300)
    eager = LiveIndex(rows, DotScorer(), device=DEVICE, fused=False)
    fused = LiveIndex(rows, DotScorer(), device=DEVICE, fused=True)
    user_BE = rng.integers(-2, 3, (1, 4)).astype(np.float32)
    for plan in (
        Plan(k=100, advertiser_cap=9), Plan(k=3, advertiser_cap=1), Plan(k=50, advertiser_cap=4), Plan(k=20),
        Plan(k=30, advertiser_cap=3, category_cap=9), Plan(k=30, advertiser_cap=9, category_cap=3),
    ):  # fmt: skip
        wanted = eager.search(user_BE, [Request()], plan, VERSION)
        found = fused.search(user_BE, [Request()], plan, VERSION)
        assert found.item_ids == wanted.item_ids
        assert np.array_equal(found.row_BK, wanted.row_BK)
        assert np.array_equal(found.utility_BK, wanted.utility_BK)
    assert fused._searches is not None
    assert len(fused._searches._free) == 3


def test_a_block_s_parts_are_written_from_their_first_row_on() -> None:
    parts = {"one": (torch.int64, (3,)), "two": (torch.float32, (4, 2))}
    block = Block(parts, torch.device("cpu"))
    block.put("two", torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    block.put("one", torch.tensor([7, 8, 9]))
    block.put("one", torch.tensor([5]))
    assert block.there["one"].tolist() == [5, 8, 9]
    assert block.there["two"].tolist() == [[1, 2], [3, 4], [0, 0], [0, 0]]
    wrong = torch.tensor([5], dtype=torch.int32), torch.zeros(33, dtype=torch.int64), torch.arange(4)[::2]
    for value in wrong:
        with pytest.raises(AssertionError, match="one"):
            block.put("one", value)


def test_kinds_of_plans() -> None:
    assert kind_of(Plan(k=1000, advertiser_cap=10)) == kind_of(Plan(k=513, advertiser_cap=3))
    assert kind_of(Plan(k=1000, advertiser_cap=10)) != kind_of(Plan(k=1000, category_cap=10))
    assert kind_of(Plan(k=2000)).k == 2000
    explores = Plan(k=10, category_cap=4, exploration_share=0.5, exploration_window=9)
    assert kind_of(explores) == Plan(k=10, category_cap=1, exploration_share=0.5, exploration_window=9)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_index_answers_alike_with_and_without_kernels(seed: int) -> None:
    """Batches of several sizes, before and after updates that make the table grow."""
    rng = np.random.default_rng(seed)
    first, more = make_rows(rng, 40), make_rows(rng, 60, first_id=1020)
    indices = [LiveIndex(first, DotScorer(), device=DEVICE, fused=fused) for fused in (False, True)]
    for update in (None, more, make_rows(rng, 5, first_id=1010)):
        plan, batch = make_plan(rng, 30), int(rng.integers(1, 4))
        requests = [make_request(rng, first) for _ in range(batch)]
        user_BE = (rng.integers(-2, 3, (batch, 4)) / 2).astype(np.float32)
        for index in indices:
            if update is not None:
                index.upsert(update)
        wanted, found = (index.search(user_BE, requests, plan, VERSION) for index in indices)
        assert found.item_ids == wanted.item_ids
        assert np.array_equal(found.row_BK, wanted.row_BK)
        assert np.array_equal(found.utility_BK, wanted.utility_BK)
        assert found.revision == wanted.revision


def test_a_pool_too_small_is_walked_again_and_counted() -> None:
    """Request 1 asks for what only the last 20 items are; request 0 has 5,000 of one advertiser in its way."""
    scores, advertisers = [2.0] * 5000 + [1.0] * 20, [0] * 5000 + list(range(1, 21))
    mask_RW = np.zeros((5020, 3), np.int64)
    mask_RW[5000:, 0] = 1
    rows = ItemRows.build(VERSION, SMALL, list(range(5020)), scores, advertiser_R=advertisers, mask_RW=mask_RW)
    index = LiveIndex(rows, DotScorer(), device=DEVICE, fused=True)
    slates = index.search(
        np.ones((2, 1), np.float32), [Request(), Request(required={"category": [0]})], Plan(k=10, advertiser_cap=1),
        VERSION,
    )  # fmt: skip
    assert slates.row_BK.tolist() == [[0, *range(5000, 5009)], list(range(5000, 5010))]
    assert slates.utility_BK.tolist() == [[2.0, *[1.0] * 9], [1.0] * 10]
    assert index.walked_again == 1


def test_large_batches_are_answered_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.retrieval.fused.MOST_REQUESTS", 2)
    rng = np.random.default_rng(3)
    rows = make_rows(rng, 50)
    requests = [make_request(rng, rows) for _ in range(5)]
    user_BE = rng.integers(-2, 3, (5, 4)).astype(np.float32)
    wanted, found = (
        LiveIndex(rows, DotScorer(), device=DEVICE, fused=fused).search(user_BE, requests, Plan(k=9), VERSION)
        for fused in (False, True)
    )
    assert found.item_ids == wanted.item_ids


def test_other_numbers_of_tasks_are_refused() -> None:
    index = LiveIndex(ItemRows.build(VERSION, SMALL, [10], [1]), DotScorer(), device=DEVICE, fused=True)
    for dtype in (torch.float32, torch.bfloat16):
        index = LiveIndex(
            ItemRows.build(VERSION, SMALL, [10], [1]), DotScorer(), device=DEVICE, fused=True, dtype=dtype
        )
        with pytest.raises(ShapeError, match="1 tasks, the requests weigh 2"):
            index.search(np.ones((1, 1), np.float32), [Request(task_weights=(1, 1))], Plan(k=1), VERSION)


@pytest.mark.parametrize(("dtype", "least"), [(torch.bfloat16, 0.98), (torch.int8, 0.98), (torch.float8_e4m3fn, 0.9)])
@pytest.mark.parametrize("kind", ["dot", "mlp", "mlp and dot"])
def test_few_bits_a_number_find_the_same_items(dtype: torch.dtype, least: float, kind: str) -> None:
    """1,000 items of 64 normal numbers: the best 100 of float32 and of the kernels' rows."""
    rng = np.random.default_rng(1)
    layout = Layout(embedding_dim=64, scalars=2)
    rows = ItemRows.build(
        VERSION, layout, list(range(1000)), rng.standard_normal((1000, 64)), scalar_RS=rng.standard_normal((1000, 2))
    )
    torch.manual_seed(0)
    dot_scale = 0.1 if kind == "mlp and dot" else None
    scorer = DotScorer() if kind == "dot" else InteractionScorer(64, 2, (32, 16), dot_scale=dot_scale).bfloat16()
    user_BE, requests = rng.standard_normal((2, 64)).astype(np.float32), [Request()] * 2
    eager = LiveIndex(rows, scorer, device=DEVICE, fused=False)
    fused = LiveIndex(rows, scorer, device=DEVICE, fused=True, dtype=dtype)
    wanted, found = (index.search(user_BE, requests, Plan(k=100), VERSION).row_BK for index in (eager, fused))
    if kind != "dot":
        with fused.pin() as pinned:
            assert interaction_weights(scorer, pinned.table) is not None, "by the kernels"
    for b in range(2):
        assert len(set(wanted[b]) & set(found[b])) >= 100 * least
    again = LiveIndex(rows, scorer, device=DEVICE, fused=False, dtype=dtype)
    plain = again.search(user_BE, requests, Plan(k=100), VERSION).row_BK
    for b in range(2):
        assert len(set(plain[b]) & set(found[b])) >= 90, "the eager path reads the same rows"
