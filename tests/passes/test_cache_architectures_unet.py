"""Feature caches on the layouts of U-Nets for pictures, against the eager model with a kept tensor put into it.

The models are tiny but have all blocks of the real ones, and random weights of which none is near zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cache_oracle import EQUAL, Checks, Inputs, Layout, Plans, apart, eager, first, later, plans_of, run, skips_of

from graphwright.tools.zoo.diffusers_models import CROSS, LATENT, make, states, steps
from graphwright.tools.zoo.entry import image, source

pytestmark = pytest.mark.slow


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
        dynamic={},
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


SIZES: Inputs = {"sample": {0: "batch", 2: "height", 3: "width"}, "timestep": {0: "batch"}}
LAYOUTS: Mapping[str, Callable[[], Layout]] = {
    "ddpm_cifar10": lambda: unconditional(16, (8, 16, 16, 16), 1, dynamic=SIZES),
    "ddpm_lsun": lambda: unconditional(32, (8, 8, 8, 16, 16, 16), 4, dynamic={}),
    "sd15": conditional,
    "sd21": lambda: conditional(
        layers_per_block=1, use_linear_projection=True, attention_head_dim=(1, 1, 2, 2), dynamic={}
    ),
    "sdxl": xl,
    "sd15_controlnet": lambda: conditional((8, 8, 16), extra=residuals, dynamic={}),
    "ldm4g": lambda: conditional((8, 16, 24), 1, layers_per_block=1, dynamic={}),
    "bk_sdm_without_middle": lambda: conditional(
        (8, 16),
        layers_per_block=1,
        mid_block_type=None,
        num_class_embeds=7,
        extra=lambda b: {"class_labels": torch.arange(b) + 2},
        dynamic=SIZES | {"encoder_hidden_states": {0: "batch"}, "class_labels": {0: "batch"}},
    ),
    "three_layers": lambda: conditional((8, 16), layers_per_block=3, dynamic={}),
    "freeu": lambda: conditional(
        (8, 16, 16), layers_per_block=1, prepare=lambda m: m.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4), dynamic={}
    ),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request) -> Layout:
    return LAYOUTS[request.param]()


@pytest.fixture(scope="module")
def plans(layout: Layout) -> Plans:
    return plans_of(layout)


class Test(Checks):
    """All checks on all layouts."""


@pytest.mark.parametrize("layout", ["sd15_controlnet"], indirect=True)
def test_residuals_of_a_controlnet_are_fresh_down_to_the_cut_and_kept_beyond(layout: Layout, plans: Plans) -> None:
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
def test_with_a_controlnet_equal_to_the_package(layout: Layout, plans: Plans) -> None:
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


@pytest.mark.parametrize("layout", ["ddpm_cifar10", "bk_sdm_without_middle"], indirect=True)
def test_another_height_and_width(layout: Layout, plans: Plans) -> None:
    before = layout.inputs(3)
    before["sample"] = image(3, before["sample"].shape[1], 24, 16)
    now = later(before)
    _, kept = eager(layout, before)
    for branch in (0, layout.skips // 2, layout.skips - 1):
        refresh, reuse, _ = plans[branch]
        _, stale = run(refresh, before)
        want, _ = eager(layout, now, {branch: kept[branch]})
        torch.testing.assert_close(first(run(reuse, now, **stale)), want, rtol=0, atol=EQUAL)
