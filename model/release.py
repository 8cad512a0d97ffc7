"""Releases: immutable directories of weights with content fingerprints, golden inputs, and the registry's pointer.

    <registry>/SERVING                  the epoch pointer: which release serves, which may next, which served before
    <registry>/epochs/<epoch>.json      every pointer there was: who moved it, when and how
    <registry>/TOKENS                   the last fencing token issued to a batch run
    <registry>/releases/<release_id>/   manifest.json, *.safetensors, catalogue.parquet, vocabularies.json,
                                        golden.parquet
    <registry>/items/, leases/          item snapshots and servers' leases: model.item_index, model.leases
    <registry>/studies/<name>.json      what was measured of releases, beside them; model.skew, model.bridge
    <registry>/bridges/<from>-<to>/     learned maps between state versions; model.bridge

`state_version` names all that determines a user state, `embedding_version` all that determines the space in which
users and items meet, the scorer included where there is one. Both are SHA-256 over content, computed here and never set
by hand.
"""

import contextlib
import getpass
import hashlib
import importlib.metadata
import io
import json
import logging
import os
import platform
import re
import secrets
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Self, TypeVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import nn
from torch.overrides import TorchFunctionMode

from model.config import TowerConfig
from model.context_head import ContextHead
from model.dataset import DatasetDescription
from model.encoder import Encoder
from model.errors import CheckpointError, ConfigError, GoldenMismatch, PointerConflict, ShapeError
from model.features import Featuriser, Vocabularies
from model.hybrid_tower import HybridTower, build_encoder, build_head
from model.item_tower import ItemEmbedder, ItemShape, ItemTower
from model.records import Context, Event, SubjectItem
from model.retrieval.scorer import InteractionScorer, ScorerConfig
from model.state_codec import StateCodec, as_stored

log = logging.getLogger(__name__)

TOWER_PARTS = ("encoder", "head", "items")
ALL_PARTS = (*TOWER_PARTS, "scorer")
"""What Registry.load loads; a scorer only where the release has one."""
FORMAT = 1
GOLDEN_TOLERANCE = {"float32": 1e-4, "bfloat16": 6e-2}
"""Largest |difference| of a golden output allowed at load, by compute dtype. A state's values are of order 1: another
processor or library build moves float32 by about 1e-6, bfloat16 by about 1e-2; a changed featuriser by 1e-1 and up.
States are compared as the encoder gives them, before a codec rounds them, so that this holds for every codec."""

_STATE_FIELDS = (
    "d_model", "state_tokens", "num_layers", "num_heads", "ffn_factor", "history_limit", "hash_rows", "category_limit",
    "compute_dtype", "storage_codec",
)  # fmt: skip
_STATE_DESCRIPTION = ("user_id_type", "item_id_type", "event_types", "order_column", "event_columns", "item_columns")
_STATE_SOURCES = ("features.py", "encoder.py", "item_tower.py", "state_codec.py")
_EMBEDDING_SOURCES = ("context_head.py", "live_items.py")
_SCORER_SOURCES = ("retrieval/scorer.py", "retrieval/scalars.py", "live_items.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """Which training run a release comes from, and where in it. No version depends on it."""

    run: str
    """Name of one training run; a resumed run keeps it."""
    seed: int
    epoch: int
    """Epochs the weights have seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a release says of itself."""

    release_id: str
    state_version: str
    """16 hex digits: all that determines a user state."""
    embedding_version: str
    """16 hex digits: all that determines the space where user and item embeddings meet."""
    config: TowerConfig
    description: DatasetDescription
    shape: ItemShape
    fingerprints: Mapping[str, str]
    files: Mapping[str, str]
    """SHA-256 of every file but the manifest."""
    created_at: str
    trained_until_us: int
    """Time of the last event that training saw."""
    metrics: Mapping[str, float]
    libraries: Mapping[str, str]
    lineage: Lineage | None = None
    """None for a release that no training run wrote, or one written before runs were named."""
    scorer: ScorerConfig | None = None
    """None where the dot product scores."""

    @property
    def compute_dtype(self) -> str:
        """dtype of the encoder's matrix products."""
        return self.config.compute_dtype

    @property
    def storage_codec(self) -> str:
        """How a state is stored."""
        return self.config.storage_codec

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "format": FORMAT,
            "release_id": self.release_id,
            "state_version": self.state_version,
            "embedding_version": self.embedding_version,
            "compute_dtype": self.compute_dtype,
            "storage_codec": self.storage_codec,
            "golden_tolerance": GOLDEN_TOLERANCE[self.compute_dtype],
            "created_at": self.created_at,
            "trained_until_us": self.trained_until_us,
            "config": self.config.to_dict(),
            "description": self.description.to_dict(),
            "shape": self.shape.to_dict(),
            "fingerprints": dict(self.fingerprints),
            "files": dict(self.files),
            "metrics": dict(self.metrics),
            "libraries": dict(self.libraries),
            "lineage": None if self.lineage is None else asdict(self.lineage),
            "scorer": None if self.scorer is None else self.scorer.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of to_dict. Raises CheckpointError on another format or a missing entry."""
        if values.get("format") != FORMAT:
            raise CheckpointError(f"manifest format {values.get('format')!r}; this version reads {FORMAT}")
        lineage, scorer = values.get("lineage"), values.get("scorer")
        try:
            return cls(
                lineage=None if lineage is None else Lineage(**lineage),
                scorer=None if scorer is None else ScorerConfig.from_dict(scorer),
                config=TowerConfig.from_dict(values["config"]),
                description=DatasetDescription.from_dict(values["description"]),
                shape=ItemShape.from_dict(values["shape"]),
                **{
                    name: values[name]
                    for name in (
                        "release_id", "state_version", "embedding_version", "fingerprints", "files", "created_at",
                        "trained_until_us", "metrics", "libraries",
                    )
                },
            )  # fmt: skip
        except KeyError as error:
            raise CheckpointError(f"the manifest has no entry {error}") from None


@dataclass(frozen=True, slots=True)
class Pointer:
    """Which release serves. Changes only by a put under the registry's lock, each time with a higher epoch."""

    epoch: int = 0
    serving: str | None = None
    prepared: str | None = None
    previous: str | None = None

    def resident(self) -> list[str]:
        """The releases a server keeps loaded, serving first."""
        named = (self.serving, self.prepared, self.previous)
        return list(dict.fromkeys(name for name in named if name is not None))


@dataclass(frozen=True, slots=True)
class PointerChange:
    """One move of the pointer, for people and for the rollback window's length."""

    pointer: Pointer
    action: str
    """prepare, abandon, commit, rollback or close-window."""
    at_us: int
    """By the clock of who moved it; epochs order the moves, clocks do not."""
    by: str
    """user@host."""


@dataclass(frozen=True, slots=True)
class GoldenReport:
    """Largest |difference| between golden outputs computed here and the stored ones, by part."""

    tolerance: float
    differences: Mapping[str, float]

    @property
    def passed(self) -> bool:
        """Whether every difference is within the tolerance (NaN is not)."""
        return all(difference <= self.tolerance for difference in self.differences.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {difference:.2g}" for part, difference in self.differences.items())
        return f"golden outputs differ by at most {parts} (tolerance {self.tolerance:g})"


@dataclass(frozen=True, slots=True)
class GoldenUsers:
    """The users of a release's golden inputs, and what the release made of them when it was written."""

    table: pa.Table
    """Their events, as Featuriser.events takes them."""
    offsets: NDArray[np.int64]
    """i64 [U + 1]."""
    contexts: list[Context]
    history_until_us: list[int | None]
    """None: answered from the cold-start state."""
    state_UD: NDArray[np.float32]
    """As the encoder gave them; the embeddings are made of what the codec leaves of them."""
    embedding_UE: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class GoldenItems:
    """Some rows of a release's item table, as they were when it was written."""

    row_G: NDArray[np.int64]
    embedding_GE: NDArray[np.float32]
    scalar_GS: NDArray[np.float32] | None = None
    """Made up, for the scorer; None where there is none, like the logits."""
    logit_GU: NDArray[np.float32] | None = None
    """What the scorer made of each item, with these scalars, and each golden user."""


class Release:
    """A release in memory: the parts that were asked for, in evaluation mode, on one device."""

    def __init__(
        self,
        manifest: Manifest,
        featuriser: Featuriser,
        golden: pa.Table,
        device: torch.device,
        encoder: Encoder | None,
        head: ContextHead | None,
        items: ItemTower | None,
        scorer: InteractionScorer | None = None,
    ) -> None:
        self.manifest = manifest
        self.featuriser = featuriser
        self.device = device
        self._golden = golden
        self._encoder, self._head, self._items, self._scorer = encoder, head, items, scorer
        self.item_table: torch.Tensor | None = None
        """f32 [I, E], the item tower's rows, where the items part was loaded."""
        for part in (encoder, head, items, scorer):
            if part is not None:
                part.to(device).eval().requires_grad_(False)
        if scorer is not None:
            scorer.embedding_version = manifest.embedding_version
        if items is not None:
            with torch.inference_mode():
                self.item_table = items.table()

    @property
    def config(self) -> TowerConfig:
        """What fixes the weights' shape or meaning."""
        return self.manifest.config

    @property
    def codec(self) -> StateCodec | None:
        """How its states are stored; None for a list of float32."""
        return StateCodec.of(self.config)

    @property
    def encoder(self) -> Encoder:
        """Raises CheckpointError where that part was not loaded; head and items likewise."""
        return _loaded(self._encoder, "encoder")

    @property
    def head(self) -> ContextHead:
        return _loaded(self._head, "head")

    @property
    def items(self) -> ItemTower:
        return _loaded(self._items, "items")

    @property
    def scorer(self) -> InteractionScorer:
        """Carries the release's embedding_version. Raises CheckpointError where the release has none, too."""
        if self.manifest.scorer is None:
            raise CheckpointError(f"release {self.manifest.release_id} has no scorer: the dot product scores its items")
        return _loaded(self._scorer, "scorer")

    @property
    def cold_state(self) -> NDArray[np.float32]:
        """The learned state for missing or unusable rows: f32 [D]."""
        state: NDArray[np.float32] = self.head.cold_state_D.cpu().numpy()
        return state

    @torch.inference_mode()
    def encode(self, table: pa.Table, offsets: NDArray[np.int64]) -> NDArray[np.float32]:
        """User states of packed histories, as Featuriser.events takes them; the latest `history_limit` events count.

        Returns f32 [U, D], before any codec. Raises ShapeError for a user without events.
        """
        events = self.featuriser.events(table, offsets).latest(self.config.history_limit).to(self.device)
        with self._compute():
            state: NDArray[np.float32] = self.encoder.states(events).cpu().numpy()
        return state

    def _compute(self) -> contextlib.AbstractContextManager[Any]:
        if self.manifest.compute_dtype == "bfloat16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    @torch.inference_mode()
    def embed(
        self, states: NDArray[np.float32], contexts: Sequence[Context], history_until_us: Sequence[int | None]
    ) -> NDArray[np.float32]:
        """User embeddings of stored states and request contexts.

        states: f32 [B, D], the cold state where a user has no usable row (history_until_us None there).
        Returns f32 [B, E], L2-normalised. Raises ShapeError on another width.
        """
        if states.ndim != 2 or states.shape[1] != self.config.state_width:
            raise ShapeError(f"states must have shape [B, {self.config.state_width}], got {list(states.shape)}")
        context = self.featuriser.contexts(contexts, history_until_us).to(self.device)
        state_BD = torch.from_numpy(np.ascontiguousarray(states, np.float32)).to(self.device)
        if self.item_table is None:
            raise CheckpointError("embed needs the items part of the release; it was not loaded")
        embedding: NDArray[np.float32] = self.head(state_BD, context, self.item_table).cpu().numpy()
        return embedding

    def golden_users(self) -> GoldenUsers:
        """The golden inputs' users with the stored outputs."""
        users, _ = _split_golden(self._golden)
        table, offsets = _golden_histories(users, self.featuriser)
        return GoldenUsers(
            table,
            offsets,
            [context_from_json(text) for text in users["context"].to_pylist()],
            users["history_until_us"].to_pylist(),
            _matrix(users["state"]),
            _matrix(users["embedding"]),
        )

    def golden_items(self) -> GoldenItems:
        """The golden rows of the item table."""
        _, items = _split_golden(self._golden)
        rows, embeddings = np.array(items["item_row"].to_pylist(), np.int64), _matrix(items["embedding"])
        if self.manifest.scorer is None:
            return GoldenItems(rows, embeddings)
        return GoldenItems(rows, embeddings, _matrix(items["scalars"]), _matrix(items["logits"]))

    @torch.inference_mode()
    def _golden_logits(
        self, user_UE: NDArray[np.float32], embedding_GE: NDArray[np.float32], scalar_GS: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """f32 [G, U]: every golden user with every golden item."""
        feature_GF = np.concatenate([embedding_GE, scalar_GS], 1)
        user, feature = (torch.from_numpy(value).to(self.device) for value in (user_UE, feature_GF))
        logits: NDArray[np.float32] = self.scorer.logits(user, feature)[:, 0].T.cpu().numpy()
        return logits

    def _answered(
        self, state_UD: NDArray[np.float32], history_until_us: Sequence[int | None]
    ) -> NDArray[np.float32]:  # fmt: skip
        """What the head reads for golden users: encoded states as they are stored, or the cold state."""
        is_cold_U1 = [[until is None] for until in history_until_us]
        return np.where(is_cold_U1, self.cold_state[None], as_stored(self.codec, state_UD)).astype(np.float32)

    def verify(self) -> GoldenReport:
        """Replay the golden inputs through the loaded parts."""
        users = self.golden_users()
        differences: dict[str, float] = {}
        if self._encoder is not None:
            differences["states"] = _largest_difference(self.encode(users.table, users.offsets), users.state_UD)
        if self._head is not None and self._items is not None:
            states = self._answered(users.state_UD, users.history_until_us)
            embeddings = self.embed(states, users.contexts, users.history_until_us)
            differences["embeddings"] = _largest_difference(embeddings, users.embedding_UE)
        if self.item_table is not None:
            items = self.golden_items()
            table_rows = self.item_table[torch.from_numpy(items.row_G).to(self.device)].cpu().numpy()
            differences["items"] = _largest_difference(table_rows, items.embedding_GE)
        if self._scorer is not None:
            items = self.golden_items()
            assert items.scalar_GS is not None
            assert items.logit_GU is not None
            found = self._golden_logits(users.embedding_UE, items.embedding_GE, items.scalar_GS)
            differences["scores"] = _largest_difference(found, items.logit_GU)
        return GoldenReport(GOLDEN_TOLERANCE[self.manifest.compute_dtype], differences)


class _Uninitialised(TorchFunctionMode):
    """Modules built under it do not fill their weights. On the meta device that filling would import the compiler,
    seconds of every start."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


Part = TypeVar("Part", bound=nn.Module)


def _loaded(part: Part | None, name: str) -> Part:
    if part is None:
        raise CheckpointError(f"the {name} part of the release was not loaded")
    return part


class Registry:
    """Releases and the serving pointer under one fsspec URI."""

    def __init__(self, uri: str | Path) -> None:
        self.uri = str(uri)
        self.fs, self.root = fsspec.core.url_to_fs(self.uri)
        protocol = self.fs.protocol
        self._is_local = "file" in ((protocol,) if isinstance(protocol, str) else protocol)

    def releases(self) -> list[str]:
        """Ids of all complete releases, oldest first."""
        found = self.fs.glob(f"{self.root}/releases/*/manifest.json")
        return sorted(name for name in (path.split("/")[-2] for path in found) if not name.startswith("."))

    def manifest(self, release_id: str) -> Manifest:
        """Raises CheckpointError where there is no such release, naming those there are."""
        try:
            values = json.loads(self._read(release_id, "manifest.json"))
        except FileNotFoundError:
            there = ", ".join(self.releases()) or "none"
            raise CheckpointError(f"no release {release_id!r} in {self.uri}; there are: {there}") from None
        except ValueError as error:
            raise CheckpointError(f"manifest.json of release {release_id} is not JSON: {error}") from None
        return Manifest.from_dict(values)

    def load(
        self,
        release_id: str,
        *,
        device: str | torch.device = "cpu",
        parts: Collection[str] = ALL_PARTS,
        replay: bool = True,
    ) -> Release:
        """A release in memory, its files checked against their fingerprints and its golden inputs replayed.

        Raises CheckpointError on a missing or altered file, GoldenMismatch where outputs differ on this machine.
        """
        manifest = self.manifest(release_id)
        parts = [part for part in parts if part != "scorer" or manifest.scorer is not None]
        names = [f"{part}.safetensors" for part in parts]
        data = {
            name: self._checked(manifest, name)
            for name in (*names, "vocabularies.json", "catalogue.parquet", "golden.parquet")
        }
        vocabularies = Vocabularies.from_dict(json.loads(data["vocabularies.json"]))
        item_ids = pq.read_table(io.BytesIO(data["catalogue.parquet"]), columns=["item_id"])["item_id"]
        featuriser = Featuriser(manifest.description, vocabularies, item_ids.combine_chunks(), manifest.config)
        built: dict[str, nn.Module | None] = dict.fromkeys(ALL_PARTS)
        with _Uninitialised(), torch.device("meta"):  # weights are assigned below
            if "encoder" in parts:
                built["encoder"] = build_encoder(featuriser, ItemEmbedder(manifest.config, manifest.shape))
            if "head" in parts:
                built["head"] = build_head(featuriser)
            if "items" in parts:
                built["items"] = ItemTower(manifest.config, ItemEmbedder(manifest.config, manifest.shape))
            if "scorer" in parts and manifest.scorer is not None:
                built["scorer"] = InteractionScorer.of(manifest.scorer, manifest.config.embedding_dim)
        for part, module in built.items():
            if module is not None:
                module.load_state_dict(safetensors.torch.load(data[f"{part}.safetensors"]), assign=True)
        release = Release(
            manifest,
            featuriser,
            pq.read_table(io.BytesIO(data["golden.parquet"])),
            torch.device(device),
            **built,  # type: ignore[arg-type]
        )
        if replay:
            report = release.verify()
            if not report.passed:
                raise GoldenMismatch(f"release {release_id} is refused: {report}")
        return release

    def catalogue(self, release_id: str) -> pa.Table:
        """item_id and the declared item columns, in the order of item rows; the file is held to its fingerprint.

        Raises CheckpointError.
        """
        return pq.read_table(io.BytesIO(self._checked(self.manifest(release_id), "catalogue.parquet")))

    def _read(self, release_id: str, name: str) -> bytes:
        if not re.fullmatch(r"[\w.-]+", release_id) or release_id.startswith("."):
            raise CheckpointError(f"a release id holds letters, digits, '-', '_' and '.', got {release_id!r}")
        data: bytes = self.fs.cat_file(f"{self.root}/releases/{release_id}/{name}")
        return data

    def _checked(self, manifest: Manifest, name: str) -> bytes:
        try:
            data = self._read(manifest.release_id, name)
        except FileNotFoundError:
            raise CheckpointError(f"release {manifest.release_id} has no {name}") from None
        found = hashlib.sha256(data).hexdigest()
        if found != manifest.files.get(name):
            raise CheckpointError(
                f"{name} of release {manifest.release_id} was altered or torn: "
                f"SHA-256 {found[:16]}, the manifest says {str(manifest.files.get(name))[:16]}"
            )
        return data

    def write(
        self,
        tower: HybridTower,
        items: pa.Table,
        *,
        trained_until_us: int,
        metrics: Mapping[str, float] | None = None,
        base: str | None = None,
        lineage: Lineage | None = None,
        scorer: tuple[ScorerConfig, InteractionScorer] | None = None,
    ) -> Manifest:
        """Write a release of a trained tower; it appears whole or not at all.

        items: item_id and the declared item columns. base: for a head-only retrain, the release whose encoder was
        kept; its state version carries over. lineage: the training run it comes from. scorer: what scores its items,
        one task; None means the dot product. The embedding version covers it.
        Raises CheckpointError where the encoder is not the base's after all, ConfigError for a scorer of other widths.
        """
        tower = tower.eval()
        featuriser = tower.featuriser
        config, description = featuriser.config, featuriser.description
        columns = ["item_id", *description.item_columns]
        catalogue = items.select(columns).sort_by("item_id").combine_chunks()
        if not catalogue["item_id"].combine_chunks().equals(featuriser.item_ids):
            raise CheckpointError("the items to store are not those the tower was built with")
        vocabularies = json.dumps(featuriser.vocabularies.to_dict(), indent=1).encode()
        data = {
            "encoder.safetensors": _weights(tower.encoder),
            "head.safetensors": _weights(tower.head),
            "items.safetensors": _weights(tower.items),
            "catalogue.parquet": _parquet(catalogue),
            "vocabularies.json": vocabularies,
        }
        item_ids = _digest(_parquet(catalogue.select(["item_id"])))
        fingerprints: dict[str, str] = {
            "encoder": _fingerprint(tower.encoder),
            "head": _fingerprint(tower.head),
            "items": _fingerprint(tower.items),
            "vocabularies": _digest(vocabularies + item_ids.encode()),
            "state_sources": _sources(_STATE_SOURCES),
            "embedding_sources": _sources(_EMBEDDING_SOURCES),
        }
        scorer_config = None
        if scorer is not None:
            scorer_config, module = scorer
            data["scorer.safetensors"] = _weights(module)
            fingerprints["scorer"] = _fingerprint(module)
            fingerprints["scorer_config"] = _version(scorer_config.to_dict())
            fingerprints["scorer_sources"] = _sources(_SCORER_SOURCES)
        if base is not None:
            # The base's golden states hold under today's sources, or it would not have loaded; its name stays.
            before = self.manifest(base).fingerprints
            if before["encoder"] != fingerprints["encoder"] or before["vocabularies"] != fingerprints["vocabularies"]:
                raise CheckpointError(f"the encoder or its vocabularies are not those of the base release {base}")
            fingerprints["state_sources"] = before["state_sources"]
        described, settings = description.to_dict(), config.to_dict()
        state_version = _version(
            {
                "config": {name: settings[name] for name in _STATE_FIELDS},
                "description": {name: described[name] for name in _STATE_DESCRIPTION},
                **{name: fingerprints[name] for name in ("encoder", "vocabularies", "state_sources")},
            }
        )
        embedding_version = _version(
            {"state_version": state_version, "config": settings, "description": described, **fingerprints}
        )
        created = datetime.now(UTC)
        manifest = Manifest(
            release_id=f"{created:%Y%m%dT%H%M%S%f}-{embedding_version[:8]}",  # to the microsecond: ids sort by time
            state_version=state_version,
            embedding_version=embedding_version,
            config=config,
            description=description,
            shape=tower.items.embedder.shape,
            fingerprints=fingerprints,
            files={},
            created_at=created.isoformat(timespec="seconds"),
            trained_until_us=trained_until_us,
            metrics=dict(metrics or {}),
            libraries=library_versions(),
            lineage=lineage,
            scorer=scorer_config,
        )
        release = _in_memory(manifest, featuriser, data)
        data["golden.parquet"] = _parquet(_make_golden(release))
        manifest = replace(manifest, files={name: _digest(content) for name, content in sorted(data.items())})
        self._store(manifest, data)
        self.load(manifest.release_id)
        return manifest

    def _store(self, manifest: Manifest, data: Mapping[str, bytes]) -> None:
        files = {**data, "manifest.json": json.dumps(manifest.to_dict(), indent=1).encode()}
        self.put_folder(f"releases/{manifest.release_id}", files)

    def put_folder(self, name: str, files: Mapping[str, bytes]) -> None:
        """Write a folder below the registry whole or not at all; its last file is the one readers look for.

        Raises CheckpointError where it is there already: such folders never change.
        """
        final = f"{self.root}/{name}"
        parent, _, base = final.rpartition("/")
        staging = f"{parent}/.staging-{base}" if self._is_local else final
        if not self._is_local and self.fs.exists(f"{final}/{list(files)[-1]}"):
            raise CheckpointError(f"{name} is already in {self.uri}")
        self.fs.makedirs(staging, exist_ok=True)
        for file, content in files.items():
            self.fs.pipe_file(f"{staging}/{file}", content)
        if self._is_local:
            for file in files:
                _sync(f"{staging}/{file}")
            try:
                os.rename(staging, final)
            except OSError as error:
                raise CheckpointError(f"{name} is already in {self.uri}: {error}") from error

    def write_study(self, name: str, study: Mapping[str, Any]) -> None:
        """Keep what was measured of a release beside it, in the place of an earlier study of that name."""
        self.put(_study_path(name), json.dumps(study, indent=1).encode())

    def read_study(self, name: str) -> dict[str, Any] | None:
        """A study as it was written; None where there is none. Raises CheckpointError where it is torn."""
        content = self.get(_study_path(name))
        if content is None:
            return None
        try:
            study: dict[str, Any] = json.loads(content)
        except ValueError as error:
            raise CheckpointError(f"study {name} in {self.uri} is not JSON: {error}") from None
        return study

    def pointer(self) -> Pointer:
        """The serving pointer; epoch 0 where nothing was ever committed. Raises CheckpointError where it is torn."""
        try:
            data = self.fs.cat_file(f"{self.root}/SERVING")
        except FileNotFoundError:
            return Pointer()
        try:
            return Pointer(**json.loads(data))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{self.uri}/SERVING is not a pointer: {error}") from None

    def history(self) -> list[PointerChange]:
        """Every move of the pointer, oldest first."""
        current = self.pointer().epoch
        changes = []
        for path in sorted(self._children("epochs")):
            values = json.loads(self.fs.cat_file(path))
            pointer = Pointer(**values["pointer"])
            if pointer.epoch <= current:  # a mover killed before its put leaves a note of a move that never was
                changes.append(PointerChange(pointer, values["action"], values["at_us"], values["by"]))
        return changes

    def prepare(self, release_id: str, *, expected_epoch: int | None = None) -> Pointer:
        """Name the release that may serve next: servers load it, the daily job encodes for it.

        Raises PointerConflict where the epoch is no longer `expected_epoch` or the release serves already,
        CheckpointError for an unknown release.
        """
        self.manifest(release_id)
        with self._lock():
            now = self._expect(expected_epoch)
            if now.serving == release_id:
                raise PointerConflict(f"release {release_id} serves already (epoch {now.epoch})")
            if now.prepared == release_id:
                return now
            return self._put(replace(now, epoch=now.epoch + 1, prepared=release_id), "prepare")

    def abandon(self, *, expected_epoch: int | None = None) -> Pointer:
        """Prepare nothing any more. Raises PointerConflict where the epoch is no longer `expected_epoch`."""
        with self._lock():
            now = self._expect(expected_epoch)
            return (
                now if now.prepared is None else self._put(replace(now, epoch=now.epoch + 1, prepared=None), "abandon")
            )

    def commit(self, release_id: str, *, expected_epoch: int | None = None) -> Pointer:
        """Make a release serve. Committing the serving release again changes nothing.

        Raises PointerConflict where the epoch is no longer `expected_epoch`, CheckpointError for an unknown release.
        """
        self.manifest(release_id)
        with self._lock():
            now = self._expect(expected_epoch)
            if now.serving == release_id:
                return now
            prepared = None if now.prepared == release_id else now.prepared
            return self._put(Pointer(now.epoch + 1, release_id, prepared, now.serving), "commit")

    def rollback(self, *, expected_epoch: int | None = None) -> Pointer:
        """Serve the previous release again; the one that served becomes the previous.

        Raises PointerConflict where the epoch is no longer `expected_epoch` or there is nothing to go back to.
        """
        with self._lock():
            now = self._expect(expected_epoch)
            if now.previous is None:
                raise PointerConflict(f"nothing to roll back to: no release served before {now.serving or 'the first'}")
            self.manifest(now.previous)
            prepared = None if now.prepared == now.previous else now.prepared
            return self._put(Pointer(now.epoch + 1, now.previous, prepared, now.serving), "rollback")

    def close_window(self, *, expected_epoch: int | None = None) -> Pointer:
        """End the rollback window: servers drop the previous release, the daily job stops encoding for it.

        Raises PointerConflict where the epoch is no longer `expected_epoch`.
        """
        with self._lock():
            now = self._expect(expected_epoch)
            if now.previous is None:
                return now
            return self._put(replace(now, epoch=now.epoch + 1, previous=None), "close-window")

    def next_token(self) -> int:
        """A fencing token higher than every one issued before; a batch run writes rows under it."""
        with self._lock():
            path = f"{self.root}/TOKENS"
            token = int(self.fs.cat_file(path)) + 1 if self.fs.exists(path) else 1
            self.put("TOKENS", str(token).encode())
            return token

    def _expect(self, epoch: int | None) -> Pointer:
        now = self.pointer()
        if epoch is not None and now.epoch != epoch:
            raise PointerConflict(f"the pointer is at epoch {now.epoch}, not {epoch}: somebody moved it; look again")
        return now

    def _put(self, pointer: Pointer, action: str) -> Pointer:
        note = {"pointer": asdict(pointer), "action": action, "at_us": time.time_ns() // 1000, "by": _operator()}
        self.put(f"epochs/{pointer.epoch:010d}.json", json.dumps(note).encode())
        self.put("SERVING", json.dumps(asdict(pointer)).encode())
        return pointer

    def put(self, name: str, content: bytes) -> None:
        """Write a file below the registry whole or not at all, over one that stands there."""
        path = f"{self.root}/{name}"
        if not self._is_local:
            self.fs.pipe_file(path, content)  # object stores show an object only when it is complete
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = f"{os.path.dirname(path)}/.{os.path.basename(path)}.{secrets.token_hex(4)}"
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def get(self, name: str) -> bytes | None:
        """A file below the registry; None where there is none."""
        try:
            content: bytes = self.fs.cat_file(f"{self.root}/{name}")
        except FileNotFoundError:
            return None
        return content

    def remove(self, name: str) -> None:
        """Remove a file below the registry, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(f"{self.root}/{name}")

    def names(self, folder: str) -> list[str]:
        """Names of the files and folders in a folder below the registry, sorted; none where it does not exist."""
        return sorted(path.rsplit("/", 1)[-1] for path in self._children(folder))

    def _children(self, folder: str) -> list[str]:
        path = f"{self.root}/{folder}"
        self.fs.invalidate_cache(path)
        try:
            found = [entry.rstrip("/") for entry in self.fs.ls(path, detail=False)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [entry for entry in found if not entry.rsplit("/", 1)[-1].startswith(".")]

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Held while the pointer or the token counter changes; the system frees it when its holder dies."""
        if not self._is_local:
            raise ConfigError(
                f"the pointer in {self.uri} cannot be changed: only registries on a local or mounted file system "
                "have a lock so far; releases can be read from anywhere"
            )
        import fcntl

        os.makedirs(self.root, exist_ok=True)
        with open(f"{self.root}/.lock", "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _operator() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # no name for this user id, as in many containers
        user = str(os.getuid())
    return f"{user}@{platform.node()}"


def _study_path(name: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise CheckpointError(f"a study's name holds letters, digits, '-', '_' and '.', got {name!r}")
    return f"studies/{name}.json"


def library_versions() -> dict[str, str]:
    """Versions that can move a result, for manifests and benchmark records."""
    versions = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("torch", "numpy", "pyarrow"):
        versions[name] = importlib.metadata.version(name)
    return versions


def _weights(module: nn.Module) -> bytes:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    content: bytes = safetensors.torch.save(tensors)
    return content


def _fingerprint(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        array = tensor.detach().cpu().contiguous().numpy()
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _version(content: Mapping[str, Any]) -> str:
    return _digest(json.dumps(content, sort_keys=True).encode())[:16]


def _sources(names: Sequence[str]) -> str:
    folder = Path(__file__).parent
    return _digest(b"\0".join((folder / name).read_bytes() for name in names))


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(None), buffer, compression="zstd")
    content: bytes = buffer.getvalue()
    return content


def _sync(path: str) -> None:
    file: IO[bytes]
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _in_memory(manifest: Manifest, featuriser: Featuriser, data: Mapping[str, bytes]) -> Release:
    """The release as a reader of its files will see it, on the CPU."""
    tower = HybridTower.empty(featuriser, manifest.shape)
    for part in TOWER_PARTS:
        getattr(tower, part).load_state_dict(safetensors.torch.load(data[f"{part}.safetensors"]))
    scorer = None
    if manifest.scorer is not None:
        scorer = InteractionScorer.of(manifest.scorer, manifest.config.embedding_dim)
        try:
            scorer.load_state_dict(safetensors.torch.load(data["scorer.safetensors"]))
        except RuntimeError as error:
            raise ConfigError(f"the scorer is not of the shape that its config and the tower's say: {error}") from None
    device = torch.device("cpu")
    return Release(manifest, featuriser, pa.table({}), device, tower.encoder, tower.head, tower.items, scorer)


# Golden inputs: histories and contexts drawn from the release's own vocabularies, so that they hold no user's data.

_GOLDEN_LENGTHS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610)
_GOLDEN_ITEMS = 32
_GOLDEN_TIME_US = 1_600_000_000_000_000


def _make_golden(release: Release) -> pa.Table:
    """Golden rows: fixed inputs, and what this release makes of them.

    Histories have a random stream of their own: releases of one state version share their canaries' rows, so their
    golden histories must not depend on what their heads read.
    """
    histories, random = np.random.default_rng(20_201_202), np.random.default_rng(20_201_203)
    featuriser = release.featuriser
    limit = release.config.history_limit
    users = []
    for number, length in enumerate(min(length, limit) for length in _GOLDEN_LENGTHS):
        events = _random_events(histories, featuriser, length)
        now_us = events[-1].timestamp_us + int(random.integers(1, 100_000)) * 1_000_000
        context = Context()
        if number % 3:
            session = _random_events(random, featuriser, int(random.integers(1, 6)), events[-1].timestamp_us)
            context = Context(
                features={
                    name: str(random.choice(featuriser.vocabularies.columns[name]))
                    for name in featuriser.head_columns
                    if featuriser.vocabularies.columns[name]
                },
                timestamp_us=max(now_us, session[-1].timestamp_us),
                session_events=tuple(session),
                subject_items=(SubjectItem(session[0].item_id, 0.75),),
                query_vector=random.standard_normal(release.config.query_dim).astype(np.float32)
                if release.config.query_dim
                else None,
            )
        users.append((events, context, None if number % 5 == 4 else events[-1].timestamp_us))
    id_type = featuriser.item_ids.type
    table = pa.table(
        {
            "item_ids": pa.array([[e.item_id for e in events] for events, _, _ in users], pa.list_(id_type)),
            "event_types": pa.array([[e.event_type for e in events] for events, _, _ in users]),
            "timestamps_us": pa.array([[e.timestamp_us for e in events] for events, _, _ in users]),
            **{
                f"column:{name}": pa.array(
                    [[e.columns.get(name) for e in events] for events, _, _ in users], pa.list_(pa.string())
                )
                for name in featuriser.event_columns
            },
            "context": [context_to_json(context) for _, context, _ in users],
            "history_until_us": pa.array([until for _, _, until in users], pa.int64()),
        }
    )
    states = release.encode(*_golden_histories(table, featuriser))
    until_us = table["history_until_us"].to_pylist()
    answered = release._answered(states, until_us)
    embeddings = release.embed(answered, [context for _, context, _ in users], until_us)
    table = table.append_column("state", _lists(states)).append_column("embedding", _lists(embeddings))
    rows = np.unique(random.integers(0, featuriser.num_rows, _GOLDEN_ITEMS))
    assert release.item_table is not None
    item_GE = release.item_table[torch.from_numpy(rows)].numpy()
    items = pa.table({"item_row": rows, "embedding": _lists(item_GE)})
    if release.manifest.scorer is not None:
        shape = (len(rows), release.manifest.scorer.scalars)
        scalars = np.random.default_rng(20_201_204).standard_normal(shape).astype(np.float32)
        logits = release._golden_logits(embeddings, item_GE, scalars)
        items = items.append_column("scalars", _lists(scalars)).append_column("logits", _lists(logits))
    return pa.concat_tables([table, items], promote_options="default")


def _random_events(
    random: np.random.Generator, featuriser: Featuriser, length: int, after_us: int = _GOLDEN_TIME_US
) -> list[Event]:
    """Events of random known items, one in eight of an item the catalogue does not have; gaps from 1 s to 1 month."""
    ids = featuriser.item_ids
    time_us = after_us
    events = []
    for _ in range(length):
        time_us += int(2 ** random.uniform(0, 21.3)) * 1_000_000
        item = ids[int(random.integers(len(ids)))].as_py()
        if random.random() < 0.125:
            item = f"unknown item {random.integers(1000)}" if isinstance(item, str) else -1 - int(random.integers(1000))
        columns = {
            name: str(random.choice(featuriser.vocabularies.columns[name]))
            for name in featuriser.event_columns
            if featuriser.vocabularies.columns[name]
        }
        events.append(Event(item, str(random.choice(featuriser.vocabularies.event_types)), time_us, columns))
    return events


def _golden_histories(users: pa.Table, featuriser: Featuriser) -> tuple[pa.Table, NDArray[np.int64]]:
    lists = users["item_ids"].combine_chunks()
    offsets = np.concatenate([[0], np.cumsum(lists.value_lengths().to_numpy(zero_copy_only=False))]).astype(np.int64)
    columns = {"item_id": "item_ids", "event_type": "event_types", "timestamp_us": "timestamps_us"}
    columns |= {name: f"column:{name}" for name in featuriser.event_columns}
    return pa.table({name: users[stored].combine_chunks().flatten() for name, stored in columns.items()}), offsets


def _split_golden(golden: pa.Table) -> tuple[pa.Table, pa.Table]:
    is_item = pc.is_valid(golden["item_row"])
    return golden.filter(pc.invert(is_item)), golden.filter(is_item)


def _lists(rows: NDArray[np.float32]) -> pa.Array:
    return pa.array(list(rows), pa.list_(pa.float32()))


def _matrix(column: pa.ChunkedArray) -> NDArray[np.float32]:
    return np.array(column.to_pylist(), np.float32)


def _largest_difference(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    if found.shape != wanted.shape:
        return float("inf")
    return float(np.abs(found - wanted).max(initial=0.0))


def context_to_json(context: Context) -> str:
    """A context as JSON text, for golden inputs and fixtures."""
    return json.dumps(
        {
            "features": dict(context.features),
            "timestamp_us": context.timestamp_us,
            "session_events": [[e.item_id, e.event_type, e.timestamp_us] for e in context.session_events],
            "subject_items": [[s.item_id, s.confidence] for s in context.subject_items],
            "query_vector": None if context.query_vector is None else [float(x) for x in context.query_vector],
        }
    )


def context_from_json(text: str) -> Context:
    """The inverse of context_to_json."""
    values = json.loads(text)
    query = values["query_vector"]
    return Context(
        features=values["features"],
        timestamp_us=values["timestamp_us"],
        session_events=tuple(Event(*event) for event in values["session_events"]),
        subject_items=tuple(SubjectItem(*subject) for subject in values["subject_items"]),
        query_vector=None if query is None else np.array(query, np.float32),
    )
