"""QVD's single file for ComfyUI: the denoiser under ComfyUI's own key names, int8 layers as `qvd_core` stores them.

Each quantized layer has a `comfy_quant` entry that says how it is quantized, so that the file survives tools that drop
metadata. Loading makes ComfyUI build the model out of QVD's layers: no float copy of an int8 weight is ever made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qvd_core.checks import stored_problem
from qvd_core.errors import QVDError
from qvd_core.families import family_or_generic
from qvd_core.files import METADATA_KEY, write_tensors
from qvd_core.plan import LayerPlan, plan_from_dict
from qvd_core.spec import QuantSpec
from qvd_nodes._comfy import ModelPatcher, detection, loading, management, utils
from qvd_nodes.layers import (
    FORMAT,
    FORMAT_VERSION,
    QuantizedOp,
    QVDOperations,
    attach_clock,
    count_layers,
    quantized_layers,
    stored_tensors,
)
from qvd_nodes.layout import CALIBRATED, Recipe, is_quantized, quantized_weight
from qvd_nodes.model_copy import adopt
from qvd_nodes.record import Record, attach, record_of
from qvd_nodes.weights import PREFIX, denoiser, unload

DIMENSIONS = {"linear": 2, "temporal": 2, "conv2d": 4, "conv3d": 5}
LARGEST_CODE = 127
LARGEST_DESCRIPTION = 2**16  # bytes of one layer's `comfy_quant` entry


@torch.no_grad()
def save_patcher(patcher: ModelPatcher, path: str | Path) -> Path:
    """Write a quantized MODEL to one file, LoRAs merged. Raises QVDError when it is none, or cannot be written."""
    record = record_of(patcher)
    tensors: dict[str, Tensor] = {}
    for name, module in merged_modules(patcher):
        entries = stored_tensors(module) if is_quantized_op(module) else own_tensors(module)
        tensors.update({f"{name}.{key}" if name else key: value for key, value in entries.items()})
    description = {"kind": "comfyui", "version": FORMAT_VERSION, **record.to_dict()}
    return write_tensors(path, as_saved(patcher, tensors), description, record.file_metadata)


def merged_modules(patcher: ModelPatcher) -> Any:
    """The denoiser's modules by name, each with the MODEL's patches in its own tensors while it is looked at."""
    unload(patcher)
    model = denoiser(patcher)
    device = management.get_torch_device()
    for name, module in model.named_modules():
        management.throw_exception_if_processing_interrupted()
        before = dict(module._parameters)
        leaf = all(key in before for key, _ in module.named_parameters())  # ComfyUI patches no others when it loads
        for key in before if leaf else ():
            full = f"{PREFIX}{name}.{key}" if name else f"{PREFIX}{key}"
            if full in patcher.patches:
                merged = patcher.patch_weight_to_device(full, device_to=device, return_weight=True)
                module._parameters[key] = nn.Parameter(merged.to(patcher.offload_device), requires_grad=False)
        try:
            yield name, module
        finally:
            module._parameters.update(before)


def is_quantized_op(module: nn.Module) -> bool:
    return isinstance(module, QuantizedOp) and is_quantized(module.weight)


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The entries of one module, without its children, in a state dict."""
    hidden = module._non_persistent_buffers_set
    tensors = {**module._parameters, **{k: v for k, v in module._buffers.items() if k not in hidden}}
    return {name: tensor.detach() for name, tensor in tensors.items() if tensor is not None}


def as_saved(patcher: ModelPatcher, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A denoiser's entries under the names that files of this model have."""
    return _without_prefix(patcher.model.state_dict_for_saving(tensors))


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Entries without what whole checkpoints put before a denoiser's names, as its own files have them."""
    prefix = detection.unet_prefix_from_state_dict(tensors)
    if not all(name.startswith(prefix) for name in tensors):  # what ComfyUI takes where it finds no prefix
        return dict(tensors)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def load_patcher(path: str | Path) -> ModelPatcher:
    """A MODEL from a file of `save_patcher`, as int8 as it was saved.

    Raises QVDError when the file is missing, damaged, no file of QVD, newer, or not whole.
    """
    described = _read_record(Path(path))
    tensors, metadata = utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    tensors = _joined(path, tensors)
    names = dict(tensors)
    try:
        patcher = loading.load_diffusion_model_state_dict(
            tensors, model_options={"custom_operations": QVDOperations}, metadata=metadata
        )
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, (QVDError, torch.OutOfMemoryError)):
            raise
        raise QVDError(
            f"{path} does not make a whole model ({type(error).__name__}: {str(error).partition(chr(10))[0][:200]}): "
            "save it again."
        ) from error
    if patcher is None:
        raise QVDError(f"{path} holds a model that this ComfyUI does not know: update ComfyUI.")
    record = described or _record_of_layers(patcher)
    _check_complete(path, patcher, names, record)
    attach_clock(denoiser(patcher))
    attach(patcher, record)
    adopt(patcher)
    return patcher


def _record_of_layers(patcher: ModelPatcher) -> Record:
    """What a file tells whose description another node has left out, as ComfyUI's own save nodes do."""
    model = denoiser(patcher)
    layers = quantized_layers(model)
    float_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    spec = next(iter(layers.values())).weight._params.recipe.spec
    return Record(spec, family_or_generic(model).name, float_bytes, count_layers(model))


def _read_record(path: Path) -> Record | None:
    """A file's description; None where there is none, but layers of QVD. Raises QVDError for any other file."""
    if not path.is_file():
        raise QVDError(f"{path} does not exist: refresh the list of files (press R), or save the model again.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            entry = next((key for key in file.keys() if key.endswith(".comfy_quant")), None)  # noqa: SIM118 - no mapping
            layer = None if entry is None else _entry(file.get_tensor(entry))
    except (OSError, SafetensorError) as error:
        raise QVDError(f"{path} is damaged or no safetensors file ({error}): download or save it again.") from error
    description = _json(metadata.get(METADATA_KEY, "null"))
    if not isinstance(description, dict) or description.get("kind") != "comfyui":
        if METADATA_KEY not in metadata and isinstance(layer, dict) and layer.get("format") == FORMAT:
            return None
        kind = "no int8 file of QVD" if entry is None else "an int8 file of another program"
        raise QVDError(
            f"{path} is {kind}: load it with ComfyUI's own Load Diffusion Model; in full precision QVD Quantize Model "
            "then quantizes it."
        )
    version = description.get("version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise QVDError(f"{path} has format {version}, this QVD reads up to {FORMAT_VERSION}: update QVD.")
    others = {key: value for key, value in metadata.items() if key not in (METADATA_KEY, "format")}
    return Record.from_dict(description, others)


def _entry(tensor: Tensor) -> Any:
    """What a `comfy_quant` entry says; None where it is no short uint8 text of JSON."""
    readable = tensor.dtype == torch.uint8 and tensor.dim() == 1 and tensor.numel() <= LARGEST_DESCRIPTION
    return _json(bytes(tensor.tolist())) if readable else None


def _json(text: str | bytes) -> Any:
    try:
        return json.loads(text if isinstance(text, str) else text.decode(errors="replace"))
    except (ValueError, RecursionError):
        return None


def _joined(path: str | Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors, those of each quantized layer joined to one quantized weight: ComfyUI sees float shapes."""
    joined = dict(tensors)
    others = [t.dtype for k, t in tensors.items() if t.is_floating_point() and not k.endswith(("_scale", *CALIBRATED))]
    dtype = max(set(others), key=others.count) if others else torch.float32
    for key in [key for key in tensors if key.endswith(".comfy_quant")]:
        layer = key.removesuffix(".comfy_quant")
        try:
            recipe, shape = _parse(joined.pop(key))
            own = _take(joined, layer, recipe.plan)
            _check(own, shape, recipe)
            _check_bias(joined.get(f"{layer}.bias"), shape[0])
        except QVDError as error:
            raise QVDError(f"{path}: layer {layer} {error}: the file is damaged, or from a newer QVD.") from None
        joined[f"{layer}.weight"] = quantized_weight(own, shape, dtype, recipe)
    for name, tensor in joined.items():
        if not is_quantized(tensor):
            _check_float(path, name, tensor)
    return joined


def _check_float(path: str | Path, name: str, tensor: Tensor) -> None:
    """Raise QVDError for codes that no description belongs to, and for NaN."""
    codes = tensor.dtype in (torch.int8, torch.uint8) or name.endswith(".weight_scale")
    problem = "belongs to no int8 layer" if codes else stored_problem("", tensor)
    if problem:
        raise QVDError(f"{path}: {name} {problem}: the file is damaged, save it again.")


def _parse(entry: Tensor) -> tuple[Recipe, tuple[int, ...]]:
    values = _entry(entry)
    if values is None:
        raise QVDError(f"has a description of {entry.dtype} {list(entry.shape)} that this QVD cannot read")
    if not isinstance(values, dict) or values.get("format") != FORMAT or values.get("version") != FORMAT_VERSION:
        raise QVDError("has a description that this QVD cannot read")
    shape = values.get("shape")
    if not isinstance(shape, list) or len(shape) < 2 or not all(type(size) is int and size > 0 for size in shape):
        raise QVDError(f"is said to have the shape {shape!r}")
    try:
        spec = QuantSpec.from_dict(values["spec"])
        plan = plan_from_dict({"it": values["plan"]})["it"]
    except (KeyError, TypeError, ValueError) as error:
        raise QVDError(f"has settings that this QVD does not know ({error})") from None
    return Recipe(plan, spec), tuple(shape)


def _take(tensors: dict[str, Tensor], layer: str, plan: LayerPlan) -> dict[str, Tensor]:
    """Take what belongs to the quantized weight out of the file's tensors; the bias stays, it is ComfyUI's."""
    wanted = ["weight", "weight_scale", *(name for name in CALIBRATED if name in plan.tensors)]
    if plan.steps_by == "timestep":
        wanted.append("bucket_boundaries")
    if "codebook" in plan.tensors:
        wanted += ["levels", "boundaries", "offset", "gain"]
    if "bias" in plan.tensors and f"{layer}.bias" not in tensors:
        raise QVDError("lacks its bias")
    own = {}
    for name in wanted:
        if f"{layer}.{name}" not in tensors:
            raise QVDError(f"lacks its {name}")
        own[name] = tensors.pop(f"{layer}.{name}")
    return own


def _check_bias(bias: Tensor | None, outputs: int) -> None:
    if bias is not None and not (bias.is_floating_point() and tuple(bias.shape) == (outputs,)):
        raise QVDError(f"has a bias of {bias.dtype} {list(bias.shape)}, expected {outputs} floating-point values")


def _check(tensors: Mapping[str, Tensor], shape: tuple[int, ...], recipe: Recipe) -> None:
    """Raise QVDError unless every tensor has the dtype, shape and values that the layer's recipe asks for."""
    outputs, inputs = shape[0], shape[1]
    per_output = torch.Size(shape[1:]).numel()
    codes: tuple[int, ...] = (outputs, -(-per_output // 2)) if recipe.weight_bits == 4 else shape
    levels = 2**recipe.spec.activation_bits
    shapes: dict[str, tuple[int, ...]] = {
        "weight": codes,
        "weight_scale": (outputs, *[1] * (len(shape) - 1)),
        "activation_scale": (recipe.plan.steps,),
        "bucket_boundaries": (recipe.plan.steps - 1,),
        "levels": (levels,),
        "boundaries": (levels - 1,),
    }
    for name, tensor in tensors.items():
        expected = shapes.get(name, (inputs,))
        dtype = torch.float32 if name != "weight" else torch.uint8 if recipe.weight_bits == 4 else torch.int8
        if tensor.dtype != dtype or tuple(tensor.shape) != expected:
            raise QVDError(f"has a {name} of {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(expected)}")
        problem = stored_problem(name, tensor)
        if problem:
            raise QVDError(f"has a {name} that {problem}")
    if len(shape) != DIMENSIONS[recipe.plan.kind]:
        raise QVDError(f"is said to be a {recipe.plan.kind} layer with a weight of {len(shape)} dimensions")
    if not bool((tensors["weight_scale"] * LARGEST_CODE).isfinite().all()):
        raise QVDError("has a weight_scale beyond any weight")
    if recipe.plan.rotation and inputs % recipe.plan.rotation:
        raise QVDError(f"is said to rotate blocks of {recipe.plan.rotation} of its {inputs} channels")


def _check_complete(path: str | Path, patcher: ModelPatcher, given: dict[str, Tensor], record: Record) -> None:
    """Raise QVDError when the file lacks tensors of the model: ComfyUI only logs that, and samples noise."""
    found = patcher.model.model_config.process_unet_state_dict(_without_prefix(given))
    model = denoiser(patcher)
    expected = {
        f"{name}.{key}" if name else key
        for name, module in model.named_modules()
        for key in (own_tensors(module) if not is_quantized_op(module) else ("weight",))
    }
    missing = sorted(expected - set(found))
    if missing:
        raise QVDError(f"{path} lacks {len(missing)} tensors of its model, the first is {missing[0]}: save it again.")
    layers = count_layers(model)
    if layers != record.layers_in_all:  # whole blocks are gone, and ComfyUI takes the rest for a smaller model
        raise QVDError(
            f"{path} makes a model of {layers} layers, it was saved from {record.layers_in_all}: save it again."
        )
