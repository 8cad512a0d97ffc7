"""An encoder's inference on CUDA in bfloat16: batches of fixed size, held by a CUDA graph.

The same function as `Encoder.states`, whose blocks these are: the weights are rounded to bfloat16 once, so is the
residual stream after each block. That batches all have one size is what lets one graph serve them all.

Legend: U users, T packed events, B events of a batch, D channels, h heads, d channels of a head, L positions.
"""

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from model.crossing import rotary_angles
from model.encoder import Block, Encoder
from model.errors import ConfigError, ShapeError
from model.features import EventFeatures
from model.kernels.causal_attention import KERNEL_HEAD_DIMS, causal_attention, last_attention, plan_causal
from model.kernels.packed_block import between, stack

LAST_ROWS = 1024
"""Of the last block's products, however many users: a library chooses how it sums by a product's shape."""
_TILES_OF_EVENTS = 132 * 128
"""One tile of the kernels for each multiprocessor of a Hopper."""


def choose_batch_tokens(width: int) -> int:
    """Events of a batch, unless the longest history has more: whole rounds of tiles, so that no processor waits.

    Four rounds up to 256 channels, where what a kernel costs besides its tiles weighs (10.95 ms for 1,024 users on an
    H200, 11.35 with two); three above, where a round takes four times as long (64.2 ms at 512, 66.2 with two, 65.4 with
    four).
    """
    return (4 if width <= 256 else 3) * _TILES_OF_EVENTS


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


class PackedEncoder:
    """States of packed histories. Its weights are a copy: they do not follow the encoder's."""

    def __init__(self, encoder: Encoder, *, batch_tokens: int | None = None) -> None:
        """batch_tokens: None for choose_batch_tokens; a longest history that has more has its way.

        encoder: on the device that is to encode; on the CPU the same steps run, without kernels or graphs.

        Raises ConfigError for a kind that is not supported.
        """
        if not is_supported(encoder):
            raise ConfigError("a packed encoder needs softmax attention without bias, one token and heads of 32 to 128")
        config = encoder.config
        tokens = choose_batch_tokens(config.d_model) if batch_tokens is None else batch_tokens
        self.limit, self.batch_tokens = config.history_limit, max(tokens, config.history_limit)
        encoder = copy.deepcopy(encoder).eval()
        self.device, self._width = encoder.type_embedding.weight.device, config.d_model
        blocks = [block for block in encoder.blocks if isinstance(block, Block)]
        self._heads, self._tails, self._lacking_D = stack(blocks, torch.bfloat16)
        self._norm = encoder.norm.float()
        angle_Ld = rotary_angles(torch.arange(self.limit), config.d_model // config.num_heads)
        self._cos_Ld, self._sin_Ld = (x.to(self.device) for x in (angle_Ld.cos(), angle_Ld.sin()))
        self._encoder = encoder
        self._begin: Callable[[torch.Tensor], torch.Tensor] = self._embedded
        self._end: Callable[[torch.Tensor], torch.Tensor] = self._normed
        if self.device.type == "cuda":
            self._begin, self._end = (torch.compile(step, dynamic=False) for step in (self._begin, self._end))
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph | None, torch.Tensor, torch.Tensor]] = {}

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
        size = 1 << max(max(map(len, batches)) - 1, 15).bit_length()
        offsets, begins, outs = lay_out(length_U, batches, size)
        offsets_BU, begin_BU, out_U = (torch.from_numpy(x).to(self.device) for x in (offsets, begins, outs))
        row_BE, position_BE = self._places(offsets_BU, begin_BU)
        columns = (events.item_T, events.type_T, events.gap_T, *events.column_TC.unbind(1))
        staged = [*(x[row_BE].int() for x in columns), position_BE, offsets_BU]
        staged_BX = torch.cat(staged, 1)
        graph, input_X, out_XUD = self._graph(size, staged_BX.shape[1])
        last_XBUD = out_XUD.new_empty(2, len(batches), size, self._width)
        for b in range(len(batches)):
            input_X.copy_(staged_BX[b])
            if graph is None:
                out_XUD = self._compute(input_X, size)
            else:
                graph.replay()
            last_XBUD[:, b] = out_XUD
        last_XUD = last_XBUD.flatten(1, 2)[:, out_U]
        return torch.cat([self._finished(*part_XUD) for part_XUD in torch.split(last_XUD, LAST_ROWS, 1)])

    def _finished(self, last_UD: torch.Tensor, attended_UD: torch.Tensor) -> torch.Tensor:
        """States, f32 [U, D], of at most LAST_ROWS users: what comes after the last block's attention, and the norm."""
        missing = LAST_ROWS - len(last_UD)
        last_RD, attended_RD = (F.pad(x, (0, 0, 0, missing)) for x in (last_UD, attended_UD))
        angles = self._cos_Ld.new_zeros(LAST_ROWS, dtype=torch.int32), self._cos_Ld, self._sin_Ld
        return self._end(between(last_RD, attended_RD, self._tails[-1], None, *angles)[0])[: len(last_UD)]

    def _places(self, offsets_BU: torch.Tensor, begin_BU: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of every batch the event at each place, i64, and its position in its history, i32: [batches, B].

        Places behind a batch's last event hold the first event, at position 0, and belong to no user.
        """
        place_BE = torch.arange(self.batch_tokens, device=self.device, dtype=torch.int32).repeat(len(offsets_BU), 1)
        slot_BE = torch.searchsorted(offsets_BU, place_BE, right=True).clamp_max(begin_BU.shape[1]) - 1
        is_event = place_BE < offsets_BU[:, -1:]
        position_BE = torch.where(is_event, place_BE - offsets_BU.gather(1, slot_BE), 0)
        return torch.where(is_event, begin_BU.gather(1, slot_BE) + position_BE, 0), position_BE

    def _graph(self, size: int, inputs: int) -> tuple[torch.cuda.CUDAGraph | None, torch.Tensor, torch.Tensor]:
        """The graph for up to so many users a batch, its inputs and its output, captured where there is none yet.

        Inputs: i32, as _compute takes them. On the CPU there is no graph.
        """
        if size in self._graphs:
            return self._graphs[size]
        input_X = torch.zeros(inputs, dtype=torch.int32, device=self.device)
        if self.device.type != "cuda":
            return None, input_X, torch.empty(0, dtype=torch.bfloat16)
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._compute(input_X, size)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self._compute(input_X, size)
        self._graphs[size] = graph, input_X, out
        return self._graphs[size]

    def _compute(self, input_X: torch.Tensor, size: int) -> torch.Tensor:
        """Bf16 [2, size, D], as `run`; of users that are not there, anything.

        input_X: i32, one after another: item, type, gap and columns of every event, its position, and the offsets of
        the users, [size + 1].
        """
        input_CE, offsets = input_X[: -size - 1].view(-1, self.batch_tokens), input_X[-size - 1 :]
        return self.run(self._begin(input_CE), input_CE[-1], offsets)

    def _embedded(self, input_CE: torch.Tensor) -> torch.Tensor:
        item, kind, gap, *columns, _ = input_CE.long().unbind()
        column_BC = torch.stack(columns, 1) if columns else item.new_empty(len(item), 0)
        return self._encoder.embed(item, kind, gap, column_BC).to(torch.bfloat16)

    def _normed(self, last_UD: torch.Tensor) -> torch.Tensor:
        return self._norm(last_UD.float() + self._lacking_D)  # type: ignore[no-any-return]

    def run(self, event_TD: torch.Tensor, position_T: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Embedded events through the blocks, up to the last block's attention of each user's last event: that event,
        without the biases that the stream lacks, and what it attended to, bf16 [2, U, D].

        event_TD is not to be read afterwards.  position_T: i32.  offsets: i32 [U + 1], on the device.
        """
        angles, count = (position_T, self._cos_Ld, self._sin_Ld), offsets[-1:]
        plan = plan_causal(offsets, len(event_TD), self.limit, 2 * self._cos_Ld.shape[1])
        event_TD, projected = between(event_TD, None, None, self._heads[0], *angles, count=count)
        for tail, head in zip(self._tails[:-1], self._heads[1:], strict=True):
            assert projected is not None
            query_Thd, key_Thd, value_Thd = projected.unbind(1)
            attended_Thd = causal_attention(query_Thd, key_Thd, value_Thd, offsets, self.limit, plan)
            event_TD, projected = between(event_TD, attended_Thd.flatten(1), tail, head, *angles, count=count)
        assert projected is not None
        query_Thd, key_Thd, value_Thd = projected.unbind(1)
        last_U = (offsets[1:].long() - 1).clamp_min(0)
        attended_Uhd = last_attention(query_Thd[last_U], key_Thd, value_Thd, offsets)
        return torch.stack([event_TD[last_U], attended_Uhd.flatten(1)])


def lay_out(
    length_U: NDArray[np.int64], batches: Sequence[NDArray[np.int64]], size: int
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """Of each batch, with up to `size` users: where they end, i32 [batches, size + 1], and where their events begin
    among all, i64 [batches, size]; of each user the place of its state, i64 [U]. Users that are not there have no
    events."""
    users, counts = np.concatenate(batches), np.array([len(batch) for batch in batches])
    batch_U = np.repeat(np.arange(len(batches)), counts)
    slot_U = np.arange(len(users)) - np.repeat(np.cumsum(counts) - counts, counts)
    offsets = np.zeros((len(batches), size + 1), np.int32)
    offsets[batch_U, slot_U + 1] = length_U[users]
    begins = np.zeros((len(batches), size), np.int64)
    begins[batch_U, slot_U] = (np.cumsum(length_U) - length_U)[users]
    outs = np.empty(len(users), np.int64)
    outs[users] = batch_U * size + slot_U
    return offsets.cumsum(1, dtype=np.int32), begins, outs


def plan_batches(length_U: NDArray[np.int64], tokens: int) -> list[NDArray[np.int64]]:
    """Users in batches of at most so many events: the longest while they fit, then the shortest, longer ones first.

    Every user is in one batch; none may have more than `tokens` events.
    """
    order_U = np.argsort(-length_U, kind="stable")
    until_U = np.cumsum(length_U[order_U])
    batches = []
    first, last, before = 0, len(order_U), 0
    while first < last:
        middle = min(int(np.searchsorted(until_U, before + tokens, "right")), last)
        end = until_U[last - 1]
        room = before + tokens - until_U[middle - 1]
        rest = max(middle, int(np.searchsorted(until_U[:last], end - room)) + 1)
        batches.append(np.concatenate([order_U[first:middle], order_U[rest:last]]))
        first, last, before = middle, rest, until_U[middle - 1]
    return batches
