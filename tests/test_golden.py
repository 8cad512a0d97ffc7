"""A change that shifts outputs and no shape is refused wherever a release is loaded, by its golden outputs.

Three such changes, each of which a library or a refactoring could bring: categories numbered in another order, a time
unit mistaken, attention scaled otherwise. Nothing else notices them: hashes, versions and shapes all stay.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F

import model.features
from model.context_head import SessionLayer
from model.errors import GoldenMismatch
from model.features import Vocabularies
from model.release import Manifest, Registry
from online.registry import Follower
from pipelines.encode_users import main as encode
from tests.pipelines.job import row, write_rows
from tests.releases import make_release

T = 1_600_000_000


def category_order(patch: pytest.MonkeyPatch) -> None:
    """The values of every categorical column numbered from the other end."""
    read = Vocabularies.from_dict.__func__  # type: ignore[attr-defined]

    def backwards(cls: type[Vocabularies], values: Any) -> Vocabularies:
        known = read(cls, values)
        return Vocabularies(known.event_types, {name: column[::-1] for name, column in known.columns.items()})

    patch.setattr(Vocabularies, "from_dict", classmethod(backwards))


def time_unit(patch: pytest.MonkeyPatch) -> None:
    """Milliseconds taken for seconds."""
    patch.setattr(model.features, "_SECOND_US", 1_000)


def attention_scale(patch: pytest.MonkeyPatch) -> None:
    """Scores scaled by 1 / width instead of 1 / sqrt(width), in the encoder and over the session."""
    attend, build = F.scaled_dot_product_attention, SessionLayer.__init__

    def steeper(query: Any, key: Any, value: Any, **options: Any) -> Any:
        return attend(query, key, value, scale=1.0 / query.shape[-1], **options)

    def built(self: SessionLayer, *args: Any) -> None:
        build(self, *args)
        self.scale = self.scale**2

    patch.setattr(F, "scaled_dot_product_attention", steeper)
    patch.setattr(SessionLayer, "__init__", built)


SHIFTS = (category_order, time_unit, attention_scale)
Shift = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture
def release(tmp_path: Path) -> tuple[Path, Manifest]:
    return tmp_path / "registry", make_release(tmp_path / "registry", seed=3)


@pytest.mark.parametrize("parts", [("encoder",), ("head", "items")])
@pytest.mark.parametrize("shift", SHIFTS)
def test_no_part_loads(
    release: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch, shift: Shift, parts: tuple[str, ...]
) -> None:
    registry, manifest = release
    Registry(registry).load(manifest.release_id, parts=parts)
    shift(monkeypatch)
    with pytest.raises(GoldenMismatch, match="golden outputs differ"):
        Registry(registry).load(manifest.release_id, parts=parts)
    Registry(registry).load(manifest.release_id, parts=parts, replay=False)  # nothing else notices


@pytest.mark.parametrize("shift", SHIFTS)
def test_the_batch_job_writes_nothing(
    release: tuple[Path, Manifest],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    shift: Shift,
    capsys: pytest.CaptureFixture[str],
) -> None:
    registry, manifest = release
    log = write_rows(tmp_path / "a.parquet", [row(u, 10, T + u) for u in range(4)])
    shift(monkeypatch)
    flags = ["--registry", str(registry), "--states", str(tmp_path / "states"), "--no-redis", "--shards", "1"]
    assert encode(["--events", str(log), *flags]) == 1
    assert "golden outputs differ" in capsys.readouterr().err
    assert not list((tmp_path / "states").glob(f"{manifest.state_version}/runs/*"))


@pytest.mark.parametrize("shift", SHIFTS)
def test_the_service_keeps_what_it_has(
    release: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch, shift: Shift
) -> None:
    registry, manifest = release
    refused: list[tuple[str, str]] = []
    follower = Follower(Registry(registry), on_refusal=lambda name, kind: refused.append((name, kind)))
    Registry(registry).commit(manifest.release_id)
    follower.refresh()
    other = make_release(registry, seed=4)
    Registry(registry).commit(other.release_id)
    shift(monkeypatch)
    follower.refresh()
    assert (other.release_id, "golden") in refused
    assert follower.current is not None
    assert follower.current.serving.release_id == manifest.release_id
