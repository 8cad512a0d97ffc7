"""The item snapshot of one embedding version, and the index that searches it.

    <registry>/items/<embedding_version>/   items.parquet: item_id, embedding list<float32>[E]
                                            manifest.json, written last: versions, count, SHA-256

User and item embeddings meet only within one embedding_version, so a snapshot is named after it and an index says which
it was built with. Exact search on the CPU; one snapshot a version, immutable.

Legend: B users, N items, E embedding width, K results.
"""

import hashlib
import io
import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import nn

from model.errors import CheckpointError, GoldenMismatch, ShapeError
from model.release import GOLDEN_TOLERANCE, Registry, Release

FOLDER = "items"
FORMAT = "hybrid-tower-items/1"


@dataclass(frozen=True, slots=True)
class Found:
    """The best items of each user, best first; equal scores in the order of the snapshot's rows."""

    row_BK: NDArray[np.int64]
    score_BK: NDArray[np.float32]


class ItemIndex(nn.Module):
    """A catalogue as a buffer: item embeddings of one embedding_version."""

    item_NE: torch.Tensor

    def __init__(self, embedding_version: str, item_ids: pa.Array, item_NE: torch.Tensor) -> None:
        """item_ids: int64 or string [N]. item_NE: f32 [N, E], L2-normalised. Raises ShapeError."""
        super().__init__()
        if item_NE.ndim != 2 or len(item_NE) != len(item_ids):
            raise ShapeError(f"wanted embeddings of {len(item_ids)} items, got {list(item_NE.shape)}")
        self.embedding_version = embedding_version
        self.item_ids = item_ids
        self.register_buffer("item_NE", item_NE)

    @torch.inference_mode()
    def search(self, user_BE: NDArray[np.float32], k: int) -> Found:
        """The k items of largest dot product, fewer where the catalogue is smaller. Raises ShapeError."""
        if user_BE.ndim != 2 or user_BE.shape[1] != self.item_NE.shape[1]:
            raise ShapeError(f"users must have shape [B, {self.item_NE.shape[1]}], got {list(user_BE.shape)}")
        if k < 1:
            raise ShapeError(f"k must be at least 1, got {k}")
        k = min(k, len(self.item_ids))
        score_BN = torch.from_numpy(np.ascontiguousarray(user_BE, np.float32)) @ self.item_NE.T
        bound_B = score_BN.topk(k, dim=1).values[:, -1] if k else score_BN.new_zeros(len(user_BE))
        rows = np.empty((len(user_BE), k), np.int64)
        scores = np.empty((len(user_BE), k), np.float32)
        for b, (score_N, bound) in enumerate(zip(score_BN.numpy(), bound_B.tolist(), strict=True)):
            among = np.flatnonzero(score_N >= bound)
            best = among[np.argsort(-score_N[among], kind="stable")[:k]]
            rows[b], scores[b] = best, score_N[best]
        return Found(rows, scores)


def write_snapshot(registry: Registry, release: Release) -> int:
    """Write the snapshot of a release's catalogue, unless a whole one is there. Returns the number of items.

    Raises CheckpointError where a whole one holds other items than this release makes.
    """
    version = release.manifest.embedding_version
    assert release.item_table is not None, "the items part is loaded"
    count = release.featuriser.num_items
    item_ids = release.featuriser.item_ids
    rows = release.item_table[:count].cpu().numpy().astype(np.float32)
    if has_snapshot(registry, version):
        there = read_snapshot(registry, version)
        if not there.item_ids.equals(item_ids) or not np.allclose(there.item_NE, rows, atol=1e-4):
            raise CheckpointError(
                f"the item snapshot of embedding version {version} holds other items than its release"
            )
        return count
    table = pa.table({"item_id": item_ids, "embedding": pa.array(list(rows), pa.list_(pa.float32()))})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    manifest = {
        "format": FORMAT,
        "embedding_version": version,
        "release_id": release.manifest.release_id,
        "items": count,
        "width": rows.shape[1],
        "sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
    }
    registry.put(f"{FOLDER}/{version}/items.parquet", buffer.getvalue())
    registry.put(f"{FOLDER}/{version}/manifest.json", json.dumps(manifest, indent=1).encode())
    return count


def check_golden(index: ItemIndex, release: Release) -> None:
    """Hold an index to the golden items of the release it is to serve.

    Raises GoldenMismatch where it holds other items or embeddings, CheckpointError where it is of another version.
    """
    manifest = release.manifest
    if index.embedding_version != manifest.embedding_version:
        raise CheckpointError(
            f"an item index of embedding version {index.embedding_version} cannot serve release {manifest.release_id} "
            f"of version {manifest.embedding_version}"
        )
    if not index.item_ids.equals(release.featuriser.item_ids):
        raise GoldenMismatch(f"the item index of release {manifest.release_id} holds other items than its catalogue")
    golden = release.golden_items()
    known = golden.row_G < len(index.item_ids)
    difference = np.abs(index.item_NE.numpy()[golden.row_G[known]] - golden.embedding_GE[known]).max(initial=0.0)
    if not difference <= GOLDEN_TOLERANCE[manifest.compute_dtype]:
        raise GoldenMismatch(
            f"the item index of release {manifest.release_id} is refused: golden items differ by {difference:.2g} "
            f"(tolerance {GOLDEN_TOLERANCE[manifest.compute_dtype]:g})"
        )


def has_snapshot(registry: Registry, embedding_version: str) -> bool:
    """Whether a whole snapshot of that version is in the registry."""
    return registry.get(f"{FOLDER}/{embedding_version}/manifest.json") is not None


def read_snapshot(registry: Registry, embedding_version: str) -> ItemIndex:
    """The index over a version's snapshot. Raises CheckpointError where it is missing, torn, or of another version."""
    folder = f"{FOLDER}/{embedding_version}"
    written, data = registry.get(f"{folder}/manifest.json"), registry.get(f"{folder}/items.parquet")
    if written is None or data is None:
        raise CheckpointError(f"{registry.uri} has no item snapshot of embedding version {embedding_version}")
    try:
        manifest = json.loads(written)
        told = manifest["format"], manifest["embedding_version"]
        shape = manifest["items"], manifest["width"]
        sha256 = manifest["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"manifest.json in {folder} cannot be read: {error!r}") from None
    if told != (FORMAT, embedding_version):
        raise CheckpointError(
            f"the item snapshot in {folder} says {told[0]}, version {told[1]}; "
            f"wanted {FORMAT}, version {embedding_version}"
        )
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise CheckpointError(
            f"the item snapshot of embedding version {embedding_version} was altered or torn: SHA-256 {found[:16]}, "
            f"its manifest says {str(sha256)[:16]}"
        )
    table = pq.read_table(io.BytesIO(data))
    values = table["embedding"].combine_chunks().flatten().to_numpy()
    if (table.num_rows, values.size) != (shape[0], shape[0] * shape[1]):
        raise CheckpointError(
            f"the item snapshot in {folder} holds {table.num_rows} items and {values.size} numbers, its manifest says "
            f"{shape[0]} items of width {shape[1]}"
        )
    return ItemIndex(
        embedding_version, table["item_id"].combine_chunks(), torch.from_numpy(values.reshape(shape).copy())
    )
