"""Walks over the release protocol (tests/protocol.py): none breaks an invariant, and without any one guard some do."""

from collections.abc import Iterator

import pytest

from tests.protocol import GUARDS, WEIGHTS, Op, Site, open_site, run, search, shrink, walk

EXAMPLES = 150
REMOVAL_EXAMPLES = 400
"""Most examples that the removal of a guard may take to be found; the rarest took 62."""


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with open_site() as site:
        yield site


def test_no_walk_breaks_an_invariant(site: Site) -> None:
    site.counts.clear()
    for seed in range(EXAMPLES):
        violation = run(site, walk(seed))
        if violation is not None:
            pytest.fail(f"walk {seed}:\n" + "\n".join(shrink(site, seed).trace))
    outcomes = {
        "answer EXACT", "answer PREVIOUS_RELEASE", "answer COLD_START", "items", "stale operator refused",
        "operator waits", "run from the future refused", "late write", "write without Redis", "row collected",
        "snapshot collected", "collector killed",
    }  # fmt: skip
    missed = [name for name in (*WEIGHTS, *sorted(outcomes)) if not site.counts[name]]
    assert not missed, f"{EXAMPLES} walks never came through {missed}"


@pytest.mark.parametrize("name", GUARDS)
def test_without_a_guard_a_walk_breaks_an_invariant(site: Site, name: str) -> None:
    guard = GUARDS[name]
    with guard.remove():
        found = search(site, range(REMOVAL_EXAMPLES), guard.breaks)
    assert found is not None, f"nothing breaks without this: {guard.what}"
    assert run(site, walk(found.seed)) is None, "the same walk holds with the guard in place"


def test_a_walk_shrinks_to_the_operations_that_matter(site: Site) -> None:
    """An operator with a stale epoch: three operations are enough, the two moves and what the second saw."""
    with GUARDS["expected_epoch"].remove():
        found = search(site, range(REMOVAL_EXAMPLES), "moves")
        assert found is not None
        violation = shrink(site, found.seed)
    assert violation.invariant == "moves"
    assert len(violation.trace) < len(found.violation.trace)
    assert violation.trace[-1].startswith("moves: ")


def test_a_seed_is_a_walk() -> None:
    assert walk(7) == walk(7) != walk(8)
    assert all(isinstance(op, Op) and op.name in WEIGHTS for op in walk(7))


def test_an_empty_walk_is_quiet(site: Site) -> None:
    assert run(site, []) is None
