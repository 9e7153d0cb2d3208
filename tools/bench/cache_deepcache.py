"""``graphwright bench cache deepcache``: beside the package DeepCache, on the U-Net of Stable Diffusion 1.5 at full width.

Both run the same sampling loop on the same random weights in one process, one evaluation of ours, then one of theirs. The
difference of the latents must be at most 1e-4. Seconds are CPU seconds of the process. Beside them is the attention cache of
diffusers that takes this model, PyramidAttentionBroadcast, at the same intervals.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ...frontends.capture import capture
from ...graph.cost import cost
from ...graph.plan import Plan
from ...graph.program import Program
from ...graph.schedules import REFRESH, REUSE, Uniform, speedup_bound
from ...passes.base import Pipeline
from ...passes.insert_feature_cache import InsertFeatureCache
from .cache_bed import counting
from .cache_helper import kept_bytes, package
from .cache_models import SD_15, conditional, ddim
from .cache_rows import Row, Rows, progress
from .memory import peak_bytes

GUIDANCE = 7.5
MOST_DIFFERENT = 1e-4
# A reuse step may take this much more of a full one's time than of its multiply-accumulates.
SLACK = 1.10
TOKENS = 77


class Lane:
    """One sampling run, an evaluation at a time, with the CPU seconds of each."""

    def __init__(self, unet: Callable[..., Any], noise: Tensor, text: Tensor, steps: int) -> None:
        self.scheduler = ddim(steps, noise.device)
        self.unet = unet
        self.seconds: list[float] = []
        self._latents, self._text = noise, text

    def run(self) -> Iterator[None]:
        """Take the steps; guidance evaluates both conditions as one batch of 2."""
        for t in self.scheduler.timesteps:
            start = time.process_time()
            noise = self.unet(torch.cat([self._latents] * 2), t, self._text, return_dict=False)[0]
            without, with_text = noise.chunk(2)
            guided = without + GUIDANCE * (with_text - without)
            self._latents = self.scheduler.step(guided, t, self._latents, return_dict=False)[0]
            self.seconds.append(time.process_time() - start)
            yield

    @property
    def latents(self) -> Tensor:
        """What the steps so far gave."""
        return self._latents


class SideBySide:
    """The denoiser, its inputs, and what has been made of it so far.

    Args:
        config: Of a ``UNet2DConditionModel``.
        latent: Side of the latents.
        steps: Of every sampling run.
    """

    def __init__(self, config: dict[str, Any] = SD_15, latent: int = 32, steps: int = 10) -> None:
        self.config, self.latent, self.steps = config, latent, steps
        self.capture_seconds = 0.0
        self._plans: dict[int, tuple[Plan, float, float]] = {}

    @property
    def key(self) -> str:
        """Names all that rows depend on but branch and interval."""
        widths = "" if self.config is SD_15 else f", widths {self.config['block_out_channels']}"
        return f"latent {self.latent}, {self.steps} steps{widths}"

    @cached_property
    def unet(self) -> nn.Module:
        """The denoiser, with random weights."""
        torch.manual_seed(0)
        return conditional(self.config)

    @cached_property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """Noise of one picture, and text of both conditions."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(1, self.config.get("in_channels", 4), self.latent, self.latent, generator=generator)
        return noise, torch.randn(2, TOKENS, self.config["cross_attention_dim"], generator=generator)

    @cached_property
    def program(self) -> Program:
        """The captured denoiser, for any batch."""
        noise, text = self.inputs
        start = time.process_time()
        program = capture(self.unet, (torch.cat([noise] * 2), torch.tensor(1), text), {"return_dict": False})
        self.capture_seconds = time.process_time() - start
        return program

    def plan(self, branch: int, interval: int) -> tuple[Plan, float, float]:
        """Return a plan, the bytes it keeps, and the seconds it took to make."""
        if branch not in self._plans:
            program = self.program
            start = time.process_time()
            result = Pipeline([InsertFeatureCache(branch=branch)])(program)
            seconds = time.process_time() - start
            self._plans = {branch: (result.plan, result.records[0].result.stats["register_bytes"], seconds)}
        plan, kept, seconds = self._plans[branch]
        return replace(plan, schedule=Uniform(interval)), kept, seconds

    def lane(self, unet: Callable[..., Any], steps: int | None = None) -> Lane:
        """Return a new sampling run."""
        return Lane(unet, *self.inputs, steps or self.steps)

    @cached_property
    @torch.no_grad()
    def plain(self) -> Lane:
        """The run without a cache, through."""
        lane = self.lane(self.unet)
        for i, _ in enumerate(lane.run()):
            progress(f"  evaluation {i + 1} of {self.steps}: {lane.seconds[-1]:.2f} s")
        return lane

    def uncached(self) -> list[Row]:
        """Measure the run without a cache."""
        seconds = self.plain.seconds
        peak = _megabytes(self.peak(self.lane(self.unet, 1)))
        return [{"uncached_s": sum(seconds), "full_s": statistics.median(seconds), "peak_mb": peak}]

    @torch.no_grad()
    def peak(self, lane: Lane) -> int | None:
        """Take a whole run; return the most memory it needs beside the weights, with what the cache keeps."""
        return peak_bytes(lambda: list(lane.run()))

    @torch.no_grad()
    def compare(self, branch: int, interval: int) -> list[Row]:
        """Measure ours and theirs at one branch and interval; the evaluations take turns."""
        plan, kept, insert_seconds = self.plan(branch, interval)
        ours = self.lane(lambda *args, **kwargs: module(*args, **kwargs))
        module = plan.module(clock=lambda: ours.scheduler.timesteps)
        theirs = self.lane(self.unet)
        pipe = SimpleNamespace(unet=self.unet, scheduler=theirs.scheduler)
        with package(pipe, interval, branch) as helper:
            for i, _ in enumerate(zip(ours.run(), theirs.run(), strict=True)):
                said = f"ours {ours.seconds[-1]:.2f} s, theirs {theirs.seconds[-1]:.2f} s"
                progress(f"  evaluation {i + 1} of {self.steps}: {said}")
            their_bytes = kept_bytes(helper)
        macs = plan.macs()
        ran = module.history()
        row: Row = {
            "branch": branch,
            "interval": interval,
            "latent": self.latent,
            "full_evaluations": ran.count(REFRESH),
        }
        row |= _difference(ours.latents, theirs.latents)
        row |= _ratios(ran, ours.seconds, theirs.seconds, macs[REUSE] / macs[REFRESH])
        row |= {"kept_mb": kept / 1e6, "their_kept_mb": their_bytes / 1e6}
        row["psnr"] = psnr(ours.latents, self.plain.latents)
        return [row | {"capture_s": self.capture_seconds, "insert_s": insert_seconds}]

    def memory(self, branch: int) -> list[Row]:
        """Measure the memory of a full evaluation and a reuse, ours and theirs, beside the weights."""
        plan, _, _ = self.plan(branch, 2)
        module = plan.module()
        mine = self.peak(self.lane(module, 2))
        module.reset()
        theirs = self.lane(self.unet, 2)
        with package(SimpleNamespace(unet=self.unet, scheduler=theirs.scheduler), 2, branch):
            peak = self.peak(theirs)
        return [{"peak_mb": _megabytes(mine), "their_peak_mb": _megabytes(peak)}]

    @torch.no_grad()
    def pyramid(self, interval: int) -> list[Row]:
        """Measure the attention cache of diffusers that takes this model, all attention kept at all times."""
        from importlib import import_module

        hooks: Any = import_module("diffusers.hooks")
        with torch.device("meta"):
            twin = conditional(self.config)  # hooks stay in a module; this one has the same weights
        twin.load_state_dict(self.unet.state_dict(), assign=True)
        now = [0]
        always = (-1, 1001)
        config = hooks.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=interval,
            cross_attention_block_skip_range=interval,
            spatial_attention_timestep_skip_range=always,
            cross_attention_timestep_skip_range=always,
            current_timestep_callback=lambda: now[0],
        )
        hooks.apply_pyramid_attention_broadcast(twin, config)

        def unet(sample: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
            now[0] = int(t)
            return twin(sample, t, *args, **kwargs)

        lane = self.lane(unet)
        list(lane.run())
        with counting() as counter:  # which is slow: of as many evaluations as one full one is followed by
            list(self.lane(unet, interval).run())
        full, ran = cost(self.program).total_macs, Uniform(interval).programs(self.steps)
        reuse = (counter.get_total_flops() / 2 - full) / (interval - 1)
        bound = speedup_bound({REFRESH: full, REUSE: reuse}, ran)
        row: Row = {"interval": interval, "seconds": sum(lane.seconds), "bound": bound}
        return [row | {"psnr": psnr(lane.latents, self.plain.latents)}]


def psnr(picture: Tensor, reference: Tensor) -> float | None:
    """Return the peak signal-to-noise ratio in dB, with the reference's range for the signal; None if they are equal."""
    squared = float((picture - reference).square().mean())
    span = float(reference.max() - reference.min())
    return 10 * math.log10(span * span / squared) if squared else None


def _megabytes(count: int | None) -> float | None:
    return None if count is None else count / 1e6


def _difference(ours: Tensor, theirs: Tensor) -> Row:
    difference, largest = float((ours - theirs).abs().max()), float(theirs.abs().max())
    return {"max_difference": difference, "largest_value": largest, "equal": difference <= MOST_DIFFERENT}


def _ratios(ran: Sequence[str], ours: Sequence[float], theirs: Sequence[float], mac_ratio: float) -> Row:
    """Return seconds a picture and a call, and the reuse calls' share of a full one's time beside that of its MACs."""

    def median(seconds: Sequence[float], name: str) -> float:
        return statistics.median(s for s, stage in zip(seconds, ran, strict=True) if stage == name)

    full, reuse, their_reuse = median(ours, REFRESH), median(ours, REUSE), median(theirs, REUSE)
    row: Row = {"ours_s": sum(ours), "theirs_s": sum(theirs), "refresh_s": full, "reuse_s": reuse}
    row |= {"their_refresh_s": median(theirs, REFRESH), "their_reuse_s": their_reuse}
    row |= {"time_ratio": reuse / full, "their_time_ratio": their_reuse / row["their_refresh_s"]}
    bound = speedup_bound({REFRESH: 1.0, REUSE: mac_ratio}, ran)
    return row | {"mac_ratio": mac_ratio, "in_time": reuse / full <= SLACK * mac_ratio, "bound": bound}


def bench(rows: Rows, bed: SideBySide, branches: Sequence[int], intervals: Sequence[int]) -> list[Row]:
    """Measure every branch at every interval; returns the rows with their speed-up over the uncached run."""
    key = bed.key
    uncached = rows.unit("deepcache", f"{key}, uncached", bed.uncached)[0]["uncached_s"]
    found: list[Row] = []
    for branch in branches:
        peaks = rows.unit("deepcache", f"{key}, branch {branch}, memory", lambda b=branch: bed.memory(b))[0]
        for interval in intervals:
            unit = f"{key}, branch {branch}, N={interval}"
            found += [
                row | peaks for row in rows.unit("deepcache", unit, lambda b=branch, n=interval: bed.compare(b, n))
            ]
    return [row | {"speedup": uncached / row["ours_s"], "their_speedup": uncached / row["theirs_s"]} for row in found]


def attention(rows: Rows, bed: SideBySide, intervals: Sequence[int]) -> list[Row]:
    """Measure the attention cache of diffusers at every interval."""
    key = bed.key
    uncached = rows.unit("deepcache", f"{key}, uncached", bed.uncached)[0]["uncached_s"]
    found = [
        row
        for interval in intervals
        for row in rows.unit("deepcache", f"{key}, attention, N={interval}", lambda n=interval: bed.pyramid(n))
    ]
    return [row | {"speedup": uncached / row["seconds"]} for row in found]
