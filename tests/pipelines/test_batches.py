"""Which users share a call, and who is to blame when one fails."""

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from pipelines.transforms.batches import encode_users, plan_batches
from pipelines.transforms.merge_tail import Histories


def test_batches_are_cut_before_padding_exceeds_the_waste() -> None:
    # ascending 1 1 2 8 9: the ones pad nothing, with the 2 they are 6 / 4; 2 with 8 is 16 / 10; 8 with 9 is 18 / 17
    batches = plan_batches(np.array([9, 1, 2, 8, 1]), max_tokens=100, small_tokens=0)
    assert [batch.tolist() for batch in batches] == [[1, 4], [2], [3, 0]]


def test_batches_hold_at_most_max_tokens_padded() -> None:
    assert [len(batch) for batch in plan_batches(np.full(7, 5), max_tokens=15)] == [3, 3, 1]
    assert [len(batch) for batch in plan_batches(np.array([40, 50]), max_tokens=15)] == [1, 1]
    assert plan_batches(np.array([], np.int64), max_tokens=15) == []


@pytest.mark.parametrize("seed", range(3))
def test_every_user_is_in_one_batch_within_the_waste(seed: int) -> None:
    lengths = np.random.default_rng(seed).lognormal(3, 1, 1000).astype(np.int64) + 1
    batches = plan_batches(lengths, max_tokens=4096, small_tokens=500)
    assert sorted(np.concatenate(batches).tolist()) == list(range(1000))
    for batch in batches:
        padded = len(batch) * lengths[batch].max()
        assert len(batch) == 1 or padded <= min(4096, max(500, 1.15 * lengths[batch].sum()))


def histories(lengths: list[int]) -> Histories:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Histories(
        users=pa.array(range(100, 100 + len(lengths))),
        offsets=offsets,
        events=pa.table({"item_id": np.repeat(np.arange(len(lengths)), lengths)}),
        new_U=np.ones(len(lengths), np.int64),
        duplicates=pa.table({}),
    )


def first_items(table: pa.Table, offsets: NDArray[np.int64]) -> NDArray[np.float32]:
    """A stand-in encoder: the state is (item of the first event, number of events)."""
    item = table["item_id"].to_numpy()
    return np.stack([item[offsets[:-1]], np.diff(offsets)], axis=1).astype(np.float32)


def test_states_come_back_in_the_users_order() -> None:
    found = encode_users(histories([3, 1, 2, 1]), np.array([0, 1, 3]), first_items, max_tokens=3, width=2)
    assert found.users.tolist() == [0, 1, 3]
    assert found.state_AD.tolist() == [[0, 3], [1, 1], [3, 1]]
    assert found.dead == []


def test_only_the_poison_user_dies_and_neighbours_keep_their_states() -> None:
    calls = []

    def encode(table: pa.Table, offsets: NDArray[np.int64]) -> NDArray[np.float32]:
        calls.append(len(offsets) - 1)
        if 5 in table["item_id"].to_pylist():
            raise ValueError("item 5\ncannot be read")
        return first_items(table, offsets)

    found = encode_users(histories([2] * 8), np.arange(8), encode, max_tokens=1000, width=2)
    assert found.users.tolist() == [0, 1, 2, 3, 4, 6, 7]
    assert found.state_AD[:, 0].tolist() == [0, 1, 2, 3, 4, 6, 7]
    assert [(dead.user, dead.reason, dead.detail) for dead in found.dead] == [(5, "poison", "ValueError: item 5")]
    assert calls == [8, 4, 4, 2, 1, 1, 2]


def test_a_state_that_is_not_finite_is_not_written() -> None:
    def encode(table: pa.Table, offsets: NDArray[np.int64]) -> NDArray[np.float32]:
        states = first_items(table, offsets)
        states[states[:, 0] == 1] = np.nan
        states[states[:, 0] == 2] = np.inf
        return states

    found = encode_users(histories([1] * 4), np.arange(4), encode, max_tokens=1000, width=2)
    assert found.users.tolist() == [0, 3]
    assert [(dead.user, dead.reason) for dead in found.dead] == [(1, "non_finite_state"), (2, "non_finite_state")]


def test_no_active_users() -> None:
    found = encode_users(histories([2]), np.array([], np.int64), first_items, max_tokens=10, width=2)
    assert found.state_AD.shape == (0, 2)
