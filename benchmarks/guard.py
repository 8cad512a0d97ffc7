"""The guard under faults: thousands of requests over damaged rows, each reply compared with what the release it names
computes by itself; how many are made of unmatched parts.

python -m benchmarks.guard [--requests 10000]
"""

import argparse
import itertools
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.results import record
from deploy.redis_server import start_redis
from model.release import Registry
from online.client import Embedding, EmbedQuery
from tests.online.conftest import World
from tests.online.helpers import Oracle, Rows, context_of, fresh_users, make_head_only, serving
from tests.online.test_never_mixed import FAULTS
from tests.releases import make_release

USERS = 400
RESIDENTS = {"A+B": "ab", "A alone": "a", "B alone": "b"}


def count(world: World, rows: Rows, url: str, commits: str, requests: int) -> tuple[int, Counter[str]]:
    """(mixed answers, answers by kind) of a server holding the releases committed in this order.

    Users have states of A and B; every other user has one fault in the serving release's view, so that the other
    release's good row lies beside it. Half of the requests accept the previous release.
    """
    releases = {"a": world.a, "b": world.b}
    for name in commits:
        Registry(world.registry).commit(releases[name].release_id)
    serving_release = releases[commits[-1]]
    other = world.b if serving_release is world.a else world.a
    first = fresh_users()
    users = range(first, first + USERS)
    rows.put_states(users, world.a.state_version, world.b.state_version)
    reasons: dict[int, str] = {}
    for user, (fault, reason) in zip(users[::2], itertools.cycle(FAULTS.values()), strict=False):
        fault(rows, user, serving_release.state_version, other.state_version)
        reasons[user] = reason
    mixed, kinds = 0, Counter[str]()
    with serving(world.registry, url) as (_, client):
        for turn in range(-(-requests // USERS)):
            queries = [EmbedQuery(u, context_of(u), accept_previous_release=turn % 2 == 1) for u in users]
            for start in range(0, USERS, 100):
                replies = client.embed_batch(queries[start : start + 100])
                for user, reply in zip(users[start : start + 100], replies, strict=True):
                    if not isinstance(reply, Embedding):
                        mixed += 1
                        continue
                    kinds[f"{reply.answer} {reply.reason}".strip()] += 1
                    told = reply.reason == reasons.get(user, "")
                    mixed += not (told and world.oracle.is_honest(reply, user))
    return mixed, kinds


def main() -> None:
    """Three servers, one after another; the faults are those of tests/online/test_never_mixed.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000, help="for each of the three servers")
    requests: int = parser.parse_args().requests
    total_mixed, total = 0, 0
    with tempfile.TemporaryDirectory() as name, start_redis(Path(name) / "redis") as redis:
        built = Path(name) / "registry"
        a, b = make_release(built, seed=1), make_release(built, seed=2)
        h = make_head_only(built, a, seed=1)
        oracle = Oracle(built, a.release_id, b.release_id, h.release_id)
        rows = Rows(redis.url)
        for title, commits in RESIDENTS.items():
            registry = Path(name) / commits
            registry.mkdir()
            (registry / "releases").symlink_to(built / "releases")
            mixed, kinds = count(World(registry, a, b, h, oracle), rows, redis.url, commits, requests)
            total_mixed, total = total_mixed + mixed, total + kinds.total()
            print(f"{title}: {kinds.total():,} answers, {mixed} mixed")
            for kind, number in kinds.most_common():
                print(f"    {number:7,}  {kind}")
        rows.close()
    record(
        "main_job",
        [
            {
                "measure": "guard.mixed_answers",
                "value": total_mixed,
                "unit": f"of {total:,} answers",
                "target": 0,
                "command": f"python -m benchmarks.guard --requests {requests}",
                "note": f"servers holding {', '.join(RESIDENTS)}; faults: {', '.join(FAULTS)}",
            }
        ],
    )


if __name__ == "__main__":
    main()
