"""How far two videos, two tensors or two sets of features are apart.

Videos are [B, C, T, H, W] with values in [0, data_range]; every result is computed in float64, one clip at a time,
so the memory needed is that of one clip.

    psnr(a, b)                  # [B], dB; infinite for equal clips
    ssim(a, b)                  # [B], 1 for equal clips
    sqnr_db(reference, test)    # dB: the energy of the signal over the energy of the error
    cosine(a, b)
    frechet_distance(features_a, features_b)    # [N, D] and [M, D]
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

SSIM_WINDOW = 11  # pixels; with SSIM_SIGMA, SSIM_K1 and SSIM_K2 the values of Wang et al. (2004)
SSIM_SIGMA = 1.5
SSIM_K1 = 0.01
SSIM_K2 = 0.03
LARGEST_DECIBELS = 150.0


def psnr(a: Tensor, b: Tensor, data_range: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio of each clip in dB: videos [B, C, T, H, W] -> float64 [B]."""
    _check_videos(a, b, data_range)
    error = torch.stack([(x.double() - y.double()).square().mean() for x, y in zip(a, b, strict=True)])
    return 10.0 * torch.log10(data_range**2 / error)


def ssim(a: Tensor, b: Tensor, data_range: float = 1.0) -> Tensor:
    """Structural similarity of each clip, averaged over frames and channels: videos [B, C, T, H, W] -> float64 [B].

    The Gaussian window visits only places where it lies wholly inside the frame, as in the original definition.
    """
    _check_videos(a, b, data_range)
    if min(a.shape[3:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs frames of at least {SSIM_WINDOW}x{SSIM_WINDOW} pixels, got {list(a.shape[3:])}")
    return torch.stack([_ssim_of_clip(x.double(), y.double(), data_range) for x, y in zip(a, b, strict=True)])


def sqnr_db(reference: Tensor, test: Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB, 10 log10(sum reference^2 / sum (reference - test)^2), of any shape.

    Infinite when the two are equal, minus infinity when only the reference is all zeros.
    """
    _check_pair(reference, test)
    signal = float(reference.double().square().sum())
    noise = float((reference.double() - test.double()).square().sum())
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0.0 else -math.inf


def bounded_decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise) of two energies, within +-150 dB; -150 where the noise is not finite.

    For figures that are ranked and stored: neither an exact output nor an overflow makes them infinite or NaN.
    """
    if not math.isfinite(noise):
        return -LARGEST_DECIBELS
    decibels = 10.0 * math.log10((signal + 1e-30) / (noise + 1e-30))
    return max(-LARGEST_DECIBELS, min(decibels, LARGEST_DECIBELS))


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of the angle between two tensors of the same shape, seen as vectors; an all-zero one has no angle."""
    _check_pair(a, b)
    x, y = a.double().flatten(), b.double().flatten()
    length = float(x.norm()) * float(y.norm())
    if length == 0.0:
        raise ValueError("the cosine of an all-zero tensor is undefined")
    return min(1.0, max(-1.0, float(x @ y) / length))


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features [N, D] and [M, D].

    |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^1/2), the squared 2-Wasserstein distance.
    It is biased upwards by about 1 / N: compare distances at equal sample counts only.
    """
    for name, features in (("first", features_a), ("second", features_b)):
        if features.ndim != 2:
            raise ValueError(f"the {name} features must be [samples, dimensions], got shape {list(features.shape)}")
        if len(features) < 2:
            raise ValueError(f"a covariance needs at least 2 samples, the {name} features have {len(features)}")
        _check_finite(name, features)
    if features_a.shape[1] != features_b.shape[1]:
        raise ValueError(f"feature dimensions differ: {features_a.shape[1]} and {features_b.shape[1]}")
    a, b = features_a.double(), features_b.double()
    mean_gap = float((a.mean(0) - b.mean(0)).square().sum())
    covariance_a, covariance_b = _covariance(a), _covariance(b)
    # tr (A B)^1/2 is the sum of the singular values of A^1/2 B^1/2. Taking singular values here, rather than
    # roots of the eigenvalues of A^1/2 B A^1/2, does not blow rounding errors of 1e-16 up to 1e-8.
    overlap = float(torch.linalg.svdvals(_matrix_root(covariance_a) @ _matrix_root(covariance_b)).sum())
    spread_gap = float(covariance_a.trace() + covariance_b.trace()) - 2.0 * overlap
    return mean_gap + max(0.0, spread_gap)


def _covariance(features: Tensor) -> Tensor:
    """Unbiased covariance [D, D] of float64 features [N, D]."""
    centred = features - features.mean(0)
    return centred.T @ centred / (len(features) - 1)


def _matrix_root(matrix: Tensor) -> Tensor:
    """Symmetric square root of a positive semi-definite matrix; rounding may make tiny eigenvalues negative."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0.0).sqrt()) @ vectors.T


def _ssim_of_clip(a: Tensor, b: Tensor, data_range: float) -> Tensor:
    """Mean SSIM of one clip, float64 [C, T, H, W]."""
    images = torch.stack([a, b, a * a, b * b, a * b]).flatten(0, 2).unsqueeze(1)
    mean_a, mean_b, square_a, square_b, product = _gaussian_mean(images).chunk(5)
    variance_a, variance_b = square_a - mean_a**2, square_b - mean_b**2
    covariance = product - mean_a * mean_b
    c1, c2 = (SSIM_K1 * data_range) ** 2, (SSIM_K2 * data_range) ** 2
    brightness = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return (brightness * structure).mean()


def _gaussian_mean(images: Tensor) -> Tensor:
    """Gaussian-weighted local means of images [N, 1, H, W] -> [N, 1, H-10, W-10], rows and columns in turn."""
    offsets = torch.arange(SSIM_WINDOW, dtype=images.dtype, device=images.device) - SSIM_WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    weights = weights / weights.sum()
    rows = F.conv2d(images, weights.view(1, 1, 1, -1))
    return F.conv2d(rows, weights.view(1, 1, -1, 1))


def _check_videos(a: Tensor, b: Tensor, data_range: float) -> None:
    _check_pair(a, b)
    if a.ndim != 5:
        raise ValueError(f"expected videos [B, C, T, H, W], got shape {list(a.shape)}")
    if not data_range > 0.0:
        raise ValueError(f"data_range must be positive, got {data_range}")


def _check_pair(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {list(a.shape)} and {list(b.shape)}")
    if a.numel() == 0:
        raise ValueError(f"nothing to compare: both tensors are empty, shape {list(a.shape)}")
    _check_finite("first", a)
    _check_finite("second", b)


def _check_finite(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"the {name} tensor holds NaN or infinite values")
