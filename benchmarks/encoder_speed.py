"""The batch encoder on a GPU: users a second of packed histories, beside what a user would pick today and the floor.

python -m benchmarks.encoder_speed --device cuda [--only d256] [--tune] [--no-record]
python -m benchmarks.encoder_speed --device cpu --quick     # checks the logic on tiny shapes; measures nothing

1,024 users, log-normal lengths of 8 to 2,048 events, bfloat16. Ours is `PackedEncoder.states`, from features on the GPU
to states on the GPU: sorting into batches and the embedding of events are within its time; of the rivals, which get
embedded events, they are not. Rivals are the same blocks under torch.compile: packed with the library's variable-length
attention, padded within batches of like lengths, padded to 2,048. All are checked against float64 first and timed in
turn. The floor is that of the products alone at 793 TFLOP/s.

Legend: U users, T events, D channels, h heads, d channels of a head, L longest.
"""

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from benchmarks.dcat import MATMUL_FLOPS_PER_S, Step, graphed, median_ms, off
from benchmarks.dcat_stack import fixed_sizes, library_attention, wait
from benchmarks.results import record, versions
from model.config import TowerConfig
from model.crossing import finish, project, rotary_angles
from model.dataset import DatasetDescription
from model.encoder import Block, Encoder, Packing
from model.features import GAP_BUCKETS, EventFeatures, Vocabularies
from model.hybrid_tower import HybridTower
from model.kernels.packed_block import Head, Tail, between, between_products, between_reference
from model.packed_encoder import PackedEncoder, choose_batch_tokens, plan_batches

THEME = "dcat"
BUCKET_TOKENS = 131_072
LONGEST = 2048
DESCRIPTION = DatasetDescription.from_dict(
    {"name": "benchmark", "user_id_type": "int64", "item_id_type": "int64", "event_types": {"click": "positive"}}
)


@dataclass(frozen=True, slots=True)
class Size:
    """Of an encoder, and how many times its floor we aim at."""

    width: int
    layers: int
    heads: int
    target: float

    @property
    def name(self) -> str:
        """As it stands in the measures."""
        return f"d{self.width}_L{self.layers}"

    def floor_ms(self, length_U: NDArray[np.int64]) -> float:
        """Of the products: 24 D^2 a token and layer, and causal attention."""
        linear = 24 * self.width**2 * int(length_U.sum())
        attention = 4 * self.width * int((length_U * (length_U + 1) // 2).sum())
        return 1e3 * self.layers * (linear + attention) / MATMUL_FLOPS_PER_S

    def encoder(self, longest: int, items: int) -> Encoder:
        """Untrained: speed does not depend on the weights."""
        torch.manual_seed(0)
        config = TowerConfig(
            d_model=self.width, num_layers=self.layers, num_heads=self.heads, history_limit=longest,
            embedding_dim=self.width, dropout=0.0, compute_dtype="bfloat16",
        )  # fmt: skip
        vocabularies = Vocabularies(event_types=tuple(DESCRIPTION.event_type_names), columns={})
        catalogue = pa.table({"item_id": np.arange(items)})
        return HybridTower.build(config, DESCRIPTION, vocabularies, catalogue).encoder.eval()


SIZES = (Size(256, 4, 4, 2.0), Size(512, 8, 8, 1.6))
ATTENTION_SETTINGS = (
    (64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3), (128, 32, 8, 3), (64, 32, 4, 3),
)  # fmt: skip
"""Rows, keys, warps and stages of the attention kernel that are tried."""
QUICK = (Size(64, 2, 2, 2.0),)


def lengths(users: int, longest: int) -> NDArray[np.int64]:
    """Log-normal, those of the recorded baselines at 1,024 users and 2,048 events."""
    random = np.random.RandomState(5)
    return np.clip(np.exp(random.normal(math.log(300), 1.0, users)), 8, longest).astype(np.int64)


def draw(length_U: NDArray[np.int64], items: int) -> EventFeatures:
    """Events at random, on the CPU."""
    random = torch.Generator().manual_seed(0)
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(length_U)]))
    total = int(offsets[-1])
    item_T, gap_T = (torch.randint(0, high, (total,), generator=random) for high in (items, GAP_BUCKETS))
    gap_T[offsets[:-1]] = 0
    type_T = torch.full((total,), 2)
    none = torch.zeros(total, 0, dtype=torch.int64)
    return EventFeatures(item_T, type_T, gap_T, none, torch.zeros(total, dtype=torch.int64), offsets)


def exact_states(encoder: Encoder, events: EventFeatures, users: Sequence[int]) -> torch.Tensor:
    """Of a few users, in float64 on the CPU."""
    wide = copy.deepcopy(encoder).cpu().double()
    starts = events.offsets[list(users)], events.offsets[[u + 1 for u in users]]
    return wide.states(events.window(*starts)).double()


@dataclass(frozen=True, slots=True)
class Rival:
    """A way to encode, and the order its states come in."""

    name: str
    step: Step
    order_U: NDArray[np.int64]


class Rivals:
    """The encoder's blocks in bfloat16 under torch.compile, over events embedded beforehand."""

    def __init__(self, encoder: Encoder, events: EventFeatures, device: torch.device, size: Size, longest: int) -> None:
        half = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.device, self.size, self.longest, self.offsets = device, size, longest, events.offsets
        self.length_U = events.offsets.diff().numpy()
        embedded_TD = encoder.embed(events.item_T, events.type_T, events.gap_T, events.column_TC)
        self.event_TD = embedded_TD.to(device, half)
        self.blocks = [copy.deepcopy(b).to(device, half) for b in encoder.blocks if isinstance(b, Block)]
        self.norm = copy.deepcopy(encoder.norm).to(device)
        self.block: Callable[..., torch.Tensor] = packed_block
        self.padded: Callable[..., torch.Tensor] = padded_block
        if device.type == "cuda":
            self.block, self.padded = torch.compile(packed_block), torch.compile(padded_block, dynamic=True)

    def packed(self) -> Rival:
        """All events at once, the library's variable-length attention."""
        zero_T = torch.zeros(len(self.event_TD), dtype=torch.int64, device=self.device)
        packing = Packing.of(self.offsets, self.size.width // self.size.heads, zero_T)
        last_U = self.offsets[1:].to(self.device) - 1

        def step() -> torch.Tensor:
            event_TD = self.event_TD
            for block in self.blocks:
                event_TD = self.block(block, event_TD, packing)
            return self.norm(event_TD[last_U].float())  # type: ignore[no-any-return]

        return Rival("packed, variable-length FlashAttention", step, np.arange(len(self.length_U)))

    def bucketed(self) -> Rival:
        """Batches of like lengths, padded to a multiple of 64."""
        order_U = np.argsort(self.length_U, kind="stable")
        cuts, start = [], 0
        for end in range(1, len(order_U) + 1):
            following = self.length_U[order_U[min(end, len(order_U) - 1)]]
            if end == len(order_U) or -(-following // 64) * 64 * (end + 1 - start) > BUCKET_TOKENS:
                cuts.append(order_U[start:end])
                start = end
        return self._padded("length-bucketed, padded", cuts, None)

    def padded_whole(self) -> Rival:
        """Batches as they come, padded to the longest a history can be."""
        order_U = np.arange(len(self.length_U))
        return self._padded(
            f"padded to {self.longest}", np.array_split(order_U, max(1, len(order_U) // 128)), self.longest
        )

    def _padded(self, name: str, cuts: Sequence[NDArray[np.int64]], longest: int | None) -> Rival:
        batches = []
        for users in cuts:
            long = longest or int(-(-self.length_U[users].max() // 64) * 64)
            event_ULD = self.event_TD.new_zeros(len(users), long, self.size.width)
            for row, user in enumerate(users.tolist()):
                begin, end = self.offsets[user : user + 2].tolist()
                event_ULD[row, : end - begin] = self.event_TD[begin:end]
            angle_Ld = rotary_angles(torch.arange(long), self.size.width // self.size.heads).to(self.device)
            last_U = torch.from_numpy(self.length_U[users] - 1).to(self.device)
            batches.append((event_ULD, angle_Ld.cos()[:, None], angle_Ld.sin()[:, None], last_U))

        def step() -> torch.Tensor:
            states = []
            for event_ULD, cos, sin, last_U in batches:
                for block in self.blocks:
                    event_ULD = self.padded(block, event_ULD, cos, sin)
                states.append(event_ULD[torch.arange(len(last_U), device=self.device), last_U])
            return self.norm(torch.cat(states).float())  # type: ignore[no-any-return]

        return Rival(name, step, np.concatenate(list(cuts)))


def packed_block(block: Block, event_TD: torch.Tensor, packing: Packing) -> torch.Tensor:
    """The product's block with the library's attention."""
    return finish(block, event_TD, library_attention(*project(block, event_TD, packing), packing))


def padded_block(block: Block, event_ULD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The product's block over histories laid out at equal length."""
    users, longest, _ = event_ULD.shape
    qkv = block.qkv(block.attention_norm(event_ULD)).unflatten(-1, (3, block.num_heads, -1))
    query, key, value = (x.transpose(1, 2) for x in qkv.unbind(2))
    query, key = turned(query, cos[:, 0], sin[:, 0]), turned(key, cos[:, 0], sin[:, 0])
    out_UhLd = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    attended = out_UhLd.transpose(1, 2).reshape(users * longest, block.num_heads, -1)
    return finish(block, event_ULD.flatten(0, 1), attended).unflatten(0, (users, longest))


def turned(vector: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions of padded histories."""
    first, second = vector.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1).to(vector.dtype)


def wall_ms(step: Step, device: torch.device, count: int) -> list[float]:
    """Of each of so many calls, host and device."""
    took = []
    for _ in range(count):
        wait(device)
        started = time.perf_counter()
        step()
        wait(device)
        took.append(1e3 * (time.perf_counter() - started))
    return took


@torch.inference_mode()
def compare(
    size: Size, device: torch.device, repeats: int, chosen: Sequence[str] = ("",), *, is_quick: bool
) -> dict[str, Any]:
    """Check, time in turn, print; the entry to record."""
    users, longest, items = (16, 64, 100) if is_quick else (1024, LONGEST, 50_000)
    length_U = lengths(users, longest)
    events = draw(length_U, items)
    encoder = size.encoder(longest, items)
    picked = [0, int(length_U.argmax()), int(length_U.argmin()), users - 1]
    exact = exact_states(encoder, events, picked)
    rivals = Rivals(encoder, events, device, size, longest)
    ours = PackedEncoder(copy.deepcopy(encoder).to(device), batch_tokens=2 * longest if is_quick else None)
    features = events.to(device)
    floor = size.floor_ms(length_U)
    print(f"{size.name}: {users} users, {int(length_U.sum())} events, floor {floor:.2f} ms", flush=True)
    arms: dict[str, tuple[Step, NDArray[np.int64]]] = {"ours": (lambda: ours.states(features), np.arange(users))}
    for name, make in (("packed", rivals.packed), ("bucketed", rivals.bucketed), ("padded", rivals.padded_whole)):
        if any(part in name for part in chosen):
            rival = make()
            arms[rival.name] = rival.step, rival.order_U
    errors = {}
    for name, (step, order_U) in arms.items():
        place_U = np.argsort(order_U)
        errors[name] = off(step()[torch.from_numpy(place_U[picked]).to(device)].cpu(), exact)
    assert errors["ours"] <= max(2 * max(errors[name] for name in arms if name != "ours"), 1e-2), (
        f"off by {errors['ours']}"
    )
    alone = ours.states(events.window(events.offsets[picked], events.offsets[[u + 1 for u in picked]]).to(device))
    same = torch.equal(alone, ours.states(features)[picked])
    assert same or device.type == "cpu", "a user's state has other bits in other company"
    rounds = [{name: statistics.median(wall_ms(step, device, 3)) for name, (step, _) in arms.items()}
              for _ in range(repeats)]  # fmt: skip
    ms = {name: statistics.median(one[name] for one in rounds) for name in arms}
    for name in arms:
        spread = (max(one[name] for one in rounds) - min(one[name] for one in rounds)) / ms[name]
        print(
            f"  {name:42} {ms[name]:9.2f} ms x{ms[name] / floor:5.2f} {1e3 * users / ms[name]:9.0f} users/s  "
            f"off {errors[name]:.1e}  spread {spread:.1%}",
            flush=True,
        )
    best = min((name for name in arms if name != "ours"), key=ms.__getitem__)
    shown = ", ".join(f"{name} {ms[name]:.2f} (off {errors[name]:.1e})" for name in arms)
    return {
        "measure": f"encoder.{size.name}.users_per_s", "value": round(1e3 * users / ms["ours"]), "unit": "users/s",
        "target": round(1e3 * users / (size.target * floor)), "rival": best,
        "rival_value": round(1e3 * users / ms[best]), "note": f"ms: {shown}; floor {floor:.2f}, {users} users",
    }  # fmt: skip


@torch.inference_mode()
def tune(size: Size, device: torch.device) -> None:
    """Print where the time goes: batches of several sizes, and each kernel on several tiles beside the library's."""
    length_U = lengths(1024, LONGEST)
    encoder = size.encoder(LONGEST, 50_000)
    features = draw(length_U, 50_000).to(device)
    on_device = copy.deepcopy(encoder).to(device)
    for tokens in (16_896, 33_792, 50_688, 67_584):
        packed = PackedEncoder(on_device, batch_tokens=tokens)
        packed.states(features)
        took = statistics.median(wall_ms(lambda packed=packed: packed.states(features), device, 7))  # type: ignore[misc]
        count = len(plan_batches(length_U, tokens))
        graph = next(iter(packed._graphs.values()))[0]
        assert graph is not None
        replay = statistics.median(wall_ms(graph.replay, device, 15))
        print(
            f"{size.name} {tokens} a batch, {count} batches: {took:.2f} ms; {count} graphs {count * replay:.2f} ms",
            flush=True,
        )
    block_pieces(size, encoder.to(device), device)
    for heads in (size.heads, size.heads // 2, 2 * size.heads):
        attention_pieces(size.width, heads, length_U, device)


def attention_pieces(width: int, heads: int, length_U: NDArray[np.int64], device: torch.device) -> None:
    """Histories' attention on several tiles, beside FlashAttention-2."""
    from model.kernels.causal_attention_triton import CausalTiles, launch

    aten = torch.ops.aten
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(length_U)])).to(device, torch.int32)
    total, longest = int(offsets[-1]), int(length_U.max())
    query, key, value = torch.randn(total, 3, heads, width // heads, device=device).bfloat16().unbind(1)
    flops = 4 * width * int((length_U * (length_U + 1) // 2).sum())
    lengths = offsets, offsets, longest, longest
    steps: dict[str, Step] = {
        "FlashAttention-2": lambda: aten._flash_attention_forward(query, key, value, *lengths, 0.0, True, False)[0],
    }
    for setting in ATTENTION_SETTINGS:
        tiles = CausalTiles(*setting)
        steps[str(tiles)] = lambda tiles=tiles: launch(query, key, value, offsets, tiles)  # type: ignore[misc]
    exact = next(iter(steps.values()))()
    for name, step in steps.items():
        report(f"attention, heads of {width // heads}, {name}", step, flops, exact)


def block_pieces(size: Size, encoder: Encoder, device: torch.device) -> None:
    """What lies between two attentions, of one batch: by the kernels chosen for its width, and by the library's
    products."""
    block = next(block for block in encoder.blocks if isinstance(block, Block))
    tail, head = Tail.of(block, torch.bfloat16), Head.of(block, torch.bfloat16)
    tokens = choose_batch_tokens(size.width)
    event_TD, attended_TD = torch.randn(2, tokens, size.width, device=device).bfloat16()
    angle_Ld = rotary_angles(torch.arange(LONGEST), size.width // size.heads).to(device)
    position_T = (torch.arange(tokens, device=device) % LONGEST).int()
    rest = attended_TD, tail, head, position_T, angle_Ld.cos(), angle_Ld.sin()
    flops = 24 * size.width**2 * tokens

    def both(of: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]) -> torch.Tensor:
        stream_TD, projected = of(event_TD.clone(), *rest)
        assert projected is not None
        return torch.cat([stream_TD, projected.flatten(1)], 1)

    exact = both(between_reference).double()
    for name, of in (("kernels", between), ("products", between_products)):
        print(f"  between, {name}, off {off(both(of), exact):.1e}", flush=True)
        stream_TD = event_TD.clone()
        report(f"between, {name}", lambda of=of, stream_TD=stream_TD: of(stream_TD, *rest)[0], flops, None)  # type: ignore[misc]  # fmt: skip


def report(name: str, step: Step, flops: float, exact: torch.Tensor | None) -> None:
    """Print a step's time, and its distance from another result."""
    try:
        error = 0.0 if exact is None else off(step(), exact.double())
        device = torch.device("cuda")
        ms = median_ms(graphed(step, device), device, 0.03)
    except Exception as problem:  # too much shared memory, no such operator: something to know, no reason to stop
        print(f"  {name}: {type(problem).__name__}: {str(problem)[:100]}", flush=True)
        return
    print(f"  {name}: {1e3 * ms:.1f} us, {flops / ms / 1e9:.0f} TFLOP/s, off {error:.1e}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Check, compare, record."""
    parser = argparse.ArgumentParser(prog="benchmarks.encoder_speed", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", default=[""], help="only sizes whose name contains one of these")
    parser.add_argument("--rivals", nargs="+", default=[""], help="only rivals whose name contains one of these")
    parser.add_argument("--tune", action="store_true", help="print where the time goes; records nothing")
    parser.add_argument("--quick", action="store_true", help="tiny shapes; records nothing")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-record", action="store_true")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cpu" and not args.quick:
        parser.error("these shapes are a GPU's: on the CPU only --quick, which checks and measures nothing")
    entries = []
    for size in QUICK if args.quick else SIZES:
        if not any(part in size.name for part in args.only):
            continue
        if args.tune:
            tune(size, device)
            continue
        with fixed_sizes():
            entries.append(compare(size, device, 1 if args.quick else args.repeats, args.rivals, is_quick=args.quick))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for entry in entries:
        print(f"{entry['measure']} {entry['value']} (target {entry['target']})", flush=True)
    if entries and device.type == "cuda" and not args.quick and not args.no_record:
        installed = versions("torch", "triton", "numpy")
        record(THEME, [{**entry, "versions": installed} for entry in entries])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
