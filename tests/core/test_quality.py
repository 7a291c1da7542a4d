"""Measures of quality against independent references, and the properties that make them measures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, ndimage
from torch import Tensor

from qvd_core.quality import cosine, frechet_distance, psnr, sqnr_db, ssim

seeds = st.integers(0, 2**32 - 1)
quick = settings(max_examples=15, deadline=None)


def random_video(seed: int, shape: tuple[int, ...] = (2, 3, 4, 32, 32)) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def random_features(seed: int, samples: int, dimensions: int) -> Tensor:
    """Correlated features: a random mixture of independent ones."""
    generator = torch.Generator().manual_seed(seed)
    mixture = torch.randn(dimensions, dimensions, generator=generator, dtype=torch.float64)
    return torch.randn(samples, dimensions, generator=generator, dtype=torch.float64) @ mixture


class TestPsnr:
    def test_matches_the_definition(self):
        a, b = random_video(0), random_video(1)
        error = np.square(a.numpy().astype(np.float64) - b.numpy()).mean(axis=(1, 2, 3, 4))
        np.testing.assert_allclose(psnr(a, b).numpy(), -10 * np.log10(error), rtol=1e-12)

    def test_known_value(self):
        black = torch.zeros(1, 3, 2, 8, 8)
        assert psnr(black, black + 0.1).item() == pytest.approx(20.0, abs=1e-6)

    def test_bytes_and_floats_agree(self):
        a, b = ((random_video(seed) * 255).to(torch.uint8) for seed in (0, 1))
        torch.testing.assert_close(psnr(a, b, data_range=255), psnr(a / 255.0, b / 255.0), rtol=1e-6, atol=0)

    @quick
    @given(seeds)
    def test_equal_clips_are_infinitely_close(self, seed):
        video = random_video(seed)
        assert torch.isinf(psnr(video, video)).all()

    @quick
    @given(seeds, seeds)
    def test_symmetric(self, first, second):
        a, b = random_video(first), random_video(second)
        torch.testing.assert_close(psnr(a, b), psnr(b, a), rtol=0, atol=0)

    def test_clips_are_judged_apart(self):
        a = random_video(0)
        b = a.clone()
        b[1] = 1 - b[1]
        values = psnr(a, b)
        assert torch.isinf(values[0]) and torch.isfinite(values[1])


class TestSsim:
    @pytest.mark.parametrize("size", [(32, 32), (11, 11), (17, 40)])
    def test_matches_scipy(self, size):
        a = random_video(0, (1, 2, 2, *size))
        b = (a + 0.2 * random_video(1, a.shape)).clamp(0, 1)
        frames = zip(a.double().flatten(0, 2).numpy(), b.double().flatten(0, 2).numpy(), strict=True)
        expected = np.mean([self.reference(x, y) for x, y in frames])
        assert ssim(a, b).item() == pytest.approx(expected, abs=1e-10)

    @staticmethod
    def reference(x: np.ndarray, y: np.ndarray) -> float:
        """Wang et al. on one frame, with scipy's Gaussian filter cut to the 11x11 window."""

        def local_mean(image: np.ndarray) -> np.ndarray:
            return ndimage.gaussian_filter(image, 1.5, radius=5)[5:-5, 5:-5]

        mean_x, mean_y = local_mean(x), local_mean(y)
        variance_x, variance_y = local_mean(x * x) - mean_x**2, local_mean(y * y) - mean_y**2
        covariance = local_mean(x * y) - mean_x * mean_y
        numerator = (2 * mean_x * mean_y + 0.01**2) * (2 * covariance + 0.03**2)
        denominator = (mean_x**2 + mean_y**2 + 0.01**2) * (variance_x + variance_y + 0.03**2)
        return float((numerator / denominator).mean())

    @quick
    @given(seeds)
    def test_equal_clips_score_one(self, seed):
        video = random_video(seed)
        torch.testing.assert_close(ssim(video, video), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-12)

    @quick
    @given(seeds, seeds)
    def test_symmetric_and_at_most_one(self, first, second):
        a, b = random_video(first), random_video(second)
        torch.testing.assert_close(ssim(a, b), ssim(b, a), rtol=0, atol=1e-12)
        assert (ssim(a, b) <= 1 + 1e-12).all()

    def test_data_range_scales_with_the_values(self):
        a, b = random_video(0), random_video(1)
        torch.testing.assert_close(ssim(a * 255, b * 255, data_range=255), ssim(a, b), rtol=0, atol=1e-6)

    def test_falls_with_noise(self):
        clean, noise = random_video(0), random_video(1) - 0.5
        values = [ssim(clean, clean + strength * noise).mean() for strength in (0.05, 0.2, 0.8)]
        assert values == sorted(values, reverse=True)

    def test_small_frames_are_refused(self):
        with pytest.raises(ValueError, match=r"at least 11x11 pixels, got \[10, 32\]"):
            ssim(torch.zeros(1, 3, 2, 10, 32), torch.zeros(1, 3, 2, 10, 32))


class TestSqnr:
    def test_matches_the_definition(self):
        reference, test = random_video(0, (7, 5)), random_video(1, (7, 5))
        x, y = reference.numpy().astype(np.float64), test.numpy().astype(np.float64)
        assert sqnr_db(reference, test) == pytest.approx(10 * np.log10((x**2).sum() / ((x - y) ** 2).sum()), rel=1e-12)

    def test_limits(self):
        ones, zeros = torch.ones(3), torch.zeros(3)
        assert sqnr_db(ones, ones) == sqnr_db(zeros, zeros) == math.inf
        assert sqnr_db(zeros, ones) == -math.inf
        assert sqnr_db(ones, zeros) == 0.0

    @quick
    @given(seeds, st.floats(1e-3, 1e3))
    def test_scale_does_not_matter(self, seed, factor):
        reference, test = random_video(seed, (6, 6)).double(), random_video(seed + 1, (6, 6)).double()
        assert sqnr_db(reference * factor, test * factor) == pytest.approx(sqnr_db(reference, test), abs=1e-9)


class TestCosine:
    @quick
    @given(seeds, st.floats(1e-3, 1e3))
    def test_direction_only(self, seed, factor):
        vector = random_video(seed, (9,)).double() + 0.1
        assert cosine(vector, factor * vector) == pytest.approx(1.0, abs=1e-12)
        assert cosine(vector, -factor * vector) == pytest.approx(-1.0, abs=1e-12)

    def test_right_angle(self):
        assert cosine(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])) == 0.0

    def test_zero_has_no_angle(self):
        with pytest.raises(ValueError, match="all-zero"):
            cosine(torch.zeros(3), torch.ones(3))


class TestFrechetDistance:
    def test_matches_scipy(self):
        a, b = random_features(0, 200, 12), random_features(1, 150, 12) + 0.5
        covariance_a, covariance_b = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
        root = linalg.sqrtm(covariance_a @ covariance_b).real
        expected = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(covariance_a + covariance_b - 2 * root)
        assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)

    @quick
    @given(seeds, st.floats(-5, 5))
    def test_shifted_gaussian(self, seed, shift):
        """The same cloud elsewhere: only the means differ, and exactly by the shift."""
        features = random_features(seed, 100, 8)
        assert frechet_distance(features, features + shift) == pytest.approx(8 * shift**2, abs=1e-8)

    @quick
    @given(seeds, st.floats(0.1, 4))
    def test_widened_gaussian(self, seed, factor):
        """The same cloud, wider: the closed form is (factor - 1)^2 tr(cov)."""
        features = random_features(seed, 100, 8)
        features = features - features.mean(0)
        expected = (factor - 1) ** 2 * float(features.square().sum() / 99)
        assert frechet_distance(features, features * factor) == pytest.approx(expected, rel=1e-9, abs=1e-8)

    @quick
    @given(seeds, st.integers(2, 40))
    def test_zero_to_itself_and_symmetric_even_when_rank_deficient(self, seed, samples):
        a, b = random_features(seed, samples, 16), random_features(seed + 1, samples, 16)
        assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)
        assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
        assert frechet_distance(a, b) > 0

    def test_constant_features(self):
        assert frechet_distance(torch.zeros(5, 3), torch.ones(5, 3)) == 3.0

    def test_half_precision_features_are_computed_in_double(self):
        a, b = random_features(0, 50, 8).half(), random_features(1, 50, 8).half()
        assert frechet_distance(a, b) == frechet_distance(a.double(), b.double())

    @pytest.mark.parametrize(
        ("a", "b", "message"),
        [
            (torch.zeros(4, 3, 2), torch.zeros(4, 3), r"first features must be \[samples, dimensions\]"),
            (torch.zeros(4, 3), torch.zeros(1, 3), "the second features have 1"),
            (torch.zeros(4, 3), torch.zeros(4, 5), "feature dimensions differ: 3 and 5"),
            (torch.zeros(4, 3), torch.full((4, 3), math.nan), "second tensor holds NaN"),
        ],
    )
    def test_bad_features(self, a, b, message):
        with pytest.raises(ValueError, match=message):
            frechet_distance(a, b)


@pytest.mark.parametrize("measure", [psnr, ssim, sqnr_db, cosine])
class TestBadInput:
    def test_shapes_differ(self, measure):
        with pytest.raises(ValueError, match=r"shapes differ: \[1, 3, 2, 16, 16\] and \[1, 3, 3, 16, 16\]"):
            measure(torch.ones(1, 3, 2, 16, 16), torch.ones(1, 3, 3, 16, 16))

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_not_finite(self, measure, value):
        good = torch.ones(1, 3, 2, 16, 16)
        bad = good.clone()
        bad[0, 0, 0, 0, 0] = value
        with pytest.raises(ValueError, match="second tensor holds NaN or infinite values"):
            measure(good, bad)

    def test_empty(self, measure):
        with pytest.raises(ValueError, match="nothing to compare"):
            measure(torch.ones(0, 3, 2, 16, 16), torch.ones(0, 3, 2, 16, 16))


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_videos_need_five_axes_and_a_positive_range(measure):
    with pytest.raises(ValueError, match=r"expected videos \[B, C, T, H, W\], got shape \[3, 16, 16\]"):
        measure(torch.ones(3, 16, 16), torch.ones(3, 16, 16))
    with pytest.raises(ValueError, match="data_range must be positive"):
        measure(torch.ones(1, 3, 2, 16, 16), torch.ones(1, 3, 2, 16, 16), data_range=0)
