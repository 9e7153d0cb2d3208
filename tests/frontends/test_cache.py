"""A cached capture equals a fresh one and shares the model's weights; whatever changes the graph changes the key."""

from __future__ import annotations

import copy
import functools
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from graphwright.frontends import cache
from graphwright.frontends.cache import capture_cached, capture_key, default_cache_dir
from graphwright.frontends.capture import capture
from graphwright.frontends.code_key import Unstable
from graphwright.graph.depgraph import depgraph
from graphwright.graph.program import Program
from graphwright.graph.resize import resize
from graphwright.graph.verify import verify


class Block(nn.Module):
    """Attributes of many kinds, a constant that is no buffer, tied weights and a helper function."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.tied = nn.Linear(4, 8, bias=False)
        self.tied.weight = self.up.weight
        self.norm = nn.BatchNorm1d(4)
        self.scale, self.name, self.sizes = 2.0, "block", [1, (2, 3)]
        self.table = torch.tensor([1.0, 2.0, 3.0, 4.0])
        self.act: Callable[[Tensor], Tensor] = torch.relu
        self.gate = functools.partial(torch.clamp, min=-1.0)
        self.options = {"residual": True}

    def forward(self, x: Tensor, flag: bool = True) -> dict[str, Tensor]:
        h = self.down(self.act(self.up(x) + self.tied(x))) * self.scale + torch.tensor(0.5)
        if flag and self.options["residual"]:
            h = h + self.gate(x) * self.table
        return {"y": self.norm(h)}


X = torch.linspace(-1, 1, 12).reshape(3, 4)


def block() -> Block:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Block().eval()


def key(model: nn.Module, x: Tensor = X, dynamic: Any = None, **kwargs: Any) -> str:
    return capture_key(model, (x,), kwargs, dynamic)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Count the real captures."""
    done: list[str] = []

    @functools.wraps(capture)
    def counted(model: nn.Module, *args: Any) -> Program:
        done.append(type(model).__name__)
        return capture(model, *args)

    monkeypatch.setattr(cache, "capture", counted)
    return done


def text(program: Program) -> tuple[Any, ...]:
    values = []
    for node in program.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            shape = [s if type(s) is int else "dynamic" for s in value.shape] if isinstance(value, Tensor) else None
            values.append((node.name, shape, getattr(value, "dtype", None)))
    specs = program.inputs, program.in_spec, program.out_spec, program.name, program.notes
    return str(program.graph_module.graph), values, specs


def test_second_capture_comes_from_the_cache_and_equals_a_fresh_one(captures: list[str], tmp_path: Path) -> None:
    model = block()
    first = capture_cached(model, (X,), {"flag": True}, None, tmp_path)
    second = capture_cached(model, (X,), {"flag": True}, None, tmp_path)
    assert captures == ["Block"]
    fresh = capture(model, (X,), {"flag": True})
    assert text(second) == text(first) == text(fresh)
    verify(second)
    for x in (X, torch.randn(5, 4)):
        assert torch.equal(second(x, flag=True)["y"], fresh(x, flag=True)["y"])
    assert fresh(X, flag=True)["y"].abs().max() > 0.1
    assert second.example[0] is X


def test_weights_are_the_models_own_and_constants_are_stored(captures: list[str], tmp_path: Path) -> None:
    capture_cached(block(), (X,), {}, None, tmp_path)
    model = block()
    with torch.no_grad():
        model.up.weight.mul_(3)
    program = capture_cached(model, (X,), {}, None, tmp_path)
    assert len(captures) == 1
    tensors, names = program.tensors(), dict(model.named_parameters(remove_duplicate=False))
    assert all(tensors[name] is names[name] for name in names)
    assert tensors["tied.weight"] is tensors["up.weight"]
    assert tensors["norm.running_mean"] is model.norm.running_mean
    assert torch.equal(tensors["table"], model.table)
    assert torch.equal(program(X)["y"], model(X)["y"])


def test_groups_and_resizing_are_those_of_a_fresh_capture(tmp_path: Path) -> None:
    model = block()
    capture_cached(model, (X,), {}, None, tmp_path)
    cached, fresh = capture_cached(model, (X,), {}, None, tmp_path), capture(model, (X,))
    groups = [[(g.name, g.kind, g.size) for g in depgraph(p).groups] for p in (cached, fresh)]
    assert groups[0] == groups[1] and groups[0]
    keep = {groups[0][0][0]: [0, 2, 5]}
    assert resize(cached, keep) == resize(fresh, keep)
    assert torch.equal(cached(X)["y"], fresh(X)["y"]) and cached.tensors()["up.weight"].shape == (3, 4)
    assert model.up.weight.shape == (8, 4)


def test_batch_of_one_is_doubled_as_capture_does(captures: list[str], tmp_path: Path) -> None:
    model = block()
    made = [capture_cached(model, (X[:1],), {}, None, tmp_path) for _ in range(2)]
    assert len(captures) == 1 and made[0].example[0].shape == (2, 4)
    assert torch.equal(made[1].example[0], made[0].example[0]) and made[1].notes == made[0].notes != ()


def test_model_on_meta_is_cached(captures: list[str], tmp_path: Path) -> None:
    with torch.device("meta"):
        model = nn.Linear(4, 5)
    made = [capture_cached(model, (X,), {}, None, tmp_path) for _ in range(2)]
    assert len(captures) == 1
    assert made[1].example[0].is_meta and made[1].tensors()["weight"] is model.weight


def test_transformers_and_diffusers_models_are_cached(
    captures: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.models.unets.unet_2d import UNet2DModel
    from transformers import LlamaConfig, LlamaForCausalLM

    config: dict[str, Any] = dict(
        vocab_size=41, hidden_size=24, intermediate_size=20, num_hidden_layers=1, num_attention_heads=6,
        num_key_value_heads=2, head_dim=4, max_position_embeddings=16,
    )  # fmt: skip
    ids = {"input_ids": torch.arange(18).reshape(2, 9), "use_cache": False}
    sample = {"sample": torch.randn(2, 1, 8, 8), "timestep": torch.tensor([3, 700]), "return_dict": False}
    unet: dict[str, Any] = dict(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=4, down_block_types=("AttnDownBlock2D",), up_block_types=("AttnUpBlock2D",),
    )  # fmt: skip
    cases: list[tuple[Callable[[], Any], dict[str, Any]]] = [
        (lambda: LlamaForCausalLM(LlamaConfig(**config)).eval(), ids),
        (lambda: UNet2DModel(**unet).eval(), sample),
    ]
    for make, kwargs in cases:
        captures.clear()
        capture_cached(make(), (), kwargs, None, tmp_path)
        model = make()  # other weights
        with monkeypatch.context() as patch:
            patch.setattr("graphwright.frontends.capture._trace", None)  # nothing is traced again
            program = capture_cached(model, (), kwargs, None, tmp_path)
        assert len(captures) == 1
        with torch.no_grad():
            got, expected = program(**kwargs)[0], model(**kwargs)[0]
        # Export may order additions in another way than the module; the graph itself is compared above.
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert got.abs().max() > 1e-3


CHANGES: dict[str, Callable[[Any], Any]] = {
    "float": lambda m: setattr(m, "scale", 2.5),
    "text": lambda m: setattr(m, "name", "other"),
    "nested": lambda m: setattr(m, "sizes", [1, (2, 4)]),
    "type of number": lambda m: setattr(m, "sizes", [1.0, (2, 3)]),
    "flag": lambda m: m.options.update(residual=False),
    "constant's value": lambda m: m.table.add_(1),
    "function": lambda m: setattr(m, "act", torch.sigmoid),
    "partial": lambda m: setattr(m, "gate", functools.partial(torch.clamp, min=-2.0)),
    "untied": lambda m: setattr(m.tied, "weight", nn.Parameter(m.up.weight.detach().clone())),
    "other shape": lambda m: setattr(m, "up", nn.Linear(4, 8, bias=False)),
    "dtype": lambda m: m.double(),
    "requires grad": lambda m: m.up.requires_grad_(False),
    "class of a child": lambda m: setattr(m, "norm", nn.LayerNorm(4)),
    "eps of a child": lambda m: setattr(m.norm, "eps", 1e-3),
    "hook": lambda m: m.up.register_forward_hook(double_output),
    "patched forward": lambda m: setattr(m.up, "forward", lambda x: x @ m.up.weight.T),
    "further child": lambda m: m.add_module("more", nn.ReLU()),
}


def double_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


@pytest.mark.parametrize("change", CHANGES)
def test_change_of_the_model_changes_the_key(change: str) -> None:
    model = block()
    before = key(model)
    assert before == key(block()) == key(copy.deepcopy(model))
    CHANGES[change](model)
    assert key(model) != before


def test_weights_and_training_mode_do_not_change_the_key() -> None:
    model = block()
    before = key(model)
    with torch.no_grad():
        model.up.weight.add_(1)
        model.norm.running_mean.add_(1)  # type: ignore[union-attr]
    assert key(model.train()) == before
    assert key(block(), torch.zeros(3, 4)) == before


def test_change_of_the_inputs_changes_the_key() -> None:
    model = block()
    other_mode = torch.no_grad()(lambda: key(model))()
    keys = [
        key(model), key(model, torch.ones(4, 4)), key(model, X.double()), key(model, X.to("meta")), key(model, flag=True),
        key(model, flag=False), key(model, dynamic={}), key(model, dynamic={"x": {0: "b"}}), other_mode,
        key(model, torch.ones(4, 3).T),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)


def test_default_dtype_and_library_versions_change_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    model = block()
    before = key(model)
    torch.set_default_dtype(torch.float64)
    try:
        assert key(model) != before
    finally:
        torch.set_default_dtype(torch.float32)
    assert key(model) == before
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert key(model) != before


def closing_over(value: float) -> nn.Module:
    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * value

    return Scaled()


def test_what_a_local_class_closes_over_changes_the_key() -> None:
    assert key(closing_over(2.0)) == key(closing_over(2.0)) != key(closing_over(3.0))


SOURCE = """
import torch
from {name}_helper import scaled
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)
        self.kinds = {{"a", "b", "c"}}
        self.linear.register_forward_hook(lambda m, a, o: o + 1)
    def forward(self, x):
        return scaled(self.linear(x))
"""


def test_key_is_the_same_in_another_process_until_the_source_of_a_helper_changes(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(SOURCE.format(name="own"))
    code = (
        "import torch, own; from graphwright.frontends.cache import capture_key\n"
        "print(capture_key(own.Model(), (torch.ones(2, 4),), {}, None))"
    )

    def in_process(factor: int) -> str:
        (tmp_path / "own_helper.py").write_text(f"def scaled(x):\n    return x * {factor}\n")
        done = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = in_process(2)
    assert len(first.strip()) == 64 and in_process(2) == first != in_process(3)


LIBRARIES = """
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from transformers import GPT2Config, GPT2LMHeadModel
from graphwright.frontends.cache import capture_key
gpt = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9))
unet = UNet2DModel(block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownBlock2D",),
                   up_block_types=("UpBlock2D",))
for model in (gpt, unet):
    print(capture_key(model, (torch.ones(2, 4),), {}, None))
"""


def test_key_of_library_models_does_not_depend_on_the_seed_of_hashes() -> None:
    found = []
    for seed in ("1", "7"):
        run = [sys.executable, "-c", LIBRARIES]
        done = subprocess.run(run, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout.split())
    assert found[0] == found[1] and len(set(found[0])) == 2


class Opaque:
    """Its state is a lock, which no text describes."""

    def __init__(self) -> None:
        import threading

        self.lock = threading.Lock()


@pytest.mark.parametrize("value", [Opaque(), torch.Generator(), {object()}, torch.ones(2).add])
def test_model_without_a_stable_description_is_captured_anew(
    value: object, captures: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = block()
    model.opaque = value  # type: ignore[assignment]
    with pytest.raises(Unstable, match="the model.opaque"):
        key(model)
    with caplog.at_level(logging.INFO, logger="graphwright"):
        made = [capture_cached(model, (X,), {}, None, tmp_path / "cache") for _ in range(2)]
    assert len(captures) == 2 and "is not cached: the model.opaque" in caplog.text
    assert torch.equal(made[1](X)["y"], model(X)["y"])
    assert not (tmp_path / "cache").exists()


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "truncated graph": lambda d: (d / "program.json").write_bytes((d / "program.json").read_bytes()[:-9]),
    "empty graph": lambda d: (d / "program.json").write_text(""),
    "changed graph": lambda d: (d / "program.json").write_text(
        (d / "program.json").read_text().replace("relu", "tanh")
    ),
    "no graph": lambda d: (d / "program.json").unlink(),
    "no constants": lambda d: (d / "constants.safetensors").unlink(),
    "damaged constants": lambda d: (d / "constants.safetensors").write_bytes(b"x"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_entry_is_logged_and_replaced(
    damage: str, captures: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = block()
    capture_cached(model, (X,), {}, None, tmp_path)
    (entry,) = tmp_path.glob("*/*")
    DAMAGE[damage](entry)
    program = capture_cached(model, (X,), {}, None, tmp_path)
    assert len(captures) == 2 and "the cached capture of Block is ignored and made again" in caplog.text
    assert torch.equal(program(X)["y"], model(X)["y"])
    capture_cached(model, (X,), {}, None, tmp_path)
    assert len(captures) == 2


def test_entry_of_another_model_is_not_used(
    captures: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As if two models had the same key."""
    monkeypatch.setattr(cache, "capture_key", lambda *_: "00" * 32)
    capture_cached(nn.Linear(4, 5), (X,), {}, None, tmp_path)
    assert capture_cached(nn.Linear(4, 6), (X,), {}, None, tmp_path)(X).shape == (3, 6)
    assert len(captures) == 2 and "'weight' of the model is not what the entry was made for" in caplog.text


def test_unwritable_cache_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    model = block()
    program = capture_cached(model, (X,), {}, None, tmp_path / "file" / "cache")
    assert torch.equal(program(X)["y"], model(X)["y"])
    assert "could not be cached" in caplog.text


def test_default_directory_follows_the_base_directory_specification(tmp_path: Path) -> None:
    assert default_cache_dir({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "graphwright"
    home = Path.home() / ".cache" / "graphwright"
    assert default_cache_dir({}) == default_cache_dir({"XDG_CACHE_HOME": "relative"}) == home
