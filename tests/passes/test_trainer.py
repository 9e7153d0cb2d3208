"""The trainer: against a loop written by hand, resumed runs against unbroken ones, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from graphwright.graph.errors import PreconditionError
from graphwright.passes.trainer import STATE, Training, train


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 3)).train()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, 8, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*data()), batch_size=16, shuffle=True)


def noisy(module: Any, batch: Any) -> Tensor:
    """A loss that draws: like the noise of a diffusion model's."""
    return nn.functional.cross_entropy(module(batch[0] + 0.1 * torch.randn_like(batch[0])), batch[1])


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_equals_a_loop_written_by_hand() -> None:
    x, y = data()
    batches = [(x[:20], y[:20]), (x[20:40], y[20:40]), (x[40:], y[40:])]

    def loss(module: Any, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(module(batch[0]), batch[1])

    trained, by_hand = model().eval(), model().eval()
    before = weights(trained)
    training = Training(
        steps=7, learning_rate=0.03, optimizer="adam", decay="cosine", warmup=2, clip=0.5, average=0.8, accumulate=2
    )
    done = train(trained, loss, batches, training)

    optimizer = torch.optim.Adam(by_hand.parameters(), lr=0.03)
    averaged, losses, position = [p.detach().clone() for p in by_hand.parameters()], [], 0
    for step in range(7):
        rate = 0.03 * min(1, (step + 1) / 2) * 0.5 * (1 + math.cos(math.pi * max(0, step - 2) / 5))
        optimizer.param_groups[0]["lr"] = rate
        parts = []
        for _ in range(2):
            parts.append(loss(by_hand, batches[position % 3]))
            (parts[-1] / 2).backward()
            position += 1
        nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        # torch's moving average begins as a copy of the first weights that it is shown.
        decay = min(0.8, (1 + step) / (10 + step))
        for kept, new in zip(averaged, by_hand.parameters(), strict=True):
            kept.copy_(new if step == 0 else decay * kept + (1 - decay) * new).detach_()
        losses.append(sum(float(part.detach()) for part in parts) / 2)
    torch.testing.assert_close(weights(trained), torch.cat([a.detach().flatten() for a in averaged]))
    assert done.losses == pytest.approx(losses) and len(set(losses)) == 7
    assert float((weights(trained) - before).abs().max()) > 0.02
    assert not trained.training and "forward" not in vars(trained)


@pytest.mark.parametrize("stop", [3, 4, 5, 8, 9])  # within epochs of four batches, at their ends, before the last step
def test_a_resumed_training_ends_with_the_weights_of_an_unbroken_one(tmp_path: Path, stop: int) -> None:
    training = Training(steps=11, learning_rate=0.02, decay="linear", average=0.9, save_every=1, seed=3)
    unbroken = model()
    wanted = train(unbroken, noisy, loader(), training)

    class Killed(BaseException):
        pass

    def progress(what: str, done: int, total: int) -> None:
        assert (what, total) == ("train", 11)
        if done == stop:
            raise Killed

    folder = tmp_path / "checkpoint"
    with pytest.raises(Killed):
        train(model(), noisy, loader(), training, folder=folder, progress=progress)
    assert (folder / STATE).is_file()
    resumed = model()
    done = train(resumed, noisy, loader(), training, folder=folder)
    assert done.resumed == stop and done.losses == wanted.losses
    assert torch.equal(weights(resumed), weights(unbroken))
    assert not folder.exists()


def test_one_seed_one_result_and_torchs_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    found = []
    for seed in (0, 0, 1):
        one = model()
        torch.manual_seed(5)
        train(one, noisy, loader(), Training(steps=3, seed=seed))
        assert torch.equal(torch.get_rng_state(), state)
        found.append(weights(one))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_precision_concerns_the_computation_alone() -> None:
    half, full = model().eval(), model().eval()
    seen = []

    def loss(module: Any, batch: Any) -> Tensor:
        seen.append(module[0](batch[0]).dtype)
        return nn.functional.cross_entropy(module(batch[0]).float(), batch[1])

    for one, precision in ((half, "bf16"), (full, "no")):
        train(one, loss, [data()], Training(steps=3, learning_rate=0.05, optimizer="sgd", precision=precision))
    assert seen[0] == torch.bfloat16 and seen[-1] == torch.float32
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    assert 0 < float((weights(half) - weights(full)).abs().max()) < 1e-3


def test_a_penalty_adds_gradients_and_is_in_checkpoints(tmp_path: Path) -> None:
    class Counting:
        calls = 0

        def __call__(self, tensors: Any) -> dict[str, Tensor]:
            self.calls += 1
            return {name: 0.1 * self.calls * t.detach() for name, t in tensors.items()}

        def state_dict(self) -> dict[str, Any]:
            return {"calls": self.calls}

        def load_state_dict(self, state: Any) -> None:
            self.calls = state["calls"]

    def still(module: Any, batch: Any) -> Tensor:
        return module(batch).sum() * 0.0

    training = Training(steps=4, learning_rate=0.5, optimizer="sgd", clip=0, save_every=2)
    plain = nn.Linear(3, 2)
    first = weights(plain).clone()
    copies = [nn.Linear(3, 2), nn.Linear(3, 2)]
    for one in copies:
        one.load_state_dict(plain.state_dict())
    train(plain, still, [torch.ones(1, 3)], training, penalty=Counting())
    assert 0 < float(weights(plain).norm()) < 0.9 * float(first.norm())

    class Killed(BaseException):
        pass

    def killer(what: str, done: int, total: int) -> None:
        if done == 3:
            raise Killed

    with pytest.raises(Killed):
        train(
            copies[0], still, [torch.ones(1, 3)], training, penalty=Counting(), folder=tmp_path / "c", progress=killer
        )
    again = Counting()
    train(copies[1], still, [torch.ones(1, 3)], training, penalty=again, folder=tmp_path / "c")
    assert again.calls == 4 and torch.equal(weights(copies[1]), weights(plain))


def test_wrong_input_is_refused(tmp_path: Path) -> None:
    one, training = model(), Training(steps=2)

    def refused(said: str, loss: Any = noisy, batches: Any = None, module: nn.Module = one, **more: Any) -> None:
        with pytest.raises(PreconditionError, match=said):
            train(module, loss, [data()] if batches is None else batches, training, **more)

    refused("has no parameter that requires a gradient", module=nn.ReLU())
    refused("there is no batch to train on", batches=[])
    refused("there is no batch to train on", batches=iter([data()]))
    refused("must be a scalar tensor, got \\[60, 3\\]", loss=lambda m, b: m(b[0]))
    refused("the loss of step 1 is nan", loss=lambda m, b: m(b[0]).sum() * float("nan"))
    refused("does not depend on the parameters", loss=lambda m, b: b[0].sum())
    refused("on the meta device", module=nn.Linear(2, 2, device="meta"))
    folder = tmp_path / "checkpoint"

    def stop(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(one, noisy, loader(), Training(steps=2, save_every=1), folder=folder, progress=stop)
    refused("checkpoint of another training \\(save_every was 1 and is 500\\)", folder=folder)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"optimizer": "lion"}, "optimizer must be one of adam, adamw, sgd"),
        ({"learning_rate": -1.0}, "learning_rate must be finite and not negative"),
        ({"average": 1.0}, "average must be in"),
        ({"precision": "int8"}, "precision must be one of no, fp16, bf16"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Training(**{"steps": 1, **options})
