import logging
import subprocess
import sys

import pyarrow as pa
import pytest

from model.dataset import DatasetDescription, Evaluation, find_description, load_description, shipped_descriptions
from model.errors import ConfigError
from tests.builders import make_description, make_rows, write_dataset, write_log

MINIMAL = {"name": "x", "user_id_type": "int64", "item_id_type": "string", "event_types": {"click": "positive"}}


def test_minimal_description_takes_defaults():
    description = DatasetDescription.from_dict(MINIMAL)
    assert description.order_column is None
    assert description.head_columns == ()
    assert description.refresh_time == "00:00"
    assert description.evaluation == Evaluation(split="time")
    assert description.user_id_arrow == pa.int64()
    assert description.item_id_arrow == pa.string()


def test_derived_names():
    description = make_description(
        event_types={"view": "neutral", "buy": "positive", "click": "positive"},
        event_columns=["surface", "device"],
        context_columns=["device", "city"],
        user_columns=["gender"],
    )
    assert description.event_type_names == ["buy", "click", "view"]
    assert description.positive_types == ["buy", "click"]
    assert description.head_columns == ("device", "city", "gender")
    assert description.log_columns == ("surface", "device", "city")


def test_refresh_offset():
    # 03:30 is 3 * 3600 + 30 * 60 = 12,600 seconds after midnight.
    assert make_description(refresh_time="03:30").refresh_offset_us == 12_600_000_000


def test_round_trip():
    description = make_description(
        order_column="step",
        available_from="born",
        evaluation={"split": "time", "test_from": "2017-10-15T03:00:00Z", "test_until": "2017-10-16T00:00:00-03:00"},
    )
    assert DatasetDescription.from_dict(description.to_dict()) == description
    assert description.to_dict()["evaluation"] == {
        "split": "time",
        "test_from": "2017-10-15T03:00:00Z",
        "test_until": "2017-10-16T03:00:00Z",
    }


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"user_id_type": "int32"}, ["user_id_type", "int64, string", "'int32'"]),
        ({"event_types": {"click": "good"}}, ["event_types.click", "positive, neutral", "'good'"]),
        ({"event_types": {"click": "neutral"}}, ["event_types", "at least one positive"]),
        ({"event_types": ["click"]}, ["event_types", "map", "['click']"]),
        ({"context_columns": "device"}, ["context_columns", "list", "'device'"]),
        ({"context_columns": ["a", "a"]}, ["context_columns", "once"]),
        ({"context_columns": [1]}, ["context_columns", "string", "1"]),
        ({"event_columns": ["row_hash"]}, ["event_columns", "reserved", "row_hash"]),
        ({"context_columns": ["gender"], "user_columns": ["gender"]}, ["differ", "gender"]),
        ({"user_columns": ["user_id"]}, ["user_columns", "user_id"]),
        ({"item_columns": {"price": "float"}}, ["item_columns.price", "category, categories, number", "'float'"]),
        ({"item_columns": {"item_id": "category"}}, ["item_columns", "item_id"]),
        ({"order_column": "timestamp"}, ["order_column", "timestamp"]),
        ({"refresh_time": "3:00"}, ["refresh_time", '"03:00"', "'3:00'"]),
        ({"refresh_time": 180}, ["refresh_time", "quoted", "180"]),
        ({"evaluation": {"split": "random"}}, ["evaluation.split", "time, leave_one_out", "'random'"]),
        ({"evaluation": {"slpit": "time"}}, ["evaluation", "slpit", "split, test_from, test_until"]),
        ({"evaluation": {"split": "time", "test_from": "soon"}}, ["evaluation.test_from", "2017-10-15", "'soon'"]),
        ({"evaluation": "time"}, ["evaluation", "mapping", "'time'"]),
        (
            {"evaluation": {"split": "leave_one_out", "test_from": "2017-10-15T00:00:00Z"}},
            ["evaluation.test_from", "leave_one_out"],
        ),
        (
            {"evaluation": {"test_from": "2017-10-15T00:00:00Z", "test_until": "2017-10-15T00:00:00Z"}},
            ["test_until must be after test_from"],
        ),
        ({"evaluation": {"test_from": "2017-10-15T00:00:00.5Z"}}, ["evaluation.test_from", "whole second"]),
        ({"name": ""}, ["name", "non-empty"]),
    ],
)
def test_wrong_values_are_named(changes, parts):
    with pytest.raises(ConfigError) as caught:
        make_description(**changes)
    for part in parts:
        assert part in str(caught.value)


def test_unknown_field_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"no field evnet_types; its fields are available_from, context_columns.*"):
        DatasetDescription.from_dict(MINIMAL | {"evnet_types": {}})


def test_missing_fields_are_named():
    with pytest.raises(ConfigError, match="lacks item_id_type, event_types"):
        DatasetDescription.from_dict({"name": "x", "user_id_type": "int64"})


def test_no_mapping_at_all():
    with pytest.raises(ConfigError, match="must be a mapping"):
        DatasetDescription.from_dict(["name"])  # type: ignore[arg-type]


def test_test_window():
    given = Evaluation(test_from_us=5_000_000, test_until_us=9_000_000)
    assert given.window_us(0, 100_000_000) == (5_000_000, 9_000_000)
    # The last tenth of 0..100 s begins at 90 s; the end includes the last event.
    assert Evaluation().window_us(0, 100_000_000) == (90_000_000, 100_000_001)
    with pytest.raises(ConfigError, match="leave_one_out"):
        Evaluation(split="leave_one_out").window_us(0, 1)


def test_shipped_descriptions_load():
    assert shipped_descriptions() == [
        "generated", "globo-news", "ml-100k", "ml-1m", "online-retail", "trivago-2019-sample",
    ]  # fmt: skip
    for name in shipped_descriptions():
        description = load_description(name)
        assert description.name == name
        assert DatasetDescription.from_dict(description.to_dict()) == description


def test_shipped_globo_window():
    # 2017-10-15T03:00:00Z is 1,508,036,400 seconds after the epoch; the test lasts one day.
    window = load_description("globo-news").evaluation.window_us(0, 0)
    assert window == (1_508_036_400_000_000, 1_508_122_800_000_000)


@pytest.mark.parametrize(
    "column",
    ["n_clicks", "last_click_ts", "median_price", "n_ratings", "clicked_item_id", "clicked_position", "price"],
)
def test_shipped_descriptions_do_not_look_ahead(column):
    for name in set(shipped_descriptions()) - {"generated"}:
        description = load_description(name)
        used = {*description.log_columns, *description.user_columns, *description.item_columns}
        assert column not in used
        assert column != description.available_from


def test_load_from_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        'name: mine\nuser_id_type: string\nitem_id_type: int64\nevent_types: {event: positive}\nrefresh_time: "04:00"\n'
        "evaluation: {split: time, test_from: 2017-10-15T03:00:00Z}\n"
    )
    description = load_description(str(path))
    assert description.user_id_type == "string"
    assert description.evaluation.test_from_us == 1_508_036_400_000_000
    assert load_description(f"file://{path}") == description


def test_load_names_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: .*lacks user_id_type"):
        load_description(str(path))
    path.write_text("name: [")
    with pytest.raises(ConfigError, match=r"mine\.yaml is not YAML"):
        load_description(str(path))
    with pytest.raises(ConfigError, match=r"'absent'.*one of generated, globo-news"):
        load_description("absent")


def test_find_takes_the_file_beside_the_data(tmp_path):
    folder = write_dataset(tmp_path / "shop")
    assert find_description(str(folder / "events.parquet")) == make_description()
    parts = folder / "events"
    write_log(parts / "part-0.parquet", make_rows())
    assert find_description(str(parts)) == make_description()
    assert find_description(f"file://{parts}/") == make_description()


def test_find_takes_the_shipped_one_by_folder_name(tmp_path):
    path = write_log(tmp_path / "globo-news" / "events.parquet", make_rows())
    assert find_description(str(path)) == load_description("globo-news")
    parts = write_log(tmp_path / "ml-1m" / "events" / "part-0.parquet", make_rows()).parent
    assert find_description(str(parts)) == load_description("ml-1m")


def test_find_infers_and_says_so(tmp_path, caplog):
    rows = [
        {"user_id": "a", "item_id": 1, "event_type": "view", "timestamp": 1, "device": "tv"},
        {"user_id": "b", "item_id": 2, "event_type": "buy", "timestamp": 2, "device": "tv"},
        {"user_id": "b", "item_id": 2, "event_type": None, "timestamp": 3, "device": "tv"},
    ]
    path = write_log(tmp_path / "shop" / "events.parquet", rows)
    with caplog.at_level(logging.WARNING):
        description = find_description(str(path))
    assert description == DatasetDescription(
        name="shop",
        user_id_type="string",
        item_id_type="int64",
        event_types={"buy": "positive", "view": "positive"},
    )
    assert "assumed user_id string, item_id int64, positive event types buy, view" in caplog.text
    assert "device" in caplog.text


def test_find_infers_the_single_type(tmp_path):
    path = write_log(tmp_path / "shop" / "events.parquet", [{"user_id": 1, "item_id": 1, "timestamp": 1}])
    assert find_description(str(path)).event_types == {"event": "positive"}


def test_importing_needs_no_yaml():
    code = "import sys, model.dataset, model.event_log, model.generator; sys.exit('yaml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
