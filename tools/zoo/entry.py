"""The two records of the zoo, and the initialisation that makes every weight of a tiny model matter."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One built model, ready to be captured.

    Attributes:
        model: the module in eval mode, float32, with seeded random weights.
        args: positional example inputs, batch 2.
        kwargs: keyword example inputs.
        dynamic: ``None`` makes dimension 0 of every tensor input dynamic; otherwise the ``dynamic_shapes``
            of ``torch.export.export``, where an empty dictionary means that nothing is dynamic.
        second: inputs at a second shape (batch 3), or ``None`` where the model accepts only one.
    """

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    dynamic: dict[str, Any] | None = None
    second: Inputs | None = None

    def run(self) -> Any:
        """Return the model's output on the example inputs, without gradients."""
        with torch.no_grad():
            return self.model(*self.args, **self.kwargs)


@dataclass(frozen=True)
class Entry:
    """A named recipe for a case; building imports whatever library the model comes from.

    Attributes:
        name: the unique name.
        family: where the model comes from: torch, transformers, diffusers, timm, torchvision or odd.
        build: makes the case; every call gives equal weights and equal inputs.
        requires: importable modules without which the entry is skipped.
        note: what is special about the entry, in one line.
        float64: whether the model runs in double precision: not if an operator has no such kernel, or if the model
            makes single-precision tensors itself.
    """

    name: str
    family: str
    build: Callable[[], Case]
    requires: tuple[str, ...] = ()
    note: str = ""
    float64: bool = True


def tensors(value: Any) -> list[torch.Tensor]:
    """List the tensors inside nested containers and dataclass outputs, in order."""
    leaves, _ = tree_flatten(value)
    found: list[torch.Tensor] = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dataclass_fields__"):
            found += tensors([getattr(leaf, name) for name in leaf.__dataclass_fields__])
    return found


def source(seed: int) -> torch.Generator:
    """Return a generator that depends on nothing but the seed."""
    return torch.Generator().manual_seed(seed)


def image(batch: int, channels: int, *size: int, seed: int = 1) -> torch.Tensor:
    """Return a random tensor (batch, channels, *size); samples differ in contrast and mean, as pictures do."""
    gen = source(seed + batch)
    x = torch.randn(batch, channels, *size, generator=gen)
    contrast = 0.5 + torch.arange(batch).view(-1, *[1] * (x.ndim - 1)) % 3 * 0.5
    return x * contrast + torch.randn(batch, channels, *[1] * len(size), generator=gen) * (len(size) > 1)


def tokens(batch: int, length: int, vocabulary: int, seed: int = 2) -> torch.Tensor:
    """Return random token indices (batch, length); the lowest three are avoided, they tend to be special."""
    return torch.randint(min(3, vocabulary - 1), vocabulary, (batch, length), generator=source(seed + batch))


def case(
    model: nn.Module,
    make: Callable[[int], Any],
    *,
    seed: int = 0,
    dynamic: dict[str, Any] | None = None,
    init: bool = True,
    second: bool = True,
    floor: float = 0.06,
) -> Case:
    """Initialise a model and pair it with its inputs.

    Args:
        model: the module.
        make: batch size to inputs: a dictionary (keyword arguments), a tuple (positional) or one tensor.
        seed: of the weights.
        dynamic: see `Case`.
        init: false leaves the weights as the caller set them.
        second: false where the model accepts one shape only.
        floor: least running variance of a batch norm; a channel that hardly varies would be blown up.
    """
    if init:
        seeded_init(model, seed)
    model.eval()

    def inputs(batch: int) -> Inputs:
        made = make(batch)
        if isinstance(made, dict):
            return (), made
        return (made if isinstance(made, tuple) else (made,)), {}

    args, kwargs = inputs(2)
    if init:
        _calibrate(model, args, kwargs, source(seed + 55), floor)
        _wake(model, args, kwargs)
    return Case(model, args, kwargs, dynamic, inputs(3) if second else None)


def _calibrate(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], gen: torch.Generator, floor: float
) -> None:
    """Set the running statistics of batch norms to those of the example inputs, then shift them at random.

    Statistics that ignore the activations let deep residual networks grow without bound.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.train()
            norm.momentum = 1.0
        with torch.no_grad():
            model(*args, **kwargs)
    except ValueError:  # one value per channel: the random statistics stay
        pass
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval()
        norm.momentum = momentum
        mean, var, count = norm.running_mean, norm.running_var, norm.num_batches_tracked
        if mean is not None and var is not None and count is not None:
            count.zero_()
            mean += var.sqrt() * _signed(var.shape, 0.05, 0.2, gen)
            var *= 0.6 + 0.8 * torch.rand(var.shape, generator=gen)
            var.clamp_(min=floor)


def _wake(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], rounds: int = 4) -> None:
    """Raise the biases that have no influence on the output: rectified units that no example input reaches.

    A unit that is always off would let a wrongly removed neighbour pass unseen.
    """
    for turn in range(rounds):
        gen = source(77)
        outputs = [out for out in tensors(model(*args, **kwargs)) if out.requires_grad]
        if not outputs:
            return
        torch.stack([(out * torch.randn(out.shape, generator=gen)).sum() for out in outputs]).sum().backward()
        changed = False
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "bias" in name and parameter.ndim == 1 and parameter.grad is not None:
                    asleep = parameter.grad == 0
                    if asleep.any() and (turn < 2 or not asleep.all()):
                        parameter += 0.5 * 2 ** min(turn, 2) * asleep
                        changed = True
        model.zero_grad(set_to_none=True)
        if not changed:
            return


def _signed(shape: torch.Size, low: float, high: float, gen: torch.Generator) -> torch.Tensor:
    """Random magnitudes between two bounds, with random signs."""
    size = torch.rand(shape, generator=gen) * (high - low) + low
    return torch.where(torch.rand(shape, generator=gen) < 0.5, -size, size)


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer, whatever library it comes from."""
    return "norm" in type(module).__name__.lower() and not list(module.children())


def _value(module: nn.Module, name: str, old: torch.Tensor, gen: torch.Generator) -> torch.Tensor:
    """Draw the new value of one parameter of a module."""
    if old.ndim == 0:
        return old.detach().clone()  # temperatures: their stored value is the sane one
    if _is_norm(module) and "bias" not in name:
        return 1 + 0.3 * (2 * torch.rand(old.shape, generator=gen) - 1)
    if "bias" in name and old.ndim == 1:
        return 0.1 + 0.2 * torch.rand(old.shape, generator=gen)  # positive: keeps rectified units awake
    if name == "A_log":  # state-space decay: exp of it has to stay moderate
        return torch.rand(old.shape, generator=gen)
    if old.ndim == 1 or isinstance(module, nn.Embedding) or "table" in name or "pos" in name or "token" in name:
        return _signed(old.shape, 0.3, 0.9, gen)  # scales, tokens and tables count like activations
    if type(module).__name__ == "Conv1D":  # GPT-2 stores (in, out)
        fan = old.shape[0]
    elif isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        fan = old.shape[0] // module.groups
    else:
        fan = math.prod(old.shape[1:])
    return torch.randn(old.shape, generator=gen) * (1.3 / math.sqrt(max(fan, 1)))


def seeded_init(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and every running statistic a value that the output can be seen to depend on.

    Zero-initialised output convolutions, modulation layers, layer scales and relative position tables, and
    near-zero initialisations (SAM's range is 1e-10) would hide a wrongly removed index from a mask oracle.
    Norm weights become 1 +- 0.3, biases 0.1 to 0.3, matrices normal with a variance of about 1.7 / fan-in.

    Args:
        model: changed in place; shared parameters stay shared.
        seed: of the generator.

    Returns:
        The model.
    """
    gen = source(seed + 1234)
    done: set[int] = set()
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in done and parameter.is_floating_point():
                    done.add(id(parameter))
                    parameter.copy_(_value(module, name, parameter, gen))
            for name, buffer in module.named_buffers(recurse=False):
                if name == "running_mean":
                    buffer.copy_(_signed(buffer.shape, 0.05, 0.3, gen))
                elif name == "running_var":
                    buffer.copy_(torch.rand(buffer.shape, generator=gen) + 0.5)
    return model
