"""The model of a MODEL: a denoiser, its schedule and its latents' format."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Any

import comfy.ops
import torch
from comfy.model_sampling import ModelSamplingDiscreteFlow
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor, nn

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


class ModelType(Enum):
    """What a model predicts; here always the flow."""

    FLOW = 6


class BaseModel(nn.Module):
    """`diffusion_model` is made of the layers that the configuration asks for."""

    def __init__(
        self,
        model_config: Any,
        model_type: ModelType = ModelType.FLOW,
        device: torch.device | None = None,
        unet_model: Callable[..., nn.Module] = nn.Identity,
    ):
        super().__init__()
        self.model_config = model_config
        self.model_type = model_type
        self.latent_format = model_config.latent_format
        self.manual_cast_dtype = model_config.manual_cast_dtype
        self.device = device
        self.current_patcher: ModelPatcher | None = None
        operations = model_config.custom_operations or comfy.ops.disable_weight_init
        self.diffusion_model = unet_model(**model_config.unet_config, device=device, operations=operations)
        self.diffusion_model.requires_grad_(False).eval()
        self.model_sampling = ModelSamplingDiscreteFlow(model_config)

    def get_dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.diffusion_model.dtype  # type: ignore[assignment]
        return dtype

    def apply_model(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 - as in ComfyUI
        **kwargs: Any,
    ) -> Tensor:
        """The denoised latents of `x` at sigma `t`; the wrappers of `transformer_options` are put around it."""
        wrappers = get_all_wrappers(WrappersMP.APPLY_MODEL, transformer_options)
        executor = WrapperExecutor.new_class_executor(self._apply_model, self, wrappers)
        out: Tensor = executor.execute(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        return out

    def _apply_model(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 - as in ComfyUI
        **kwargs: Any,
    ) -> Tensor:
        dtype = self.manual_cast_dtype or self.get_dtype()
        output = self.diffusion_model(
            x.to(dtype),
            self.model_sampling.timestep(t).float(),
            context=None if c_crossattn is None else c_crossattn.to(dtype),
            control=control,
            transformer_options=transformer_options.copy(),
            **kwargs,
        )
        return self.model_sampling._denoised(t, output.float(), x)

    def load_model_weights(self, sd: dict[str, Tensor], unet_prefix: str = "", assign: bool = False) -> BaseModel:
        """Fill the denoiser from entries below a prefix, which are taken out of `sd`; what does not fit is left out."""
        names = [name for name in sd if name.startswith(unet_prefix)]
        own = {name.removeprefix(unet_prefix): sd.pop(name) for name in names}
        own = self.model_config.process_unet_state_dict(own)
        self.diffusion_model.load_state_dict(own, strict=False, assign=assign)
        return self

    def state_dict_for_saving(
        self,
        unet_state_dict: dict[str, Tensor],
        clip_state_dict: dict[str, Tensor] | None = None,
        vae_state_dict: dict[str, Tensor] | None = None,
        clip_vision_state_dict: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """A denoiser's entries as a file names them; other parts of a checkpoint are left out."""
        entries: dict[str, Tensor] = self.model_config.process_unet_state_dict_for_saving(unet_state_dict)
        return entries
