"""Layer caches on diffusion transformers of every kind, against the eager model whose modules give kept results.

The models are tiny but have all parts of the real ones, and random weights of which none is near zero (modulation and
last layers start at zero in most of them). The oracle does not look at the graph: forward hooks keep what attention and
feed-forward modules gave at one evaluation and give it again at another one, with another sample and time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn

import graphwright as gw
from graphwright.graph.cost import cost
from graphwright.graph.joins import residual_joins
from graphwright.graph.operators import base_name
from graphwright.passes.insert_layer_cache import InsertLayerCache, branch_register
from graphwright.tools.zoo import ZOO
from graphwright.tools.zoo.diffusers_models import CROSS, LATENT, make, states, steps
from graphwright.tools.zoo.entry import case, image, source, tensors

pytestmark = pytest.mark.slow

Inputs = dict[str, Any]
# Where a branch leaves the eager model: a module, and which part of its result (an entry, or tokens of it), None for all.
Tap = tuple[str, int | slice | None]
# Both sides run the same kernels on the same shapes: 0.0 is measured everywhere. In units of outputs of about 1.
EQUAL = 1e-6


@dataclass
class Layout:
    """A model, its inputs by batch size, and its branches in graph order with their kinds (``a``, ``m``)."""

    model: nn.Module
    inputs: Callable[[int], Inputs]
    taps: Sequence[Tap]
    kinds: str
    dynamic: Any = None
    program: gw.Program = field(init=False)
    patterns: list[tuple[int, ...]] = field(init=False)
    plan: gw.Plan = field(init=False)
    macs: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self.model = case(self.model, self.inputs, seed=5).model
        self.program = gw.capture(self.model, (), self.inputs(2), self.dynamic)
        everything, draw = range(len(self.kinds)), random.Random(7)
        half = sorted(draw.sample(everything, len(self.kinds) // 2))
        single = [self.kinds.index(kind) for kind in "am"]
        self.patterns = [tuple(everything), tuple(half), *((i,) for i in single)]
        result = gw.Pipeline([InsertLayerCache(reuse=((), *self.patterns))])(self.program)
        self.plan, self.macs = result.plan, dict(result.records[0].result.stats)


def block_taps(prefix: str, count: int, *parts: str | tuple[str, int | slice | None]) -> list[Tap]:
    """Return the taps of blocks with the same parts."""
    named = [part if isinstance(part, tuple) else (part, None) for part in parts]
    return [(f"{prefix}.{i}.{name}", which) for i in range(count) for name, which in named]


def from_zoo(name: str, taps: Sequence[Tap], kinds: str) -> Layout:
    entry: Any = ZOO[name].build()
    second = entry.second[1]

    def inputs(b: int) -> Inputs:
        if b == 1:
            batched = lambda v: isinstance(v, Tensor) and v.dim() > 0 and v.shape[0] == 2  # noqa: E731
            return pytree.tree_map(lambda v: v[:1] if batched(v) else v, entry.kwargs)
        return entry.kwargs if b == 2 else second

    return Layout(entry.model, inputs, taps, kinds, entry.dynamic)


def joint(prefix: str, count: int) -> list[Tap]:
    """Return the taps of blocks that attend over picture and text together, the last of which drops the text."""
    parts = [("attn", 0), ("ff", None), ("attn", 1), ("ff_context", None)]
    return block_taps(prefix, count, *parts)


def hunyuan() -> Layout:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    depth = 4
    model = make(
        "HunyuanDiT2DModel",
        num_layers=depth,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=LATENT,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        mlp_ratio=2.0,
        cross_attention_dim=20,
        cross_attention_dim_t5=16,
        text_len=5,
        text_len_t5=4,
        pooled_projection_dim=20,
        learn_sigma=False,
        activation_fn="gelu-approximate",
    )
    rope = get_2d_rotary_pos_embed(8, ((0, 0), (4, 4)), (4, 4), output_type="pt")

    def inputs(b: int) -> Inputs:
        return {
            "hidden_states": image(b, LATENT, 8, 8),
            "timestep": steps(b).float(),
            "encoder_hidden_states": states(b, 5),
            "text_embedding_mask": torch.ones(b, 5, dtype=torch.long),
            "encoder_hidden_states_t5": states(b, 4, 16, 9),
            "text_embedding_mask_t5": torch.ones(b, 4, dtype=torch.long),
            "image_meta_size": torch.rand(b, 6, generator=source(b)) * 9,
            "style": torch.zeros(b, dtype=torch.long),
            "image_rotary_emb": rope,
        }

    batched = {name: {0: "batch"} for name in inputs(2) if name != "image_rotary_emb"}
    return Layout(model, inputs, block_taps("blocks", depth, "attn1", "attn2", "ff"), "aam" * depth, batched)


def ltx() -> Layout:
    model = make(
        "LTXVideoTransformer3DModel",
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=2,
        caption_channels=CROSS,
    )
    return Layout(
        model,
        lambda b: {
            "hidden_states": states(b, 32, 8, 3),
            "encoder_hidden_states": states(b),
            "timestep": steps(b),
            "encoder_attention_mask": torch.ones(b, 6),
            "num_frames": 2,
            "height": 4,
            "width": 4,
        },
        block_taps("transformer_blocks", 2, "attn1", "attn2", "ff"),
        "aam" * 2,
    )


def stable_audio() -> Layout:
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    model = make(
        "StableAudioDiTModel",
        sample_size=12,
        in_channels=LATENT,
        out_channels=LATENT,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        cross_attention_dim=16,
        time_proj_dim=16,
        global_states_input_dim=10,
        cross_attention_input_dim=CROSS,
    )
    rope = get_1d_rotary_pos_embed(4, 13, use_real=True, repeat_interleave_real=False)
    named = ("hidden_states", "timestep", "encoder_hidden_states", "global_hidden_states")
    return Layout(
        model,
        lambda b: {
            "hidden_states": image(b, LATENT, 12),
            "timestep": steps(b) / 1000,
            "encoder_hidden_states": states(b),
            "global_hidden_states": states(b, 1, 10, 8),
            "rotary_embedding": rope,
        },
        # The convolutions at both ends are added to what they read.
        [("preprocess_conv", None), *block_taps("transformer_blocks", 2, *CROSS_BLOCKS), ("postprocess_conv", None)],
        "m" + "aam" * 2 + "m",
        {name: {0: "batch"} for name in named},
    )


def lumina() -> Layout:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    model = make(
        "LuminaNextDiT2DModel",
        sample_size=8,
        patch_size=2,
        in_channels=LATENT,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=8,
        learn_sigma=False,
        cross_attention_dim=CROSS,
    )
    rope = get_2d_rotary_pos_embed_lumina(8, 8, 8)
    # Self and cross attention have one output projection and norm; the branches end in norms.
    return Layout(
        model,
        lambda b: {
            "hidden_states": image(b, LATENT, 8, 8),
            "timestep": steps(b) / 1000,
            "encoder_hidden_states": states(b),
            "encoder_mask": torch.ones(b, 6, dtype=torch.bool),
            "image_rotary_emb": rope,
            "cross_attention_kwargs": {},
        },
        block_taps("layers", 2, "norm2", "ffn_norm2"),
        "am" * 2,
        {},  # the patch embedding makes a list with an entry for every sample
    )


class Attention(nn.Module):
    """Self-attention with one projection in and one out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (n.unflatten(-1, (2, -1)).transpose(1, 2) for n in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class UViTBlock(nn.Module):
    """A block of a U-ViT: no modulation, the time is a token; a long skip in the second half."""

    def __init__(self, width: int, skip: bool) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn = nn.LayerNorm(width), nn.LayerNorm(width), Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.join = nn.Linear(2 * width, width) if skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.join is not None:
            x = self.join(torch.cat([x, skip], -1))  # type: ignore[list-item]
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(nn.Module):
    """A transformer over patches and a time token, with long skip connections."""

    def __init__(self, width: int = 12, depth: int = 5) -> None:
        super().__init__()
        self.patch, self.time, self.middle = nn.Conv2d(LATENT, width, 2, 2), nn.Linear(1, width), depth // 2
        self.blocks = nn.ModuleList(UViTBlock(width, i > depth // 2) for i in range(depth))
        self.out = nn.ConvTranspose2d(width, LATENT, 2, 2)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        x = self.patch(hidden_states).flatten(2).transpose(1, 2)
        x, kept = torch.cat([self.time(timestep[:, None, None] / 1000), x], 1), list[Tensor]()
        for i, block in enumerate(self.blocks):
            x = block(x, kept.pop()) if i > self.middle else block(x)
            if i < self.middle:
                kept.append(x)
        side = hidden_states.shape[-1] // 2
        return self.out(x[:, 1:].transpose(1, 2).unflatten(2, (side, side)))


def u_vit() -> Layout:
    inputs = lambda b: {"hidden_states": image(b, LATENT, 8, 8), "timestep": steps(b)}  # noqa: E731
    return Layout(UViT(), inputs, block_taps("blocks", 5, "attn", "mlp"), "am" * 5)


CROSS_BLOCKS = ("attn1", "attn2", "ff")
BLOCKS = "transformer_blocks"
TEXT = 6  # text tokens, first in the joint sequence of CogVideoX
DUAL = [("attn", 0), ("attn2", None), ("ff", None), ("attn", 1), ("ff_context", None)]
COG = [("attn1", 0), ("attn1", 1), ("ff", slice(TEXT, None)), ("ff", slice(0, TEXT))]
LAYOUTS: Mapping[str, Callable[[], Layout]] = {
    "dit": lambda: from_zoo("dit", block_taps(BLOCKS, 2, "attn1", "ff"), "am" * 2),
    "pixart": lambda: from_zoo("pixart", block_taps(BLOCKS, 2, *CROSS_BLOCKS), "aam" * 2),
    "hunyuan_dit": hunyuan,
    "sd3": lambda: from_zoo(
        "sd3", joint(BLOCKS, 2)[:4] + [(f"{BLOCKS}.1.attn", 0), (f"{BLOCKS}.1.ff", None)], "amam" + "am"
    ),
    "sd35": lambda: from_zoo(
        "sd35", block_taps(BLOCKS, 1, *DUAL) + [(f"{BLOCKS}.1.attn", 0), (f"{BLOCKS}.1.ff", None)], "aamamam"
    ),
    "flux": lambda: from_zoo(
        "flux", joint(BLOCKS, 2) + block_taps("single_transformer_blocks", 2, "proj_out"), "amam" * 2 + "aa"
    ),
    "auraflow": lambda: from_zoo(
        "auraflow",
        joint("joint_transformer_blocks", 2) + block_taps("single_transformer_blocks", 1, "attn", "ff"),
        "amam" * 2 + "am",
    ),
    "sana": lambda: from_zoo("sana", block_taps(BLOCKS, 2, *CROSS_BLOCKS), "aam" * 2),
    "latte": lambda: from_zoo(
        "latte",
        block_taps(BLOCKS, 1, *CROSS_BLOCKS) + block_taps("temporal_transformer_blocks", 1, "attn1", "ff"),
        "aamam",
    ),
    "cogvideox": lambda: from_zoo("cogvideox", block_taps(BLOCKS, 2, *COG), "aamm" * 2),
    "stable_audio": stable_audio,
    "ltx": ltx,
    "lumina": lumina,
    "u_vit": u_vit,
}


def part(value: Any, which: int | slice | None) -> Tensor:
    if isinstance(which, slice):
        return value[:, which]
    return value if which is None or not isinstance(value, tuple) else value[which]


def exchanged(value: Any, which: int | slice | None, new: Tensor) -> Any:
    if isinstance(which, slice):
        value = value.clone()
        value[:, which] = new
        return value
    return tuple(new if i == which else v for i, v in enumerate(value)) if isinstance(value, tuple) else new


def first(value: Any) -> Tensor:
    return tensors(value)[0]


def eager(layout: Layout, inputs: Inputs, put: Mapping[int, Tensor] = {}) -> tuple[Tensor, dict[int, Tensor]]:
    """Return the model's result, and what every branch gave; ``put`` says what branches are to give instead."""
    given: dict[int, Tensor] = {}

    def hook_of(number: int, which: int | slice | None) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            given[number] = part(output, which).clone()
            return exchanged(output, which, put[number]) if number in put else None

        return hook

    hooks = [
        layout.model.get_submodule(name).register_forward_hook(hook_of(i, which))
        for i, (name, which) in enumerate(layout.taps)
    ]
    try:
        with torch.no_grad():
            return first(layout.model(**inputs)), given
    finally:
        for hook in hooks:
            hook.remove()


def run(program: gw.Program, inputs: Inputs, **registers: Tensor) -> Any:
    with torch.no_grad():
        return program(**inputs, **registers)


def later(inputs: Inputs) -> Inputs:
    """Return the inputs of another step of a run: another sample and time, the same condition."""
    time = inputs["timestep"]
    moved = time + 0.3 if time.is_floating_point() and float(time.max()) < 2 else time + 300
    return inputs | {"hidden_states": inputs["hidden_states"].flip(-1) * 0.7 + 0.3, "timestep": moved}


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request) -> Layout:
    return LAYOUTS[request.param]()


def test_every_branch_is_found_and_its_kind(layout: Layout) -> None:
    assert "".join(join.kind[0] for join in residual_joins(layout.program)) == layout.kinds
    assert len(layout.taps) == len(layout.kinds)


def test_every_pattern_equals_the_model_with_kept_results(layout: Layout) -> None:
    before, now = layout.inputs(2), later(layout.inputs(2))
    old, kept = eager(layout, before)
    new, _ = eager(layout, now)
    assert float(new.abs().max()) > 0.1 and apart(old, new) > 0.05
    refresh = layout.plan.stages["refresh"].program
    out, fresh = run(refresh, now)
    torch.testing.assert_close(first(out), new, rtol=0, atol=EQUAL)
    _, stale = run(refresh, before)
    held = {name: value.clone() for name, value in stale.items()}
    for i, pattern in enumerate(layout.patterns):
        stage = layout.plan.stages[f"reuse_{i}"]
        assert stage.reads == tuple(branch_register(number) for number in pattern)
        again = run(stage.program, now, **{name: fresh[name] for name in stage.reads})
        torch.testing.assert_close(first(again), new, rtol=0, atol=EQUAL)
        want, _ = eager(layout, now, {number: kept[number] for number in pattern})
        got = run(stage.program, now, **{name: stale[name] for name in stage.reads})
        torch.testing.assert_close(first(got), want, rtol=0, atol=EQUAL)
        assert apart(want, new) > 1e-4 and apart(want, old) > 1e-3, pattern
    assert all(torch.equal(stale[name], value) for name, value in held.items())


@pytest.mark.parametrize("batch", [1, 3])
def test_another_batch(layout: Layout, batch: int) -> None:
    before, now = layout.inputs(batch), later(layout.inputs(batch))
    if layout.dynamic == {}:
        with pytest.raises(gw.InputError, match="to let it vary"):
            run(layout.plan.stages["refresh"].program, before)
        return
    old, kept = eager(layout, before)
    out, stale = run(layout.plan.stages["refresh"].program, before)
    torch.testing.assert_close(first(out), old, rtol=0, atol=EQUAL)
    stage, pattern = layout.plan.stages["reuse_1"], layout.patterns[1]
    want, _ = eager(layout, now, {number: kept[number] for number in pattern})
    got = run(stage.program, now, **{name: stale[name] for name in stage.reads})
    assert want.shape[0] == batch
    torch.testing.assert_close(first(got), want, rtol=0, atol=EQUAL)


def test_what_is_taken_is_not_computed(layout: Layout) -> None:
    full = set(layout.program.parameters())
    everything = layout.plan.stages["reuse_0"].program
    sizes = [layout.macs[f"macs_reuse_{i}"] for i in range(4)]
    # One of two streams that are split behind their last layer saves nothing.
    assert sizes[0] < min(sizes[1:]) and max(sizes[1:]) <= layout.macs["macs_refresh"]
    assert set(everything.parameters()) < full
    # All of a module's tensors are gone, or it ends elsewhere than in the addition, with what the gate needs.
    taken = {name for name, which in layout.taps if which is None and not name.endswith(("norm2", "ffn_norm2"))}
    assert not [p for p in everything.parameters() if any(p.startswith(f"{name}.") for name in taken)]
    own = {id(p) for p in everything.parameters().values()}
    others = {p: p.detach().clone() for p in layout.model.parameters() if id(p) not in own}
    inputs = layout.inputs(2)
    _, written = run(layout.plan.stages["refresh"].program, inputs)
    want = first(run(everything, inputs, **written))
    assert others
    with torch.no_grad():
        for p in others:
            p.fill_(float("nan"))
        got = first(run(everything, inputs, **written))
        for p, value in others.items():
            p.copy_(value)
    assert torch.equal(got, want)


@pytest.mark.parametrize("layout", ["sd3"], indirect=True)
def test_one_of_two_joint_branches_keeps_the_attention_and_both_do_not(layout: Layout) -> None:
    # Picture and text of the first block are branches 0 and 2.
    result = gw.Pipeline([InsertLayerCache(reuse=((), (0,), (2,), (0, 2)))])(layout.program)
    counts = [
        sum(base_name(n) == "scaled_dot_product_attention" for n in s.program.nodes)
        for s in result.plan.stages.values()
    ]
    assert counts == [2, 2, 2, 1]
    costs = [cost(stage.program).total_macs for stage in result.plan.stages.values()]
    picture, text, both = (costs[0] - c for c in costs[1:])
    tokens, width, batch = 16, 24, 2
    assert picture == batch * tokens * width * width and text == batch * 6 * width * width  # the last projections
    joint_tokens = tokens + 6
    assert both == picture + text + batch * joint_tokens * (3 * width * width + 2 * joint_tokens * width)
