"""``graphwright bench cache gpu``: DeepCache end to end on a GPU, which a machine without one reports as not measured.

The U-Net of Stable Diffusion 2.1 at full width with random weights in float16, 512x512 pixels, 50 DDIM steps with guidance,
a full evaluation every third and branch 0: on an A5000 the package DeepCache is published to be 2.33 times as fast as
without it. Ours is to be at least 2.2 times as fast. Seconds are those of the clock, with the GPU waited for.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...frontends.capture import capture
from ...graph.schedules import speedup_bound
from ...passes.base import Pipeline
from ...passes.insert_feature_cache import InsertFeatureCache
from .cache_deepcache import TOKENS, Lane, psnr
from .cache_models import SD_21, conditional
from .cache_rows import Row, Rows

TARGET = 2.2
NOT_MEASURED = "not measured: torch finds no GPU here"
INTERVAL, BRANCH, STEPS, LATENT, REPEATS = 3, 0, 50, 64, 3


def bench(rows: Rows) -> list[Row]:
    """Return the row; where there is no GPU it says so, and is not kept."""
    title = f"SD 2.1, latents {LATENT}x{LATENT}, {STEPS} steps, N={INTERVAL}, branch {BRANCH}"
    head: Row = {"what": title, "target": TARGET}
    if not torch.cuda.is_available():
        return [head | {"note": NOT_MEASURED}]
    name = torch.cuda.get_device_name()
    found = rows.unit("gpu", f"{name}, {title}", lambda: [measure(torch.device("cuda"), torch.float16)])
    return [head | {"note": name} | row for row in found]


@torch.no_grad()
def measure(
    device: torch.device,
    dtype: torch.dtype,
    config: dict[str, Any] = SD_21,
    latent: int = LATENT,
    steps: int = STEPS,
    repeats: int = REPEATS,
) -> Row:
    """Sample with and without the cache in turns, after a run of each to warm up; return medians and the picture's PSNR."""
    torch.manual_seed(0)
    unet = conditional(config).to(device, dtype)
    generator = torch.Generator().manual_seed(0)
    channels = config.get("in_channels", 4)
    noise = torch.randn(1, channels, latent, latent, generator=generator).to(device, dtype)
    text = torch.randn(2, TOKENS, config["cross_attention_dim"], generator=generator).to(device, dtype)
    program = capture(unet, (torch.cat([noise] * 2), torch.tensor(1, device=device), text), {"return_dict": False})
    plan = Pipeline([InsertFeatureCache(branch=BRANCH, interval_steps=INTERVAL)])(program).plan
    running: list[Lane] = []
    models = {"full": unet, "ours": plan.module(clock=lambda: running[-1].scheduler.timesteps)}

    def sampled(model: Callable[..., Any]) -> Tensor:
        running.append(Lane(model, noise, text, steps))
        list(running[-1].run())
        return running[-1].latents.float()

    pictures = {name: sampled(model) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repeats):
        for name, model in models.items():
            seconds[name].append(_seconds(device, lambda m=model: sampled(m)))
    full, ours = (statistics.median(seconds[name]) for name in models)
    bound = speedup_bound(plan.macs(), plan.schedule.programs(steps))
    row: Row = {"full_s": full, "ours_s": ours, "speedup": full / ours, "bound": bound, "holds": full / ours >= TARGET}
    return row | {"psnr": psnr(pictures["ours"], pictures["full"])}


def _seconds(device: torch.device, call: Callable[[], object]) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start
