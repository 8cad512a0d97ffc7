"""State and request context to user embedding.

Legend: B requests, D width of a token, W = m x D width of a state of m tokens, E embedding width, C context width,
K session limit, M subject limit.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from model.config import TowerConfig
from model.features import GAP_BUCKETS, HOURS, WEEKDAYS, ContextFeatures


class SessionLayer(nn.Module):
    """Recent events that the stored state has not seen: the last one, and an attention pool over all of them."""

    def __init__(self, config: TowerConfig, num_types: int) -> None:
        super().__init__()
        width = config.embedding_dim
        self.scale = width**0.5
        self.type_embedding = nn.Embedding(num_types, width)
        self.gap_embedding = nn.Embedding(GAP_BUCKETS, width)
        for embedding in (self.type_embedding, self.gap_embedding):
            nn.init.normal_(embedding.weight, std=0.02)
        self.query = nn.Linear(config.d_model + width, width)
        self.out = nn.Linear(2 * width, config.context_dim)

    def forward(self, state_BD: torch.Tensor, context: ContextFeatures, item_IE: torch.Tensor) -> torch.Tensor:
        """Returns [B, C]; zeros where the session is empty."""
        # F.embedding, not indexing: its gradient copes with many equal rows (the padding is one)
        event_BKE = F.embedding(context.session_item_BK, item_IE) * self.scale
        event_BKE = event_BKE + self.type_embedding(context.session_type_BK)
        event_BKE = event_BKE + self.gap_embedding(context.session_gap_BK)
        length_B = context.session_length_B
        present_BK = torch.arange(event_BKE.shape[1], device=length_B.device) < length_B[:, None]
        last_B1 = (length_B - 1).clamp(min=0)[:, None]
        last_BE = event_BKE.gather(1, last_B1[..., None].expand(-1, -1, event_BKE.shape[-1])).squeeze(1)
        query_BE = self.query(torch.cat([state_BD, last_BE], -1))
        score_BK = torch.einsum("be,bke->bk", query_BE, event_BKE) / self.scale
        weight_BK = score_BK.masked_fill(~present_BK, -1e9).softmax(-1)
        pooled_BE = torch.einsum("bk,bke->be", weight_BK, event_BKE)
        return self.out(torch.cat([last_BE, pooled_BE], -1)) * (length_B > 0)[:, None]  # type: ignore[no-any-return]


class TokenFusion(nn.Module):
    """The last token, and what a query made from it and the context reads from all tokens of the state.

    One head whose keys are the tokens themselves: a key projection would only multiply the query's.
    """

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        width = config.d_model
        self.tokens = config.state_tokens
        self.scale = width**-0.5
        self.ask = nn.Linear(width + 2 * config.context_dim, width)
        self.give = nn.Linear(width, width)

    def forward(self, state_BW: torch.Tensor, session_BC: torch.Tensor, other_BC: torch.Tensor) -> torch.Tensor:
        """Returns [B, D]."""
        token_BmD = state_BW.reshape(len(state_BW), self.tokens, -1)
        query_BD = self.ask(torch.cat([token_BmD[:, 0], session_BC, other_BC], -1))
        weight_Bm = (torch.einsum("bd,bmd->bm", query_BD, token_BmD) * self.scale).softmax(-1)
        return token_BmD[:, 0] + self.give(torch.einsum("bm,bmd->bd", weight_Bm, token_BmD))  # type: ignore[no-any-return]


class ContextHead(nn.Module):
    """[state, session, context] through an MLP with a linear short cut, L2-normalised.

    State and context are concatenated; an absent part adds zeros, so any subset of the context may be given.
    `cold_state_D` (as wide as a state) stands in for users without a usable row and is learned by state dropout.
    A state of several tokens is fused into one, by the context, before it is joined.
    """

    def __init__(self, config: TowerConfig, num_types: int, column_sizes: list[int]) -> None:
        """num_types, column_sizes: vocabulary sizes with the codes 0 (absent) and 1 (unknown) included."""
        super().__init__()
        self.config = config
        width = config.context_dim
        self.cold_state_D = nn.Parameter(torch.zeros(config.state_width))
        self.session = SessionLayer(config, num_types)
        self.column_embeddings = nn.ModuleList(nn.Embedding(size, width, padding_idx=0) for size in column_sizes)
        self.hour_embedding = nn.Embedding(HOURS, width, padding_idx=0)
        self.weekday_embedding = nn.Embedding(WEEKDAYS, width, padding_idx=0)
        self.age_embedding = nn.Embedding(GAP_BUCKETS, width, padding_idx=0)
        for embedding in (*self.column_embeddings, self.hour_embedding, self.weekday_embedding, self.age_embedding):
            nn.init.normal_(embedding.weight, std=0.02)
            with torch.no_grad():
                embedding.weight[0].zero_()
        self.subject = nn.Linear(config.embedding_dim, width, bias=False)
        self.query = nn.Linear(config.query_dim, width, bias=False) if config.query_dim else None
        self.session_norm = nn.LayerNorm(width)
        self.context_norm = nn.LayerNorm(width)
        self.fusion = TokenFusion(config) if config.state_tokens > 1 else None
        joined = config.d_model + 2 * width
        self.dropout = nn.Dropout(config.dropout)
        self.hidden = nn.Linear(joined, config.head_hidden)
        self.out = nn.Linear(config.head_hidden, config.embedding_dim)
        self.shortcut = nn.Linear(joined, config.embedding_dim, bias=False)
        self.live = nn.Linear(config.head_hidden, 1 + config.live_width) if config.live_width else None
        if self.live is not None:
            with torch.no_grad():  # begin with the count alone (model.live_items): nothing of E, psi's first value 1
                self.live.weight[:2].zero_()
                self.live.bias[:2] = torch.tensor([0.0, 1.0])

    def forward(self, state_BD: torch.Tensor, context: ContextFeatures, item_IE: torch.Tensor) -> torch.Tensor:
        """state_BD: f32 [B, W], the cold state where a user has none. item_IE: f32 [I, E], the item tower's rows.

        Returns f32 [B, E], L2-normalised; with live features f32 [B, E + L], whose first E values are gated and whose
        last L weigh the live part of items (model.live_items), scaled like the cosine: over the temperature they are
        logits.
        In training, parts of the context and whole states are dropped at random.
        """
        if self.training:
            state_BD, context = self._drop(state_BD, context)
        other_BC = self._context(context, item_IE)
        session_BC = self.session_norm(self.session(state_BD[:, : self.config.d_model], context, item_IE))
        other_BC = self.context_norm(other_BC)
        if self.fusion is not None:
            state_BD = self.fusion(state_BD, session_BC, other_BC)
        joined = torch.cat([state_BD, session_BC, other_BC], -1)
        joined = self.dropout(joined)
        hidden = F.gelu(self.hidden(joined))
        user_BE = F.normalize(self.out(hidden) + self.shortcut(joined), dim=-1)
        if self.live is None:
            return user_BE
        weight = self.live(hidden)
        return torch.cat([user_BE * weight[:, :1], weight[:, 1:] * self.config.temperature], -1)

    def _context(self, context: ContextFeatures, item_IE: torch.Tensor) -> torch.Tensor:
        weight_BM = context.subject_weight_BM
        subject_BE = torch.einsum("bm,bme->be", weight_BM, F.embedding(context.subject_item_BM, item_IE))
        total_B1 = weight_BM.sum(-1, keepdim=True)
        other_BC: torch.Tensor = self.subject(subject_BE / total_B1.clamp(min=1.0))
        other_BC = other_BC + self.hour_embedding(context.hour_B) + self.weekday_embedding(context.weekday_B)
        other_BC = other_BC + self.age_embedding(context.age_B)
        for c, embedding in enumerate(self.column_embeddings):
            other_BC = other_BC + embedding(context.category_BC[:, c])
        if self.query is not None:
            other_BC = other_BC + self.query(context.query_BQ)
        return other_BC

    def _drop(self, state_BD: torch.Tensor, context: ContextFeatures) -> tuple[torch.Tensor, ContextFeatures]:
        """Each part of the context goes with chance `context_dropout`, half of that as all parts together."""
        half = self.config.context_dropout / 2
        size, device = len(state_BD), state_BD.device

        def keep(*shape: int) -> torch.Tensor:
            return torch.rand(shape, device=device) >= half

        all_B = keep(size)
        clock_B = all_B & keep(size)
        session_B = all_B & keep(size)
        cold_B = torch.rand(size, device=device) < self.config.state_dropout
        context = replace(
            context,
            category_BC=context.category_BC * (all_B[:, None] & keep(*context.category_BC.shape)),
            hour_B=context.hour_B * clock_B,
            weekday_B=context.weekday_B * clock_B,
            age_B=context.age_B * (all_B & keep(size) & ~cold_B),
            session_length_B=context.session_length_B * session_B,
            subject_weight_BM=context.subject_weight_BM * (all_B & keep(size))[:, None],
            query_BQ=context.query_BQ * (all_B & keep(size))[:, None],
        )
        return torch.where(cold_B[:, None], self.cold_state_D, state_BD), context
