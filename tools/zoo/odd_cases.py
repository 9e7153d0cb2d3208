"""The edge cases of structural pruning as small modules, named by what a gradient-graph pruner does with them.

``works/``: it prunes correctly. ``wrong/``: it runs and the result differs from the masked model, or leaves the block
as it was. ``raises/``: it stops, while pruning or at the next call. ``hangs/``: it does not terminate. For this
library all of them have to be right, or be refused with a reason where no exact equivalent exists.
"""

from __future__ import annotations

from . import odd_raises, odd_works, odd_wrong
from .entry import Entry
from .odd_base import odd
from .timm_models import image_case
from .transformers_models import llama
from .transformers_vision import sam_encoder

TIMM = ("rexnet_100", "ecaresnet26t", "gcresnext26ts", "resnest14d", "focalnet_tiny_srf", "visformer_tiny")

ENTRIES: list[Entry] = [
    *odd_works.ENTRIES,
    *odd_wrong.ENTRIES,
    *odd_raises.ENTRIES,
    odd(
        "hangs/llama_one_layer",
        llama(2, 4, num_hidden_layers=1),
        requires=("transformers",),
        note="rotary slice and concat with repeated keys form a cycle",
    ),
    odd("hangs/sam_encoder", sam_encoder(), requires=("transformers",)),
    odd("hangs/sam_encoder_no_relative", sam_encoder(use_rel_pos=False), requires=("transformers",)),
    *[odd(f"hangs/{name}", lambda name=name: image_case(name), requires=("timm", "torchvision")) for name in TIMM],
]
