"""The fast Hadamard rotation against the explicit matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qvd_core.errors import QVDError
from qvd_core.rotation import hadamard, largest_block

blocks = pytest.mark.parametrize("block", [2, 4, 8, 32, 128])


def explicit(block: int) -> Tensor:
    """Orthonormal Sylvester matrix [block, block] in float64: the sign is the parity of the common bits of i and j."""
    parity = [[(i & j).bit_count() % 2 for j in range(block)] for i in range(block)]
    return (1.0 - 2.0 * torch.tensor(parity, dtype=torch.float64)) / block**0.5


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


class TestHadamard:
    @blocks
    def test_is_the_explicit_matrix_on_every_group_of_channels(self, block):
        x = random(5, 3 * block).double()
        matrix = torch.block_diag(*[explicit(block)] * 3)
        torch.testing.assert_close(hadamard(x, block), x @ matrix, rtol=0, atol=1e-13)

    @blocks
    def test_is_its_own_inverse_in_float32(self, block):
        x = random(7, 2 * block)
        rotated = hadamard(x, block)
        assert rotated.dtype == torch.float32 and not torch.allclose(rotated, x, atol=0.1)
        torch.testing.assert_close(hadamard(rotated, block), x, rtol=0, atol=2e-6)

    @blocks
    def test_keeps_inner_products(self, block):
        x, weight = random(4, block).double(), random(6, block).double().flip(1)
        torch.testing.assert_close(hadamard(x, block) @ hadamard(weight, block).T, x @ weight.T, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("dim", [0, 1, 2, 3, -3])
    def test_works_along_any_dimension(self, dim):
        x = random(8, 8, 8, 8)
        expected = hadamard(x.movedim(dim, -1).contiguous(), 4).movedim(-1, dim)
        assert torch.equal(hadamard(x, 4, dim=dim), expected)

    def test_spreads_one_channel_over_its_block_only(self):
        x = torch.zeros(16)
        x[5] = 1.0
        rotated = hadamard(x, 4)
        assert torch.equal(rotated.abs(), torch.tensor([0.0] * 4 + [0.5] * 4 + [0.0] * 8))

    @pytest.mark.parametrize("block", [0, 1])
    def test_no_block_is_the_identity(self, block):
        x = random(3, 7)
        assert torch.equal(hadamard(x, block), x)

    @pytest.mark.parametrize("block", [-2, 3, 6, 8, 64])
    def test_refuses_blocks_that_do_not_fit(self, block):
        with pytest.raises(QVDError, match=f"12 channels.*blocks of {block}.*4 at most"):
            hadamard(random(2, 12), block)

    def test_runs_on_meta_and_compiled(self):
        assert hadamard(torch.empty(2, 16, device="meta"), 8).shape == (2, 16)
        x = random(4, 32)
        compiled = torch.compile(hadamard, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x, 16), hadamard(x, 16))


class TestLargestBlock:
    @pytest.mark.parametrize(
        "channels, limit, expected",
        [(5120, 128, 128), (160, 128, 32), (96, 128, 32), (7, 128, 1), (1, 128, 1), (1024, 4096, 1024), (64, 48, 32)],
    )
    def test_examples(self, channels, limit, expected):
        assert largest_block(channels, limit) == expected

    @given(st.integers(1, 20_000), st.integers(0, 8))
    def test_is_the_largest_that_fits(self, channels, exponent):
        limit = 2**exponent
        block = largest_block(channels, limit)
        assert block <= limit and channels % block == 0 and block & (block - 1) == 0
        assert block == limit or channels % (2 * block)
