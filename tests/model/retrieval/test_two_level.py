"""Two-level retrieval against a search of all rows: what it loses is told, and what it calls certain is."""

import numpy as np
import pytest
import torch

from model.errors import ConfigError, IndexMismatch, ShapeError
from model.retrieval import two_level
from model.retrieval.index import LiveIndex
from model.retrieval.rules import Plan, Requests
from model.retrieval.scorer import DotScorer, InteractionScorer
from model.retrieval.two_level import PLAIN, ExactRows, Steps, TwoLevelIndex, quantised
from tests.model.retrieval.builders import LAYOUT, VERSION, make_plan, make_request, make_rows

pytest.importorskip("triton", reason="Triton is not installed")
from model.retrieval import two_level_triton as kernels
from model.retrieval.two_level_triton import Tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Tiles(rows=64, num_stages=2)


@pytest.fixture
def small_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample of a catalogue of thousands is a part of it, as that of millions is."""
    monkeypatch.setattr(two_level, "SAMPLE_ROWS", 512)


@pytest.fixture(params=["plain", "kernels"])
def steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Plain PyTorch, and the kernels: on the GPU, else in Triton's interpreter."""
    if request.param == "kernels":
        own = Steps(kernels.sample_best, kernels.scan, kernels.probe, kernels.dots, kernels.gather)
        monkeypatch.setattr(two_level, "steps_for", lambda device: own)
    how: str = request.param
    return how


def device_of(steps: str) -> str:
    return DEVICE if steps == "kernels" else "cpu"


def make_vectors(rows: int, width: int, seed: int, centres: int = 40) -> torch.Tensor:
    """Clustered rows of length 1."""
    random = torch.Generator().manual_seed(seed)
    centre = torch.randn(centres, width, generator=random)
    of = torch.randint(centres, (rows,), generator=random)
    value = centre[of] + 0.8 * torch.randn(rows, width, generator=random)
    return torch.nn.functional.normalize(value, dim=1)


def best_rows(item_NE: torch.Tensor, user_BE: torch.Tensor, k: int) -> list[list[int]]:
    """By float64 products of all rows; ties by row."""
    score_BN = user_BE.double().cpu() @ item_NE.double().cpu().T
    return score_BN.sort(dim=1, descending=True, stable=True).indices[:, :k].tolist()


@pytest.mark.parametrize("width", [20, 32, 100])
@pytest.mark.usefixtures("small_sample")
def test_exact_searches_are_a_search_of_all_rows(steps: str, width: int) -> None:
    item, user = make_vectors(3000, width, 1), make_vectors(5, width, 2)
    device = device_of(steps)
    index = TwoLevelIndex("v", item.to(device))
    found = index.search(user.to(device), Plan(k=20), embedding_version="v", wanted=100, exact=True)
    assert found.is_certain_B.all()
    assert found.row_BK.tolist() == best_rows(item, user, 20)
    wanted = (user.double() @ item.double().T).gather(1, found.row_BK.cpu())
    assert torch.allclose(found.utility_BK.double().cpu(), wanted, atol=2e-6)
    assert found.survivors_B.max() < 3000, "not by passing all rows on"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.usefixtures("small_sample")
def test_what_is_certain_is_right(seed: int) -> None:
    """However few survivors are wanted; with few, most are not certain, with many most are."""
    item, user = make_vectors(4000, 48, seed), make_vectors(30, 48, seed + 100)
    index = TwoLevelIndex("v", item)
    certain = []
    for wanted in (15, 60, 240, 960):
        found = index(user, Plan(k=10), wanted=wanted)
        best = best_rows(item, user, 10)
        for row_K, best_K, is_certain in zip(
            found.row_BK.tolist(), best, found.is_certain_B.tolist(), strict=True
        ):  # fmt: skip
            assert row_K == best_K or not is_certain
        certain.append(int(found.is_certain_B.sum()))
    assert certain == sorted(certain)
    assert certain[0] < 30 == certain[-1]


def test_the_bound_holds_for_all_rows_that_are_left_out() -> None:
    """Wide rows of few large values: their codes are coarse."""
    random = torch.Generator().manual_seed(3)
    item = torch.randn(2000, 64, generator=random) ** 5
    user = torch.randn(20, 64, generator=random) ** 3
    index = TwoLevelIndex("v", item)
    code_BW, scale_B = quantised(user, 64)
    threshold_B = index.thresholds(code_BW, 100)
    bound_B = index._bound(user, code_BW, scale_B, threshold_B)
    row_BC, count_B = PLAIN.scan(index.code_NW, index.scale_N, None, code_BW, threshold_B, 2000)
    score_BN = user @ item.T
    off = []
    for score_N, row_C, count, bound in zip(score_BN, row_BC, count_B, bound_B, strict=True):
        left_out = torch.ones(2000, dtype=torch.bool)
        left_out[row_C[:count].long()] = False
        assert score_N[left_out].max() <= bound
        off.append(float(score_N[left_out].max() > score_N[~left_out].min()))
    assert max(off) == 1, "the codes alone would order some otherwise"


@pytest.mark.usefixtures("small_sample")
@pytest.mark.parametrize("has_tail", [False, True])
def test_kernels_keep_the_rows_that_plain_steps_keep(has_tail: bool) -> None:
    """Survivors, counts, thresholds and exact scores, for each of the scan's own tiles, all rows and clusters."""
    item, user = make_vectors(900, 40, 5), make_vectors(70, 40, 6)
    is_head = torch.arange(900) % 3 == 0 if has_tail else None
    plain = TwoLevelIndex("v", item, clusters=12, is_head_N=is_head)
    on_device = [
        None if part is None else part.to(DEVICE)
        for part in (plain.code_NW, plain.scale_N, plain.row_N, plain.sample_code_MW, plain.sample_scale_M)
    ]
    code_NW, scale_N, row_N, sample_MW, sample_scale_M = on_device
    assert code_NW is not None
    assert row_N is not None
    assert sample_MW is not None
    assert sample_scale_M is not None
    slot_N = plain.exact.slot_N
    tail = plain.exact.tail_TF
    exact = ExactRows(
        plain.exact.head_HF.to(DEVICE), tail if tail is None or DEVICE == "cpu" else tail.pin_memory(),
        None if slot_N is None else slot_N.to(DEVICE),
    )  # fmt: skip
    for requests in (1, 20, 70):
        code_BW, _ = quantised(user[:requests], 64)
        for group in (1, 8, 64):
            best = kernels.sample_best(sample_MW, sample_scale_M, code_BW.to(DEVICE), group)
            meant_best = PLAIN.sample_best(plain.sample_code_MW, plain.sample_scale_M, code_BW, group)
            assert torch.equal(best.cpu(), meant_best)
        threshold_B = plain.thresholds(code_BW, 100)
        start_BP, size_BP = plain._nearest(user[:requests], 5)
        ways = {
            "scan": (kernels.scan, PLAIN.scan, (), None), "scan, small tiles": (kernels.scan, PLAIN.scan, (), SMALL),
            "probe": (kernels.probe, PLAIN.probe, (start_BP, size_BP), SMALL),
        }  # fmt: skip
        for name, (own, meant, more, tiles) in ways.items():
            lists, counts = own(
                code_NW, scale_N, row_N, code_BW.to(DEVICE), threshold_B.to(DEVICE),
                *(part.to(DEVICE) for part in more), 300, tiles,
            )  # fmt: skip
            wanted, wanted_counts = meant(plain.code_NW, plain.scale_N, plain.row_N, code_BW, threshold_B, *more, 300)
            assert torch.equal(counts.cpu(), wanted_counts), name
            assert torch.equal(lists.cpu().sort(1).values, wanted.sort(1).values), name
            assert wanted_counts.min() > 0, name
        assert torch.equal(kernels.gather(exact, lists).cpu(), PLAIN.gather(plain.exact, lists.cpu()))
        dots = kernels.dots(exact, lists, user[:requests].to(DEVICE))
        meant_dots = PLAIN.dots(plain.exact, lists.cpu(), user[:requests])
        assert torch.allclose(dots.cpu(), meant_dots, atol=1e-6)


def test_too_many_survivors_are_counted_and_those_kept_are_some_of_them(steps: str) -> None:
    item, user = make_vectors(700, 32, 7), make_vectors(3, 32, 8)
    device = device_of(steps)
    index = TwoLevelIndex("v", item.to(device))
    code_BW, _ = quantised(user.to(device), 32)
    threshold_B = torch.full((3,), -torch.inf, device=device)
    row_BC, count_B = index.steps.scan(index.code_NW, index.scale_N, None, code_BW, threshold_B, 50)
    assert count_B.tolist() == [700] * 3
    for row_C in row_BC.tolist():
        assert len(set(row_C)) == 50
        assert 0 <= min(row_C) <= max(row_C) < 700


def test_an_overflow_is_not_complete_and_search_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand rows that are all alike pass together, whatever is wanted."""
    item = torch.ones(1000, 32)
    item[0] = 2
    index = TwoLevelIndex("v", item)
    found = index(torch.ones(1, 32), Plan(k=3), wanted=100)
    assert found.survivors_B.tolist() == [1000]
    assert found.is_complete_B.tolist() == [False]
    found = index.search(torch.ones(1, 32), Plan(k=3), embedding_version="v", wanted=100)
    assert found.is_complete_B.tolist() == [True]
    assert found.row_BK.tolist() == [[0, 1, 2]]
    monkeypatch.setattr(two_level, "WIDENINGS", 0)
    found = index.search(torch.ones(1, 32), Plan(k=3), embedding_version="v", wanted=100)
    assert found.is_complete_B.tolist() == [False], "told"


@pytest.mark.parametrize("seed", range(12))
def test_over_all_rows_it_answers_as_the_live_index(steps: str, seed: int) -> None:
    """Rules, caps, bids, exploration, and more than one task; ties everywhere."""
    rng = np.random.default_rng(seed)
    rows = make_rows(rng, int(rng.integers(1, 200)))
    tasks = 1 + seed % 2
    scorer = InteractionScorer(4, 2, (8, 4), tasks=tasks) if tasks == 2 else DotScorer()
    live = LiveIndex(rows, scorer)
    index = TwoLevelIndex.of_rows(rows, scorer=scorer if tasks == 2 else None, device=device_of(steps))
    requests = [make_request(rng, rows, tasks) for _ in range(3)]
    user = torch.from_numpy(rng.integers(-2, 3, (3, 4)) / 2)
    plan = make_plan(rng, 40)
    wanted = live.search(user, requests, plan, VERSION)
    asked = Requests.build(requests, LAYOUT, lambda ids: live.rows_of(ids, len(rows))).to(device_of(steps))
    found = index.search(user.to(device_of(steps)), plan, asked, embedding_version=VERSION, wanted=len(rows))
    if tasks == 1:
        assert found.row_BK.tolist() == wanted.row_BK.tolist()
    assert np.allclose(found.utility_BK.cpu(), wanted.utility_BK, atol=1e-5)


def test_the_caller_s_scorer_stays_as_it_is() -> None:
    rows, scorer = make_rows(np.random.default_rng(0), 20), InteractionScorer(4, 2, (8, 4))
    index = TwoLevelIndex.of_rows(rows, scorer=scorer)
    assert index.scorer is not None
    index.scorer.to(torch.float64)
    assert scorer.training
    assert {part.dtype for part in scorer.parameters()} == {torch.float32}


@pytest.mark.usefixtures("small_sample")
def test_rules_are_kept_where_few_rows_survive(steps: str) -> None:
    rng = np.random.default_rng(0)
    rows = make_rows(rng, 2000)
    live, index = LiveIndex(rows, DotScorer()), TwoLevelIndex.of_rows(rows, device=device_of(steps))
    requests = [make_request(rng, rows) for _ in range(4)]
    requests = [type(one)(required=one.required, seen=one.seen[:50], min_budget=1.0) for one in requests]
    user = torch.from_numpy(rng.integers(-2, 3, (4, 4)) / 2).to(device_of(steps))
    plan = Plan(k=10, advertiser_cap=2)
    asked = Requests.build(requests, LAYOUT, lambda ids: live.rows_of(ids, 2000)).to(device_of(steps))
    found = index.search(user, plan, asked, embedding_version=VERSION, wanted=200, exact=True)
    assert found.row_BK.tolist() == live.search(user.cpu(), requests, plan, VERSION).row_BK.tolist()
    assert found.is_certain_B.all()


@pytest.mark.usefixtures("small_sample")
def test_a_split_index_answers_as_a_whole_one(steps: str) -> None:
    item, user = make_vectors(2000, 48, 9), make_vectors(4, 48, 10)
    device = device_of(steps)
    is_head = torch.rand(2000, generator=torch.Generator().manual_seed(0)) < 0.3
    whole, split = (
        TwoLevelIndex("v", item.to(device).bfloat16(), is_head_N=part)
        for part in (None, is_head.to(device))
    )  # fmt: skip
    assert split.exact.tail_TF is not None
    assert len(split.exact.head_HF) == int(is_head.sum())
    one, two = (index(user.to(device), Plan(k=30), wanted=200) for index in (whole, split))
    assert torch.equal(one.row_BK, two.row_BK)
    assert torch.equal(one.utility_BK, two.utility_BK)


@pytest.mark.usefixtures("small_sample")
def test_more_probes_find_more_and_all_find_all(steps: str) -> None:
    item, user = make_vectors(3000, 32, 11), make_vectors(8, 32, 12)
    device = device_of(steps)
    index = TwoLevelIndex("v", item.to(device), clusters=24)
    assert index.row_N is not None
    assert sorted(index.row_N.tolist()) == list(range(3000))
    best = best_rows(item, user, 50)
    shares = []
    for probes in (1, 4, 24):
        found = index(user.to(device), Plan(k=50), wanted=300, probes=probes)
        assert not found.is_certain_B.any()
        shares.append(np.mean([len(set(a) & set(b)) / 50 for a, b in zip(found.row_BK.tolist(), best, strict=True)]))
    assert shares == sorted(shares)
    assert shares[0] < 0.9 < 0.99 < shares[-1]
    whole = index(user.to(device), Plan(k=50), wanted=300)
    assert torch.equal(whole.row_BK, found.row_BK)


def test_rows_that_are_not_eligible_do_not_survive(steps: str) -> None:
    rows = make_rows(np.random.default_rng(1), 300)
    index = TwoLevelIndex.of_rows(rows, device=device_of(steps), clusters=4)
    found = index(torch.ones(1, 4, device=device_of(steps)), Plan(k=300), wanted=300)
    there = rows.eligible_R.nonzero()[:, 0].tolist()
    assert sorted(found.row_BK[0, : int(found.length_B)].tolist()) == there
    assert len(there) < 300


def test_codes_stand_for_their_values_within_half_a_step() -> None:
    value = torch.tensor([[1.0, -0.5, 0.126], [0.0, 0.0, 0.0]])
    code, scale = quantised(value, 32)
    assert code[:, :3].tolist() == [[127, -64, 16], [0, 0, 0]]  # -63.5 rounds to even
    assert not code[:, 3:].any()
    assert scale.tolist() == [pytest.approx(1 / 127), 1]


def test_what_makes_no_sense_is_refused() -> None:
    index = TwoLevelIndex("v", torch.rand(10, 8))
    with pytest.raises(IndexMismatch):
        index.search(torch.rand(1, 8), Plan(k=1), embedding_version="w")
    with pytest.raises(ShapeError, match=r"\[B, 8\], got \[1, 7\]"):
        index.search(torch.rand(1, 7), Plan(k=1), embedding_version="v")
    with pytest.raises(ConfigError, match=r"\[0, 0\], the index's clusters, got 3"):
        index.search(torch.rand(1, 8), Plan(k=1), embedding_version="v", probes=3)
    with pytest.raises(ConfigError, match="want requests"):
        index.search(torch.rand(1, 8), Plan(k=1, advertiser_cap=1), embedding_version="v")
    with pytest.raises(ConfigError, match="no probes and no scorer"):
        TwoLevelIndex("v", torch.rand(10, 8), clusters=2).search(
            torch.rand(1, 8), Plan(k=1), embedding_version="v", probes=1, exact=True
        )
    with pytest.raises(ConfigError, match=r"\[0, 10\], got 11"):
        TwoLevelIndex("v", torch.rand(10, 8), clusters=11)
    with pytest.raises(ShapeError, match="float"):
        TwoLevelIndex("v", torch.ones(10, 8, dtype=torch.int8))
    trained = InteractionScorer(8, 0, (4, 4))
    trained.embedding_version = "w"
    with pytest.raises(IndexMismatch, match="scorer"):
        TwoLevelIndex("v", torch.rand(10, 8), scorer=trained)


@pytest.mark.parametrize(
    ("requests", "width", "shared_bytes", "rows"),
    [
        (16, 256, 232_448, 256),  # a Hopper's
        (16, 512, 232_448, 128),
        (64, 1024, 232_448, 16),
        (16, 128, 101_376, 128),  # an RTX 4090's
        (32, 64, 101_376, 128),
    ],
)
def test_tiles_fit_the_shared_memory(requests: int, width: int, shared_bytes: int, rows: int) -> None:
    assert kernels.fitting(kernels.SCAN_TILES[requests], requests, width, shared_bytes).rows == rows
