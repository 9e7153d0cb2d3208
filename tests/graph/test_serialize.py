"""A loaded program computes bit for bit what the saved one did, and is analysed and resized alike."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from graphwright.frontends.capture import capture
from graphwright.graph.depgraph import DepGraph, depgraph
from graphwright.graph.program import Program
from graphwright.graph.resize import resize
from graphwright.graph.serialize import load_program, save_program
from graphwright.graph.verify import verify


class Residual(nn.Module):
    """A convolutional block with batch norm, a shortcut and a class head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.stem(x)))
        h = h + torch.relu(self.inner(h))
        return self.head(h.mean((2, 3)))


class Recurrent(nn.Module):
    """Two LSTM layers; the state comes out as well."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 6, num_layers=2, batch_first=True)
        self.head = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> dict[str, Any]:
        y, (h, c) = self.lstm(x)
        return {"y": self.head(y), "state": (h, [c])}


class Branching(nn.Module):
    """A branch on data, an autocast region, a size that depends on data, and unregistered constants."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale = torch.tensor([1.0, 2.0, 3.0, 4.0])

    def forward(self, x: Tensor, flag: bool = True) -> tuple[Tensor, ...]:
        y = torch.cond(x.sum() > 0, lambda x: self.one(x), lambda x: self.two(x) + torch.ones(4), (x,))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = self.two(x)
        return y * self.scale + torch.tensor([0.0, 1.0, 0.0, 2.0]), z, torch.nonzero(x > 0) * 2


class Spectral(nn.Module):
    """A complex buffer, a buffer that is not persistent, a slice, infinities and an index by a constant table."""

    turns: Tensor
    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("turns", torch.polar(torch.ones(3), torch.arange(3.0)), persistent=False)
        self.register_buffer("table", torch.tensor([2, 0, 1]))
        self.frozen = nn.Parameter(torch.arange(1.0, 7.0), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        masked = (x * self.frozen).masked_fill(self.table.repeat(2) == 1, float("-inf"))
        y = torch.softmax(masked, -1)
        z = torch.view_as_complex(y.reshape(-1, 3, 2)) * self.turns
        return torch.view_as_real(z)[:, self.table][..., 0:2]


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=41, hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=4, max_position_embeddings=16, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config), {"input_ids": torch.arange(18).reshape(2, 9) % 41}


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=31, n_embd=24, n_layer=1, n_head=3, n_positions=16, use_cache=False, bos_token_id=1, eos_token_id=2
    )
    return GPT2LMHeadModel(config), {"input_ids": torch.arange(14).reshape(2, 7) % 31}


def unet() -> tuple[nn.Module, dict[str, Tensor]]:
    from diffusers.models.unets.unet_2d import UNet2DModel

    model = UNet2DModel(
        sample_size=8, in_channels=2, out_channels=2, block_out_channels=(8, 12), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return model, {"sample": torch.ones(2, 2, 8, 8), "timestep": torch.tensor([3, 700])}


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "residual": lambda: (Residual(), {"x": torch.ones(2, 3, 6, 6)}),
    "recurrent": lambda: (Recurrent(), {"x": torch.ones(2, 4, 5)}),
    "branching": lambda: (Branching(), {"x": torch.ones(3, 4), "flag": True}),
    "spectral": lambda: (Spectral(), {"x": torch.ones(2, 6)}),
    "llama": llama,
    "gpt2": gpt2,
    "unet": unet,
}


def build(name: str) -> tuple[Program, nn.Module, dict[str, Any]]:
    """Capture a model whose every weight matters, and return it with inputs drawn at random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model, inputs = MODELS[name]()
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.4)
    return capture(model, (), inputs), model, drawn(inputs, 0)


def drawn(inputs: dict[str, Any], more: int, seed: int = 0) -> dict[str, Any]:
    """Return inputs of the same kind with random values and ``more`` further samples in the batch."""
    gen = torch.Generator().manual_seed(seed)

    def draw(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        shape = (x.shape[0] + more, *x.shape[1:])
        if x.is_floating_point():
            return torch.randn(shape, generator=gen)
        return torch.randint(0, 30, shape, generator=gen)

    return {key: draw(x) for key, x in inputs.items()}


def assert_same_outputs(one: Program, two: Program, inputs: dict[str, Any]) -> None:
    with torch.no_grad():
        expected, got = one(**inputs), two(**inputs)
    assert type(got) is type(expected)
    left, right = pytree.tree_flatten(expected), pytree.tree_flatten(got)
    assert left[1] == right[1]
    for a, b in zip(left[0], right[0], strict=True):
        assert a.dtype is b.dtype and torch.equal(a, b)
        assert a.abs().max() > 1e-3


def facts(graph: DepGraph) -> list[Any]:
    return [
        (
            g.name, g.kind, g.size, g.exactness, g.because, g.step, g.blocks,
            [(m.name, m.dim, m.trainable, m.positions().tolist()) for m in g.members],
        )
        for g in graph.groups
    ]  # fmt: skip


def recorded(program: Program) -> list[str]:
    """List each node with what is recorded of its value; every symbol is written alike."""
    out = []
    for node in program.nodes:
        values, _ = pytree.tree_flatten(node.meta.get("val"))
        for value in values:
            if isinstance(value, Tensor):
                sizes = [size if type(size) is int else "dynamic" for size in value.shape]
                out.append(f"{node.name} {sizes} {value.dtype} {value.device}")
            else:
                out.append(f"{node.name} {type(value).__name__}")
    return out


def halves(graph: DepGraph) -> dict[str, range]:
    sizes = {g.name: g.legal_keep(max(1, g.size // 2)) for g in graph.groups if g.blocks == 1}
    return {name: range(size) for name, size in sizes.items() if size < graph[name].size}


@pytest.fixture(scope="module", params=MODELS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    program, model, inputs = build(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    save_program(program, folder)
    return program, load_program(folder), model, inputs, folder


def test_same_outputs_bit_for_bit_at_two_batch_sizes(saved: Any) -> None:
    program, loaded, _, inputs, _ = saved
    assert_same_outputs(program, loaded, inputs)
    assert_same_outputs(program, loaded, drawn(inputs, 3, seed=1))
    assert_same_outputs(program, loaded, dict(zip(inputs, program.example, strict=True)))


def test_same_graph_with_the_same_recorded_values(saved: Any) -> None:
    program, loaded, *_ = saved
    verify(loaded)
    lines = [str(p.graph_module.graph) for p in (program, loaded)]
    assert lines[0] == lines[1]
    assert recorded(loaded) == recorded(program)
    assert any("dynamic" in line for line in recorded(loaded))
    assert (loaded.inputs, loaded.in_spec, loaded.out_spec) == (program.inputs, program.in_spec, program.out_spec)
    assert (loaded.name, loaded.notes) == (program.name, program.notes)


def test_same_coupling_groups_and_the_same_reasons_for_frozen_axes(saved: Any) -> None:
    program, loaded, *_ = saved
    before, after = depgraph(program), depgraph(loaded)
    assert facts(after) == facts(before)
    assert [(f.reason, f.members) for f in after.frozen] == [(f.reason, f.members) for f in before.frozen]


def test_origins_are_kept_as_module_and_source_line(saved: Any) -> None:
    program, loaded, *_ = saved
    from graphwright.graph.errors import module_path, source_line

    for a, b in zip(program.nodes, loaded.nodes, strict=True):
        assert (module_path(a), source_line(a)) == (module_path(b), source_line(b))
    assert any(source_line(node) for node in loaded.nodes)


@pytest.mark.parametrize("name", ["residual", "recurrent", "llama", "gpt2", "unet"])
def test_resized_after_loading_equals_resized_before_saving(name: str, tmp_path: Path) -> None:
    program, _, inputs = build(name)
    save_program(program, tmp_path / "before")
    loaded = load_program(tmp_path / "before")
    keep = halves(depgraph(program))
    assert keep
    record = resize(program, keep)
    assert resize(loaded, keep) == record
    assert_same_outputs(program, loaded, inputs)
    save_program(program, tmp_path / "after")
    small = load_program(tmp_path / "after")
    assert_same_outputs(program, small, drawn(inputs, 1, seed=4))
    weights = lambda p: sum(t.numel() for t in p.parameters().values())  # noqa: E731
    assert weights(small) == weights(program) < weights(build(name)[0])


def test_parameters_and_buffers_keep_their_kind(saved: Any) -> None:
    program, loaded, *_ = saved
    gms = [p.graph_module for p in (program, loaded)]
    params = [{n: (p.requires_grad, p.dtype, p.stride()) for n, p in gm.named_parameters()} for gm in gms]
    assert params[0] == params[1]
    buffers = [dict(gm.named_buffers()) for gm in gms]
    assert buffers[0].keys() == buffers[1].keys()
    # State dicts differ where a buffer is persistent on one side alone.
    assert gms[0].state_dict().keys() == gms[1].state_dict().keys()
    for name, tensor in loaded.tensors().items():
        assert torch.equal(tensor, program.tensors()[name])


def test_loaded_tensors_are_not_the_saved_ones_nor_the_file(saved: Any) -> None:
    program, loaded, *_ = saved
    for name, tensor in loaded.tensors().items():
        assert tensor.data_ptr() != program.tensors()[name].data_ptr()
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_tied_weights_stay_one_tensor(tmp_path: Path) -> None:
    program, *_ = build("gpt2")
    save_program(program, tmp_path)
    loaded = load_program(tmp_path)
    names = [n for n in loaded.parameters() if n in ("lm_head.weight", "transformer.wte.weight")]
    assert len(names) == 2
    assert loaded.parameters()[names[0]] is loaded.parameters()[names[1]]
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as handle:
        assert len({*names} & {*handle.keys()}) == 1


def test_program_on_meta_is_saved_by_shape_alone(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = llama()[0]
    program = capture(model, (), {"input_ids": torch.zeros(2, 9, dtype=torch.int64)})
    save_program(program, tmp_path)
    loaded = load_program(tmp_path)
    assert all(t.is_meta for t in loaded.parameters().values()) and loaded.example[0].is_meta
    assert facts(depgraph(loaded)) == facts(depgraph(program)) != []
    assert (tmp_path / "model.safetensors").stat().st_size < 1000


def test_unusual_strides_are_kept(tmp_path: Path) -> None:
    class Wide(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + self.get_buffer("wide")

    model = Wide(4, 6, 3)
    model.weight = nn.Parameter(model.weight.detach().contiguous(memory_format=torch.channels_last))
    model.register_buffer("wide", torch.ones(1, 1, 1).expand(6, 4, 4))
    x = torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    program = capture(model, (x,))
    save_program(program, tmp_path)
    loaded = load_program(tmp_path)
    assert loaded.tensors()["weight"].stride() == model.weight.stride() != (36, 9, 3, 1)
    assert loaded.example[0].stride() == x.stride()
    assert torch.equal(loaded(x), program(x))


def test_saving_the_loaded_program_again_gives_the_same_files(tmp_path: Path) -> None:
    program, *_ = build("llama")
    save_program(program, tmp_path / "one")
    save_program(load_program(tmp_path / "one"), tmp_path / "two")
    save_program(load_program(tmp_path / "two"), tmp_path / "three")
    for name in ("program.json", "model.safetensors", "example.safetensors"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()


def test_saving_leaves_the_program_as_it_was(tmp_path: Path) -> None:
    program, *_ = build("residual")
    before = str(program.graph_module.graph), recorded(program), dict(program.tensors())
    save_program(program, tmp_path)
    assert (str(program.graph_module.graph), recorded(program)) == before[:2]
    assert all(program.tensors()[name] is tensor for name, tensor in before[2].items())


def test_output_class_of_transformers_is_imported_when_loading(tmp_path: Path) -> None:
    program, *_ = build("gpt2")
    save_program(program, tmp_path)
    code = (
        "import sys\n"
        "from graphwright.graph.serialize import load_program\n"
        "assert 'transformers' not in sys.modules\n"
        f"program = load_program({str(tmp_path)!r})\n"
        "print(type(program(input_ids=program.example[0])).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("CausalLMOutputWithCrossAttentions"), done.stderr


def test_saved_files_have_the_permissions_of_ordinary_files(tmp_path: Path) -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    save_program(capture(Small(), (torch.ones(2, 3),)), tmp_path / "saved")
    modes = {file.name: file.stat().st_mode for file in (tmp_path / "saved").iterdir()}
    assert modes == dict.fromkeys(("program.json", "model.safetensors", "example.safetensors"), ordinary.stat().st_mode)
