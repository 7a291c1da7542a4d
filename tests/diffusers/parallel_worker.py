"""One of two processes that share the tokens of a quantized Wan; spawned by test_context_parallel.py."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import distributed

import qvd_diffusers  # noqa: F401  (registers the backend)
from tests.tiny_models.base import noise


def compare(rank: int, folder: Path, scratch: Path, method: str) -> None:
    """Write the largest difference that splitting the tokens makes to scratch/<rank>."""
    from diffusers import ContextParallelConfig  # not in every release

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{scratch}/meeting", rank=rank, world_size=2)
    model = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    inputs = (noise(1, 4, 4, 8, 8), torch.tensor([500.0]), noise(1, 8, 32, seed=2))
    with torch.no_grad():
        alone = model(*inputs, return_dict=False)[0]
        torch.accelerator.device_count = lambda: 1  # diffusers counts accelerators, and a CPU is none
        model.set_attention_backend("native")
        model.enable_parallelism(config=ContextParallelConfig(**{method: 2}))
        together = model(*inputs, return_dict=False)[0]
    (scratch / str(rank)).write_text(str(float((together - alone).abs().max() / alone.std())))
    distributed.destroy_process_group()
