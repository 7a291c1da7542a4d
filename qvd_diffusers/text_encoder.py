"""Text (and image) encoders of a pipeline, which transformers loads: int8 blocks with one dynamic scale per token.

An option, not the default: `QVDConfig(components=["transformer", "text_encoder"])`. No calibration sees an encoder, so
everything here is data-free. Two ways through the hooks, as in `quantizer.py`:
    quantize while loading    each layer is quantized when its weight has been read, before the next one is
    load a quantized model    rebuild the skeleton from the plan in config.json, take every tensor as it is stored
In the file, the codes of a layer have a leading dimension of 1. transformers only warns about a method it does not
know and would go on to compute with codes as if they were weights; over a shape that does not fit, it stops.

Needs a recent loader of transformers 5 (tested: 5.23): importing this module with an older one is an ImportError.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.base import HfQuantizer

from qvd_core.convert import dequantize_model, install_layers
from qvd_core.encode import Encoding
from qvd_core.errors import QVDError
from qvd_core.families.patterns import has_parts
from qvd_core.families.text import is_text_layer
from qvd_core.layers import QuantLinear
from qvd_core.plan import LayerPlan, plan_from_dict, plan_to_dict, refuse_quantized
from qvd_core.spec import QuantSpec
from qvd_diffusers.config import COMPUTE_DTYPES, QVDConfig
from qvd_diffusers.streaming import check_stored_values, enumerate_names, matching, split_name, stored_tensors

if "model" not in inspect.signature(getattr(HfQuantizer, "update_weight_conversions", object)).parameters:
    raise ImportError("the loader of this transformers tells a quantizer too little: 5.23 is known to do.")

logger = logging.getLogger(__name__)

_CODES = ("I8", "U8", "F8_E4M3", "F8_E5M2")  # safetensors' names of the types other quantizers store weights in


def plan_text_layers(model: nn.Module, spec: QuantSpec) -> dict[str, LayerPlan]:
    """The linears of the encoder's blocks, in model order. Its tensors may be on the meta device.

    Raises QVDError when the model is quantized already or has no such layer.
    """
    refuse_quantized(model)
    tied = _tied_names(model)
    plan = {
        name: LayerPlan("linear", ("bias",) if module.bias is not None else ())
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and is_text_layer(name)
        and f"{name}.weight" not in tied
        and not has_parts(name, spec.modules_to_not_convert)
    }
    if not plan:
        raise QVDError(
            f"{type(model).__name__} has no linear layer in repeated blocks that QVD can quantize: "
            "leave this component out."
        )
    return plan


def install_text_layers(model: nn.Module, plan: Mapping[str, LayerPlan], spec: QuantSpec, dtype: torch.dtype) -> None:
    """Swap the planned layers of an empty model for empty int8 ones that compute in `dtype`.

    Layers that a model class keeps in float32 in 16-bit models, as T5 does with `wo`, compute in float32 here too.
    """
    wide = {name: layer for name, layer in plan.items() if _keeps_float32(model, name, dtype)}
    install_layers(model, {name: layer for name, layer in plan.items() if name not in wide}, spec, dtype)
    install_layers(model, wide, spec, torch.float32)
    for name in wide:
        # T5 casts the input to the weight's type by itself, but not to int8: int8 it takes for another backend.
        model.get_submodule(name).register_forward_pre_hook(_in_float32)
    for name in plan:
        # What a file lacks transformers fills with random floats, which int8 cannot hold; the check after loading, not
        # an error of PyTorch's, is to name it.
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantLinear)
        empty = torch.empty(layer.weight_shape, dtype=layer.compute_dtype, device="meta")
        layer.weight = nn.Parameter(empty, requires_grad=False)


class QVDTextQuantizer(HfQuantizer):
    """Created by transformers for one model that is being loaded; stays with the model as `model.hf_quantizer`."""

    quantization_config: QVDConfig

    def __init__(self, quantization_config: QVDConfig, **kwargs: Any):
        super().__init__(quantization_config.copy(), **kwargs)
        if not self.pre_quantized:
            check_text_config(self.quantization_config)
        self.spec = self.quantization_config.spec
        self._dtype = torch.float32
        self._plan: dict[str, LayerPlan] = {}
        self._encoding: Encoding | None = None
        self._problem: str | None = None

    is_trainable = True
    is_compileable = True

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    # Before the model exists

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        _refuse_disk(device_map)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The type of what stays in floating point is transformers' choice: the `dtype` argument, else the file's."""
        if dtype not in COMPUTE_DTYPES.values():
            raise QVDError(f"dtype must be one of {', '.join(COMPUTE_DTYPES)} with QVD, got {dtype}.")
        self._dtype = dtype
        return dtype

    # The skeleton

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Iterable[str] | None = None, **kwargs: Any
    ) -> None:
        stored = _stored_types(checkpoint_files)
        if self.pre_quantized:
            self._plan = _recorded_plan(self.quantization_config)
            _refuse_unplanned(stored, self._plan)
        else:
            codes = [name for name, kind in stored.items() if kind in _CODES]
            if codes:
                raise QVDError(
                    f"the checkpoint holds {enumerate_names(codes)} as {stored[codes[0]]}: it is quantized already. "
                    "Load it without a quantization_config, or quantize the full-precision model."
                )
            self._encoding = Encoding(plan_text_layers(model, self.spec), self.spec)
            self._plan = dict(self._encoding.plan)
        install_text_layers(model, self._plan, self.spec, self._dtype)

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        """What transformers does to the names and tensors of a file, and after it ours to the codes."""
        for conversion in weight_conversions:
            if isinstance(conversion, WeightConverter):
                self._refuse_converted(conversion)
        return [*weight_conversions, _storage(self._plan, self)] if self.pre_quantized else weight_conversions

    def _refuse_converted(self, conversion: WeightConverter) -> None:
        """A layer that is put together from other tensors of the file could not be taken apart again on saving."""
        for target in conversion.target_patterns:
            part = target.replace("\\1", "").strip(".^$")
            affected = [name for name in self._plan if f".{part}" in f".{name}.weight"]
            if affected:
                raise QVDError(
                    f"transformers makes {enumerate_names(affected)} of this model from tensors of another form, which "
                    "QVD cannot quantize: add these layers to modules_to_not_convert."
                )

    # The tensors

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        layer, suffix = split_name(param_name)
        return not self.pre_quantized and suffix == "weight" and layer in self._plan

    def param_element_size(self, model: nn.Module, param_name: str, param: Tensor) -> float:
        """For device maps: int8 codes come where the empty weight is."""
        layer, suffix = split_name(param_name)
        return 1 if suffix == "weight" and layer in self._plan else param.element_size()

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """To which type a stored tensor of a quantized model is cast: codes are not, floats only to floats."""
        if any(isinstance(operation, _Unwrap) for operation in getattr(converter, "operations", ())):
            return None
        stored = param.get_dtype() if hasattr(param, "get_dtype") else str(param.dtype).removeprefix("torch.")
        is_float = stored.upper().startswith(("F", "BF"))
        if dtype is not None and is_float != dtype.is_floating_point:
            raise QVDError(
                f"{converter.source_patterns[0]} is {stored} in the checkpoint, expected {dtype}: "
                "config.json and the weights do not belong together."
            )
        return dtype if is_float else None

    def encode(self, name: str, weight: Tensor, model: nn.Module) -> dict[str, Tensor]:
        """The codes and scale that take the place of the float weight [N, K], by full name."""
        assert self._encoding is not None
        layer, _ = split_name(name)
        matching(weight, model.get_parameter(name), name)
        encoded = self._encoding.encode(layer, weight, None)
        return {f"{layer}.{suffix}": _frozen(value, suffix) for suffix, value in encoded.items()}

    def note(self, error: QVDError) -> None:
        """Keep the first error until the model is loaded: transformers would bury it in a report of its own."""
        self._problem = self._problem or str(error)

    # The loaded model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Check that all is there, and write the result into the model's config."""
        if self._problem is not None:
            raise QVDError(self._problem)
        _refuse_disk(getattr(model, "hf_device_map", None))
        self._check_tensors(model)
        if self._encoding is not None:
            logger.info("%s: %d layers quantized to int8.", type(model).__name__, len(self._plan))
        config = self.quantization_config
        config.layers = plan_to_dict(self._plan)
        config.compute_dtype = self._dtype
        config.components = None
        self._encoding = None
        # What transformers undoes when the model is saved.
        model._weight_conversions = [*_without_storage(model), _storage(self._plan)]
        return model

    def _check_tensors(self, model: nn.Module) -> None:
        missing = []
        for name in self._plan:
            for suffix, tensor in stored_tensors(model.get_submodule(name)).items():
                # transformers marks what it has read; the rest it has made up. Offloaded tensors are elsewhere.
                if not tensor.is_meta and not getattr(tensor, "_is_hf_initialized", False):
                    missing.append(f"{name}.{suffix}")
                elif self.pre_quantized and not tensor.is_meta:
                    check_stored_values(tensor, f"{name}.{suffix}")
        if missing:
            raise QVDError(
                f"the checkpoint of this {type(model).__name__} lacks {enumerate_names(missing)}: "
                "it is incomplete, or it was saved for another model."
            )

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        model._weight_conversions = _without_storage(model)
        return dequantize_model(model)


class _Claim(ConversionOps):
    """One step of transformers' loader that belongs to a quantizer, which its errors go to."""

    def __init__(self, quantizer: QVDTextQuantizer | None = None):
        self.quantizer = quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> _Claim:
        return self  # transformers copies a step per tensor; the quantizer stays the one

    def convert(self, input_dict: dict[str, Any], full_layer_name: str = "", model: Any = None, **kwargs: Any) -> Any:
        """input_dict: the one tensor of the file, perhaps in a list, by some pattern. Returns tensors by full name."""
        (value,) = input_dict.values()
        tensor = value[0] if isinstance(value, list) else value
        try:
            return self._converted(full_layer_name, tensor, model)
        except QVDError as error:
            assert self.quantizer is not None
            self.quantizer.note(error)
            return {full_layer_name: torch.zeros(model.get_parameter(full_layer_name).shape)}

    @abstractmethod
    def _converted(self, name: str, tensor: Tensor, model: Any) -> dict[str, Tensor]:
        """Tensors by full name, made of the one that the file has for `name`."""


class _Quantize(_Claim):
    """Codes and scale of a float weight [N, K]."""

    def _converted(self, name: str, tensor: Tensor, model: Any) -> dict[str, Tensor]:
        assert self.quantizer is not None
        return self.quantizer.encode(name, tensor, model)


class _Unwrap(_Claim):
    """Codes [N, K] of the stored [1, N, K]."""

    def _converted(self, name: str, tensor: Tensor, model: Any) -> dict[str, Tensor]:
        codes = tensor.squeeze(0) if tensor.dim() == 3 else tensor
        expected = torch.empty(model.get_parameter(name).shape, dtype=torch.int8, device="meta")
        return {name: _frozen(matching(codes, expected, name), "weight")}

    @property
    def reverse_op(self) -> ConversionOps:
        return _Wrap()


class _Wrap(_Claim):
    """[1, N, K] of the codes [N, K], for the file."""

    def _converted(self, name: str, tensor: Tensor, model: Any) -> dict[str, Tensor]:
        return {name: tensor.unsqueeze(0)}


def check_text_config(config: QVDConfig) -> None:
    """Raise QVDError for settings that a text encoder cannot have: what needs calibration, and packed weights."""
    spec = config.spec
    wrong = {
        "scales": config.scales is not None,
        f'activation="{spec.activation}"': spec.is_static,
        'rounding="gptq"': spec.rounding == "gptq",
        f"auto_keep={spec.auto_keep}": spec.auto_keep is not None,
    }
    found = next((setting for setting, given in wrong.items() if given), None)
    if found is not None:
        raise QVDError(
            f"{found} needs calibration, which text encoders have none of: give the encoder a config of its own, e.g. "
            'PipelineQuantizationConfig(quant_mapping={"transformer": ..., "text_encoder": QVDConfig()}).'
        )
    if spec.weight_bits == 4:
        raise QVDError(
            "weight_bits=4 is not supported for text encoders: give the encoder a config of its own, e.g. "
            'PipelineQuantizationConfig(quant_mapping={"transformer": ..., "text_encoder": QVDConfig()}).'
        )


def _recorded_plan(config: QVDConfig) -> dict[str, LayerPlan]:
    if not config.layers:
        raise QVDError("config.json says quant_method 'qvd' but records no layers: save the model again.")
    plan = plan_from_dict(config.layers)
    strange = [name for name, layer in plan.items() if dataclasses.replace(layer, tensors=()) != LayerPlan("linear")]
    strange += [name for name, layer in plan.items() if set(layer.tensors) - {"bias"}]
    if strange:
        raise QVDError(
            f"config.json plans {enumerate_names(strange)} in a form that text encoders do not have: "
            "it is damaged, or from a newer QVD."
        )
    return plan


def _stored_types(files: Iterable[str] | None) -> dict[str, str]:
    """safetensors' type of every tensor in the files, by the name in the file; nothing for other kinds of files."""
    types = {}
    for path in files or ():
        if str(path).endswith(".safetensors"):
            with safe_open(path, framework="pt") as file:
                types.update({name: file.get_slice(name).get_dtype() for name in file.keys()})  # noqa: SIM118
    return types


def _refuse_unplanned(stored: Mapping[str, str], plan: Mapping[str, LayerPlan]) -> None:
    """transformers leaves out tensors the model does not have; a quantized layer would compute without its own."""
    scales = [name for name in stored if name.endswith(".weight_scale")]
    # Names in a file may differ from those in the model by a prefix, so the whole name has to end alike.
    extra = [name for name in scales if not any(name.endswith(f"{layer}.weight_scale") for layer in plan)]
    if len(scales) > len(plan):
        raise QVDError(
            f"the checkpoint holds {enumerate_names(extra or scales)}, which config.json does not plan for: "
            "config.json and the weights do not belong together."
        )


def _refuse_disk(device_map: Any) -> None:
    if isinstance(device_map, Mapping) and "disk" in device_map.values():
        raise QVDError(
            "device_map sends layers of a text encoder to disk, where QVD cannot put them: "
            "use a device_map without 'disk', or offload after loading."
        )


def _tied_names(model: nn.Module) -> set[str]:
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {*tied.keys(), *tied.values()}


def _keeps_float32(model: nn.Module, name: str, dtype: torch.dtype) -> bool:
    """Whether the model's class keeps this layer in float32 when the rest has `dtype`."""
    kept: set[str] = set()
    if dtype == torch.float16:
        kept.update(getattr(model, "_keep_in_fp32_modules", None) or ())
    if dtype in (torch.float16, torch.bfloat16):
        kept.update(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    return not kept.isdisjoint(name.split("."))


def _in_float32(layer: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(argument.float() for argument in arguments)


def _frozen(tensor: Tensor, suffix: str) -> Tensor:
    return nn.Parameter(tensor, requires_grad=False) if suffix == "weight" else tensor


def _storage(plan: Iterable[str], quantizer: QVDTextQuantizer | None = None) -> WeightConverter:
    """How the codes of the planned layers lie in a file. transformers turns it around when it saves the model."""
    layers = "|".join(re.escape(name) for name in plan)
    return WeightConverter(rf"^({layers})\.weight", r"\1.weight", operations=[_Unwrap(quantizer)])


def _without_storage(model: Any) -> list[Any]:
    conversions = getattr(model, "_weight_conversions", None) or []
    return [
        conversion
        for conversion in conversions
        if not any(isinstance(operation, _Unwrap) for operation in getattr(conversion, "operations", ()))
    ]
