"""What digits-ddpm draws, the Frechet judge, picture grids and the calibration loss."""

from __future__ import annotations

import base64
import re
import struct
import zlib

import pytest
import torch

from graphwright.frontends.builtin import digits_images, load_builtin
from graphwright.frontends.capture import capture
from graphwright.graph.errors import PreconditionError
from graphwright.tools import digits
from graphwright.tools.digits_sampler import denoiser, sample_digits
from graphwright.tools.frechet import frechet_distance
from graphwright.tools.pictures import data_uri, image_grid


@pytest.fixture(scope="module")
def unet():
    return load_builtin("digits-ddpm")[0]


@pytest.fixture(scope="module")
def sampled(unet):
    return sample_digits(denoiser(unet), 256, steps=10, seed=3)


def test_sampled_digits_are_near_real_ones_and_damage_shows(sampled):
    train, _ = digits_images()
    chosen = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:256]]
    noise = torch.randn(256, 1, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1.0, 1.0)
    real, generated = digits.digits_frechet(chosen), digits.digits_frechet(sampled)
    blurred = digits.digits_frechet(torch.nn.functional.avg_pool2d(chosen, 3, 1, 1))
    assert generated < real + 2.0
    assert generated < 0.25 * blurred
    assert generated < 0.1 * digits.digits_frechet(noise)
    assert generated < 0.5 * digits.digits_frechet(sampled + 0.5 * noise)


def test_sampled_digits_are_of_every_class_and_varied(sampled):
    classifier = load_builtin("digits-classifier")[0]
    with torch.no_grad():
        scores = classifier(sampled).softmax(1)
    assert len(scores.argmax(1).unique()) == 10
    assert scores.max(1).values.median() > 0.9
    assert sampled.std(0).mean() > 0.3  # one digit again and again would vary less


def test_frechet_of_a_set_with_itself_is_zero_even_if_singular():
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(features, features) == pytest.approx(0.0, abs=1e-9)
    flat = torch.cat([features, features[:, :2], torch.zeros(40, 3)], dim=1)
    assert frechet_distance(flat, flat.numpy()) == pytest.approx(0.0, abs=1e-5)


def test_frechet_of_gaussians_has_its_closed_form():
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(500, 5, generator=generator, dtype=torch.float64)
    shift = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0], dtype=torch.float64)
    assert frechet_distance(features, features + shift) == pytest.approx(shift.square().sum().item())
    # Scaled by s about the mean: trace(C) (1 - s)^2, since s^2 C commutes with C.
    centred = features - features.mean(0)
    trace = torch.cov(features.T).trace().item()
    assert frechet_distance(centred, 3.0 * centred) == pytest.approx(4.0 * trace)


def test_frechet_agrees_with_the_matrix_square_root():
    linalg = pytest.importorskip("scipy.linalg")
    generator = torch.Generator().manual_seed(2)
    a = torch.randn(300, 8, generator=generator, dtype=torch.float64)
    b = torch.randn(200, 8, generator=generator, dtype=torch.float64) @ torch.rand(8, 8, generator=generator).double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    root = linalg.sqrtm((cov_a @ cov_b).numpy()).real.trace()
    expected = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2.0 * root
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_frechet_refuses_what_it_cannot_compare():
    good = torch.zeros(4, 3)
    for wrong in (torch.zeros(4, 2), torch.zeros(1, 3), torch.zeros(3)):
        with pytest.raises(ValueError, match="need features"):
            frechet_distance(good, wrong)
    with pytest.raises(ValueError, match="finite"):
        frechet_distance(good, torch.full((4, 3), torch.nan))
    with pytest.raises(ValueError, match=r"\[n, 1, 8, 8\]"):
        digits.digits_frechet(torch.zeros(4, 8, 8))


def _decode(png: bytes) -> torch.Tensor:
    """Grey levels ``[h, w]`` of an unfiltered 8-bit grey PNG; checks its signature and checksums."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        kind, data = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        assert struct.unpack(">I", png[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + data)
        chunks[kind] = data
        at += 12 + length
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    lines = torch.frombuffer(bytearray(zlib.decompress(chunks[b"IDAT"])), dtype=torch.uint8)
    lines = lines.reshape(height, width + 1)
    assert (lines[:, 0] == 0).all()
    return lines[:, 1:]


def test_grid_draws_each_picture_in_its_place():
    levels = torch.tensor([-1.0, 0.0, 1.0, 5.0, -1.0])
    grid = _decode(image_grid(levels.reshape(5, 1, 1, 1).expand(5, 1, 8, 8), scale=4))
    assert grid.shape == (2 * 33 + 1, 3 * 33 + 1)  # 3 across, 2 down, lines of one pixel
    assert [int(grid[5 + 33 * (i // 3), 5 + 33 * (i % 3)]) for i in range(6)] == [0, 128, 255, 255, 0, 96]


def test_grid_opens_in_an_imaging_library(sampled):
    image = pytest.importorskip("PIL.Image")
    import io

    png = image_grid(sampled[:6], columns=3, scale=2)
    opened = image.open(io.BytesIO(png))
    opened.load()
    assert (opened.mode, opened.size[::-1]) == ("L", tuple(_decode(png).shape))
    uri = data_uri(png)
    assert uri.startswith("data:image/png;base64,") and base64.b64decode(uri.split(",")[1]) == png


def test_grid_refuses_what_it_cannot_draw():
    for images, options in ((torch.zeros(2, 3, 8, 8), {}), (torch.zeros(0, 1, 8, 8), {})):
        with pytest.raises(ValueError, match="n >= 1"):
            image_grid(images, **options)
    with pytest.raises(ValueError, match="positive"):
        image_grid(torch.zeros(1, 1, 8, 8), columns=0)


def test_denoising_loss_is_low_on_unseen_digits_and_seeded(unet):
    held_out = digits_images()[1][:160]
    with torch.no_grad():
        loss = digits.denoising_loss(unet, held_out, seed=0)
        assert torch.equal(loss, digits.denoising_loss(unet, held_out, seed=0))
        assert not torch.equal(loss, digits.denoising_loss(unet, held_out, seed=1))
        zero = digits.denoising_loss(lambda sample, timestep, return_dict: (0.0 * sample,), held_out)
    assert loss < 0.2
    assert zero.item() == pytest.approx(1.0, abs=0.03)


def test_calibration_repeats_and_gives_gradients(unet):
    loss, batches, _ = digits.calibration(count=2, batch=8, seed=5)
    for batch, again in zip(batches, digits.taylor_batches(count=2, batch=8, seed=5), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))
        assert batch.sample.shape == (8, 1, 8, 8) and batch.timestep.dtype == torch.int64
        # One timestep from each eighth of the schedule.
        assert (batch.timestep // 125).sort().values.tolist() == list(range(8))
    assert not torch.equal(batches[0].noise, batches[1].noise)
    weight = unet.conv_in.weight
    (gradient,) = torch.autograd.grad(loss(unet, batches[0]), weight)
    assert gradient.shape == weight.shape and gradient.abs().sum() > 0


def test_calibration_covers_more_than_one_round_of_digits():
    batches = digits.taylor_batches(count=3, batch=1000)
    assert [len(batch.sample) for batch in batches] == [1000] * 3
    with pytest.raises(ValueError, match="positive"):
        digits.taylor_batches(count=0)


def test_samples_are_drawn_from_the_same_noise_and_judged(unet, tmp_path):
    def grey(sample, timestep, return_dict):
        return (sample,)

    program = capture(*load_builtin("digits-ddpm"))
    steps = []
    draw = digits.samples(count=8, steps=2, shown=4)
    drawn = draw(program, {"original, X": grey, "result, X": grey}, tmp_path, lambda *step: steps.append(step))
    first, second = (drawn.models[label] for label in ("original, X", "result, X"))
    found = re.search(r"as many real digits have ([\d.]+)", drawn.note)
    assert found is not None and first.score is not None
    assert drawn.score == "Frechet distance" and first.score == second.score
    assert first.score > float(found[1]) > 0
    assert (tmp_path / first.file).read_bytes() == (tmp_path / second.file).read_bytes()
    assert (tmp_path / first.file).read_bytes().startswith(b"\x89PNG")
    assert steps[-1] == ("draw digits (result, X)", 2, 2)


def test_samples_of_another_kind_of_model_or_too_few_are_refused(tmp_path):
    program = capture(torch.nn.Linear(3, 3), (torch.zeros(2, 3),))
    with pytest.raises(PreconditionError, match="leave `samples` out of the recipe"):
        digits.samples()(program, {}, tmp_path, lambda *step: None)
    with pytest.raises(ValueError, match="count must be at least 2, got 1"):
        digits.samples(count=1)
