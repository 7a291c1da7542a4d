"""A MODEL to an int8 MODEL: the same patches and options around a denoiser of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from qvd_core.checks import cast_finite
from qvd_core.convert import fit_data_free
from qvd_core.encode import Encoding
from qvd_core.errors import QVDError
from qvd_core.families import family_or_generic
from qvd_core.scales import Scales
from qvd_core.spec import QuantSpec
from qvd_core.temporal import StackedWeights
from qvd_core.temporal_layer import codebook_tensors
from qvd_core.weight_source import WeightSource
from qvd_nodes._comfy import ModelPatcher, WrappersMP, management
from qvd_nodes.layers import attach_clock, count_layers, outer_layer
from qvd_nodes.layout import Recipe, quantized_weight
from qvd_nodes.model_copy import copy_base_model, patcher_of
from qvd_nodes.record import Record, attach, metadata_of_source
from qvd_nodes.weights import PREFIX, denoiser, float_denoiser, patched_tensor, patched_weights, unload, without_patches

logger = logging.getLogger(__name__)

COMPILE_WRAPPER = "torch.compile"  # the key of ComfyUI's own node
FLOAT32_BYTES = 4
COPIES_OF_A_WEIGHT = 8  # that quantizing makes on the way, at most
Progress = Callable[[int, int], None]  # layers done, layers in all


@torch.no_grad()
def quantize_patcher(
    source: ModelPatcher, spec: QuantSpec, scales: Scales | None = None, progress: Progress | None = None
) -> ModelPatcher:
    """An int8 MODEL made of a float one, which stays as it is; one layer at a time is in float on the GPU.

    Patches that `source` already has (LoRAs) are quantized with the weights; later ones are merged when ComfyUI loads.
    Raises QVDError for a MODEL that is none or is quantized already, for scales of another one, and for what
    `qvd_core.quantize_model` refuses.
    """
    float_denoiser(source)
    _refuse_replaced_parts(source)
    unload(source)
    twin = copy_base_model(source.model)
    model: nn.Module = twin.diffusion_model  # type: ignore[assignment]
    encoding = Encoding.of(model, spec, scales)
    read = patched_weights(source)
    codebook = _data_free_codebook(model, encoding, read)
    store = source.offload_device
    _make_room(model, encoding)
    for done, name in enumerate(encoding.plan):
        management.throw_exception_if_processing_interrupted()
        if progress is not None:
            progress(done, len(encoding.plan))
        module = model.get_submodule(name)
        weight, bias = read(name)
        tensors = encoding.encode(name, weight, bias)
        if name in codebook:
            tensors.update(codebook[name])
        dtype: torch.dtype = module.weight.dtype  # type: ignore[assignment]
        new_bias = None if "bias" not in tensors else cast_finite(f"{name}.bias", tensors["bias"], dtype).to(store)
        stored = {key: tensor.to(store) for key, tensor in tensors.items()}
        recipe = Recipe(encoding.plan[name], spec)
        quantized = quantized_weight(stored, tuple(weight.shape), dtype, recipe)
        model.set_submodule(name, outer_layer(module, quantized, new_bias))
    edited = _edit_producers(model, encoding, source)
    attach_clock(model)
    if progress is not None:
        progress(len(encoding.plan), len(encoding.plan))
    result = patcher_of(twin, source)
    _without_compiled_float(result)
    attach(result, _record(source, spec, scales))
    without_patches(result, [f"{name}.{kind}" for name in encoding.plan for kind in ("weight", "bias")] + edited)
    return result


def _refuse_replaced_parts(source: ModelPatcher) -> None:
    """Raise QVDError where another node puts float modules into the loaded denoiser: int8 would never run."""
    for name, part in source.object_patches.items():
        if name.startswith(PREFIX) and isinstance(part, nn.Module):
            raise QVDError(
                f"another node has replaced {name} of this MODEL (by a {type(part).__name__}), in full precision: put "
                "that node (a compile node, for one) behind QVD Quantize Model."
            )


def _without_compiled_float(result: ModelPatcher) -> None:
    """Take off what TorchCompileModel has compiled: it is the float model."""
    if result.get_wrappers(WrappersMP.APPLY_MODEL, COMPILE_WRAPPER):
        result.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, COMPILE_WRAPPER)
        logger.warning("The MODEL was compiled before it was quantized, and is not now: put TorchCompileModel behind.")


def _make_room(model: nn.Module, encoding: Encoding) -> None:
    """Let ComfyUI unload what else is on the GPU, as far as quantizing the largest layer needs."""
    device = management.get_torch_device()
    largest = max(model.get_submodule(name).weight.numel() for name in encoding.plan)  # type: ignore[operator]
    if not management.is_device_cpu(device):
        management.free_memory(largest * FLOAT32_BYTES * COPIES_OF_A_WEIGHT, device)


def _record(source: ModelPatcher, spec: QuantSpec, scales: Scales | None) -> Record:
    model = denoiser(source)
    return Record(
        spec=spec,
        family=family_or_generic(model).name,
        float_bytes=management.module_size(model),
        layers_in_all=count_layers(model),
        report={} if scales is None else scales.report,
        calibrated_on={} if scales is None else scales.calibrated_on,
        file_metadata=metadata_of_source(source),
    )


def _data_free_codebook(model: nn.Module, encoding: Encoding, read: WeightSource) -> dict[str, dict[str, Tensor]]:
    """HTDQ without data: the codebook tensors of the temporal layers that no calibration has filled, by layer."""
    waiting = encoding.without_codebook()
    layers = [model.get_submodule(name) for name in waiting]
    weights = StackedWeights(sum(layer.weight.shape[0] for layer in layers), _weights(read, waiting))  # type: ignore
    quantizer = fit_data_free(model, weights, encoding.spec)
    if quantizer is None:
        return {}
    return {
        name: codebook_tensors(quantizer, layer.weight.shape[1])  # type: ignore[index, arg-type]
        for name, layer in zip(waiting, layers, strict=True)
    }


def _weights(read: WeightSource, names: Sequence[str]) -> Iterator[Tensor]:
    for name in names:
        yield read(name)[0].cpu()


def _edit_producers(model: nn.Module, encoding: Encoding, source: ModelPatcher) -> list[str]:
    """Fold shift and scale into the float tensors that produce a layer's input (`portable`); returns their names."""
    edited = []
    for name, parameter in model.named_parameters():
        layer, _, key = name.rpartition(".")
        if name not in encoding.edits or layer in encoding.plan:
            continue
        value = patched_tensor(source, name, parameter.device)
        assert value is not None
        changed = encoding.edit(name, value.float()).to(parameter.dtype)
        setattr(model.get_submodule(layer), key, nn.Parameter(changed, requires_grad=False))
        edited.append(name)
    return edited
