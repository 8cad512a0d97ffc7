"""Parity: the embedding by gRPC, over a real Beam run and a real Redis, against the undivided model in one process.

python -m benchmarks.parity [--users 1000]
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks.results import record
from deploy.redis_server import start_redis
from tests.deployment import ML_1M, deploy, largest_difference


def main() -> None:
    """Deploy an untrained release of ml-1m (random weights are as good for this), ask for each user both ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=1000)
    users: int = parser.parse_args().users
    with (
        tempfile.TemporaryDirectory() as name,
        start_redis(Path(name) / "redis") as redis,
        deploy(Path(name), ML_1M, redis.url, description_path="ml-1m") as deployment,
    ):
        difference = largest_difference(deployment, users)
    print(f"{users} users of ml-1m: largest |difference| {difference:.3g} (target 1e-5)")
    record(
        "main_job",
        [
            {
                "measure": "parity.max_abs_diff",
                "value": difference,
                "unit": "absolute",
                "target": 1e-5,
                "rival": "undivided model in one process",
                "rival_value": 0.0,
                "command": f"python -m benchmarks.parity --users {users}",
            }
        ],
    )


if __name__ == "__main__":
    main()
