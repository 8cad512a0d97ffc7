"""Retrieval with its business rules in one graph: score, filter, utility, caps, exploration, top-k.

    rows.py       what an item of the index is, and its Parquet file
    catalogue.py  rows of a release's catalogue, by the item columns its description names for rules
    rules.py      what one request wants, and the plan all requests of a batch share
    scorer.py     scores of all items: dot product, interaction MLP (folded, exact)
    scalars.py    counts that a trained scorer reads of an item; an index made of a release
    select.py     from utilities to slates, exact greedy semantics without a loop over items
    index.py      the catalogue as buffers, live updates, snapshots, whole indices swapped
    fused.py      on a GPU: a batch as one CUDA graph of few kernels
    shards.py     what local top-k per shard would have answered, and the dial to the global one
    two_level.py  catalogues beyond one exact pass: int8 codes first, then the exact rows of what survives
    reference.py  all of it in NumPy and float64, as loops one can read: the definition

Legend: B requests, N rows of the index, R rows of an update, E embedding width, S scalars, F = E + S features,
W words of all bitmasks, A numeric attributes, T tasks, H hidden units, P pool (best candidates looked at), X excluded
rows of all requests, K results.
"""
