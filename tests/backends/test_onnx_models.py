"""Tiny models of real topologies, through capture, export and ONNX Runtime, against the model in PyTorch."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphwright.backends.onnx_export import export_onnx
from graphwright.frontends.capture import capture
from graphwright.graph.depgraph import depgraph
from graphwright.graph.resize import resize

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


def close(got: Tensor, want: Tensor) -> None:
    """Within 1e-4 of the largest magnitude, which random float32 nets of this depth keep by a factor of fifty."""
    assert want.abs().max() > 1e-2
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def test_llama_with_left_padding_at_other_shapes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids, mask = torch.randint(0, 97, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    dims = {0: "batch", 1: "tokens"}
    kwargs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    program = capture(model, (), kwargs, {"input_ids": dims, "attention_mask": dims})
    artifact = export_onnx(program, tmp_path)
    assert artifact.opset == 23
    kinds = operators(artifact.path)
    assert "Attention" in kinds and "RMSNormalization" in kinds
    assert artifact.manifest["outputs"][0] == {"name": "logits", "dtype": "float32", "shape": ["batch", "tokens", 97]}
    runner = artifact.runner()
    for batch, tokens in ((1, 9), (4, 5)):
        ids = torch.randint(0, 97, (batch, tokens))
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        (got,) = runner(input_ids=ids, attention_mask=mask)
        with torch.no_grad():
            close(got, model(input_ids=ids, attention_mask=mask, use_cache=False).logits)


@pytest.mark.slow
def test_resized_unet_at_another_size(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    dims = {"sample": {0: "batch", 2: "height", 3: "width"}, "timestep": {0: "batch"}}
    program = capture(model, (torch.randn(2, 3, 8, 8), torch.tensor([3, 700])), {}, dims)
    group = next(
        g for g in depgraph(program).groups if g.exactness == "exact" and g.size % g.step == 0 and g.size > g.step
    )
    resize(program, {group.name: list(range(group.size - max(1, group.step)))})
    artifact = export_onnx(program, tmp_path)
    assert artifact.opset == 20
    assert [entry["name"] for entry in artifact.manifest["outputs"]] == ["out_sample"]
    sample, timestep = torch.randn(3, 3, 12, 16), torch.tensor([1, 500, 998])
    (got,) = artifact.runner()(sample, timestep)
    with torch.no_grad():
        close(got, program(sample, timestep).sample)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, num_layers=2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden, (last, _cell) = self.lstm(x)
        return hidden, last


def test_lstm_with_a_dynamic_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Recurrent().eval()
    artifact = export_onnx(capture(model, (torch.randn(2, 5, 6),)), tmp_path)
    assert operators(artifact.path).count("LSTM") == 2
    x = torch.randn(7, 5, 6)
    with torch.no_grad():
        for got, want in zip(artifact.runner()(x), model(x), strict=True):
            close(got, want)


class Masked(nn.Module):
    """Attention under a boolean mask with one row for all queries, as encoders have it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :])
        return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("opset", [20, 23])
def test_boolean_mask_that_hides_everything_gives_zero(tmp_path: Path, opset: int) -> None:
    torch.manual_seed(0)
    model = Masked().eval()
    keep = torch.tensor([[True, True, False, True], [False, True, True, False]])
    dims = {0: "batch", 1: "tokens"}
    program = capture(model, (torch.randn(2, 4, 16), keep), dynamic={"x": dims, "keep": dims})
    artifact = export_onnx(program, tmp_path, opset=opset)
    x, keep = torch.randn(3, 5, 16), torch.rand(3, 5) > 0.4
    keep[1] = False
    (got,) = artifact.runner()(x, keep)
    with torch.no_grad():
        close(got, model(x, keep))
    assert (got[1] == 0).all() and (got[0] != 0).any()
