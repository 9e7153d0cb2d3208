"""Routers as data: what a threshold makes of them, files, and what they refuse; a whole run against hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import graphwright as gw
from graphwright.tools.zoo import ZOO

KINDS = ("attention", "mlp", "attention", "mlp")
LAYERS = [f"transformer_blocks.{i}.{part}" for i in range(2) for part in ("attn1", "ff")]
LOGITS = torch.tensor([[3.0, -3.0, -0.5, 5.0], [-5.0, -5.0, -5.0, -5.0], [1.0, 2.0, 3.0, 4.0], [3.0, -3.0, -0.4, 5.0]])


def router(**changes: Any) -> gw.LayerRouter:
    given = {"evaluations": 10, "cheap": (1, 3, 5, 9), "kinds": KINDS, "logits": LOGITS, "threshold": 0.5, **changes}
    return gw.LayerRouter(**given)


def test_a_branch_is_computed_where_its_gate_is_above_the_threshold() -> None:
    reuse = router().reuse()
    assert reuse == ((), (1, 2), (), (0, 1, 2, 3), (), (), (), (), (), (1, 2))
    assert router().removed() == {"attention": 4, "mlp": 4}
    assert router().patterns() == ((1, 2), (0, 1, 2, 3), ())
    # sigmoid(-0.5) = 0.378, sigmoid(-0.4) = 0.401
    assert router().reuse(0.4)[1] == (1, 2) and router().reuse(0.4)[9] == (1,)
    assert router().removed(0.02) == {"attention": 2, "mlp": 2}


def test_a_higher_threshold_reuses_more() -> None:
    wide = router(logits=torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) * 2)
    taken = [{(i, b) for i, row in enumerate(wide.reuse(t)) for b in row} for t in (0.05, 0.2, 0.5, 0.8, 0.95)]
    assert all(a <= b for a, b in zip(taken, taken[1:], strict=False)) and len(taken[0]) < len(taken[-1])


def test_a_file_gives_the_router_back(tmp_path: Path) -> None:
    made = router(settings={"lam": 1e-5, "rounds": 3, "clamp": [-5, 5]}, threshold=0.3)
    made.save(tmp_path / "r.safetensors")
    got = gw.LayerRouter.load(tmp_path / "r.safetensors")
    assert torch.equal(got.logits, made.logits) and got.settings == made.settings
    assert (got.evaluations, got.cheap, got.kinds, got.threshold) == (10, (1, 3, 5, 9), KINDS, 0.3)
    assert [file.name for file in tmp_path.iterdir()] == ["r.safetensors"]


@pytest.mark.parametrize("what", ["absent", "damaged", "foreign"])
def test_a_file_that_is_no_router_is_refused(tmp_path: Path, what: str) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "r.safetensors"
    if what == "damaged":
        file.write_bytes(b"nothing of the kind")
    elif what == "foreign":
        save_file({"logits": LOGITS}, file)
    message = {"absent": "no file", "damaged": "damaged", "foreign": "no layer router that graphwright wrote"}[what]
    with pytest.raises(gw.ArtifactError, match=message):
        gw.LayerRouter.load(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cheap": (0, 1, 3, 5)}, "from 1 to 9, since evaluation 0 is full"),
        ({"cheap": (1, 3, 5, 10)}, "from 1 to 9"),
        ({"cheap": (3, 1, 5, 9)}, "must ascend"),
        ({"kinds": KINDS[:3]}, r"4 cheap evaluations and 3 branches needs logits of that shape, got \[4, 4\]"),
        ({"logits": LOGITS.clone().fill_(float("nan"))}, "one of them is not"),
        ({"threshold": 1.0}, "between 0"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(gw.PreconditionError, match=message):
        router(**changes)


# ---------------------------------------------------------------------- on a model


@pytest.fixture(scope="module")
def dit() -> Any:
    case = ZOO["dit"].build()
    return case, gw.capture(case.model, case.args, case.kwargs, case.dynamic)


class Sampler:
    """Ten steps with guidance as one batch of two conditions; the grid of times is its own, as a scheduler's is."""

    def __init__(self, case: Any, steps: int) -> None:
        self.case, self.timesteps = case, torch.linspace(95, 5, steps).long()

    def clock(self) -> Any:
        return self.timesteps

    def run(self, denoiser: Any, before: Any = lambda i: None) -> Tensor:
        x = self.case.kwargs["hidden_states"][:1]
        for i, t in enumerate(self.timesteps):
            before(i)
            with torch.no_grad():
                both = denoiser(
                    **{
                        **self.case.kwargs,
                        "hidden_states": torch.cat([x, x]),
                        "timestep": t.expand(2),
                        "class_labels": torch.tensor([1, 3]),
                    }
                )
            cond, uncond = next(v for v in pytree.tree_leaves(both) if isinstance(v, Tensor))[:, : x.shape[1]].chunk(2)
            x = x - 0.1 * (uncond + 1.5 * (cond - uncond))
        return x


def by_hand(case: Any, sampler: Sampler, reuse: tuple[tuple[int, ...], ...]) -> Tensor:
    """Sample with hooks that keep the layers' results at full evaluations and give them back at the others."""
    kept: dict[int, Tensor] = {}
    now = [0]

    def keep(number: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            if not reuse[now[0]]:
                kept[number] = output
            return kept[number] if number in reuse[now[0]] else output

        return hook

    hooks = [case.model.get_submodule(name).register_forward_hook(keep(i)) for i, name in enumerate(LAYERS)]
    try:
        return sampler.run(case.model, lambda i: now.__setitem__(0, i))
    finally:
        for hook in hooks:
            hook.remove()


def test_a_guided_run_of_ten_steps_equals_the_hooks(dit) -> None:
    case, program = dit
    made, sampler = router(), Sampler(case, 10)
    plan = gw.Pipeline([made.layer_cache()])(program).plan
    module = plan.module(clock=sampler.clock)
    got, want = sampler.run(module), by_hand(case, sampler, made.reuse())
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    assert module.history().count("refresh") == 7 and len(set(module.history())) == 3
    assert float((want - sampler.run(case.model)).abs().max()) > 1e-3  # the cache changes the picture


@pytest.mark.parametrize("steps", [8, 11])
def test_a_sampler_of_another_length_is_refused(dit, steps: int) -> None:
    case, program = dit
    sampler = Sampler(case, steps)
    plan = gw.Pipeline([router().layer_cache()])(program).plan
    with pytest.raises(
        gw.PreconditionError, match=f"for runs of 10 evaluations, and the sampler will make {steps}; set it to 10"
    ):
        sampler.run(plan.module(clock=sampler.clock))


def test_without_a_clock_a_longer_run_is_refused(dit) -> None:
    case, program = dit
    plan = gw.Pipeline([router().layer_cache()])(program).plan
    with pytest.raises(gw.PreconditionError, match="for runs of 10 evaluations, and this run goes on"):
        Sampler(case, 11).run(plan.module())


@pytest.mark.parametrize(
    ("kinds", "logits", "message"),
    [
        (KINDS[:2], LOGITS[:, :2], "for 2 branches, and DiTTransformer2DModel has 4"),
        (("mlp", *KINDS[1:]), LOGITS, "branch 0 is of kind mlp, and in DiTTransformer2DModel it is of kind attention"),
    ],
)
def test_another_model_is_refused(dit, kinds: tuple[str, ...], logits: Tensor, message: str) -> None:
    _, program = dit
    made = router(kinds=kinds, logits=logits)
    with pytest.raises(gw.PreconditionError, match=message):
        made.check(program)
    with pytest.raises(gw.PreconditionError, match=message):
        gw.Pipeline([made.layer_cache()])(program)


def test_the_length_of_a_run_can_be_checked_before_it(dit) -> None:
    _, program = dit
    router().check(program, 10)
    with pytest.raises(gw.PreconditionError, match="for runs of 10 evaluations, got 20"):
        router().check(program, 20)
