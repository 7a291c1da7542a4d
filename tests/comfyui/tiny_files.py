"""Writes tiny models with random weights in ComfyUI's own formats, so that its stock loaders take them for real ones.

Run by the interpreter that runs ComfyUI: `python tiny_files.py <checkout> <models folder>`. ComfyUI's own classes name
the keys; this file chooses sizes that its detection can read from them (128 channels per head, 768 pooled channels of
HunyuanVideo, 320 channels of SVD) and weights that keep every activation near one.
"""

import hashlib
import importlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

State = dict[str, torch.Tensor]
WAN_LAYERS, WAN_WIDTH, WAN_HIDDEN = 3, 256, 512
HUNYUAN_WIDTH, HUNYUAN_TEXT = 256, 192
LTXV_TEXT = 128
FLUX_WIDTH, FLUX_TEXT = 256, 128
SVD_CHANNELS = 320

NORM_WORDS = ("norm", "gamma", "in_layers.0", "out_layers.0", "out.0", "head.0")
# The last layer of each denoiser, smaller: with guidance the prediction then has about the size of the noise.
LAST_LAYERS = ("head.head.weight", "final_layer.linear.weight", "out.2.weight", "proj_out.weight")
LAST_SCALE = 0.2


def fill(name: str, tensor: torch.Tensor, seed: str) -> torch.Tensor:
    """Float32 weights of `tensor`'s shape: a matrix keeps the variance, a norm is near one, a bias near zero."""
    number = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number))
    last = name.rsplit(".", 1)[-1]
    if ("modulation" in name and "lin" not in name) or last in {"scale_shift_table", "mix_factor"}:
        return 0.3 * noise
    if last == "bias":
        return 0.02 * noise
    if any(word in name for word in NORM_WORDS) and tensor.squeeze().dim() <= 1:
        return 1 + 0.1 * noise
    if tensor.dim() >= 2:
        return noise / math.sqrt(tensor[0].numel()) * (LAST_SCALE if name in LAST_LAYERS else 1.0)
    return noise


def random_state(module: torch.nn.Module, seed: str) -> State:
    """A full state dict of `module` with weights of its own for every seed."""
    return {name: fill(name, tensor, seed) for name, tensor in module.state_dict().items()}


class Builder:
    """Builds the files with the modules of a ComfyUI checkout."""

    def __init__(self, checkout: Path, folder: Path) -> None:
        sys.path.insert(0, str(checkout))
        importlib.import_module("comfy.cli_args").args.cpu = True
        self.ops = importlib.import_module("comfy.ops").disable_weight_init
        self.folder = folder

    def make(self, module: str, name: str, **arguments: Any) -> torch.nn.Module:
        """An instance without memory of `comfy.<module>.<name>`."""
        factory: Callable[..., torch.nn.Module] = getattr(importlib.import_module(f"comfy.{module}"), name)
        with torch.device("meta"):
            return factory(**arguments)

    def denoiser(self, module: str, name: str, **arguments: Any) -> torch.nn.Module:
        """A denoiser, which ComfyUI builds with layers of its own."""
        return self.make(module, name, operations=self.ops, dtype=torch.float32, device="meta", **arguments)

    def save(
        self, state: State, where: str, *, dtype: torch.dtype = torch.float32, metadata: dict[str, str] | None = None
    ) -> None:
        """Write `state` to `<folder>/<where>`."""
        path = self.folder / where
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.to(dtype).contiguous() for key, value in state.items()}, str(path), metadata)

    def wan(self) -> None:
        """Wan 2.1 text to video, the low-noise expert of a Wan 2.2, its VAE and a LoRA."""
        module = self.denoiser(
            *("ldm.wan.model", "WanModel"), model_type="t2v", dim=WAN_WIDTH, ffn_dim=WAN_HIDDEN, num_layers=WAN_LAYERS,
            num_heads=WAN_WIDTH // 128, freq_dim=256, in_dim=16, out_dim=16, text_dim=4096,
        )  # fmt: skip
        self.save(random_state(module, "wan"), "diffusion_models/tiny_wan.safetensors")
        self.save(random_state(module, "wan low"), "diffusion_models/tiny_wan_low.safetensors")
        arguments = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "temperal_downsample": [False, True, True]}
        vae = self.make("ldm.wan.vae", "WanVAE", dim=16, z_dim=16, **arguments)
        self.save(random_state(vae, "wan vae"), "vae/tiny_wan_vae.safetensors")
        lora = {}
        for layer in (f"blocks.{block}.{part}" for block in range(WAN_LAYERS) for part in ("self_attn.q", "ffn.0")):
            weight = module.get_parameter(f"{layer}.weight")
            for half, shape in (("A", (8, weight.shape[1])), ("B", (weight.shape[0], 8))):
                key = f"diffusion_model.{layer}.lora_{half}.weight"
                lora[key] = fill(key, torch.empty(shape, device="meta"), "lora")
        self.save(lora, "loras/tiny_wan_lora.safetensors")

    def hunyuan(self) -> None:
        """HunyuanVideo with guidance and a pooled text, and a small VAE of its latents."""
        module = self.denoiser(
            *("ldm.hunyuan_video.model", "HunyuanVideo"), in_channels=16, out_channels=16, vec_in_dim=768,
            context_in_dim=HUNYUAN_TEXT, hidden_size=HUNYUAN_WIDTH, mlp_ratio=4.0, num_heads=HUNYUAN_WIDTH // 128,
            depth=2, depth_single_blocks=2, axes_dim=[16, 56, 56], theta=256, patch_size=[1, 2, 2], qkv_bias=True,
            guidance_embed=True, byt5=False, meanflow=False, use_cond_type_embedding=False, vision_in_dim=None,
            meanflow_sum=False,
        )  # fmt: skip
        self.save(random_state(module, "hunyuan"), "diffusion_models/tiny_hunyuan_video.safetensors")
        vae = self.make("taesd.taehv", "TAEHV", latent_channels=16)
        # float16 is what ComfyUI takes for HunyuanVideo's latents in this format.
        self.save(random_state(vae, "hunyuan vae"), "vae/tiny_hunyuan_vae.safetensors", dtype=torch.float16)

    def svd(self) -> None:
        """A checkpoint of SVD's UNet (ComfyUI knows it by its 320 channels) and a small VAE; no image encoder."""
        module = self.denoiser(
            *("ldm.modules.diffusionmodules.openaimodel", "UNetModel"), image_size=32, in_channels=8, out_channels=4,
            model_channels=SVD_CHANNELS, num_res_blocks=[2, 2, 2, 2], channel_mult=[1, 1, 1, 1], num_heads=-1,
            num_head_channels=64, use_spatial_transformer=True, transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
            transformer_depth_output=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], transformer_depth_middle=1,
            use_linear_in_transformer=True, context_dim=1024, num_classes="sequential", adm_in_channels=768,
            extra_ff_mix_layer=True, use_spatial_context=True, merge_strategy="learned_with_images", merge_factor=0.0,
            video_kernel_size=[3, 1, 1], use_temporal_resblock=True, use_temporal_attention=True,
        )  # fmt: skip
        state = {f"model.diffusion_model.{key}": value for key, value in random_state(module, "svd").items()}
        vae = random_state(self.make("taesd.taesd", "TAESD", latent_channels=4), "svd vae")
        vae |= {"vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)}
        state |= {f"first_stage_model.{key}": value for key, value in vae.items()}
        self.save(state, "checkpoints/tiny_svd.safetensors", dtype=torch.float16)

    def ltxv(self) -> None:
        """LTX-Video; its file names the number of heads, which no shape tells."""
        sizes = {"num_attention_heads": 4, "attention_head_dim": 64, "caption_channels": LTXV_TEXT, "num_layers": 2}
        sizes["cross_attention_dim"] = 256
        module = self.denoiser("ldm.lightricks.model", "LTXVModel", **sizes)
        metadata = {"config": json.dumps({"transformer": sizes})}
        self.save(random_state(module, "ltxv"), "diffusion_models/tiny_ltxv.safetensors", metadata=metadata)

    def flux(self) -> None:
        """An image model: Flux."""
        module = self.denoiser(
            *("ldm.flux.model", "Flux"), image_model="flux", in_channels=16, out_channels=16, vec_in_dim=768,
            context_in_dim=FLUX_TEXT, hidden_size=FLUX_WIDTH, mlp_ratio=4.0, num_heads=FLUX_WIDTH // 128, depth=1,
            depth_single_blocks=1, axes_dim=[16, 56, 56], theta=10000, patch_size=2, qkv_bias=True, guidance_embed=True,
            txt_ids_dims=[],
        )  # fmt: skip
        self.save(random_state(module, "flux"), "diffusion_models/tiny_flux.safetensors")

    def bad(self) -> None:
        """Files that no loader should take: a cut one, one that is no safetensors file, one of another kind."""
        whole = (self.folder / "diffusion_models/tiny_wan.safetensors").read_bytes()
        (self.folder / "diffusion_models/bad_cut.safetensors").write_bytes(whole[: len(whole) // 3])
        (self.folder / "diffusion_models/bad_text.safetensors").write_text("this is not a model\n" * 100)
        self.save({"some.weight": torch.ones(8, 8)}, "diffusion_models/bad_unknown.safetensors")
        scales = self.folder / "qvd_scales"
        scales.mkdir(parents=True, exist_ok=True)
        (scales / "bad_text.safetensors").write_text("these are not scales\n" * 100)
        self.save({"some.weight": torch.ones(8, 8)}, "qvd_scales/bad_unknown.safetensors")


def main(checkout: str, folder: str) -> None:
    """Write every file."""
    builder = Builder(Path(checkout), Path(folder))
    for kind in (builder.wan, builder.hunyuan, builder.svd, builder.ltxv, builder.flux, builder.bad):
        kind()
    for path in sorted(Path(folder).rglob("*.safetensors")):
        print(f"{path.relative_to(folder)}  {path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main(*sys.argv[1:])
