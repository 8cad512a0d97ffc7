"""Writes a made-up but realistic data set, for the demo and for tests.

    python -m model.generator FOLDER --users 3000 --items 2000 --days 14

What is in it, so that there is something to learn:

- Items live in topics, topics in categories; an item has an appeal (Zipf), is born some day and fades, or does not.
- A user has a few favourite topics, drawn by age group and gender, and now and then swaps one for another.
- A session has an intent, one topic: a favourite, or what this device at this time of day is used for, or the topic
  of the day, or (on the search surface) anything. Most events of the session stay with it; now and then it moves on
  to the neighbouring topic, and some items lead to a set next one. So the last few events say far more about the
  next one than yesterday's history does.
- Items of a favourite topic are bought more often; random ones are mostly only viewed.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from model.dataset import DatasetDescription, Evaluation, load_description
from model.errors import ConfigError

DEVICES = ("phone", "desktop", "tablet", "tv")
SURFACES = ("home", "search", "push")
EVENT_TYPES = ("view", "click", "purchase")
GENDERS = ("f", "m")
AGE_GROUPS = ("under_18", "18_24", "25_34", "35_49", "50_plus")
COUNTRIES = ("BR", "DE", "IN", "JP", "US")

_BLOCK_S = 6 * 3600  # appeal and births are refreshed four times a day
_DAY_S = 86_400
_FAVOURITES = 3
_SESSION_MEAN = 5.0
_SESSION_MAX = 30
_HOME, _SEARCH, _PUSH = range(3)


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratorSettings:
    """Size and seed of the data set. The same settings give the same rows."""

    users: int = 3000
    items: int = 2000
    days: int = 14
    events: int = 180_000
    """About how many events; the exact number depends on the seed."""
    start: str = "2024-01-01"
    """First day, UTC."""
    seed: int = 0
    categories: int = 12
    topics_per_category: int = 5
    id_type: str = "int64"
    """Type of user and item ids: int64 or string."""

    def __post_init__(self) -> None:
        for name in ("users", "items", "days", "events", "categories", "topics_per_category"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.items < self.topics:
            raise ConfigError(f"items must be at least one a topic ({self.topics} topics), got {self.items}")
        if self.seed < 0:
            raise ConfigError(f"seed must be 0 or more, got {self.seed}")
        if self.id_type not in ("int64", "string"):
            raise ConfigError(f"id_type must be int64 or string, got {self.id_type!r}")
        try:
            datetime.strptime(self.start, "%Y-%m-%d")
        except ValueError as error:
            raise ConfigError(f"start must be a day like 2024-01-01, got {self.start!r}") from error

    @property
    def topics(self) -> int:
        """All topics of all categories."""
        return self.categories * self.topics_per_category

    @property
    def start_s(self) -> int:
        """Midnight UTC of the first day, seconds since the epoch."""
        return int(datetime.strptime(self.start, "%Y-%m-%d").replace(tzinfo=UTC).timestamp())


@dataclass(frozen=True, slots=True)
class _Items:
    """N items, numbered topic by topic. Times in seconds after the first midnight."""

    topic_N: NDArray[np.int64]
    appeal_N: NDArray[np.float64]
    born_N: NDArray[np.int64]
    half_life_N: NDArray[np.float64]
    next_N: NDArray[np.int64]
    """The item this one leads to, of the same topic."""


@dataclass(frozen=True, slots=True)
class _Users:
    gender_U: NDArray[np.int64]
    age_group_U: NDArray[np.int64]
    country_U: NDArray[np.int64]
    joined_U: NDArray[np.int64]
    """First day."""
    weight_U: NDArray[np.float64]
    device_UV: NDArray[np.float64]
    """How the user's sessions spread over devices."""
    favourite_UGF: NDArray[np.int64]
    """Favourite topics on every day G."""


@dataclass(frozen=True, slots=True)
class _Sessions:
    user_S: NDArray[np.int64]
    start_S: NDArray[np.int64]
    device_S: NDArray[np.int64]
    surface_S: NDArray[np.int64]
    topic_S: NDArray[np.int64]
    length_S: NDArray[np.int64]


def generate(
    settings: GeneratorSettings, folder: str | Path, progress: Callable[[str], None] | None = None
) -> DatasetDescription:
    """Writes events/events-YYYY-MM-DD.parquet, items.parquet, users.parquet and dataset.yaml into `folder`.

    Files of an earlier call are replaced. `progress` is told of each stage. Returns the description written.
    """
    import yaml

    say = progress or (lambda _: None)
    folder = Path(folder)
    rng = np.random.default_rng(settings.seed)

    say(f"making {settings.items:,} items and {settings.users:,} users")
    items = _make_items(settings, rng)
    users = _make_users(settings, rng)
    user_id = _ids("u", rng.permutation(settings.users) + 1, settings.id_type)
    item_id = _ids("i", rng.permutation(settings.items) + 1, settings.id_type)

    say("planning sessions")
    sessions = _make_sessions(settings, users, rng)
    say(f"acting out {len(sessions.user_S):,} sessions")
    columns = _act(settings, items, users, sessions, rng)

    events_folder = folder / "events"
    events_folder.mkdir(parents=True, exist_ok=True)
    for stale in events_folder.glob("events-*.parquet"):
        stale.unlink()
    say(f"writing {len(columns['time_ms']):,} events to {events_folder}")
    day_of = (columns["time_ms"] - settings.start_s * 1000) // (_DAY_S * 1000)
    bounds = np.searchsorted(day_of, np.arange(settings.days + 1))
    for day in range(settings.days):
        rows = slice(int(bounds[day]), int(bounds[day + 1]))
        table = pa.table(
            {
                "user_id": user_id.take(pa.array(columns["user"][rows])),
                "item_id": item_id.take(pa.array(columns["item"][rows])),
                "event_type": _names(EVENT_TYPES, columns["event_type"][rows]),
                "timestamp": pa.array(columns["time_ms"][rows]).cast(pa.timestamp("ms", "UTC")),
                "session_id": pa.array(columns["session"][rows]),
                "device": _names(DEVICES, columns["device"][rows]),
                "surface": _names(SURFACES, columns["surface"][rows]),
            }
        )
        date = datetime.fromtimestamp(settings.start_s, UTC) + timedelta(days=day)
        pq.write_table(table, events_folder / f"events-{date:%Y-%m-%d}.parquet", compression="zstd")

    say("writing items, users and the description")
    pq.write_table(_items_table(settings, items, item_id, rng), folder / "items.parquet", compression="zstd")
    pq.write_table(
        pa.table(
            {
                "user_id": user_id,
                "gender": _names(GENDERS, users.gender_U),
                "age_group": _names(AGE_GROUPS, users.age_group_U),
                "country": _names(COUNTRIES, users.country_U),
            }
        ),
        folder / "users.parquet",
        compression="zstd",
    )
    end_us = (settings.start_s + settings.days * _DAY_S) * 1_000_000
    last_day = Evaluation(split="time", test_from_us=end_us - _DAY_S * 1_000_000, test_until_us=end_us)
    description = replace(
        load_description("generated"),
        user_id_type=settings.id_type,
        item_id_type=settings.id_type,
        evaluation=last_day,
    )
    text = yaml.safe_dump(description.to_dict(), sort_keys=False)
    (folder / "dataset.yaml").write_text(f"# Written by model/generator.py: {settings}\n{text}", encoding="utf-8")
    return description


def _make_items(settings: GeneratorSettings, rng: np.random.Generator) -> _Items:
    topic_N = np.sort(np.concatenate([
        np.arange(settings.topics), rng.integers(settings.topics, size=settings.items - settings.topics)
    ]))  # fmt: skip
    first_of_topic = np.concatenate([[True], topic_N[1:] != topic_N[:-1]])
    start_of_topic = np.flatnonzero(first_of_topic)
    appeal_N = np.power(rng.permutation(settings.items) + 5.0, -0.8).astype(np.float64)
    born_N = rng.integers(0, settings.days * _DAY_S, size=settings.items)
    before = (rng.random(settings.items) < 0.5) | first_of_topic  # no topic is ever empty
    born_N = np.where(before, -rng.integers(1, 30 * _DAY_S, size=settings.items), born_N)
    fades = rng.random(settings.items) < 0.7
    half_life_N = np.where(fades, rng.uniform(1.0, 5.0, size=settings.items) * _DAY_S, np.inf).astype(np.float64)
    size = np.diff(np.append(start_of_topic, settings.items))
    start_N, size_N = start_of_topic[topic_N], size[topic_N]
    next_N = start_N + (np.arange(settings.items) - start_N + 1) % size_N
    return _Items(topic_N, appeal_N, born_N, half_life_N, next_N)


def _make_users(settings: GeneratorSettings, rng: np.random.Generator) -> _Users:
    count, days = settings.users, settings.days
    gender_U = rng.integers(len(GENDERS), size=count)
    age_group_U = rng.integers(len(AGE_GROUPS), size=count)
    country_U = _draw(rng, np.array([0.15, 0.15, 0.3, 0.1, 0.3]), count)
    joined_U = np.where(rng.random(count) < 0.85, 0, rng.integers(0, days, size=count))
    weight_U = rng.lognormal(0.0, 0.8, size=count)

    # Each group of people likes its own few categories.
    groups = len(GENDERS) * len(AGE_GROUPS)
    taste_GC = rng.dirichlet(np.full(settings.categories, 0.4), size=groups)
    group_U = gender_U * len(AGE_GROUPS) + age_group_U

    def topics(who: NDArray[np.int64]) -> NDArray[np.int64]:
        category = _draw_rows(rng, taste_GC[group_U[who]])
        return category * settings.topics_per_category + rng.integers(settings.topics_per_category, size=len(who))

    everyone = np.arange(count)
    favourite_UGF = np.empty((count, days, _FAVOURITES), np.int64)
    for place in range(_FAVOURITES):
        favourite_UGF[:, 0, place] = topics(everyone)
    for day in range(1, days):
        favourite_UGF[:, day] = favourite_UGF[:, day - 1]
        drifting = np.flatnonzero(rng.random(count) < 0.15)
        favourite_UGF[drifting, day, rng.integers(_FAVOURITES, size=len(drifting))] = topics(drifting)

    device_UV = rng.dirichlet([1.2, 0.8, 0.3, 0.3], size=count)
    return _Users(gender_U, age_group_U, country_U, joined_U, weight_U, device_UV, favourite_UGF)


def _make_sessions(settings: GeneratorSettings, users: _Users, rng: np.random.Generator) -> _Sessions:
    count = max(1, round(settings.events / _SESSION_MEAN))
    user_S = _draw(rng, users.weight_U, count)
    joined_S = users.joined_U[user_S]
    day_S = joined_S + (rng.random(count) * (settings.days - joined_S)).astype(np.int64)
    device_S = _draw_rows(rng, users.device_UV[user_S])

    # Each device has its hours: phone on the way to work, desktop at work, tablet and tv in the evening.
    hour = np.arange(24)
    peaks_VP = np.array([[8.0, 18.0], [10.0, 15.0], [20.0, 21.0], [20.5, 22.0]])
    distance_VPH = np.abs(hour - peaks_VP[:, :, None])
    distance_VPH = np.minimum(distance_VPH, 24 - distance_VPH)
    hours_VH = np.exp(-0.5 * (distance_VPH / 2.5) ** 2).sum(1) + 0.08
    hour_S = _draw_rows(rng, (hours_VH / hours_VH.sum(1, keepdims=True))[device_S])
    start_S = day_S * _DAY_S + hour_S * 3600 + rng.integers(3600, size=count)

    surface_S = _draw(rng, np.array([0.6, 0.25, 0.15]), count)
    # What the session is about.
    favourite = users.favourite_UGF[user_S, day_S, _draw(rng, np.array([0.55, 0.3, 0.15]), count)]
    usual_VQ = rng.integers(settings.categories, size=(len(DEVICES), 4))  # category by device and quarter of the day
    usual = usual_VQ[device_S, hour_S // 6] * settings.topics_per_category
    usual = usual + rng.integers(settings.topics_per_category, size=count)
    trend = rng.integers(settings.topics, size=settings.days)[day_S]
    anything = rng.integers(settings.topics, size=count)
    chance_by_surface = np.array([[0.65, 0.3, 0.05, 0.0], [0.35, 0.05, 0.0, 0.6], [0.25, 0.05, 0.7, 0.0]])
    source_S = _draw_rows(rng, chance_by_surface[surface_S])
    topic_S = np.choose(source_S, [favourite, usual, trend, anything])

    length_S = np.minimum(rng.geometric(1 / _SESSION_MEAN, size=count), _SESSION_MAX)
    return _Sessions(user_S, start_S, device_S, surface_S, topic_S, length_S)


def _act(
    settings: GeneratorSettings, items: _Items, users: _Users, sessions: _Sessions, rng: np.random.Generator
) -> dict[str, NDArray[np.int64]]:
    """All events, by time: user, item, event_type, device, surface as indices; session; time_ms since the epoch."""
    draw_item = _item_sampler(settings, items)
    topic = sessions.topic_S.copy()
    time_ms = sessions.start_S * 1000
    block = sessions.start_S // _BLOCK_S
    day = sessions.start_S // _DAY_S
    last_item = np.zeros(len(topic), np.int64)
    active = np.arange(len(topic))
    parts: list[tuple[NDArray[np.int64], ...]] = []
    for step in range(_SESSION_MAX):
        active = active[sessions.length_S[active] > step]
        if not len(active):
            break
        luck = rng.random(len(active))
        # 8 in 100 events move the session on to the neighbouring topic, 15 in 100 are about anything.
        topic[active[luck < 0.08]] = (topic[active[luck < 0.08]] + 1) % settings.topics
        stray = luck > 0.85
        about = np.where(stray, rng.integers(settings.topics, size=len(active)), topic[active])
        item = draw_item(rng, block[active], about)
        if step:
            led = items.next_N[last_item[active]]
            follows = (rng.random(len(active)) < 0.25) & (items.born_N[led] <= block[active] * _BLOCK_S) & ~stray
            item = np.where(follows, led, item)
            again = item == last_item[active]
            item[again] = draw_item(rng, block[active][again], about[again])
            time_ms[active] += (rng.lognormal(np.log(40.0), 0.9, size=len(active)) * 1000).astype(np.int64) + 1
        last_item[active] = item
        loved = (users.favourite_UGF[sessions.user_S[active], day[active]] == items.topic_N[item][:, None]).any(1)
        chances = np.where(loved[:, None], [0.15, 0.7, 0.15], [0.3, 0.65, 0.05])
        chances = np.where(stray[:, None], [0.7, 0.28, 0.02], chances)
        parts.append((active.copy(), item, _draw_rows(rng, chances), time_ms[active]))

    session, item, event_type, when = (np.concatenate([part[place] for part in parts]) for place in range(4))
    inside = when < settings.days * _DAY_S * 1000
    order = np.flatnonzero(inside)[np.lexsort([session[inside], when[inside]])]
    session = session[order]
    by_start = np.empty(len(topic), np.int64)
    by_start[np.argsort(sessions.start_S, kind="stable")] = np.arange(len(topic))
    return {
        "user": sessions.user_S[session],
        "item": item[order],
        "event_type": event_type[order],
        "time_ms": when[order] + settings.start_s * 1000,
        "session": by_start[session],
        "device": sessions.device_S[session],
        "surface": sessions.surface_S[session],
    }


def _item_sampler(
    settings: GeneratorSettings, items: _Items
) -> Callable[[np.random.Generator, NDArray[np.int64], NDArray[np.int64]], NDArray[np.int64]]:
    """A function (rng, block, topic) -> item, drawing by appeal among the topic's items born before the block.

    Segment (block, topic) of one long rising array holds that topic's cumulative shares, from its number up to its
    number + 1, so that a single search draws for all events at once.
    """
    blocks = -(-settings.days * _DAY_S // _BLOCK_S)
    count = len(items.topic_N)
    first = np.searchsorted(items.topic_N, np.arange(settings.topics))
    rising = np.empty((blocks, count))
    for block in range(blocks):
        age = block * _BLOCK_S - items.born_N
        share = items.appeal_N * (0.05 + 0.5 ** (np.maximum(age, 0) / items.half_life_N)) * (age >= 0)
        total = np.cumsum(share)
        before = np.where(first > 0, total[first - 1], 0.0)[items.topic_N]
        whole = np.add.reduceat(share, first)[items.topic_N]
        rising[block] = block * settings.topics + items.topic_N + np.clip((total - before) / whole, 0.0, 1.0)
    flat = np.maximum.accumulate(rising.ravel())

    def draw(rng: np.random.Generator, block: NDArray[np.int64], topic: NDArray[np.int64]) -> NDArray[np.int64]:
        wanted = block * settings.topics + topic + rng.random(len(topic)) * (1 - 1e-9)
        found = np.searchsorted(flat, wanted, side="right")
        return np.minimum(found, len(flat) - 1) % count

    return draw


def _items_table(settings: GeneratorSettings, items: _Items, item_id: pa.Array, rng: np.random.Generator) -> pa.Table:
    count = len(items.topic_N)
    category_N = items.topic_N // settings.topics_per_category
    brand_N = category_N * 3 + rng.integers(6, size=count)  # neighbouring categories share brands
    price_N = np.round(rng.lognormal(2.0 + 0.2 * (category_N % 7), 0.5, size=count), 2)
    tagged = rng.random(count) < 0.8
    categories = [
        [f"category-{c:02d}", f"topic-{t:03d}"] if tag else [f"category-{c:02d}"]
        for c, t, tag in zip(category_N.tolist(), items.topic_N.tolist(), tagged.tolist(), strict=True)
    ]
    return pa.table(
        {
            "item_id": item_id,
            "title": pa.array([f"Item {value}" for value in item_id.to_pylist()], pa.string()),
            "categories": pa.array(categories, pa.list_(pa.string())),
            "brand": pa.array([f"brand-{b:02d}" for b in brand_N.tolist()], pa.string()),
            "price": pa.array(price_N),
            "published_at": pa.array(items.born_N + settings.start_s).cast(pa.timestamp("s", "UTC")),
        }
    )


def _ids(letter: str, numbers: NDArray[np.int64], id_type: str) -> pa.Array:
    if id_type == "int64":
        return pa.array(numbers.astype(np.int64))
    return pa.array([f"{letter}{number:08d}" for number in numbers.tolist()], pa.string())


def _names(values: Sequence[str], index: NDArray[np.int64]) -> pa.Array:
    return pa.array(values, pa.string()).take(pa.array(index))


def _draw(rng: np.random.Generator, weight: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """`count` indices drawn in proportion to `weight`."""
    total = np.cumsum(weight)
    drawn = np.searchsorted(total, rng.random(count) * total[-1], side="right")
    return np.asarray(np.minimum(drawn, len(weight) - 1), np.int64)


def _draw_rows(rng: np.random.Generator, chance: NDArray[np.float64]) -> NDArray[np.int64]:
    """One index a row, drawn by the row's chances (they sum to 1)."""
    drawn = (np.cumsum(chance, axis=1) < rng.random(len(chance))[:, None]).sum(1)
    return np.asarray(np.minimum(drawn, chance.shape[1] - 1), np.int64)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the generator."""
    defaults = GeneratorSettings()
    parser = argparse.ArgumentParser(
        prog="python -m model.generator",
        description="Writes a made-up data set: events/, items.parquet, users.parquet and dataset.yaml.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("folder", help="where to write; files of an earlier run are replaced")
    parser.add_argument("--users", type=int, default=defaults.users, help="how many users")
    parser.add_argument("--items", type=int, default=defaults.items, help="how many items")
    parser.add_argument("--days", type=int, default=defaults.days, help="how many days")
    parser.add_argument("--events", type=int, default=defaults.events, help="about how many events")
    parser.add_argument("--start", default=defaults.start, help="first day, UTC")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="the same seed gives the same rows")
    parser.add_argument("--id-type", choices=("int64", "string"), default=defaults.id_type, help="type of all ids")
    values = vars(parser.parse_args(arguments))
    folder = values.pop("folder")
    try:
        generate(GeneratorSettings(**values), folder, progress=lambda stage: print(stage, flush=True))
    except ConfigError as error:
        parser.error(str(error))
    print(f"done: {folder}")


if __name__ == "__main__":
    main()
