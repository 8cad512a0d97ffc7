"""tower-release: look at releases and runs, make a release ready, and move the serving pointer when nothing is lost."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence

from model.errors import ConfigError, GoldenMismatch, ReleaseNotReady, TowerError
from model.leases import live_leases
from model.release import Manifest, Pointer, Registry, Release
from pipelines.prepare import PrepareSettings, prepare
from pipelines.readiness import MIN_COVERAGE, Demands, Finding, covered, examine, newest_run, span
from pipelines.runs import RunStore, iso, parse_as_of_us

_DESCRIPTION = """\
Releases, their state versions, and which release serves.

A release is immutable. What changes is the pointer: epoch, serving, prepared, previous. Servers follow it, and answer
with rows of the state version of the release they answer for. So a release serves only after two steps: prepare writes
its states beside the old ones, its items, and has servers load it; commit checks all that and flips the pointer.
"""

_EPILOG = """\
the path of a release
  tower-train    --registry registry ...                       makes it
  tower-release prepare ID --registry registry --states states --events log/
                                                               makes it ready beside the one that serves
  tower-encode   --registry registry --states states ...       (daily) encodes for serving, prepared and previous
  tower-release commit ID --registry registry --states states  checks, then lets it serve
  tower-release rollback  --registry registry --states states  checks the same, then the one before serves again
  tower-release gc        --registry registry --states states  (now and then) ends the rollback window when it is over
                                                               and collects what nobody can reach any more

exit status: 0 done, 1 refused or failed, 2 wrong command line
"""

_FORCE = """\
let it serve although a check refuses: users without a row of its version are then answered as cold starts, and servers
that have not loaded it follow when they have. Golden outputs and canaries that are off are never passed over"""


def make_parser() -> argparse.ArgumentParser:
    """The parser of tower-release."""
    parser = argparse.ArgumentParser(
        prog="tower-release",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, *, release: bool = False, states: bool = False) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        if release:
            sub.add_argument("release", metavar="ID", help="release id, as `tower-release list` shows it")
        sub.add_argument("--registry", required=True, metavar="URI", help="folder of releases and the pointer")
        if states:
            sub.add_argument("--states", required=True, metavar="URI", help="folder tower-encode writes runs to")
        return sub

    def with_redis(sub: argparse.ArgumentParser, no_redis: str) -> None:
        sub.add_argument("--redis-url", metavar="URL", help="where the rows are (default: the environment's REDIS_URL)")
        sub.add_argument("--no-redis", action="store_true", help=no_redis)

    def with_demands(sub: argparse.ArgumentParser) -> None:
        with_redis(sub, "do not look at the rows in Redis, only at the runs")
        sub.add_argument(
            "--min-coverage", type=float, default=MIN_COVERAGE, metavar="SHARE",
            help="least share of the serving release's users that must have a state (default: %(default)s)",
        )  # fmt: skip
        sub.add_argument(
            "--max-lag-s", type=float, default=0.0, metavar="S",
            help="how much older than the serving release's its newest run may be (default: %(default)s)",
        )  # fmt: skip
        sub.add_argument(
            "--min-servers", type=int, default=0, metavar="N",
            help="least number of live servers that must have loaded it; all live ones must (default: %(default)s)",
        )  # fmt: skip
        sub.add_argument("--force", action="store_true", help=_FORCE)

    command("list", "all releases, oldest first")
    command(
        "status", "the pointer and its history, the releases, the runs of each state version, the servers", states=True
    )
    command("verify", "check a release's files against their fingerprints and replay its golden inputs", release=True)
    sub = command("prepare", "make a release ready to serve, beside the one that serves", release=True, states=True)
    sub.add_argument("--events", required=True, metavar="URI", help="the whole log: Parquet file or folder of them")
    with_redis(sub, "send no rows to Redis")
    sub.add_argument("--as-of", metavar="TIME", help="UTC time (default: as the serving release's newest run)")
    sub.add_argument(
        "--redis-rows-per-s", type=float, metavar="N", dest="rows_per_s", help="send no more rows a second"
    )
    sub.add_argument(
        "--device", default="cpu", metavar="NAME", help="where to encode: cpu, cuda or cuda:N (default: cpu)"
    )
    sub.add_argument("--shards", type=int, metavar="P", help="as in tower-encode")
    sub.add_argument("--no-feast", action="store_true", help="do not register the view with Feast")
    sub.add_argument(
        "--wait-s", type=float, default=60.0, metavar="S",
        help="longest wait for the live servers to load the release (default: %(default)s)",
    )  # fmt: skip
    command("abandon", "prepare nothing any more; rows that were written are left to gc")
    with_demands(command("commit", "let a prepared release serve", release=True, states=True))
    with_demands(command("rollback", "let the previous release serve again", states=True))
    sub = command(
        "gc", "collect rows, runs and item snapshots that neither pointer nor live server reaches", states=True
    )
    sub.add_argument("--redis-url", metavar="URL", help="where the rows are (default: the environment's REDIS_URL)")
    sub.add_argument(
        "--window-days", type=float, default=7.0, metavar="DAYS",
        help="how long after a commit or rollback the previous release is kept ready (default: %(default)s)",
    )  # fmt: skip
    sub.add_argument("--keys-per-s", type=float, metavar="N", help="look at no more users a second (default: no limit)")
    sub.add_argument("--keep-folders", action="store_true", help="collect rows only; runs and item snapshots stay")
    sub.add_argument("--dry-run", action="store_true", help="only count what would go")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 refused or failed; argparse exits with 2."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if "redis_url" in args:
        declined = getattr(args, "no_redis", False)
        if declined and args.redis_url:
            parser.error("--no-redis and --redis-url exclude each other")
        args.redis_url = None if declined else args.redis_url or os.environ.get("REDIS_URL")
        if not declined and not args.redis_url:
            or_decline = ", or say --no-redis" if "no_redis" in args else ""
            parser.error(f"no Redis to look at: give --redis-url or set REDIS_URL{or_decline}")
    registry = Registry(args.registry)
    actions: dict[str, Callable[[], str]] = {
        "list": lambda: release_table(registry),
        "status": lambda: status(registry, args.states, _now_us()),
        "verify": lambda: verify(registry, args.release),
        "prepare": lambda: _prepare(registry, args),
        "abandon": lambda: _moved(registry.pointer(), registry.abandon()),
        "commit": lambda: commit(registry, args.release, _demands(args), force=args.force),
        "rollback": lambda: rollback(registry, _demands(args), force=args.force),
        "gc": lambda: _gc(registry, args),
    }
    try:
        print(actions[args.command]())
    except TowerError as error:
        print(f"tower-release: {error}", file=sys.stderr)
        return 1
    return 0


def _now_us() -> int:
    return time.time_ns() // 1000


def _demands(args: argparse.Namespace) -> Demands:
    if not 0 <= args.min_coverage <= 1:
        raise ConfigError(f"--min-coverage is a share in [0, 1], got {args.min_coverage:g}")
    return Demands(
        states_uri=args.states,
        redis_url=args.redis_url,
        min_coverage=args.min_coverage,
        max_lag_us=int(args.max_lag_s * 1e6),
        min_servers=args.min_servers,
    )


def verify(registry: Registry, release_id: str) -> str:
    """Raises CheckpointError on a missing or altered file, GoldenMismatch on other outputs than when it was written."""
    return _verified(registry, release_id)[1]


def _verified(registry: Registry, release_id: str) -> tuple[Release, str]:
    release = registry.load(release_id, replay=False)
    report = release.verify()
    if not report.passed:
        raise GoldenMismatch(f"release {release_id} is not sound here: {report}")
    return release, f"release {release_id} is sound: {report}"


def _prepare(registry: Registry, args: argparse.Namespace) -> str:
    release, verified = _verified(registry, args.release)
    print(verified, flush=True)
    settings = PrepareSettings(
        states_uri=args.states,
        events=args.events,
        redis_url=args.redis_url,
        rows_per_s=args.rows_per_s,
        device=args.device,
        shards=args.shards,
        as_of_us=None if args.as_of is None else parse_as_of_us(args.as_of),
        feast=not args.no_feast,
        wait_s=args.wait_s,
    )
    prepare(registry, release, settings, lambda line: print(line, flush=True))
    demands = Demands(states_uri=args.states, redis_url=args.redis_url)
    findings = examine(registry, registry.pointer(), release, demands, _now_us())
    ready = "ready to commit" if all(f.passed is not False for f in findings) else "not ready to commit yet"
    return f"\n{findings_table(findings)}\n\n{args.release} is {ready}"


def commit(registry: Registry, release_id: str, demands: Demands, *, force: bool = False) -> str:
    """Let a release serve. Raises CheckpointError when it does not verify, ReleaseNotReady when a check refuses it,
    PointerConflict when somebody else moved the pointer meanwhile."""
    pointer = registry.pointer()
    if pointer.serving == release_id:
        return _moved(pointer, pointer)
    told = _check(registry, pointer, release_id, demands, force=force)
    return f"{told}\n{_moved(pointer, registry.commit(release_id, expected_epoch=pointer.epoch))}"


def rollback(registry: Registry, demands: Demands, *, force: bool = False) -> str:
    """Let the previous release serve again; checks and errors as in commit."""
    pointer = registry.pointer()
    told = ""
    if pointer.previous is not None:
        told = _check(registry, pointer, pointer.previous, demands, force=force) + "\n"
    return told + _moved(pointer, registry.rollback(expected_epoch=pointer.epoch))


def _check(registry: Registry, pointer: Pointer, release_id: str, demands: Demands, *, force: bool) -> str:
    """What was found, as text. Raises ReleaseNotReady."""
    release, verified = _verified(registry, release_id)
    findings = examine(registry, pointer, release, demands, _now_us())
    refusals = [f for f in findings if f.passed is False and not (force and f.may_be_forced)]
    if refusals:
        reasons = "".join(f"\n  {finding.check}: {finding.detail}" for finding in refusals)
        advice = "\nor say --force" if all(finding.may_be_forced for finding in refusals) else ""
        raise ReleaseNotReady(f"release {release_id} may not serve:{reasons}{advice}")
    return f"{verified}\n{findings_table(findings)}"


def _gc(registry: Registry, args: argparse.Namespace) -> str:
    from pipelines.collect import collect
    from pipelines.transforms.publish import Pace, connect

    window = close_window(registry, args.window_days, _now_us(), dry_run=args.dry_run)
    pace = None if args.keys_per_s is None else Pace(args.keys_per_s)
    with connect(args.redis_url) as client:
        report = collect(registry, client, args.states, dry_run=args.dry_run, keep_folders=args.keep_folders, pace=pace)
    would = "would be " if report.dry_run else ""
    lines = [window, f"{report.keys_scanned:,} users looked at"]
    lines += [f"{rows:,} rows of state version {version} {would}removed" for version, rows in report.rows.items()]
    lines += [f"{folder} {would}removed" for folder in report.folders]
    lines += [f"state version {version} kept: {', '.join(why)}" for version, why in report.kept.items()]
    lines += [
        f"state version {version} became reachable meanwhile; send its rows again with tower-encode --republish"
        for version in report.became_reachable
    ]
    return "\n".join(lines)


def close_window(registry: Registry, window_days: float, now_us: int, *, dry_run: bool) -> str:
    """End the rollback window if the release that serves has served for so long; says what was done.

    Raises PointerConflict when somebody else moved the pointer meanwhile.
    """
    pointer = registry.pointer()
    if pointer.previous is None:
        return "no release is kept for a rollback"
    flips = [change for change in registry.history() if change.action in ("commit", "rollback")]
    served_us = now_us - flips[-1].at_us if flips else 0
    left_us = int(window_days * 86_400e6) - served_us
    if left_us > 0:
        return f"{pointer.previous} stays ready for a rollback for another {span(left_us)}"
    if dry_run:
        return f"the rollback window is over; {pointer.previous} would be let go first, which this count leaves out"
    after = registry.close_window(expected_epoch=pointer.epoch)
    return f"epoch {after.epoch}: the rollback window is over, {pointer.previous} is let go"


def findings_table(findings: Sequence[Finding]) -> str:
    """One check a line."""
    words = {True: "ok", False: "REFUSED", None: "-"}
    return table(["check", "", "found"], [[f.check, words[f.passed], f.detail] for f in findings])


def release_table(registry: Registry) -> str:
    """All releases, one a line."""
    pointer = registry.pointer()
    manifests = [registry.manifest(name) for name in registry.releases()]
    if not manifests:
        return f"no release in {registry.uri}; tower-train makes one"
    return table(
        ["release", "role", "state version", "embedding version", "created", "trained until"],
        [
            [
                *(m.release_id, _role(m, pointer), m.state_version, m.embedding_version),
                *(m.created_at, iso(m.trained_until_us)),
            ]
            for m in manifests
        ],
    )


def status(registry: Registry, states_uri: str, now_us: int) -> str:
    """Pointer, releases, runs, servers and the pointer's history as text. now_us: the clock, for ages."""
    pointer = registry.pointer()
    versions = dict.fromkeys(registry.manifest(name).state_version for name in registry.releases())
    lines = [
        f"pointer    epoch {pointer.epoch}, serving {pointer.serving or 'none'}, "
        f"prepared {pointer.prepared or 'none'}, previous {pointer.previous or 'none'}",
        "",
        release_table(registry),
        "",
    ]
    serving = None
    if pointer.serving is not None:
        serving = RunStore(states_uri, registry.manifest(pointer.serving).state_version)
    rows = []
    for version in versions:
        store = RunStore(states_uri, version)
        sent = store.published()
        newest = newest_run(store)
        for run_id in store.run_ids():
            run = store.manifest(run_id)
            coverage = "-"
            if serving is not None and newest is not None and run_id == newest.run_id:
                have, of = covered(store, serving)
                coverage = f"{have / of:.2%}" if of else "-"
            counts = run.counts
            rows.append(
                [
                    *(version, run_id, iso(run.as_of_us), span(now_us - run.as_of_us)),
                    *(f"{counts['users']:,}", f"{counts['encoded']:,}", coverage, "yes" if run_id in sent else "no"),
                ]
            )
    heads = ["state version", "run", "as of", "age", "users", "encoded", "of serving", "in Redis"]
    lines += [table(heads, rows) if rows else f"no run in {states_uri}; tower-encode makes one", ""]
    lines += [_servers_table(registry, now_us), "", _history_table(registry, now_us)]
    return "\n".join(lines)


def _servers_table(registry: Registry, now_us: int) -> str:
    """What each live server has loaded."""
    rows = [
        [
            *(lease.server_id, lease.address, str(lease.epoch), leased.role, leased.release_id),
            *("yes" if leased.has_items else "no", leased.canary),
        ]
        for lease in live_leases(registry, now_us)
        for leased in lease.releases
    ]
    return (
        table(["server", "address", "epoch", "role", "release", "items", "canary"], rows) if rows else "no live server"
    )


def _history_table(registry: Registry, now_us: int, latest: int = 10) -> str:
    """The latest moves of the pointer."""
    rows = [
        [
            *(str(change.pointer.epoch), change.action, f"{span(now_us - change.at_us)} ago", change.by),
            *(change.pointer.serving or "-", change.pointer.prepared or "-", change.pointer.previous or "-"),
        ]
        for change in registry.history()[-latest:]
    ]
    if not rows:
        return "the pointer was never moved"
    return table(["epoch", "move", "when", "by", "serving", "prepared", "previous"], rows)


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Columns as wide as their widest entry."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [heads, *rows]
    )


def _role(manifest: Manifest, pointer: Pointer) -> str:
    roles = {pointer.previous: "previous", pointer.prepared: "prepared", pointer.serving: "serving"}
    return roles.get(manifest.release_id, "")


def _moved(before: Pointer, after: Pointer) -> str:
    if before == after:
        return f"{after.serving} serves already (epoch {after.epoch})"
    if before.serving == after.serving:
        return f"epoch {after.epoch}: {after.serving or 'nothing'} serves, {after.prepared or 'nothing'} is prepared"
    return f"epoch {after.epoch}: {after.serving} serves, {after.previous or 'nothing'} served before"


if __name__ == "__main__":
    sys.exit(main())
