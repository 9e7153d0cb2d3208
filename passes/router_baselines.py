"""Routers to compare a learned one with, and the measures to compare them by.

    random = random_router(router, removed=120, seed=0)
    learned, drawn = router_errors(program, sample, [router, random])

Each baseline takes what is to be compared as a template: it is for the same run and the same branches, and reuses a given
number of branches in a run. Figure 4 of Learning-to-Cache (arXiv 2406.01733) has these, but for the even choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.dataflow import dataflow
from ..graph.errors import PreconditionError
from ..graph.program import Program
from ..graph.residuals import residual_joins
from ..graph.rewriter import Rewriter
from .gated_program import GATE, GatedProgram, gated_program
from .insert_layer_cache import branch_register
from .layer_router import LayerRouter
from .sampling_runs import Evaluation, Sample, mean_squared, sampling_run

# A logit that means yes or no.
_SURE = 5.0
# Of the lattice that spreads points over a square most evenly: 1 / p and 1 / p^2 with p^3 = p + 1.
_LATTICE = (0.7548776662466927, 0.5698402909980532)


def top_down(router: LayerRouter, removed: int) -> LayerRouter:
    """Return a router that reuses the first branches of the network, as many at each cheap evaluation."""
    return _in_order(router, removed, range(len(router.kinds)))


def bottom_up(router: LayerRouter, removed: int) -> LayerRouter:
    """Return a router that reuses the last branches of the network, as many at each cheap evaluation."""
    return _in_order(router, removed, range(len(router.kinds) - 1, -1, -1))


def evenly_spread(router: LayerRouter, removed: int) -> LayerRouter:
    """Return a router that reuses branches spread evenly over the evaluations and over the network."""
    rows, branches = (torch.arange(count, dtype=torch.float64) for count in router.logits.shape)
    return _lowest(router, (rows[:, None] * _LATTICE[0] + branches * _LATTICE[1]).frac(), removed)


def random_router(router: LayerRouter, removed: int, seed: int) -> LayerRouter:
    """Return a router that reuses branches anywhere in a run, all choices equally likely."""
    generator = torch.Generator().manual_seed(seed)
    return _lowest(router, torch.rand(router.logits.shape, generator=generator), removed)


def by_change(router: LayerRouter, changes: Tensor, removed: int) -> LayerRouter:
    """Return a router that reuses the branches that change least, over the whole run.

    Args:
        router: Template.
        changes: `branch_changes`.
        removed: Branches to reuse in a run.
    """
    return _lowest(router, changes, removed)


def branch_changes(program: Program, sample: Sample, router: LayerRouter, *, rounds: int = 4, seed: int = 0) -> Tensor:
    """Return ``|g(m)| * ||f(h_m) - f(h_s)||^2``: how much branches change from the full evaluation before to a cheap one.

    ``|g|``, the factor by which what follows a branch scales it before it is added, is the ratio of the root mean
    squares of what is added and of the branch.

    Args:
        program: As in `train_layer_router`.
        sample: As in `train_layer_router`.
        router: For its evaluations; its logits are not read.
        rounds: Runs of the full model to average over.
        seed: Of their noise.

    Returns:
        ``[cheap evaluations, branches]``, float64, on the CPU.
    """
    router.check(program)
    programs, scaled = gated_program(program), _with_scaled(program)
    changes = torch.zeros(router.logits.shape, dtype=torch.float64)

    def at_cheap(at: Evaluation) -> object:
        result, values = scaled(*at.args, **at.kwargs)
        for i, (name, old) in enumerate(at.kept.items()):
            new, added = values[name].double(), values[f"{name}_scaled"].double()
            gate = added.square().mean().sqrt() / new.square().mean().sqrt().clamp_min(1e-30)
            changes[at.row, i] += float(gate * (new - old.double()).square().sum()) / rounds
        return result

    _runs(programs, sample, router, rounds, seed, at_cheap)
    return changes


def router_errors(
    program: Program, sample: Sample, routers: Sequence[LayerRouter], *, rounds: int = 4, seed: int = 1
) -> tuple[float, ...]:
    """Return, for each router, the mean squared difference that it makes at a cheap evaluation of the full model's run.

    Args:
        program: As in `train_layer_router`.
        sample: As in `train_layer_router`.
        routers: For the same evaluations; each is used with its threshold.
        rounds: Runs to average over.
        seed: Of their noise; another one than in training makes the runs new ones.

    Raises:
        PreconditionError: A router is for another model, or for other evaluations than the first.
    """
    first = routers[0]
    for router in routers:
        router.check(program, first.evaluations)
        if router.cheap != first.cheap:
            raise PreconditionError(
                f"the routers are for different cheap evaluations: {first.cheap} and {router.cheap}"
            )
    programs = gated_program(program)
    gates = [router.computed().to(programs.open_gates) for router in routers]
    errors = torch.zeros(len(routers), dtype=torch.float64)

    def at_cheap(at: Evaluation) -> object:
        teacher = programs.plain(*at.args, **at.kwargs)
        for i, gate in enumerate(gates):
            got = programs.gated(*at.args, **at.kwargs, **at.kept, **{GATE: gate[at.row]})
            errors[i] += float(mean_squared(got, teacher)) / (rounds * len(first.cheap))
        return teacher

    _runs(programs, sample, first, rounds, seed, at_cheap)
    return tuple(errors.tolist())


def _runs(
    programs: GatedProgram,
    sample: Sample,
    router: LayerRouter,
    rounds: int,
    seed: int,
    at_cheap: Callable[[Evaluation], object],
) -> None:
    """Let ``sample`` make runs from one seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(rounds):
        sampling_run(programs, sample, generator, router.evaluations, router.cheap, at_cheap)


def _with_scaled(program: Program) -> Program:
    """Return a program that also returns every branch and, as ``<branch>_scaled``, what is added of it."""
    work = program.copy()
    flow = dataflow(work)
    rewriter, found = Rewriter(work, "branch-changes"), dict[str, Node]()
    for i, join in enumerate(residual_joins(work)):
        register = branch_register(i)
        operands = [n for n in join.node.all_input_nodes if join.branch is n or join.branch in flow.sources(n)]
        for name, node in ((register, join.branch), (f"{register}_scaled", operands[0])):
            before = min(node.users, key=flow.order.__getitem__)
            found[name] = rewriter.call(torch.ops.aten.clone.default, node, origin=before)
    rewriter.outputs(found)
    work.changed()
    return work


def _in_order(router: LayerRouter, removed: int, branches: range) -> LayerRouter:
    """Reuse the first of ``branches`` at every cheap evaluation; what does not divide evenly goes to the first ones."""
    rank = torch.empty(router.logits.shape)
    for place, branch in enumerate(branches):
        rank[:, branch] = place
    return _lowest(router, rank, removed)


def _lowest(router: LayerRouter, scores: Tensor, removed: int) -> LayerRouter:
    """Reuse the branches of the lowest scores, of equal ones those at earlier evaluations."""
    if not 0 <= removed <= router.logits.numel():
        raise PreconditionError(f"a run has {router.logits.numel()} branches to reuse, got {removed}")
    order = scores.flatten().argsort(stable=True)
    logits = torch.full((order.numel(),), _SURE)
    logits[order[:removed]] = -_SURE
    return replace(router, logits=logits.view(router.logits.shape), threshold=0.5, settings={})
