"""FAISS on the GPU, as a rival of two-level retrieval: flat float16, and inverted lists over the same clusters.

FAISS is optional (`faiss-gpu` on PyPI; 1.15.1 has code for compute capability 9.0 and wants CUDA 12's libraries); where
it cannot be had, a line says so. Its calls cannot be captured in a CUDA graph: they are timed one after another, users
and answers in the device's memory. Inverted lists take our index's centroids as they are, so both look into the same
clusters; of the probes given, the fewest that reach the recall wanted is the setting to compare. Lists of 8-bit codes
are left out: on 100,000 items they reach a recall of .989, on 10 million FAISS ends the process by an assertion of its
own. Graph search (CAGRA) needs cuVS, which this wheel has not.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

PIECE = 2**20
TEMPORARY_BYTES = 2**31


@dataclass(frozen=True, slots=True)
class Rival:
    """One way of FAISS to answer."""

    name: str
    search: Callable[[torch.Tensor], torch.Tensor]
    """Users f32 [B, E] to rows i64 [B, k]."""


def imported() -> Any:
    """faiss with GPU indices that take tensors, or None; why, is printed."""
    try:
        faiss = importlib.import_module("faiss")
        if not faiss.get_num_gpus():
            raise ImportError(f"faiss {faiss.__version__} sees no GPU")
        importlib.import_module("faiss.contrib.torch_utils")
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        print(f"FAISS: not here: {str(error)[:300]}", flush=True)
        return None
    return faiss


def rivals(
    faiss: Any, item_NE: torch.Tensor, centroid_GE: torch.Tensor | None, probes: Sequence[int], k: int
) -> Iterator[Rival]:
    """The ways, one in memory at a time: use each before the next is asked for.

    item_NE: bfloat16, on the device. centroid_GE: f32, of the inverted lists; None: flat search alone.
    """
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(TEMPORARY_BYTES)
    width = item_NE.shape[1]

    def options(config: Any) -> Any:
        config.device = item_NE.device.index or 0
        return config

    def add(index: Any) -> Any:
        for piece in item_NE.split(PIECE):
            index.add(piece.float())
        return index

    flat = options(faiss.GpuIndexFlatConfig())
    flat.useFloat16 = True
    index = add(faiss.GpuIndexFlatIP(resources, width, flat))
    yield Rival("FAISS flat float16", lambda users, index=index: index.search(users, k)[1])
    index = None
    if centroid_GE is None:
        return
    metric, clusters = faiss.METRIC_INNER_PRODUCT, len(centroid_GE)
    coarse = faiss.GpuIndexFlatIP(resources, width, options(faiss.GpuIndexFlatConfig()))
    coarse.add(centroid_GE.float())
    lists = faiss.GpuIndexIVFFlat(resources, coarse, width, clusters, metric, options(faiss.GpuIndexIVFFlatConfig()))
    lists.train(item_NE[:: max(1, len(item_NE) // PIECE)].float())
    add(lists)
    for count in probes:

        def search(users: torch.Tensor, count: int = count) -> torch.Tensor:
            lists.nprobe = count
            rows: torch.Tensor = lists.search(users, k)[1]
            return rows

        yield Rival(f"FAISS float32 lists, {count} probes", search)
