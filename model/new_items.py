"""Embeddings of items that came after the weights: by their declared features, and the hash row of their id.

The item tower knows its catalogue by buffers (codes and numbers of each row). Here the buffers are made longer by the
new items, coded as the catalogue was; an item that the catalogue has keeps its id and may have new features.

Legend: N catalogue items, H hash rows, I = N + H rows, M new items, V values of a list column, L values kept of it.
"""

import copy

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from model.errors import DataError
from model.features import frequent_values, hash_ids
from model.release import Release

_VOCABULARY_LIMIT = 50_000  # of item columns, as in model.item_tower


@torch.inference_mode()
def embed_items(release: Release, catalogue: pa.Table, items: pa.Table) -> NDArray[np.float32]:
    """Embeddings of items as the release's item tower makes them: f32 [M, E], L2-normalised.

    catalogue: `Registry.catalogue`. items: item_id and the declared item columns, as read_items gives them; a value
    that the catalogue does not have is left out. Raises DataError where a column is missing.
    """
    description, tower = release.manifest.description, release.items
    missing = [name for name in ("item_id", *description.item_columns) if name not in items.column_names]
    if missing:
        raise DataError(f"items must have item_id and the declared item columns; missing: {', '.join(missing)}")
    embedder = copy.copy(tower.embedder)  # its weights are shared, its buffers are replaced
    embedder._buffers = dict(embedder._buffers)
    numbers = []
    for name, kind in description.item_columns.items():
        before, column = catalogue[name].combine_chunks(), items[name].combine_chunks()
        if kind == "number":
            numbers += _standardised(column, before)
            continue
        key = f"codes_{name.replace('.', '__')}"
        codes_IL = embedder._buffers[key]
        assert codes_IL is not None, "a buffer of codes for each column"
        codes_ML = _codes(column, before, codes_IL.shape[1])
        embedder._buffers[key] = torch.cat([codes_IL, torch.from_numpy(codes_ML).to(codes_IL.device)])
    count, num_rows = items.num_rows, embedder.num_rows
    number_MF = np.stack(numbers, 1) if numbers else np.zeros((count, 0))
    number_IF = embedder.number_IF
    embedder._buffers["number_IF"] = torch.cat([number_IF, torch.from_numpy(number_MF).float().to(number_IF.device)])
    ids = items["item_id"].combine_chunks()
    known_M = pc.index_in(ids, value_set=release.featuriser.item_ids).fill_null(-1).to_numpy(zero_copy_only=False)
    hash_M = embedder.shape.num_items + (hash_ids(ids) % np.uint64(release.config.hash_rows)).astype(np.int64)
    hash_row_M = torch.from_numpy(hash_M).to(embedder.id_row_I.device)
    id_row_M = torch.where(
        torch.from_numpy(known_M >= 0).to(hash_row_M.device),
        embedder.id_row_I[torch.from_numpy(np.maximum(known_M, 0).astype(np.int64)).to(hash_row_M.device)],
        hash_row_M,
    )
    embedder._buffers["id_row_I"] = torch.cat([embedder.id_row_I, id_row_M])
    embedder._buffers["hash_row_I"] = torch.cat([embedder.hash_row_I, hash_row_M])
    embedder.num_rows = num_rows + count
    rows = torch.arange(num_rows, num_rows + count, device=hash_row_M.device)
    embedding_ME: NDArray[np.float32] = F.normalize(tower.projection(embedder(rows)), dim=-1).cpu().numpy()
    return embedding_ME


def _codes(column: pa.Array, catalogue: pa.Array, width: int) -> NDArray[np.int64]:
    """Codes by the catalogue's vocabulary, at most `width` an item: i64 [M, L], 0 where there are fewer."""
    vocabulary = frequent_values(pa.chunked_array([_flat(catalogue)[0]]), _VOCABULARY_LIMIT)
    flat, parent_V = _flat(column)
    code_V = pc.index_in(flat.cast(pa.string()), value_set=pa.array(vocabulary, pa.string())).fill_null(-1)
    code_V = code_V.to_numpy(zero_copy_only=False).astype(np.int64) + 2
    parent_V, code_V = parent_V[code_V > 1], code_V[code_V > 1]
    codes_ML = np.zeros((len(column), width), np.int64)
    place_V = np.arange(len(parent_V)) - np.searchsorted(parent_V, parent_V)
    kept_V = place_V < width
    codes_ML[parent_V[kept_V], place_V[kept_V]] = code_V[kept_V]
    return codes_ML


def _flat(column: pa.Array) -> tuple[pa.Array, NDArray[np.int64]]:
    """Values of a column of values or lists, and the row of each."""
    if pa.types.is_list(column.type):
        return column.flatten(), pc.list_parent_indices(column).to_numpy(zero_copy_only=False).astype(np.int64)
    return column, np.arange(len(column))


def _standardised(column: pa.Array, catalogue: pa.Array) -> list[NDArray[np.float64]]:
    """The values by the catalogue's mean and spread, and whether there is one."""
    before = catalogue.cast(pa.float64()).to_numpy(zero_copy_only=False)
    values = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    before = before[np.isfinite(before)]
    mean, spread = (before.mean(), before.std()) if len(before) else (0.0, 1.0)
    present = np.isfinite(values)
    return [np.where(present, (values - mean) / (spread or 1.0), 0.0), present.astype(np.float64)]
