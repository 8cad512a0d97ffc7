"""Where the gain of request context comes from: the request's own, another's or none, with and without history.

Legend: B requests, M measures (history x context).

Replayed context is what the log had just before the event; it cannot know the answer. Pseudo-context, which training
adds to it, is drawn from the answer: items that share a category with the positive. Its gain in a test is leakage by
construction, and how much of it is tells what a model must not be judged by:

    leakage = Recall with subjects of the request's own positive - Recall with subjects of another request's positive
    share of the gain = leakage / (Recall with subjects of the own positive - Recall with none)

The same with another request's replayed context says how much of its gain belongs to the request.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from model.features import ContextFeatures
from model.metrics import recall_at
from model.training.data import Ints, SubjectSampler
from model.training.evaluate import answer_contexts, encode_requests
from model.training.requests import Floats, Questions, figure, ratio, summary

HISTORIES = ("full", "empty")
CONTEXTS = {
    "replayed": ("true", "shuffled", "absent"),
    "pseudo": ("own", "another's", "none"),
}
"""Arms of each kind of context: the request's own, another's, none. Pseudo comes on top of the true replayed."""

Contexts = Callable[[slice], ContextFeatures]


def audit_study(release: Any, table: pa.Table, items: pa.Table, users: pa.Table | None, **asked: Any) -> dict[str, Any]:
    """Recall@K of every history and context on the test requests of users with a state.

    asked: as Questions.read takes it. `pseudo` is None where no item has a category to draw subjects by.
    Raises DataError or ConfigError.
    """
    questions = Questions.read(release, table, items, users, **asked)
    test, events = questions.test, questions.events
    target_B, cut_B = test.target_B[test.history_B], test.cut_B[test.history_B]
    study = questions.header("context-audit", target_B)
    state_QD, row_B = encode_requests(release.encoder, events, target_B, cut_B)
    candidates = questions.candidates(target_B)
    kinds = _contexts(questions, target_B, cut_B)
    found: dict[str, Any] = dict.fromkeys(CONTEXTS)
    for kind, contexts in kinds.items():
        hits = [
            recall_at(
                candidates.ranks(
                    answer_contexts(release.head, questions.item_IE, state_QD, rows, ask), questions.item_IE
                ),
                questions.k,
            )
            for rows in (row_B, np.full(len(row_B), -1))
            for ask in contexts
        ]
        found[kind] = _figures(questions, target_B, np.stack(hits, 1), CONTEXTS[kind])
    return study | found


def another(size: int, seed: int) -> Ints:
    """For each request another one, every one once: a seeded random cycle. One request alone gets itself. i64 [B]."""
    order = np.random.default_rng([seed, 4]).permutation(size)
    other = np.empty(size, np.int64)
    other[order] = np.roll(order, 1)
    return other


def _contexts(questions: Questions, target_B: Ints, cut_B: Ints) -> dict[str, list[Contexts | None]]:
    """Contexts of each arm by kind, in the order of CONTEXTS; without pseudo where there is nothing to draw by."""
    events, config = questions.events, questions.release.config
    other_B = another(len(target_B), questions.seed)

    def replay(order_B: Ints, subjects: tuple[torch.Tensor, torch.Tensor] | None = None) -> Contexts:
        def contexts(part: slice) -> ContextFeatures:
            drawn = None if subjects is None else (subjects[0][part], subjects[1][part])
            return events.contexts(target_B[order_B[part]], cut_B[order_B[part]], config, drawn)

        return contexts

    own_B = np.arange(len(target_B))
    kinds: dict[str, list[Contexts | None]] = {"replayed": [replay(own_B), replay(other_B), None]}
    sampler = SubjectSampler(questions.release.items.embedder)
    if sampler.usable:
        rng = np.random.default_rng([questions.seed, 5])
        item_B = events.item_T[target_B]
        drawn = [
            tuple(map(torch.from_numpy, sampler.draw(item_B[order_B], 1.0, config.subject_limit, rng)))
            for order_B in (own_B, other_B)
        ]
        kinds["pseudo"] = [*(replay(own_B, (rows, weights)) for rows, weights in drawn), replay(own_B)]
    return kinds


def _figures(questions: Questions, target_B: Ints, hit_BM: Floats, arms: tuple[str, ...]) -> dict[str, Any]:
    """Recall by history and arm, the gain of the request's own context over none, and what of it another's lacks."""
    means_RM = questions.resampled(hit_BM, target_B)
    mean_M = hit_BM.mean(0)
    found: dict[str, Any] = {}
    for h, history in enumerate(HISTORIES):
        own, other, none = (len(arms) * h + a for a in range(len(arms)))
        gain, gain_R = mean_M[own] - mean_M[none], means_RM[:, own] - means_RM[:, none]
        above, above_R = mean_M[own] - mean_M[other], means_RM[:, own] - means_RM[:, other]
        found[history] = {
            "recall": {
                arm: summary(mean_M[m], means_RM[:, m]) for arm, m in zip(arms, (own, other, none), strict=True)
            },
            "gain": summary(gain, gain_R),
            "above_another": summary(above, above_R),
            "share_of_gain": ratio(above, gain, above_R, gain_R),
        }
    return found


def study_name(release_id: str) -> str:
    """Name of a release's context audit in the registry."""
    return f"audit-{release_id}"


def show(study: Mapping[str, Any]) -> str:
    """The study as tables for a terminal."""
    lines = [
        f"{study['dataset']}, release {study['release']['release_id']}: Recall@{study['k']} by context and history; "
        f"{study['requests']:,} requests of {study['users']:,} users with a state, {study['catalogue']:,} items; "
        f"intervals: {study['interval']}",
    ]
    titles = {"replayed": "replayed context (what the log had)", "pseudo": "subjects drawn from the answer (leaky)"}
    for kind, arms in CONTEXTS.items():
        lines += ["", titles[kind]]
        if study[kind] is None:
            lines.append("  not asked: no item has a category to draw subjects by")
            continue
        lines.append(f"  {'history':10}" + "".join(f"{arm:>29}" for arm in arms))
        for history in HISTORIES:
            recall = study[kind][history]["recall"]
            lines.append(f"  {history:10}" + "".join(f"{figure(recall[arm]):>29}" for arm in arms))
        word = "leakage" if kind == "pseudo" else "of the request itself"
        for history in HISTORIES:
            found = study[kind][history]
            lines.append(
                f"  {history} history: gain over {arms[2]} {figure(found['gain'])}; {word} "
                f"{figure(found['above_another'])}, "
                f"{figure(found['share_of_gain'], percent=True)} of it"
            )
    return "\n".join(lines)
