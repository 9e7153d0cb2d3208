"""``graphwright bench cache onnx``: cached plans in ONNX Runtime, over whole sampling runs.

A plan and the uncached denoiser are exported, and both sample in ONNX Runtime on one thread of the CPU, in turns. The pictures of
the exported plan are to be those of the plan in PyTorch within 1e-4 of the largest value, and its speed-up over the exported
denoiser is to be at least nine tenths of what the multiply-accumulates say. Seconds are CPU seconds of a run's evaluations, from
the call of the denoiser to its return; the sampler's own, which are the same with and without a cache, are left out. Of each
evaluation the fastest of several runs counts: other processes make it slower, never faster. The sessions are opened several times,
so that one whose memory happens to lie badly does not decide.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...backends.onnx_export import export_onnx, load_onnx_plan
from ...backends.runner_program import RunnerProgram
from ...frontends.capture import capture
from ...graph.program import Program
from ...graph.schedules import speedup_bound
from ...passes.base import Pass, Pipeline
from ...passes.insert_feature_cache import InsertFeatureCache
from ...passes.insert_layer_cache import InsertLayerCache
from ..digits import sample_digits
from .cache_bed import GUIDANCE, Bed, Model
from .cache_deepcache import SideBySide
from .cache_models import DIT_S_2, SD_QUARTER, ddim, transformer
from .cache_rows import Row, Rows

MOST_DIFFERENT = 1e-4
# Of the speed-up that multiply-accumulates say.
LEAST = 0.9
OPENINGS = 4
# Runs take seconds; the shorter an evaluation, the more of them it takes to meet one that nothing disturbed.
REPEATS, REPEATS_OF_SHORT, REPEATS_OF_LONG = 4, 10, 2
CPU = ["cpu"]


@dataclass(frozen=True)
class Subject:
    """A denoiser, what draws with it, and caches of it.

    Attributes:
        name: In the table.
        steps: Evaluations of a run.
        program: Captures it.
        draw: Draws with a model that is called like the denoiser.
        caches: By how the table calls them.
        repeats: Runs of each, whenever the sessions are opened.
    """

    name: str
    steps: int
    program: Callable[[], Program]
    draw: Callable[[Model], Tensor]
    caches: dict[str, Pass]
    repeats: int = REPEATS


class Labels:
    """A class-conditional transformer with random weights that draws latents of one class with guidance.

    Args:
        config: Of a ``DiTTransformer2DModel``.
        steps: DDIM steps.
    """

    names = ("hidden_states", "timestep", "class_labels")

    def __init__(self, config: dict[str, Any], steps: int) -> None:
        self.config, self.steps = config, steps

    def inputs(self, latents: Tensor, time: Tensor) -> dict[str, Any]:
        """Return the inputs of an evaluation, the row of no class before that of the class."""
        none = self.config["num_embeds_ada_norm"]
        values = (torch.cat([latents] * 2), time.expand(2), torch.tensor([none, none // 5]))
        return dict(zip(self.names, values, strict=True)) | {"return_dict": False}

    @cached_property
    def program(self) -> Program:
        """The captured transformer, for any batch."""
        torch.manual_seed(0)
        return capture(transformer(self.config), (), self.inputs(self.noise, torch.tensor(1)))

    @property
    def noise(self) -> Tensor:
        """Where a run starts."""
        size, channels = self.config["sample_size"], self.config["in_channels"]
        return torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def draw(self, model: Model) -> Tensor:
        """Return the latents of a run."""
        scheduler, latents = ddim(self.steps), self.noise
        for t in scheduler.timesteps:
            without, with_class = model(**self.inputs(latents, t))[0].chunk(2)
            latents = scheduler.step(without + GUIDANCE * (with_class - without), t, latents, return_dict=False)[0]
        return latents


def subjects(steps: int = 50, count: int = 64, many: int = 256, sd_steps: int = 10) -> list[Subject]:
    """Return what is measured: ``count`` digits at a time, and ``many`` of digits-dit, whose reuses compute least."""
    sd, small = SideBySide(SD_QUARTER, 32, sd_steps), Labels(DIT_S_2, sd_steps)
    feature = {f"DeepCache, branch 0, N={n}": InsertFeatureCache(interval_steps=n, branch=0) for n in (3, 5)}
    layers = {f"InsertLayerCache, N={n}": InsertLayerCache(interval_steps=n, timestep=Labels.names[1]) for n in (2, 3)}

    def digits(name: str, caches: Mapping[str, Pass], count: int, repeats: int) -> Subject:
        bed = Bed(name, steps, count)
        return Subject(
            f"{name}, {count} digits",
            steps,
            lambda: bed.program,
            lambda model: _digits(bed, model),
            dict(caches),
            repeats,
        )

    return [
        digits("digits-ddpm", feature, count, REPEATS_OF_SHORT),
        digits("digits-dit", layers, count, REPEATS_OF_SHORT),
        digits("digits-dit", layers, many, REPEATS_OF_LONG),
        Subject(
            "SD 1.5 at quarter width", sd_steps, lambda: sd.program, lambda model: _latents(sd, model), dict(feature)
        ),
        Subject("DiT-S/2", sd_steps, lambda: small.program, small.draw, dict(layers)),
    ]


def _digits(bed: Bed, model: Model) -> Tensor:
    return sample_digits(bed.denoise(model), bed.count, bed.steps, 0, bed.count)


@torch.no_grad()
def _latents(bed: SideBySide, model: Model) -> Tensor:
    lane = bed.lane(model)
    list(lane.run())
    return lane.latents


def rows_of(subject: Subject, name: str) -> list[Row]:
    """Measure one cache."""
    program = subject.program()
    plan = Pipeline([subject.caches[name]])(program).plan
    want = subject.draw(plan.module())
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(program, Path(folder, "full"), providers=CPU)
        export_onnx(plan, Path(folder, "plan"), providers=CPU)
        seconds: dict[str, list[list[float]]] = {"full": [], "plan": []}
        drawn: dict[str, Tensor] = {}
        for _ in range(OPENINGS):
            plan_of_files = load_onnx_plan(Path(folder, "plan"), CPU, threads=1)
            models = {"full": _opened(Path(folder, "full")), "plan": plan_of_files.module()}
            for key, model in [*models.items()] * subject.repeats:
                timed = Timed(model)
                drawn[key] = subject.draw(timed)
                seconds[key].append(timed.seconds)
    bound = speedup_bound(plan.macs(), plan.schedule.programs(subject.steps))
    spent = {key: sum(map(min, zip(*found, strict=True))) for key, found in seconds.items()}
    speedup = spent["full"] / spent["plan"]
    full, got = drawn["full"], drawn["plan"]
    difference = float((got - want).abs().max() / want.abs().max())
    row: Row = {
        "model": subject.name,
        "setting": name,
        "max_difference": difference,
        "equal": difference <= MOST_DIFFERENT,
    }
    row |= {"from_uncached": float((full - got).abs().max() / full.abs().max())}
    row |= {"full_s": spent["full"], "ours_s": spent["plan"], "speedup": speedup, "bound": bound}
    return [row | {"share": speedup / bound, "in_time": speedup >= LEAST * bound}]


def _opened(folder: Path) -> Any:
    from ...backends.onnx_runner import OnnxRunner

    runner = OnnxRunner(folder, CPU, threads=1)
    return RunnerProgram(runner, runner.manifest).module()


class Timed:
    """A model that writes down the CPU seconds of its calls."""

    def __init__(self, model: Model) -> None:
        self.seconds: list[float] = []
        self._model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return self._model(*args, **kwargs)
        finally:
            self.seconds.append(time.process_time() - start)


def bench(rows: Rows) -> list[Row]:
    """Measure every cache of every subject."""
    return [
        row
        for subject in subjects()
        for name in subject.caches
        for row in rows.unit(
            "onnx", f"{subject.name}, {subject.steps} steps, {name}", lambda s=subject, n=name: rows_of(s, n)
        )
    ]
