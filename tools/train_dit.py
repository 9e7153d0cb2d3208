"""Train ``builtin:digits-dit``, the class-conditional transformer; `train_digits` is its command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..frontends.builtin.digits import DigitClassifier, digits_images, digits_labels
from .digits import digits_features
from .digits_labels import NULL_LABEL, label_agreement, labelled_denoiser, labelled_loss, sample_labelled_digits
from .frechet import frechet_distance
from .training import Record, Settings, fit_denoiser

if TYPE_CHECKING:
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

DIT: dict[str, Any] = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 6,
    "num_attention_heads": 5,
    "attention_head_dim": 16,
    "dropout": 0.1,
    # The classes. Each block has a table of its own of that many rows, and one more for the null class.
    "num_embeds_ada_norm": NULL_LABEL,
}

# Peak learning rate.
RATE = 2.5e-3

LABEL_DROPOUT = 0.1

# At which classifier-free guidance samples are judged; 1 is none.
GUIDANCE = (1.0, 2.0)


def train_dit(settings: Settings) -> tuple[DiTTransformer2DModel, Record]:
    """Train the noise predictor on the train split and its labels.

    Args:
        settings: Its seed is also that of the dropped labels.

    Returns:
        The averaged model in eval mode, and what to record about its training.
    """
    labels, _ = digits_labels()

    def predict(
        model: nn.Module, sample: Tensor, timestep: Tensor, chosen: Tensor, generator: torch.Generator
    ) -> Tensor:
        dropped = torch.rand(len(chosen), generator=generator) < LABEL_DROPOUT
        asked = torch.where(dropped, NULL_LABEL, labels[chosen])
        return model(sample, timestep, asked, return_dict=False)[0]

    model, record = fit_denoiser(_untrained, predict, _losses, settings)
    return model, {**record, "label_dropout": LABEL_DROPOUT}


def _untrained() -> DiTTransformer2DModel:
    """Return the model as the paper starts it: every block is the identity, and the prediction zero."""
    from diffusers.models.embeddings import LabelEmbedding
    from diffusers.models.normalization import AdaLayerNormZero
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    model = DiTTransformer2DModel(**DIT)
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            # Blocks would draw which labels they drop one by one, and hardly a digit would lose its label in all.
            module.dropout_prob = 0.0
            nn.init.normal_(module.embedding_table.weight, std=0.02)
        if isinstance(module, AdaLayerNormZero):
            nn.init.zeros_(module.linear.weight)
            nn.init.zeros_(module.linear.bias)
    for layer in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


@torch.no_grad()
def _losses(averaged: nn.Module) -> str:
    losses = []
    for images, labels in zip(digits_images(), digits_labels(), strict=True):
        losses.append(labelled_loss(averaged, images[:360], labels[:360], seed=1).item())
    return "train {:.4f} held-out {:.4f}".format(*losses)


def judge_dit(model: nn.Module, classifier: DigitClassifier) -> Record:
    """Measure a class-conditional denoiser.

    Args:
        model: The denoiser, in eval mode.
        classifier: Whose features are compared, and who says which digit a picture shows; in eval mode.

    Returns:
        The loss on held-out digits with their labels and with none, and for each guidance the Frechet distances of
        256 and of 1024 sampled digits, as many of each class, to all real digits, and the share of those 1024 that
        the classifier takes for what was asked.
    """
    images, held_out = digits_images()
    _, labels = digits_labels()
    everything = digits_features(torch.cat([images, held_out]), classifier)
    distances, agreement = {}, {}
    for guidance in GUIDANCE:
        for count, seed in ((256, 0), (1024, 1)):
            asked = torch.arange(count) % NULL_LABEL
            drawn = sample_labelled_digits(labelled_denoiser(model), asked, steps=50, guidance=guidance, seed=seed)
            key = f"generated_{count}_guidance_{guidance:g}"
            distances[key] = round(frechet_distance(digits_features(drawn, classifier), everything), 4)
            agreement[key] = round(label_agreement(drawn, asked, classifier), 4)
    none = torch.full_like(labels, NULL_LABEL)
    return {
        "held_out_loss": round(_mean_loss(model, held_out, labels), 5),
        "held_out_loss_without_labels": round(_mean_loss(model, held_out, none), 5),
        "frechet_distance": distances,
        "label_agreement": agreement,
    }


@torch.no_grad()
def _mean_loss(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return sum(labelled_loss(model, images, labels, seed=seed).item() for seed in range(8)) / 8
