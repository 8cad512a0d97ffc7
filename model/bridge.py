"""Bridges: learned maps from the states of one release to those of another.

    <registry>/bridges/<from state version>-<to state version>/   bridge.safetensors, golden.safetensors, manifest.json

While the daily job encodes all users anew for a new release, a user it has not reached has a row of the old state
version only. A bridge makes of that row what the new encoder would about have made of the user. It is optional, fitted
once from users that have both states, never changed, and off unless its study says that it beats what else could be
answered.

Legend: U users, X width of the old states, Y width of the new ones, H hidden units, G golden rows.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError

from model.errors import CheckpointError, DataError, GoldenMismatch, ShapeError
from model.release import Registry, library_versions

FORMAT = 1
GOLDEN_TOLERANCE = 1e-4
"""Largest |difference| of a golden row at load: states are of order 1, another library moves float32 by 1e-6."""

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Bridge:
    """new = old W + b; a residual bridge adds relu(old V + c) O."""

    matrix_XY: Floats
    bias_Y: Floats
    inner_XH: Floats | None = None
    """The three parts of the residual are there together or not at all."""
    inner_bias_H: Floats | None = None
    outer_HY: Floats | None = None

    @property
    def kind(self) -> str:
        """affine or residual."""
        return "affine" if self.inner_XH is None else "residual"

    def apply(self, state_UX: Floats) -> Floats:
        """New states of old ones: f32 [U, Y]. Raises ShapeError on another width."""
        width = len(self.matrix_XY)
        if state_UX.ndim != 2 or state_UX.shape[1] != width:
            raise ShapeError(f"the bridge takes states of shape [U, {width}], got {list(state_UX.shape)}")
        state_UX = state_UX.astype(np.float32, copy=False)
        found_UY: Floats = state_UX @ self.matrix_XY + self.bias_Y
        if self.inner_XH is not None and self.inner_bias_H is not None and self.outer_HY is not None:
            found_UY = found_UY + np.maximum(state_UX @ self.inner_XH + self.inner_bias_H, 0) @ self.outer_HY
        return found_UY


def fit_affine(old_UX: Floats, new_UY: Floats, ridge: float) -> Bridge:
    """The affine map of least squared error, its matrix held small by a ridge; in closed form, in float64.

    With centred states, W = (old' old / U + ridge s I)^-1 old' new / U, where s is the old states' mean variance; the
    bias carries the mean to the mean. Raises ShapeError or DataError.
    """
    _check_pairs(old_UX, new_UY)
    old_mean_X, new_mean_Y = old_UX.mean(0, dtype=np.float64), new_UY.mean(0, dtype=np.float64)
    centred_UX = old_UX - old_mean_X
    covariance_XX = centred_UX.T @ centred_UX / len(old_UX)
    held_XX = ridge * np.trace(covariance_XX) / len(covariance_XX) * np.eye(len(covariance_XX))
    matrix_XY = np.linalg.solve(covariance_XX + held_XX, centred_UX.T @ (new_UY - new_mean_Y) / len(old_UX))
    bias_Y = new_mean_Y - old_mean_X @ matrix_XY
    return Bridge(matrix_XY.astype(np.float32), bias_Y.astype(np.float32))


def fit_residual(
    base: Bridge,
    old_UX: Floats,
    new_UY: Floats,
    held_old_VX: Floats,
    held_new_VY: Floats,
    *,
    hidden: int = 256,
    steps: int = 2000,
    batch: int = 1024,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Bridge:
    """A small network that learns what an affine bridge leaves over; the weights of least error on held-out pairs.

    It starts as the affine bridge itself. Raises ShapeError or DataError.
    """
    _check_pairs(old_UX, new_UY)
    _check_pairs(held_old_VX, held_new_VY)

    def on_device(array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, np.float32)).to(device)

    generator = torch.Generator().manual_seed(seed)
    width = old_UX.shape[1]
    inner_XH = (torch.randn(width, hidden, generator=generator) / width**0.5).to(device).requires_grad_()
    inner_bias_H = torch.zeros(hidden, device=device, requires_grad=True)
    outer_HY = torch.zeros(hidden, new_UY.shape[1], device=device, requires_grad=True)
    old, left = on_device(old_UX), on_device(new_UY - base.apply(old_UX))
    held_old, held_left = on_device(held_old_VX), on_device(held_new_VY - base.apply(held_old_VX))
    optimiser = torch.optim.AdamW([inner_XH, inner_bias_H, outer_HY], lr=1e-3, weight_decay=1e-2)

    def error(old_BX: torch.Tensor, left_BY: torch.Tensor) -> torch.Tensor:
        found_BY = (old_BX @ inner_XH + inner_bias_H).relu() @ outer_HY
        return torch.nn.functional.mse_loss(found_BY, left_BY)

    best_error = float("inf")
    best: list[Floats] = []
    for step in range(steps + 1):
        if step % 100 == 0 or step == steps:
            with torch.no_grad():
                held_error = float(error(held_old, held_left))
            if held_error < best_error:
                best_error = held_error
                best = [part.detach().cpu().numpy().copy() for part in (inner_XH, inner_bias_H, outer_HY)]
        rows = torch.randint(len(old), (min(batch, len(old)),), generator=generator).to(device)
        optimiser.zero_grad()
        error(old[rows], left[rows]).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    if not best:
        raise DataError("the residual bridge found no finite error")
    return Bridge(base.matrix_XY, base.bias_Y, *best)


def unexplained(bridge: Bridge, old_UX: Floats, new_UY: Floats) -> float:
    """Squared error of bridged states as a share of the new states' variance: 0 is exact, 1 as good as their mean."""
    _check_pairs(old_UX, new_UY)
    error = float(((bridge.apply(old_UX) - new_UY) ** 2).sum(dtype=np.float64))
    return error / float(((new_UY - new_UY.mean(0)) ** 2).sum(dtype=np.float64))


def _check_pairs(old_UX: Floats, new_UY: Floats) -> None:
    if old_UX.ndim != 2 or new_UY.ndim != 2 or len(old_UX) != len(new_UY):
        raise ShapeError(f"a bridge is fitted on states of the same users, got {old_UX.shape} and {new_UY.shape}")
    if len(old_UX) < 2:
        raise DataError(f"a bridge needs 2 users with both states at least, got {len(old_UX)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class BridgeManifest:
    """What a stored bridge says of itself."""

    from_state_version: str
    to_state_version: str
    from_release: str
    to_release: str
    from_embedding_version: str
    to_embedding_version: str
    """The head that the study asked; another head on the same states was not measured."""
    kind: str
    is_enabled: bool
    """Whether serving may use it: only where the study found it better than the previous release and the cold start."""
    study: Mapping[str, Any]
    """The study's figures."""
    counts: Mapping[str, int]
    """Users it was fitted on, chosen by and tested on; requests tested."""
    created_at: str
    libraries: Mapping[str, str]
    files: Mapping[str, str]
    """SHA-256 of every file but the manifest."""


@dataclass(frozen=True, slots=True)
class StoredBridge:
    """A bridge as the registry holds it, checked."""

    manifest: BridgeManifest
    bridge: Bridge


def bridge_folder(from_state_version: str, to_state_version: str) -> str:
    """Where a bridge is, below the registry. Raises CheckpointError where these are no state versions."""
    for version in (from_state_version, to_state_version):
        if not re.fullmatch(r"[0-9a-f]{16}", version):
            raise CheckpointError(f"a state version is 16 hex digits, got {version!r}")
    return f"bridges/{from_state_version}-{to_state_version}"


def write_bridge(
    registry: Registry,
    bridge: Bridge,
    golden_GX: Floats,
    *,
    from_release: str,
    to_release: str,
    is_enabled: bool,
    study: Mapping[str, Any],
    counts: Mapping[str, int],
) -> BridgeManifest:
    """Store a bridge between two releases of the registry; it appears whole or not at all, and never changes.

    golden_GX: states to replay at load, of no real user. Raises CheckpointError where there is such a bridge already.
    """
    old, new = registry.manifest(from_release), registry.manifest(to_release)
    tensors = {f.name: value for f in fields(Bridge) if (value := getattr(bridge, f.name)) is not None}
    golden = {"old_GX": golden_GX, "new_GY": bridge.apply(golden_GX)}
    data = {
        "bridge.safetensors": safetensors.numpy.save(_contiguous(tensors)),
        "golden.safetensors": safetensors.numpy.save(_contiguous(golden)),
    }
    manifest = BridgeManifest(
        from_state_version=old.state_version,
        to_state_version=new.state_version,
        from_release=from_release,
        to_release=to_release,
        from_embedding_version=old.embedding_version,
        to_embedding_version=new.embedding_version,
        kind=bridge.kind,
        is_enabled=is_enabled,
        study=dict(study),
        counts=dict(counts),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        libraries=library_versions(),
        files={name: _digest(content) for name, content in data.items()},
    )
    values = {"format": FORMAT, **asdict(manifest)}
    text = json.dumps(values | {"fingerprint": _fingerprint(values)}, indent=1).encode()
    registry.put_folder(
        bridge_folder(old.state_version, new.state_version), {**data, "manifest.json": text}
    )  # the manifest last: readers look for it
    load_bridge(registry, old.state_version, new.state_version)
    return manifest


def load_bridge(registry: Registry, from_state_version: str, to_state_version: str) -> StoredBridge | None:
    """The bridge between two state versions, checked and its golden rows replayed; None where there is none.

    Raises CheckpointError where a file is missing or altered, GoldenMismatch where outputs differ on this machine.
    """
    folder = bridge_folder(from_state_version, to_state_version)
    content = registry.get(f"{folder}/manifest.json")
    if content is None:
        return None
    manifest = _manifest(folder, content)
    if (manifest.from_state_version, manifest.to_state_version) != (from_state_version, to_state_version):
        raise CheckpointError(
            f"{folder} says it leads from {manifest.from_state_version} to {manifest.to_state_version}"
        )
    try:
        bridge = Bridge(**_tensors(registry, folder, manifest, "bridge.safetensors"))
        golden = _tensors(registry, folder, manifest, "golden.safetensors")
        old_GX, wanted_GY = golden["old_GX"], golden["new_GY"]
    except (KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} does not hold the tensors of a bridge: {error}") from None
    found_GY = bridge.apply(old_GX)
    difference = float(np.abs(found_GY - wanted_GY).max()) if found_GY.shape == wanted_GY.shape else float("inf")
    if not difference <= GOLDEN_TOLERANCE:
        raise GoldenMismatch(
            f"{folder} is refused: golden rows differ by {difference:.2g} (tolerance {GOLDEN_TOLERANCE:g})"
        )
    return StoredBridge(manifest, bridge)


def _manifest(folder: str, content: bytes) -> BridgeManifest:
    try:
        values = json.loads(content)
        found = values.pop("fingerprint", None)
        if values.get("format") != FORMAT:
            raise CheckpointError(f"{folder} has format {values.get('format')!r}; this version reads {FORMAT}")
        if found != _fingerprint(values):
            raise CheckpointError(f"manifest.json of {folder} was altered: its fingerprint does not match")
        return BridgeManifest(**{f.name: values[f.name] for f in fields(BridgeManifest)})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"manifest.json of {folder} is not a bridge's: {error!r}") from None


def _tensors(registry: Registry, folder: str, manifest: BridgeManifest, name: str) -> dict[str, Floats]:
    content = registry.get(f"{folder}/{name}")
    if content is None:
        raise CheckpointError(f"{folder} has no {name}")
    if (found := _digest(content)) != manifest.files.get(name):
        raise CheckpointError(
            f"{name} of {folder} was altered or torn: SHA-256 {found[:16]}, "
            f"the manifest says {str(manifest.files.get(name))[:16]}"
        )
    tensors: dict[str, Floats] = safetensors.numpy.load(content)
    return tensors


def _contiguous(tensors: Mapping[str, Floats]) -> dict[str, Floats]:
    return {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _fingerprint(values: Mapping[str, Any]) -> str:
    return _digest(json.dumps(values, sort_keys=True).encode())
