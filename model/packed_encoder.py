"""An encoder's inference on CUDA in bfloat16: batches of fixed size, each layer in seven kernels, held by a CUDA graph.

The same function as `Encoder.states`, whose blocks these are: the weights are rounded to bfloat16 once, so is the
residual stream after each block. Batches of a few thousand events stay in the GPU's second-level cache from one kernel
to the next; that they all have one size is what lets one graph serve them all.

Legend: U users, T packed events, D channels, h heads, d channels of a head, L positions.
"""

import bisect
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from model.crossing import rotary_angles
from model.encoder import Block, Encoder
from model.errors import ConfigError, ShapeError
from model.features import EventFeatures
from model.kernels.causal_attention import KERNEL_HEAD_DIMS, causal_attention
from model.kernels.fused_linear import halves, linear, project_rotated

BATCH_TOKENS = 16_384
"""Events of a batch, unless the longest history has more."""


def is_supported(encoder: Encoder) -> bool:
    """Whether the kernels know the encoder's kind: softmax without a relative bias, one state token, head widths."""
    config = encoder.config
    return (
        config.attention == "softmax"
        and not config.relative_bias
        and config.state_tokens == 1
        and config.d_model // config.num_heads in KERNEL_HEAD_DIMS
        and config.d_model % 32 == 0
    )


@dataclass(frozen=True, slots=True)
class Norm:
    """Of a layer norm."""

    weight_D: torch.Tensor
    bias_D: torch.Tensor
    epsilon: float

    @classmethod
    def of(cls, norm: torch.nn.LayerNorm) -> "Norm":
        """In float32."""
        return cls(norm.weight.detach().float(), norm.bias.detach().float(), norm.eps)

    def __call__(self, event_TD: torch.Tensor) -> torch.Tensor:
        """[T, D], in the events' dtype."""
        if event_TD.is_cuda:
            from model.kernels.fused_linear_triton import norm_kernel

            return norm_kernel(event_TD, self.weight_D, self.bias_D, self.epsilon)
        normed = torch.nn.functional.layer_norm(
            event_TD.float(), self.weight_D.shape, self.weight_D, self.bias_D, self.epsilon
        )
        return normed.to(event_TD.dtype)


class PackedBlock:
    """A block's weights as its kernels read them."""

    def __init__(self, block: Block) -> None:
        def pair(layer: torch.nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
            return layer.weight.detach().to(torch.bfloat16), layer.bias.detach().float()

        head_dim = block.out.weight.shape[0] // block.num_heads
        weight, bias = pair(block.qkv)
        self._qkv = halves(weight, head_dim), halves(bias, head_dim)
        self._attention_norm, self._ffn_norm = Norm.of(block.attention_norm), Norm.of(block.ffn_norm)
        self._out, self._ffn_in, self._ffn_out = pair(block.out), pair(block.ffn_in), pair(block.ffn_out)

    def __call__(
        self, event_TD: torch.Tensor, position_T: torch.Tensor, offsets: torch.Tensor, longest: int,
        cos_Ld: torch.Tensor, sin_Ld: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """As Block.forward, bf16 [T, D]."""
        projected = project_rotated(self._attention_norm(event_TD), *self._qkv, position_T, cos_Ld, sin_Ld)
        query, key, value = projected.unbind(1)
        attended_Thd = causal_attention(query, key, value, offsets, longest)
        event_TD = linear(attended_Thd.flatten(1), *self._out, residual_TN=event_TD)
        fed = linear(self._ffn_norm(event_TD), *self._ffn_in, is_gelu=True)
        return linear(fed, *self._ffn_out, residual_TN=event_TD)


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What a graph reads: of B places, those behind the last event hold anything and belong to no user."""

    item_B: torch.Tensor
    type_B: torch.Tensor
    gap_B: torch.Tensor
    column_BC: torch.Tensor
    position_B: torch.Tensor
    offsets: torch.Tensor
    """i32 [users + 1]; users that are not there have no events."""

    def fill(self, events: EventFeatures, position_T: torch.Tensor, part: slice, offsets: torch.Tensor) -> None:
        """With a part of the events, which begins where a user's do."""
        count = part.stop - part.start
        for mine, theirs in (
            (self.item_B, events.item_T), (self.type_B, events.type_T), (self.gap_B, events.gap_T),
            (self.column_BC, events.column_TC), (self.position_B, position_T),
        ):  # fmt: skip
            mine[:count].copy_(theirs[part])
        self.offsets.copy_(offsets)


class PackedEncoder:
    """States of packed histories. Its weights are a copy: they do not follow the encoder's."""

    def __init__(self, encoder: Encoder, *, batch_tokens: int = BATCH_TOKENS) -> None:
        """encoder: on the device that is to encode; on the CPU the same steps run, without kernels or graphs.

        Raises ConfigError for a kind that is not supported.
        """
        if not is_supported(encoder):
            raise ConfigError("a packed encoder needs softmax attention without bias, one token and heads of 32 to 128")
        config = encoder.config
        self.limit, self.batch_tokens = config.history_limit, max(batch_tokens, config.history_limit)
        self._encoder = encoder.eval()
        self.device = encoder.type_embedding.weight.device
        self._blocks = [PackedBlock(block) for block in encoder.blocks if isinstance(block, Block)]
        self._norm = Norm.of(encoder.norm)
        angle_Ld = rotary_angles(torch.arange(self.limit), config.d_model // config.num_heads)
        self._cos_Ld, self._sin_Ld = (x.to(self.device) for x in (angle_Ld.cos(), angle_Ld.sin()))
        self._embed = torch.compile(encoder.embed, dynamic=False) if self.device.type == "cuda" else encoder.embed
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, _Inputs, torch.Tensor]] = {}

    @torch.inference_mode()
    def states(self, events: EventFeatures) -> torch.Tensor:
        """User states after each user's last event, f32 [U, D], on the device. A user's state has the same bits in any
        company.

        Raises ShapeError for a user without events or with more than history_limit.
        """
        length_U = events.offsets.diff().numpy()
        if not len(length_U) or length_U.min() < 1 or length_U.max() > self.limit:
            raise ShapeError(f"states needs at least one user, and 1 to {self.limit} events of every user")
        batches = plan_batches(length_U, self.batch_tokens)
        sorted_U = torch.from_numpy(np.concatenate(batches))
        sorted_events, position_T = self._sorted(events, sorted_U)
        size = 1 << max(max(map(len, batches)) - 1, 15).bit_length()
        offsets = np.zeros((len(batches), size + 1), np.int32)
        for row, users in zip(offsets, batches, strict=True):
            row[1 : len(users) + 1] = np.cumsum(length_U[users])
            row[len(users) + 1 :] = row[len(users)]
        offsets_BU = torch.from_numpy(offsets).to(self.device, non_blocking=True)
        graph, inputs, out = self._graph(size, events.column_TC.shape[1])
        state_UD = torch.empty(len(length_U), self._norm.weight_D.shape[0], device=self.device)
        user, event = 0, 0
        for b, users in enumerate(batches):
            count = int(offsets[b, -1])
            inputs.fill(sorted_events, position_T, slice(event, event + count), offsets_BU[b])
            if graph is None:
                out = self._compute(inputs)
            else:
                graph.replay()
            state_UD[user : user + len(users)] = out[: len(users)]
            user, event = user + len(users), event + count
        return state_UD[torch.empty_like(sorted_U).scatter_(0, sorted_U, torch.arange(user)).to(self.device)]

    def _sorted(self, events: EventFeatures, sorted_U: torch.Tensor) -> tuple[EventFeatures, torch.Tensor]:
        """The events with the users in another order, and each event's position in its history, i64 [T]."""
        length_U, total = events.offsets.diff()[sorted_U], len(events.item_T)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), length_U.cumsum(0)])
        start_U, shift_U, count_U = (
            x.to(self.device, non_blocking=True)
            for x in (offsets[:-1], events.offsets[:-1][sorted_U] - offsets[:-1], length_U)
        )
        place_T = torch.arange(total, device=self.device)
        position_T = place_T - torch.repeat_interleave(start_U, count_U, output_size=total)
        index_T = place_T + torch.repeat_interleave(shift_U, count_U, output_size=total)
        return EventFeatures(
            events.item_T[index_T], events.type_T[index_T], events.gap_T[index_T], events.column_TC[index_T],
            events.time_us_T, offsets,
        ), position_T  # fmt: skip

    def _graph(self, size: int, columns: int) -> tuple[torch.cuda.CUDAGraph | None, _Inputs, torch.Tensor]:
        """The graph for up to so many users a batch, captured where there is none yet; on the CPU none."""
        if size in self._graphs:
            return self._graphs[size]
        tokens, device = self.batch_tokens, self.device
        item, kind, gap, position = torch.zeros(4, tokens, dtype=torch.int64, device=device)
        inputs = _Inputs(
            item, kind, gap, torch.zeros(tokens, columns, dtype=torch.int64, device=device), position,
            torch.zeros(size + 1, dtype=torch.int32, device=device),
        )  # fmt: skip
        if device.type != "cuda":
            return None, inputs, torch.empty(0)
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._compute(inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self._compute(inputs)
        self._graphs[size] = graph, inputs, out
        return graph, inputs, out

    def _compute(self, inputs: _Inputs) -> torch.Tensor:
        event_TD = self._embed(inputs.item_B, inputs.type_B, inputs.gap_B, inputs.column_BC).to(torch.bfloat16)
        hidden_TD = self.run(event_TD, inputs.position_B, inputs.offsets)
        return self._norm(hidden_TD[(inputs.offsets[1:].long() - 1).clamp_min(0)].float())

    def run(self, event_TD: torch.Tensor, position_T: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Embedded events through the blocks: bf16 [T, D]. position_T: i64.  offsets: i32 [U + 1], on the device."""
        for block in self._blocks:
            event_TD = block(event_TD, position_T, offsets, self.limit, self._cos_Ld, self._sin_Ld)
        return event_TD


def plan_batches(length_U: NDArray[np.int64], tokens: int) -> list[NDArray[np.int64]]:
    """Users in batches of at most so many events: the longest first, each where it leaves the least room (best fit).

    Every user is in one batch; none may have more than `tokens` events.
    """
    batches: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # of the batches that are not full: room and number, rising
    for user in np.argsort(-length_U, kind="stable").tolist():
        length = int(length_U[user])
        place = bisect.bisect_left(rooms, (length, 0))
        if place < len(rooms):
            room, number = rooms.pop(place)
        else:
            room, number = tokens, len(batches)
            batches.append([])
        batches[number].append(user)
        if room > length:
            bisect.insort(rooms, (room - length, number))
    return [np.array(batch) for batch in batches]
