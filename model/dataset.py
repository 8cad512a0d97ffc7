"""What a data set's columns mean: the dataset description, read from YAML.

Only declared columns become features. Real tables are full of columns that look into the future, so nothing is
picked up by itself.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime, timedelta
from importlib import resources
from pathlib import PurePosixPath
from typing import Any, Self

import pyarrow as pa

from model.errors import ConfigError

log = logging.getLogger(__name__)

ID_TYPES = ("int64", "string")
SIGNS = ("positive", "neutral")
ITEM_COLUMN_KINDS = ("category", "categories", "number")
ITEM_RULES = {
    "category": ("category", "categories"), "country": ("category", "categories"),
    "language": ("category", "categories"), "main_category": ("category",), "advertiser": ("category",),
    "attributes": ("number",),
}  # fmt: skip
"""What the rules of the item index read of an item -> kinds of item columns it may come from."""
SPLITS = ("time", "leave_one_out")
RESERVED_COLUMNS = (
    "user_id", "item_id", "event_type", "timestamp", "timestamp_us", "order", "source_file", "source_row", "row_hash",
)  # fmt: skip
"""Names the canonical event table needs for itself."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_SECOND_US = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """How the log is divided into what is learned from and what is asked.

    `time`: events in [test_from_us, test_until_us) are the test.  `leave_one_out`: each user's last event is.
    """

    split: str = "time"
    test_from_us: int | None = None
    """Start of the test, whole seconds in microseconds; None: the last tenth of the log's time."""
    test_until_us: int | None = None
    """End of the test, exclusive; None: the end of the log."""

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ConfigError(f"evaluation.split must be one of {', '.join(SPLITS)}, got {self.split!r}")
        for name, value in (("test_from", self.test_from_us), ("test_until", self.test_until_us)):
            if value is None:
                continue
            if self.split != "time":
                raise ConfigError(f"evaluation.{name} goes with split time, got split {self.split!r}")
            if value % _SECOND_US:
                raise ConfigError(f"evaluation.{name} must be a whole second, got {_iso(value)}")
        if self.test_from_us is not None and self.test_until_us is not None and self.test_until_us <= self.test_from_us:
            raise ConfigError(
                f"evaluation.test_until must be after test_from, "
                f"got {_iso(self.test_from_us)} to {_iso(self.test_until_us)}"
            )

    def window_us(self, first_us: int, last_us: int) -> tuple[int, int]:
        """Test window [from, until) in microseconds for a log whose events span first_us..last_us (both included).

        Raises ConfigError for a split other than time.
        """
        if self.split != "time":
            raise ConfigError(f"only a time split has a test window, got split {self.split!r}")
        test_from = self.test_from_us
        if test_from is None:
            test_from = (last_us - (last_us - first_us) // 10) // _SECOND_US * _SECOND_US
        return test_from, last_us + 1 if self.test_until_us is None else self.test_until_us

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in the YAML."""
        values: dict[str, Any] = {"split": self.split}
        if self.test_from_us is not None:
            values["test_from"] = _iso(self.test_from_us)
        if self.test_until_us is not None:
            values["test_until"] = _iso(self.test_until_us)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of to_dict. Raises ConfigError."""
        known = ("split", "test_from", "test_until")
        _check_names("evaluation", values, known)
        return cls(
            split=values.get("split", "time"),
            test_from_us=_time_us("evaluation.test_from", values.get("test_from")),
            test_until_us=_time_us("evaluation.test_until", values.get("test_until")),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetDescription:
    """Which columns of a data set are used, and as what. Raises ConfigError when built from nonsense."""

    name: str
    user_id_type: str
    """int64 or string."""
    item_id_type: str
    """int64 or string."""
    event_types: Mapping[str, str]
    """Event type -> positive | neutral. A row of another type is set aside."""
    order_column: str | None = None
    """Integer column that orders events of one timestamp."""
    event_columns: tuple[str, ...] = ()
    """Categorical columns of an event the encoder reads."""
    context_columns: tuple[str, ...] = ()
    """Categorical columns of an event known at request time; the head reads them."""
    user_columns: tuple[str, ...] = ()
    """Categorical columns of the users file, sent by the caller as context features too."""
    item_columns: Mapping[str, str] = field(default_factory=dict)
    """Column of the items file -> category | categories | number."""
    item_rules: Mapping[str, Any] = field(default_factory=dict)
    """Rule of the item index -> one of item_columns, of attributes a list of them (see ITEM_RULES)."""
    available_from: str | None = None
    """Column of the items file: the item is not recommended before this time."""
    refresh_time: str = "00:00"
    """UTC time of day, HH:MM, at which states are cut."""
    evaluation: Evaluation = field(default_factory=Evaluation)

    def __post_init__(self) -> None:
        _check_name("name", self.name)
        for name in ("user_id_type", "item_id_type"):
            if getattr(self, name) not in ID_TYPES:
                raise ConfigError(f"{name} must be one of {', '.join(ID_TYPES)}, got {getattr(self, name)!r}")
        object.__setattr__(self, "event_types", _kinds("event_types", self.event_types, SIGNS))
        object.__setattr__(self, "item_columns", _kinds("item_columns", self.item_columns, ITEM_COLUMN_KINDS))
        object.__setattr__(self, "item_rules", _rules(self.item_rules, self.item_columns))
        if not self.positive_types:
            raise ConfigError(f"event_types must name at least one positive type, got {dict(self.event_types)}")
        for name in ("event_columns", "context_columns", "user_columns"):
            object.__setattr__(self, name, _columns(name, getattr(self, name)))
        for name in ("order_column", "available_from"):
            if getattr(self, name) is not None:
                _check_name(name, getattr(self, name))
        if self.order_column in ("user_id", "item_id", "event_type", "timestamp"):
            raise ConfigError(f"order_column must be a column of its own, got {self.order_column!r}")
        for name in ("event_columns", "context_columns"):
            taken = sorted(set(getattr(self, name)) & set(RESERVED_COLUMNS))
            if taken:
                raise ConfigError(f"{name} may not use the reserved names {', '.join(taken)}")
        if "user_id" in self.user_columns:
            raise ConfigError("user_columns may not name user_id: an id is no category")
        taken = sorted({"item_id", "available_from_us"} & set(self.item_columns))
        if taken:
            raise ConfigError(f"item_columns may not use the reserved names {', '.join(taken)}")
        both = sorted(set(self.context_columns) & set(self.user_columns))
        if both:
            raise ConfigError(
                f"context_columns and user_columns are read by name from one request and must differ, "
                f"got {', '.join(both)} in both"
            )
        if not isinstance(self.refresh_time, str) or not re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", self.refresh_time):
            raise ConfigError(f'refresh_time must be a quoted UTC time like "03:00", got {self.refresh_time!r}')
        if not isinstance(self.evaluation, Evaluation):
            raise ConfigError(f"evaluation must be an Evaluation, got {self.evaluation!r}")

    @property
    def user_id_arrow(self) -> pa.DataType:
        """Arrow type of user ids: int64 or string."""
        return pa.int64() if self.user_id_type == "int64" else pa.string()

    @property
    def item_id_arrow(self) -> pa.DataType:
        """Arrow type of item ids: int64 or string."""
        return pa.int64() if self.item_id_type == "int64" else pa.string()

    @property
    def event_type_names(self) -> list[str]:
        """All declared event types, sorted."""
        return sorted(self.event_types)

    @property
    def positive_types(self) -> list[str]:
        """The event types that count as a wanted outcome, sorted."""
        return sorted(name for name, sign in self.event_types.items() if sign == "positive")

    @property
    def head_columns(self) -> tuple[str, ...]:
        """Names of the categorical context features the head reads: context columns, then user columns."""
        return self.context_columns + self.user_columns

    @property
    def log_columns(self) -> tuple[str, ...]:
        """Columns of the event log that travel as strings: event columns, then context columns, each once."""
        return tuple(dict.fromkeys(self.event_columns + self.context_columns))

    @property
    def refresh_offset_us(self) -> int:
        """Microseconds from UTC midnight to refresh_time."""
        hours, minutes = self.refresh_time.split(":")
        return (int(hours) * 3600 + int(minutes) * 60) * _SECOND_US

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON or YAML, as in the description file."""
        values: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Evaluation):
                value = value.to_dict()
            elif isinstance(value, tuple):
                value = list(value)
            elif isinstance(value, Mapping):
                value = {name: list(v) if isinstance(v, tuple) else v for name, v in value.items()}
            values[f.name] = value
        if not self.item_rules:
            del values["item_rules"]  # versions of releases from before there were rules stay as they are
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of to_dict. Raises ConfigError naming the field, what was wanted and what was found."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"a dataset description must be a mapping of fields, got {values!r}")
        known = [f.name for f in fields(cls)]
        _check_names("the dataset description", values, known)
        missing = [name for name in ("name", "user_id_type", "item_id_type", "event_types") if name not in values]
        if missing:
            raise ConfigError(
                f"the dataset description lacks {', '.join(missing)}; its fields are {', '.join(sorted(known))}"
            )
        plain = {name: value for name, value in values.items() if value is not None or name in ("name",)}
        if "evaluation" in plain and not isinstance(plain["evaluation"], Evaluation):
            if not isinstance(plain["evaluation"], Mapping):
                raise ConfigError(f"evaluation must be a mapping with a split, got {plain['evaluation']!r}")
            plain["evaluation"] = Evaluation.from_dict(plain["evaluation"])
        return cls(**plain)


def shipped_descriptions() -> list[str]:
    """Names of the descriptions that come with the package, sorted."""
    folder = resources.files("model").joinpath("datasets")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_description(path_or_name: str) -> DatasetDescription:
    """Reads a description: a path or URL of a YAML file, or the name of one that is shipped.

    Raises ConfigError naming the file and the field.
    """
    where = str(path_or_name)
    if where in shipped_descriptions():
        text = resources.files("model").joinpath("datasets", f"{where}.yaml").read_text(encoding="utf-8")
        return _parse(where, text)
    import fsspec

    fs, path = fsspec.core.url_to_fs(where)
    if not fs.isfile(path):
        raise ConfigError(
            f"no dataset description {where!r}: it is neither a file nor one of {', '.join(shipped_descriptions())}"
        )
    return _parse(where, fs.cat_file(path).decode("utf-8"))


def find_description(events_uri: str) -> DatasetDescription:
    """The description that goes with an event log (a Parquet file or a folder of parts).

    In this order: `dataset.yaml` in the log's folder or the one above; a shipped description named like either
    folder; else a minimal one inferred from the log itself, with a log message saying what was assumed.
    Raises ConfigError or DataError.
    """
    import fsspec

    fs, path = fsspec.core.url_to_fs(str(events_uri))
    path = path.rstrip("/")
    parent = str(PurePosixPath(path).parent)
    folders = [path, parent] if fs.isdir(path) else [parent]
    for folder in folders:
        beside = f"{folder}/dataset.yaml"
        if fs.isfile(beside):
            return load_description(fs.unstrip_protocol(beside) if "://" in str(events_uri) else beside)
    shipped = shipped_descriptions()
    for folder in folders:
        name = PurePosixPath(folder).name
        if name in shipped:
            log.info("using the shipped description %r, after the folder of %s", name, events_uri)
            return load_description(name)
    return _infer(str(events_uri), PurePosixPath(folders[-1]).name or "events")


def _infer(events_uri: str, name: str) -> DatasetDescription:
    """A minimal description: id types from the schema, every event type found is positive, no other column used."""
    from model.event_log import check_schema, distinct_event_types, is_string, list_files, log_schema

    schema = log_schema(events_uri)
    types: dict[str, str] = {}
    for column in ("user_id", "item_id"):
        if column in schema.names:
            types[column] = "string" if is_string(schema.field(column).type) else "int64"
    found = distinct_event_types(events_uri)
    description = DatasetDescription(
        name=name,
        user_id_type=types.get("user_id", "int64"),
        item_id_type=types.get("item_id", "int64"),
        event_types=dict.fromkeys(found, "positive"),
    )
    check_schema(list_files(events_uri)[0], schema, description)
    unused = [c for c in schema.names if c not in ("user_id", "item_id", "event_type", "timestamp")]
    log.warning(
        "no dataset description for %s; assumed user_id %s, item_id %s, positive event types %s, no order column, "
        "and no other column used (%s). Write a dataset.yaml beside the data to say otherwise.",
        events_uri, description.user_id_type, description.item_id_type, ", ".join(found), ", ".join(unused) or "none",
    )  # fmt: skip
    return description


def _parse(where: str, text: str) -> DatasetDescription:
    import yaml  # not needed by whoever takes a description from a release

    try:
        return DatasetDescription.from_dict(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _check_names(what: str, values: Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = sorted(str(name) for name in set(values) - set(known))
    if unknown:
        raise ConfigError(f"{what} has no field {', '.join(unknown)}; its fields are {', '.join(sorted(known))}")


def _check_name(what: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{what} must be a non-empty string, got {value!r}")


def _columns(what: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ConfigError(f"{what} must be a list of column names, got {value!r}")
    for name in value:
        _check_name(f"each of {what}", name)
    if len(set(value)) != len(value):
        raise ConfigError(f"{what} must name each column once, got {', '.join(value)}")
    return tuple(value)


def _kinds(what: str, value: Any, allowed: Sequence[str]) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{what} must map names to {' | '.join(allowed)}, got {value!r}")
    for name, kind in value.items():
        _check_name(f"each name in {what}", name)
        if kind not in allowed:
            raise ConfigError(f"{what}.{name} must be one of {', '.join(allowed)}, got {kind!r}")
    return dict(value)


def _rules(value: Any, item_columns: Mapping[str, str]) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"item_rules must map {' | '.join(ITEM_RULES)} to item columns, got {value!r}")
    _check_names("item_rules", value, tuple(ITEM_RULES))
    rules: dict[str, Any] = {}
    for rule, given in value.items():
        columns = _columns(f"item_rules.{rule}", given if rule == "attributes" else [given])
        for name in columns:
            if item_columns.get(name) not in ITEM_RULES[rule]:
                raise ConfigError(
                    f"item_rules.{rule} must be of item_columns, of kind {' or '.join(ITEM_RULES[rule])}, got {name!r}"
                )
        rules[rule] = columns if rule == "attributes" else columns[0]
    return rules


def _time_us(what: str, value: Any) -> int | None:
    """Microseconds of a datetime or ISO 8601 string; without an offset it is UTC."""
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError as error:
            raise ConfigError(f"{what} must be a UTC time like 2017-10-15T03:00:00Z, got {value!r}") from error
    if not isinstance(value, datetime):
        raise ConfigError(f"{what} must be a UTC time like 2017-10-15T03:00:00Z, got {value!r}")
    if value.tzinfo is None:
        value = value.replace(tzinfo=UTC)
    elapsed: timedelta = value - _EPOCH
    return elapsed // _MICROSECOND


def _iso(time_us: int) -> str:
    return (_EPOCH + time_us * _MICROSECOND).isoformat().replace("+00:00", "Z")
