"""`InputStatistics`: what an observer saw, in the form the search reads it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qvd_core.observe import InputObserver
from qvd_core.statistics import QUANTILE, InputStatistics
from tests.core.video_clock import clock, set_clock


def test_everything_an_observer_saw():
    hours = clock()
    watch = InputObserver(nn.Linear(5, 2), torch.Generator().manual_seed(0), hours, "major")
    inputs = {}
    for timestep in (800.0, 200.0):
        inputs[timestep] = torch.randn(2, 6, 5)
        set_clock(hours, timestep, 2, 3)
        watch.observe(inputs[timestep])
    found = InputStatistics.of(watch)
    whole = torch.cat(list(inputs.values())).reshape(-1, 5)
    assert torch.equal(found.minimum, whole.amin(dim=0)) and torch.equal(found.maximum, whole.amax(dim=0))
    torch.testing.assert_close(found.mean, whole.mean(dim=0))
    assert found.bucket_times.tolist() == [[200.0, 200.0], [800.0, 800.0]]
    for index, timestep in enumerate((200.0, 800.0)):
        assert torch.equal(found.bucket_minimum[index], inputs[timestep].reshape(-1, 5).amin(dim=0))
        assert torch.equal(found.bucket_maximum[index], inputs[timestep].reshape(-1, 5).amax(dim=0))
    assert found.frame_minimum.shape == found.frame_maximum.shape == (3, 5)
    assert len(found.rows) == len(found.row_timesteps) == len(found.row_frames) == 24
    for row, timestep, frame in zip(found.rows, found.row_timesteps, found.row_frames, strict=True):
        of_frame = inputs[float(timestep)].view(2, 3, 2, 5)[:, frame]
        assert bool((of_frame == row).all(dim=-1).any())


def test_every_tensor_moves_to_the_device():
    watch = InputObserver(nn.Linear(5, 2), torch.Generator(), clock(500.0, 1, 2), "major")
    watch.observe(torch.randn(1, 4, 5))
    found = InputStatistics.of(watch, "meta")
    assert all(tensor.is_meta for tensor in vars(found).values())


@pytest.mark.parametrize("taps", [1, 6])
def test_channels_and_taps(taps):
    """A patch holds the taps of the first channel first, as a flattened convolution weight does."""
    rows = torch.arange(2.0 * 3 * taps).view(2, 3 * taps)
    zeros = torch.zeros(3)
    found = InputStatistics(zeros, zeros, zeros, rows)
    assert (found.channels, found.taps) == (3, taps)
    expected = [[float(rows[s, c * taps + t]) for c in range(3)] for s in range(2) for t in range(taps)]
    assert found.channel_rows().tolist() == expected


@pytest.mark.parametrize("samples", [1, 10, 199, 400, 1000])
def test_quantiles_leave_the_same_share_out_on_either_side(samples):
    rows = torch.stack([torch.randperm(samples).float(), -torch.randperm(samples).float()], dim=1)
    found = InputStatistics(rows.amin(dim=0), rows.amax(dim=0), rows.mean(dim=0), rows)
    low, high = found.quantiles()
    cut = int(QUANTILE * samples)
    assert low.tolist() == [cut, cut + 1 - samples] and high.tolist() == [samples - 1 - cut, -cut]
