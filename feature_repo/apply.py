"""`feast apply` of this repository: a view per state version in the release registry.

    python -m feature_repo.apply --registry registry --states states --redis-url redis://localhost:6379/0

The same as `eval "$(python -m feature_repo.environment ...)"` followed by `feast -c feature_repo apply`.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from feature_repo.environment import make_parser, variables
from model.errors import ConfigError


def main(arguments: Sequence[str] | None = None) -> int:
    """Feast's exit status. Raises ConfigError where the feast command is not installed."""
    given = make_parser("python -m feature_repo.apply", __doc__).parse_args(arguments)
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    feast = shutil.which("feast", path=places)
    if feast is None:
        raise ConfigError("no feast command here; install the extra: pip install 'hybrid-tower[feast]'")
    folder = str(Path(__file__).parent)
    return subprocess.run([feast, "-c", folder, "apply"], env=os.environ | variables(given)).returncode


if __name__ == "__main__":
    sys.exit(main())
