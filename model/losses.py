"""Sampled softmax over items, its logQ correction and its masks; gBCE beside it.

Legend: B targets, S candidates (distinct items), E embedding width, N catalogue items.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F

from model.errors import ShapeError

_BLOCK, _BLOCK_CUDA = 2**20, 2**28  # logits held at once


def sampled_softmax(
    user_BE: torch.Tensor,
    positive_BE: torch.Tensor,
    candidate_SE: torch.Tensor,
    mask_BS: torch.Tensor,
    *,
    temperature: float,
    log_q_S: torch.Tensor | None = None,
    weight_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean over targets of -log( e^p / (e^p + sum_s e^(c_s - log q_s)) ), p and c_s the cosines over the temperature.

    user_BE, positive_BE, candidate_SE: L2-normalised, f32 or f64, one dtype; candidates are distinct items.
    mask_BS: bool [B, S], True where a candidate is no negative of the target (see collision_mask).
    log_q_S: log of the chance that a candidate is in the pool at all (see log_inclusion); None means 0.
    weight_B: [B], at least 0, weights of the targets in the mean; None means 1 each. All 0 gives 0.
    Returns a scalar of the inputs' dtype. Raises ShapeError. Differentiable once, in the three embeddings; the
    gradient is made along with the loss, some targets at a time, so that no [B, S] table of logits is ever kept.

    Source: Bengio and Senecal, Adaptive importance sampling, 2008, eq. 7, and Yi et al., Sampling-bias-corrected
    neural modeling, RecSys 2019, eq. 4-6. We differ from Yi in leaving the positive uncorrected: it is in the pool
    with certainty, so that a pool of the whole catalogue without correction is the full softmax exactly.
    """
    size, width = user_BE.shape
    if positive_BE.shape != user_BE.shape or candidate_SE.shape[1:] != (width,):
        raise ShapeError(
            f"users {tuple(user_BE.shape)}, positives {tuple(positive_BE.shape)} and candidates "
            f"{tuple(candidate_SE.shape)} must be [B, E], [B, E] and [S, E]"
        )
    if mask_BS.shape != (size, len(candidate_SE)):
        raise ShapeError(f"mask must be [B, S] = [{size}, {len(candidate_SE)}], got {tuple(mask_BS.shape)}")
    if weight_B is None:
        weight_B = user_BE.new_ones(size)
    weight_B = weight_B.to(user_BE.dtype)
    weight_B = weight_B / weight_B.sum().clamp_min(torch.finfo(user_BE.dtype).tiny)
    if log_q_S is not None:
        log_q_S = log_q_S.to(user_BE.dtype)
    loss: torch.Tensor = _SampledSoftmax.apply(
        user_BE, positive_BE, candidate_SE, mask_BS, log_q_S, weight_B, temperature
    )  # type: ignore[no-untyped-call]
    return loss


def sampled_softmax_reference(
    user_BE: torch.Tensor,
    positive_BE: torch.Tensor,
    candidate_SE: torch.Tensor,
    mask_BS: torch.Tensor,
    *,
    temperature: float,
    log_q_S: torch.Tensor | None = None,
    weight_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in plain torch, for tests: readable, and differentiable as often as one likes."""
    positive_B = (user_BE * positive_BE).sum(1) / temperature
    logit_BS = user_BE @ candidate_SE.T / temperature
    if log_q_S is not None:
        logit_BS = logit_BS - log_q_S
    logit_BS = logit_BS.masked_fill(mask_BS, torch.finfo(logit_BS.dtype).min / 4)
    loss_B = torch.logaddexp(positive_B, torch.logsumexp(logit_BS, 1)) - positive_B
    if weight_B is None:
        return loss_B.mean()
    return (loss_B * weight_B).sum() / weight_B.sum()


class _SampledSoftmax(torch.autograd.Function):
    """Loss and gradients in one pass over blocks of targets; a block's logits fit the processor's cache."""

    @staticmethod
    def forward(
        ctx: Any,
        user_BE: torch.Tensor,
        positive_BE: torch.Tensor,
        candidate_SE: torch.Tensor,
        mask_BS: torch.Tensor,
        log_q_S: torch.Tensor | None,
        weight_B: torch.Tensor,
        temperature: float,
    ) -> torch.Tensor:
        query_BE = user_BE / temperature
        positive_B = (query_BE * positive_BE).sum(1)
        grad_user_BE = torch.empty_like(user_BE)
        grad_positive_B = torch.empty_like(positive_B)
        grad_candidate_SE = torch.zeros_like(candidate_SE)
        loss_B = torch.empty_like(positive_B)
        block = max(1, (_BLOCK_CUDA if user_BE.is_cuda else _BLOCK) // max(len(candidate_SE), 1))
        for start in range(0, len(user_BE), block):
            part = slice(start, start + block)
            query, own_b, weight_b = query_BE[part], positive_B[part], weight_B[part]
            logit = query @ candidate_SE.T
            if log_q_S is not None:
                logit -= log_q_S
            logit.masked_fill_(mask_BS[part], -torch.inf)
            highest = torch.maximum(logit.amax(1), own_b) if logit.shape[1] else own_b
            share = logit.sub_(highest[:, None]).exp_()  # unnormalised, in place of the logits
            own = (own_b - highest).exp()
            total = share.sum(1) + own
            loss_B[part] = total.log() + highest - own_b
            share.mul_((weight_b / total)[:, None])
            grad_positive_B[part] = weight_b * (own / total - 1)
            torch.mm(share, candidate_SE, out=grad_user_BE[part])
            grad_candidate_SE.addmm_(share.T, query)
        grad_user_BE.addcmul_(grad_positive_B[:, None], positive_BE).div_(temperature)
        ctx.save_for_backward(grad_user_BE, grad_positive_B[:, None] * query_BE, grad_candidate_SE)
        return (loss_B * weight_B).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *(saved * grad for saved in ctx.saved_tensors), None, None, None, None


def gbce(
    user_BE: torch.Tensor,
    positive_BE: torch.Tensor,
    candidate_SE: torch.Tensor,
    mask_BS: torch.Tensor,
    *,
    temperature: float,
    calibration: float,
    num_items: int,
    weight_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """Generalised binary cross-entropy: mean over targets of -(beta log s(p) + sum_s log s(-c_s)) / (S + 1).

    s is the logistic function, p and c_s the cosines over the temperature. beta = a (t (1 - 1/a) + 1/a) with a the
    share of the num_items that serve as negatives and t the calibration: 0 is plain BCE, 1 undoes the overconfidence
    that sampled negatives bring. user_BE, positive_BE, candidate_SE, mask_BS, weight_B: as in sampled_softmax.
    Source: Petrov and Macdonald, gSASRec, RecSys 2023, equations 9 to 12. We differ in sharing the negatives among
    all targets of a step.
    """
    share = min(1.0, candidate_SE.shape[0] / max(num_items - 1, 1))
    beta = share * (calibration * (1 - 1 / share) + 1 / share)
    positive_B = F.logsigmoid((user_BE * positive_BE).sum(1) / temperature)
    negative_BS = F.logsigmoid(-(user_BE @ candidate_SE.T) / temperature).masked_fill(mask_BS, 0.0)
    loss_B = -(beta * positive_B + negative_BS.sum(1)) / (candidate_SE.shape[0] + 1)
    if weight_B is None:
        return loss_B.mean()
    weight_B = weight_B.to(loss_B.dtype)
    return (loss_B * weight_B).sum() / weight_B.sum().clamp_min(torch.finfo(loss_B.dtype).tiny)


def sampled_softmax_each(
    positive_B: torch.Tensor,
    negative_BM: torch.Tensor,
    mask_BM: torch.Tensor,
    log_count_BM: torch.Tensor,
    weight_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same loss where every target has negatives of its own: -log( e^p / (e^p + sum_m e^(n_m - log c_m)) ).

    positive_B, negative_BM: logits, f32 or f64. mask_BM: True where a draw is no negative.
    log_count_BM: log of how often the draw's item was expected among the target's M draws, over all the distributions
    they came from; then the sum over draws is the sum over all other items on average.
    weight_B: weights of the targets in the mean; None means 1 each, all 0 gives 0. Returns a scalar.
    Source: Bengio and Senecal 2008, eq. 7; for several distributions Veach and Guibas, SIGGRAPH 1995, eq. 14 (the
    balance heuristic).
    """
    if not negative_BM.shape == mask_BM.shape == log_count_BM.shape or negative_BM.shape[:1] != positive_B.shape:
        raise ShapeError(
            f"negatives {tuple(negative_BM.shape)}, their mask {tuple(mask_BM.shape)} and log counts "
            f"{tuple(log_count_BM.shape)} must be [B, M], and B {len(positive_B)}"
        )
    logit_BM = (negative_BM - log_count_BM).masked_fill(mask_BM, torch.finfo(negative_BM.dtype).min / 4)
    loss_B = F.softplus(torch.logsumexp(logit_BM, 1) - positive_B)
    if weight_B is None:
        return loss_B.mean()
    return (loss_B * weight_B).sum() / weight_B.sum().clamp_min(torch.finfo(weight_B.dtype).tiny)


def collision_mask(
    user_B: torch.Tensor, item_B: torch.Tensor, candidate_S: torch.Tensor, num_items: int, *, same_user: bool = True
) -> torch.Tensor:
    """Candidates that are no negatives: the target's own item and, with same_user, the other positives of its user.

    user_B: i64 [B], the target's user as a number in [0, B), the same for all targets of a user.
    item_B: i64 [B] in [0, num_items), the target's item. candidate_S: i64 [S] in [0, num_items), distinct.
    Returns bool [B, S], True = masked. Only positives that are in this batch are known.
    """
    size, width, device = len(item_B), len(candidate_S), item_B.device
    # Items that are no candidate fall into a column of their own: choosing rows by a mask would wait for the device.
    column_N = item_B.new_full((num_items,), width)
    column_N[candidate_S] = torch.arange(width, device=device)
    row_B = user_B if same_user else torch.arange(size, device=device)
    mask_BS = torch.zeros((size, width + 1), dtype=torch.bool, device=device)
    mask_BS.view(-1).index_fill_(0, row_B * (width + 1) + column_N[item_B], True)
    return mask_BS[user_B, :width] if same_user else mask_BS[:, :width]


def log_inclusion(probability_S: torch.Tensor, num_in_batch: int, num_uniform: int, num_items: int) -> torch.Tensor:
    """log of the chance that an item is in a pool of in-batch positives and uniform draws, each item kept once.

    q = 1 - (1 - p)^b (1 - 1/N)^r with p the item's share of all training targets, b in-batch draws and r uniform
    draws out of N items; for a rare item this is b p + r / N, the mixture of the two sources.
    probability_S: f32|f64 [S] in [0, 1]. Returns the same dtype, [S].
    Source: Yi et al. 2019, eq. 3 (log p of an in-batch item); Yang et al., Mixed negative sampling, WWW 2020, eq. 4.
    """
    miss_S = num_in_batch * torch.log1p(-probability_S.clamp(max=1 - 1e-6))
    miss_S = miss_S + (num_uniform * math.log1p(-1 / num_items) if num_items > 1 else -math.inf * bool(num_uniform))
    return torch.log(-torch.expm1(miss_S)).clamp_min(-30)
