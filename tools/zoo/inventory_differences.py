"""Where the analysis offers something else than an inventory lists, and why that is right.

A difference without a line here, and a line without a difference, are failures of the sweep.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

Axis = tuple[str, int]


@dataclass(frozen=True)
class Difference:
    """Axes of the inventory that are not offered, axes offered beyond it, and the reason.

    Attributes:
        why: for people.
        missing: axes that the configuration has and the analysis does not offer, with their number.
        extra: the other way round.
        frozen: what `FrozenAxis.reason` of such an axis says; "" where it is tied to another axis, not frozen.
    """

    why: str
    missing: Mapping[Axis, int] = field(default_factory=dict)
    extra: Mapping[Axis, int] = field(default_factory=dict)
    frozen: str = ""


POSITIONS = "values made from positions"
RECURRENT = "one operator runs all layers and directions, and it has one hidden size"
FUSED = "one view of the fused projection as (3, heads, size) gives queries, keys and values the same size"
SINUSOIDS = "frequencies of sines and cosines are computed in the program, not kept in a tensor"


def _lost(why: str, *axes: Axis, frozen: str = "") -> Difference:
    return Difference(why, Counter(axes), frozen=frozen)


def _times(axis: Axis, number: int) -> list[Axis]:
    return [axis] * number


def _torch() -> dict[str, Difference]:
    out = {name: _lost(RECURRENT, ("hidden", 7)) for name in ("lstm_2", "lstm_final", "lstm_bi_1", "gru_2", "rnn_2")}
    out |= {name: _lost(RECURRENT, *_times(("hidden", 7), 3)) for name in ("lstm_bi_2", "gru_bi_2")}
    out["lstm_proj"] = _lost(
        "the cell of an LSTM with a projection must stay wider than it, which no group can promise alone",
        ("hidden", 7),
        frozen="the cell must stay wider than its projection",
    )
    for name, size, times in (
        ("mha", 4, 1),
        ("mha_weights", 4, 1),
        ("mha_mask", 4, 1),
        ("transformer_encoder", 4, 2),
        ("transformer_encoder_pre", 4, 2),
        ("plain_vit", 8, 2),
        ("nano_gpt", 8, 2),
    ):
        out[name] = _lost(FUSED, *_times(("value dim", size), times))
    out["transformer_full"] = _lost(
        f"{FUSED}; the packed weight of the cross-attention reads the encoder's and the decoder's stream by one dimension",
        *_times(("value dim", 4), 3),
        ("hidden", 12),
    )
    out["uvit"] = _lost(
        f"{FUSED}; {SINUSOIDS}",
        *_times(("value dim", 8), 2),
        ("value dim", 6),
        ("hidden", 6),
        frozen=POSITIONS,
    )
    return out


def _transformers() -> dict[str, Difference]:
    by_tensor = "the fused projection is split by an index tensor, whose numbers a removal would have to rewrite"
    slopes = "the slopes of the heads are computed from their number"
    return {
        "falcon": _lost(
            by_tensor, *_times(("head group", 6), 2), *_times(("value dim", 8), 2), frozen="indexed by data"
        ),
        "falcon_grouped": _lost(
            by_tensor, *_times(("head group", 3), 2), *_times(("value dim", 8), 2), frozen="indexed by data"
        ),
        "bloom": _lost(f"{slopes}; {FUSED}", ("head", 6), *_times(("value dim", 8), 2), frozen=POSITIONS),
        "mpt": _lost(slopes, ("head", 6), frozen=POSITIONS),
        **{
            name: _lost(FUSED, *_times(("value dim", 8), 2))
            for name in ("sam", "sam_encoder", "sam_encoder_no_relative")
        },
        "swinv2": Difference(
            "a coordinate of the table that the network of the position biases reads is a dimension like any other",
            extra={("hidden", 2): 4},
        ),
    }


def _diffusers() -> dict[str, Difference]:
    out = {
        name: _lost(SINUSOIDS, ("hidden", 8), frozen=POSITIONS)
        for name in (
            "unet2d",
            "unet2d_scalar_timestep",
            "unet2d_scale_shift",
            "unet_sd15",
            "unet_audioldm2",
            "controlnet",
        )
    }
    sizes = "and the numbers embedded beside the time are joined with it by their dynamic count"
    out["unet_sdxl"] = _lost(f"{SINUSOIDS}, {sizes}", ("hidden", 8), ("hidden", 3), frozen=POSITIONS)
    out["unet_spatio_temporal"] = _lost(
        f"{SINUSOIDS}, {sizes}", *_times(("hidden", 32), 4), ("hidden", 3), ("hidden", 48), frozen=POSITIONS
    )
    out["dit"] = _lost(SINUSOIDS, *_times(("hidden", 128), 2), frozen=POSITIONS)
    out |= {name: _lost(SINUSOIDS, ("hidden", 128), frozen=POSITIONS) for name in ("pixart", "sd3", "sd35")}
    out["flux"] = _lost(
        f"{SINUSOIDS}; rotary tables are computed for three axes of positions, which makes their sizes fixed",
        ("hidden", 128),
        ("head dim", 2),
        frozen=POSITIONS,
    )
    return out


def _odd() -> dict[str, Difference]:
    out = {
        name: _lost(FUSED, ("value dim", 4))
        for name in (
            "works/attention_unbind",
            "works/attention_module",
            "wrong/attention_module",
            "wrong/attention_module_8_2",
            "raises/fused_qkv_index",
        )
    }
    out |= {
        name: _lost(FUSED, *_times(("value dim", 8), 2))
        for name in ("hangs/sam_encoder", "hangs/sam_encoder_no_relative")
    }
    out |= {
        name: _lost(RECURRENT, ("hidden", 7))
        for name in ("raises/lstm_bidirectional", "raises/gru_bidirectional", "raises/rnn_bidirectional")
    }
    pairs = "even and odd channels are read apart, so a channel leaves with its neighbour"
    out |= {name: _lost(pairs, ("channel", 5)) for name in ("raises/strided_slice", "raises/strided_slices_both")}
    out["wrong/flip"] = _lost("no smaller module equals it", ("channel", 7), frozen="its order is reversed")
    out["wrong/roll"] = _lost("no smaller module equals it", ("channel", 7), frozen="its positions are rolled")
    out["wrong/spatial_attention"] = _lost(
        "a maximum over the channels cannot leave one out",
        ("channel", 8),
        frozen="an extremum, order or product is taken over it",
    )
    out["works/learned_queries"] = Difference(
        "queries that are parameters look like a weight, so their product with the keys is no attention's",
        {("head dim", 8): 1},
        {("hidden", 8): 1},
    )
    out["raises/repeat_interleave"] = Difference(
        "the two copies of every channel have weights of their own behind them: one copy can go",
        extra={("channel", 2): 1},
    )
    return out


DIFFERENCES: dict[str, Difference] = {**_torch(), **_transformers(), **_diffusers(), **_odd()}
