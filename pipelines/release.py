"""tower-release: look at releases and runs, and move the serving pointer when nothing would go missing."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence

from model.errors import ConfigError, GoldenMismatch, TowerError
from model.release import Manifest, Pointer, Registry
from pipelines.runs import RunManifest, RunStore, iso

MIN_COVERAGE = 0.95
"""Least share of the serving version's users that a release must have states for. Below 1, since a rebuild from a
trimmed log lacks users who have been idle for longer than the log reaches back."""

_DESCRIPTION = """\
Releases, their state versions, and which release serves.

A release is immutable. What changes is the pointer: epoch, serving, prepared, previous. Servers follow it, and answer
with rows of the state version of the release they answer for; so a release may serve only once tower-encode has made
a run of its state version that is as new as that of the release it replaces. commit and rollback check this.
"""

_EPILOG = """\
the path of a release
  tower-train  --registry registry ...                          makes it
  tower-encode --registry registry --states states --release ID ...   encodes all users with it, beside the old rows
  tower-release commit ID --registry registry --states states   lets it serve
  tower-release rollback  --registry registry --states states   the one before serves again
  tower-encode --release all ... (daily) keeps both versions current, so that either way remains open

exit status: 0 done, 1 refused or failed, 2 wrong command line
"""


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

    def command(name: str, text: str, *, release: bool = False, states: bool = False, force: bool = False) -> None:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        if release:
            sub.add_argument("release", metavar="ID", help="release id, as `tower-release list` shows it")
        sub.add_argument("--registry", required=True, metavar="URI", help="folder of releases and the pointer")
        if states:
            sub.add_argument("--states", required=True, metavar="URI", help="folder tower-encode writes runs to")
        if force:
            sub.add_argument(
                "--force",
                action="store_true",
                help="skip the check that states are there and as new as the serving release's: users without a row "
                "of this version are then answered as cold starts. Nothing else is skipped",
            )

    command("list", "all releases, oldest first")
    command("status", "the pointer, the releases, and the runs of each state version", states=True)
    command("verify", "check a release's files against their fingerprints and replay its golden inputs", release=True)
    command("commit", "let a release serve", release=True, states=True, force=True)
    command("rollback", "let the previous release serve again", states=True, force=True)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 refused or failed; argparse exits with 2."""
    args = make_parser().parse_args(argv)
    registry = Registry(args.registry)
    actions: dict[str, Callable[[], str]] = {
        "list": lambda: release_table(registry),
        "status": lambda: status(registry, args.states, time.time_ns() // 1000),
        "verify": lambda: verify(registry, args.release),
        "commit": lambda: commit(registry, args.states, args.release, force=args.force),
        "rollback": lambda: rollback(registry, args.states, force=args.force),
    }
    try:
        print(actions[args.command]())
    except TowerError as error:
        print(f"tower-release: {error}", file=sys.stderr)
        return 1
    return 0


def verify(registry: Registry, release_id: str) -> str:
    """Raises CheckpointError on a missing or altered file, GoldenMismatch on other outputs than when it was written."""
    report = registry.load(release_id, replay=False).verify()
    if not report.passed:
        raise GoldenMismatch(f"release {release_id} is not sound here: {report}")
    return f"release {release_id} is sound: {report}"


def commit(registry: Registry, states_uri: str, release_id: str, *, force: bool = False) -> str:
    """Let a release serve. Raises CheckpointError when it does not verify, ConfigError when its states are missing or
    older than those of the serving release, PointerConflict when somebody else moved the pointer meanwhile."""
    pointer = registry.pointer()
    verified = verify(registry, release_id)
    if not force:
        check_coverage(registry, states_uri, pointer, release_id)
    after = registry.commit(release_id, expected_epoch=pointer.epoch)
    return f"{verified}\n{_moved(pointer, after)}"


def rollback(registry: Registry, states_uri: str, *, force: bool = False) -> str:
    """Let the previous release serve again; checks and errors as in commit."""
    pointer = registry.pointer()
    if pointer.previous is not None:
        verify(registry, pointer.previous)
        if not force:
            check_coverage(registry, states_uri, pointer, pointer.previous)
    return _moved(pointer, registry.rollback(expected_epoch=pointer.epoch))


def check_coverage(registry: Registry, states_uri: str, pointer: Pointer, release_id: str) -> None:
    """Raises ConfigError unless the release's state version has a run as new as the serving one's, and as wide."""
    manifest = registry.manifest(release_id)
    runs = RunStore(states_uri, manifest.state_version)
    newest = _newest(runs)
    advice = f"run tower-encode --release {release_id}, or say --force"
    if newest is None:
        raise ConfigError(
            f"release {release_id} may not serve: {states_uri} has no committed run of its state version "
            f"{manifest.state_version}; {advice}"
        )
    if newest.run_id not in runs.published():
        print(f"note: run {newest.run_id} of {release_id} was not sent to Redis by tower-encode", file=sys.stderr)
    if pointer.serving is None:
        return
    serving = _newest(RunStore(states_uri, registry.manifest(pointer.serving).state_version))
    if serving is None:
        return
    if newest.as_of_us < serving.as_of_us:
        raise ConfigError(
            f"release {release_id} may not serve: its newest run, {newest.run_id}, is "
            f"{age(serving.as_of_us - newest.as_of_us)} older than {serving.run_id} of the serving release "
            f"{pointer.serving}; {advice}"
        )
    if newest.counts["users"] < MIN_COVERAGE * serving.counts["users"]:
        raise ConfigError(
            f"release {release_id} may not serve: its newest run, {newest.run_id}, has {newest.counts['users']:,} "
            f"users, the serving release's {serving.counts['users']:,} (wanted at least {MIN_COVERAGE:.0%}); encode "
            "it from the whole log with --full, or say --force"
        )


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
    """Pointer, releases and runs as text. now_us: the clock, for ages."""
    pointer = registry.pointer()
    versions = dict.fromkeys(registry.manifest(name).state_version for name in registry.releases())
    lines = [
        f"pointer    epoch {pointer.epoch}, serving {pointer.serving or 'none'}, "
        f"prepared {pointer.prepared or 'none'}, previous {pointer.previous or 'none'}",
        "",
        release_table(registry),
        "",
    ]
    serving_users = None
    if pointer.serving is not None:
        serving = _newest(RunStore(states_uri, registry.manifest(pointer.serving).state_version))
        serving_users = serving.counts["users"] if serving else None
    rows = []
    for version in versions:
        store = RunStore(states_uri, version)
        sent = store.published()
        for run_id in store.run_ids():
            run = store.manifest(run_id)
            coverage = f"{run.counts['users'] / serving_users:.1%}" if serving_users else "-"
            rows.append(
                [
                    version,
                    run_id,
                    iso(run.as_of_us),
                    age(now_us - run.as_of_us),
                    f"{run.counts['users']:,}",
                    f"{run.counts['encoded']:,}",
                    coverage,
                    "yes" if run_id in sent else "no",
                ]
            )
    heads = ["state version", "run", "as of", "age", "users", "encoded", "of serving", "in Redis"]
    lines.append(table(heads, rows) if rows else f"no run in {states_uri}; tower-encode makes one")
    return "\n".join(lines)


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Columns as wide as their widest entry."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [heads, *rows]
    )


def age(span_us: int) -> str:
    """A span of time for people: its two largest units, like 2 d 3 h."""
    seconds = max(span_us, 0) // 1_000_000
    parts = [(seconds // 86_400, "d"), (seconds // 3600 % 24, "h"), (seconds // 60 % 60, "min"), (seconds % 60, "s")]
    first = next((place for place, (count, _) in enumerate(parts) if count), len(parts) - 1)
    return " ".join(f"{count} {unit}" for count, unit in parts[first : first + 2] if count or first == len(parts) - 1)


def _newest(store: RunStore) -> RunManifest | None:
    committed = store.run_ids()
    return store.manifest(committed[-1]) if committed else None


def _role(manifest: Manifest, pointer: Pointer) -> str:
    roles = {pointer.previous: "previous", pointer.prepared: "prepared", pointer.serving: "serving"}
    return roles.get(manifest.release_id, "")


def _moved(before: Pointer, after: Pointer) -> str:
    if before == after:
        return f"{after.serving} serves already (epoch {after.epoch})"
    return f"epoch {after.epoch}: {after.serving} serves, {after.previous or 'nothing'} served before"


if __name__ == "__main__":
    sys.exit(main())
