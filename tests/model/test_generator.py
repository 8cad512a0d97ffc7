from collections import Counter, defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.dataset import find_description, load_description
from model.errors import ConfigError
from model.event_log import list_files, offsets_of, read_items, read_log, read_users
from model.generator import EVENT_TYPES, GeneratorSettings, generate, main

SMALL = GeneratorSettings(users=600, items=300, days=7, events=30_000, seed=3)
DAY_US = 86_400_000_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("generated")
    generate(SMALL, path)
    return path


@pytest.fixture(scope="module")
def events(folder):
    table, rejects = read_log(str(folder / "events"), find_description(str(folder / "events")))
    assert rejects.num_rows == 0
    return table


def test_description_fits_the_data(folder):
    description = find_description(str(folder / "events"))
    assert description.name == "generated"
    # Seven days from 2024-01-01: the last is 2024-01-07, 1,704,585,600 seconds after the epoch.
    assert description.evaluation.window_us(0, 0) == (1_704_585_600_000_000, 1_704_672_000_000_000)
    assert generate(GeneratorSettings(), folder / "default") == load_description("generated")


def test_sizes(folder, events):
    description = find_description(str(folder / "events"))
    assert [path.rsplit("/", 1)[1] for path in list_files(str(folder / "events"))] == [
        f"events-2024-01-{day:02d}.parquet" for day in range(1, 8)
    ]
    assert events.num_rows == pytest.approx(SMALL.events, rel=0.1)
    assert read_items(str(folder / "items.parquet"), description).num_rows == SMALL.items
    assert read_users(str(folder / "users.parquet"), description).num_rows == SMALL.users
    assert set(events.column("event_type").unique().to_pylist()) == set(EVENT_TYPES)


def test_each_file_holds_its_day(folder):
    for day, path in enumerate(list_files(str(folder / "events"))):
        time_us = pq.read_table(path).column("timestamp").cast(pa.timestamp("us", "UTC")).cast(pa.int64()).to_numpy()
        assert (np.diff(time_us) >= 0).all()
        first = 1_704_067_200_000_000 + day * DAY_US
        assert first <= time_us[0]
        assert time_us[-1] < first + DAY_US


def test_ids_are_known_and_nothing_happens_before_its_item(folder, events):
    description = find_description(str(folder / "events"))
    items = read_items(str(folder / "items.parquet"), description)
    users = read_users(str(folder / "users.parquet"), description)
    assert set(events.column("user_id").to_pylist()) <= set(users.column("user_id").to_pylist())
    born = dict(zip(items.column("item_id").to_pylist(), items.column("available_from_us").to_pylist(), strict=True))
    born_us = np.array([born[item] for item in events.column("item_id").to_pylist()])
    assert (events.column("timestamp_us").to_numpy() >= born_us).all()
    assert max(born.values()) > 1_704_067_200_000_000  # some are born on the way


def test_same_seed_same_rows(folder, tmp_path):
    generate(SMALL, tmp_path)
    for name in ("items.parquet", "users.parquet", *(f"events/events-2024-01-{day:02d}.parquet" for day in (1, 7))):
        assert pq.read_table(tmp_path / name).equals(pq.read_table(folder / name))


def test_other_seed_other_rows(folder, tmp_path):
    generate(GeneratorSettings(users=600, items=300, days=7, events=30_000, seed=4), tmp_path)
    name = "events/events-2024-01-01.parquet"
    assert not pq.read_table(tmp_path / name).equals(pq.read_table(folder / name))


def test_earlier_files_are_replaced(tmp_path):
    generate(GeneratorSettings(users=20, items=60, days=3, events=200), tmp_path)
    generate(GeneratorSettings(users=20, items=60, days=2, events=200), tmp_path)
    assert len(list_files(str(tmp_path / "events"))) == 2


def test_string_ids(tmp_path):
    stages = []
    description = generate(
        GeneratorSettings(users=20, items=60, days=2, events=200, id_type="string"), tmp_path, stages.append
    )
    assert (description.user_id_type, description.item_id_type) == ("string", "string")
    events, rejects = read_log(str(tmp_path / "events"), description)
    assert events.num_rows > 100
    assert rejects.num_rows == 0
    assert events.column("user_id")[0].as_py().startswith("u0")
    assert len(stages) >= 4


def test_one_of_everything(tmp_path):
    tiny = GeneratorSettings(users=1, items=1, days=1, events=1, categories=1, topics_per_category=1)
    description = generate(tiny, tmp_path)
    assert read_log(str(tmp_path / "events"), description)[1].num_rows == 0


def test_the_session_says_more_than_yesterday_and_both_more_than_chance(events):
    """Hit rate at 20 on the last day, by running counts of what follows what; about 20 / 300 by chance."""
    user = events.column("user_id").to_numpy()
    item = events.column("item_id").to_numpy()
    time_us = events.column("timestamp_us").to_numpy()
    last_day = 1_704_067_200_000_000 + 6 * DAY_US
    popular = [value for value, _ in Counter(item[time_us < last_day].tolist()).most_common(20)]
    follows = defaultdict(Counter)
    _, offsets = offsets_of(events.column("user_id"))
    for first, last in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        for before, after in zip(range(first, last - 1), range(first + 1, last), strict=True):
            if time_us[after] < last_day:
                follows[item[before]][item[after]] += 1
    best = {value: {found for found, _ in counts.most_common(20)} for value, counts in follows.items()}

    hits = Counter()
    asked = 0
    for row in np.flatnonzero(time_us >= last_day).tolist():
        if row == 0 or user[row - 1] != user[row]:
            continue
        of_user = np.searchsorted(user, user[row])
        yesterday = of_user + int(np.searchsorted(time_us[of_user:row], last_day)) - 1
        if yesterday < of_user:
            continue
        asked += 1
        hits["popular"] += item[row] in popular
        hits["yesterday"] += item[row] in best.get(item[yesterday], popular)
        hits["now"] += item[row] in best.get(item[row - 1], popular)
    assert asked > 1000
    assert hits["now"] > 1.5 * hits["popular"]
    assert hits["now"] > 1.5 * hits["yesterday"]
    assert hits["popular"] > 1.5 * asked * 20 / SMALL.items


def test_context_tells_the_category(folder, events):
    """The commonest category of a device and quarter of the day is right more often than the commonest of all."""
    items = read_items(str(folder / "items.parquet"), load_description("generated"))
    category_of = {
        item: categories[0]
        for item, categories in zip(
            items.column("item_id").to_pylist(), items.column("categories").to_pylist(), strict=True
        )
    }
    category = [category_of[item] for item in events.column("item_id").to_pylist()]
    quarter = (events.column("timestamp_us").to_numpy() // (DAY_US // 4) % 4).tolist()
    by_context = defaultdict(Counter)
    for device, part, value in zip(events.column("device").to_pylist(), quarter, category, strict=True):
        by_context[device, part][value] += 1
    informed = sum(counts.most_common(1)[0][1] for counts in by_context.values())
    blind = Counter(category).most_common(1)[0][1]
    assert informed > 1.2 * blind


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"users": 0}, "users must be at least 1, got 0"),
        ({"items": 59}, r"at least one a topic \(60 topics\), got 59"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"id_type": "uuid"}, "int64 or string, got 'uuid'"),
        ({"start": "yesterday"}, "a day like 2024-01-01, got 'yesterday'"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(ConfigError, match=message):
        GeneratorSettings(**changes)


def test_command_line(tmp_path, capsys):
    main([str(tmp_path / "log"), "--users", "20", "--items", "60", "--days", "2", "--events", "200", "--seed", "5"])
    assert "done" in capsys.readouterr().out
    assert len(list_files(str(tmp_path / "log" / "events"))) == 2
    with pytest.raises(SystemExit):
        main([str(tmp_path / "log"), "--users", "0"])
    assert "users must be at least 1" in capsys.readouterr().err
