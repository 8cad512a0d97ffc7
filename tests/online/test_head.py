"""The serving head computes what the release computes, or refuses to exist."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.config import TowerConfig
from model.errors import GoldenMismatch
from model.records import Context, Event
from model.release import Registry, Release
from online.head import ServingHead
from tests.online.conftest import World
from tests.online.helpers import NOW_US, context_of
from tests.releases import SMALL, make_description, make_release


def load(folder: Path, config: TowerConfig, ids: str = "int64") -> Release:
    manifest = make_release(folder, seed=4, config=config, description=make_description(ids=ids))
    return Registry(folder).load(manifest.release_id, parts=("head", "items"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"query_dim": 5, "embedding_dim": 24, "context_dim": 10},
        {"state_tokens": 3, "context_dim": 10},
        {"live_windows_h": (1.0, 3.0)},
        {"state_tokens": 2, "live_windows_h": (1.0, 3.0)},
    ],
)
@pytest.mark.parametrize("ids", ["int64", "string"])
def test_it_equals_the_module(tmp_path: Path, changes: dict[str, Any], ids: str) -> None:
    release = load(tmp_path, replace(SMALL, **changes), ids)
    if release.head.live is not None:
        torch.nn.init.normal_(release.head.live.weight)  # it begins with no weight on the E values
    head = ServingHead(release)
    random = np.random.default_rng(0)
    contexts = [context_of(user) for user in range(40)] if ids == "int64" else [Context({"device": "tv"}, NOW_US)] * 40
    if release.config.query_dim:
        contexts = [replace(c, query_vector=random.standard_normal(5).astype(np.float32)) for c in contexts]
    contexts[0] = Context(timestamp_us=NOW_US, session_events=(Event(1 if ids == "int64" else "x", "?", NOW_US),) * 9)
    states = random.standard_normal((40, release.config.state_width)).astype(np.float32)
    until_us = [None if n % 3 == 0 else NOW_US - n * 10**9 for n in range(40)]
    wanted = release.embed(states, contexts, until_us)
    np.testing.assert_allclose(head.embed(states, contexts, until_us), wanted, rtol=1e-6, atol=2e-6)
    for n in range(40):
        alone = head.embed(states[n : n + 1], [contexts[n]], [until_us[n]])
        np.testing.assert_allclose(alone[0], wanted[n], rtol=1e-6, atol=2e-6)
    np.testing.assert_array_equal(head.cold_state, release.cold_state)


@pytest.mark.parametrize(
    "name", ["hidden.weight", "out.bias", "shortcut.weight", "session.query.weight", "session_norm.weight",
             "hour_embedding.weight", "age_embedding.weight", "column_embeddings.1.weight", "subject.weight"],
)  # fmt: skip
def test_a_head_that_differs_is_refused(built_world: World, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Whatever part goes wrong in the copy, the comparison at load sees it."""
    release = Registry(built_world.registry).load(built_world.b.release_id, parts=("head", "items"), replay=False)
    _check_refusal(release, name, monkeypatch)


@pytest.mark.parametrize("name", ["ask.weight", "ask.bias", "give.weight", "give.bias"])
def test_a_fusion_of_tokens_that_differs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    _check_refusal(load(tmp_path, replace(SMALL, state_tokens=2)), f"fusion.{name}", monkeypatch)


def _check_refusal(release: Release, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A serving head whose module is changed after its arrays were copied does not come to exist."""
    check = ServingHead._check

    def disturb_then_check(self: ServingHead, of: Release) -> None:
        with torch.no_grad():
            dict(of.head.named_parameters())[name].mul_(1.5).add_(0.1)
        check(self, of)

    with pytest.raises(GoldenMismatch, match="serving head differs"):
        _build_with_copies(release, disturb_then_check, monkeypatch)


def _build_with_copies(release: Release, check: object, monkeypatch: pytest.MonkeyPatch) -> ServingHead:
    """A serving head whose arrays do not share memory with the module."""
    import online.head as module

    plain = module._array
    monkeypatch.setattr(module, "_array", lambda tensor: plain(tensor).copy())
    monkeypatch.setattr(ServingHead, "_check", check)
    return ServingHead(release)
