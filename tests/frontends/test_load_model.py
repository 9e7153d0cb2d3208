"""Every form of MODEL loads and computes what its library computes; everything else gets one sentence."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from graphwright.frontends.builtin import BUILTIN
from graphwright.frontends.capture import capture
from graphwright.frontends.load_model import load_model
from graphwright.graph.errors import ArtifactError, LoadError, PreconditionError
from graphwright.graph.serialize import save_program

LLAMA: dict[str, Any] = dict(
    vocab_size=41, hidden_size=24, intermediate_size=20, num_hidden_layers=1, num_attention_heads=6,
    num_key_value_heads=2, head_dim=4, max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
UNET: dict[str, Any] = dict(
    sample_size=8, in_channels=2, out_channels=2, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
    attention_head_dim=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()


def unet() -> Any:
    from diffusers.models.unets.unet_2d import UNet2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DModel(**UNET).eval()


def outputs_equal(one: nn.Module, two: nn.Module, loaded: Any) -> None:
    with torch.no_grad():
        got, expected = (m(*loaded.args, **loaded.kwargs)[0] for m in (one, two))
    assert torch.equal(got, expected) and got.abs().max() > 1e-4


def same_state(one: nn.Module, two: nn.Module) -> bool:
    left, right = one.state_dict(), two.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


# ---------------------------------------------------------------------- built-in


@pytest.mark.parametrize("name", BUILTIN)
def test_builtin_comes_with_its_own_inputs(name: str) -> None:
    loaded = load_model(f"builtin:{name}")
    assert loaded.source == f"builtin:{name}" and loaded.dynamic is None
    with torch.no_grad():
        assert loaded.model(*loaded.args, **loaded.kwargs) is not None


def test_unknown_builtin_names_the_known_ones() -> None:
    with pytest.raises(LoadError, match="digits-ddpm"):
        load_model("builtin:digits-dpm")


# ---------------------------------------------------------------------- directories


def test_transformers_directory_loads_the_class_that_its_configuration_names(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert type(loaded.model) is type(model) and not loaded.model.training and loaded.notes == ()
    assert loaded.kwargs["use_cache"] is False and loaded.kwargs["input_ids"].shape == (2, 12)
    outputs_equal(loaded.model, model, loaded)
    program = capture(loaded.model, loaded.args, loaded.kwargs, loaded.dynamic)
    assert program.inputs[0].shape == ("batch", 12)


def test_diffusers_directory_loads_the_class_that_its_configuration_names(tmp_path: Path) -> None:
    model = unet()
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert type(loaded.model) is type(model)
    outputs_equal(loaded.model, model, loaded)


def test_half_precision_variant_of_diffusers_is_found(tmp_path: Path) -> None:
    unet().half().save_pretrained(tmp_path, variant="fp16")
    loaded = load_model(str(tmp_path), dtype="float32")
    assert next(loaded.model.parameters()).dtype is torch.float32
    assert torch.equal(next(loaded.model.parameters()), next(unet().half().parameters()).float())


@pytest.mark.parametrize("make", [llama, unet])
def test_dtype_converts_weights_and_inputs(make: Callable[[], Any], tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), dtype="bfloat16")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert loaded.model(**loaded.kwargs)[0].dtype is torch.bfloat16


@pytest.mark.parametrize("make", [llama, unet])
def test_directory_without_weights_needs_leave_to_draw_them(make: Callable[[], Any], tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(LoadError, match=r"no weights \(expected \*\.safetensors\).*random_weights=True"):
        load_model(str(tmp_path))
    state = torch.get_rng_state()
    one, two, other = (load_model(str(tmp_path), random_weights=True, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert same_state(one.model, two.model) and not same_state(one.model, other.model)
    assert "random, of seed 1" in one.notes[0]


def test_configuration_without_architectures_loads_the_base_model(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert type(load_model(str(tmp_path)).model).__name__ == "LlamaModel"
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    assert type(load_model(str(tmp_path), random_weights=True).model).__name__ == "LlamaModel"


def test_weights_that_a_checkpoint_lacks_are_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from safetensors.torch import load_file, save_file

    llama().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {k: v for k, v in load_file(file).items() if "mlp" not in k}
    save_file(tensors, file, metadata={"format": "pt"})
    loaded = load_model(str(tmp_path))
    assert "lacks 3 tensors of LlamaForCausalLM, which are random: model.layers.0.mlp.down_proj" in loaded.notes[0]
    assert loaded.notes[0] in caplog.text


def test_weights_of_other_sizes_are_refused(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 24}))
    with pytest.raises(LoadError, match="cannot be loaded"):
        load_model(str(tmp_path))


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0notjson!")
    with pytest.raises(LoadError, match="cannot be loaded"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"_class_name": "NoSuchModel", "_diffusers_version": "9.0"},
            "NoSuchModel of diffusers 9.0, which the installed",
        ),
        ({"_class_name": "DDPMScheduler"}, "DDPMScheduler, which is no model"),
        ({"architectures": ["NoSuchModel"], "model_type": "llama"}, "NoSuchModel, which the installed transformers"),
        ({"architectures": ["Own"], "auto_map": {"AutoModel": "own.Own"}}, "its own code is not run.*factory"),
        ({"architectures": ["LlamaConfig"]}, "LlamaConfig, which the installed"),
        ({"width": 3}, "neither `architectures`, `model_type` nor `_class_name`"),
        ([1], "must hold a JSON object, it holds a list"),
    ],
)
def test_configuration_that_names_no_model_is_refused(config: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match=message):
        load_model(str(tmp_path), random_weights=True)


def test_directory_without_a_model_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="holds no model: expected config.json.*found nothing"):
        load_model(str(tmp_path))
    (tmp_path / "notes.txt").touch()
    with pytest.raises(LoadError, match="found notes.txt"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(LoadError, match="is no JSON"):
        load_model(str(tmp_path))
    with pytest.raises(LoadError, match="is a file; a model is builtin:NAME"):
        load_model(str(tmp_path / "notes.txt"))


def test_adapter_directory_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(LoadError, match="adapter of peft"):
        load_model(str(tmp_path))


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    unet().save_pretrained(tmp_path / "unet")
    llama().save_pretrained(tmp_path / "text_encoder")
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("{}")
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "x"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    return tmp_path


def test_pipeline_needs_the_name_of_a_component(pipeline: Path) -> None:
    with pytest.raises(LoadError, match=r"choose one of its models: \S+#text_encoder, \S+#unet$"):
        load_model(str(pipeline))
    with pytest.raises(LoadError, match="has no model 'scheduler'; its models are"):
        load_model(f"{pipeline}#scheduler")
    loaded = load_model(f"{pipeline}#unet")
    outputs_equal(loaded.model, unet(), loaded)
    assert type(load_model(f"{pipeline}#text_encoder").model).__name__ == "LlamaForCausalLM"


# ---------------------------------------------------------------------- graphwright's own


def test_saved_program_is_a_model(tmp_path: Path) -> None:
    program = capture(nn.Linear(3, 4), (torch.randn(2, 3),), dynamic={"input": {0: "rows"}})
    save_program(program, tmp_path)
    loaded = load_model(str(tmp_path))
    x = torch.randn(5, 3)
    assert torch.equal(loaded.model(x), program(x))
    assert torch.equal(loaded.args[0], program.example[0]) and loaded.dynamic == {"arg0": {0: "rows"}}
    again = capture(loaded.model, loaded.args, loaded.kwargs, loaded.dynamic)
    assert torch.equal(again(x), program(x))


def test_damaged_record_of_graphwright_is_not_taken_for_another_library(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    (tmp_path / "graphwright.json").write_text("{}")
    with pytest.raises(ArtifactError):
        load_model(str(tmp_path))


# ---------------------------------------------------------------------- GGUF


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(16)
    writer.add_embedding_length(24)
    writer.add_block_count(1)
    writer.add_feed_forward_length(20)
    writer.add_head_count(6)
    writer.add_head_count_kv(2)
    writer.add_key_length(4)
    writer.add_rope_dimension_count(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(41)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "input_layernorm": "blk.0.attn_norm", "post_attention_layernorm": "blk.0.ffn_norm",
        **{f"mlp.{p}_proj": f"blk.0.ffn_{p}" for p in ("gate", "up", "down")},
        "self_attn.o_proj": "blk.0.attn_output", "self_attn.v_proj": "blk.0.attn_v",
        "self_attn.q_proj": "blk.0.attn_q", "self_attn.k_proj": "blk.0.attn_k",
    }  # fmt: skip
    for name, tensor in llama().state_dict().items():
        value = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:  # GGUF interleaves the two rotary halves of each head
            value = value.reshape(-1, 2, 2, 24).swapaxes(1, 2).reshape(value.shape)
        key = names[name.removeprefix("model.layers.0.").removesuffix(".weight")]
        writer.add_tensor(f"{key}.weight", np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_gguf_file_loads_as_the_model_that_it_was_made_of(gguf_file: Path) -> None:
    for spec in (gguf_file, gguf_file.parent, f"{gguf_file.parent}#tiny.gguf"):
        loaded = load_model(str(spec), dtype="float32")
        # The norms' epsilon is stored as float32, so the last bits of the output differ.
        with torch.no_grad():
            got, expected = (m(**loaded.kwargs)[0] for m in (loaded.model, llama()))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_several_gguf_files_need_a_choice(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(LoadError, match=r"choose one: \S+#a.gguf, \S+#b.gguf"):
        load_model(str(tmp_path))
    with pytest.raises(LoadError, match="no file"):
        load_model(f"{tmp_path}#c.gguf")


def test_gguf_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").touch()
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LoadError, match="needs the package gguf: pip install gguf"):
        load_model(str(tmp_path / "a.gguf"))


# ---------------------------------------------------------------------- hub


def test_hub_failure_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("We couldn't connect to the hub.\nCheck your connection.")

    monkeypatch.setattr(transformers.PretrainedConfig, "get_config_dict", fail)
    with pytest.raises(LoadError) as caught:
        load_model("some-org/some-model")
    assert str(caught.value) == (
        "some-org/some-model cannot be loaded: We couldn't connect to the hub. Check your connection."
    )


def test_hub_component_is_loaded_from_its_subfolder(monkeypatch: pytest.MonkeyPatch, pipeline: Path) -> None:
    """The library resolves the name; here it resolves to a directory."""
    import transformers
    from diffusers.models.unets.unet_2d import UNet2DModel

    asked: list[Any] = []
    original = UNet2DModel.from_pretrained

    def config(name: str, subfolder: str = "") -> Any:
        file = pipeline / subfolder / "config.json"
        return (json.loads(file.read_text()) if file.exists() else {}), {}

    def pretrained(name: str, **kwargs: Any) -> Any:
        asked.append((name, kwargs["subfolder"]))
        return original(str(pipeline), **kwargs)

    monkeypatch.setattr(transformers.PretrainedConfig, "get_config_dict", config)
    monkeypatch.setattr(UNet2DModel, "from_pretrained", pretrained)
    loaded = load_model("some-org/some-pipeline#unet")
    assert asked == [("some-org/some-pipeline", "unet")]
    outputs_equal(loaded.model, unet(), loaded)
    with pytest.raises(LoadError, match="has no config.json; if it is a diffusers pipeline.*#unet"):
        load_model("some-org/some-pipeline")


# ---------------------------------------------------------------------- factories

FACTORIES = """
import torch
from torch import nn
count = 3
model = nn.Linear(3, 2)
array = nn.Linear(3, 2)
array.example_input_array = torch.ones(4, 3)
def bare(): return model
def with_array(): return array
def with_args(): return model, (torch.ones(2, 3),)
def with_kwargs(): return model, [], {"input": torch.ones(5, 3)}
def number(): return 3
def string_first(): return "model", ()
def tensor_args(): return model, torch.ones(2, 3)
def list_kwargs(): return model, (), ["x"]
def four(): return model, (), {}, None
def fails(): raise RuntimeError("no weights here")
def needs(x): return model
class Holder:
    @staticmethod
    def make(): return model, (torch.ones(2, 3),)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"factories_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    (tmp_path / f"{name}_broken.py").write_text("import no_such_package_anywhere")
    (tmp_path / f"{name}_raising.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    return name


def test_factory_of_the_working_directory_is_found(module: str) -> None:
    before = list(sys.path)
    loaded = load_model(f"{module}:with_args")
    assert loaded.args[0].shape == (2, 3) and loaded.kwargs == {}
    assert load_model(f"{module}:with_kwargs").kwargs["input"].shape == (5, 3)
    assert load_model(f"{module}:Holder.make").model is loaded.model
    assert load_model(f"{module}:with_array").args[0].shape == (4, 3)
    assert sys.path == before and os.getcwd() not in sys.path


def test_module_without_inputs_takes_those_that_are_given(module: str) -> None:
    for name in ("bare", "model"):
        with pytest.raises(PreconditionError, match="inputs of Linear are not known; say what goes in"):
            load_model(f"{module}:{name}")
        loaded = load_model(f"{module}:{name}", inputs={"input": {"shape": [2, 3], "dynamic": {0: "rows"}}})
        assert loaded.kwargs["input"].shape == (2, 3) and loaded.dynamic == {"input": {0: "rows"}}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (":count", "is a int; it must be a callable"),
        (":number", r"returned int; it must return a module, \(module, args\)"),
        (":string_first", r"returned \(str, tuple\)"),
        (":tensor_args", "returned args of type Tensor, expected a tuple"),
        (":list_kwargs", "returned kwargs of type list, expected a dict"),
        (":four", r"returned \(Linear, tuple, dict, NoneType\)"),
        (":fails", r"fails\(\) failed: RuntimeError: no weights here"),
        (":needs", r"needs\(\) failed: TypeError: .*missing 1 required"),
        (":with_kwarg", "has no 'with_kwarg'; did you mean 'with_kwargs'"),
        ("_missing:make", "there is no module"),
        ("_broken:make", "needs the module no_such_package_anywhere, which is not installed"),
        ("_raising:make", "importing .*_raising failed: ZeroDivisionError"),
    ],
)
def test_factory_that_does_not_make_a_model_is_refused(module: str, name: str, message: str) -> None:
    with pytest.raises(LoadError, match=message):
        load_model(f"{module}{name}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nosuch", "names no model: it is no file or directory here; a model is builtin:NAME"),
        ("", "names no model"),
        ("a b/c", "names no model"),
        ("./nosuch", "no file or directory nosuch"),
        ("/nosuch/model", "no file or directory /nosuch/model"),
        ("models/nosuch/", "no file or directory"),
        ("nosuch.gguf", "no file or directory nosuch.gguf"),
    ],
)
def test_name_of_nothing_says_what_a_model_is(spec: str, message: str) -> None:
    with pytest.raises(LoadError, match=message):
        load_model(spec)


@pytest.mark.parametrize("dtype", ["float23", "int8", torch.int64])
def test_dtype_that_is_none_is_refused(dtype: Any) -> None:
    with pytest.raises(LoadError, match="dtype must be a floating-point dtype"):
        load_model("builtin:digits-ddpm", dtype=dtype)
