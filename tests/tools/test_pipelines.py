"""DeepCache on unmodified diffusers pipelines, beside the package DeepCache, and where that package fails."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graphwright as gw
from graphwright.graph.cost import cost
from graphwright.tools.bench.cache_bed import counting
from graphwright.tools.bench.cache_models import draw as drawn
from graphwright.tools.bench.cache_models import switch_guidance_off, tiny_pipeline

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def pipeline(kind: str = "StableDiffusionPipeline", scheduler: str = "DDIMScheduler", layers: int = 2) -> Any:
    """Return a pipeline with two levels, small widths and embeddings in place of a text encoder."""
    return tiny_pipeline(kind, scheduler, layers_per_block=layers)


@pytest.fixture(autouse=True)
def graphs_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep captured graphs for all tests of this file: capturing the same network anew is most of their time."""
    folder = tmp_path_factory.getbasetemp() / "graphs"
    for name in ("apply_deepcache", "apply_layer_cache"):
        monkeypatch.setattr(gw, name, functools.partial(getattr(gw, name), cache_dir=folder))


def history(handle: Any) -> str:
    return "".join("F" if name == "refresh" else "-" for name in handle.cached._last.history())


@pytest.mark.parametrize("branch", [0, 1, 3, 5])
def test_pictures_are_those_of_the_package(branch: int) -> None:
    from DeepCache import DeepCacheSDHelper

    pipe = pipeline()
    without = drawn(pipe)
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=3, cache_branch_id=branch)
    helper.enable()
    want = drawn(pipe)
    helper.disable()

    pipe = pipeline()
    handle = gw.apply_deepcache(pipe, cache_interval=3, cache_branch_id=branch)
    got = drawn(pipe)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    assert history(handle) == "F--F--"
    assert float((got - without).abs().max()) > 1e-4
    assert "6 evaluations, 2 of them full" in handle.summary()


def test_the_summary_says_what_really_ran() -> None:
    pipe = pipeline()
    handle = gw.apply_deepcache(pipe, interval=3, branch=1)
    drawn(pipe)  # which captures
    with counting() as counter:
        drawn(pipe)
    spent = counter.get_total_flops() / 2
    # Without the decoder of the autoencoder, which does not run for latents.
    full, reuse = (cost(handle.plan.stages[name].program).total_macs for name in ("refresh", "reuse"))
    assert spent == 2 * full + 4 * reuse
    (feature,) = handle.cached._last._runs[""].registers["cached_feature"]
    lines = handle.summary().splitlines()
    assert f"  {spent / 1e9:.4g} of {6 * full / 1e9:.4g} G MACs: at most {6 * full / spent:.2f} times as fast" in lines
    assert f"  {feature[1].numel() * 4 / 1e6:.4g} MB kept" in lines


def test_undone_the_pipeline_is_what_it_was() -> None:
    pipe = pipeline()
    before, attributes, config = drawn(pipe), dict(vars(pipe)), dict(pipe.config)
    unet = dict(vars(pipe.unet))
    with gw.apply_deepcache(pipe) as handle:
        assert pipe.unet.config.sample_size == 8 and pipe.unet.dtype is torch.float32
        drawn(pipe)
    assert vars(pipe) == attributes and dict(pipe.config) == config
    assert vars(pipe.unet).keys() == unet.keys()
    assert torch.equal(drawn(pipe), before)
    handle.disable()
    assert vars(pipe) == attributes


def test_an_interval_of_one_is_bit_identical() -> None:
    pipe = pipeline()
    before = drawn(pipe)
    gw.apply_deepcache(pipe, interval=1)
    assert torch.equal(drawn(pipe), before)


@pytest.mark.parametrize(
    ("scheduler", "steps", "want"), [("PNDMScheduler", 6, "F-F-F-F"), ("HeunDiscreteScheduler", 5, "F-F-F-F-F")]
)
def test_times_that_repeat_do_not_shift_the_schedule(scheduler: str, steps: int, want: str) -> None:
    pipe = pipeline(scheduler=scheduler)
    pipe.scheduler.register_to_config(skip_prk_steps=True)
    handle = gw.apply_deepcache(pipe, interval=2)
    for _ in range(2):
        drawn(pipe, steps=steps)
        assert history(handle) == want


def test_two_pictures_from_pictures_with_other_strengths_are_those_of_fresh_runs() -> None:
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))

    def one(strength: float, pipe: Any) -> Tensor:
        return drawn(pipe, image=image, strength=strength, steps=10)

    shared = pipeline("StableDiffusionImg2ImgPipeline")
    gw.apply_deepcache(shared)
    for strength in (0.8, 0.6, 1.0):
        fresh = pipeline("StableDiffusionImg2ImgPipeline")
        gw.apply_deepcache(fresh)
        assert torch.equal(one(strength, shared), one(strength, fresh))


def test_guidance_switched_off_midway_makes_a_full_evaluation() -> None:
    pipe = pipeline()
    handle = gw.apply_deepcache(pipe)
    drawn(pipe, **switch_guidance_off(3))
    assert history(handle) == "F--FF-"


def test_a_run_stopped_by_an_error_leaves_nothing_behind() -> None:
    def stop(pipe: Any, i: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        if i == 1:
            raise KeyboardInterrupt
        return values

    pipe = pipeline()
    handle = gw.apply_deepcache(pipe)
    want = drawn(pipe, seed=2)
    with pytest.raises(KeyboardInterrupt):
        drawn(pipe, seed=3, callback_on_step_end=stop)
    assert torch.equal(drawn(pipe, seed=2), want)
    assert history(handle) == "F--F--"


def test_other_batches_sizes_and_weights() -> None:
    pipe = pipeline()
    handle = gw.apply_deepcache(pipe)
    drawn(pipe)
    captured = len(handle.cached._plans)
    assert drawn(pipe, num_images_per_prompt=3).shape[0] == 3
    assert len(handle.cached._plans) == captured  # any batch
    before = drawn(pipe)
    with torch.no_grad():
        pipe.unet.conv_out.bias.add_(1)  # in place: the plan reads the same tensor
    changed = drawn(pipe)
    assert float((changed - before).abs().max()) > 0.1
    handle.disable()
    pipe.unet.conv_out.bias = torch.nn.Parameter(pipe.unet.conv_out.bias.detach() * 2)
    with gw.apply_deepcache(pipe, interval=1):
        cached = drawn(pipe)
    assert torch.equal(cached, drawn(pipe))


@pytest.mark.parametrize("layers", [1, 3])
def test_other_numbers_of_layers_have_all_their_branches(layers: int) -> None:
    pipe = pipeline(layers=layers)
    branches = 2 * (layers + 1)
    handle = gw.apply_deepcache(pipe, branch=branches - 1)
    drawn(pipe, steps=2)
    assert history(handle) == "F-"
    handle.disable()
    gw.apply_deepcache(pipe, branch=branches)
    with pytest.raises(gw.PreconditionError, match=f"numbered from 0 .the shallowest. to {branches - 1}"):
        drawn(pipe, steps=2)


class Plain:
    """Somebody's own sampling code."""

    def __init__(self, **parts: Any) -> None:
        vars(self).update(parts)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Plain(scheduler=1), "Plain has no denoiser: a pipeline has one of unet, transformer, prior"),
        (lambda: Plain(unet=torch.nn.Linear(1, 1)), "Plain has no scheduler"),
    ],
)
def test_what_is_no_pipeline_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(gw.PreconditionError, match=message):
        gw.apply_deepcache(make())


def test_a_second_cache_is_refused_and_the_first_still_works() -> None:
    pipe = pipeline()
    handle = gw.apply_deepcache(pipe)
    with pytest.raises(gw.PreconditionError, match="has a cache already"):
        gw.apply_deepcache(pipe)
    with pytest.raises(gw.PreconditionError, match="captured when the pipeline is first called"):
        _ = handle.plan
    drawn(pipe, steps=2)
    assert history(handle) == "F-"


# ---------------------------------------------------------------------- plans from files, and transformers


def test_a_pipeline_runs_on_the_onnx_runtime_like_on_the_plan(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pipe = pipeline(layers=1)
    without = drawn(pipe)
    with gw.apply_deepcache(pipe, interval=2, branch=1) as handle:
        with pytest.raises(gw.PreconditionError, match="there is no plan yet"):
            handle.export_onnx(tmp_path)
        want = drawn(pipe)
        assert isinstance(handle.plan, gw.Plan)
        gw.save_plan(handle.plan, tmp_path / "saved")
        artifact = handle.export_onnx(tmp_path / "onnx", providers=["cpu"])
    assert artifact.max_difference < 1e-4
    for folder, close in (("onnx", 1e-4), ("saved", 0.0)):
        with gw.apply_plan(pipe, tmp_path / folder, providers=["cpu"]) as handle:
            got = drawn(pipe)
            assert history(handle) == "F-F-F-"
            assert "6 evaluations, 3 of them full" in handle.summary()
            if folder == "onnx":
                with pytest.raises(gw.PreconditionError, match="runs on an exported plan already"):
                    handle.export_onnx(tmp_path / "again")
        torch.testing.assert_close(got, want, rtol=close, atol=close * float(want.abs().max()))
    assert float((want - without).abs().max()) > 1e-3
    assert torch.equal(drawn(pipe), without)


def test_a_directory_without_a_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(gw.ArtifactError):
        gw.apply_plan(pipeline(), tmp_path)


def transformer_pipeline() -> Any:
    """Return a class-conditional DiT pipeline of two blocks; nothing of it is near zero."""
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    )
    pipe = diffusers.DiTPipeline(model.eval(), vae.eval(), diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(pipe: Any, steps: int = 6) -> Any:
    generator = torch.Generator().manual_seed(0)
    return torch.as_tensor(pipe([1, 2], num_inference_steps=steps, generator=generator, output_type="np").images)


def test_layer_cache_equals_attention_and_mlp_kept_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = transformer_pipeline()
    without = pictures(pipe)
    with gw.apply_layer_cache(pipe, interval=2, kinds=("attention",)) as handle:
        got = pictures(pipe)
        assert history(handle) == "F-F-F-"
    calls = {"evaluation": -1}
    kept: dict[int, Tensor] = {}
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.update(evaluation=calls["evaluation"] + 1))

    def keep(number: int) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> Tensor:
            if calls["evaluation"] % 2 == 0:
                kept[number] = output
            return kept[number]

        return hook

    for number, block in enumerate(pipe.transformer.transformer_blocks):
        block.attn1.register_forward_hook(keep(number))
    want = pictures(pipe)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert float((want - without).abs().max()) > 1e-3


def test_a_listed_schedule_for_another_number_of_steps_is_refused() -> None:
    pipe = transformer_pipeline()
    with gw.apply_layer_cache(pipe, reuse=((), (0, 1), (), (2,))):
        with pytest.raises(gw.PreconditionError, match="for runs of 4 evaluations, and the sampler will make 6"):
            pictures(pipe)
        assert pictures(pipe, steps=4).isfinite().all()
