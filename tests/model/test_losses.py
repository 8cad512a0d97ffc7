"""Expected values are worked out by hand or against PyTorch's own cross entropy, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from model.errors import ShapeError
from model.losses import (
    collision_mask,
    gbce,
    log_inclusion,
    sampled_softmax,
    sampled_softmax_each,
    sampled_softmax_reference,
)


def unit(rows):
    return F.normalize(torch.tensor(rows, dtype=torch.float64), dim=-1)


def no_mask(targets, candidates):
    return torch.zeros(targets, candidates, dtype=torch.bool)


def test_one_target_two_negatives_by_hand():
    user, positive = unit([[1.0, 0.0]]), unit([[1.0, 0.0]])
    candidates = unit([[0.0, 1.0], [-1.0, 0.0]])
    loss = sampled_softmax(user, positive, candidates, no_mask(1, 2), temperature=0.5)
    # cosines 1, 0, -1 over 0.5: logits 2, 0, -2
    assert loss.item() == pytest.approx(math.log(math.e**2 + 1 + math.e**-2) - 2, abs=1e-12)


def test_log_q_is_taken_off_the_candidates_and_not_off_the_positive():
    user, positive, candidates = unit([[1.0, 0.0]]), unit([[1.0, 0.0]]), unit([[0.0, 1.0]])
    log_q = torch.tensor([math.log(0.25)], dtype=torch.float64)
    loss = sampled_softmax(user, positive, candidates, no_mask(1, 1), temperature=1.0, log_q_S=log_q)
    # a candidate drawn one time in four stands for four: e^0 / 0.25
    assert loss.item() == pytest.approx(math.log(math.e + 4) - 1, abs=1e-12)


def test_masked_candidates_count_for_nothing():
    user, positive = unit([[1.0, 0.0]]), unit([[1.0, 1.0]])
    candidates = unit([[0.0, 1.0], [1.0, 0.0]])
    masked = sampled_softmax(user, positive, candidates, torch.tensor([[False, True]]), temperature=0.1)
    without = sampled_softmax(user, positive, candidates[:1], no_mask(1, 1), temperature=0.1)
    assert masked.item() == pytest.approx(without.item(), abs=1e-12)


def test_nothing_but_masked_candidates_gives_zero_loss_and_finite_gradients():
    user = unit([[1.0, 0.0]]).requires_grad_()
    loss = sampled_softmax(user, unit([[0.0, 1.0]]), unit([[1.0, 0.0]]), torch.tensor([[True]]), temperature=0.1)
    loss.backward()
    assert loss.item() == 0
    assert torch.isfinite(user.grad).all()


def test_weights_make_a_weighted_mean():
    user, positive = unit([[1.0, 0.0], [0.0, 1.0]]), unit([[1.0, 0.0], [1.0, 0.0]])
    candidates = unit([[0.0, 1.0]])
    mask = no_mask(2, 1)
    single = [
        sampled_softmax(user[i : i + 1], positive[i : i + 1], candidates, mask[:1], temperature=1.0).item()
        for i in range(2)
    ]
    weight = torch.tensor([3.0, 1.0])
    both = sampled_softmax(user, positive, candidates, mask, temperature=1.0, weight_B=weight)
    assert both.item() == pytest.approx((3 * single[0] + single[1]) / 4, abs=1e-12)
    assert sampled_softmax(user, positive, candidates, mask, temperature=1.0, weight_B=weight * 0).item() == 0


def test_the_whole_catalogue_without_correction_is_the_full_softmax():
    torch.manual_seed(0)
    items = F.normalize(torch.randn(30, 8, dtype=torch.float64), dim=-1)
    user = F.normalize(torch.randn(5, 8, dtype=torch.float64), dim=-1).requires_grad_()
    item = torch.tensor([3, 0, 29, 3, 11])
    mask = collision_mask(torch.arange(5), item, torch.arange(30), 30, same_user=False)
    loss = sampled_softmax(user, items[item], items, mask, temperature=0.07)
    (gradient,) = torch.autograd.grad(loss, user)
    full = F.cross_entropy(user @ items.T / 0.07, item)
    (full_gradient,) = torch.autograd.grad(full, user)
    torch.testing.assert_close(loss, full, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, full_gradient, rtol=1e-10, atol=1e-12)


def test_log_q_makes_the_partition_function_unbiased():
    """Over many pools, the mean of sum e^(c - log q) over the pool is the sum of e^c over the catalogue."""
    torch.manual_seed(0)
    share = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.05, 0.05], dtype=torch.float64)
    exp_c = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64)
    log_q = log_inclusion(share, 3, 2, 6)
    total = 0.0
    for _ in range(4000):
        pool = torch.cat([torch.multinomial(share, 3, replacement=True), torch.randint(6, (2,))]).unique()
        total += float((exp_c[pool] / log_q[pool].exp()).sum())
    assert total / 4000 == pytest.approx(float(exp_c.sum()), rel=0.03)


def test_log_inclusion_by_hand():
    share = torch.tensor([0.5, 0.0], dtype=torch.float64)
    # two in-batch draws miss an item of share 1/2 with chance 1/4; one uniform draw out of 4 misses with chance 3/4
    expected = [math.log(1 - 0.25 * 0.75), math.log(0.25)]
    assert log_inclusion(share, 2, 1, 4).tolist() == pytest.approx(expected, abs=1e-12)
    assert log_inclusion(share, 2, 0, 4)[0].item() == pytest.approx(math.log(0.75), abs=1e-12)


def test_collision_mask_hides_the_item_itself_and_the_users_other_positives():
    user, item = torch.tensor([0, 0, 1]), torch.tensor([7, 8, 9])
    pool = torch.tensor([9, 7, 2, 8])
    assert collision_mask(user, item, pool, 10).tolist() == [
        [False, True, False, True],
        [False, True, False, True],
        [True, False, False, False],
    ]
    assert collision_mask(user, item, pool, 10, same_user=False).tolist() == [
        [False, True, False, False],
        [False, False, False, True],
        [True, False, False, False],
    ]


def test_shapes_are_checked():
    user, candidates = unit([[1.0, 0.0]]), unit([[1.0, 0.0]])
    with pytest.raises(ShapeError, match=r"must be \[B, E\]"):
        sampled_softmax(user, user[:, :1], candidates, no_mask(1, 1), temperature=1.0)
    with pytest.raises(ShapeError, match="mask"):
        sampled_softmax(user, user, candidates, no_mask(2, 1), temperature=1.0)


@pytest.mark.parametrize("pool", [1, 40, 3000])
def test_loss_and_gradients_equal_plain_autograd(pool):
    """Pools of 3000 make several blocks of targets."""
    torch.manual_seed(0)

    def inputs():
        torch.manual_seed(1)
        rows = [F.normalize(torch.randn(n, 6, dtype=torch.float64), dim=-1) for n in (700, 700, pool)]
        return [row.requires_grad_() for row in rows]

    options = {
        "mask_BS": torch.rand(700, pool) < 0.2,
        "temperature": 0.1,
        "log_q_S": torch.rand(pool, dtype=torch.float64) - 2,
        "weight_B": torch.rand(700, dtype=torch.float64),
    }
    found, wanted = inputs(), inputs()
    loss = sampled_softmax(*found, **options)
    plain = sampled_softmax_reference(*wanted, **options)
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    (3 * loss).backward()
    (3 * plain).backward()
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-14)


def test_gbce_by_hand():
    user, positive = unit([[1.0, 0.0]]), unit([[1.0, 0.0]])
    candidates = unit([[0.0, 1.0], [-1.0, 0.0]])
    loss = gbce(user, positive, candidates, no_mask(1, 2), temperature=0.5, calibration=0.75, num_items=5)
    # cosines 1, 0, -1 over 0.5: logits 2, 0, -2; a = 2 / 4, beta = .5 * (.75 * (1 - 2) + 2) = .625

    def log_s(x):
        return -math.log(1 + math.exp(-x))

    assert loss.item() == pytest.approx(-(0.625 * log_s(2) + log_s(0) + log_s(2)) / 3, abs=1e-12)


def test_gbce_of_the_whole_catalogue_is_plain_cross_entropy():
    random = torch.Generator().manual_seed(0)
    users, items = (F.normalize(torch.randn(n, 4, generator=random, dtype=torch.float64), dim=-1) for n in (3, 6))
    mask = no_mask(3, 5)
    mask[1, 2] = True
    loss = gbce(users, items[:3], items[1:], mask, temperature=0.3, calibration=1.0, num_items=6)
    logits = torch.cat([(users * items[:3]).sum(1, keepdim=True), users @ items[1:].T], 1) / 0.3
    wanted = torch.zeros_like(logits)
    wanted[:, 0] = 1
    each = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    each[1, 3] = 0
    assert loss.item() == pytest.approx((each.sum(1) / 6).mean().item(), abs=1e-12)


def test_negatives_of_each_target_by_hand():
    positive, negative = torch.tensor([1.0], dtype=torch.float64), torch.tensor([[0.0, 2.0, 5.0]], dtype=torch.float64)
    mask, count = torch.tensor([[False, False, True]]), torch.tensor([[0.5, 2.0, 1.0]], dtype=torch.float64)
    loss = sampled_softmax_each(positive, negative, mask, count.log())
    # e^0 expected half a time counts double, e^2 expected twice counts half
    assert loss.item() == pytest.approx(math.log(math.e + 2 + math.e**2 / 2) - 1, abs=1e-12)


def test_negatives_of_each_target_are_the_shared_ones_where_all_are_the_same():
    torch.manual_seed(0)
    user, item = (F.normalize(torch.randn(n, 8, dtype=torch.float64), dim=-1) for n in (5, 9))
    target = torch.tensor([3, 0, 8, 3, 1])
    mask = collision_mask(torch.arange(5), target, torch.arange(9), 9, same_user=False)
    log_q = torch.log(torch.rand(9, dtype=torch.float64))
    weight = torch.rand(5, dtype=torch.float64)
    options = {"temperature": 0.2, "log_q_S": log_q, "weight_B": weight}
    shared = sampled_softmax_reference(user, item[target], item, mask, **options)
    logit = user @ item.T / 0.2
    own = sampled_softmax_each(logit.gather(1, target[:, None])[:, 0], logit, mask, log_q.expand(5, 9), weight)
    torch.testing.assert_close(own, shared, rtol=1e-12, atol=1e-12)


def test_negatives_of_each_target_in_single_precision_keep_up_with_double():
    torch.manual_seed(1)
    positive, negative = torch.randn(64, dtype=torch.float64) * 20, torch.randn(64, 32, dtype=torch.float64) * 20
    mask, log_count = torch.rand(64, 32) < 0.2, torch.randn(64, 32, dtype=torch.float64) * 3
    found = []
    for dtype in (torch.float64, torch.float32):
        inputs = [x.to(dtype).requires_grad_() for x in (positive, negative)]
        loss = sampled_softmax_each(*inputs, mask, log_count.to(dtype))
        found.append([loss, *torch.autograd.grad(loss, inputs)])
    for exact, single in zip(*found, strict=True):
        torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-6)


def test_negatives_of_each_target_must_fit():
    with pytest.raises(ShapeError, match=r"must be \[B, M\]"):
        sampled_softmax_each(torch.zeros(2), torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.bool), torch.zeros(3, 4))
