"""The live part over an index: that of the whole catalogue, term by term, and rows that came later."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from model.features import hash_ids
from model.live_items import LiveCounts, LiveRequests, catalogue_logits
from model.live_search import KEPT_BUCKETS, LiveSearch
from model.records import Event
from tests.releases import SMALL, make_tower

CONFIG = replace(SMALL, live_windows_h=(0.5, 3.0), live_dim=4, live_bucket_s=60, live_recent=2)
MINUTE_US = 60_000_000
START_US = 19_000 * 24 * 60 * MINUTE_US
N, H = 50, CONFIG.hash_rows
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"))]


def make_items():
    tower, _ = make_tower(seed=2, config=CONFIG)
    with torch.no_grad():
        for parameter in tower.items.live.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    tower.items.embedder.use_hash_rows(torch.arange(N) % 7 > 0)
    return tower.items


def make_log(count=400, rows=N + H, seed=0):
    """Users one after another, each oldest event first, over five hours."""
    random = np.random.default_rng(seed)
    user = np.sort(random.integers(0, 20, count))
    time_us = START_US + random.integers(0, 300, count) * MINUTE_US
    order = np.lexsort((time_us, user))
    return user, random.integers(0, rows, count), time_us[order]


def row_of(item_id):
    """Items 0 to 49 are the catalogue."""
    return item_id if item_id < N else None


@pytest.mark.parametrize("device", DEVICES)
def test_it_is_the_catalogues_score(device):
    items, log = make_items(), make_log()
    with torch.inference_mode():
        is_known = items.is_known(torch.arange(N))
    search = LiveSearch(items, CONFIG, device=device)
    until_us = START_US + 300 * MINUTE_US
    counted = search.counted(*log, N, since_us=START_US, until_us=until_us)
    assert counted.is_short is False
    counts = LiveCounts.build(*log, N + H, CONFIG)
    psi = torch.randn(4)
    for minute, recent in ((200, [3, 4, 3, 9, 11]), (120, [7, 1000]), (299, [3000, 2]), (5, []), (123, [1, 1])):
        at_us = START_US + minute * MINUTE_US + 7
        events = [Event(item, "click", at_us - (len(recent) - k) * 1_000_000) for k, item in enumerate(recent)]
        latest = events[::-1][: max(CONFIG.live_recent, CONFIG.session_limit)]
        row = [e.item_id if e.item_id < N else N + int(hash_ids([e.item_id])[0] % np.uint64(H)) for e in latest]
        gap = [np.log1p((at_us - e.timestamp_us) / 1e6) for e in latest]
        none = [0] * (4 - len(row))
        asked = LiveRequests(
            counts.bucket(torch.tensor([at_us])),
            torch.tensor([row + [-1 for _ in none]]),
            torch.tensor([gap + none], dtype=torch.float32),
        )
        wanted = catalogue_logits(items.live.cpu(), counts, asked, psi[None], is_known)
        items.live.to(device)
        found = search.bonus(counted, psi, events, at_us, N, row_of).cpu()
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert len(counted.made) <= KEPT_BUCKETS


def test_windows_move_on_where_the_log_does_not():
    """Three hours after its last event nothing is in a window, and the past is what it was."""
    items, log = make_items(), make_log()
    search = LiveSearch(items, CONFIG)
    later_us = START_US + 300 * MINUTE_US + 4 * 60 * MINUTE_US
    counted = search.counted(*log, N, since_us=START_US, until_us=later_us)
    _, feature, _ = search._at(counted, later_us)
    counts = np.bincount(log[1], minlength=N)[:N]
    assert (feature[:N, 0] == 0).all()
    assert (feature[:N, 2] == 0).all()
    np.testing.assert_allclose(feature[:N, 4].numpy(), np.log1p(counts), rtol=1e-6)
    assert torch.equal(search._at(counted, later_us + 999 * MINUTE_US)[1], feature), "no later than it was counted"


def test_a_later_row_is_an_item_without_events():
    items, log = make_items(), make_log(rows=N)
    search = LiveSearch(items, CONFIG)
    until_us = START_US + 200 * MINUTE_US
    psi = torch.randn(4)
    # as rows of the index when it was counted, nobody clicked on the last two; as rows that came since
    held = search.counted(*log, N + 2, since_us=0, until_us=until_us)
    came = search.counted(*log, N, since_us=0, until_us=until_us)
    events = [Event(3, "click", until_us - 5), Event(N + 1, "click", until_us - 4)]
    rows = {n: n for n in range(N + 2)}
    one, other = (search.bonus(each, psi, events, until_us, N + 2, rows.get) for each in (held, came))
    torch.testing.assert_close(one, other)
    plain = search.bonus(held, psi, [], until_us, N + 2, rows.get)
    torch.testing.assert_close(plain[0, N], plain[0, N + 1], rtol=1e-5, atol=1e-5)
    assert float(plain[0, N + 1] - one[0, N + 1]) == pytest.approx(float(items.live.had.detach()), rel=1e-5)


def test_without_any_event():
    search = LiveSearch(make_items(), CONFIG)
    empty = np.zeros(0, np.int64)
    counted = search.counted(empty, empty, empty, N, since_us=0, until_us=START_US)
    bonus = search.bonus(counted, torch.randn(4), [Event(3, "click", START_US)], START_US, N + 1, row_of)
    assert bonus.shape == (1, N + 1)
    assert bool(bonus.isfinite().all())
