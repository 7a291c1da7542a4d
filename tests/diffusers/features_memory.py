"""Features that move weights, store them smaller, or cut the work into pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import torch

from tests.diffusers.features import CPU, Judge, feature, hooked
from tests.diffusers.tiny_pipelines import TinyPipeline


@feature("enable_model_cpu_offload", undo=lambda kind, pipe: pipe.remove_all_hooks())
def model_offload(kind: TinyPipeline, pipe: Any, scratch: Path) -> None:
    pipe.enable_model_cpu_offload(device="cpu")
    hooked(kind.model(pipe), "_hf_hook")


@feature("enable_sequential_cpu_offload (on a CPU)")
def sequential_offload(kind: TinyPipeline, pipe: Any, scratch: Path) -> None:
    pipe.enable_sequential_cpu_offload(device="cpu")
    hooked(kind.model(pipe), "_hf_hook")


@feature("accelerate.cpu_offload of the denoiser", unchanged=False)
def accelerate_offload(kind: TinyPipeline, pipe: Any, scratch: Path) -> None:
    """What sequential offloading does to a model, on a device that needs no accelerator."""
    model = kind.model(pipe)
    accelerate.cpu_offload(model, execution_device=CPU)
    hooked(model, "_hf_hook")


@feature("enable_group_offload, block level")
def group_offload_blocks(kind: TinyPipeline, pipe: Any, scratch: Path) -> None:
    pipe.enable_group_offload(CPU, offload_type="block_level", num_blocks_per_group=1)
    hooked(kind.model(pipe), "_diffusers_hook")


@feature("enable_group_offload, leaf level")
def group_offload_leaves(kind: TinyPipeline, pipe: Any, scratch: Path) -> None:
    pipe.enable_group_offload(CPU, offload_type="leaf_level")
    hooked(kind.model(pipe), "_diffusers_hook")


@feature("enable_group_offload to disk, block level", unchanged=False)
def group_offload_blocks_to_disk(kind: TinyPipeline, pipe: Any, scratch: Path) -> None:
    kind.model(pipe).enable_group_offload(
        CPU, offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=str(scratch)
    )
    written(scratch)


@feature("enable_group_offload to disk, leaf level", unchanged=False)
def group_offload_leaves_to_disk(kind: TinyPipeline, pipe: Any, scratch: Path) -> None:
    kind.model(pipe).enable_group_offload(CPU, offload_type="leaf_level", offload_to_disk_path=str(scratch))
    written(scratch)


def written(scratch: Path) -> None:
    if not any(scratch.iterdir()):
        raise AssertionError("nothing was written to disk")


@feature("enable_group_offload with use_stream (on a CPU)")
def group_offload_streams(kind: TinyPipeline, pipe: Any, scratch: Path) -> None:
    pipe.enable_group_offload(CPU, offload_type="leaf_level", use_stream=True)


@feature("what use_stream does to tensors")
def stream_round_trip(kind: TinyPipeline, pipe: Any, scratch: Path) -> None:
    """Streams need a GPU. They keep a host copy of every tensor, assign device copies to `.data` before a layer runs
    and the host copies of *parameters* afterwards."""
    model = kind.model(pipe)
    for module in model.modules():
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        host = {tensor: tensor.data.clone() for tensor in tensors}

        def onload(module: Any, arguments: Any, host: Any = host) -> None:
            for tensor, copy in host.items():
                tensor.data = copy.clone()

        def offload(module: Any, arguments: Any, output: Any, host: Any = host) -> None:
            for tensor, copy in host.items():
                if isinstance(tensor, torch.nn.Parameter):
                    tensor.data = copy

        module.register_forward_pre_hook(onload)
        module.register_forward_hook(offload)


@feature("enable_layerwise_casting to float8", judge=Judge.STORAGE, unchanged=False)
def layerwise_casting(kind: TinyPipeline, pipe: Any, scratch: Path) -> None:
    model = kind.model(pipe)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    if not any(parameter.dtype == torch.float8_e4m3fn for parameter in model.parameters()):
        raise AssertionError("nothing is stored in float8")


@feature(
    "VAE tiling", needs=("vae.enable_tiling",), output_type="np", undo=lambda kind, pipe: pipe.vae.disable_tiling()
)
def vae_tiling(kind: TinyPipeline, pipe: Any, scratch: Path) -> None:
    """Frames smaller than a tile: what is decoded must not change, and the VAE is not ours to touch."""
    pipe.vae.enable_tiling()


@feature(
    "VAE slicing", needs=("vae.enable_slicing",), output_type="np", undo=lambda kind, pipe: pipe.vae.disable_slicing()
)
def vae_slicing(kind: TinyPipeline, pipe: Any, scratch: Path) -> None:
    pipe.vae.enable_slicing()


@feature("unet.enable_forward_chunking", needs=("denoiser.enable_forward_chunking",))
def forward_chunking(kind: TinyPipeline, pipe: Any, scratch: Path) -> None:
    kind.model(pipe).enable_forward_chunking(chunk_size=1, dim=1)


@feature(
    "enable_free_noise_split_inference",
    needs=("pipe.enable_free_noise_split_inference",),
    unchanged=False,  # layers get other names
)
def split_inference(kind: TinyPipeline, pipe: Any, scratch: Path) -> None:
    """Long videos: the memory of attention and feed-forward layers is cut by splitting their input."""
    pipe.enable_free_noise_split_inference(spatial_split_size=16, temporal_split_size=4)


@feature('pipe.to("cpu")')
def to_device(kind: TinyPipeline, pipe: Any, scratch: Path) -> None:
    pipe.to("cpu")


@feature("denoiser.to(memory_format=channels_last)")
def channels_last(kind: TinyPipeline, pipe: Any, scratch: Path) -> None:
    kind.model(pipe).to(memory_format=torch.channels_last)


@feature("enable_gradient_checkpointing", undo=lambda kind, pipe: kind.model(pipe).disable_gradient_checkpointing())
def gradient_checkpointing(kind: TinyPipeline, pipe: Any, scratch: Path) -> None:
    kind.model(pipe).enable_gradient_checkpointing()
