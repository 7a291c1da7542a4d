"""The tables of a whole model's temporal projections: filled before sampling, and their weights moved aside."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from qvd_core.errors import QVDError
from qvd_core.families import find_family
from qvd_core.temporal_fit import embed_timesteps
from qvd_core.temporal_layer import TemporalLinear

BATCH_SIZES = (1, 2)  # with and without a second guidance branch: kernels may round an embedding differently


@torch.no_grad()
def precompute_tables(model: nn.Module, timesteps: Sequence[float]) -> int:
    """Fill the table of every temporal projection for the sampler's timesteps; how many rows that added, in all. [O]

    timesteps: as the sampler hands them to the model (`scheduler.timesteps.tolist()`). More of them than the default
    size of a table make it larger, until it is emptied: by a cast, a move or new weights. Call this where and in the
    type in which the model will sample. It saves the first request what later ones are spared anyway; a timestep that
    is not among them is computed when it comes.

    Raises QVDError where nothing can be computed beforehand: no quantized projection with temporal="table", or an
    embedding that also holds text, fps or guidance (such a table fills itself during the first request).
    """
    layers = _table_layers(model)
    if not all(torch.isfinite(torch.tensor(float(timestep), device="cpu")) for timestep in timesteps):
        raise QVDError("timesteps hold NaN or infinity: pass the scheduler's own, after set_timesteps.")
    family = find_family(model)
    if family is None or not family.temporal_features:
        raise QVDError(
            f"the temporal features of this {type(model).__name__} are not known beforehand, or also depend on the "
            "prompt, fps or guidance: its table fills itself during the first request, no call is needed."
        )
    added = 0
    for layer in layers:
        layer.table.capacity = max(layer.table.capacity, len(BATCH_SIZES) * len(timesteps))
    for timestep in timesteps:
        for batch in BATCH_SIZES:
            features = embed_timesteps(
                model, family, torch.full((batch,), float(timestep), device="cpu"), layers[0].compute_dtype
            )
            added += sum(layer.remember(features) for layer in layers)
    return added


@torch.no_grad()
def offload_projections(model: nn.Module, device: torch.device | str = "cpu") -> int:
    """Move the weights of the temporal projections that have a table to `device`; how many bytes that moved. [O]

    int8 weight and scales go; the table stays where the model samples, and so do bias and codebook, which every look-up
    needs (a few kB). A row that is not in the table gets its layer's weights sent back for one product, with the same
    bits as without offloading, so that new prompts and schedulers cost time and never a different result.

    Weights are moved, never dropped: a model without them could neither be saved nor meet a new timestep.
    `model.to(...)` brings them back (and empties the tables); saving and loading work as before. The weights are
    worth moving once the table is filled, by `precompute_tables` or by a first request.

    Raises QVDError where there is no table, or `device` holds no data.
    """
    target = torch.device(device)
    if target.type == "meta":
        raise QVDError('the device "meta" holds no data: the weights would be lost, choose "cpu".')
    moved = 0
    for layer in _table_layers(model):
        if layer.weight.device != target:
            layer.weight = nn.Parameter(layer.weight.to(target), requires_grad=False)
            layer.weight_scale = layer.weight_scale.to(target)
            moved += layer.weight.nbytes + layer.weight_scale.nbytes
    return moved


def _table_layers(model: nn.Module) -> list[TemporalLinear]:
    layers = [module for module in model.modules() if isinstance(module, TemporalLinear)]
    layers = [layer for layer in layers if layer.spec.temporal == "table"]
    if not layers:
        raise QVDError(
            f'{type(model).__name__} has no temporal table: quantize it with temporal="table" first '
            "(in a pipeline, pass its denoiser)."
        )
    return layers
