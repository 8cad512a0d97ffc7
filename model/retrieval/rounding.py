"""Embeddings as int8 or float8 codes with a scale a row; and rounding that spares the directions users look from.

A score is off by u.e, e what rounding did to the row. Rounded to the nearest, e is the same in all directions. But the
users of a tower lie in few of them: with H the mean of g g^T over gradients g of their scores, the mean squared error
is e^T H e, and it is made small by rounding the values one after the other and letting those still to be rounded make
up for the error so far, as GPTQ rounds weights (Frantar et al. 2023, equation 3; there H is of a layer's inputs). The
codes take no more bytes and no search reads anything else.

Legend: as in the package; U users of the sample.
"""

from typing import Any

import torch

LARGEST_CODE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Dtypes of embeddings that are kept with a scale a row, and what a row's largest value becomes."""
LEAST_SCALE = 1e-30
DAMPING = 0.01
"""Of H's mean eigenvalue, added to all: users to come lie a little otherwise than the sample."""
DRAWN, BEST = 2048, 32
"""Of a sample's user: items drawn, and how many of them, with the highest scores, have gradients that make H."""


def sensitivity(scorer: Any, user_UE: torch.Tensor, feature_NF: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """H: f64 [E, E], the mean of g g^T over gradients of scores by the item's embedding, each of length 1.

    They are taken where errors change an answer: at the best of the items that are drawn for each user, with the seed.

    scorer: as `scorer.Scorer`, its `logits` where it has them; of several tasks, their sum. user_UE: float, a sample of
    users. feature_NF: float, items. A dot product's gradient is the user.
    """
    drawn, best, width = min(DRAWN, len(feature_NF)), min(BEST, len(feature_NF)), user_UE.shape[1]
    random = torch.Generator().manual_seed(seed)
    total_EE = torch.zeros(width, width, dtype=torch.float64, device=user_UE.device)
    score = getattr(scorer, "logits", scorer)
    with torch.inference_mode(False), torch.enable_grad():
        for user_E in user_UE.detach().float().clone():
            feature_MF = feature_NF[torch.randint(len(feature_NF), (drawn,), generator=random).to(feature_NF.device)]
            with torch.no_grad():
                score_M = score(user_E[None], feature_MF.float()).float().sum((0, 1))
            feature_MF = feature_MF[score_M.topk(best).indices].float().clone().requires_grad_()
            (gradient_MF,) = torch.autograd.grad(score(user_E[None], feature_MF).float().sum(), feature_MF)
            gradient_ME = torch.nn.functional.normalize(gradient_MF[:, :width].double(), dim=1)
            total_EE += gradient_ME.T @ gradient_ME / best
    return total_EE / len(user_UE)


def feedback(sensitivity_EE: torch.Tensor) -> torch.Tensor:
    """f32 [E, E], upper triangular with ones: what of a value's error is taken from each after it (`coded`)."""
    exact_EE = sensitivity_EE.double()
    mean = exact_EE.diagonal().mean().clamp_min(LEAST_SCALE)
    damped_EE = exact_EE + DAMPING * mean * torch.eye(len(exact_EE), dtype=torch.float64, device=exact_EE.device)
    upper_EE = torch.linalg.cholesky(torch.linalg.inv(damped_EE), upper=True)
    made_EE: torch.Tensor = (upper_EE / upper_EE.diagonal()[:, None]).float()
    return made_EE


def coded(
    embedding_RE: torch.Tensor, dtype: torch.dtype, feedback_EE: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [R, E] of the dtype, and f32 scale_R: a row is about its code times its scale.

    embedding_RE: f32. dtype: of LARGEST_CODE. feedback_EE: of `feedback`; None: to the nearest.
    """
    largest = LARGEST_CODE[dtype]
    scale_R = (embedding_RE.abs().amax(1) / largest).clamp_min(LEAST_SCALE)
    if feedback_EE is None:
        return _nearest(embedding_RE / scale_R[:, None], dtype), scale_R
    feedback_EE = feedback_EE.to(embedding_RE.device)
    left_ER = (embedding_RE / scale_R[:, None]).T.contiguous()  # in units of the row's scale, a value a line
    code_ER = torch.empty_like(left_ER, dtype=dtype)
    for e, value_R in enumerate(left_ER):
        code_ER[e] = _nearest(value_R, dtype)
        error_R = value_R - code_ER[e].float()
        left_ER[e + 1 :].addr_(feedback_EE[e, e + 1 :], error_R, alpha=-1)
    return code_ER.T.contiguous(), scale_R


def _nearest(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    largest = LARGEST_CODE[dtype]
    value = value.clamp(-largest, largest)
    return (value.round() if dtype == torch.int8 else value).to(dtype)
