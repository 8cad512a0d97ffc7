"""Skew: what is left of Recall@K when encoder, head and item index come from different releases.

Legend: N releases, B requests; axes of a matrix: E encoder, H head, I item index.

The version guard never mixes releases. A skew study measures what it guards against: for every triple of a family, the
encoder of one release makes the states, the head of another (which reads its own item table for session items) makes
the user embeddings, and the item table of a third is searched. A family is the checkpoints of one training run, or
independent runs. Here is what a study means; model.training.skew makes it.

Skew sensitivity, one number a family: over its pairs (a, b) of releases, the mean relative loss of the six mixes,

    loss(e, h, i) = 1 - R[e, h, i] / ((R[a, a, a] + R[b, b, b]) / 2),   (e, h, i) in {a, b}^3 without aaa and bbb.

0 means that a mix is as good as either release on average, 1 that it finds nothing. In a run the pairs are neighbouring
checkpoints; independent runs have no order, so all pairs count. Of the six mixes, two differ from both releases in the
encoder alone, two in the head alone, two in the index alone: `by_part` gives the mean of each two.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from model.release import Registry

PARTS = ("encoder", "head", "index")
Floats = NDArray[np.float64]

_SLICES = {
    "encoder": "encoder (rows) x head and its index (columns)",
    "head": "encoder and its index (rows) x head (columns)",
    "index": "encoder and its head (rows) x index (columns)",
}
"""Slices of the triple in which one part is from another release than the two others, by that part."""


def pairs_of(kind: str, count: int) -> list[tuple[int, int]]:
    """The pairs a family's sensitivity is a mean over: neighbours in a run, all pairs of independent runs."""
    if kind == "run":
        return list(itertools.pairwise(range(count)))
    return list(itertools.combinations(range(count), 2))


def losses(recall_EHI: Floats, pairs: Sequence[tuple[int, int]]) -> Floats:
    """Relative loss of each pair's mixes by part: f64 [..., pairs, 3], the parts in the order of PARTS.

    recall_EHI: f64 [..., N, N, N]. A pair of which neither release finds anything has no loss: nan.
    """
    found = []
    for a, b in pairs:
        own = (recall_EHI[..., a, a, a] + recall_EHI[..., b, b, b]) / 2
        mixes = [
            (recall_EHI[..., b, a, a] + recall_EHI[..., a, b, b]) / 2,
            (recall_EHI[..., a, b, a] + recall_EHI[..., b, a, b]) / 2,
            (recall_EHI[..., a, a, b] + recall_EHI[..., b, b, a]) / 2,
        ]
        with np.errstate(invalid="ignore", divide="ignore"):
            found.append(np.stack([np.where(own > 0, 1 - mix / own, np.nan) for mix in mixes], -1))
    return np.stack(found, -2)


def sensitivity(recall_EHI: Floats, pairs: Sequence[tuple[int, int]]) -> Floats:
    """Skew sensitivity, see the top of this module: f64 [...] for recall_EHI f64 [..., N, N, N]."""
    mean: Floats = losses(recall_EHI, pairs).mean((-1, -2))
    return mean


def study_name(release_id: str) -> str:
    """Name of a release's skew study in the registry, that of the run it comes from."""
    return f"skew-{release_id}"


def keep_study(registry: "Registry", study: Mapping[str, Any]) -> list[str]:
    """Store a family's study: of a run under each of its releases, of independent runs under the last one's name.

    Returns the names.
    """
    ids = [release["release_id"] for release in study["releases"]]
    names = [study_name(release_id) for release_id in ids]
    if study["family"] == "seeds":
        names = [f"skew-seeds-{ids[-1]}"]
    for name in names:
        registry.write_study(name, study)
    return names


def skew_warning(new: Mapping[str, Any] | None, serving: Mapping[str, Any] | None) -> str | None:
    """A sentence where a new family is more skew-sensitive than the serving one; None where nothing is to be said.

    new, serving: studies as the registry holds them; None, where there is no such study, says nothing. More sensitive
    means that the intervals do not touch: they are over test users, so the luck of a training run is not in them.
    """
    if new is None or serving is None:
        return None
    for name in ("dataset", "family", "k"):
        if new[name] != serving[name]:
            return f"the skew studies cannot be compared: {name} is {new[name]} here, {serving[name]} for what serves"
    now, before = new["sensitivity"], serving["sensitivity"]
    if now["low"] <= before["high"]:
        return None
    worst = max(now["by_part"], key=lambda part: now["by_part"][part])
    steps = _steps(new), _steps(serving)
    text = (
        f"mixing parts of neighbouring releases costs {now['value']:.1%} of Recall@{new['k']} "
        f"({now['low']:.1%} to {now['high']:.1%}), {before['value']:.1%} ({before['low']:.1%} to "
        f"{before['high']:.1%}) for the release that serves; most from another release's {worst}"
    )
    if steps[0] != steps[1]:
        text += f"; the checkpoints are {steps[0]} epochs apart, not {steps[1]}"
    return text


def _steps(study: Mapping[str, Any]) -> str:
    epochs = [release["epoch"] for release in study["releases"]]
    if study["family"] != "run" or None in epochs:
        return "?"
    return ", ".join(str(step) for step in dict.fromkeys(b - a for a, b in itertools.pairwise(epochs)))


def labels(study: Mapping[str, Any]) -> list[str]:
    """Short names of a study's releases: epoch 10, or seed 1."""
    what = "epoch" if study["family"] == "run" else "seed"
    return [
        release["release_id"] if release[what] is None else f"{what} {release[what]}" for release in study["releases"]
    ]


def slices(study: Mapping[str, Any]) -> dict[str, Floats]:
    """The three slices of the triple in which one part alone is from another release, by part: f64 [N, N] each.

    encoder: [e, h] = R[e, h, h]; head: [e, h] = R[e, h, e]; index: [e, i] = R[e, e, i]. The diagonals are unmixed.
    """
    recall_EHI = np.array(study["recall"])
    n = np.arange(len(recall_EHI))
    row, column = n[:, None], n[None, :]
    return {
        "encoder": recall_EHI[row, column, column],
        "head": recall_EHI[row, column, row],
        "index": recall_EHI[row, row, column],
    }


def show(study: Mapping[str, Any]) -> str:
    """The study as tables for a terminal."""
    names, found = labels(study), study["sensitivity"]
    width = max(11, *(len(name) + 2 for name in names))
    lines = [
        f"{study['dataset']}, {len(names)} releases, family: {study['family']}; Recall@{study['k']} of "
        f"{study['requests']:,} requests of {study['users']:,} users with a state, {study['catalogue']:,} items, "
        f"seen items {study['seen_items']}",
    ]
    for part, values in slices(study).items():
        lines += ["", f"another release's {part}: {_SLICES[part]}"]
        lines.append(" " * width + "".join(f"{name:>{width}}" for name in names))
        lines += [
            f"{name:{width}}" + "".join(f"{value:{width}.4f}" for value in row)
            for name, row in zip(names, values, strict=True)
        ]
    parts = ", ".join(f"{part} {loss:.1%}" for part, loss in found["by_part"].items())
    lines += [
        "",
        f"skew sensitivity {found['value']:.4f}, {study['interval']}: {found['low']:.4f} to {found['high']:.4f}",
        f"mean loss of Recall@{study['k']} by the part from another release: {parts}",
    ]
    return "\n".join(lines)
