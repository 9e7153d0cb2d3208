"""A saved pruned model loads in one call, bit for bit, or says in one sentence why not."""

from __future__ import annotations

import copy
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from graphwright.frontends import artifact
from graphwright.frontends.artifact import load, save
from graphwright.frontends.attributes import sizes_of
from graphwright.frontends.multihead import ResizedMultiheadAttention
from graphwright.frontends.named_tensors import named_tensors
from graphwright.frontends.self_check import tensors_of
from graphwright.frontends.write_back import write_back
from graphwright.graph.errors import ArtifactError
from graphwright.graph.files import sha256
from graphwright.graph.resize import RemovalRecord

SIX = ("llama", "bert", "vit", "resnet", "unet", "conditional_unet")


@pytest.fixture(scope="session")
def saved(written, tmp_path_factory):
    """Save one of the six once and return the directory, which tests must not change."""
    folders: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in folders:
            folders[name] = save(written(name), tmp_path_factory.mktemp("saved") / name)
        return folders[name]

    return get


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of the saved ResNet that a test may damage."""
    folder = tmp_path / "resnet"
    shutil.copytree(saved("resnet"), folder)
    return folder


def edit(folder: Path, **changes: Any) -> None:
    """Overwrite entries of a record."""
    path = folder / "graphwright.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "graphwright.json").read_text())


def any_load(folder: Path, **options: Any) -> Any:
    return load(folder, **options)


# ---------------------------------------------------------------------- round trips


@pytest.mark.parametrize("name", SIX)
def test_loads_bit_for_bit(written, saved, tools, name):
    small, loaded = written(name), load(saved(name))
    assert type(loaded) is type(small) and not loaded.training
    want, got = named_tensors(small), named_tensors(loaded)
    assert list(want) == list(got)
    for key in want:
        assert want[key].dtype == got[key].dtype and torch.equal(want[key], got[key]), key
    _, kwargs, _ = tools.builders[name](3)
    with torch.no_grad():
        a, b = tensors_of(small(**kwargs)), tensors_of(loaded(**kwargs))
    assert all(torch.equal(x, y) and float(x.std()) > 1e-2 for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", SIX)
def test_sizes_of_every_module_come_back(written, saved, name):
    small, loaded = written(name), load(saved(name))
    for (path, module), (_, twin) in zip(small.named_modules(), loaded.named_modules(), strict=True):
        assert dict(sizes_of(module)).keys() == dict(sizes_of(twin)).keys(), path
        mine = {k: v for k, v in sizes_of(module) if not k.startswith("config.")}
        assert mine == {k: v for k, v in sizes_of(twin) if not k.startswith("config.")}, path


@pytest.mark.parametrize("name", ["llama", "unet"])
def test_configuration_is_the_original_one(pruned, saved, name):
    config = pruned(name).model.config
    written_file = json.loads((saved(name) / "config.json").read_text())
    original = json.loads(config.to_json_string(use_diff=False)) if name == "llama" else dict(config)
    assert {key: written_file[key] for key in original if key in written_file and key[0] != "_"} == {
        key: json.loads(json.dumps(original[key])) for key in original if key in written_file and key[0] != "_"
    }
    assert written_file["hidden_size" if name == "llama" else "sample_size"] == (40 if name == "llama" else 8)


def test_record_says_what_was_removed(pruned, saved):
    data = record_of(saved("llama"))
    removal = pruned("llama").record
    assert data["format_version"] == 1
    assert data["base"]["class"] == "transformers.models.llama.modeling_llama:LlamaForCausalLM"
    assert data["versions"]["torch"] == torch.__version__.split("+")[0] or data["versions"]["torch"]
    again = RemovalRecord.from_json({"groups": data["groups"], "tensors": data["tensors"]})
    assert again.tensors["model.norm.weight"] == removal.tensors["model.norm.weight"]
    assert data["attributes"]["model.layers.0.self_attn"] == {"head_dim": 4, "num_key_value_groups": 1}
    assert data["aliases"] == {"lm_head.weight": "model.embed_tokens.weight"}
    assert set(data["files"]) == {
        "model.safetensors",
        "buffers.safetensors",
        "config.json",
        "generation_config.json",
    }
    assert "lm_head.weight" not in load_file(saved("llama") / "model.safetensors")


def test_ties_are_one_parameter_again(saved):
    loaded = any_load(saved("llama"))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_loaded_model_generates_and_trains(written, saved, tools):
    loaded = any_load(saved("llama"))
    prompt = tools.ids(2, 4)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 5, "do_sample": False}
    want = copy.deepcopy(written("llama")).generate(prompt, **options)
    assert torch.equal(loaded.generate(prompt, **options), want)
    loaded(input_ids=prompt, labels=prompt).loss.backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_training_and_freezing_after_write_back_are_saved(written, tmp_path):
    small = copy.deepcopy(written("resnet"))
    small.classifier[1].bias.requires_grad_(False)
    with torch.no_grad():
        small.classifier[1].weight.mul_(2)
    loaded = any_load(save(small, tmp_path / "x"))
    assert torch.equal(loaded.classifier[1].weight, small.classifier[1].weight)
    assert [n for n, p in loaded.named_parameters() if not p.requires_grad] == ["classifier.1.bias"]


def test_labels_set_after_write_back_are_saved(written, tmp_path):
    small = copy.deepcopy(written("resnet"))
    small.config.id2label = {0: "zero", 1: "one", 2: "two", 3: "three", 4: "four"}
    assert any_load(save(small, tmp_path / "x")).config.id2label[4] == "four"


def test_adapters_train_and_merge_and_the_result_is_saved(written, tools, tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        copy.deepcopy(written("llama")), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    )
    tokens = tools.ids(2, 6)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # the first step moves only the half that starts at zero
        optimizer.zero_grad()
        adapted(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    with pytest.raises(ArtifactError, match=r"has no removal record"):
        save(adapted, tmp_path / "x")
    merged = adapted.merge_and_unload()
    old, new = written("llama").model.layers[0].self_attn.q_proj.weight, merged.model.layers[0].self_attn.q_proj.weight
    assert (old - new).abs().max() > 1e-3
    loaded = any_load(save(merged, tmp_path / "x"))
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens).logits, merged(input_ids=tokens).logits)


def test_half_precision_comes_back_as_it_is(written, tmp_path):
    small = copy.deepcopy(written("bert")).to(torch.bfloat16)
    loaded = load(save(small, tmp_path / "x"))
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), loaded.parameters(), strict=True))


def test_large_models_go_into_several_files(written, tmp_path):
    folder = save(written("resnet"), tmp_path / "x", max_shard_size="1KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2 and not (folder / "model.safetensors").exists()
    assert all((folder / name).stat().st_size > 0 for name in files)
    loaded = load(folder)
    assert all(torch.equal(a, b) for a, b in zip(written("resnet").parameters(), loaded.parameters(), strict=True))


def test_loaded_model_can_be_saved_and_pruned_again(saved, tools, tmp_path):
    loaded = any_load(saved("resnet"))
    case = tools.prune(loaded, (), {"pixel_values": tools.normal(2, 3, 16, 16)})
    smaller: Any = write_back(loaded, case.program, case.record)
    again = any_load(save(smaller, tmp_path / "x"))
    assert again.classifier[1].in_features == 4
    assert again.graphwright_record.removal.tensors["classifier.1.weight"][1].of == 16


def test_the_global_random_state_stays(written, saved, tmp_path):
    torch.manual_seed(3)
    random.seed(3)
    state, python = torch.get_rng_state(), random.getstate()
    save(written("resnet"), tmp_path / "x")
    load(saved("llama"))
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python


def test_nothing_is_unpickled(saved, monkeypatch):
    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("pickle was used")

    monkeypatch.setattr("pickle.load", refuse)
    monkeypatch.setattr("pickle.loads", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    load(saved("bert"))


# ---------------------------------------------------------------------- modules of the caller's own

FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(6, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.leave = nn.Linear(16, 4)
        self.register_buffer("shift", torch.arange(16.0), persistent=False)

    def forward(self, x):
        x = self.enter(x) + self.shift
        return self.leave(x + self.attention(x, x, x, need_weights=False)[0])

def build():
    torch.manual_seed(0)
    return Net().eval()

def example():
    return build(), (torch.ones(2, 5, 6),), {}

def number():
    return 3
"""


@pytest.fixture
def own(tools, tmp_path, monkeypatch):
    """A module of a package that exists only in this test, pruned and written back."""
    package = tmp_path / "their_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "models.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    from their_package.models import build  # pyright: ignore[reportMissingImports]

    case = tools.prune(build(), (tools.normal(2, 5, 6),))
    yield write_back(case.model, case.program, case.record)
    for name in [n for n in sys.modules if n.startswith("their_package")]:
        del sys.modules[name]


def test_own_module_needs_a_factory_that_the_caller_allows(own, tmp_path):
    with pytest.raises(ArtifactError, match=r"pass factory='package.module:callable'"):
        save(own, tmp_path / "x")
    folder = save(own, tmp_path / "x", factory="their_package.models:build")
    assert not (folder / "config.json").exists()
    for refused in (False, "somebody", ("their_pack",)):
        with pytest.raises(ArtifactError, match="allow_factory='their_package'"):
            load(folder, allow_factory=refused)
    for allowed in (True, "their_package", ("other", "their_package.models")):
        loaded = any_load(folder, allow_factory=allowed)
        assert isinstance(loaded.attention, ResizedMultiheadAttention)
        assert loaded.attention.scale == own.attention.scale == 0.5
        assert torch.equal(loaded.shift, own.shift) and loaded.shift.shape == (8,)
        x = torch.ones(3, 5, 6)
        assert torch.equal(loaded(x), own(x))


def test_a_factory_may_return_a_module_with_example_inputs(own, tmp_path):
    load(save(own, tmp_path / "x", factory="their_package.models:example"), allow_factory=True)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("their_package.models", "must be 'package.module:callable'"),
        ("their_package.models:missing", "cannot be imported"),
        ("their_package.models:number", "returned a int, expected a module"),
    ],
)
def test_a_factory_that_does_not_work_is_refused_when_saving(own, tmp_path, factory, message):
    with pytest.raises(ArtifactError, match=message):
        save(own, tmp_path / "x", factory=factory)
    assert not (tmp_path / "x").exists()


# ---------------------------------------------------------------------- what is refused when loading


def test_a_plain_checkpoint_is_recognised(pruned, tmp_path):
    pruned("resnet").model.save_pretrained(tmp_path / "plain")
    with pytest.raises(ArtifactError, match=r"no graphwright.json; it looks like a plain checkpoint"):
        load(tmp_path / "plain")
    with pytest.raises(ArtifactError, match="is not a directory"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="nothing was saved here"):
        load(tmp_path / "empty")


def test_a_changed_byte_of_the_weights_is_found(copied):
    path = copied / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ArtifactError, match="sha256 differs"):
        load(copied)


def test_truncated_weights_with_a_fitting_hash_are_found(copied):
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])
    files = record_of(copied)["files"] | {"model.safetensors": sha256(path)}
    edit(copied, files=files)
    with pytest.raises(ArtifactError, match=r"model.safetensors is damaged"):
        load(copied)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_missing_file_is_named(copied, name):
    (copied / name).unlink()
    with pytest.raises(ArtifactError, match=f"incomplete: {name} is missing"):
        load(copied)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "something else"}, "no record of a module"),
        ({"format_version": 2}, "format version 2, this graphwright reads up to 1"),
        ({"format_version": "1"}, "format version '1'"),
        ({"tensors": []}, "'tensors' is missing or not a dict"),
        ({"tensors": {"classifier.1.weight": {"0": {"of": 3}}}}, "is damaged: KeyError"),
        ({"files": {}}, "lists no weights"),
        ({"files": {"model.safetensors": "0", "../x": "0"}}, "a file that no artifact has"),
        ({"base": {"kind": "os", "class": "os:system"}}, "sha256 differs"),
    ],
)
def test_a_damaged_record_is_refused(copied, changes, message):
    edit(copied, **changes)
    with pytest.raises(ArtifactError, match=message):
        load(copied)


def test_a_record_that_is_no_json_is_refused(copied):
    (copied / "graphwright.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"graphwright.json is damaged"):
        load(copied)


@pytest.mark.parametrize(
    "name",
    [
        "os:system",
        "transformers:os",
        "transformers.utils.import_utils:os",
        "transformers.models.resnet.modeling_resnet:ResNetConfig",
        "transformers.models.resnet.modeling_resnet:nn",
        "transformers.no_such_module:X",
        "diffusers.models.unets.unet_2d:UNet2DModel",
        3,
    ],
)
def test_only_model_classes_of_the_named_library_are_built(copied, name):
    base = record_of(copied)["base"] | {"class": name}
    edit(copied, base=base)
    with pytest.raises(ArtifactError, match="is no model class of the installed transformers"):
        load(copied)


def test_an_unknown_kind_of_class_is_refused(copied):
    edit(copied, base=record_of(copied)["base"] | {"kind": "os"})
    with pytest.raises(ArtifactError, match="comes from 'os'"):
        load(copied)


def test_another_configuration_is_refused(copied):
    path = copied / "config.json"
    path.write_text(path.read_text().replace('"hidden_sizes"', '"hidden_sizes_"'))
    with pytest.raises(ArtifactError, match=r"config.json is not the"):
        load(copied)


@pytest.mark.parametrize(
    ("key", "path", "values", "message"),
    [
        ("attributes", "classifier.1", {"forward": 3}, r"'classifier.1.forward'"),
        ("attributes", "classifier.1", {"in_features": "8"}, r"'classifier.1.in_features'"),
        ("attributes", "classifier.9", {"in_features": 8}, "no module 'classifier.9'"),
        ("classes", "classifier.1", ["os.system", 1.0], "the class 'os.system'"),
        ("aliases", "classifier.1.weight", "classifier.2.weight", "which is not stored"),
        ("tensors", "classifier.1.weight", {"1": {"kept": [[0, 8]], "of": 17}}, "made for size 17"),
        ("tensors", "classifier.1.weight", {"1": {"kept": [[0, 9]], "of": 16}}, "the tensors do not fit"),
        ("tensors", "no.such", {"0": {"kept": [[0, 9]], "of": 16}}, "no tensor 'no.such'"),
    ],
)
def test_entries_that_do_not_fit_the_class_are_refused(copied, key, path, values, message):
    edit(copied, **{key: record_of(copied)[key] | {path: values}})
    with pytest.raises(ArtifactError, match=message):
        load(copied)


def test_the_self_check_finds_a_model_that_computes_something_else(copied):
    check = record_of(copied)["self_check"]
    check["outputs"][0]["sha256"] = "0"
    edit(copied, self_check=check)
    load(copied)  # rounding alone may change the hash; the numbers still agree
    check["outputs"][0]["values"][0] += 0.01
    edit(copied, self_check=check)
    message = (
        r"does not compute what it computed.*: output 0 is off by [\d.]+e-0\d of its largest value, 1e-03 is.*install"
    )
    with pytest.raises(ArtifactError, match=message):
        load(copied)
    load(copied, self_check=False)
    check["outputs"][0]["shape"] = [1, 5]
    edit(copied, self_check=check)
    with pytest.raises(ArtifactError, match=r"output 0 is float32 \[2, 5\], expected float32 \[1, 5\]"):
        load(copied)


def test_a_self_check_that_was_not_recorded_is_a_warning(copied, caplog):
    edit(copied, self_check={"skipped": "the inputs cannot be described: complex inputs"})
    load(copied)
    (line,) = caplog.messages
    assert "were not checked after loading: the inputs cannot be described: complex inputs" in line


def test_tensors_on_the_meta_device_are_refused(written, copied, tmp_path, monkeypatch):
    with pytest.raises(ArtifactError, match="meta device"):
        save(copy.deepcopy(written("resnet")).to("meta"), tmp_path / "x")
    build = artifact.build

    def forgetful(*args: Any) -> nn.Module:
        module = build(*args)
        module.cached = torch.empty(3, device="meta")
        return module

    monkeypatch.setattr(artifact, "build", forgetful)
    with pytest.raises(ArtifactError, match=r"'cached' is on the meta device"):
        load(copied)


# ---------------------------------------------------------------------- what is refused when saving


def test_only_written_back_modules_are_saved(pruned, tmp_path):
    with pytest.raises(ArtifactError, match="has no removal record; save what write_back returned"):
        save(pruned("resnet").model, tmp_path / "x")


def test_other_files_are_never_overwritten(written, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"holds other files \(notes.txt\)"):
        save(written("resnet"), tmp_path)
    with pytest.raises(ArtifactError, match="is a file"):
        save(written("resnet"), tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_earlier_artifact_is_replaced_as_a_whole(written, tmp_path):
    folder = save(written("llama"), tmp_path / "x")
    save(written("resnet"), folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "graphwright.json", "model.safetensors"]
    load(folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x"], "no temporary directory is left"


def test_a_failure_leaves_the_earlier_artifact_and_nothing_half_written(written, tmp_path, monkeypatch):
    folder = save(written("resnet"), tmp_path / "x")
    before = (folder / "graphwright.json").read_bytes()

    def fail(*_args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(artifact, "write_tensors", fail)
    with pytest.raises(OSError, match="disk full"):
        save(written("llama"), folder)
    assert (folder / "graphwright.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_tensor_that_changes_on_the_way_is_named_with_both_values(written, tmp_path, monkeypatch):
    take = artifact.take

    def careless(model: nn.Module, *rest: Any) -> None:
        take(model, *rest)
        model.get_parameter("classifier.1.bias").data.add_(1)

    monkeypatch.setattr(artifact, "take", careless)
    monkeypatch.setattr(artifact, "run_self_check", lambda *_: None)
    message = r"'classifier.1.bias' .* is float32 \[5\] of norm .* expected float32 \[5\] of norm .*check=False"
    with pytest.raises(ArtifactError, match=message):
        save(written("resnet"), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_module_that_would_not_load_again_is_refused(written, tmp_path):
    small = copy.deepcopy(written("resnet"))
    small.extra = nn.Linear(2, 2)  # an adapter that the class does not have
    with pytest.raises(ArtifactError, match=r"the tensors do not fit ResNetForImageClassification.*extra"):
        save(small, tmp_path / "x")
    assert not (tmp_path / "x").exists()
