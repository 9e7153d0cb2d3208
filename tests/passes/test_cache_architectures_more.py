"""Feature caches on U-Nets of video and sound, and on transformers with long skip connections.

Against the eager model with a kept tensor put into it. The models are tiny but have all blocks of the real ones, and
random weights of which none is near zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from cache_oracle import EQUAL, Checks, Inputs, Layout, Plans, apart, first, from_zoo, plans_of, run
from torch import Tensor, nn

import graphwright as gw
from graphwright.graph.joins import skip_joins
from graphwright.passes.insert_feature_cache import InsertFeatureCache
from graphwright.tools.zoo import ZOO
from graphwright.tools.zoo.diffusers_models import CROSS, LATENT, make, states, steps
from graphwright.tools.zoo.entry import image, source

pytestmark = pytest.mark.slow


class UViT(nn.Module):
    """A transformer with long skip connections: tokens of the first half are concatenated to those of the second."""

    def __init__(self, width: int = 12, depth: int = 5) -> None:
        super().__init__()
        self.patch, self.time, self.text = nn.Conv2d(LATENT, width, 2, 2), nn.Linear(1, width), nn.Linear(CROSS, width)
        layer = lambda: nn.TransformerEncoderLayer(width, 2, 16, 0.0, batch_first=True, norm_first=True)  # noqa: E731
        self.blocks = nn.ModuleList(layer() for _ in range(depth))
        self.joins = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(depth // 2))
        self.out = nn.ConvTranspose2d(width, LATENT, 2, 2)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        x = self.patch(sample).flatten(2).transpose(1, 2)
        time = self.time(timestep[:, None, None] / 1000)
        x = torch.cat([time, self.text(encoder_hidden_states), x], 1)
        kept, half = list[Tensor](), len(self.blocks) // 2
        for i, block in enumerate(self.blocks):
            if i > half:
                x = self.joins[i - half - 1](torch.cat([x, kept.pop()], -1))
            x = block(x)
            if i < half:
                kept.append(x)
        side = sample.shape[-1] // 2
        x = x[:, -(side * side) :].transpose(1, 2).unflatten(2, (side, side))
        return self.out(x)


def u_vit() -> Layout:
    # The model itself concatenates, first the tokens; those have a third operand.
    return Layout(
        UViT(),
        lambda b: {"sample": image(b, LATENT, 8, 8), "timestep": steps(b), "encoder_hidden_states": states(b)},
        2,
        lambda name: name == "",
    )


def hunyuan() -> Layout:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    model = make(
        "HunyuanDiT2DModel",
        num_layers=6,
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
    # Blocks behind the middle one take a skip, except the first of them.
    return Layout(model, inputs, 6 - 6 // 2 - 1, lambda name: name.startswith("blocks."), batched)


def cascade() -> Layout:
    model = make(
        "StableCascadeUNet",
        in_channels=LATENT,
        out_channels=LATENT,
        timestep_ratio_embedding_dim=8,
        conditioning_dim=16,
        block_out_channels=(16, 24),
        num_attention_heads=(2, 3),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        down_blocks_repeat_mappers=(1, 1),
        up_blocks_repeat_mappers=(1, 1),
        block_types_per_layer=(("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),) * 2,
        clip_text_in_channels=CROSS,
        clip_text_pooled_in_channels=10,
        clip_image_in_channels=12,
        clip_seq=2,
        self_attn=True,
        switch_level=(False,),
    )
    return Layout(
        model,
        lambda b: {
            "sample": image(b, LATENT, 8, 8),
            "timestep_ratio": torch.rand(b, generator=source(b)),
            "clip_text_pooled": image(b, 1, 10),
            "clip_text": states(b),
            "clip_img": image(b, 1, 12),
        },
        1,
    )


LAYOUTS: Mapping[str, Callable[[], Layout]] = {
    "svd": lambda: from_zoo("unet_spatio_temporal"),
    "unet3d": lambda: from_zoo("unet3d"),
    "audioldm2": lambda: from_zoo("unet_audioldm2"),
    "kandinsky22": lambda: from_zoo("unet_kandinsky22"),
    "dance_diffusion": lambda: from_zoo("unet1d", 3),  # one a level, of three
    "u_vit": u_vit,
    "hunyuan_dit": hunyuan,
}


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request) -> Layout:
    return LAYOUTS[request.param]()


@pytest.fixture(scope="module")
def plans(layout: Layout) -> Plans:
    return plans_of(layout)


class Test(Checks):
    """All checks on all layouts."""


def test_a_cut_moves_to_where_the_main_path_is_one_tensor() -> None:
    # Blocks of Stable Cascade concatenate behind their first convolution, and add what they were given at the end.
    layout = cascade()
    (join,) = skip_joins(layout.program)
    assert join.cut is not join.main
    result = gw.Pipeline([InsertFeatureCache(timestep="timestep_ratio")])(layout.program)
    stats = result.records[0].result.stats
    assert stats["macs_reuse"] < 0.6 * stats["macs_refresh"]
    before, now = layout.inputs(3), layout.inputs(3)
    now |= {"sample": now["sample"].flip(-1), "timestep_ratio": 1 - now["timestep_ratio"]}
    module = layout.model.get_submodule("up_upscalers.0")
    kept = list[Tensor]()
    with torch.no_grad():
        hook = module.register_forward_hook(lambda m, a, o: kept.append(first(o)))
        old = first(layout.model(**before))
        hook.remove()
        hook = module.register_forward_hook(lambda m, a, o: kept[0])
        want = first(layout.model(**now))
        hook.remove()
        new = first(layout.model(**now))
    stages = result.plan.stages
    assert f"before it at {join.cut.name}" in result.plan.notes[0]
    _, stale = run(stages["refresh"].program, before)
    torch.testing.assert_close(first(run(stages["reuse"].program, now, **stale)), want, rtol=0, atol=EQUAL)
    assert apart(want, new) > 1e-3 and apart(want, old) > 1e-3


def test_a_transformer_between_convolutions_without_long_skips_is_refused() -> None:
    entry = ZOO["uvit2d"].build()
    program = gw.capture(entry.model, entry.args, entry.kwargs, entry.dynamic)
    with pytest.raises(gw.PreconditionError, match="needs a network with skip connections that are concatenated"):
        InsertFeatureCache(timestep="micro_conds")(program)
