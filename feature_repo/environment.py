"""The environment that the stock `feast` command reads in this repository.

`feature_store.yaml` can only expand variables, and Feast wants Redis as "host:port,option=value" rather than a URL, so
the variables are computed here:

    eval "$(python -m feature_repo.environment --registry registry --states states)"
    feast -c feature_repo apply
"""

import argparse
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

REGISTRY = "HT_REGISTRY"
"""URI of the release registry."""
STATES = "HT_STATES"
"""URI of the job's Parquet."""
FEAST_REDIS = "HT_FEAST_REDIS"
"""Redis as Feast wants it, see `connection_string`."""
FEAST_REGISTRY = "HT_FEAST_REGISTRY"
"""SQLAlchemy URL of Feast's own registry."""


def connection_string(redis_url: str) -> str:
    """Feast's form of a Redis URL: redis://:secret@host:6379/1 becomes "host:6379,db=1,password=secret".

    Raises ValueError for another scheme, or for a password that Feast's form cannot carry (it splits at commas).
    """
    url = urlsplit(redis_url)
    if url.scheme not in ("redis", "rediss") or not url.hostname:
        raise ValueError(f"wanted redis://host:port/db or rediss://..., got {redis_url!r}")
    host = url.hostname
    if ":" in host:
        raise ValueError(f"Feast's Redis store splits its address at colons and cannot take the IPv6 address {host}")
    options: dict[str, str] = {}
    if url.path.strip("/"):
        options["db"] = url.path.strip("/")
    if url.scheme == "rediss":
        options["ssl"] = "true"
    if url.username:
        options["username"] = unquote(url.username)
    if url.password:
        options["password"] = unquote(url.password)
    options.update(parse_qsl(url.query))
    for name, value in options.items():
        if "," in value:
            raise ValueError(f"Feast's Redis store splits its settings at commas; {name} holds one")
    return ",".join([f"{host}:{url.port or 6379}", *(f"{name}={value}" for name, value in options.items())])


def feast_environment(registry: str, states: str, redis_url: str, feast_registry: str | None = None) -> dict[str, str]:
    """Variables for `feast -c feature_repo ...`, with paths made absolute (Feast changes its folder while it runs).

    feast_registry: SQLAlchemy URL of Feast's registry; None is SQLite beside the states, or, where those lie in an
    object store, in the current folder.
    """
    states = absolute(states)
    if feast_registry is None:
        folder = Path.cwd() if "://" in states else Path(states)
        feast_registry = f"sqlite:///{folder / 'feast_registry.db'}"
    return {
        REGISTRY: absolute(registry),
        STATES: states,
        FEAST_REDIS: connection_string(redis_url),
        FEAST_REGISTRY: feast_registry,
        "FEAST_USAGE": "False",
    }


def absolute(uri: str) -> str:
    """A local path made absolute, without a file:// prefix and a closing slash; the URI of an object store as it is."""
    if uri.startswith("file://"):
        uri = uri.removeprefix("file://")
    if "://" in uri:
        return uri.rstrip("/")
    return str(Path(uri).expanduser().absolute())


def make_parser(program: str, text: str | None, environ: Mapping[str, str] = os.environ) -> argparse.ArgumentParser:
    """Flags that say where registry, states and Redis are; variables that are set are their defaults."""
    parser = argparse.ArgumentParser(prog=program, description=(text or "").splitlines()[0])
    parser.add_argument("--registry", default=environ.get(REGISTRY), required=REGISTRY not in environ)
    parser.add_argument("--states", default=environ.get(STATES), required=STATES not in environ)
    parser.add_argument("--redis-url", default=environ.get("REDIS_URL"), required="REDIS_URL" not in environ)
    parser.add_argument("--feast-registry", default=environ.get(FEAST_REGISTRY), help="SQLAlchemy URL")
    return parser


def variables(given: argparse.Namespace) -> dict[str, str]:
    """feast_environment of parsed flags; makes a local states folder, beside which Feast's registry lies."""
    if "://" not in absolute(given.states):
        Path(absolute(given.states)).mkdir(parents=True, exist_ok=True)
    return feast_environment(given.registry, given.states, given.redis_url, given.feast_registry)


def main(arguments: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> None:
    """Prints the variables as lines for the shell."""
    given = make_parser("python -m feature_repo.environment", __doc__, environ).parse_args(arguments)
    for name, value in variables(given).items():
        print(f"export {name}={shlex.quote(value)}")


if __name__ == "__main__":
    main()
