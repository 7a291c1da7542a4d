"""The figures of one row beyond those of `examples.moving_digits.evaluate.Judge`."""

from __future__ import annotations

import math
from dataclasses import asdict

import torch
from torch import Tensor, nn

from benchmarks.subjects import Subject
from examples.moving_digits.evaluate import Judge
from qvd_core.quality import cosine
from qvd_core.scales import Scales
from qvd_core.temporal_fit import stack_features
from qvd_core.temporal_metrics import td_correlation, td_ratio


def figures_of(
    judge: Judge, subject: Subject, video: Tensor, model: nn.Module, scales: Scales | None
) -> dict[str, float | None]:
    """Every figure of one row: clips [N, 3, T, H, W] in [0, 1] made by the denoiser `model` with `scales`."""
    judged = asdict(judge.row("", video))
    del judged["model"]
    return {
        **judged,
        "cosine": centred_cosine(video, judge.reference),
        **temporal_figures(subject, model),
        "col": _collisions(scales),
        "kilobytes": denoiser_bytes(model) / 1e3,
    }


def centred_cosine(video: Tensor, reference: Tensor) -> float:
    """Mean over clips of the cosine to the reference clip, both [N, C, T, H, W], less the mean reference clip.

    What all clips share, here the dark background, would otherwise make every cosine nearly 1.
    """
    middle = reference.double().mean(dim=0)
    pairs = zip(video.double() - middle, reference.double() - middle, strict=True)
    return sum(cosine(a, b) for a, b in pairs) / len(reference)


@torch.no_grad()
def temporal_figures(subject: Subject, model: nn.Module) -> dict[str, float | None]:
    """TDR and TDC of what the temporal projections of `model` put out over the sampler's steps (METHOD section 2).

    Measured on the outputs, not on the codes, so that every quantizer can be compared, whoever made it.
    """
    observation = subject.observation()
    before, after = [], []
    for name, observer in observation.features.items():
        features = stack_features(observer.features)
        quantized = model.get_submodule(name)
        before.append(observation.layers[name](features))
        after.append(torch.cat([_plain(quantized(row)) for row in features.unsqueeze(1)]))
    if not before:
        return {"tdr": None, "tdc": None}
    full, quantized_outputs = torch.cat(before, dim=1), torch.cat(after, dim=1).float()
    ratio = td_ratio(full, quantized_outputs)
    return {"tdr": ratio if math.isfinite(ratio) else None, "tdc": td_correlation(full, quantized_outputs)}


def _collisions(scales: Scales | None) -> float | None:
    """COL of the calibrated codebooks, the mean over the projections; None where there are none."""
    if scales is None or not scales.temporal:
        return None
    values = [scales.report[name]["col"] for name in scales.temporal]
    return sum(values) / len(values)


def denoiser_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers as they are stored, also inside other projects' tensor classes."""
    return sum(_bytes(tensor) for tensor in (*model.parameters(), *model.buffers()))


def _bytes(tensor: Tensor) -> int:
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None or type(tensor) is nn.Parameter:
        return tensor.numel() * tensor.element_size()
    names, _ = flatten()
    return sum(_bytes(getattr(tensor, name)) for name in names)


def _plain(output: Tensor) -> Tensor:
    """An ordinary tensor of an output that another project's tensor class may hold."""
    dequantize = getattr(output, "dequantize", None)
    return dequantize() if type(output) is not Tensor and dequantize is not None else output
