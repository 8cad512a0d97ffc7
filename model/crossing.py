"""Candidates against a history's cached keys and values (DCAT): the Transformer runs over a history once, and then over
all candidates of the request, each of which reads the history and itself.

Legend: R requests, E history events of all requests, T tokens of all candidates, D channels, h heads, d channels of a
head, L longest.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from model.encoder import ROTARY_BASE, Block, Packing, packed_causal_attention, rotate
from model.errors import ConfigError, ShapeError, StateMismatch
from model.kernels.crossing_attention import check_offsets, crossing_attention


@dataclass(frozen=True, slots=True)
class KeyValueCache:
    """What the context pass leaves of the histories: the keys (rotated to their positions) and values of each layer."""

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    """Of each layer keys and values, [E, h, d]."""
    offsets: torch.Tensor
    """i64 [R + 1], on the CPU: rising from 0 to E."""
    device_offsets: torch.Tensor
    """The same as i32, where the keys are."""
    version: str
    """Of the weights that made it."""

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self.layers[0][0].dtype

    @property
    def num_bytes(self) -> int:
        """Of keys and values of all layers."""
        return sum(key.nbytes + value.nbytes for key, value in self.layers)

    @property
    def longest(self) -> int:
        """Events of the longest history."""
        return int(self.offsets.diff().max()) if len(self.offsets) > 1 else 0


class CrossingLayer(nn.Module):
    """One pre-norm Transformer block whose weights serve both passes."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        if block.bias is not None:
            raise ConfigError("crossing needs blocks without a relative bias: their positions are rotary")
        self.block = block

    def project(self, input_TD: torch.Tensor, packing: Packing) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, [T, h, d]; queries and keys rotated to their positions."""
        heads, width = self.block.num_heads, input_TD.shape[1]
        parts = self.block.qkv(self.block.attention_norm(input_TD)).chunk(3, -1)
        query, key, value = (part.reshape(len(input_TD), heads, width // heads) for part in parts)
        return rotate(query, packing), rotate(key, packing), value

    def finish(self, input_TD: torch.Tensor, attended_Thd: torch.Tensor) -> torch.Tensor:
        """The block behind its attention: output projection, feed-forward, residuals."""
        block = self.block
        hidden_TD = input_TD + block.dropout(block.out(attended_Thd.flatten(1)))
        fed_TD = block.ffn_out(F.gelu(block.ffn_in(block.ffn_norm(hidden_TD))))
        return cast(torch.Tensor, hidden_TD + block.dropout(fed_TD))

    def read(self, event_ED: torch.Tensor, packing: Packing) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """The context pass of this layer: the events after the block, and keys and values."""
        query, key, value = self.project(event_ED, packing)
        return self.finish(event_ED, packed_causal_attention(query, key, value, packing)), (key, value)

    def read_keys_and_values(self, event_ED: torch.Tensor, packing: Packing) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values alone: all that candidates need of the last layer. A third of the projection is left out."""
        block, width = self.block, event_ED.shape[1]
        both = F.linear(block.attention_norm(event_ED), block.qkv.weight[width:], block.qkv.bias[width:])
        key, value = (
            part.reshape(len(event_ED), block.num_heads, width // block.num_heads) for part in both.chunk(2, -1)
        )
        return rotate(key, packing), value

    def forward(
        self,
        candidate_TD: torch.Tensor,
        packing: Packing,
        keys_and_values: tuple[torch.Tensor, torch.Tensor],
        history_offsets: torch.Tensor,
        tokens: int,
        longest_history: int,
    ) -> torch.Tensor:
        """The crossing pass of this layer: the candidates' tokens after the block, [T, D]."""
        query, key, value = self.project(candidate_TD, packing)
        attended_Thd = crossing_attention(
            query, key, value, *keys_and_values, packing.offsets, history_offsets,
            tokens=tokens, longest_history=longest_history,
        )  # fmt: skip
        return self.finish(candidate_TD, attended_Thd)


class ContextPass(nn.Module):
    """The layers: over histories once a request (`forward`), then over its candidates (`cross`)."""

    def __init__(self, blocks: Sequence[Block], version: str | None = None) -> None:
        """version: names all that these weights are; None: their fingerprint as they are now, which training outdates.

        Raises ConfigError.
        """
        super().__init__()
        if not blocks:
            raise ConfigError("crossing needs at least 1 block, got 0")
        self.layers = nn.ModuleList(CrossingLayer(block) for block in blocks)
        self.version = fingerprint(self) if version is None else version

    def forward(
        self, event_ED: torch.Tensor, offsets: torch.Tensor, time_us_E: torch.Tensor, *, is_hidden_wanted: bool = False
    ) -> tuple[KeyValueCache, torch.Tensor | None]:
        """Keys and values of every layer; the events after the last one, [E, D], only where they are wanted.

        event_ED: embedded events.  offsets: i64 [R + 1], on the CPU.  time_us_E: i64 [E], on the events' device.
        """
        layers = self._layers()
        packing = Packing.of(offsets, event_ED.shape[1] // layers[0].block.num_heads, time_us_E)
        kept = []
        for layer in layers[:-1]:
            event_ED, keys_and_values = layer.read(event_ED, packing)
            kept.append(keys_and_values)
        hidden_ED = None
        if is_hidden_wanted:
            hidden_ED, keys_and_values = layers[-1].read(event_ED, packing)
        else:
            keys_and_values = layers[-1].read_keys_and_values(event_ED, packing)
        return KeyValueCache((*kept, keys_and_values), offsets, packing.offsets, self.version), hidden_ED

    def cross(
        self, candidate_TD: torch.Tensor, candidate_offsets: torch.Tensor, cache: KeyValueCache, *, tokens: int = 1
    ) -> torch.Tensor:
        """The candidates' tokens after the last layer, [T, D]: what the layers would give for each candidate behind
        its request's history, undivided.

        candidate_TD: embedded tokens, those of a candidate next to one another; its first one stands at the position
        after the history.  candidate_offsets: i64 [R + 1], on the CPU, in tokens: multiples of `tokens`.
        Raises StateMismatch for a cache of other weights, ShapeError.
        """
        if cache.version != self.version:
            raise StateMismatch(f"the cache must be of version {self.version}, got one of {cache.version}")
        if len(cache.layers) != len(self.layers):
            raise ShapeError(f"the cache must have {len(self.layers)} layers, got {len(cache.layers)}")
        packing = _behind_histories(candidate_offsets, cache, tokens)
        for layer, keys_and_values in zip(self._layers(), cache.layers, strict=True):
            candidate_TD = layer(candidate_TD, packing, keys_and_values, cache.device_offsets, tokens, cache.longest)
        return candidate_TD

    def _layers(self) -> list[CrossingLayer]:
        return cast(list[CrossingLayer], list(self.layers))


def _behind_histories(candidate_offsets: torch.Tensor, cache: KeyValueCache, tokens: int) -> Packing:
    """Where the candidates' tokens stand: token j of every candidate at the length of its history plus j."""
    key_Ehd = cache.layers[0][0]
    check_offsets("candidate_offsets", candidate_offsets, int(candidate_offsets[-1]), tokens)
    if len(candidate_offsets) != len(cache.offsets):
        raise ShapeError(
            f"candidate_offsets must be of the cache's {len(cache.offsets) - 1} requests, "
            f"got {len(candidate_offsets) - 1}"
        )
    total = int(candidate_offsets[-1])
    request_T = torch.repeat_interleave(torch.arange(len(candidate_offsets) - 1), candidate_offsets.diff())
    position_T = cache.offsets.diff()[request_T] + torch.arange(total) % tokens
    device = key_Ehd.device
    angle_Td = rotary_angles(position_T, key_Ehd.shape[-1]).to(device)[:, None]
    return Packing(
        offsets=candidate_offsets.to(device, torch.int32),
        user_T=request_T.to(device),
        position_T=position_T.to(device),
        longest=int(candidate_offsets.diff().max()) if len(candidate_offsets) > 1 else 0,
        cos_Td=angle_Td.cos(),
        sin_Td=angle_Td.sin(),
        time_us_T=torch.zeros(total, dtype=torch.int64, device=device),
    )


def rotary_angles(position_T: torch.Tensor, head_dim: int) -> torch.Tensor:
    """f32 [T, d / 2]: those that Packing.of gives such positions."""
    frequency_d = ROTARY_BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return (position_T.double()[:, None] * frequency_d).float()


def fingerprint(module: nn.Module) -> str:
    """SHA-256, shortened, over names, shapes, dtypes and bytes of the weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
