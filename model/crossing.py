"""Candidates against a history's cached keys and values (DCAT): the Transformer runs over a history once, and then over
all candidates of the request, each of which reads the history and itself.

Legend: R requests, E history events of all requests, T tokens of all candidates, D channels, h heads, d channels of a
head, L longest.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.encoder import ROTARY_BASE, Block, Packing, packed_causal_attention, rotate
from model.errors import ConfigError, ShapeError, StateMismatch
from model.kernels.crossing_attention import check_offsets, crossing_attention
from model.kernels.packed_block import finish_products
from model.kernels.quantised_product import FP8, QuantisedBlock

QUANTISED_LIMITS = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
"""Largest magnitude that each dtype of a quantised cache holds."""

Pair = tuple[torch.Tensor, torch.Tensor]
"""Of keys and of values."""


def quantise(x_Ehd: torch.Tensor, request_E: torch.Tensor, requests: int, dtype: torch.dtype) -> Pair:
    """The tensor in 1 byte a number, and f32 [R, h] to multiply it by: rounded to the nearest of its dtype."""
    limit = QUANTISED_LIMITS[dtype]
    largest_Eh = x_Ehd.float().abs().amax(-1)
    largest_Rh = largest_Eh.new_zeros(requests, x_Ehd.shape[1])
    largest_Rh.scatter_reduce_(0, request_E[:, None].expand_as(largest_Eh), largest_Eh, "amax")
    scale_Rh = torch.where(largest_Rh > 0, largest_Rh / limit, 1.0)
    scaled_Ehd = (x_Ehd.float() / scale_Rh[request_E][..., None]).clamp(-limit, limit)
    return (scaled_Ehd.round() if dtype == torch.int8 else scaled_Ehd).to(dtype), scale_Rh


def dequantise(
    x_Ehd: torch.Tensor, scale_Rh: torch.Tensor, request_E: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """What quantise rounded, in another dtype."""
    return (x_Ehd.float() * scale_Rh[request_E][..., None]).to(dtype)


@dataclass(frozen=True, slots=True)
class KeyValueCache:
    """What the context pass leaves of the histories: the keys (rotated to their positions) and values of each layer."""

    layers: tuple[Pair, ...]
    """Of each layer keys and values, [E, h, d]."""
    offsets: torch.Tensor
    """i64 [R + 1], on the CPU: rising from 0 to E."""
    device_offsets: torch.Tensor
    """The same as i32, where the keys are."""
    request_E: torch.Tensor
    """i64 [E], where the keys are: the request of each event."""
    version: str
    """Of the weights that made it."""
    scales: tuple[Pair, ...] = field(default=())
    """Of a quantised cache: what the keys and values of each layer are multiplied by, f32 [R, h]; else empty."""
    read_dtype: torch.dtype | None = None
    """Of a quantised cache: what attention reads, the dtype before. None: what is stored."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored keys and values."""
        return self.layers[0][0].dtype

    @property
    def num_bytes(self) -> int:
        """Of keys, values and scales of all layers."""
        return sum(one.nbytes + two.nbytes for one, two in (*self.layers, *self.scales))

    @property
    def longest(self) -> int:
        """Events of the longest history."""
        return int(self.offsets.diff().max()) if len(self.offsets) > 1 else 0

    @torch.no_grad()
    def quantised(self, dtype: torch.dtype) -> "KeyValueCache":
        """The same in 1 byte a number, for serving: half the bytes of bfloat16; no gradient flows through it.

        dtype: float8_e4m3fn or int8. There is a scale for each request, layer and head (its largest magnitude becomes
        the dtype's), so what a request keeps does not depend on what else is in the batch.
        Raises ConfigError for another dtype and for a cache that is quantised already.
        """
        if dtype not in QUANTISED_LIMITS or self.scales:
            state = "quantised already" if self.scales else f"asked for {dtype}"
            raise ConfigError(f"a cache can be quantised once, to float8_e4m3fn or int8, got one {state}")
        requests = len(self.offsets) - 1
        pairs = [
            tuple(quantise(x, self.request_E, requests, dtype) for x in keys_and_values)
            for keys_and_values in self.layers
        ]
        layers, scales = (tuple((key[i], value[i]) for key, value in pairs) for i in (0, 1))
        return replace(self, layers=layers, scales=scales, read_dtype=self.dtype)

    def read(self, layer: int) -> Pair:
        """Keys and values of a layer as attention takes them."""
        if not self.scales:
            return self.layers[layer]
        pair, scales = self.layers[layer], self.scales[layer]
        assert self.read_dtype is not None
        if pair[0].is_cuda:
            from model.kernels.keys_and_values_triton import widen

            return widen(*pair, *scales, self.request_E, self.read_dtype)
        key, value = (
            dequantise(x, scale, self.request_E, self.read_dtype) for x, scale in zip(pair, scales, strict=True)
        )
        return key, value


def project(block: Block, input_TD: torch.Tensor, packing: Packing) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values, [T, h, d]; queries and keys rotated to their positions."""
    heads, width = block.num_heads, input_TD.shape[1]
    parts = block.qkv(block.attention_norm(input_TD)).chunk(3, -1)
    query, key, value = (part.reshape(len(input_TD), heads, width // heads) for part in parts)
    return rotate(query, packing), rotate(key, packing), value


def project_keys_and_values(block: Block, input_TD: torch.Tensor, packing: Packing) -> Pair:
    """As project, without the queries: a third of the projection is left out."""
    width = input_TD.shape[1]
    both = F.linear(block.attention_norm(input_TD), block.qkv.weight[width:], block.qkv.bias[width:])
    key, value = (part.reshape(len(input_TD), block.num_heads, width // block.num_heads) for part in both.chunk(2, -1))
    return rotate(key, packing), value


def finish(block: Block, input_TD: torch.Tensor, attended_Thd: torch.Tensor) -> torch.Tensor:
    """The block behind its attention: output projection, feed-forward, residuals."""
    hidden_TD = input_TD + block.dropout(block.out(attended_Thd.flatten(1)))
    fed_TD = block.ffn_out(F.gelu(block.ffn_in(block.ffn_norm(hidden_TD))))
    return cast(torch.Tensor, hidden_TD + block.dropout(fed_TD))


def is_half(block: Block, input_TD: torch.Tensor) -> bool:
    """Whether a block that does not drop out computes in bfloat16 or float16 throughout, without autocasting."""
    return (
        not block.training
        and input_TD.dtype in (torch.bfloat16, torch.float16)
        and block.out.weight.dtype == input_TD.dtype
    )


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """One compiled form for all layers."""
    return torch.compile(function)


class _Way(Protocol):
    """How a block is computed around its attention. What its norm gives (`normed`, each way's own) comes from the block
    before, which may make it along with its last sum."""

    def begin(self, input_TD: torch.Tensor) -> Any:
        """What the attention's norm makes of the first block's input."""

    def project(self, input_TD: torch.Tensor, normed: Any, packing: Packing) -> tuple[torch.Tensor, ...]:
        """As the function project."""

    def project_keys_and_values(self, input_TD: torch.Tensor, normed: Any, packing: Packing) -> Pair:
        """As the function project_keys_and_values."""

    def finish(
        self, input_TD: torch.Tensor, attended_Thd: torch.Tensor, following: nn.LayerNorm | None
    ) -> tuple[torch.Tensor, Any]:
        """As the function finish, and what the following block's norm makes of it."""


class _PlainWay:
    """Differentiable, anywhere."""

    def __init__(self, block: Block, is_compiled: bool) -> None:
        parts: tuple[Callable[..., Any], ...] = (project, project_keys_and_values, finish)
        self._block = block
        self._project, self._project_keys_and_values, self._finish = map(compiled, parts) if is_compiled else parts

    def begin(self, input_TD: torch.Tensor) -> None:
        return None

    def project(self, input_TD: torch.Tensor, normed: None, packing: Packing) -> tuple[torch.Tensor, ...]:
        return self._project(self._block, input_TD, packing)  # type: ignore[no-any-return]

    def project_keys_and_values(self, input_TD: torch.Tensor, normed: None, packing: Packing) -> Pair:
        return self._project_keys_and_values(self._block, input_TD, packing)  # type: ignore[no-any-return]

    def finish(
        self, input_TD: torch.Tensor, attended_Thd: torch.Tensor, following: nn.LayerNorm | None
    ) -> tuple[torch.Tensor, None]:
        return self._finish(self._block, input_TD, attended_Thd), None


class _HalfWay:
    """Half precision on CUDA, for inference: the library's products and kernels between them."""

    def __init__(self, block: Block) -> None:
        self._block = block

    def begin(self, input_TD: torch.Tensor) -> torch.Tensor:
        from model.kernels.packed_block_triton import add_norm_kernel

        norm = self._block.attention_norm
        return add_norm_kernel(input_TD, None, None, norm.weight, norm.bias, norm.eps)[1]

    def project(self, input_TD: torch.Tensor, normed: torch.Tensor, packing: Packing) -> tuple[torch.Tensor, ...]:
        return self._rotated(normed, self._block.qkv.weight, self._block.qkv.bias, 3, packing)

    def project_keys_and_values(self, input_TD: torch.Tensor, normed: torch.Tensor, packing: Packing) -> Pair:
        width = input_TD.shape[1]
        key, value = self._rotated(normed, self._block.qkv.weight[width:], self._block.qkv.bias[width:], 2, packing)
        return key, value

    def _rotated(
        self, normed_TD: torch.Tensor, weight_ND: torch.Tensor, bias_N: torch.Tensor, parts: int, packing: Packing
    ) -> tuple[torch.Tensor, ...]:
        """All parts but the last turned, each [T, h, d]."""
        from model.kernels.keys_and_values_triton import rotate_in_place

        heads = self._block.num_heads
        out_TN = F.linear(normed_TD, weight_ND, bias_N)
        rotate_in_place(out_TN, (parts - 1) * heads, packing.cos_Td, packing.sin_Td)
        return out_TN.view(len(out_TN), parts, heads, 2 * packing.cos_Td.shape[-1]).unbind(1)

    def finish(
        self, input_TD: torch.Tensor, attended_Thd: torch.Tensor, following: nn.LayerNorm | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return finish_products(self._block, input_TD, attended_Thd.flatten(1), following)


class CrossingLayer(nn.Module):
    """One pre-norm Transformer block whose weights serve both passes."""

    def __init__(self, block: Block, *, is_compiled: bool = False, product_dtype: torch.dtype | None = None) -> None:
        """is_compiled: norms, rotations, activations and residuals are fused (torch.compile), which takes a while at
        the first sizes they meet; in half-precision inference on CUDA they are kernels of ours.
        product_dtype: see ContextPass."""
        super().__init__()
        if block.bias is not None:
            raise ConfigError("crossing needs blocks without a relative bias: their positions are rotary")
        if product_dtype not in (None, FP8):
            raise ConfigError(f"products may be in the weights' dtype (None) or in {FP8}, got {product_dtype}")
        self.block, self.is_compiled = block, is_compiled
        self._plain, self._half = _PlainWay(block, is_compiled), _HalfWay(block)
        self._quantised = None if product_dtype is None else QuantisedBlock.of(block)

    def way(self, input_TD: torch.Tensor) -> _Way:
        """How the block is computed for such an input."""
        if self._quantised is not None:
            return self._quantised
        is_kernel = self.is_compiled and input_TD.is_cuda and not torch.is_grad_enabled()
        return self._half if is_kernel and is_half(self.block, input_TD) else self._plain

    def read(
        self, event_ED: torch.Tensor, normed: Any, packing: Packing, following: nn.LayerNorm | None
    ) -> tuple[torch.Tensor, Any, Pair]:
        """The context pass of this layer: the events after the block, their following norm, and keys and values."""
        way = self.way(event_ED)
        query, key, value = way.project(event_ED, normed, packing)
        attended_Ehd = packed_causal_attention(query, key, value, packing)
        return *way.finish(event_ED, attended_Ehd, following), (key, value)

    def read_keys_and_values(self, event_ED: torch.Tensor, normed: Any, packing: Packing) -> Pair:
        """Keys and values alone: all that candidates need of the last layer."""
        return self.way(event_ED).project_keys_and_values(event_ED, normed, packing)

    def forward(
        self,
        candidate_TD: torch.Tensor,
        normed: Any,
        packing: Packing,
        read: Callable[[], Pair],
        history_offsets: torch.Tensor,
        tokens: int,
        longest_history: int,
        following: nn.LayerNorm | None,
    ) -> tuple[torch.Tensor, Any]:
        """The crossing pass of this layer: the candidates' tokens after the block, [T, D], and their following norm.

        read: gives the histories' keys and values.
        """
        way = self.way(candidate_TD)
        query, key, value = way.project(candidate_TD, normed, packing)
        attended_Thd = crossing_attention(
            query, key, value, *read(), packing.offsets, history_offsets,
            tokens=tokens, longest_history=longest_history,
        )  # fmt: skip
        return way.finish(candidate_TD, attended_Thd, following)


class ContextPass(nn.Module):
    """The layers: over histories once a request (`forward`), then over its candidates (`cross`).

    Both first work out on the host where everything stands (`Packing.of`, `behind_histories`) and then call `read` and
    `cross_packed`, which wait for nothing and copy nothing from the host: a CUDA graph may hold them.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        version: str | None = None,
        *,
        is_compiled: bool = False,
        is_recomputed: bool = False,
        product_dtype: torch.dtype | None = None,
    ) -> None:
        """version: names all that these weights are; None: their fingerprint as they are now, which training outdates.
        It says nothing of product_dtype: candidates in either may read a cache made in the other, as they may a
        quantised one.

        is_compiled: see CrossingLayer.  is_recomputed: in training, what a layer computes inside is not kept for the
        backward pass but computed again (Chen et al. 2016): less memory, one more forward pass.
        product_dtype: None, or float8_e4m3fn for inference: linear layers but the output projection are products of
        8 bits, of a copy that is made of the weights here and now, where they are; no gradient flows. At 12 layers
        of 768 channels the crossing pass takes a fifth less time than in bfloat16 and is off by 3.3 % in place of
        .8 %: of a request's best 100 candidates 97.6 % stay (decision 26).
        Raises ConfigError.
        """
        super().__init__()
        if not blocks:
            raise ConfigError("crossing needs at least 1 block, got 0")
        self.layers = nn.ModuleList(
            CrossingLayer(block, is_compiled=is_compiled, product_dtype=product_dtype) for block in blocks
        )
        self.version = fingerprint(self) if version is None else version
        self.is_recomputed, self.product_dtype = is_recomputed, product_dtype

    def forward(
        self, event_ED: torch.Tensor, offsets: torch.Tensor, time_us_E: torch.Tensor, *, is_hidden_wanted: bool = False
    ) -> tuple[KeyValueCache, torch.Tensor | None]:
        """Keys and values of every layer; the events after the last one, [E, D], only where they are wanted.

        event_ED: embedded events.  offsets: i64 [R + 1], on the CPU.  time_us_E: i64 [E], on the events' device.
        """
        packing = Packing.of(offsets, event_ED.shape[1] // self._layers()[0].block.num_heads, time_us_E)
        layers, hidden_ED = self.read(event_ED, packing, is_hidden_wanted=is_hidden_wanted)
        return KeyValueCache(layers, offsets, packing.offsets, packing.user_T, self.version), hidden_ED

    def read(
        self, event_ED: torch.Tensor, packing: Packing, *, is_hidden_wanted: bool = False
    ) -> tuple[tuple[Pair, ...], torch.Tensor | None]:
        """As forward, of events whose places are known: the layers of a cache."""
        kept = []
        normed = self._begin(event_ED)
        steps = self._steps()
        for layer, following in steps if is_hidden_wanted else steps[:-1]:
            event_ED, normed, keys_and_values = self._step(layer.read, event_ED, normed, packing, following)
            kept.append(keys_and_values)
        if is_hidden_wanted:
            return tuple(kept), event_ED
        return (*kept, self._step(steps[-1][0].read_keys_and_values, event_ED, normed, packing)), None

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
        return self.cross_packed(candidate_TD, behind_histories(candidate_offsets, cache, tokens), cache, tokens=tokens)

    def cross_packed(
        self, candidate_TD: torch.Tensor, packing: Packing, cache: KeyValueCache, *, tokens: int = 1
    ) -> torch.Tensor:
        """As cross, of candidates whose places are known and a cache that is known to fit."""
        longest = cache.longest
        normed = self._begin(candidate_TD)
        for i, (layer, following) in enumerate(self._steps()):
            candidate_TD, normed = self._step(
                layer, candidate_TD, normed, packing, partial(cache.read, i), cache.device_offsets, tokens, longest,
                following,
            )  # fmt: skip
        return candidate_TD

    def _begin(self, input_TD: torch.Tensor) -> Any:
        return self._step(self._layers()[0].way(input_TD).begin, input_TD)

    def _steps(self) -> list[tuple[CrossingLayer, nn.LayerNorm | None]]:
        """The layers, each with the norm that follows it."""
        layers = self._layers()
        return list(zip(layers, [*(layer.block.attention_norm for layer in layers[1:]), None], strict=True))

    def _step(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if self.product_dtype is not None:
            with torch.no_grad():
                return function(*arguments)
        if self.is_recomputed and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)

    def _layers(self) -> list[CrossingLayer]:
        return cast(list[CrossingLayer], list(self.layers))


def behind_histories(candidate_offsets: torch.Tensor, cache: KeyValueCache, tokens: int) -> Packing:
    """Where the candidates' tokens stand: token j of every candidate at the length of its history plus j.

    candidate_offsets: i64 [R + 1], on the CPU.  Raises ShapeError.
    """
    check_offsets("candidate_offsets", candidate_offsets, int(candidate_offsets[-1]), tokens)
    if len(candidate_offsets) != len(cache.offsets):
        raise ShapeError(
            f"candidate_offsets must be of the cache's {len(cache.offsets) - 1} requests, "
            f"got {len(candidate_offsets) - 1}"
        )
    device, head_dim = cache.device_offsets.device, cache.layers[0][0].shape[-1]
    requests, total = len(candidate_offsets) - 1, int(candidate_offsets[-1])
    start_R1 = candidate_offsets.to(device, non_blocking=True)
    request_T = torch.repeat_interleave(torch.arange(requests, device=device), start_R1.diff(), output_size=total)
    place_T = torch.arange(total, device=device) % tokens
    position_T = cache.device_offsets.diff().long()[request_T] + place_T
    angle_Ld = rotary_angles(torch.arange(cache.longest + tokens), head_dim).to(device, non_blocking=True)
    return Packing(
        offsets=start_R1.int(),
        user_T=request_T,
        position_T=position_T,
        longest=int(candidate_offsets.diff().max()) if requests else 0,
        cos_Td=angle_Ld.cos()[position_T, None],
        sin_Td=angle_Ld.sin()[position_T, None],
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
