"""A Llama of 70 billion parameters without its weights: groups, a removal plan, and the counts in closed form."""

from __future__ import annotations

import resource
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from ...frontends.capture import capture
from ...graph.cost import parameter_count
from ...graph.depgraph import depgraph
from ...graph.groups import CouplingGroup
from ...passes.base import Context
from ...passes.remove_channels import RemoveChannels
from .timing import Stopwatch

# 20 % of every width; and the same with a quarter of everything that attention is made of.
PLANS: dict[str, dict[str, float]] = {
    "widths": {"ratio": 0.2},
    "widths and attention": {"ratio": 0.2, "head_ratio": 0.25, "head_group_ratio": 0.25, "head_dim_ratio": 0.25},
}


@dataclass(frozen=True)
class Llama:
    """A Llama in the numbers that its parameter count follows from; the defaults are those of 70 billion parameters.

    Attributes:
        layers: Decoder layers.
        hidden: Width of the residual stream.
        intermediate: Width of the feed-forward layers.
        kv_heads: Key and value heads.
        group: Query heads per key and value head.
        qk_dim: Dimensions of a query or key, in two rotary halves.
        v_dim: Dimensions of a value.
        vocabulary: Tokens; the output layer has weights of its own.
    """

    layers: int = 80
    hidden: int = 8192
    intermediate: int = 28_672
    kv_heads: int = 8
    group: int = 8
    qk_dim: int = 128
    v_dim: int = 128
    vocabulary: int = 128_256

    def parameters(self) -> int:
        """Count in closed form: embedding and output, and per layer attention, feed-forward and two norms."""
        queries, keys = self.kv_heads * self.group * self.qk_dim, self.kv_heads * self.qk_dim
        values, mixed = self.kv_heads * self.v_dim, self.kv_heads * self.group * self.v_dim
        layer = self.hidden * (queries + keys + values + mixed + 3 * self.intermediate + 2)
        return 2 * self.vocabulary * self.hidden + self.layers * layer + self.hidden

    def groups(self) -> dict[tuple[str, int], int]:
        """Return how many coupling groups there are of each kind and size.

        The residual stream is one; so are the rotary pairs of queries and keys, since all layers read one table.
        """
        counts: Counter[tuple[str, int]] = Counter()
        counts["hidden", self.hidden] += 1
        counts["head dim", self.qk_dim // 2] += 1
        for kind, size in (
            ("hidden", self.intermediate),
            ("head", self.kv_heads),
            ("head group", self.group),
            ("value dim", self.v_dim),
        ):
            counts[kind, size] += self.layers
        return dict(counts)

    def without(
        self, ratio: float, head_ratio: float = 0, head_group_ratio: float = 0, head_dim_ratio: float = 0
    ) -> Llama:
        """Return what a removal leaves: every width to the nearest whole number."""
        return replace(
            self,
            hidden=_kept(self.hidden, ratio),
            intermediate=_kept(self.intermediate, ratio),
            kv_heads=_kept(self.kv_heads, head_ratio),
            group=_kept(self.group, head_group_ratio),
            qk_dim=2 * _kept(self.qk_dim // 2, head_dim_ratio),
            v_dim=_kept(self.v_dim, head_dim_ratio),
        )

    def build(self) -> nn.Module:
        """Return the transformers model on the meta device."""
        from transformers import LlamaConfig, LlamaForCausalLM

        assert self.qk_dim == self.v_dim
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.kv_heads * self.group,
            num_key_value_heads=self.kv_heads,
            head_dim=self.qk_dim,
            tie_word_embeddings=False,
        )
        with torch.device("meta"):
            return LlamaForCausalLM(config).eval()


def _kept(width: int, ratio: float) -> int:
    return round(width * (1 - ratio))


def plan(llama: Llama, plans: Mapping[str, Mapping[str, float]] | None = None, tokens: int = 4) -> dict[str, Any]:
    """Capture and analyse a Llama that has no weights, and shrink a copy of it by each of ``plans``.

    Returns:
        ``config``; CPU seconds of ``capture`` and ``analysis``; ``nodes``; ``groups``, each ``[kind, size, count]``;
        ``parameters`` as the program holds them and by ``formula``; for each plan CPU seconds of the ``removal``, and
        ``parameters`` and ``formula`` after it; ``peak_gb``, the process's peak of resident memory so far.
    """
    model = llama.build()
    watch = Stopwatch()
    program = capture(model, (), {"input_ids": torch.zeros(1, tokens, dtype=torch.long), "use_cache": False}, {})
    watch.lap("capture")
    groups = depgraph(program).groups
    watch.lap("analysis")
    out: dict[str, Any] = {
        "config": asdict(llama),
        **watch.parts,
        "nodes": len(program.graph_module.graph.nodes),
        "groups": _counted(groups),
        "parameters": parameter_count(program.module()),
        "formula": llama.parameters(),
        "plans": {},
    }
    for name, ratios in (PLANS if plans is None else plans).items():
        work, watch = program.copy(), Stopwatch()
        result = RemoveChannels(criterion="random", **ratios)(work, Context())  # pyright: ignore[reportArgumentType]
        watch.lap("removal")
        assert result.modified
        held, formula = parameter_count(work.module()), llama.without(**ratios).parameters()
        out["plans"][name] = {**watch.parts, "parameters": held, "formula": formula}
    return {**out, "peak_gb": peak_bytes() / 1e9}


def _counted(groups: tuple[CouplingGroup, ...]) -> list[tuple[str, int, int]]:
    return [(kind, size, n) for (kind, size), n in sorted(Counter((g.kind, g.size) for g in groups).items())]


def peak_bytes() -> int:
    """Return the peak of this process's resident memory so far."""
    # Kilobytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
