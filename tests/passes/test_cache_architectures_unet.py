"""Feature caches on U-Nets of every layout, against the eager model with a kept tensor put into its concatenations.

The models are tiny but have all blocks of the real ones, and random weights of which none is near zero. The oracle does
not look at the graph: it watches the calls of `torch.cat` that the model's decoder blocks make, keeps their first operand
at one evaluation and puts it in its place at another one, with another sample and time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import graphwright as gw
from graphwright.graph.joins import skip_joins
from graphwright.passes.base import Context
from graphwright.passes.insert_feature_cache import REGISTER, InsertFeatureCache
from graphwright.tools.zoo import ZOO
from graphwright.tools.zoo.diffusers_models import CROSS, LATENT, make, states, steps
from graphwright.tools.zoo.entry import case, image, source, tensors

Inputs = dict[str, Any]
# Both sides run the same kernels on the same shapes: 0.0 is measured everywhere. In units of outputs of about 1.
EQUAL = 1e-6


@dataclass
class Layout:
    """A model, its inputs by batch size, the number of its skip connections, and the blocks that concatenate them.

    The batch varies by default; a capture in which nothing does (``dynamic={}``) takes a quarter of the time.
    """

    model: nn.Module
    inputs: Callable[[int], Inputs]
    skips: int
    decoder: Callable[[str], bool] = lambda name: name.startswith("up_blocks.") and name.count(".") == 1
    dynamic: Any = None
    program: gw.Program = field(init=False)
    concatenations: int = 0

    def __post_init__(self) -> None:
        # The weights are drawn anew: the last convolutions and the modulations of many of these models start at zero.
        self.model = case(self.model, self.inputs, seed=3).model
        self.program = gw.capture(self.model, (), self.inputs(2), self.dynamic)
        self.concatenations = len(eager(self, self.inputs(2))[1])


def skips_of(config: Any) -> int:
    """One for the first convolution, one for each layer of the encoder, one for each of its downsamplers.

    Without a middle block there is nothing beyond the last of them: it is concatenated with itself.
    """
    blocks, nothing = len(config.down_block_types), config.get("mid_block_type", "a class of its own") is None
    return 1 + config.layers_per_block * blocks + blocks - 1 - nothing


def unconditional(size: int, widths: tuple[int, ...], attention: int, dynamic: Any = None) -> Layout:
    kinds = ["AttnDownBlock2D" if i == attention else "DownBlock2D" for i in range(len(widths))]
    model = make(
        "UNet2DModel",
        sample_size=size,
        block_out_channels=widths,
        layers_per_block=2,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=tuple(kinds),
        up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(kinds)),
    )
    return Layout(
        model,
        lambda b: {"sample": image(b, 3, size, size), "timestep": steps(b)},
        skips_of(model.config),
        dynamic=dynamic,
    )


def conditional(
    widths: tuple[int, ...] = (8, 8, 16, 16),
    tokens: int = 6,
    size: int = 16,
    extra: Callable[[int], Inputs] = lambda b: {},
    prepare: Callable[[Any], object] = lambda model: None,
    dynamic: Any = None,
    **config: Any,
) -> Layout:
    """Down to the last level, which has none, every level has cross attention, unless ``config`` says otherwise."""
    last = len(widths) - 1
    values: Inputs = dict(
        sample_size=size,
        block_out_channels=widths,
        layers_per_block=2,
        cross_attention_dim=CROSS,
        attention_head_dim=2,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",) * last + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * last,
    )
    model = make("UNet2DConditionModel", **(values | config))
    prepare(model)
    return Layout(
        model,
        lambda b: (
            {"sample": image(b, LATENT, size, size), "timestep": steps(b), "encoder_hidden_states": states(b, tokens)}
            | extra(b)
        ),
        skips_of(model.config),
        dynamic=dynamic,
    )


def xl() -> Layout:
    return conditional(
        (8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 4, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=6,
        projection_class_embeddings_input_dim=6 * 6 + 10,
        extra=lambda b: {
            "added_cond_kwargs": {"text_embeds": image(b, 10), "time_ids": torch.rand(b, 6, generator=source(b)) * 9}
        },
    )


def residuals(b: int) -> Inputs:
    """What a ControlNet gives for three levels of Stable Diffusion: a tensor for each skip, and one for the middle."""
    shapes = [(8, 16)] * 3 + [(8, 8)] * 3 + [(8, 4)] + [(16, 4)] * 2
    return {
        "down_block_additional_residuals": tuple(image(b, w, s, s, seed=20 + i) for i, (w, s) in enumerate(shapes)),
        "mid_block_additional_residual": image(b, 16, 4, 4, seed=40),
    }


def from_zoo(name: str) -> Layout:
    entry: Any = ZOO[name].build()
    second = entry.second[1]

    def inputs(b: int) -> Inputs:
        if b < 3:
            return (
                entry.kwargs
                if b == 2
                else pytree.tree_map(lambda v: v[:1] if isinstance(v, Tensor) and v.dim() else v, entry.kwargs)
            )
        return second

    return Layout(entry.model, inputs, skips_of(entry.model.config), dynamic=entry.dynamic)


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
    "ddpm_cifar10": lambda: unconditional(16, (8, 16, 16, 16), 1),
    "ddpm_lsun": lambda: unconditional(32, (8, 8, 8, 16, 16, 16), 4),
    "sd15": conditional,
    "sd21": lambda: conditional(layers_per_block=1, use_linear_projection=True, attention_head_dim=(1, 1, 2, 2)),
    "sdxl": xl,
    "sd15_controlnet": lambda: conditional((8, 8, 16), extra=residuals),
    "svd": lambda: from_zoo("unet_spatio_temporal"),
    "unet3d": lambda: from_zoo("unet3d"),
    "audioldm2": lambda: from_zoo("unet_audioldm2"),
    "kandinsky22": lambda: from_zoo("unet_kandinsky22"),
    "ldm4g": lambda: conditional((8, 16, 24), 1, dynamic={}),
    "bk_sdm_without_middle": lambda: conditional(
        (8, 16),
        layers_per_block=1,
        mid_block_type=None,
        num_class_embeds=7,
        extra=lambda b: {"class_labels": torch.arange(b) + 2},
    ),
    "three_layers": lambda: conditional((8, 16), layers_per_block=3, dynamic={}),
    "freeu": lambda: conditional(
        (8, 16, 16), layers_per_block=1, prepare=lambda m: m.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    ),
    "u_vit": u_vit,
    "hunyuan_dit": hunyuan,
}


class Watch(TorchFunctionMode):
    """Watches the concatenations that modules of a decoder make: keeps what enters them, or puts something there."""

    def __init__(self, inside: Callable[[], bool], put: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.inside, self.put, self.seen = inside, put, list[Tensor]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.cat and len(args[0]) == 2 and self.inside():
            main, skip = args[0]
            self.seen.append(main.clone())
            main = self.put.get(len(self.seen) - 1, main)
            return func((main, skip), *args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def modules_entered(model: nn.Module) -> Iterator[list[str]]:
    """Give a list that holds the names of the modules whose forward runs."""
    stack, hooks = list[str](), list[Any]()

    def left(*_: Any) -> None:
        stack.pop()

    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda m, a, name=name: stack.append(name)))
        hooks.append(module.register_forward_hook(left))
    try:
        yield stack
    finally:
        for hook in hooks:
            hook.remove()


def first(value: Any) -> Tensor:
    return tensors(value)[0]


def eager(layout: Layout, inputs: Inputs, put: Mapping[int, Tensor] = {}) -> tuple[Tensor, list[Tensor]]:
    """Return the model's result, and what entered the decoder's concatenations, the shallowest (last) first.

    ``put`` says by branch what is to enter there instead.
    """
    last = layout.concatenations - 1
    with torch.no_grad(), modules_entered(layout.model) as stack:
        watch = Watch(lambda: layout.decoder(stack[-1]), {last - branch: value for branch, value in put.items()})
        with watch:
            out = layout.model(**inputs)
    return first(out), watch.seen[::-1]


def run(program: gw.Program, inputs: Inputs, **registers: Tensor) -> Any:
    with torch.no_grad():
        return program(**inputs, **registers)


def later(inputs: Inputs) -> Inputs:
    """Return the inputs of another step of a run: another sample, time and residuals, the same condition."""

    def moved(value: Tensor) -> Tensor:
        return value.flip(-1) * 0.7 + 0.3

    changed = {name: moved(inputs[name]) for name in ("sample", "hidden_states") if name in inputs}
    changed |= {name: inputs[name] + 300 for name in ("timestep",) if name in inputs}
    changed |= {name: pytree.tree_map(moved, value) for name, value in inputs.items() if "residual" in name}
    return inputs | changed


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request) -> Layout:
    return LAYOUTS[request.param]()


@pytest.fixture(scope="module")
def plans(layout: Layout) -> list[Any]:
    """The plan of every branch, with its statistics."""
    results: list[Any] = [
        InsertFeatureCache(branch=i).rewrite(layout.program.copy(), Context()) for i in range(layout.skips)
    ]
    results[layout.skips // 2].output.check()  # of one branch, as it takes longer than all the rest
    return [(r.output.stages["refresh"].program, r.output.stages["reuse"].program, r.stats) for r in results]


def test_every_skip_connection_is_found(layout: Layout) -> None:
    joins = skip_joins(layout.program)
    _, entered = eager(layout, layout.inputs(2))
    assert len(joins) == layout.skips <= layout.concatenations <= layout.skips + 1
    shapes = [tuple(v.shape[1:]) for v in entered[: layout.skips]]
    assert [tuple(join.main.meta["val"].shape[1:]) for join in joins] == shapes
    assert all(join.cut is join.main for join in joins)


def test_every_branch_equals_the_model_with_a_kept_tensor(layout: Layout, plans: list[Any]) -> None:
    before, now = layout.inputs(2), later(layout.inputs(2))
    old, kept = eager(layout, before)
    new, _ = eager(layout, now)
    assert float(new.abs().max()) > 0.1 and apart(old, new) > 0.1
    for branch, (refresh, reuse, _) in enumerate(plans):
        out, fresh = run(refresh, now)
        torch.testing.assert_close(first(out), new, rtol=0, atol=EQUAL)
        torch.testing.assert_close(first(run(reuse, now, **fresh)), new, rtol=0, atol=EQUAL)
        _, stale = run(refresh, before)
        assert stale[REGISTER].shape == kept[branch].shape
        held = stale[REGISTER].clone()
        want, _ = eager(layout, now, {branch: kept[branch]})
        for _ in range(2):  # the second time finds the register as it was
            torch.testing.assert_close(first(run(reuse, now, **stale)), want, rtol=0, atol=EQUAL)
        assert torch.equal(stale[REGISTER], held)
        assert apart(want, new) > 1e-3 and apart(want, old) > 1e-3


def test_what_lies_beyond_the_cut_is_gone(layout: Layout, plans: list[Any]) -> None:
    full = len(layout.program.parameters())
    sizes = [(len(reuse.parameters()), stats["nodes_reuse"], stats["macs_reuse"]) for _, reuse, stats in plans]
    assert all(a[1:] < b[1:] and a[0] <= b[0] for a, b in zip(sizes, sizes[1:], strict=False))
    assert sizes[-1][0] < full and all(stats["nodes_reuse"] < stats["nodes_refresh"] for *_, stats in plans)
    _, reuse, stats = plans[0]
    assert stats["macs_reuse"] < 0.6 * stats["macs_refresh"]
    inputs = layout.inputs(2)
    _, written = run(plans[0][0], inputs)
    want = first(run(reuse, inputs, **written))
    own = {id(p) for p in reuse.parameters().values()}
    others = {p: p.detach().clone() for p in layout.model.parameters() if id(p) not in own}
    assert others
    with torch.no_grad():
        for p in others:
            p.fill_(float("nan"))
        got = first(run(reuse, inputs, **written))
        for p, value in others.items():
            p.copy_(value)
    assert torch.equal(got, want)


@pytest.mark.parametrize("batch", [1, 3])
def test_another_batch(layout: Layout, plans: list[Any], batch: int) -> None:
    before = layout.inputs(batch)
    now = later(before)
    branch = layout.skips // 2
    refresh, reuse, _ = plans[branch]
    if layout.dynamic == {}:
        with pytest.raises(gw.InputError, match="to let it vary"):
            run(refresh, before)
        return
    new, kept = eager(layout, before)
    out, stale = run(refresh, before)
    torch.testing.assert_close(first(out), new, rtol=0, atol=EQUAL)
    want, _ = eager(layout, now, {branch: kept[branch]})
    assert want.shape[0] == batch
    torch.testing.assert_close(first(run(reuse, now, **stale)), want, rtol=0, atol=EQUAL)


@pytest.mark.parametrize("layout", ["sd15_controlnet"], indirect=True)
def test_residuals_of_a_controlnet_are_fresh_down_to_the_cut_and_kept_beyond(layout: Layout, plans: list[Any]) -> None:
    now = layout.inputs(2)
    name, branch = "down_block_additional_residuals", 3

    def changed(numbers: range) -> Inputs:
        return now | {name: tuple(v + 0.5 if i in numbers else v for i, v in enumerate(now[name]))}

    refresh, reuse, _ = plans[branch]
    out, written = run(refresh, now)
    for i in range(len(now[name])):
        moved = apart(first(run(reuse, changed(range(i, i + 1)), **written)), first(out))
        assert moved > 1e-3 if i <= branch else moved == 0, i
    middle = now | {"mid_block_additional_residual": now["mid_block_additional_residual"] + 1}
    assert apart(first(run(reuse, middle, **written)), first(out)) == 0


@pytest.mark.parametrize("layout", ["sd15_controlnet"], indirect=True)
def test_with_a_controlnet_equal_to_the_package(layout: Layout, plans: list[Any]) -> None:
    """At the deepest branch the package, DeepCache 0.1.1, adds a new residual to the kept middle: that one differs."""
    from DeepCache import DeepCacheSDHelper

    inputs = layout.inputs(2)

    times = torch.tensor([700, 400])
    model: Any = layout.model
    rest = {name: value for name, value in inputs.items() if name not in ("sample", "timestep")}
    samples = [inputs["sample"], later(inputs)["sample"]]
    others = [rest, {name: later(inputs)[name] for name in rest}]
    for branch in range(layout.skips - 1):
        helper = DeepCacheSDHelper(pipe=SimpleNamespace(unet=model, scheduler=SimpleNamespace(timesteps=times)))
        helper.set_params(cache_interval=2, cache_branch_id=branch)
        helper.enable()
        with torch.no_grad():
            want = [first(model(x, t, **more)) for x, t, more in zip(samples, times, others, strict=True)]
        helper.disable()
        refresh, reuse, _ = plans[branch]
        at = [{"sample": x, "timestep": t.repeat(2), **more} for x, t, more in zip(samples, times, others, strict=True)]
        out, written = run(refresh, at[0])
        torch.testing.assert_close(first(out), want[0], rtol=0, atol=1e-4)
        again = first(run(reuse, at[1], **written))
        torch.testing.assert_close(again, want[1], rtol=0, atol=1e-4)
        assert apart(again, eager(layout, at[1])[0]) > 1e-3


@pytest.mark.parametrize("conditioned", [False, True])
def test_another_height_and_width(conditioned: bool) -> None:
    sizes: Any = {"sample": {0: "batch", 2: "height", 3: "width"}, "timestep": {0: "batch"}}
    if conditioned:
        layout = conditional((8, 16), layers_per_block=1, dynamic=sizes | {"encoder_hidden_states": {0: "batch"}})
    else:
        layout = unconditional(16, (8, 16), 1, sizes)
    for branch in (0, layout.skips - 1):
        stages = gw.Pipeline([InsertFeatureCache(branch=branch)])(layout.program).plan.stages
        for size in ((16, 16), (24, 8)):
            before = layout.inputs(3)
            before["sample"] = image(3, before["sample"].shape[1], *size)
            now = later(before)
            _, kept = eager(layout, before)
            _, stale = run(stages["refresh"].program, before)
            want, _ = eager(layout, now, {branch: kept[branch]})
            torch.testing.assert_close(first(run(stages["reuse"].program, now, **stale)), want, rtol=0, atol=EQUAL)
        assert len(stages["reuse"].program.parameters()) < len(layout.program.parameters())


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
    _, stale = run(stages["refresh"].program, before)
    torch.testing.assert_close(first(run(stages["reuse"].program, now, **stale)), want, rtol=0, atol=EQUAL)
    assert apart(want, new) > 1e-3 and apart(want, old) > 1e-3


def test_a_transformer_between_convolutions_without_long_skips_is_refused() -> None:
    entry = ZOO["uvit2d"].build()
    program = gw.capture(entry.model, entry.args, entry.kwargs, entry.dynamic)
    with pytest.raises(gw.PreconditionError, match="needs a network with skip connections that are concatenated"):
        InsertFeatureCache(timestep="micro_conds")(program)
