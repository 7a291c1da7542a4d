"""Tiny denoisers with random weights, built and calibrated once. They prove plumbing and algebra, not quality."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from diffusers import UNetMotionModel, WanTransformer3DModel
from torch import Tensor, nn

from qvd_core import QuantSpec, QVDError, Scales, calibrate_model
from qvd_core.ops.cpu import build, isa_name, library

torch.set_num_threads(1)

TIMESTEPS = (900, 500, 100)


@dataclass(frozen=True)
class Denoiser:
    """A full-precision model that no test may change, and how to call it (or a copy) at a timestep."""

    model: nn.Module
    forward: Callable[[nn.Module, float], Tensor]

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.model)

    @torch.no_grad()
    def sample(self, model: nn.Module | None = None) -> Tensor:
        """The outputs at every timestep, stacked."""
        return torch.stack([self.forward(model or self.model, timestep) for timestep in TIMESTEPS])

    def sqnr_db(self, model: nn.Module) -> float:
        """Of a quantized copy's outputs against full precision."""
        expected = self.sample()
        noise = (self.sample(model) - expected).square().sum()
        return float(10 * torch.log10(expected.square().sum() / noise))

    def calibrate(self, spec: QuantSpec | None = None) -> Scales:
        return calibrate_model(self.model, self.sample, spec)


def snapshot(model: nn.Module) -> dict[str, tuple[type, Tensor]]:
    """Everything a conversion could change: module types and exact tensors (hooks are compared by `hooks`)."""
    state = {name: (type(module), torch.empty(0)) for name, module in model.named_modules()}
    return state | {f"{name} (tensor)": (type(value), value.clone()) for name, value in model.state_dict().items()}


def same_snapshot(before: dict[str, tuple[type, Tensor]], model: nn.Module) -> bool:
    after = snapshot(model)
    return before.keys() == after.keys() and all(
        kind is after[name][0]
        and value.dtype == after[name][1].dtype
        and torch.equal(_bits(value), _bits(after[name][1]))
        for name, (kind, value) in before.items()
    )


def _bits(value: Tensor) -> Tensor:
    return value.contiguous().view(torch.uint8) if value.dim() else value  # NaN equals itself bit for bit


def wan_model(seed: int) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=32,
    ).eval()


@pytest.fixture(scope="session")
def wan() -> Denoiser:
    """Wan: linears only, one temporal projection. The second row of the batch is the other guidance branch."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 3, 8, 8, generator=generator)
    text = torch.randn(2, 6, 32, generator=generator)

    def forward(model: nn.Module, timestep: float) -> Tensor:
        return model(
            hidden_states=latents, timestep=torch.full((2,), float(timestep)), encoder_hidden_states=text
        ).sample

    return Denoiser(wan_model(0), forward)


@pytest.fixture(scope="session")
def unet() -> Denoiser:
    """AnimateDiff's UNet: convolutions, many temporal projections, spatial and motion attention."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 2, 8, 8, generator=generator)
    text = torch.randn(2, 6, 32, generator=generator).repeat_interleave(2, dim=0)  # one text per frame

    def forward(model: nn.Module, timestep: float) -> Tensor:
        return model(latents, torch.tensor(int(timestep)), encoder_hidden_states=text).sample

    torch.manual_seed(0)
    model = UNetMotionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion"),
        up_block_types=("CrossAttnUpBlockMotion", "UpBlockMotion"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=32,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        motion_max_seq_length=8,
        use_motion_mid_block=True,
    )
    return Denoiser(model.eval(), forward)


@pytest.fixture(scope="session")
def wan_scales(wan: Denoiser) -> Scales:
    return wan.calibrate()


@pytest.fixture(scope="session")
def unet_scales(unet: Denoiser) -> Scales:
    return unet.calibrate(QuantSpec(temporal_quantizer="power", scale="smooth"))  # the full search is Wan's to run


@pytest.fixture(params=["wan", "unet"])
def denoiser(request: pytest.FixtureRequest) -> Denoiser:
    return request.getfixturevalue(request.param)


@pytest.fixture
def scales(request: pytest.FixtureRequest, denoiser: Denoiser) -> Scales:
    """The scales of `denoiser`. Shared: not to be changed."""
    return request.getfixturevalue(f"{request.node.callspec.params['denoiser']}_scales")


@pytest.fixture
def unchanged() -> Callable[[nn.Module], Callable[[], bool]]:
    """`check = unchanged(model)`; `check()` says whether the model is still the same, bit for bit and without hooks."""

    def remember(model: nn.Module) -> Callable[[], bool]:
        return partial(_still_the_same, snapshot(model), model)

    return remember


def _still_the_same(before: dict[str, tuple[type, Tensor]], model: nn.Module) -> bool:
    hooks = [module for module in model.modules() if module._forward_pre_hooks or module._forward_hooks]
    return not hooks and same_snapshot(before, model)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The C kernels of the sources as they are: the installed library where it is fresh, else one compiled now."""
    if library.load() is not None:
        yield
        return
    try:
        path = build.build(tmp_path_factory.mktemp("kernels") / build.LIBRARY_NAME)
    except build.BuildError as error:
        pytest.skip(f"no C kernels to test: {error}")
    opened = library.open_library(path)
    if opened is None:
        pytest.skip("the C kernels do not run on this CPU")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "_loaded", [opened])
        yield


@pytest.fixture(params=list(library.ISA_CODES))
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each instruction set that this CPU has."""
    monkeypatch.setenv("QVD_CPU_ISA", request.param)
    library.isa.cache_clear()
    try:
        yield isa_name()
    except QVDError:
        pytest.skip(f"this CPU has no {request.param}")
    finally:
        library.isa.cache_clear()


@pytest.fixture
def threads() -> Iterator[None]:
    """PyTorch's number of threads, as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
