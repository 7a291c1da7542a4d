"""`QVDQuantizer`: the lifecycle of a QVD model inside diffusers' loader. The arithmetic is in `qvd_core`.

Ways through the hooks, in the order diffusers calls them:
    quantize while loading    plan the skeleton, quantize each layer as its float tensors arrive, fit the temporal codes
    load a quantized model    rebuild the skeleton from the plan in config.json, take every tensor as it is stored
    leave a model as it is    a component that no one named, loaded as if there were no quantization config
Every tensor of the checkpoint is claimed, because diffusers would cast int8 and float32 tensors to its own type.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from qvd_core.checkpoint import plan_of
from qvd_core.convert import dequantize_model, fit_temporal_layers, install_layers
from qvd_core.encode import Encoding
from qvd_core.errors import QVDError
from qvd_core.layers import FLOAT32_BUFFERS, QuantizedLayer
from qvd_core.plan import LayerPlan, plan_from_dict, plan_to_dict
from qvd_core.shared_input import share_inputs
from qvd_core.spec import QuantSpec
from qvd_diffusers.attention import AUTO, apply_attention, require_backend, restore_attention
from qvd_diffusers.backend_name import is_denoiser, made_from_name
from qvd_diffusers.config import COMPUTE_DTYPES, QVDConfig
from qvd_diffusers.mapped import OneByOne
from qvd_diffusers.residence import refuse_to_dequantize
from qvd_diffusers.single_file import SingleFile, recorded_config
from qvd_diffusers.streaming import (
    QUANTIZED_ALREADY,
    Device,
    Encoder,
    check_recorded_plan,
    check_savable,
    check_stored_values,
    enumerate_names,
    expect_float_weights,
    matching,
    names_of_codes,
    owner_of,
    place,
    place_encoded,
    split_name,
    stored_tensors,
    unquantized,
)

logger = logging.getLogger(__name__)


class QVDQuantizer(DiffusersQuantizer):
    """Created by diffusers for one model that is being loaded; stays with the model as `model.hf_quantizer`."""

    # Without this, diffusers would cast even the modules that a model class keeps in float32.
    use_keep_in_fp32_modules = True
    requires_calibration = False
    is_serializable = True
    is_trainable = True
    is_compileable = True

    quantization_config: QVDConfig

    def __init__(self, quantization_config: QVDConfig, **kwargs: Any):
        # The user's object stays as it is: one config may be loading several models.
        super().__init__(quantization_config.copy(), **kwargs)
        self.spec = self.quantization_config.spec
        self._for_every_component = made_from_name(quantization_config)
        self._leaves_float = False
        self._asked_dtype: torch.dtype | None = None
        self._dtype = torch.float32
        self._single_file: SingleFile | None = None
        self._skeleton_made = False
        self._keeps_stored_types = False
        self._plan: dict[str, LayerPlan] = {}
        self._encoder: Encoder | None = None
        self._in_checkpoint: list[str] | None = None
        self._unexpected_unseen = False
        self._known: frozenset[str] = frozenset()
        self._outstanding: set[str] = set()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the lock, so that the loaded model can be copied and pickled."""
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    # Before the model exists

    def validate_environment(self, *args: Any, torch_dtype: Any = None, device_map: Any = None, **kwargs: Any) -> None:
        """Called twice: with the user's arguments, then with the device map that was worked out."""
        if torch_dtype is not None and torch_dtype not in COMPUTE_DTYPES.values():
            raise QVDError(f"torch_dtype must be one of {', '.join(COMPUTE_DTYPES)} with QVD, got {torch_dtype}.")
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise QVDError(
                "device_map sends layers to disk, past the quantizer: "
                "use a device_map without 'disk', or enable_group_offload after loading."
            )
        if not self.pre_quantized and self.quantization_config.attention not in (None, AUTO):
            require_backend(self.quantization_config.attention)

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """Never None: for None diffusers casts float weights to the type of the int8 placeholder, that is to zeros."""
        recorded = self.quantization_config.compute_dtype
        assert recorded is None or isinstance(recorded, torch.dtype)
        self._asked_dtype = torch_dtype
        self._dtype = torch_dtype or recorded or torch.float32
        return self._dtype

    def get_cuda_warm_up_factor(self) -> int:
        """The loader reserves `elements / factor` values of the compute type; most elements take one byte."""
        return self._dtype.itemsize

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Only looks: the names in the checkpoint are needed to see what is missing before anything is read."""
        self._in_checkpoint = list(loaded_keys)
        return loaded_keys

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Read the tensors of a file one at a time. `from_single_file` calls this first of all, and then may rename."""
        if self._skeleton_made:
            if self._plan:
                self._refuse_unplanned(state_dict, names_of_codes(state_dict))
            return OneByOne(state_dict)
        self._single_file = SingleFile(state_dict)
        return self._single_file.shown

    # The skeleton

    def _process_model_before_weight_loading(
        self, model: nn.Module, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """Swap the planned layers of the empty model for empty quantized ones.

        state_dict: only given by `from_single_file`, which also says "pre-quantized" of every file.
        """
        self._skeleton_made = True
        if state_dict is not None:
            self._open_single_file(model, state_dict)
        if self._for_every_component and not self.pre_quantized and not is_denoiser(model):
            self._leave_float(model)
            return
        if self.pre_quantized:
            self._plan = self._recorded_plan()
        else:
            self._prepare_encoder(model)
        install_layers(model, self._plan, self.spec, self._dtype)
        if self._encoder is not None:
            expect_float_weights(model)
        if self._in_checkpoint is not None:
            self._expect(model, self._in_checkpoint)

    def _open_single_file(self, model: Any, state_dict: dict[str, Tensor]) -> None:
        """Find out whether the file is quantized; then take its tensors and its settings as they were saved."""
        file, self._single_file = self._single_file or SingleFile.already_renamed(state_dict), None
        self.pre_quantized = file.is_quantized
        if self.pre_quantized:
            asked = self.quantization_config
            self.quantization_config = recorded_config(model, asked, file)
            self.spec = self.quantization_config.spec
            if self._asked_dtype is None:
                # diffusers casts to a type chosen before config.json was read; the file has the recorded one.
                self._keeps_stored_types = True
                self.update_torch_dtype(None)
            file.restore(state_dict)
        file.begin()
        self._in_checkpoint = list(state_dict)

    def _leave_float(self, model: nn.Module) -> None:
        logger.warning("%s is no video denoiser: QVD leaves it in full precision.", type(model).__name__)
        self._leaves_float = True

    def _recorded_plan(self) -> dict[str, LayerPlan]:
        if not self.quantization_config.layers:
            raise QVDError("config.json says quant_method 'qvd' but records no layers: save the model again.")
        plan = plan_from_dict(self.quantization_config.layers)
        check_recorded_plan(plan, self.spec)
        return plan

    def _prepare_encoder(self, model: nn.Module) -> None:
        refuse_image_unet(model)
        scales = self.quantization_config.load_scales()
        if scales is not None:
            warn_of_other_settings(scales.spec, self.spec)
        encoding = Encoding.of(model, self.spec, scales)
        self._plan = dict(encoding.plan)
        modules = dict(model.named_modules())
        with_bias = frozenset(name for name in self._plan if modules[name].bias is not None)
        self._encoder = Encoder(encoding, with_bias)

    def _expect(self, model: nn.Module, in_checkpoint: Iterable[str]) -> None:
        """Compare the names in the checkpoint with those the skeleton needs, before a byte of weights is read."""
        present, known = set(in_checkpoint), set(model.state_dict())
        self._outstanding = present & known
        missing = [name for name in self._needed(model) if name not in present]
        if missing:
            raise QVDError(
                f"the checkpoint of this {type(model).__name__} lacks {enumerate_names(missing)}: "
                "it is incomplete, or it was saved for another model."
            )
        self._known = frozenset(known)
        self._refuse_unplanned(present)

    def _refuse_unplanned(self, present: Iterable[str], codes: Iterable[str] = ()) -> None:
        """diffusers leaves out tensors the model does not have; a quantized layer would compute without its own.

        codes: names among those present of tensors that hold codes.
        """
        extra = {name for name in present if self._is_unplanned(name)} | (set(codes) - self._known)
        if not extra:
            return
        if self._encoder is not None:
            raise QVDError(f"the checkpoint holds {enumerate_names(extra)}: {QUANTIZED_ALREADY}")
        raise QVDError(
            f"the checkpoint holds {enumerate_names(extra)}, which config.json does not plan for: "
            "config.json and the weights do not belong together."
        )

    def _is_unplanned(self, name: str) -> bool:
        """Whether a tensor belongs to a quantized layer, but not to what was planned for that layer."""
        layer, suffix = split_name(name)
        planned = owner_of(name) in self._plan
        if self._encoder is not None and planned:  # its layers are full-precision ones in the checkpoint
            return layer not in self._plan or suffix not in ("weight", "bias")
        return name not in self._known and (suffix in FLOAT32_BUFFERS or planned)

    def _needed(self, model: nn.Module) -> Iterable[str]:
        """Names of the tensors the checkpoint must have: all that are still empty; float ones when quantizing."""
        for name, tensor in model.state_dict().items():
            layer, suffix = split_name(name)
            if self._encoder is not None and layer in self._plan:
                if suffix in self._encoder.float_tensors(layer):
                    yield name
            elif tensor.is_meta:
                yield name

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """Tensors that quantization adds are not missing from a float checkpoint."""
        if self._leaves_float:
            return missing_keys
        if self._in_checkpoint is None:  # older versions of diffusers do not show the names any sooner
            self._unexpected_unseen = True  # nor, here, those the model does not have
            self._in_checkpoint = sorted(set(model.state_dict()) - set(missing_keys))
            self._expect(model, self._in_checkpoint)
        if self._encoder is None:
            return missing_keys
        return [name for name in missing_keys if split_name(name)[0] not in self._plan]

    # The tensors

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: Mapping[str, Tensor], **kwargs: Any
    ) -> bool:
        """Every tensor goes through `create_quantized_param`: ours must not be cast, the others are counted."""
        return True

    def check_quantized_param_shape(self, param_name: str, current_param: Tensor, loaded_param: Tensor) -> bool:
        matching(loaded_param, current_param, param_name)
        return True

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: Device,
        state_dict: Mapping[str, Tensor],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take one tensor of the checkpoint from `state_dict`; `param_value` says to which type diffusers casts it."""
        layer, suffix = split_name(param_name)
        module = model.get_submodule(layer)
        stored = state_dict[param_name]
        if self._leaves_float:
            floats = stored.is_floating_point() and self._asked_dtype is None  # `compute_dtype` is not for this model
            place(module, suffix, stored.to(torch.get_default_dtype() if floats else param_value.dtype), target_device)
            return
        if self._unexpected_unseen:
            self._unexpected_unseen = False
            self._refuse_unplanned(unexpected_keys or ())
        if layer not in self._plan:
            dtype = stored.dtype if self._keeps_stored_types else param_value.dtype
            value = unquantized(stored, stored_tensors(module)[suffix], param_name, dtype)
            if self._encoder is not None:
                value = self._encoder.encoding.edit(param_name, value)
            place(module, suffix, value, target_device)
        elif self._encoder is None:
            value = matching(stored, stored_tensors(module)[suffix], param_name)
            check_stored_values(stored, param_name, self._plan[layer].weight_bits(self.spec))
            place(module, suffix, value, target_device)
        else:
            encoded = self._encoder.add(layer, suffix, stored.to(target_device))
            if encoded is not None:
                assert isinstance(module, QuantizedLayer)
                place_encoded(module, layer, encoded, target_device)
        self._tick_off(model, param_name)

    def _tick_off(self, model: nn.Module, name: str) -> None:
        """What needs the whole model follows the last tensor: here, because diffusers dispatches the model next."""
        with self._lock:
            if name not in self._outstanding:
                raise QVDError(
                    f"{name} is in more than one file of the checkpoint, or not in its index: the files are of "
                    "different models, download or save it again."
                )
            self._outstanding.discard(name)
            if self._outstanding:
                return
            if self._encoder is not None:
                fit_temporal_layers(model, self.spec)
            share_inputs(model)

    # The loaded model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Write the result into the model's config: what `save_pretrained` then makes loads by itself."""
        if self._leaves_float:
            forget_quantization(model)
            return model
        if self._outstanding:
            names = enumerate_names(self._outstanding)
            raise QVDError(f"{names} never arrived: the checkpoint is incomplete, download or save it again.")
        if self._encoder is not None:
            logger.info("%s: %d layers quantized to int8.", type(model).__name__, len(self._plan))
        self._encoder = None
        self._write_into(model)
        return model

    def adopt(self, model: Any, dtype: torch.dtype) -> None:
        """Make of a model that was quantized in memory, and computes in `dtype`, what loading would have made of it."""
        self.pre_quantized = False
        self._plan, self._dtype = plan_of(model), dtype
        model.is_quantized = True
        model.quantization_method = self.quantization_config.quant_method
        model.hf_quantizer = self
        self._write_into(model)

    def _write_into(self, model: Any) -> None:
        config = self.quantization_config
        config.layers = plan_to_dict(self._plan)
        config.compute_dtype = self._dtype
        config.scales = None
        config.components = None
        # An attribute of the config would be lost on saving; only registered entries are written.
        model.register_to_config(quantization_config=config)
        if config.attention is not None:
            (restore_attention if self.pre_quantized else apply_attention)(model, config.attention)

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What is saved. Raises QVDError for a folder that could not be loaded again."""
        check_savable(state_dict, self._plan)
        return state_dict, {}

    def _dequantize(self, model: Any) -> Any:
        """Back to float layers; the config entry goes, or the saved float model would be taken for a quantized one."""
        refuse_to_dequantize(model)
        dequantize_model(model)
        forget_quantization(model)
        return model


def forget_quantization(model: Any) -> None:
    """Take the entry out of a diffusers model's config, and the marks off the model."""
    entries = {key: value for key, value in model.config.items() if key != "quantization_config"}
    model._internal_dict = FrozenDict(entries)
    model.quantization_method = None
    model.is_quantized = False  # older versions of diffusers forget to


def refuse_image_unet(model: nn.Module) -> None:
    """AnimateDiff makes its video UNet from an image UNet and a motion adapter, when both are loaded."""
    if type(model).__name__ == "UNet2DConditionModel":
        raise QVDError(
            "UNet2DConditionModel is an image model, and QVD quantizes video models. For AnimateDiff, load the "
            "pipeline with its motion_adapter, without quantization_config; then qvd_diffusers.quantize(pipe, config)."
        )


def warn_of_other_settings(calibrated: QuantSpec, wanted: QuantSpec) -> None:
    """Scales work for other settings than they were searched for, only less well; silence would hide that."""
    differing = [name for name in _SEARCHED_FOR if getattr(calibrated, name) != getattr(wanted, name)]
    if differing:
        found = ", ".join(f"{name}={getattr(calibrated, name)!r}" for name in differing)
        logger.warning(
            "These scales were searched for %s, the config asks for something else: calibrate with config=... to get "
            "the scales that are best for it.",
            found,
        )


_SEARCHED_FOR = (
    "weight_bits",
    "activation_bits",
    "activation",
    "shift",
    "scale",
    "range",
    "rotate",
    "temporal_quantizer",
    "portable",
)
