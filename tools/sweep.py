"""Coverage sweep: every architecture of the zoo, every coupling group, a random half removed, against the mask oracle.

    python -m graphwright.tools.sweep [NAME ...] [--family F] [--singles N] [--json FILE]

Per model: groups, how many removals were exact or renormalised as labelled, axes frozen by reason, how many had no effect
(inert), were wrong or raised, and CPU seconds; and where the groups are not those of the inventory that was written from
the model's configuration.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..frontends.capture import capture
from ..graph.compare import magnitude, relative_difference, tolerance_for
from ..graph.depgraph import DepGraph, depgraph
from ..graph.errors import first_line
from ..graph.groups import CouplingGroup
from ..graph.oracle import masked_outputs, masked_parameters
from ..graph.program import Program
from ..graph.resize import RemovalRecord, reconcile, resize
from .zoo import ZOO
from .zoo.entry import Case, Entry
from .zoo.inventory import INVENTORY, unexplained

# An oracle whose outputs are all smaller than this would accept anything.
NEAR_ZERO = 1e-8


@dataclass
class Row:
    """What the sweep found for one model."""

    name: str
    family: str
    groups: int = 0
    exact: int = 0
    renormalised: int = 0
    inert: int = 0
    wrong: list[str] = field(default_factory=list)
    raised: list[str] = field(default_factory=list)
    frozen: dict[str, int] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    inventory: list[str] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)
    worst: float = 0.0
    seconds: float = 0.0
    skipped: str = ""


def sweep_entry(entry: Entry, seed: int = 0, singles: int | None = None) -> Row:
    """Build one model, capture it in float64, and judge every group of it and all groups together.

    Args:
        entry: Of the zoo.
        seed: Of the choice of indices.
        singles: At most so many groups, evenly spread, are judged one by one; None for all. All groups together always are:
            the time that a group takes grows with the number of layers, and deep networks have hundreds of groups.

    Returns:
        What was found.
    """
    row = Row(entry.name, entry.family)
    missing = [p for p in entry.requires if find_spec(p) is None]
    if missing:
        row.skipped = f"needs {', '.join(missing)}"
        return row
    start = time.process_time()
    try:
        case = in_float64(entry.build()) if entry.float64 else entry.build()
        program = capture(case.model, case.args, case.kwargs, case.dynamic)
        graph = depgraph(program)
        groups = graph.groups
    except Exception as err:  # the sweep reports every failure of every model and goes on
        row.raised.append(f"capture: {short(err)}")
        row.seconds = time.process_time() - start
        return row
    row.groups = len(groups)
    row.frozen = dict(Counter(f.reason for f in graph.frozen))
    row.unknown = list(graph.unknown)
    row.inventory = unexplained(entry.name, graph)
    row.kinds = dict(Counter(f"{g.kind} {g.size}" for g in groups))
    generator = torch.Generator().manual_seed(seed)
    whole = outputs_of(program, case)
    for group in spread(groups, singles):
        judge(row, case, graph, {group.name: random_keep(group, generator)}, [group], whole)
    if len(groups) > 1:
        judge(row, case, graph, {g.name: random_keep(g, generator) for g in groups}, list(groups), whole)
    row.seconds = time.process_time() - start
    return row


def spread(groups: Sequence[CouplingGroup], count: int | None) -> list[CouplingGroup]:
    """Return at most ``count`` groups, evenly spread over the model; all without a count."""
    if count is None or count >= len(groups):
        return list(groups)
    return [groups[(2 * i + 1) * len(groups) // (2 * count)] for i in range(count)]


def in_float64(case: Case) -> Case:
    """Return the case with weights and inputs in float64, so that rounding cannot hide or fake a wrong index."""

    def double(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    args, kwargs = pytree.tree_map(double, (case.args, case.kwargs))
    return Case(case.model.double().eval(), args, kwargs, case.dynamic, None)


def random_keep(group: CouplingGroup, generator: torch.Generator) -> list[int]:
    """Return a random legal half of a group's indices."""
    keep = group.legal_keep(max(1, group.size // 2))
    return sorted(torch.randperm(group.size, generator=generator)[:keep].tolist())


def judge(
    row: Row, case: Case, graph: DepGraph, keep: dict[str, list[int]], groups: list[CouplingGroup], whole: list[Tensor]
) -> None:
    """Remove, run, and compare with the oracle; record the outcome in ``row``. ``whole`` is the output before."""
    name = groups[0].name if len(groups) == 1 else f"all {len(groups)} groups"
    keep = reconcile(graph, keep)[0]
    groups = [g for g in groups if g.name in keep]
    if all(len(keep[g.name]) == g.size for g in groups):
        row.frozen["no legal removal (group norm)"] = row.frozen.get("no legal removal (group norm)", 0) + 1
        return
    try:
        smaller = graph.program.copy()
        record = resize(smaller, keep)
        got = outputs_of(smaller, case)
        exact = all(g.exact for g in groups)
        want = masked_eager(case.model, record, case) if exact else None
        if want is None or not all(bool(torch.isfinite(w).all()) for w in want):
            # Zero-masking divides by zero in a normalised weight; the oracle on the graph leaves masked indices out.
            want = floats(masked_outputs(graph, keep, graph.program.flatten(*case.args, **case.kwargs)))
        error = difference(got, want)
    except Exception as err:  # the sweep reports every failure of every model and goes on
        row.raised.append(f"{name}: {short(err)}")
        return
    row.worst = max(row.worst, error)
    if not error <= tolerance(graph.program):
        row.wrong.append(f"{name}: {error:.2e}")
    elif exact:
        row.exact += 1
    else:
        row.renormalised += 1
    if difference(got, whole) == 0:
        row.inert += 1


def tolerance(program: Program) -> float:
    """Return the bound: looser where the model itself computes in float32."""
    single = any(isinstance(n.meta.get("val"), Tensor) and n.meta["val"].dtype is torch.float32 for n in program.nodes)
    return tolerance_for(torch.float32 if single else torch.float64, "masking")


def outputs_of(program: Program, case: Case) -> list[Tensor]:
    """Run and return the floating-point outputs."""
    with torch.no_grad():
        return floats(flat(program(*case.args, **case.kwargs)))


def masked_eager(model: nn.Module, record: RemovalRecord, case: Case) -> list[Tensor]:
    """Run the original module, untouched by any of our machinery, with the removed parameters set to zero."""
    masked = masked_parameters(model, record)
    with torch.no_grad():
        return floats(flat(torch.func.functional_call(model, masked, case.args, case.kwargs)))


def flat(value: Any) -> list[Any]:
    """Return the leaves of a model's output."""
    return pytree.tree_leaves(value)


def floats(leaves: Iterable[Any]) -> list[Tensor]:
    """Return the floating-point tensors among the leaves."""
    return [v for v in leaves if isinstance(v, Tensor) and (v.is_floating_point() or v.is_complex())]


def difference(got: list[Tensor], want: list[Tensor]) -> float:
    """Return the largest relative difference of any output; infinite if not comparable, not finite or near zero."""
    if len(got) != len(want) or not got:
        return float("inf")
    if not all(bool(tensor.isfinite().all()) for tensor in got):
        return float("inf")
    if any(b.numel() and magnitude(b) < NEAR_ZERO for b in want):
        return float("inf")
    return max(relative_difference(got, want))


def short(err: BaseException) -> str:
    """Return class, first line and place of an error."""
    frame = traceback.extract_tb(err.__traceback__)[-1]
    return f"{type(err).__name__}: {first_line(err) if str(err) else ''} ({frame.name}:{frame.lineno})"[:240]


def select(names: Sequence[str], families: Sequence[str] | None) -> list[Entry]:
    """Return the zoo's entries of these families whose names start with one of ``names``; all without."""
    return [
        e
        for e in ZOO.values()
        if (not names or any(e.name.startswith(n) for n in names)) and (not families or e.family in families)
    ]


def table(rows: list[Row]) -> str:
    """Return the rows as text, with totals."""
    heads = ("groups", "exact", "renorm", "inert", "wrong", "raised", "sec")
    lines = [f"{'model':40} " + " ".join(f"{h:>6}" for h in heads) + "  frozen"]
    for r in rows:
        if r.skipped:
            lines.append(f"{r.name:40} skipped: {r.skipped}")
            continue
        top = ", ".join(f"{n} {reason}" for reason, n in sorted(r.frozen.items(), key=lambda kv: -kv[1])[:4])
        counts = (r.groups, r.exact, r.renormalised, r.inert, len(r.wrong), len(r.raised))
        lines.append(f"{r.name:40} " + " ".join(f"{c:6}" for c in counts) + f" {r.seconds:6.1f}  {top}")
        lines += [f"    WRONG {w}" for w in r.wrong] + [f"    RAISED {w}" for w in r.raised]
        lines += [f"    no rule: {u}" for u in r.unknown] + [f"    INVENTORY {i}" for i in r.inventory]
    done = [r for r in rows if not r.skipped]
    lines.append(
        f"{len(done)} models, {len(rows) - len(done)} skipped: {sum(r.groups for r in done)} groups, "
        f"{sum(r.exact for r in done)} exact, {sum(r.renormalised for r in done)} renormalised, "
        f"{sum(len(r.wrong) for r in done)} wrong, {sum(len(r.raised) for r in done)} raised, "
        f"{sum(r.name in INVENTORY for r in done)} inventories with {sum(len(r.inventory) for r in done)} unexplained, "
        f"{sum(r.seconds for r in done):.0f} CPU seconds"
    )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the sweep; exit status 1 if anything was wrong or raised, or differs from its inventory without a reason."""
    parser = argparse.ArgumentParser(prog="graphwright.tools.sweep", description=__doc__)
    parser.add_argument("names", nargs="*", help="entries, or prefixes of entries; all without")
    parser.add_argument("--family", action="append", help="only entries of this family")
    parser.add_argument("--singles", type=int, help="groups of a model that are judged one by one; all without")
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    chosen = select(options.names, options.family)
    rows = []
    for i, entry in enumerate(chosen):
        rows.append(sweep_entry(entry, options.seed, options.singles))
        print(f"[{i + 1}/{len(chosen)}] {table(rows[-1:]).splitlines()[1]}", file=sys.stderr, flush=True)
        for line in table(rows[-1:]).splitlines()[2:-1]:
            print(line, file=sys.stderr, flush=True)
    print(table(rows))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump([asdict(r) for r in rows], file, indent=1)
    return 1 if any(r.wrong or r.raised or r.inventory for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
