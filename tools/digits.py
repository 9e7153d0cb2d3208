"""Judge a digit denoiser by its pictures: sampling, Frechet distance, picture grids and a calibration loss.

A compiled, pruned or quantised copy of ``builtin:digits-ddpm`` is good if it still draws digits. Everything
here takes any callable, so that an eager module, a program and an ONNX Runtime session are judged alike::

    module, _, _ = load_builtin("digits-ddpm")
    images = sample_digits(denoiser(module), count=256)
    print(digits_frechet(images))
    Path("digits.png").write_bytes(image_grid(images[:64]))
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..frontends.builtin import DigitClassifier, digits_classifier, digits_images

__all__ = [
    "SCHEDULE",
    "NoisyBatch",
    "calibration",
    "data_uri",
    "denoiser",
    "denoising_loss",
    "digits_features",
    "digits_frechet",
    "epsilon_loss",
    "frechet_distance",
    "image_grid",
    "noisy_batch",
    "sample_digits",
    "taylor_batches",
]

# ``denoise(sample [n, 1, 8, 8], timestep [n] int64) -> noise [n, 1, 8, 8]`` (a tensor or a NumPy array).
Denoise = Callable[[Tensor, Tensor], Any]

# Noise schedule of ``digits-ddpm`` (as in its ``scheduler_config.json``), for diffusers' schedulers.
SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "epsilon",
    "clip_sample": True,
    "clip_sample_range": 1.0,
}

MAX_BATCH = 128


class NoisyBatch(NamedTuple):
    """Digits with known noise: sample ``[n, 1, 8, 8]``, timestep ``[n]`` int64, noise ``[n, 1, 8, 8]``."""

    sample: Tensor
    timestep: Tensor
    noise: Tensor


def denoiser(program: Callable[..., Any]) -> Denoise:
    """Return a `Denoise` of a program called as ``program(sample, timestep, return_dict=False)[0]``."""

    def denoise(sample: Tensor, timestep: Tensor) -> Tensor:
        return program(sample, timestep, return_dict=False)[0]

    return denoise


@torch.no_grad()
def sample_digits(
    denoise: Denoise,
    count: int,
    steps: int = 50,
    seed: int = 0,
    batch: int | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw digits by deterministic DDIM sampling (eta 0).

    All starting noise is drawn first, on the CPU: a seed gives the same pictures for every batch size and
    device, up to rounding.

    Args:
        denoise: Predicts the noise, see `Denoise`; for a module, ``denoiser(module)``.
        count: Number of pictures.
        steps: DDIM steps, 1 to 1000; each calls ``denoise`` once per batch.
        seed: Of the starting noise.
        batch: Rows of every call, by default ``min(count, 128)``. The last batch is padded to it, so that
            programs compiled for one shape need no other.
        device: Where ``denoise`` gets its inputs.

    Returns:
        ``[count, 1, 8, 8]``, float32, on the CPU, in [-1, 1].

    Raises:
        ValueError: Count, steps or batch is out of range, or ``denoise`` returns another shape.
        ImportError: diffusers is not installed.
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    rows = min(count, MAX_BATCH) if batch is None else batch
    if count < 1 or rows < 1 or not 1 <= steps <= 1000:
        raise ValueError(f"need count {count} >= 1, batch {rows} >= 1 and steps {steps} within 1 to 1000")
    noise = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    done = []
    for start in range(0, count, rows):
        sample = noise[start : start + rows]
        kept = len(sample)
        sample = torch.cat([sample, sample[:1].expand(rows - kept, -1, -1, -1)]).to(device)
        scheduler = DDIMScheduler(**SCHEDULE)
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps.tolist():
            timestep = torch.full((rows,), t, dtype=torch.int64, device=device)
            noise_now = torch.as_tensor(denoise(sample, timestep), dtype=torch.float32, device=sample.device)
            if noise_now.shape != sample.shape:
                raise ValueError(f"denoise returned shape {list(noise_now.shape)} for {list(sample.shape)}")
            # The noise is derived again from the clipped picture, else an early step's overshoot stays in it.
            step = scheduler.step(noise_now, t, sample, use_clipped_model_output=True, return_dict=False)
            sample = step[0]
        done.append(sample[:kept].cpu())
    return torch.cat(done).clamp(-1.0, 1.0)


def frechet_distance(features_a: Any, features_b: Any) -> float:
    """Return the squared Frechet distance between Gaussians fitted to two sets of features (as in FID).

    ``|mean_a - mean_b|^2 + trace(A + B - 2 (A B)^(1/2))`` for the covariances A and B, in float64. The trace
    of the root comes from the eigenvalues of the symmetric ``A^(1/2) B A^(1/2)``, which stay real
    where a root of the product turns complex for nearly singular covariances.

    Args:
        features_a: Tensor or array ``[n, d]`` with n at least 2; a small n biases the distance upwards.
        features_b: Tensor or array ``[m, d]`` with m at least 2.

    Returns:
        The distance, in squared feature units; 0 for equal Gaussians.

    Raises:
        ValueError: The shapes do not fit, or a feature is not finite.
    """
    a, b = (torch.as_tensor(f).detach().to("cpu", torch.float64) for f in (features_a, features_b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"need features [n >= 2, d] and [m >= 2, d], got {list(a.shape)}, {list(b.shape)}")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("features must be finite")
    cov_a, cov_b = (torch.cov(f.T).reshape(f.shape[1], f.shape[1]) for f in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0.0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2.0 * cross
    return max(float(distance), 0.0)  # rounding can leave -1e-15


@torch.no_grad()
def digits_features(images: Tensor, classifier: DigitClassifier | None = None) -> Tensor:
    """Return features ``[n, 64]`` of images ``[n, 1, 8, 8]`` in [-1, 1], by default in the shipped classifier."""
    model = digits_classifier() if classifier is None else classifier
    return torch.cat([model.features(part) for part in images.to(torch.float32).split(512)])


def digits_frechet(images: Tensor) -> float:
    """Return the Frechet distance from pictures to all 1797 real digits, in the shipped classifier's features.

    Args:
        images: ``[n, 1, 8, 8]`` in [-1, 1]; compare distances at equal n only (256 or more).

    Raises:
        ValueError: The shape is another one, or a pixel is not finite.
        ImportError: scikit-learn is not installed.
    """
    if images.ndim != 4 or images.shape[1:] != (1, 8, 8):
        raise ValueError(f"images must be [n, 1, 8, 8], got {list(images.shape)}")
    return frechet_distance(digits_features(images), _real_features())


def image_grid(images: Tensor, columns: int | None = None, scale: int = 8) -> bytes:
    """Draws grey pictures as one PNG, in rows, without an imaging library.

    Args:
        images: tensor ``[n, 1, h, w]`` in [-1, 1] (clamped); -1 is black.
        columns: pictures in a row, by default the root of n rounded up.
        scale: side of a drawn pixel.

    Returns:
        The bytes of an 8-bit grey PNG file; pictures are parted by a grey line of ``scale`` / 4 pixels.

    Raises:
        ValueError: the shape is another one, or columns or scale is not positive.
    """
    if images.ndim != 4 or images.shape[1] != 1 or not len(images):
        raise ValueError(f"images must be [n, 1, h, w] with n >= 1, got {list(images.shape)}")
    across = math.ceil(math.sqrt(len(images))) if columns is None else columns
    if across < 1 or scale < 1:
        raise ValueError(f"columns {across} and scale {scale} must be positive")
    down, gap = math.ceil(len(images) / across), max(1, scale // 4)
    grey = images.detach().to("cpu", torch.float32).clamp(-1.0, 1.0).add(1.0).mul(127.5).round()
    grey = grey[:, 0].to(torch.uint8).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    high, wide = grey.shape[1] + gap, grey.shape[2] + gap
    canvas = torch.full((down * high + gap, across * wide + gap), 96, dtype=torch.uint8)
    for i, picture in enumerate(grey):
        top, left = gap + i // across * high, gap + i % across * wide
        canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    # 8 bits of grey; then the only compression and filter methods there are, and no interlacing.
    header = struct.pack(">IIBBBBB", canvas.shape[1], canvas.shape[0], 8, 0, 0, 0, 0)
    lines = b"".join(b"\0" + row.numpy().tobytes() for row in canvas)  # each line starts with filter 0, none
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    packed = (struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def data_uri(png: bytes) -> str:
    """A PNG as a ``data:`` address, for a report that must be one HTML file."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def noisy_batch(images: Tensor, seed: int = 0) -> NoisyBatch:
    """Add seeded noise at random timesteps to images ``[n, 1, 8, 8]`` in [-1, 1], as in training.

    Timesteps are stratified, one from each n-th of the range 0 to 999, which lowers the variance of a loss.
    """
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    scheduler = DDPMScheduler(**SCHEDULE)
    generator = torch.Generator().manual_seed(seed)
    count, levels = len(images), scheduler.config["num_train_timesteps"]
    spread = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    timestep = (spread * levels).to(torch.int64).clamp(max=levels - 1)
    noise = torch.randn(images.shape, generator=generator)
    return NoisyBatch(scheduler.add_noise(images, noise, timestep), timestep, noise)


def epsilon_loss(program: Callable[..., Any], batch: NoisyBatch) -> Tensor:
    """Return the mean squared error, a scalar, of the noise that ``program(sample, timestep, return_dict=False)[0]`` is."""
    return nn.functional.mse_loss(program(batch.sample, batch.timestep, return_dict=False)[0], batch.noise)


def denoising_loss(module: Callable[..., Any], images: Tensor, seed: int = 0) -> Tensor:
    """Return the training loss on given images: mean squared noise error over random timesteps.

    Args:
        module: Module or program, called as ``module(sample, timestep, return_dict=False)[0]``.
        images: ``[n, 1, 8, 8]`` in [-1, 1].
        seed: Of timesteps and noise; equal seeds make losses of two modules comparable.

    Returns:
        A scalar tensor; 1.0 is what predicting zero scores.
    """
    return epsilon_loss(module, noisy_batch(images, seed))


def taylor_batches(count: int = 8, batch: int = 64, seed: int = 0) -> list[NoisyBatch]:
    """Return noisy batches of real training digits, for importance scores that need gradients.

    Args:
        count: Number of batches.
        batch: Digits in each; count * batch may exceed the 1438 training digits, which then come again.
        seed: Of the choice of digits, timesteps and noise.

    Raises:
        ValueError: Count or batch is not positive.
        ImportError: scikit-learn or diffusers is not installed.
    """
    if count < 1 or batch < 1:
        raise ValueError(f"count {count} and batch {batch} must be positive")
    train, _ = digits_images()
    generator = torch.Generator().manual_seed(seed)
    rounds = math.ceil(count * batch / len(train))
    order = torch.cat([torch.randperm(len(train), generator=generator) for _ in range(rounds)])
    seeds = torch.randint(0, 2**31, (count,), generator=generator).tolist()
    return [noisy_batch(train[order[i * batch : (i + 1) * batch]], seeds[i]) for i in range(count)]


def calibration(
    count: int = 8, batch: int = 64, seed: int = 0
) -> tuple[Callable[[Callable[..., Any], NoisyBatch], Tensor], list[NoisyBatch]]:
    """Return what a gradient-based importance score needs: ``(loss, batches)``, used as ``loss(program, batch)``.

    Arguments and errors are those of `taylor_batches`; the loss is `epsilon_loss`.
    """
    return epsilon_loss, taylor_batches(count, batch, seed)


@cache
def _real_features() -> Tensor:
    """Return features of every real digit ``[1797, 64]``; they never change, and reading the digits is slow."""
    return digits_features(torch.cat(digits_images()))
