"""A removal written back to the caller's own class computes what the pruned Program computes."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphwright.frontends.write_back as write_back_module
from graphwright.frontends.multihead import ResizedMultiheadAttention
from graphwright.frontends.named_tensors import named_tensors
from graphwright.frontends.self_check import tensors_of
from graphwright.frontends.write_back import WriteBackRecord, write_back
from graphwright.graph.errors import ArtifactError, PreconditionError, WriteBackError
from graphwright.graph.resize import RemovalRecord

SIX = ("llama", "bert", "vit", "resnet", "unet", "conditional_unet")

# Relative to the largest output. Both sides run the same float32 kernels; only folded scales reorder roundings.
CLOSE = 1e-5

KINDS = {
    "llama": {"hidden", "head", "head group", "head dim", "value dim"},
    "bert": {"hidden", "head", "head dim", "value dim"},
    "vit": {"channel", "hidden", "head", "head dim", "value dim"},
    "resnet": {"channel"},
    "unet": {"channel", "hidden", "head", "head dim", "value dim"},
    "conditional_unet": {"channel", "hidden", "head", "head dim", "value dim"},
}


def back(*args: Any, **options: Any) -> Any:
    """Write back; the result's attributes are those of a class that type checkers do not know here."""
    return write_back(*args, **options)


def outputs(module, kwargs):
    with torch.no_grad():
        return tensors_of(module(**kwargs))


def assert_same(got, want):
    assert len(got) == len(want) > 0
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and b.std().item() > 1e-2, "an output near zero compares with anything"
        assert (a - b).abs().max() <= CLOSE * b.abs().max()


# ---------------------------------------------------------------------- six library classes


@pytest.mark.parametrize("name", SIX)
def test_written_back_model_equals_its_program_at_another_batch_size(pruned, written, tools, name):
    case, small = pruned(name), written(name)
    assert type(small) is type(case.model)
    removed = {g.kind for g in case.groups if g.name in case.record.groups}
    assert removed == KINDS[name]
    _, kwargs, _ = tools.builders[name](3)
    got = outputs(small, kwargs)
    assert_same(got, outputs(case.program, kwargs))
    full = outputs(case.model, kwargs)
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(got, full, strict=True)), "nothing was removed"


@pytest.mark.parametrize("name", SIX)
def test_tensors_are_the_programs_except_folded_scales(pruned, written, name):
    case, small = pruned(name), written(name)
    scaled = small.graphwright_record.extra.get("scaled", {})
    owned = named_tensors(small)
    shrunk = 0
    for key, tensor in case.program.tensors().items():
        if key in owned and key not in scaled:
            assert torch.equal(owned[key], tensor), key
            shrunk += tensor.numel() < named_tensors(case.model)[key].numel()
    assert shrunk > 5
    assert bool(scaled) == name.endswith("unet")


@pytest.mark.parametrize("name", SIX)
def test_attributes_of_layers_state_their_new_sizes(written, name):
    for path, module in written(name).named_modules():
        if isinstance(module, nn.Linear):
            assert list(module.weight.shape) == [module.out_features, module.in_features], path
        elif isinstance(module, nn.Conv2d):
            assert list(module.weight.shape[:2]) == [module.out_channels, module.in_channels // module.groups], path
        elif isinstance(module, nn.LayerNorm):
            assert tuple(module.weight.shape) == module.normalized_shape, path
        elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            size = module.num_features if isinstance(module, nn.BatchNorm2d) else module.num_channels
            assert module.weight.shape[0] == size, path
        elif isinstance(module, nn.Embedding):
            assert list(module.weight.shape) == [module.num_embeddings, module.embedding_dim], path


def test_attention_modules_state_what_is_left(written):
    attention = written("llama").model.layers[1].self_attn
    assert (attention.head_dim, attention.num_key_value_groups, attention.layer_idx) == (4, 1, 1)
    assert attention.scaling == pytest.approx(8**-0.5), "the scale of the scores is the original one"
    bert = written("bert").bert.encoder.layer[0].attention.self
    assert (bert.num_attention_heads, bert.attention_head_size, bert.all_head_size) == (3, 4, 12)
    unet = written("unet").mid_block.attentions[0]
    assert (unet.heads, unet.inner_dim, unet.query_dim) == (2, 8, 16)


def test_a_layer_index_equal_to_a_head_count_stays(written):
    # The second layer's index is 1, the third of four heads, sizes that do occur and do change.
    assert [layer.self_attn.layer_idx for layer in written("llama").model.layers] == [0, 1]


@pytest.mark.parametrize("name", SIX)
def test_callers_module_is_not_changed(pruned, written, tools, name):
    case = pruned(name)
    fresh, _, _ = tools.builders[name](2)
    written(name)
    assert not hasattr(case.model, "graphwright_record")
    state, expected = case.model.state_dict(), fresh.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in state)
    for (path, module), (_, twin) in zip(case.model.named_modules(), fresh.named_modules(), strict=True):
        assert type(module) is type(twin) and module.training == twin.training, path
        plain = {k: v for k, v in vars(module).items() if isinstance(v, (int, float, str, tuple))}
        assert plain == {k: v for k, v in vars(twin).items() if isinstance(v, (int, float, str, tuple))}, path


@pytest.mark.parametrize("name", ["llama", "unet"])
def test_configuration_is_not_changed(pruned, written, name):
    before = dict(pruned(name).model.config.to_dict() if name == "llama" else pruned(name).model.config)
    small = written(name)
    assert dict(small.config.to_dict() if name == "llama" else small.config) == before


def test_generate_is_a_greedy_loop_over_the_program(pruned, written):
    case, small = pruned("llama"), copy.deepcopy(written("llama"))
    prompt = case.kwargs["input_ids"][:, :4]
    mask = torch.ones_like(prompt)
    for cached in (True, False):
        made = small.generate(
            prompt, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=cached
        )
        tokens = prompt
        for _ in range(5):
            with torch.no_grad():
                scores = case.program(input_ids=tokens).logits[:, -1].clone()
            scores[:, 2] = -math.inf  # min_new_tokens forbids the end token
            tokens = torch.cat([tokens, scores.argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(made, tokens)
    assert len(set(tokens[:, 4:].flatten().tolist())) > 2, "a constant answer would compare with anything"


def test_tied_weights_stay_tied(pruned, written):
    small = written("llama")
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert small.lm_head.weight.shape[1] == 20
    assert small.lm_head.weight is not pruned("llama").model.lm_head.weight


@pytest.mark.parametrize("name", ["llama", "resnet"])
def test_training_moves_the_written_module_and_nothing_else(pruned, written, name):
    case, small = pruned(name), copy.deepcopy(written(name)).train()
    before = {key: value.clone() for key, value in case.program.tensors().items()}
    callers = {key: value.clone() for key, value in case.model.state_dict().items()}
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    loss = small(**case.kwargs)[0].square().mean()
    loss.backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in small.parameters())
    optimizer.step()
    after = small(**case.kwargs)[0].square().mean()
    assert after.item() < loss.item()
    assert all(torch.equal(value, before[key]) for key, value in case.program.tensors().items())
    assert all(torch.equal(value, callers[key]) for key, value in case.model.state_dict().items())


def test_the_record_says_what_was_done_and_survives_copying(pruned, written):
    case, small = pruned("bert"), copy.deepcopy(written("bert"))
    record = small.graphwright_record
    assert isinstance(record, WriteBackRecord)
    assert record.removal == case.record
    assert record.attributes["bert.pooler.dense"] == {"in_features": 24, "out_features": 24}
    assert "graphwright_record" not in dict(small.named_modules()) | small.state_dict()


# ---------------------------------------------------------------------- ways to call it


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 12), nn.Linear(12, 8), nn.Linear(8, 4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.third(self.dropout(self.second(self.first(x).relu()).relu()))


def test_a_pipelines_result_is_taken_apart(tools):
    case = tools.prune(tools.seeded(Mlp), (tools.normal(2, 6),))
    step = SimpleNamespace(text="remove-channels{ratio=0.5}")
    result = SimpleNamespace(output=case.program, removal=case.record, records=(step,))
    small = back(case.model, result)
    assert small.first.out_features == 6
    assert small.graphwright_record.passes == ("remove-channels{ratio=0.5}",)


def test_in_place_changes_the_module_itself(tools):
    case = tools.prune(tools.seeded(Mlp), (tools.normal(2, 6),))
    model = copy.deepcopy(case.model)
    weight = model.first.weight
    assert back(model, case.program, case.record, inplace=True) is model
    assert model.first.weight is not weight and model.first.out_features == 6
    x = tools.normal(5, 6)
    torch.testing.assert_close(model(x), case.program(x), rtol=1e-6, atol=1e-6)  # the same kernels
    assert model.graphwright_record.removal == case.record


def test_in_place_leaves_the_module_alone_where_it_fails(tools):
    model = tools.seeded(TwoWidths)
    case = tools.prune(model, (tools.normal(2, 5, 12),), keep=lambda g: tools.half(g, kinds=("value dim",)))
    with pytest.raises(WriteBackError):
        write_back(model, case.program, case.record, inplace=True)
    assert model.v.weight.shape == (16, 12) and not hasattr(model, "graphwright_record")


def test_mode_and_frozen_parameters_are_kept(tools):
    model = tools.seeded(Mlp)
    model.second.weight.requires_grad_(False)
    case = tools.prune(model.train(), (tools.normal(2, 6),))
    small = back(model, case.program, case.record)
    assert small.training and small.dropout.training and model.training
    assert [n for n, p in small.named_parameters() if not p.requires_grad] == ["second.weight"]


def test_a_second_removal_adds_to_the_first(tools):
    first = tools.prune(tools.seeded(Mlp), (tools.normal(2, 6),))
    small = back(first.model, first.program, first.record)
    second = tools.prune(small, (tools.normal(2, 6),))
    smaller = back(small, second.program, second.record)
    assert smaller.first.out_features == 3
    cut = smaller.graphwright_record.removal.tensors["first.weight"][0]
    assert cut.of == 12 and len(cut.kept) == 3
    assert torch.equal(smaller.first.weight, first.model.first.weight[list(cut.kept)])
    assert smaller.graphwright_record.attributes["first"] == {"out_features": 3}


def test_the_global_random_state_stays(tools):
    case = tools.prune(tools.seeded(Mlp), (tools.normal(2, 6),))
    state = torch.get_rng_state()
    write_back(case.model, case.program, case.record)
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------------- torch's own layers


def check(tools, build, *args, kinds=None):
    case = tools.prune(tools.seeded(build), args, keep=lambda graph: tools.half(graph, kinds=kinds))
    small = back(case.model, case.program, case.record)
    shapes = [(a.shape[0] + 1, *a.shape[1:]) for a in args]
    again = [tools.normal(*shape, seed=9) for shape in shapes]
    with torch.no_grad():
        assert_same(tensors_of(small(*again)), tensors_of(case.program(*again)))
    return case, small


class GroupedConvolutions(nn.Module):
    """The bottleneck of a ResNeXt, a depthwise and a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Conv2d(3, 16, 3, padding=1)
        self.reduce = nn.Conv2d(16, 24, 1)
        self.grouped = nn.Conv2d(24, 48, 3, padding=1, groups=6)
        self.norm = nn.BatchNorm2d(48)
        self.expand = nn.Conv2d(48, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.instance = nn.InstanceNorm2d(16)
        self.prelu = nn.PReLU(16)
        self.up = nn.ConvTranspose2d(16, 5, 2, stride=2)

    def forward(self, x):
        x = self.enter(x)
        x = x + self.expand(self.norm(self.grouped(self.reduce(x).relu())).relu())
        return self.up(self.prelu(self.instance(self.depthwise(x))))


def test_grouped_convolutions(tools):
    _, small = check(tools, GroupedConvolutions, tools.normal(2, 3, 8, 8))
    assert (small.grouped.groups, small.grouped.in_channels, small.grouped.out_channels) == (3, 6, 12)
    assert (small.depthwise.groups, small.instance.num_features, small.prelu.num_parameters) == (8, 8, 8)
    assert (small.up.in_channels, small.up.out_channels) == (8, 5)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.enter = nn.Linear(6, 12)
        self.cells = kind(12, 8, num_layers=2, batch_first=True, bidirectional=True)
        self.leave = nn.Linear(16, 5)

    def forward(self, x):
        return self.leave(self.cells(self.enter(x))[0])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.filterwarnings("ignore:The tensor attributes.*were assigned during export")
def test_recurrent_layers(tools, kind):
    _, small = check(tools, lambda: Recurrent(kind), tools.normal(2, 7, 6))
    assert (small.cells.input_size, small.cells.hidden_size) == (6, 4)
    small(tools.normal(2, 7, 6)).sum().backward()
    assert small.cells.weight_hh_l1.grad is not None, "the flat weights are the registered parameters"


class Attending(nn.Module):
    def __init__(self, weights=False):
        super().__init__()
        self.weights = weights
        self.enter = nn.Linear(12, 24)
        self.attention = nn.MultiheadAttention(24, 6, batch_first=True)
        nn.init.normal_(self.attention.in_proj_weight, std=0.4)  # attention that is not nearly uniform
        self.leave = nn.Linear(24, 5)

    def forward(self, x):
        x = self.enter(x)
        out, weights = self.attention(x, x, x, need_weights=self.weights)
        return (self.leave(x + out), weights) if self.weights else self.leave(x + out)


@pytest.mark.parametrize("weights", [False, True])
def test_multihead_attention(tools, weights):
    _, small = check(tools, lambda: Attending(weights), tools.normal(2, 7, 12))
    attention = small.attention
    assert isinstance(attention, nn.MultiheadAttention)
    assert (attention.embed_dim, attention.num_heads, attention.head_dim) == (12, 3, 2)
    assert attention.scale == pytest.approx(0.5), "of the original 4 dimensions"


def test_transformer_encoder(tools):
    def build():
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 6, 32, batch_first=True), 2)

    _, small = check(tools, build, tools.normal(2, 7, 24))
    assert small.layers[0].linear1.out_features == 16


def test_parametrised_layers(tools):
    def build():
        model = Mlp()
        nn.utils.parametrizations.weight_norm(model.first)
        return model

    _, small = check(tools, build, tools.normal(2, 6))
    assert (small.first.out_features, small.first.weight.shape) == (6, (6, 6))


def attend(q, k, v, scale, mask=None):
    scores = q @ k.transpose(-2, -1) * scale
    weights = (scores if mask is None else scores.masked_fill(mask, -math.inf)).softmax(-1)
    return weights @ v, weights


@pytest.mark.parametrize("batch_first", [True, False])
def test_resized_multihead_attention_without_some_heads(tools, batch_first):
    # The oracle is per-head attention by hand over the heads that are left, with their slices of the weights.
    full = nn.MultiheadAttention(12, 3, batch_first=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        nn.init.normal_(full.in_proj_bias)
    x, width, heads = tools.normal(2, 5, 12), 4, [0, 2]
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    q, k, v = F.linear(x, full.in_proj_weight, full.in_proj_bias).chunk(3, dim=-1)
    parts = [slice(h * width, (h + 1) * width) for h in heads]
    mask = causal[None] | padding[:, None, :]
    by_head = [attend(q[..., s], k[..., s], v[..., s], width**-0.5, mask) for s in parts]
    rows = torch.cat([torch.arange(12)[s] for s in parts])
    out = torch.cat([o for o, _ in by_head], dim=-1)
    want = F.linear(out, full.out_proj.weight[:, rows], full.out_proj.bias)
    small = copy.deepcopy(full)
    every = torch.cat([rows, rows + 12, rows + 24])
    small.in_proj_weight = nn.Parameter(full.in_proj_weight[every].detach())
    small.in_proj_bias = nn.Parameter(full.in_proj_bias[every].detach())
    small.out_proj.weight = nn.Parameter(full.out_proj.weight[:, rows].detach())
    small.num_heads, small.batch_first = 2, batch_first
    ResizedMultiheadAttention.adopt(small, width**-0.5)
    given = x if batch_first else x.transpose(0, 1)
    for need_weights in (True, False):
        got, weights = small(given, given, given, key_padding_mask=padding, attn_mask=causal, need_weights=need_weights)
        got = got if batch_first else got.transpose(0, 1)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)  # float32, sums of at most 12
        if need_weights:
            torch.testing.assert_close(weights, torch.stack([w for _, w in by_head]).mean(0), rtol=1e-5, atol=1e-6)
        else:
            assert weights is None


# ---------------------------------------------------------------------- attributes that have to be found


class Block(nn.Module):
    """Attention that reads its sizes from a shared configuration object, with as many heads as head dimensions."""

    def __init__(self, config, index):
        super().__init__()
        self.config = config
        self.layer_idx = index
        inner = config.heads * config.width
        self.q, self.k, self.v = (nn.Linear(12, inner) for _ in range(3))
        self.out = nn.Linear(inner, 12)
        self.scale = config.width**-0.5

    def forward(self, x):
        shape = (*x.shape[:-1], self.config.heads, self.config.width)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return x + self.out(out.transpose(1, 2).reshape(*x.shape[:-1], self.config.heads * self.config.width))


class Configured(nn.Module):
    def __init__(self):
        super().__init__()
        config = SimpleNamespace(heads=4, width=4, layers=2)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(2))
        self.config = config

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_configuration_entries_are_set_per_module_where_forward_reads_them(tools):
    def keep(graph):
        sizes = {"head": {"0": 3, "1": 2}, "head dim": {"0": 2, "1": 4}, "value dim": {"0": 2, "1": 4}}
        chosen = {g.name: sizes.get(g.kind, {}).get(g.name.split(".")[1]) for g in graph.groups}
        return {name: range(n) for name, n in chosen.items() if n}

    case = tools.prune(tools.seeded(Configured), (tools.normal(2, 5, 12),), keep=keep)
    small = back(case.model, case.program, case.record)
    x = tools.normal(3, 5, 12, seed=4)
    assert_same([small(x)], [case.program(x)])
    found = [(b.config.heads, b.config.width) for b in small.blocks]
    assert found == [(3, 2), (2, 4)]
    assert (case.model.config.heads, case.model.config.width) == (4, 4)
    assert vars(small.config) == {"heads": 4, "width": 4, "layers": 2}


class Unnamed(nn.Module):
    """Sizes under names that say nothing, one in a list, beside others of equal value that must stay."""

    def __init__(self):
        super().__init__()
        self.fused = nn.Linear(6, 16)
        self.parts = [8, 8]
        self.n, self.untouched = 8, 8
        self.leave = nn.Linear(8, 4)

    def forward(self, x):
        gate, up = self.fused(x).split(self.parts, dim=-1)
        x = (gate.sigmoid() * up).reshape(-1, self.n)
        return self.leave(x)


def test_sizes_under_unknown_names_are_found_by_running(tools):
    _, small = check(tools, Unnamed, tools.normal(2, 6))
    assert (small.parts, small.n, small.untouched) == ([4, 4], 4, 8)


class RunTimeScale(nn.Module):
    """Attention written out, with the scale taken from the width that is left."""

    def __init__(self, heads=4, width=8):
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(12, 3 * heads * width)
        self.out = nn.Linear(heads * width, 12)

    def forward(self, x):
        qkv = self.qkv(x).reshape(*x.shape[:-1], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(*x.shape[:-1], -1))


class FusedScale(RunTimeScale):
    def forward(self, x):
        qkv = self.qkv(x).reshape(*x.shape[:-1], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.out(out.transpose(1, 2).reshape(*x.shape[:-1], -1))


@pytest.mark.parametrize("build", [RunTimeScale, FusedScale])
def test_a_scale_derived_at_run_time_is_made_up_for_in_the_weights(tools, build):
    _, small = check(tools, build, tools.normal(2, 5, 12))
    assert small.num_heads == 2
    # Queries and keys share the factor sqrt(4 / 8); values come from the same rows, so the next layer undoes it.
    share = 0.5**0.25
    assert small.graphwright_record.extra["scaled"] == pytest.approx(
        {"qkv.weight": share, "qkv.bias": share, "out.weight": 1 / share}
    )


class Affine(nn.Module):
    """A linear layer with the weight of transformers' Conv1D, ``[in, out]``, under another name."""

    def __init__(self, inner, outer):
        super().__init__()
        self.in_features, self.out_features = inner, outer
        self.weight, self.bias = nn.Parameter(torch.randn(inner, outer) * 0.3), nn.Parameter(torch.zeros(outer))

    def forward(self, x):
        return x @ self.weight + self.bias


class Conv1D(nn.Module):
    """A linear layer with torch's weight, ``[out, in]``, under the name of transformers'."""

    def __init__(self, inner, outer):
        super().__init__()
        self.nx, self.nf = inner, outer
        self.weight, self.bias = nn.Parameter(torch.randn(outer, inner) * 0.3), nn.Parameter(torch.zeros(outer))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class OwnLayers(RunTimeScale):
    def __init__(self, layer):
        super().__init__()
        self.qkv, self.out = layer(12, 96), layer(32, 12)


@pytest.mark.parametrize("layer", [Affine, Conv1D])
def test_the_operator_says_which_side_of_a_weight_is_the_input(tools, layer):
    _, small = check(tools, lambda: OwnLayers(layer), tools.normal(2, 5, 12))
    assert small.num_heads == 2
    share = 0.5**0.25
    assert small.graphwright_record.extra["scaled"] == pytest.approx(
        {"qkv.weight": share, "qkv.bias": share, "out.weight": 1 / share}
    )
    if layer is Affine:
        assert (small.qkv.out_features, small.out.in_features) == (24, 8)


class NormedQueries(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, 16) for _ in range(3))
        self.norm_q, self.norm_k = nn.RMSNorm(8), nn.RMSNorm(8)
        self.out = nn.Linear(16, 12)

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(self.norm_q(q), self.norm_k(k), v)
        return self.out(out.transpose(1, 2).flatten(2))


def test_norms_on_queries_and_keys_take_the_factor(tools):
    _, small = check(tools, NormedQueries, tools.normal(2, 5, 12), kinds=("head dim",))
    assert set(small.graphwright_record.extra["scaled"]) == {"norm_q.weight", "norm_k.weight"}
    assert small.norm_q.normalized_shape == (4,)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"classes": {"0": ("ResizedMultiheadAttention", 0.5)}}, "gives '0' the class 'ResizedMultiheadAttention'"),
        ({"classes": {"1": ("Linear", 0.5)}}, "gives '1' the class 'Linear', which it cannot have"),
        ({"attributes": {"2": {"x": 1}}}, "has no module '2'"),
        ({"attributes": {"0": {"in_features": (1, 2)}}}, r"'0.in_features' to \(1, 2\), which is no size"),
    ],
)
def test_a_record_is_applied_only_where_it_fits(changed, message):
    model = nn.Sequential(nn.Linear(2, 2), nn.MultiheadAttention(4, 2))
    with pytest.raises(ArtifactError, match=message):
        write_back_module.apply_record(model, WriteBackRecord(RemovalRecord(), **changed))


def test_the_class_of_a_record_is_looked_up(monkeypatch):
    class Other(ResizedMultiheadAttention, nn.MultiheadAttention):
        pass

    monkeypatch.setattr(write_back_module, "SUBSTITUTES", {"Other": Other})
    model = nn.Sequential(nn.MultiheadAttention(4, 2))
    write_back_module.apply_record(model, WriteBackRecord(RemovalRecord(), classes={"0": ("Other", 0.25)}))
    assert type(model[0]) is Other and model[0].scale == 0.25


class TwoWidths(nn.Module):
    """Has one attribute for the width of queries, keys and values."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim = 2, 8
        self.q, self.k, self.v = (nn.Linear(12, 16) for _ in range(3))
        self.out = nn.Linear(16, 12)

    def forward(self, x):
        shape = (*x.shape[:-1], self.num_heads, self.head_dim)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, scale=0.25)
        return self.out(out.transpose(1, 2).flatten(2))


def test_one_attribute_for_two_widths_is_refused_with_the_reason(tools):
    case = tools.prune(
        tools.seeded(TwoWidths), (tools.normal(2, 5, 12),), keep=lambda g: tools.half(g, kinds=("value dim",))
    )
    with pytest.raises(WriteBackError, match="keep 8 query and key dimensions and 4 value dimensions") as caught:
        write_back(case.model, case.program, case.record)
    assert "module '<root>' (TwoWidths)" in str(caught.value)
    assert "head_dim = 4" in str(caught.value), "the attempts are listed"


def test_a_literal_in_forward_is_refused_with_the_module(tools):
    class Literal(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.second(self.first(x).reshape(-1, 8))

    case = tools.prune(tools.seeded(Literal), (tools.normal(2, 6),))
    with pytest.raises(WriteBackError, match=r"module '(<root>|second)' \(\w+\)"):
        write_back(case.model, case.program, case.record)


def test_what_does_not_belong_together_is_refused(tools):
    case = tools.prune(tools.seeded(Mlp), (tools.normal(2, 6),))
    with pytest.raises(PreconditionError, match="removal record"):
        write_back(case.model, case.program)
    with pytest.raises(PreconditionError, match="takes a Program"):
        write_back(case.model, SimpleNamespace(output=object(), removal=case.record))
    with pytest.raises(PreconditionError, match="'first.weight' is"):
        write_back(case.model, case.program, RemovalRecord())
    small = back(case.model, case.program, case.record)
    with pytest.raises(PreconditionError, match="the record was made for 12"):
        write_back(small, case.program, case.record)
    with pytest.raises(PreconditionError, match="meta"):
        write_back(copy.deepcopy(case.model).to("meta"), case.program, case.record)


def test_a_program_that_computes_something_else_is_refused(tools):
    case = tools.prune(tools.seeded(Mlp), (tools.normal(2, 6),))
    program = case.program.copy()
    relu = next(n for n in program.nodes if n.target is torch.ops.aten.relu.default)
    relu.target = torch.ops.aten.tanh.default
    program.changed()
    with pytest.raises(WriteBackError, match="cannot hold this removal"):
        write_back(case.model, program, case.record)


def test_a_module_that_cannot_be_copied_is_refused(tools):
    case = tools.prune(tools.seeded(Mlp), (tools.normal(2, 6),))
    model = copy.deepcopy(case.model)
    model.cached = model.first.weight * 2  # not a leaf: torch refuses to copy it
    with pytest.raises(WriteBackError, match="cannot be copied"):
        write_back(model, case.program, case.record)
