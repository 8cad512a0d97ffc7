"""Small values for tests: events, histories, canonical tables and Parquet logs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from model.dataset import DatasetDescription
from model.event_log import event_schema
from model.records import Event, Id

START_US = 1_700_000_000_000_000
"""2023-11-14T22:13:20Z, when the first event of a test happens."""

MINUTE_US = 60_000_000


def make_description(**changes: Any) -> DatasetDescription:
    """Two event types (click positive, view neutral), one event column, one context column, one user column."""
    values: dict[str, Any] = {
        "name": "test",
        "user_id_type": "int64",
        "item_id_type": "int64",
        "event_types": {"click": "positive", "view": "neutral"},
        "event_columns": ["surface"],
        "context_columns": ["device"],
        "user_columns": ["gender"],
        "item_columns": {"categories": "categories", "brand": "category", "price": "number"},
    }
    return DatasetDescription.from_dict(values | changes)


def make_event(
    item_id: Id = 1,
    event_type: str = "click",
    timestamp_us: int = START_US,
    **columns: str | None,
) -> Event:
    """One event; further names are event columns: make_event(7, surface="home")."""
    return Event(item_id=item_id, event_type=event_type, timestamp_us=timestamp_us, columns=columns)


def make_history(
    length: int,
    seed: int = 0,
    items: Sequence[Id] = tuple(range(1, 21)),
    event_types: Sequence[str] = ("click", "view"),
    columns: Mapping[str, Sequence[str | None]] | None = None,
    start_us: int = START_US,
    step_us: int = MINUTE_US,
) -> tuple[Event, ...]:
    """`length` events, oldest first, `step_us` apart, items, types and column values drawn with `seed`."""
    rng = np.random.default_rng(seed)
    return tuple(
        Event(
            item_id=items[int(rng.integers(len(items)))],
            event_type=event_types[int(rng.integers(len(event_types)))],
            timestamp_us=start_us + place * step_us,
            columns={name: values[int(rng.integers(len(values)))] for name, values in (columns or {}).items()},
        )
        for place in range(length)
    )


def make_event_table(
    histories: Mapping[Id, Sequence[Event]], description: DatasetDescription | None = None
) -> pa.Table:
    """Canonical event table of {user id: events oldest first}, users one after another in the order given.

    order is 0, source_file 0, source_row and row_hash count the rows. Columns an event lacks are null.
    """
    description = description or make_description()
    rows = [(user_id, event) for user_id, events in histories.items() for event in events]
    count = np.arange(len(rows))
    columns: dict[str, Any] = {
        "user_id": [user_id for user_id, _ in rows],
        "item_id": [event.item_id for _, event in rows],
        "event_type": [event.event_type for _, event in rows],
        "timestamp_us": [event.timestamp_us for _, event in rows],
        "order": np.zeros(len(rows), np.int64),
        "source_file": np.zeros(len(rows), np.int32),
        "source_row": count,
        "row_hash": count,
    }
    for name in description.log_columns:
        columns[name] = [event.columns.get(name) for _, event in rows]
    return pa.table(columns, schema=event_schema(description))


def write_log(path: Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema | None = None, **options: Any) -> Path:
    """Writes raw log rows (dicts as in an event file, not canonical) to one Parquet file; returns its path.

    Without a schema: the columns of the first row, `timestamp` as int64 seconds. `options` go to write_table.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema=schema), path, **options)
    return path


def make_rows(users: int = 3, length: int = 4, seed: int = 0) -> list[dict[str, Any]]:
    """Raw rows that fit make_description(): `length` events for each of users 1..`users`, one minute apart."""
    rows = []
    for user_id in range(1, users + 1):
        history = make_history(
            length,
            seed=seed * 1000 + user_id,
            columns={"surface": ["home", "search"], "device": ["phone", "web", None]},
        )
        rows += [
            {
                "user_id": user_id,
                "item_id": event.item_id,
                "event_type": event.event_type,
                "timestamp": event.timestamp_us // 1_000_000,
                **event.columns,
            }
            for event in history
        ]
    return rows


def make_items(count: int = 20) -> pa.Table:
    """Raw items 1..`count` that fit make_description(): categories, brand, price."""
    ids = range(1, count + 1)
    return pa.table(
        {
            "item_id": pa.array(ids, pa.int64()),
            "categories": pa.array([[f"c{i % 4}", f"d{i % 3}"][: 1 + i % 2] for i in ids], pa.list_(pa.string())),
            "brand": pa.array([None if i % 7 == 0 else f"b{i % 5}" for i in ids], pa.string()),
            "price": pa.array([i * 1.5 for i in ids], pa.float64()),
        }
    )


def make_users(count: int = 3) -> pa.Table:
    """Raw users 1..`count` that fit make_description(): gender."""
    return pa.table(
        {
            "user_id": pa.array(range(1, count + 1), pa.int64()),
            "gender": pa.array(["F" if i % 2 else "M" for i in range(1, count + 1)], pa.string()),
        }
    )


def write_dataset(folder: Path, users: int = 3, length: int = 4, seed: int = 0) -> Path:
    """A whole small data set that fits make_description(): events, items, users and dataset.yaml. Returns `folder`."""
    import yaml

    write_log(folder / "events.parquet", make_rows(users, length, seed))
    pq.write_table(make_items(), folder / "items.parquet")
    pq.write_table(make_users(users), folder / "users.parquet")
    (folder / "dataset.yaml").write_text(yaml.safe_dump(make_description().to_dict()), encoding="utf-8")
    return folder
