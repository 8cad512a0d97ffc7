"""The graph against the reference: identical rows, over many ties; and both against slates worked out by hand."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from model.errors import ConfigError, DataError, ShapeError
from model.item_index import ItemIndex
from model.retrieval import reference
from model.retrieval.index import LiveIndex, Retrieval
from model.retrieval.rows import ItemRows, Layout
from model.retrieval.rules import Plan, Request, Requests
from model.retrieval.scorer import DotScorer, InteractionScorer
from model.retrieval.select import Found, draw_keys, first_pool, select
from tests.model.retrieval.builders import LAYOUT, VERSION, make_plan, make_request, make_rows

SMALL = Layout(embedding_dim=1, words=(1, 1, 1))


def search(rows: ItemRows, users: np.ndarray, requests: list[Request], plan: Plan) -> list[list[int]]:
    slates = LiveIndex(rows, DotScorer()).search(users, requests, plan, rows.embedding_version)
    return [[row for row in row_K if row >= 0] for row_K in slates.row_BK.tolist()]


def scored_rows(scores: list[float], **columns: object) -> ItemRows:
    """Items 0, 1, ... whose score for the user [1] is given."""
    return ItemRows.build(VERSION, SMALL, list(range(len(scores))), scores, **columns)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(60))
def test_rows_are_those_of_the_reference(seed: int) -> None:
    """Sizes, wishes, caps and quotas at random; most utilities tie with others."""
    rng = np.random.default_rng(seed)
    rows = make_rows(rng, int(rng.choice([1, 7, 60, 400])))
    plan = make_plan(rng, 60)
    requests = [make_request(rng, rows) for _ in range(int(rng.integers(1, 5)))]
    users = rng.integers(-2, 3, (len(requests), 4)).astype(np.float32) / 2
    found = search(rows, users, requests, plan)
    for request, user_E, row_K in zip(requests, users, found, strict=True):
        scores = reference.dot_scores(rows, user_E.astype(np.float64))
        assert row_K == reference.search(rows, scores, request, plan)


@pytest.mark.parametrize("seed", range(20))
def test_any_pool_that_calls_itself_exact_is(seed: int) -> None:
    """From the smallest pools and no rounds on: where a request is told to be exact, its rows are the reference's."""
    rng = np.random.default_rng(seed)
    rows = make_rows(rng, 120)
    plan = Plan(k=int(rng.integers(1, 30)), advertiser_cap=int(rng.integers(1, 4)), category_cap=5)
    requests = [Request(bid_power=1.0, seed=b) for b in range(4)]
    users = rng.integers(-2, 3, (4, 4)).astype(np.float32)
    wanted = [
        reference.search(rows, reference.dot_scores(rows, user.astype(np.float64)), request, plan)
        for user, request in zip(users, requests, strict=True)
    ]
    index = LiveIndex(rows, DotScorer())
    with index.pin() as pinned:
        table = pinned.table
    graph = Retrieval(LAYOUT, DotScorer())
    asked = Requests.build(requests, LAYOUT, lambda ids: [])
    verdicts = []
    for pool in (1, 8, 40, 120):
        for rounds in (0, 1, 3, 120):
            found: Found = graph(table.used(), torch.from_numpy(users), asked, plan, pool, rounds)
            for b in np.flatnonzero(found.is_exact_B.numpy()):
                row_K = found.row_BK[b]
                assert row_K[row_K >= 0].tolist() == wanted[b], (pool, rounds)
            verdicts.append(bool(found.is_exact_B.all()))
    assert not verdicts[0], "one candidate is too few"
    assert verdicts[-1], "the whole catalogue and as many rounds are enough"


def test_two_caps_walk_in_order() -> None:
    """Advertiser and category caps of 1. Row 0 takes A and x; row 1 (A, y) is skipped, so y stays free for row 2."""
    rows = scored_rows([9, 8, 7, 6, 5], advertiser_R=[0, 0, 1, 2, 2], category_R=[0, 1, 1, 1, 2])
    plan = Plan(k=5, advertiser_cap=1, category_cap=1)
    assert search(rows, np.ones((1, 1), np.float32), [Request()], plan) == [[0, 2, 4]]


def test_a_long_chain_of_skips_is_settled() -> None:
    """Row i has advertiser i // 2 and category (i + 1) // 2: whether a row is taken depends on all before it.

    Row 0 takes advertiser 0, category 0; row 1 (0, 1) is skipped; row 2 (1, 1) is taken, ...: the even rows.
    """
    count = 300
    number = np.arange(count)
    rows = scored_rows(list(range(count, 0, -1)), advertiser_R=number // 2, category_R=(number + 1) // 2)
    plan = Plan(k=150, advertiser_cap=1, category_cap=1)
    assert search(rows, np.ones((1, 1), np.float32), [Request()], plan) == [list(range(0, count, 2))]


def test_a_pool_full_of_one_advertiser_is_widened() -> None:
    """5,000 items of advertiser 0 score above all others; with a cap of 1, nine of ten places are far below them."""
    rows = scored_rows([2.0] * 5000 + [1.0] * 20, advertiser_R=[0] * 5000 + list(range(1, 21)))
    plan = Plan(k=10, advertiser_cap=1)
    assert first_pool(plan, len(rows)) < 5000
    assert search(rows, np.ones((1, 1), np.float32), [Request()], plan) == [[0, *range(5000, 5009)]]


def test_ties_and_signed_zeros_go_by_row() -> None:
    utility = torch.tensor([[-0.0, 0.0, -1.0, 0.0, -0.0, -1.0, 2.0**-149, -(2.0**-149)]])
    found = select(utility, torch.ones(1, 8, dtype=torch.bool), {}, torch.tensor([0]), Plan(k=8), pool=8, rounds=0)
    assert found.row_BK.tolist() == [[6, 0, 1, 3, 4, 7, 2, 5]]


def test_without_rules_it_answers_like_the_index_of_snapshots() -> None:
    rng = np.random.default_rng(3)
    item_NE, user_BE = rng.integers(-2, 3, (500, 8)) / 4, (rng.integers(-2, 3, (5, 8)) / 4).astype(np.float32)
    snapshot = ItemIndex(VERSION, pa.array(range(500)), torch.from_numpy(item_NE.astype(np.float32)))
    index = LiveIndex(ItemRows.build(VERSION, Layout(embedding_dim=8), list(range(500)), item_NE), DotScorer())
    slates = index.search(user_BE, [Request()] * 5, Plan(k=100), VERSION)
    found = snapshot.search(user_BE, 100)
    assert slates.row_BK.tolist() == found.row_BK.tolist()
    assert slates.utility_BK.tolist() == found.score_BK.tolist()


def test_filters_each_take_what_they_should() -> None:
    layout = Layout(embedding_dim=1, attributes=1, words=(2, 1, 1))
    rows = ItemRows.build(
        VERSION, layout, list(range(6)), [6, 5, 4, 3, 2, 1],
        mask_RW=[layout.mask({"category": [bit], "country": [1]}) for bit in (0, 1, 63, 64, 127, 0)],
        attribute_RA=[1, 2, 3, np.nan, 5, 6], budget_R=[0, 1, 2, 3, 4, 5],
    )  # fmt: skip
    asked = {
        "required": (Request(required={"category": [0, 64]}), [0, 3, 5]),
        "forbidden": (Request(forbidden={"category": [63, 127]}), [0, 1, 3, 5]),
        "both fields": (Request(required={"category": [1], "country": [1]}), [1]),
        "field without bits": (Request(required={"country": [2]}), []),
        "range": (Request(ranges={0: (2, 5)}), [1, 2, 4]),
        "half-open range": (Request(ranges={0: (3, np.inf)}), [2, 4, 5]),
        "open range": (Request(ranges={0: (-np.inf, np.inf)}), [0, 1, 2, 3, 4, 5]),
        "budget": (Request(min_budget=3), [3, 4, 5]),
        "seen": (Request(seen=[0, 4], blocked=[1, 77]), [2, 3, 5]),
    }
    requests = [request for request, _ in asked.values()]
    found = search(rows, np.ones((len(asked), 1), np.float32), requests, Plan(k=6))
    for name, row_K, (_, wanted) in zip(asked, found, asked.values(), strict=True):
        assert row_K == wanted, name


def test_utility_weighs_tasks_and_bids() -> None:
    """Scores 1, 2, 4 and bids 16, 4, 1. w = 0: by score; w = 0.5: all 4, so by row; w = 1: 16, 8, 4."""
    rows = scored_rows([1, 2, 4], bid_R=[16, 4, 1])
    requests = [Request(bid_power=power) for power in (0, 0.5, 1)]
    slates = LiveIndex(rows, DotScorer()).search(np.ones((3, 1), np.float32), requests, Plan(k=3), VERSION)
    assert slates.row_BK.tolist() == [[2, 1, 0], [0, 1, 2], [0, 1, 2]]
    assert slates.utility_BK.tolist() == [[4, 2, 1], [4, 4, 4], [16, 8, 4]]


def test_a_score_that_is_not_finite_is_never_shown() -> None:
    rows = scored_rows([1, 2, 3])
    user = np.array([[np.inf]], np.float32)
    assert search(rows, user, [Request()], Plan(k=3)) == [[]]


def test_exploration_draws_among_the_next_candidates() -> None:
    """10 places, 3 of them drawn among the next 20: the first 7 are firm, the draw repeats by seed and is fair."""
    rows = scored_rows(list(range(100, 0, -1)))
    plan = Plan(k=10, exploration_share=0.3, exploration_window=20)
    requests = [Request(seed=seed) for seed in range(2000)]
    found = search(rows, np.ones((2000, 1), np.float32), requests, plan)
    drawn = np.array([row_K[7:] for row_K in found])
    assert all(row_K[:7] == list(range(7)) for row_K in found)
    assert (np.diff(drawn) > 0).all(), "in the walk's order"
    assert set(drawn.flatten().tolist()) == set(range(7, 27))
    # 6,000 draws of 20 rows: 300 each, standard deviation sqrt(2000 * .15 * .85) = 16
    assert np.abs(np.bincount(drawn.flatten())[7:] - 300).max() < 5 * 16
    assert search(rows, np.ones((1, 1), np.float32), [requests[77]], plan)[0] == found[77]


def test_a_draw_from_fewer_candidates_than_places() -> None:
    rows = scored_rows([3, 2, 1])
    plan = Plan(k=4, exploration_share=0.5, exploration_window=5)
    assert search(rows, np.ones((1, 1), np.float32), [Request()], plan) == [[0, 1, 2]]


def test_draw_keys_are_those_of_the_reference() -> None:
    seeds = [0, 1, -1, 2**63 - 1, -(2**63)]
    keys = draw_keys(torch.arange(50).expand(5, 50), torch.tensor(seeds))
    assert keys.tolist() == [[reference.draw_key(row, seed) for row in range(50)] for seed in seeds]


def test_selection_of_real_numbers_is_that_of_the_reference() -> None:
    """The MLP's own utilities, with caps and a quota: given the same numbers, the same rows."""
    rng = np.random.default_rng(5)
    rows = make_rows(rng, 3000)
    torch.manual_seed(0)
    scorer = InteractionScorer(4, 2, (16, 8), tasks=2)
    plan = Plan(k=200, advertiser_cap=40, category_cap=60, exploration_share=0.1, exploration_window=60)
    requests = [make_request(rng, rows, tasks=2) for _ in range(3)]
    user_BE = torch.from_numpy(rng.standard_normal((3, 4)).astype(np.float32))
    index = LiveIndex(rows, scorer)
    slates = index.search(user_BE, requests, plan, VERSION)
    with index.pin() as pinned, torch.inference_mode():
        asked = Requests.build(requests, LAYOUT, lambda ids: [])
        utility_BN = index.retrieval.utilities(pinned.table.used(), user_BE, asked).double().numpy()
    for b, request in enumerate(requests):
        allowed = [reference.is_allowed(rows, n, request) for n in range(len(rows))]
        wanted = reference.slate(rows, utility_BN[b], allowed, plan, request.seed)
        assert [row for row in slates.row_BK[b].tolist() if row >= 0] == wanted


def test_an_empty_catalogue_gives_empty_slates() -> None:
    rows = scored_rows([])
    slates = LiveIndex(rows, DotScorer()).search(np.ones((2, 1), np.float32), [Request()] * 2, Plan(k=3), VERSION)
    assert slates.item_ids == [[], []]
    assert slates.row_BK.tolist() == [[-1] * 3] * 2


def test_a_small_slate_ends_early() -> None:
    rows = scored_rows([1, 2])
    slates = LiveIndex(rows, DotScorer()).search(np.ones((1, 1), np.float32), [Request()], Plan(k=4), VERSION)
    assert slates.item_ids == [[1, 0]]
    assert slates.utility_BK.tolist() == [[2, 1, -np.inf, -np.inf]]


def test_what_cannot_be_answered_is_refused() -> None:
    index = LiveIndex(scored_rows([1, 2]), DotScorer())
    with pytest.raises(ConfigError, match=r"k must be in \[1, 2000\], got 2001"):
        Plan(k=2001)
    with pytest.raises(ConfigError, match="must hold the 5 places drawn, got 4"):
        Plan(k=10, exploration_share=0.5, exploration_window=4)
    with pytest.raises(ShapeError, match=r"\[1, 1\], got \[1, 2\]"):
        index.search(np.ones((1, 2), np.float32), [Request()], Plan(k=1), VERSION)
    with pytest.raises(ShapeError, match="1 tasks, the requests weigh 2"):
        index.search(np.ones((1, 1), np.float32), [Request(task_weights=(1, 1))], Plan(k=1), VERSION)
    with pytest.raises(DataError, match=r"country must be in \[0, 64\), got 64"):
        index.search(np.ones((1, 1), np.float32), [Request(required={"country": [64]})], Plan(k=1), VERSION)
    with pytest.raises(ShapeError, match=r"\[0, 0\), got 0"):
        index.search(np.ones((1, 1), np.float32), [Request(ranges={0: (0, 1)})], Plan(k=1), VERSION)


def test_the_graph_is_one_graph() -> None:
    """The pass of fixed shape has nothing in it that a compiler must leave to Python, and gives the same slates."""
    rng = np.random.default_rng(1)
    rows = make_rows(rng, 200)
    requests = [make_request(rng, rows) for _ in range(3)]
    plan = Plan(k=20, advertiser_cap=3, category_cap=6, exploration_share=0.2, exploration_window=10)
    index = LiveIndex(rows, InteractionScorer(4, 2, (8, 5)))
    users = torch.from_numpy(rng.standard_normal((3, 4)).astype(np.float32))
    with index.pin() as pinned, torch.inference_mode():
        asked = Requests.build(requests, LAYOUT, lambda ids: index.rows_of(ids, 200))
        inputs = pinned.table.used(), users, asked, plan, 200, 20
        found = torch.compile(index.retrieval, backend="eager", fullgraph=True)(*inputs)
    assert found.row_BK.tolist() == index.search(users, requests, plan, VERSION).row_BK.tolist()
    assert bool(found.is_exact_B.all())


def test_select_handles_a_pool_of_the_whole_row() -> None:
    utility = torch.tensor([[1.0, 3.0, 2.0]])
    allowed = torch.tensor([[True, False, True]])
    found = select(utility, allowed, {}, torch.tensor([0]), Plan(k=3), pool=3, rounds=1)
    assert found.row_BK.tolist() == [[2, 0, -1]]
    assert found.length_B.tolist() == [2]
    assert found.is_exact_B.tolist() == [True]
