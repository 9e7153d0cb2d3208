"""Removal of residual blocks against eager models in which hooks make the branches zero."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import graphwright as gw
from graphwright.graph.errors import PreconditionError, WriteBackError
from graphwright.graph.program import Program, tensor_identity
from graphwright.passes.base import fingerprint
from graphwright.passes.remove_blocks import RemoveBlocks
from graphwright.tools.zoo import ZOO

# Relative to the largest output; both sides run the same kernels on the same values.
TOLERANCE = 1e-5
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def drawn(model: nn.Module) -> Any:
    """Draw every parameter anew: no branch is near zero, as those behind a layer scale or a zero start are."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
    return model.eval()


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _zeros(module: nn.Module, inputs: Any, output: Any) -> Any:
    return torch.zeros_like(output)


def with_zeros(model: nn.Module, modules: Sequence[str], args: Any, kwargs: Any = None) -> list[Tensor]:
    """Return what ``model`` computes when the results of ``modules`` are zero."""
    hooks = [model.get_submodule(name).register_forward_hook(_zeros) for name in modules]
    try:
        with torch.no_grad():
            return tensors(model(*args, **(kwargs or {})))
    finally:
        for hook in hooks:
            hook.remove()


def assert_equal(got: Sequence[Tensor], want: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    """Check results against the oracle's, and that the oracle differs from ``other``, the whole model's."""
    assert len(got) == len(want) > 0
    scale = max(float(t.abs().max()) for t in want)
    assert scale > 1e-2
    assert max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True)) <= TOLERANCE * scale
    assert max(float((a - b).abs().max()) for a, b in zip(want, other, strict=True)) > 1e-2 * scale


def removed(program: Program, **options: Any) -> Any:
    return gw.Pipeline([RemoveBlocks(**options)])(program)


# ---------------------------------------------------------------------- architectures

# Model of the zoo, block, the modules that give its branches' results, and what of it is no part of a branch.
BLOCKS = {
    "convnext": ("convnext.encoder.stages.0.layers.1", ("pwconv2",), ()),
    "hf_resnet_bottleneck": ("resnet.encoder.stages.0.layers.1", ("layer.2.normalization",), ()),
    "resnet_basic": ("body.3", ("b.1",), ()),
    "llama_gqa": ("model.layers.0", ("self_attn.o_proj", "mlp.down_proj"), ()),
    "dit": ("transformer_blocks.1", ("attn1.to_out.0", "ff.net.2"), ()),
    # Norms behind the additions stay: they are on the stream.
    "bert": ("bert.encoder.layer.1", ("attention.output.dense", "output.dense"), ("LayerNorm",)),
    "gptj": ("transformer.h.0", ("attn.out_proj", "mlp.fc_out"), ()),
    "falcon": ("transformer.h.1", ("self_attention.dense", "mlp.dense_4h_to_h"), ()),
    "flux": ("transformer_blocks.0", ("attn.to_out.0", "attn.to_add_out", "ff.net.2", "ff_context.net.2"), ()),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_removed_block_is_the_model_with_its_branches_zero(name: str) -> None:
    case = ZOO[name].build()
    program = gw.capture(case.model, case.args, case.kwargs, case.dynamic)
    block, zeroed, staying = BLOCKS[name]
    result = removed(program, blocks=(block,))
    with torch.no_grad():
        got, whole = tensors(result.program(*case.args, **case.kwargs)), tensors(case.model(*case.args, **case.kwargs))
    assert_equal(got, with_zeros(case.model, [f"{block}.{z}" for z in zeroed], case.args, case.kwargs), whole)

    stats = result.records[0].result.stats
    own = {n for n, _ in case.model.get_submodule(block).named_parameters() if not any(s in n for s in staying)}
    # By identity, since a second name of a tied tensor that nothing reads goes as dead code.
    kept = {tensor_identity(t) for t in result.program.parameters().values()}
    gone = {n for n, t in program.parameters().items() if tensor_identity(t) not in kept}
    assert gone == {f"{block}.{n}" for n in own} & set(program.parameters())
    size = sum(program.parameters()[n].numel() for n in gone)
    assert stats["parameters_before"] - stats["parameters_after"] == size > 0
    assert stats["macs_after"] < stats["macs_before"] and stats["blocks_removed"] == 1
    assert (
        len(list(result.program.nodes)) == len(list(program.nodes)) - stats["nodes_removed"] < len(list(program.nodes))
    )
    # Nothing else was touched.
    left = result.program.tensors()
    assert all(left[n] is program.tensors()[n] for n in left)


def test_attention_and_feed_forward_of_a_layer_go_by_themselves() -> None:
    case = ZOO["llama_gqa"].build()
    program = gw.capture(case.model, case.args, case.kwargs, case.dynamic)
    result = removed(program, blocks=("*.1.self_attn",), unit="branch")
    with torch.no_grad():
        got, whole = tensors(result.program(*case.args, **case.kwargs)), tensors(case.model(*case.args, **case.kwargs))
    assert_equal(got, with_zeros(case.model, ["model.layers.1.self_attn.o_proj"], case.args, case.kwargs), whole)
    fates = result.records[0].result.blocks
    assert [(f.number, f.kinds, f.removed) for f in fates] == [
        (0, ("attention",), False),
        (1, ("mlp",), False),
        (2, ("attention",), True),
        (3, ("mlp",), False),
    ]
    assert any("layers.1.mlp" in name for name in result.program.tensors())


# ---------------------------------------------------------------------- small networks


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 12), nn.Linear(12, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Stack(nn.Module):
    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(8, 8), nn.Linear(8, 5)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.leave(x)


@pytest.fixture(scope="module")
def stack() -> tuple[nn.Module, Program]:
    model = drawn(Stack())
    return model, gw.capture(model, (X,))


def by_hand(model: Any, kept: Sequence[int]) -> Tensor:
    x = model.enter(X)
    for i in kept:
        x = model.blocks[i](x)
    return model.leave(x)


def test_the_others_keep_their_order(stack) -> None:
    model, program = stack
    result = removed(program, blocks=(0, "blocks.2"))
    with torch.no_grad():
        assert_equal([result.program(X)], [by_hand(model, [1, 3])], [model(X)])
    assert not torch.allclose(by_hand(model, [3, 1]), by_hand(model, [1, 3]), atol=1e-2)
    assert [f.number for f in result.records[0].result.blocks if f.removed] == [0, 2]


def test_removing_nothing_is_the_identity(stack) -> None:
    _, program = stack
    steps = RemoveBlocks(count=0), RemoveBlocks(ratio=0.0), RemoveBlocks(blocks=("blocks",), ratio=0.2)
    for step in steps:
        copy = program.copy()
        result = step(copy)
        assert not result.modified and fingerprint(copy) == fingerprint(program)


def test_two_removals_in_turn_are_one_of_both(stack) -> None:
    _, program = stack
    once = removed(program, blocks=("blocks.1", "blocks.2")).program
    twice = gw.Pipeline([RemoveBlocks(blocks=("blocks.2",)), RemoveBlocks(blocks=("blocks.1",))])(program).program
    assert torch.equal(once(X), twice(X)) and not torch.allclose(once(X), program(X), atol=1e-2)
    assert [n.target for n in once.nodes] == [n.target for n in twice.nodes]
    assert once.tensors().keys() == twice.tensors().keys()


def test_every_block_may_go(stack) -> None:
    model, program = stack
    result = removed(program, ratio=1.0)
    with torch.no_grad():
        assert_equal([result.program(X)], [by_hand(model, [])], [model(X)])
    assert not any(name.startswith("blocks") for name in result.program.tensors())


def test_the_caller_s_model_and_program_stay_whole(stack) -> None:
    model, program = stack
    before, want = fingerprint(program), model(X)
    removed(program, count=2, criterion="magnitude-l2")
    assert fingerprint(program) == before and torch.equal(model(X), want)


def small(forward: Callable[[Any, Tensor], Any], count: int = 3) -> Any:
    """Return a network of ``count`` linear layers ``f0``, ``f1``, ... with this forward."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for i in range(count):
                self.add_module(f"f{i}", nn.Linear(8, 8))

        def forward(self, x: Tensor) -> Any:
            return forward(self, x)

    return drawn(Small())


def written_later(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    stream = m.f0(x)
    total = stream + m.f1(stream)
    return total.mul_(3.0), stream


def stream_written_later(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    stream = m.f0(x)
    total = stream + m.f1(stream)
    stream.mul_(3.0)
    return total, stream


def into_the_branch(m: Any, x: Tensor) -> Tensor:
    stream = m.f0(x)
    total = m.f1(stream)
    total += stream
    return m.f2(total.relu_()) * stream


def into_the_stream(m: Any, x: Tensor) -> Tensor:
    stream = m.f0(x)
    stream += m.f1(stream)
    return m.f2(stream.relu_())


def written_input(m: Any, x: Tensor) -> Tensor:
    x = x + m.f1(x)
    return m.f2(x.relu_())


SITES: dict[str, Callable[[Any, Tensor], Any]] = {
    "branch first": lambda m, x: m.f2(m.f1(x) + x),
    "subtracted": lambda m, x: m.f2(x - m.f1(x)),
    "scaled": lambda m, x: m.f2(torch.add(x, m.f1(x), alpha=0.5)),
    "scaled stream": lambda m, x: m.f2(x * 0.5 + m.f1(x)),
    "gated": lambda m, x: m.f2(torch.addcmul(x, m.f1(x), m.f0.bias)),
    "added twice": lambda m, x: [(lambda b: m.f2(x + b) * (m.f0(x) + b))(m.f1(x))][0],
    "another dtype": lambda m, x: m.f2(x.to(torch.bfloat16) + m.f1(x)),
    "returned stream": lambda m, x: [h + m.f1(h) for h in [x.relu()]],
    "written later": written_later,
    "stream written later": stream_written_later,
    "in place into the branch": into_the_branch,
    "in place into the stream": into_the_stream,
    "input is not written": written_input,
}


@pytest.mark.parametrize("site", SITES)
def test_an_addition_becomes_the_operand_that_is_no_branch(site: str) -> None:
    model, x = small(SITES[site]), X.clone()
    program = gw.capture(model, (x,))
    result = removed(program, ratio=1.0, unit="branch")
    assert result.records[0].result.stats["branches_removed"] == 1
    with torch.no_grad():
        got, whole = tensors(result.program(x)), tensors(program(x))
    assert torch.equal(x, X)
    assert_equal(got, with_zeros(model, ["f1"], (X.clone(),)), whole)
    assert not any(name.startswith("f1.") for name in result.program.tensors())
    assert [t.dtype for t in got] == [t.dtype for t in whole]


def test_a_module_that_is_called_again_keeps_its_weights() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.leave = Block(), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.leave(self.block(self.block(self.block(x))))

    model = drawn(Recurrent())
    program = gw.capture(model, (X,))
    result = removed(program, blocks=(1,))
    fates = result.records[0].result.blocks
    assert [(f.name, f.removed) for f in fates] == [("block", False), ("block", True), ("block", False)]
    with torch.no_grad():
        assert_equal([result.program(X)], [model.leave(model.block(model.block(X)))], [model(X)])
    assert result.program.tensors().keys() == program.tensors().keys()


# ---------------------------------------------------------------------- refusals


def lerp(m: Any, x: Tensor) -> Tensor:
    return m.f2(torch.lerp(x, m.f1(x), 0.25))


def negated(m: Any, x: Tensor) -> Tensor:
    return m.f2(m.f1(x) - x)


def returned(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    keys = m.f0(x)
    return m.f2(x + m.f1(keys.relu())), keys


def read(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    branch = m.f1(x)
    return m.f2(x + branch), branch.softmax(-1)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lerp, "does more than to add it to a stream of the same shape"),
        (negated, "does more than to add it"),
        (returned, "others need layers of it, %linear = aten.linear.default in f0"),
        (read, "aten.softmax.int in .* reads what it computes"),
    ],
)
def test_what_leaves_something_of_the_block_is_refused_with_the_reason(forward: Any, reason: str) -> None:
    program = gw.capture(small(forward), (X,))
    before = fingerprint(program)
    with pytest.raises(PreconditionError, match=reason):
        RemoveBlocks(ratio=1.0)(program)
    assert fingerprint(program) == before


class Staged(nn.Module):
    """Blocks of one class, of which the second changes the width and has a layer in its shortcut."""

    class Unit(nn.Module):
        def __init__(self, a: int, b: int) -> None:
            super().__init__()
            self.conv, self.short = nn.Conv2d(a, b, 3, padding=1), nn.Identity() if a == b else nn.Conv2d(a, b, 1)

        def forward(self, x: Tensor) -> Tensor:
            return (self.conv(x.relu()) + self.short(x)).relu()

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.units = nn.Sequential(self.Unit(4, 4), self.Unit(4, 6), self.Unit(6, 6), self.Unit(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.units(self.stem(x))


PICTURE = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(2))


def test_blocks_that_change_the_stream_stay_and_are_reported() -> None:
    model = drawn(Staged())
    program = gw.capture(model, (PICTURE,))
    result = removed(program, blocks=("units",))
    assert [f.name for f in result.records[0].result.blocks] == ["units.0", "units.2", "units.3"]
    (skipped,) = result.skipped
    assert skipped.site == "units.1" and "the shortcut has layers of its own" in skipped.reason
    with torch.no_grad():
        want = model.units[1](model.stem(PICTURE).relu()).relu()
        assert_equal([result.program(PICTURE)], [want], [model(PICTURE)])
    with pytest.raises(PreconditionError, match=r"cannot take units.1 away: none of its branches is added"):
        RemoveBlocks(blocks=("units.1",))(program)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": ("block.1",)}, r"no block of Stack matches 'block.1'; did you mean 'blocks.1'\?"),
        ({"blocks": (4,)}, "has no block 4: Stack has 4, numbered from 0 to 3"),
        ({"count": 5}, "is to take 5 of 4 blocks of Stack, and 4 of them can go"),
        ({"count": 1, "ignore": ("nothing",)}, "ignore of remove-blocks: nothing of Stack matches 'nothing'"),
        ({}, "does not know what to take: give blocks, count or ratio"),
        ({"count": 2}, r"give Context\(loss=..., batches="),
        ({"count": 2, "criterion": "taylor"}, "needs calibration"),
    ],
)
def test_what_cannot_be_chosen_is_said(stack, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PreconditionError, match=message):
        RemoveBlocks(**options)(stack[1].copy())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 1, "ratio": 0.5}, "count and ratio both say"),
        ({"count": -1}, "count must be a whole number from 0, got -1"),
        ({"ratio": 1.5}, r"ratio must be in \[0, 1\], got 1.5"),
        ({"count": 1, "unit": "layer"}, "unit must be one of block, branch"),
        ({"count": 1, "criterion": "fpgm"}, "criterion must be one of influence, hessian"),
        ({"count": 1, "reduction": "median"}, "reduction must be one of sum, mean"),
    ],
)
def test_bad_options_are_refused_when_they_are_given(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RemoveBlocks(**options)


def test_a_network_without_branches_is_refused() -> None:
    program = gw.capture(small(lambda m, x: m.f2(m.f1(m.f0(x)))), (X,))
    with pytest.raises(PreconditionError, match="needs residual branches with layers in them, and Small has none"):
        RemoveBlocks(count=1)(program)


# ---------------------------------------------------------------------- scores


def loss(program: Any, batch: Tensor) -> Tensor:
    return program(batch).square().mean()


BATCHES = [torch.randn(4, 8, generator=torch.Generator().manual_seed(i)) for i in (3, 4)]


def context() -> gw.Context:
    return gw.Context(loss=loss, batches=BATCHES)


def scores(program: Program, **options: Any) -> list[float]:
    result: Any = gw.Pipeline([RemoveBlocks(count=2, **options)])(program, context()).records[0].result
    found = [fate.score for fate in result.blocks]
    lowest = sorted(range(len(found)), key=lambda i: found[i])[:2]
    assert sorted(lowest) == [fate.number for fate in result.blocks if fate.removed]
    return found


def test_influence_is_one_minus_the_cosine_of_the_stream_before_and_after(stack) -> None:
    model, program = stack
    cosines: list[list[Tensor]] = [[] for _ in model.blocks]
    with torch.no_grad():
        for batch in BATCHES:
            x = model.enter(batch)
            for found, block in zip(cosines, model.blocks, strict=True):
                after = block(x)
                found.append((x * after).sum(-1) / (x.norm(dim=-1) * after.norm(dim=-1)))
                x = after
    want = [1 - float(torch.cat(found).mean()) for found in cosines]
    assert scores(program) == pytest.approx(want, rel=1e-4)
    assert max(want) > 2 * min(want) > 0


def test_influence_on_pictures_is_of_the_channels_and_of_values_before_they_are_written_over() -> None:
    class Written(Staged.Unit):
        def forward(self, x: Tensor) -> Tensor:
            return (self.conv(x) + x).relu_()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.units = nn.Conv2d(3, 4, 1), nn.Sequential(*(Written(4, 4) for _ in range(3)))

        def forward(self, x: Tensor) -> Tensor:
            return self.units(self.stem(x))

    model = drawn(Net())
    want = []
    with torch.no_grad():
        x = model.stem(PICTURE)
        for unit in model.units:
            after = unit.conv(x) + x
            want.append(1 - float(nn.functional.cosine_similarity(x, after, 1).mean()))
            x = after.relu()
    done = gw.Pipeline([RemoveBlocks(count=1)])(gw.capture(model, (PICTURE,)), gw.Context(loss, [PICTURE]))
    result: Any = done.records[0].result
    assert [f.score for f in result.blocks] == pytest.approx(want, rel=1e-4)


def test_taylor_is_the_published_mean_of_means(stack) -> None:
    model, program = stack
    model.zero_grad()
    for batch in BATCHES:
        loss(model, batch).backward()
    want = [
        sum(float((p.grad * p).abs().mean()) for p in block.parameters()) / len(list(block.parameters()))
        for block in model.blocks
    ]
    model.zero_grad()
    assert scores(program, criterion="taylor") == pytest.approx(want, rel=1e-4)
    # Sums of all elements rank differently where blocks have layers of different sizes; here only the scale differs.
    sums = scores(program, criterion="magnitude-l2", reduction="sum", per_element=False)
    assert sums == pytest.approx([sum(float(p.square().sum()) for p in b.parameters()) for b in model.blocks], rel=1e-4)


def test_of_equal_scores_the_later_blocks_go() -> None:
    model = Stack()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.25)
    result = removed(gw.capture(model.eval(), (X,)), count=2, criterion="magnitude-l1")
    assert [f.number for f in result.records[0].result.blocks if f.removed] == [2, 3]


def test_only_what_is_named_competes_and_what_is_ignored_stays(stack) -> None:
    _, program = stack
    for seed in range(4):
        options = {"count": 1, "criterion": "random", "seed": seed}
        chosen = removed(program, blocks=("blocks.[123]",), ignore=("blocks.2.up",), **options).records[0].result.blocks
        assert [f.number for f in chosen if f.score is not None] == [1, 3]
        assert sum(f.removed for f in chosen) == 1 and not chosen[0].removed and not chosen[2].removed


# ---------------------------------------------------------------------- with other passes, exports, write-back


def test_it_goes_before_and_after_a_removal_of_channels(stack) -> None:
    _, program = stack
    channels, blocks = gw.RemoveChannels(ratio=0.25), RemoveBlocks(blocks=("blocks.1",))
    after = gw.Pipeline([channels, blocks])(program)
    smaller = gw.Pipeline([channels])(program)
    hooked = smaller.program.copy()
    weights = hooked.tensors()
    for name in ("blocks.1.down.weight", "blocks.1.down.bias"):
        with torch.no_grad():
            owner, _, leaf = name.rpartition(".")
            setattr(hooked.graph_module.get_submodule(owner), leaf, nn.Parameter(torch.zeros_like(weights[name])))
    with torch.no_grad():
        assert_equal([after.program(X)], [hooked(X)], [smaller.program(X)])
    before = gw.Pipeline([blocks, channels])(program)
    assert before.program(X).shape == (3, 5)
    sizes = [gw.cost(r.program).parameters for r in (after, before)]
    assert sizes[0] == sizes[1] < gw.cost(smaller.program).parameters


def test_the_result_exports_to_onnx(stack, tmp_path) -> None:
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, program = stack
    result = removed(program, blocks=("blocks.0", "blocks.3"))
    gw.export_onnx(result.output, tmp_path)
    (file,) = tmp_path.glob("*.onnx")
    session = ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(9))
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        want = model.leave(model.blocks[2](model.blocks[1](model.enter(x))))
        assert_equal([torch.from_numpy(got)], [want], [model(x)])


def test_it_cannot_be_written_back_and_the_error_says_so(stack) -> None:
    model, program = stack
    with pytest.raises(WriteBackError, match=r"'blocks.1.down.bias' and 5 other parameters.*remove-blocks"):
        gw.write_back(model, removed(program, blocks=("blocks.1",)))


def test_options_of_recipes_are_numbers_and_names() -> None:
    from graphwright.passes.options import make

    assert make("remove-blocks", {"blocks": [3, "stages.2"], "count": 1}) == RemoveBlocks(
        blocks=(3, "stages.2"), count=1
    )
