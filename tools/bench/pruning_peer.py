"""``graphwright bench pruners``: the same criterion, scope and ratio by graphwright and by Torch-Pruning 1.6.1.

    graphwright bench pruners [--subjects resnet,crepe] [--criteria fpgm,taylor] [--seeds 5] [--no-recovery] [--out FILE] [--json]

Both remove a quarter of the channels of every group of the same trained network, scored on the same batches, and train equally
afterwards; the networks are those of ``graphwright bench pruning``. Reduction and normaliser are Torch-Pruning's defaults,
the mean for both. Its scores differ where it counts other parameters: no batch norm in Taylor and Hessian scores, the last
sample instead of the mean of all in Hessian ones; in FPGM's distances squared weights, and always of everything in the group
(``group-fpgm``), never of what produces it alone (``fpgm``). The last column of a table is ours minus theirs right after
removal, seed by seed, with the standard error of that mean.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...frontends.capture import capture
from ...graph.cost import cost
from ...graph.errors import LoadError
from ...graph.program import Program
from ...passes.base import Pipeline
from ...passes.remove_channels import RemoveChannels
from ...passes.train_weights import TrainWeights
from ...passes.trainer import Training, train
from .. import render
from ..facts import machine
from .cache_rows import Row, Rows, progress
from .pruning_subjects import SUBJECTS, Bed

RATIO, SEEDS = 0.25, 5
SCOPES = ("local", "global")
# By criterion: Torch-Pruning's class with its arguments, and our options.
CRITERIA: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "random": ("RandomImportance", {}, {"criterion": "random"}),
    "magnitude-l2": ("MagnitudeImportance", {"p": 2}, {"criterion": "magnitude-l2"}),
    "lamp": ("LAMPImportance", {"p": 2}, {"criterion": "magnitude-l2", "normaliser": "lamp"}),
    "fpgm": ("FPGMImportance", {}, {"criterion": "fpgm"}),
    "group-fpgm": ("FPGMImportance", {}, {"criterion": "group-fpgm"}),
    "bn-scale": ("BNScaleImportance", {}, {"criterion": "bn-scale"}),
    "taylor": ("TaylorImportance", {}, {"criterion": "taylor"}),
    "hessian": ("HessianImportance", {}, {"criterion": "hessian"}),
}


def ours(bed: Bed, criterion: str, scope: str, seed: int) -> Program:
    """Remove channels with graphwright."""
    step = RemoveChannels(ratio=RATIO, scope=scope, seed=seed, **CRITERIA[criterion][2])
    return Pipeline([step])(bed.program, bed.context).program


def theirs(bed: Bed, criterion: str, scope: str, seed: int) -> nn.Module:
    """Remove channels with Torch-Pruning, from a copy of the module."""
    import torch_pruning as peer

    model = copy.deepcopy(bed.module)
    name, arguments, _ = CRITERIA[criterion]
    scorer = getattr(peer.importance, name)(**arguments)
    torch.manual_seed(seed)
    args, _ = bed.program.example_inputs()
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    pruner = peer.pruner.BasePruner(
        model,
        args,  # pyright: ignore[reportArgumentType]  # it takes a tuple too
        importance=scorer,
        pruning_ratio=RATIO,
        global_pruning=scope == "global",
        ignored_layers=[last],  # which makes the outputs
    )
    if criterion in ("taylor", "hessian"):
        _accumulate(bed, model, scorer, samples=criterion == "hessian")
    pruner.step()
    return model.zero_grad() or model


def _accumulate(bed: Bed, model: nn.Module, scorer: Any, samples: bool) -> None:
    """Fill in gradients as Torch-Pruning's examples do: of all batches, or sample by sample."""
    loss, split = bed.context.loss, bed.context.split
    assert loss is not None and split is not None
    for batch in bed.context.batches:
        for part in split(batch) if samples else [batch]:
            if samples:
                model.zero_grad()
            value: Any = loss(model, part)  # pyright: ignore[reportArgumentType]  # called like the program
            value.backward()
            if samples:
                scorer.accumulate_grad(model)


def measured(bed: Bed, criterion: str, scope: str, seed: int, recovery: bool = True) -> Row:
    """Return one row: what is left of cost and quality with either, also after training if ``recovery``."""
    dense = cost(bed.program)
    program = ours(bed, criterion, scope, seed)
    trained = Pipeline([TrainWeights(**bed.recovery)])(program, bed.context).program if recovery else None
    row: Row = {"criterion": criterion, "scope": scope, "seed": seed}
    row["ours"] = _judged(bed, program, trained, cost(program).total_macs / dense.total_macs)
    try:
        module = theirs(bed, criterion, scope, seed)
        args, kwargs = bed.program.example_inputs()
        share = cost(capture(module, args, kwargs)).total_macs / dense.total_macs
    # Whatever it raises on a network that it should be able to prune is the finding.
    except Exception as err:
        row["theirs"] = {"raises": f"{type(err).__name__}: {err}"[:200]}
        return row
    again = copy.deepcopy(module) if recovery else None
    if again is not None:
        loss, batches = bed.context.loss, bed.context.training
        assert loss is not None and batches is not None
        train(again, loss, batches, Training(**bed.recovery))
    row["theirs"] = _judged(bed, module, again, share)
    return row


def _judged(bed: Bed, removed: Any, trained: Any, share: float) -> Row:
    row = {"mac_ratio": round(share, 4), "after_removal": round(bed.quality(removed), 4)}
    return row if trained is None else row | {"after_recovery": round(bed.quality(trained), 4)}


def run(
    subject: str, seeds: int, rows: Rows, criteria: Sequence[str] = tuple(CRITERIA), recovery: bool = True
) -> Iterator[Row]:
    """Yield the rows of a subject."""
    everything = tuple(criteria) == tuple(CRITERIA) and recovery
    what = "" if everything else f", {','.join(criteria)}" + ("" if recovery else ", no recovery")
    for seed in range(seeds):

        def unit(seed: int = seed) -> list[Row]:
            bed = SUBJECTS[subject](seed)
            return [measured(bed, criterion, scope, seed, recovery) for criterion in criteria for scope in SCOPES]

        for row in rows.unit(f"{subject}, peer", f"seed {seed}{what}", unit):
            yield {"subject": subject, **row}


def summary(rows: Sequence[Row]) -> list[list[str]]:
    """Return the lines of a table: MACs, and accuracy in % after removal and after recovery, theirs and ours, and by how much."""
    lines = []
    for criterion in CRITERIA:
        for scope in SCOPES:
            found = [row for row in rows if (row["criterion"], row["scope"]) == (criterion, scope)]
            if not found:
                continue
            line = [criterion, scope]
            for column, scale in (("mac_ratio", 1), ("after_removal", 100), ("after_recovery", 100)):
                for who in ("theirs", "ours"):
                    values = [scale * row[who][column] for row in found if column in row[who]]
                    raised = all("raises" in row[who] for row in found)
                    line.append("raises" if raised else _spread(values, 2 if scale == 1 else 1))
            lines.append([*line, _difference(found)])
    return lines


def _difference(rows: Sequence[Row]) -> str:
    pairs = [
        100 * (r["ours"]["after_removal"] - r["theirs"]["after_removal"]) for r in rows if "raises" not in r["theirs"]
    ]
    if len(pairs) < 2:
        return ""
    return f"{statistics.mean(pairs):+.1f} ± {statistics.stdev(pairs) / len(pairs) ** 0.5:.1f}"


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="graphwright bench pruners", description=__doc__)
    parser.add_argument("--subjects", default="resnet,crepe", help="of resnet, crepe")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--criteria", default=",".join(CRITERIA), help=f"of {', '.join(CRITERIA)}")
    parser.add_argument("--no-recovery", action="store_true", help="judge right after the removal only")
    parser.add_argument("--out", type=Path, help="file of rows; a run that was stopped goes on from it")
    parser.add_argument("--json", action="store_true", help="one object a row instead of tables")
    options = parser.parse_args(argv)
    subjects, criteria = options.subjects.split(","), options.criteria.split(",")
    for what, chosen, known in (("subject", subjects, ["resnet", "crepe"]), ("criterion", criteria, list(CRITERIA))):
        if unknown := set(chosen) - set(known):
            parser.error(f"there is no {what} {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    torch.set_num_threads(1)
    store = Rows(options.out, machine())
    for subject in subjects:
        found = []
        try:
            for row in run(subject, options.seeds, store, criteria, not options.no_recovery):
                found.append(row)
                if options.json:
                    print(json.dumps(row), flush=True)
        except LoadError as err:
            progress(f"{subject}: left out: {err}")
        if found and not options.json:
            pairs = [f"{what}: {who}" for what in ("MACs", "removed", "recovered") for who in ("theirs", "ours")]
            render.print_table(
                f"{subject}, a quarter of the channels", ["criterion", "scope", *pairs, "ours - theirs"], summary(found)
            )
    return 0
