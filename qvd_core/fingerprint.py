"""Fingerprints: does a scales file belong to this model?

Two of them, because a model may be checked before its weights are read: the structure (names and shapes of the linear
and convolution layers), and a probe of each layer's weight that survives a cast to 16 bits and a merged LoRA, but
not the weights of another model.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PROBE_SIZE = 64
# Unrelated weights have a cosine of 0 +- 0.125 on 64 elements; rounding to bf16 leaves 0.99999, a LoRA about 0.99.
PROBE_COSINE = 0.97


def structure_fingerprint(model: nn.Module) -> str:
    """Hash of the class name and of every linear / 2-D convolution layer's name and weight shape; works on meta."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            digest.update(f"|{name}:{tuple(module.weight.shape)}".encode())
    return digest.hexdigest()[:32]


def weight_probe(weight: Tensor) -> Tensor:
    """float32 [<= 64] elements spread evenly over a weight of any shape."""
    flat = weight.detach().reshape(-1)
    size = min(PROBE_SIZE, flat.numel())
    # Not a whole stride: that could fall on one column of the weight again and again.
    index = torch.linspace(0, flat.numel() - 1, size, dtype=torch.float64).long()
    return flat[index.to(flat.device)].float().cpu()


def probe_agrees(probe: Tensor, weight: Tensor) -> bool:
    """Whether `weight` is, up to rounding and small edits, the weight that `probe` was taken from."""
    found = weight_probe(weight)
    if found.shape != probe.shape:
        return False
    if not probe.any() or not found.any():
        return not probe.any() and not found.any()
    return float(F.cosine_similarity(found, probe, dim=0)) >= PROBE_COSINE


def content_fingerprint(model: nn.Module) -> str:
    """Hash of the structure and of exact samples of every parameter: the key of the scale cache."""
    digest = hashlib.sha256(structure_fingerprint(model).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"|{name}:{parameter.dtype}:{tuple(parameter.shape)}".encode())
        digest.update(weight_probe(parameter).numpy().tobytes())
        digest.update(f"={_sum_of_bits(parameter)}".encode())
    return digest.hexdigest()[:32]


def _sum_of_bits(tensor: Tensor) -> int:
    """The sum of a tensor's memory as integers: unlike a float sum the same in any order, on any device."""
    flat = tensor.detach().reshape(-1)
    return int(flat.view(torch.uint8 if flat.element_size() == 1 else torch.int16).sum(dtype=torch.int64))
