"""History to user state: a causal Transformer over packed histories. The user state is the last hidden state, and,
where the config asks for more tokens, what learned queries read from all hidden states up to it.

Legend: U users, T packed events, D channels, W = m x D width of a state of m tokens, h heads, d channels of a head,
L longest history, P distances.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from model.config import TowerConfig
from model.errors import ShapeError
from model.features import GAP_BUCKETS, EventFeatures
from model.item_tower import ItemEmbedder
from model.kernels.causal_attention import causal_attention, is_kernel_taken, last_attention, plan_causal

ROTARY_BASE = 10_000.0
_FAR = -1e4  # in place of minus infinity where SiLU follows


@dataclass(frozen=True, slots=True)
class Packing:
    """Where each packed event stands: computed once a batch, read by every layer."""

    offsets: torch.Tensor
    """i32 [U + 1], on the device."""
    user_T: torch.Tensor
    position_T: torch.Tensor
    longest: int
    cos_Td: torch.Tensor
    sin_Td: torch.Tensor
    time_us_T: torch.Tensor
    plan: torch.Tensor | None = None
    """Of causal attention (plan_causal's), where it takes one."""

    @classmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # reads sizes on the host
    def of(cls, offsets: torch.Tensor, head_dim: int, time_us_T: torch.Tensor) -> "Packing":
        """offsets: i64 [U + 1], on the CPU: sizes are read there, so that nothing waits for the device.

        time_us_T: i64 [T], on the device.
        """
        device = time_us_T.device
        users, events = len(offsets) - 1, int(offsets[-1])
        longest = int(offsets.diff().max()) if users else 0
        start_U1 = offsets.to(device, non_blocking=True)
        user_T = torch.repeat_interleave(torch.arange(users, device=device), start_U1.diff(), output_size=events)
        position_T = torch.arange(events, device=device) - start_U1[user_T]
        frequency = ROTARY_BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angle_Ld = (torch.arange(longest, dtype=torch.float64)[:, None] * frequency).float()
        angle_Ld = angle_Ld.to(device, non_blocking=True)
        offsets = start_U1.int()
        return cls(
            offsets=offsets,
            user_T=user_T,
            position_T=position_T,
            longest=longest,
            cos_Td=angle_Ld.cos()[position_T, None],
            sin_Td=angle_Ld.sin()[position_T, None],
            time_us_T=time_us_T,
            plan=plan_causal(offsets, events, longest, head_dim),
        )


def rotate(vector_Thd: torch.Tensor, packing: Packing, of: torch.Tensor | None = None) -> torch.Tensor:
    """Rotary position embedding (Su et al. 2021, equation 34): attention then sees relative positions only, so a
    history cut at its start keeps the meaning of what is left.

    of: the events that the vectors are of, by default all.
    """
    at_least_single = torch.promote_types(vector_Thd.dtype, torch.float32)
    first, second = vector_Thd.to(at_least_single).chunk(2, -1)
    cos, sin = (x if of is None else x[of] for x in (packing.cos_Td, packing.sin_Td))
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1).to(vector_Thd.dtype)


def packed_causal_attention(
    query_Thd: torch.Tensor, key_Thd: torch.Tensor, value_Thd: torch.Tensor, packing: Packing
) -> torch.Tensor:
    """Softmax attention of each event to its user's events up to and including itself. Returns [T, h, d].

    Half precision on CUDA reads packed histories as they are (`model.kernels.causal_attention`). Elsewhere they are
    laid out padded at their end: a causal mask alone then keeps every real event from reading the padding.
    """
    if query_Thd.is_cuda and query_Thd.dtype in (torch.bfloat16, torch.float16):
        return causal_attention(query_Thd, key_Thd, value_Thd, packing.offsets, packing.longest, packing.plan)
    query, key, value = (_pad(x, packing) for x in (query_Thd, key_Thd, value_Thd))
    out_UhLd = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return out_UhLd[packing.user_T, :, packing.position_T]


def packed_last_attention(
    query_Uhd: torch.Tensor, key_Thd: torch.Tensor, value_Thd: torch.Tensor, packing: Packing,
    bias_UhL: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """packed_causal_attention of each user's last event alone. Returns [U, h, d].

    bias_UhL: added to the scaled dot products, minus infinity behind a history's end.
    """
    if bias_UhL is None and is_kernel_taken(query_Uhd):
        return last_attention(query_Uhd, key_Thd, value_Thd, packing.offsets)
    key, value = (_pad(x, packing) for x in (key_Thd, value_Thd))
    if bias_UhL is None:
        length_U = packing.offsets.diff()
        mask = (torch.arange(packing.longest, device=key.device) < length_U[:, None])[:, None, None]
    else:
        mask = bias_UhL[:, :, None].to(query_Uhd.dtype)
    return F.scaled_dot_product_attention(query_Uhd[:, :, None], key, value, attn_mask=mask)[:, :, 0]


def _pad(x_Thd: torch.Tensor, packing: Packing) -> torch.Tensor:
    users = len(packing.offsets) - 1
    padded = x_Thd.new_zeros(users, packing.longest, *x_Thd.shape[1:])
    padded[packing.user_T, packing.position_T] = x_Thd
    return padded.transpose(1, 2)


def padded_causal_attention(
    query_Thd: torch.Tensor, key_Thd: torch.Tensor, value_Thd: torch.Tensor, packing: Packing, bias_UhLL: torch.Tensor
) -> torch.Tensor:
    """As packed_causal_attention, with a bias added to the scaled dot products. Returns [T, h, d].

    bias_UhLL: of each query (third) to each key (fourth), minus infinity where the key comes later.
    """
    query, key, value = (_pad(x, packing) for x in (query_Thd, key_Thd, value_Thd))
    out_UhLd = F.scaled_dot_product_attention(query, key, value, attn_mask=bias_UhLL.to(query.dtype))
    return out_UhLd[packing.user_T, :, packing.position_T]


def pointwise_causal_attention(
    query_Thd: torch.Tensor,
    key_Thd: torch.Tensor,
    value_Thd: torch.Tensor,
    packing: Packing,
    bias_UhLL: torch.Tensor | None,
) -> torch.Tensor:
    """SiLU of the scaled dot products in place of their softmax, divided by the length of the whole history:
    what attention sums up grows with how often something occurred, where a softmax keeps its share only. [T, h, d].

    Source: HSTU (Zhai et al., Actions speak louder than words, ICML 2024, equation 2). We differ in dividing by the
    events read so far, so that a history cut short means the same as one read to there.
    """
    query, key, value = (_pad(x, packing) for x in (query_Thd, key_Thd, value_Thd))
    score_UhLL = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if bias_UhLL is not None:
        score_UhLL = score_UhLL + bias_UhLL.to(score_UhLL.dtype).clamp_min(_FAR)
    weight_UhLL = F.silu(score_UhLL).tril()
    out_ThD = (weight_UhLL @ value)[packing.user_T, :, packing.position_T]
    return out_ThD / (packing.position_T + 1)[:, None, None].to(out_ThD.dtype)


class RelativeBias(nn.Module):
    """Learned bias of each head for the number of events and the time between a query and a key.

    Source: HSTU (Zhai et al. 2024, section 3.2), there with square roots of the time; ours are powers of two seconds.
    The time is the one between the two events: the time of the request is the context's to tell.
    """

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.limit = config.history_limit
        self.distance_Ph = nn.Parameter(torch.zeros(self.limit, config.num_heads))
        self.time_Gh = nn.Parameter(torch.zeros(GAP_BUCKETS, config.num_heads))

    def forward(self, packing: Packing) -> torch.Tensor:
        """f32 [U, h, L, L]; minus infinity where the key comes after the query."""
        place_L = torch.arange(packing.longest, device=packing.time_us_T.device)
        distance_LL = place_L[:, None] - place_L
        bias_LLh = self.distance_Ph[distance_LL.clamp(0, self.limit - 1)]
        bias_LLh = bias_LLh.masked_fill((distance_LL < 0)[..., None], float("-inf"))
        time_us_UL = _pad(packing.time_us_T[:, None], packing)[:, 0]
        seconds_ULL = (time_us_UL[:, :, None] - time_us_UL[:, None, :]).clamp_min(0) // 1_000_000
        _, exponent_ULL = torch.frexp((seconds_ULL + 1).double())  # as features.gap_bucket
        bucket_ULL = exponent_ULL.long().clamp_max(GAP_BUCKETS - 1)
        return (F.embedding(bucket_ULL, self.time_Gh) + bias_LLh).permute(0, 3, 1, 2)


class PointwiseBlock(nn.Module):
    """HSTU's block (Zhai et al. 2024, equations 1 to 3): pointwise attention, normed and gated, no feed-forward."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        width = config.d_model
        self.num_heads = config.num_heads
        self.norm = nn.LayerNorm(width)
        self.gate_qkv = nn.Linear(width, 4 * width)
        self.bias = RelativeBias(config) if config.relative_bias else None
        self.attended_norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, event_TD: torch.Tensor, packing: Packing
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Returns the events after the block and the layer's keys and values, each [T, h, d]."""
        gate_TD, query_TD, key_TD, value_TD = F.silu(self.gate_qkv(self.norm(event_TD))).chunk(4, -1)
        heads = (len(event_TD), self.num_heads, -1)
        query, key, value = query_TD.reshape(heads), key_TD.reshape(heads), value_TD.reshape(heads)
        query, key = rotate(query, packing), rotate(key, packing)
        bias_UhLL = None if self.bias is None else self.bias(packing)
        attended_TD = pointwise_causal_attention(query, key, value, packing, bias_UhLL).flatten(1)
        event_TD = event_TD + self.out(self.dropout(self.attended_norm(attended_TD) * gate_TD))
        return event_TD, (key, value)


class Block(nn.Module):
    """Pre-norm Transformer block (Xiong et al. 2020)."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        width = config.d_model
        self.num_heads = config.num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.bias = RelativeBias(config) if config.relative_bias else None
        self.out = nn.Linear(width, width)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn_in = nn.Linear(width, config.ffn_factor * width)
        self.ffn_out = nn.Linear(config.ffn_factor * width, width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, event_TD: torch.Tensor, packing: Packing
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Returns the events after the block and the layer's keys and values, each [T, h, d]."""
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)) for part in self.qkv(self.attention_norm(event_TD)).chunk(3, -1)
        )
        query, key = rotate(query, packing), rotate(key, packing)
        if self.bias is None:
            attended_Thd = packed_causal_attention(query, key, value, packing)
        else:
            attended_Thd = padded_causal_attention(query, key, value, packing, self.bias(packing))
        return self._finish(event_TD, attended_Thd.flatten(1)), (key, value)

    def last(self, event_TD: torch.Tensor, packing: Packing) -> torch.Tensor:
        """`forward` of each user's last event alone, [U, D]: keys and values are all that other events are read for."""
        width, last_U = event_TD.shape[1], packing.offsets[1:].long() - 1
        normed_TD = self.attention_norm(event_TD)
        weight_ND, bias_N = self.qkv.weight, self.qkv.bias
        key_value = F.linear(normed_TD, weight_ND[width:], bias_N[width:])
        key, value = key_value.view(len(event_TD), 2, self.num_heads, -1).unbind(1)
        query = F.linear(normed_TD[last_U], weight_ND[:width], bias_N[:width]).view(len(last_U), self.num_heads, -1)
        query, key = rotate(query, packing, last_U), rotate(key, packing)
        bias_UhL = None
        if self.bias is not None:
            bias_UhL = self.bias(packing)[packing.user_T[last_U], :, packing.position_T[last_U]]
        attended_Uhd = packed_last_attention(query, key, value, packing, bias_UhL)
        return self._finish(event_TD[last_U], attended_Uhd.flatten(1))

    def _finish(self, event_TD: torch.Tensor, attended_TD: torch.Tensor) -> torch.Tensor:
        """The events after the block: output projection and feed-forward."""
        event_TD = event_TD + self.dropout(self.out(attended_TD))
        event_TD = event_TD + self.dropout(self.ffn_out(F.gelu(self.ffn_in(self.ffn_norm(event_TD)))))
        return event_TD


class LatentTokens(nn.Module):
    """m - 1 learned queries, each of which attends to the hidden states up to and including an event.

    A query is the same after every event, so one causal attention gives the tokens of every cut of every history at
    once. Keys and queries are rotated: a query may favour how long ago an event was.
    Source: Perceiver's latents (Jaegle et al. 2021); we differ in that the queries read causally, and once.
    """

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        head_dim = config.d_model // config.num_heads
        self.query = nn.Parameter(torch.empty(config.state_tokens - 1, config.num_heads, head_dim))
        nn.init.normal_(self.query)
        self.key_value = nn.Linear(config.d_model, 2 * config.d_model)
        self.norm = nn.LayerNorm(config.d_model)

    def forward(self, hidden_TD: torch.Tensor, packing: Packing) -> torch.Tensor:
        """The latent tokens after every event: [T, (m - 1) x D]."""
        tokens = len(self.query)
        key, value = (part.unflatten(-1, (self.num_heads, -1)) for part in self.key_value(hidden_TD).chunk(2, -1))
        key, value = (part.repeat(1, tokens, 1) for part in (rotate(key, packing), value))
        query = self.query.flatten(0, 1).to(key.dtype).expand(len(hidden_TD), -1, -1)
        read_Thd = packed_causal_attention(rotate(query, packing), key, value, packing)
        return self.norm(read_Thd.reshape(len(hidden_TD), tokens, -1)).flatten(1)  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """Item, event type, time gap and declared event columns, summed; then causal Transformer blocks.

    Source: SASRec (Kang and McAuley 2018) for the shape; we differ in packed histories, rotary positions, pre-norm,
    time gaps, and items known by features and hash as well as by id.
    """

    def __init__(self, config: TowerConfig, embedder: ItemEmbedder, num_types: int, column_sizes: list[int]) -> None:
        """num_types, column_sizes: vocabulary sizes with the codes 0 (absent) and 1 (unknown) included."""
        super().__init__()
        self.config = config
        self.embedder = embedder
        width = config.d_model
        self.type_embedding = nn.Embedding(num_types, width)
        self.gap_embedding = nn.Embedding(GAP_BUCKETS, width)
        self.column_embeddings = nn.ModuleList(nn.Embedding(size, width) for size in column_sizes)
        for embedding in (self.type_embedding, self.gap_embedding, *self.column_embeddings):
            nn.init.normal_(embedding.weight, std=0.02)
        self.dropout = nn.Dropout(config.dropout)
        block = {"softmax": Block, "pointwise": PointwiseBlock}[config.attention]
        self.blocks = nn.ModuleList(block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(width)
        self.latents = LatentTokens(config) if config.state_tokens > 1 else None

    def forward(self, events: EventFeatures) -> torch.Tensor:
        """User state after every event: [T, W]; with one token, the hidden state."""
        hidden_TD = self.with_keys_and_values(events)[0]
        if self.latents is None:
            return hidden_TD
        packing = Packing.of(events.offsets, self.config.d_model // self.config.num_heads, events.time_us_T)
        return torch.cat([hidden_TD, self.latents(hidden_TD, packing).to(hidden_TD.dtype)], -1)

    def embed(
        self, item_T: torch.Tensor, type_T: torch.Tensor, gap_T: torch.Tensor, column_TC: torch.Tensor
    ) -> torch.Tensor:
        """Events before the first block, f32 [T, D]."""
        event_TD: torch.Tensor = self.embedder(item_T) + self.type_embedding(type_T) + self.gap_embedding(gap_T)
        for c, embedding in enumerate(self.column_embeddings):
            event_TD = event_TD + embedding(column_TC[:, c])
        return event_TD

    def with_keys_and_values(
        self, events: EventFeatures
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Hidden states [T, D], and each layer's keys and values, [T, h, d]."""
        packing, event_TD = self._begin(events)
        keys_and_values = []
        for block in self.blocks:
            event_TD, kv = block(event_TD, packing)
            keys_and_values.append(kv)
        return self.norm(event_TD), keys_and_values

    def _begin(self, events: EventFeatures) -> tuple[Packing, torch.Tensor]:
        """Where the events stand, and the events before the first block."""
        packing = Packing.of(events.offsets, self.config.d_model // self.config.num_heads, events.time_us_T)
        return packing, self.dropout(self.embed(events.item_T, events.type_T, events.gap_T, events.column_TC))

    def states(self, events: EventFeatures) -> torch.Tensor:
        """User states after each user's last event, f32 [U, W].

        With one token, the last softmax block is computed for the last events alone: nothing reads what it makes of
        others.

        Raises ShapeError for a user without events: such a user has no state, the head's cold start serves them.
        """
        if not len(events.offsets) > 1 or bool((events.offsets.diff() == 0).any()):
            raise ShapeError("states needs at least one user, and at least one event of every user")
        final = self.blocks[-1]
        if self.latents is not None or not isinstance(final, Block):
            last_U = (events.offsets[1:] - 1).to(events.item_T.device)
            state_UW: torch.Tensor = self(events)[last_U].float()
            return state_UW
        packing, event_TD = self._begin(events)
        for block in self.blocks[:-1]:
            event_TD, _ = block(event_TD, packing)
        state_UD: torch.Tensor = self.norm(final.last(event_TD, packing)).float()
        return state_UD
