"""What a stored state costs and what it is worth: quality against bytes, by width, tokens and codec.

    python -m benchmarks.state_size [--data FOLDER] [--device cuda] [--studies FOLDER] [--only ml-1m] [--quick]
    python -m benchmarks.state_size bytes       bytes of a user in a real Redis, for the same shapes
    python -m benchmarks.state_size report      figures, table and plot of the two, measured anywhere

Quality: each shape is trained with the settings of benchmarks.quality but a fixed number of epochs and no early
stopping, the shapes of a log side by side in processes. The same weights are then asked with their states as float32,
float16 and int8, so the codecs differ by rounding alone; intervals are over users, resampled for all codecs alike.

Bytes: the rows of 10,000 users go to a Redis of its own by the job's publisher; what its memory grew by is divided by
the users (median of 3). Twice: as Redis comes, and where it may keep hashes with longer values in its compact form.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import quality
from benchmarks.results import FOLDER, hardware, record, today
from model.config import TowerConfig
from model.dataset import load_description
from model.event_log import read_items, read_log, read_users
from model.metrics import recall_at, resampled_means
from model.release import Registry, Release, library_versions
from model.state_codec import StateCodec, as_stored
from model.training.data import EventArrays
from model.training.evaluate import (
    Candidates,
    answer_requests,
    encode_requests,
    excludes_seen,
    make_test_set,
    repeat_share,
)
from model.training.loop import train
from model.training.plots import plotting, save_plot

ROOT = Path(__file__).resolve().parents[1]
SHAPES: Final = ((64, 1), (128, 1), (256, 1), (512, 1), (64, 4), (128, 4))
"""Width of a token and number of tokens."""
CODECS: Final = ("float32", "float16", "int8")
ARMS: Final = ("context", "no_context")
SHORT: Final = {"ml-1m": "ml1m", "globo-news": "globo"}
EPOCHS: Final = {"ml-1m": 20, "globo-news": 5}
WORKERS: Final = {"ml-1m": 6, "globo-news": 3}
"""Shapes trained side by side: globo-news's softmax over 46,033 items takes some 15 GB each."""
MAX_MINUTES: Final = {"ml-1m": 1.8, "globo-news": 1.1}
"""Of one training; a guard, so that the whole command ends within 6 minutes."""
K: Final = 20
USERS: Final = 10_000
COMPACT_BYTES: Final = 4096
"""hash-max-ziplist-value of the second measurement: every state fits. As it comes it is 64, less than any state."""
_COMPACT: Final = "hash-max-ziplist-value"  # since Redis 7 another name for hash-max-listpack-value
STUDY_FORMAT: Final = 1

Hits = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Work:
    """One shape of one log, to be trained and asked; travels to a process."""

    log: str
    data: Path
    device: str
    width: int
    tokens: int
    epochs: int
    max_minutes: float | None
    max_users: int | None
    max_test_events: int
    threads: int


def measure_shape(work: Work) -> dict[str, Any]:
    """Train one shape and ask it with every codec: Recall by arm and codec, and the ratios to float32."""
    torch.set_num_threads(work.threads)
    description = load_description(work.log)
    folder = work.data / work.log
    table, _ = read_log(str(folder / "events.parquet"), description)
    items = read_items(str(folder / "items.parquet"), description)
    users = read_users(str(folder / "users.parquet"), description) if description.user_columns else None
    config, settings = {"ml-1m": quality.movies, "globo-news": quality.news}[work.log](work.device)
    config = replace(config, d_model=work.width, state_tokens=work.tokens)
    settings = replace(
        settings, epochs=work.epochs, patience=work.epochs, max_minutes=work.max_minutes, max_users=work.max_users
    )
    with tempfile.TemporaryDirectory() as name:
        registry = Registry(name)
        made = train(
            table, items, users, description, registry, settings=settings, config=config, device=work.device
        )  # fmt: skip
        release = registry.load(made.manifest.release_id, device=work.device)
        arrays = EventArrays.build(table, users, release.featuriser, description)
        test = make_test_set(table, arrays, description, limit=work.max_test_events, seed=0)
        exclude_seen = excludes_seen("auto", repeat_share(arrays))
        candidates = Candidates.of(release, arrays, items, test.target_B, exclude_seen=exclude_seen)
        hits = ask(release, arrays, test.target_B, test.cut_B, candidates)
    user_B = arrays.user_T[test.target_B]
    found = {
        "width": work.width,
        "tokens": work.tokens,
        "requests": len(user_B),
        "users": len(np.unique(user_B)),
        "with_state": float(test.history_B.mean()),
        "epochs": made.summary["history"][-1]["epoch"],
        "best_epoch": made.summary["best_epoch"],
        "train_seconds": made.summary["train_seconds"],
        "arms": {arm: compare(hits[arm], user_B) for arm in ARMS},
    }
    recall = {codec: round(found["arms"]["context"]["recall"][codec]["value"], 4) for codec in CODECS}
    print(f"{work.log}, {work.tokens} x {work.width}: {recall}, {found['train_seconds']:.0f} s of training", flush=True)
    return found


def ask(
    release: Release, events: EventArrays, target_B: NDArray[Any], cut_B: NDArray[Any], candidates: Candidates
) -> dict[str, dict[str, Hits]]:
    """Whether each request finds its item, by arm and codec. The release's own states are not rounded."""
    assert release.codec is None, "the release keeps its states as float32"
    assert release.item_table is not None
    state_QD, row_B = encode_requests(release.encoder, events, target_B, cut_B)
    encoded = state_QD.cpu().numpy()
    hits: dict[str, dict[str, Hits]] = {arm: {} for arm in ARMS}
    for name in CODECS:
        codec = StateCodec.of(replace(release.config, storage_codec=name))
        stored = torch.from_numpy(as_stored(codec, encoded)).to(release.device)
        for arm in ARMS:
            user_BE = answer_requests(
                release.head, release.item_table, events, target_B, cut_B, stored, row_B, with_context=arm == "context"
            )
            hits[arm][name] = recall_at(candidates.ranks(user_BE, release.item_table), K)
    return hits


def compare(hits: Mapping[str, Hits], user_B: NDArray[Any], *, resamples: int = 500) -> dict[str, Any]:
    """Recall of each codec and its ratio to float32's, with 95 % intervals from the same resamples of users."""
    value_BM = np.stack([hits[codec] for codec in CODECS], 1)
    mean_M = value_BM.mean(0)
    mean_RM = resampled_means(value_BM, user_B, resamples=resamples)
    ratio_RM = mean_RM / np.maximum(mean_RM[:, :1], 1e-12)
    ratio_M = mean_M / max(mean_M[0], 1e-12)

    def estimates(value_M: NDArray[Any], sample_RM: NDArray[Any]) -> dict[str, dict[str, float]]:
        low_M, high_M = np.quantile(sample_RM, [0.025, 0.975], axis=0)
        return {
            codec: {"value": float(value_M[m]), "low": float(low_M[m]), "high": float(high_M[m])}
            for m, codec in enumerate(CODECS)
        }

    return {"recall": estimates(mean_M, mean_RM), "over_float32": estimates(ratio_M, ratio_RM)}


def measure_quality(args: argparse.Namespace) -> None:
    """Every shape of each log; a study as JSON."""
    for log in [args.only] if args.only else list(SHORT):
        started = time.monotonic()
        shapes = SHAPES if not args.quick else ((64, 1), (64, 4))
        works = [
            Work(
                log, args.data, args.device, width, tokens,
                epochs=1 if args.quick else EPOCHS[log],
                max_minutes=None if args.quick else MAX_MINUTES[log],
                max_users=200 if args.quick else None,
                max_test_events=500 if args.quick else args.max_test_events,
                threads=1,
            )
            for width, tokens in shapes
        ]  # fmt: skip
        workers = args.workers or WORKERS[log]
        print(f"{log}: {len(works)} shapes, {workers} at a time", flush=True)
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
            found = list(pool.map(measure_shape, works))
        study = {
            "format": STUDY_FORMAT,
            "study": "state-size",
            "dataset": log,
            "k": K,
            "interval": "95 %, bootstrap over users",
            "shapes": found,
            "made": {"hardware": hardware(), "versions": library_versions(), "date": today(), "device": args.device},
        }
        args.studies.mkdir(parents=True, exist_ok=True)
        path = args.studies / f"state-size-{SHORT[log]}.json"
        path.write_text(json.dumps(study, indent=1) + "\n")
        print(f"{log}: {time.monotonic() - started:.0f} s, {path}", flush=True)


# Bytes


def measure_bytes(args: argparse.Namespace) -> None:
    """Bytes of a user in a real Redis by shape, codec and setting; a study as JSON, and the default width's figures."""
    from deploy.redis_server import start_redis
    from pipelines.transforms.publish import connect

    settings = {"as it comes": None, f"{_COMPACT} {COMPACT_BYTES}": COMPACT_BYTES}
    rows = []
    with tempfile.TemporaryDirectory() as name, start_redis(Path(name)) as server, connect(server.url) as client:
        version = client.info("server")["redis_version"]
        plain = client.config_get(_COMPACT)[_COMPACT]
        for title, limit in settings.items():
            client.config_set(_COMPACT, plain if limit is None else limit)
            for width, tokens in SHAPES:
                for codec in CODECS:
                    row = fill(client, TowerConfig(d_model=width, state_tokens=tokens, storage_codec=codec), args.users)
                    rows.append({"setting": title, "width": width, "tokens": tokens, "codec": codec, **row})
                    print(json.dumps(rows[-1]), flush=True)
    study = {
        "format": STUDY_FORMAT,
        "study": "state-bytes",
        "users": args.users,
        "settings": list(settings),
        "rows": rows,
        "made": {"hardware": hardware(), "versions": {**library_versions(), "redis": version}, "date": today()},
    }
    args.studies.mkdir(parents=True, exist_ok=True)
    path = args.studies / "state-bytes.json"
    path.write_text(json.dumps(study, indent=1) + "\n")
    if not args.no_record:
        record("quality", byte_entries(study))


def fill(client: Any, config: TowerConfig, users: int) -> dict[str, Any]:
    """Publish so many users' rows into an empty Redis: bytes a user, of the state's field and in all."""
    import pyarrow as pa

    from feature_repo import layout
    from pipelines.transforms.publish import publish_table

    version, as_of_us = "0123456789abcdef", 1_700_000_000_000_000
    codec = StateCodec.of(config)
    states = np.random.default_rng(0).standard_normal((users, config.state_width)).astype(np.float32)
    stored = (
        pa.array(list(states), pa.list_(pa.float32()))
        if codec is None
        else pa.array([row.tobytes() for row in codec.encode(states)], pa.binary())
    )
    as_of = pa.array(np.full(users, as_of_us))
    table = pa.table(
        {
            "user_id": pa.array(range(1_000_000, 1_000_000 + users)),
            "state": stored,
            "state_version": pa.array([version] * users),
            "history_until": pa.array(as_of_us - np.arange(users) * 1_000_003),
            "encoded_at": as_of,
            "event_timestamp": as_of.cast(pa.timestamp("us", "UTC")),
        }
    )
    grown = []
    for _ in range(3):
        client.flushall()
        publish_table(client, table.slice(0, 1), version, 1, codec=codec)  # the script, the client's buffers
        client.flushall()
        before = _settled_memory(client)
        counts = publish_table(client, table, version, 1, codec=codec)
        grown.append(_settled_memory(client) - before)
        assert counts.written == client.dbsize() == users, counts
    keys = layout.redis_keys(np.arange(1_000_000, 1_000_000 + users, max(1, users // 100)))
    view = layout.view_name(version)
    for key, state in zip(keys, states[:: max(1, users // 100)], strict=True):
        row = layout.decode_row(client.hmget(key, layout.row_fields(view)), codec)
        assert row is not None
        assert row.state.tobytes() == as_stored(codec, state[None]).tobytes()
    return {
        "state_bytes": len(client.hget(keys[0], layout.field_name(view, "state"))),
        "encoding": client.object("encoding", keys[0]).decode(),
        "bytes_per_user": round(float(np.median(grown)) / users, 1),
        "memory_usage": round(float(np.mean([client.memory_usage(key, samples=0) for key in keys])), 1),
    }


def _settled_memory(client: Any) -> int:
    """used_memory once Redis has given back its table of keys from before the last growth."""
    time.sleep(0.5)
    return int(client.info("memory")["used_memory"])


# Report


def byte_entries(study: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Bytes a user at the default width, as records."""
    default = TowerConfig()
    found = {
        (row["setting"], row["codec"]): row
        for row in study["rows"]
        if (row["width"], row["tokens"]) == (default.d_model, default.state_tokens)
    }
    plain, compact = study["settings"]
    made = []
    for codec in CODECS:
        row, small = found[plain, codec], found[compact, codec]
        made.append(
            {
                "measure": f"state.bytes.{codec}",
                "value": row["bytes_per_user"],
                "unit": f"bytes of Redis memory a user, {default.state_tokens} x {default.d_model}",
                "note": (
                    f"growth of used_memory over {study['users']:,} users, keys and all fields included (MEMORY USAGE "
                    f"{row['memory_usage']:.0f}); {row['state_bytes']} in the state's field; a {row['encoding']}; with "
                    f"{compact} {small['bytes_per_user']:.0f}, a {small['encoding']}"
                ),
                "command": "python -m benchmarks.state_size bytes",
                **{name: study["made"][name] for name in ("hardware", "versions", "date")},
            }
        )
        if codec != "float32":
            made[-1] |= {"rival": "float32", "rival_value": found[plain, "float32"]["bytes_per_user"]}
    return made


def ratio_entry(studies: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The worst ratio of int8 to float32 over all logs and shapes, as a record."""
    ratios = [
        (shape["arms"]["context"]["over_float32"]["int8"], shape, study)
        for study in studies
        for shape in study["shapes"]
    ]
    worst, shape, study = min(ratios, key=lambda found: float(found[0]["value"]))
    recall = shape["arms"]["context"]["recall"]
    parts = "; ".join(
        f"{study['dataset']} "
        + ", ".join(
            f"{shape['tokens']} x {shape['width']} {shape['arms']['context']['over_float32']['int8']['value']:.4f}"
            for shape in study["shapes"]
        )
        for study in studies
    )
    only = f" --only {studies[0]['dataset']}" if len(studies) == 1 else ""
    return {
        "measure": f"state.int8_over_fp32.recall@{K}",
        "value": round(worst["value"], 4),
        "unit": f"Recall@{K} from int8 states over Recall@{K} from float32 states, the least of all shapes and logs",
        "target": 0.99,
        "rival": "float32",
        "rival_value": 1.0,
        "note": (
            f"{study['dataset']}, {shape['tokens']} x {shape['width']}: {recall['int8']['value']:.4f} over "
            f"{recall['float32']['value']:.4f}, 95 % interval of the ratio {worst['low']:.4f} to {worst['high']:.4f}, "
            f"paired over {shape['users']:,} users; the same weights, rounded after training. All: {parts}"
        ),
        "command": f"python -m benchmarks.state_size{only} --device cuda",
        **{name: study["made"][name] for name in ("hardware", "versions", "date")},
    }


def table(studies: Sequence[Mapping[str, Any]], in_bytes: Mapping[str, Any]) -> Iterator[str]:
    """The joined figures as a Markdown table."""
    plain, compact = in_bytes["settings"]
    size = {(r["setting"], r["width"], r["tokens"], r["codec"]): r["bytes_per_user"] for r in in_bytes["rows"]}
    names = [study["dataset"] for study in studies]
    yield (
        "| tokens x width | codec | bytes a user | compact | "
        + " | ".join(f"{name} Recall@{K}" for name in names)
        + " |"
    )
    yield "|---|---|---:|---:|" + "---:|" * len(names)
    for width, tokens in SHAPES:
        for codec in CODECS:
            cells = [f"{tokens} x {width}", codec]
            cells += [f"{size[setting, width, tokens, codec]:.0f}" for setting in (plain, compact)]
            for study in studies:
                shape = next((s for s in study["shapes"] if (s["width"], s["tokens"]) == (width, tokens)), None)
                found = None if shape is None else shape["arms"]["context"]["recall"][codec]
                cells.append(
                    "" if found is None else f"{found['value']:.4f} ({found['low']:.4f} to {found['high']:.4f})"
                )
            yield "| " + " | ".join(cells) + " |"


def draw(studies: Sequence[Mapping[str, Any]], in_bytes: Mapping[str, Any], path: Path) -> None:
    """Recall against bytes, a panel a log, a line a codec. Raises ConfigError without matplotlib."""
    plt = plotting()
    plain = in_bytes["settings"][0]
    size = {
        (r["width"], r["tokens"], r["codec"]): r["bytes_per_user"] for r in in_bytes["rows"] if r["setting"] == plain
    }
    figure, axes = plt.subplots(
        1, len(studies), figsize=(4.6 * len(studies), 3.6), layout="constrained", squeeze=False
    )  # fmt: skip
    for axis, study in zip(axes[0], studies, strict=True):
        for codec, colour in zip(CODECS, ("C7", "C0", "C1"), strict=True):
            for single, marker, line in ((True, "o", "-"), (False, "s", ":")):
                shapes = [shape for shape in study["shapes"] if (shape["tokens"] == 1) is single]
                places = [size[shape["width"], shape["tokens"], codec] for shape in shapes]
                values = [shape["arms"]["context"]["recall"][codec]["value"] for shape in shapes]
                title = codec if single else f"{codec}, 4 tokens"
                axis.plot(places, values, color=colour, marker=marker, linestyle=line, label=title)
                if codec == "int8":
                    for shape, place, value in zip(shapes, places, values, strict=True):
                        name = f"{shape['width']}" if single else f"{shape['tokens']} x {shape['width']}"
                        axis.annotate(
                            name, (place, value), (0, -11), textcoords="offset points", fontsize=7, ha="center"
                        )
        axis.set_xscale("log")
        axis.set_xticks([1000, 1500, 2000, 3000], ["1,000", "1,500", "2,000", "3,000"])
        axis.minorticks_off()
        axis.margins(y=0.1)
        axis.set_xlabel("bytes of Redis memory a user")
        axis.set_ylabel(f"Recall@{study['k']}")
        axis.set_title(study["dataset"], fontsize=10)
    axes[0][0].legend(fontsize=7)
    save_plot(plt, figure, path)


def report(args: argparse.Namespace) -> None:
    """Join what was measured: table, plot, records."""
    in_bytes = json.loads((args.studies / "state-bytes.json").read_text())
    paths = [args.studies / f"state-size-{short}.json" for short in SHORT.values()]
    studies = [json.loads(path.read_text()) for path in paths if path.exists()]
    if not studies:
        raise SystemExit(f"no study of quality in {args.studies}: run python -m benchmarks.state_size --device cuda")
    print("\n".join(table(studies, in_bytes)))
    draw(studies, in_bytes, args.plot)
    if not args.no_record:
        record("quality", [*byte_entries(in_bytes), ratio_entry(studies)])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure quality, measure bytes, or join the two."""
    parser = argparse.ArgumentParser(prog="benchmarks.state_size", description=__doc__.partition("\n")[0])
    parser.add_argument("what", nargs="?", choices=("quality", "bytes", "report"), default="quality")
    places = [ROOT / "shared/data", ROOT.parent / "shared/data"]
    parser.add_argument("--data", type=Path, default=next((p for p in places if p.exists()), places[-1]))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=tuple(SHORT))
    parser.add_argument("--max-test-events", type=int, default=30_000, help="sample a larger test to so many events")
    parser.add_argument("--workers", type=int, help=f"shapes trained side by side (default: {WORKERS})")
    parser.add_argument("--quick", action="store_true", help="two shapes, an epoch, 200 users: does it run?")
    parser.add_argument("--users", type=int, default=USERS, help="users of the measurement of bytes")
    parser.add_argument("--studies", type=Path, default=FOLDER / "studies", help="folder of the studies as JSON")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs/plots/state-size.svg")
    parser.add_argument("--no-record", action="store_true")
    args = parser.parse_args(argv)
    {"quality": measure_quality, "bytes": measure_bytes, "report": report}[args.what](args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
