"""The node pack without ComfyUI: `tests/comfyui_api_stubs` stands in for it. Tiny models, calibrated once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

STUBS = Path(__file__).resolve().parents[1] / "comfyui_api_stubs"
sys.path.insert(0, str(STUBS))  # before anything below imports the pack

import stub_control  # noqa: E402
from comfy.model_patcher import ModelPatcher  # noqa: E402

from qvd_core import QuantSpec, Scales  # noqa: E402
from qvd_nodes.calibrate import Expert, Job, calibrate  # noqa: E402
from qvd_nodes.sampling import SamplerSettings  # noqa: E402
from tests.nodes import models  # noqa: E402

torch.set_num_threads(1)
SETTINGS = SamplerSettings(seed=1, steps=3, cfg=3.0, sampler_name="euler", scheduler="simple")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Not where tests of the real ComfyUI run in this process: there can be one package called `comfy`."""
    chosen = str(config.option.markexpr)
    real = "comfyui" in chosen and "not comfyui" not in chosen and bool(os.environ.get("COMFYUI_PATH"))
    return True if real and collection_path.name.startswith("test_") else None


@pytest.fixture(autouse=True)
def comfyui(tmp_path: Path) -> Iterator[Path]:
    """A ComfyUI in which nothing has happened yet, its folders below the test's own."""
    stub_control.reset()
    stub_control.use_folder(tmp_path)
    yield tmp_path
    stub_control.reset()


@pytest.fixture
def wan() -> ModelPatcher:
    """A float MODEL of its own for every test: linears, one temporal projection."""
    return models.patcher(models.WanConfig)


@pytest.fixture
def convolutions() -> ModelPatcher:
    """The same, with convolutions of two and three dimensions, of a class that no family knows."""
    return models.patcher(models.ConvolutionsConfig)


def job(patcher: ModelPatcher, spec: QuantSpec | None = None, **changes: Any) -> Job:
    """A calibration of one MODEL with two prompts."""
    values: dict[str, Any] = {
        "experts": (Expert("", patcher, SETTINGS),),
        "positives": [models.conditioning(2), models.conditioning(3)],
        "negative": models.conditioning(4),
        "latent": models.latent(),
        "spec": spec or QuantSpec(),
    }
    return Job(**{**values, **changes})


@pytest.fixture(scope="session")
def scales_for() -> Callable[..., Scales]:
    """`scales_for(config, **fields of QuantSpec)`: calibrated once. Shared: not to be changed."""
    known: dict[Any, Scales] = {}

    def find(config: Any = models.WanConfig, **fields: Any) -> Scales:
        key = (config, *sorted(fields.items()))
        if key not in known:
            fast = {"temporal_quantizer": "power", "scale": "smooth", "range": "minmax"}
            spec = QuantSpec(**{**fast, **fields})
            known[key] = calibrate(job(models.patcher(config), spec), use_cache=False).scales[0]
        return known[key]

    return find
