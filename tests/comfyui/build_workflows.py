"""Writes the example workflows: `examples/*.json` for the front end, `workflows/*.api.json` for the server.

`python -m tests.comfyui.build_workflows`, after any change here or in a node's inputs (`object_info.json`).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.comfyui.workflow_builder import Node, Workflow

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
TWINS = Path(__file__).resolve().parent / "workflows"

HUB = "https://huggingface.co/"
WAN21 = HUB + "Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files/"
WAN22 = HUB + "Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files/"
HUNYUAN = HUB + "Comfy-Org/HunyuanVideo_repackaged/resolve/main/split_files/"
FLUX_TEXT = HUB + "comfyanonymous/flux_text_encoders/resolve/main/"
SVD = HUB + "stabilityai/stable-video-diffusion-img2vid-xt/resolve/main/"

FOX = "A red fox runs through a snowy pine forest at dawn, powder snow flying, tracking shot, soft morning light"
STREET = "A rainy city street at night, neon signs mirrored in the puddles, people with umbrellas, slow pan"
PAN = "Close-up of hands shaping clay on a potter's wheel, warm workshop light, shallow depth of field"
NEGATIVE = "overexposed, static, blurry, subtitles, still picture, worst quality, low quality, deformed, extra fingers"
WIDE, TEXT = 330, 400


def unet(flow: Workflow, name: str, source: str, title: str = "") -> Node:
    """A stock loader of a float diffusion model."""
    loader = flow.node("UNETLoader", unet_name=name, weight_dtype="default", title=title)
    return flow.models(loader, (name, "diffusion_models", f"{source}diffusion_models/{name}"))


def wan_texts(flow: Workflow) -> tuple[Node, Node]:
    """Text encoder and VAE of Wan 2.1 and 2.2."""
    text, vae = "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "wan_2.1_vae.safetensors"
    clip = flow.node("CLIPLoader", clip_name=text, type="wan", device="default")
    decoder = flow.node("VAELoader", vae_name=vae)
    flow.models(clip, (text, "text_encoders", f"{WAN21}text_encoders/{text}"))
    return clip, flow.models(decoder, (vae, "vae", f"{WAN21}vae/{vae}"))


def prompts(flow: Workflow, clip: Node, *texts: str, negative: str = NEGATIVE) -> tuple[list[Node], Node]:
    """A text encoding for every positive text, and the negative one."""
    positive = [
        flow.node("CLIPTextEncode", clip=clip[0], text=text, title="Positive prompt", color="green") for text in texts
    ]
    return positive, flow.node("CLIPTextEncode", clip=clip[0], text=negative, title="Negative prompt", color="red")


def video(flow: Workflow, samples: Node, vae: Any, prefix: str, fps: float = 16.0) -> Node:
    """Decode and save; returns the decoded images."""
    images = flow.node("VAEDecode", samples=samples[0], vae=vae)
    clip = flow.node("CreateVideo", images=images[0], fps=fps)
    flow.node("SaveVideo", video=clip[0], filename_prefix=f"video/{prefix}", format="auto")
    return images


def sampler(
    flow: Workflow, model: Node, positive: Node, negative: Node, latent: Node, title: str = "", **more: Any
) -> Node:
    """The stock KSampler with Wan's settings."""
    settings = {
        "seed": 42,
        "steps": 30,
        "cfg": 6.0,
        "sampler_name": "uni_pc",
        "scheduler": "simple",
        "denoise": 1.0,
    } | more
    return flow.node(
        "KSampler",
        model=model[0],
        positive=positive[0],
        negative=negative[0],
        latent_image=latent[0],
        title=title,
        **settings,
    )


def wan_quantize(flow: Workflow) -> None:
    """Load, quantize, sample, decode, save."""
    flow.column(WIDE)
    flow.note(
        """
        ## Wan 2.1 in int8

        **QVD Quantize Model** stands between the loader and the sampler: the weights become int8 in memory, nothing
        else changes. LoRA loaders work before and after it.

        - *fast*: no calibration, good quality.
        - *best*, *paper*: connect scales, see the workflow *qvd_wan_calibrate*.

        Load a float file (fp16, bf16), not an fp8 one.
        """,
        300,
    )
    with flow.group("1 - Models"):
        model = unet(flow, "wan2.1_t2v_1.3B_fp16.safetensors", WAN21)
        clip, vae = wan_texts(flow)
    flow.column(TEXT)
    with flow.group("2 - int8", color="#8a6d3b"):
        int8 = flow.node("QVDQuantizeModel", model=model[0], preset="fast")
    with flow.group("3 - Prompt and size"):
        positive, negative = prompts(flow, clip, FOX)
        latent = flow.node("EmptyHunyuanLatentVideo", width=832, height=480, length=33, batch_size=1)
    flow.column(WIDE)
    with flow.group("4 - Sample"):
        shifted = flow.node("ModelSamplingSD3", model=int8[0], shift=8.0)
        samples = sampler(flow, shifted, positive[0], negative, latent)
    flow.column(WIDE + 70)
    with flow.group("5 - Video"):
        video(flow, samples, vae[0], "qvd_wan")


def wan_calibrate(flow: Workflow) -> None:
    """Calibrate, save the scales, quantize with them, compare with the float model, report."""
    flow.column(WIDE)
    flow.note(
        """
        ## Calibrate, compare, report

        **QVD Calibrate** samples with the float model and watches every layer. Use a few prompts like those you will
        write later, with your own steps, sampler and cfg. It runs once: the result is kept on disk and found again
        after a restart.

        **QVD Save Scales** writes a small file for *QVD Load Scales*.

        The right half samples the float and the int8 model with the same seed, compares the frames and writes a
        report. Delete it once you are content.
        """,
        380,
    )
    with flow.group("1 - Models"):
        model = unet(flow, "wan2.1_t2v_1.3B_fp16.safetensors", WAN21)
        clip, vae = wan_texts(flow)
        shifted = flow.node("ModelSamplingSD3", model=model[0], shift=8.0)
    flow.column(TEXT)
    with flow.group("2 - Prompts to calibrate with, and size"):
        positive, negative = prompts(flow, clip, FOX, STREET, PAN)
        latent = flow.node("EmptyHunyuanLatentVideo", width=832, height=480, length=33, batch_size=1)
    flow.column(WIDE + 40)
    with flow.group("3 - Calibrate", color="#8a6d3b"):
        scales = flow.node(
            "QVDCalibrate", model=shifted[0], positive=[node[0] for node in positive], negative=negative[0],
            latent_image=latent[0], seed=1, steps=20, cfg=6.0, sampler_name="uni_pc", scheduler="simple", denoise=1.0,
            preset="best", use_cache=True,
        )  # fmt: skip
        flow.node("QVDSaveScales", scales=scales[0], filename_prefix="qvd_scales/wan2.1_1.3B")
    flow.column(WIDE)
    with flow.group("4 - int8", color="#8a6d3b"):
        int8 = flow.node("QVDQuantizeModel", model=shifted[0], preset="auto", scales=scales[0])
    with flow.group("5 - The same seed twice"):
        quantized = sampler(flow, int8, positive[0], negative, latent, "Sample: int8")
        floating = sampler(flow, shifted, positive[0], negative, latent, "Sample: float")
    flow.column(WIDE)
    with flow.group("6 - Decode, report"):
        test = flow.node("VAEDecode", samples=quantized[0], vae=vae[0], title="Decode: int8")
        reference = flow.node("VAEDecode", samples=floating[0], vae=vae[0], title="Decode: float")
        flow.node("QVDReport", model=int8[0], scales=scales[0], filename_prefix="qvd_report")
    flow.column(WIDE + 130)
    with flow.group("7 - Compare"):
        compared = flow.node("QVDCompare", reference=reference[0], test=test[0], amplify=8.0)
        pair = flow.node("CreateVideo", images=compared[0], fps=16.0)
        flow.node("SaveVideo", video=pair[0], filename_prefix="video/qvd_side_by_side", format="auto")


def wan22_two_experts(flow: Workflow) -> None:
    """Wan 2.2: one calibration run over both experts, scales for each."""
    flow.column(WIDE + 60)
    flow.note(
        """
        ## Wan 2.2 has two models

        The high-noise expert does the first steps, the low-noise expert the rest. **QVD Calibrate Two Experts**
        follows one run through both, switching at *switch_step*, so each gets scales from the steps it will do.

        Keep *switch_step* equal to *end_at_step* of the first sampler.
        """,
        300,
    )
    with flow.group("1 - Models"):
        high = unet(flow, "wan2.2_t2v_high_noise_14B_fp16.safetensors", WAN22, "High-noise expert")
        low = unet(flow, "wan2.2_t2v_low_noise_14B_fp16.safetensors", WAN22, "Low-noise expert")
        clip, vae = wan_texts(flow)
        high = flow.node("ModelSamplingSD3", model=high[0], shift=8.0, title="Shift: high-noise")
        low = flow.node("ModelSamplingSD3", model=low[0], shift=8.0, title="Shift: low-noise")
    flow.column(TEXT)
    with flow.group("2 - Prompts and size"):
        positive, negative = prompts(flow, clip, FOX, STREET)
        latent = flow.node("EmptyHunyuanLatentVideo", width=640, height=640, length=81, batch_size=1)
    flow.column(WIDE + 40)
    with flow.group("3 - Calibrate both", color="#8a6d3b"):
        scales = flow.node(
            "QVDCalibrateTwoExperts", model_high=high[0], model_low=low[0], positive=[node[0] for node in positive],
            negative=negative[0], latent_image=latent[0], seed=1, steps=20, switch_step=10, cfg_high=3.5, cfg_low=3.5,
            sampler_name="euler", scheduler="simple", preset="best", use_cache=True,
        )  # fmt: skip
    with flow.group("4 - int8", color="#8a6d3b"):
        high = flow.node(
            "QVDQuantizeModel", model=high[0], preset="auto", scales=scales[0], title="QVD Quantize: high-noise"
        )
        low = flow.node(
            "QVDQuantizeModel", model=low[0], preset="auto", scales=scales[1], title="QVD Quantize: low-noise"
        )
    flow.column(WIDE)
    shared = {"steps": 20, "cfg": 3.5, "sampler_name": "euler", "scheduler": "simple", "positive": positive[0][0]}
    shared["negative"] = negative[0]
    with flow.group("5 - Sample"):
        first = flow.node(
            "KSamplerAdvanced", model=high[0], add_noise="enable", noise_seed=42, latent_image=latent[0],
            start_at_step=0, end_at_step=10, return_with_leftover_noise="enable", title="Steps 0 to 10", **shared,
        )  # fmt: skip
        second = flow.node(
            "KSamplerAdvanced", model=low[0], add_noise="disable", noise_seed=42, latent_image=first[0],
            start_at_step=10, end_at_step=10000, return_with_leftover_noise="disable",
            title="Steps 10 to the end", **shared,
        )  # fmt: skip
    flow.column(WIDE + 70)
    with flow.group("6 - Video"):
        video(flow, second, vae[0], "qvd_wan22")


def hunyuan_video(flow: Workflow) -> None:
    """HunyuanVideo with the custom sampler and guidance."""
    flow.column(WIDE + 30)
    flow.note(
        """
        ## HunyuanVideo in int8

        **QVD Quantize Model** goes right behind the loader, before the sampling shift, the guider and any LoRA.

        The text is encoded once per prompt, so the text encoders stay as they are.
        """,
        200,
    )
    with flow.group("1 - Models"):
        model = unet(flow, "hunyuan_video_t2v_720p_bf16.safetensors", HUNYUAN)
        first, second = "clip_l.safetensors", "llava_llama3_fp8_scaled.safetensors"
        clip = flow.node("DualCLIPLoader", clip_name1=first, clip_name2=second, type="hunyuan_video", device="default")
        flow.models(
            *(clip, (first, "text_encoders", f"{FLUX_TEXT}{first}")),
            (second, "text_encoders", f"{HUNYUAN}text_encoders/{second}"),
        )
        name = "hunyuan_video_vae_bf16.safetensors"
        vae = flow.models(flow.node("VAELoader", vae_name=name), (name, "vae", f"{HUNYUAN}vae/{name}"))
    flow.column(TEXT)
    with flow.group("2 - int8", color="#8a6d3b"):
        int8 = flow.node("QVDQuantizeModel", model=model[0], preset="fast")
    with flow.group("3 - Prompt and size"):
        positive = flow.node("CLIPTextEncode", clip=clip[0], text=FOX, title="Prompt", color="green")
        guided = flow.node("FluxGuidance", conditioning=positive[0], guidance=6.0)
        latent = flow.node("EmptyHunyuanLatentVideo", width=848, height=480, length=73, batch_size=1)
    flow.column(WIDE)
    with flow.group("4 - Sample"):
        shifted = flow.node("ModelSamplingSD3", model=int8[0], shift=7.0)
        guider = flow.node("BasicGuider", model=shifted[0], conditioning=guided[0])
        kind = flow.node("KSamplerSelect", sampler_name="euler")
        sigmas = flow.node("BasicScheduler", model=int8[0], scheduler="simple", steps=20, denoise=1.0)
        noise = flow.node("RandomNoise", noise_seed=42)
        samples = flow.node(
            "SamplerCustomAdvanced",
            noise=noise[0],
            guider=guider[0],
            sampler=kind[0],
            sigmas=sigmas[0],
            latent_image=latent[0],
        )
    flow.column(WIDE + 70)
    with flow.group("5 - Video"):
        video(flow, samples, vae[0], "qvd_hunyuan", 24.0)


def svd(flow: Workflow) -> None:
    """Stable Video Diffusion: a UNet with temporal layers, from one image."""
    flow.column(WIDE + 30)
    flow.note(
        """
        ## Stable Video Diffusion in int8

        A UNet: its convolutions and its attention layers become int8. The image encoder and the VAE of the checkpoint
        stay as they are.
        """,
        180,
    )
    with flow.group("1 - Model and image"):
        loader = flow.node("ImageOnlyCheckpointLoader", ckpt_name="svd_xt.safetensors")
        flow.models(loader, ("svd_xt.safetensors", "checkpoints", f"{SVD}svd_xt.safetensors"))
        image = flow.node("LoadImage", image="example.png")
    flow.column(WIDE)
    with flow.group("2 - int8", color="#8a6d3b"):
        int8 = flow.node("QVDQuantizeModel", model=loader[0], preset="fast")
    with flow.group("3 - Motion and size"):
        motion = flow.node(
            "SVD_img2vid_Conditioning", clip_vision=loader[1], init_image=image[0], vae=loader[2], width=1024,
            height=576, video_frames=25, motion_bucket_id=127, fps=6, augmentation_level=0.0,
        )  # fmt: skip
    flow.column(WIDE)
    with flow.group("4 - Sample"):
        guided = flow.node("VideoLinearCFGGuidance", model=int8[0], min_cfg=1.0)
        samples = flow.node(
            "KSampler", model=guided[0], positive=motion[0], negative=motion[1], latent_image=motion[2], seed=42,
            steps=20, cfg=2.5, sampler_name="euler", scheduler="karras", denoise=1.0,
        )  # fmt: skip
    flow.column(WIDE + 70)
    with flow.group("5 - Video"):
        video(flow, samples, loader[2], "qvd_svd", 6.0)


def save_and_load(flow: Workflow) -> None:
    """Quantize once, save in both formats, load the file."""
    flow.column(WIDE)
    flow.note(
        """
        ## Quantize once, load int8 from then on

        1. Run as it is: *4 - Save* writes two files to `output/diffusion_models`, which the loaders also list.
        2. Press R (refresh), select the muted nodes, Ctrl+M to unmute them, choose the file, run.

        *QVD* keeps everything QVD knows, calibrated scales too. *ComfyUI int8* is for a ComfyUI **without** this pack:
        the stock Load Diffusion Model opens it, at slightly less accuracy.
        """,
        330,
    )
    with flow.group("1 - Models"):
        model = unet(flow, "wan2.1_t2v_1.3B_fp16.safetensors", WAN21)
        clip, vae = wan_texts(flow)
    flow.column(WIDE + 30)
    with flow.group("2 - int8", color="#8a6d3b"):
        int8 = flow.node("QVDQuantizeModel", model=model[0], preset="fast")
    with flow.group("3 - Prompt and size (for 5)"):
        positive, negative = prompts(flow, clip, FOX)
        latent = flow.node("EmptyHunyuanLatentVideo", width=832, height=480, length=33, batch_size=1)
    flow.column(WIDE + 60)
    with flow.group("4 - Save", color="#8a6d3b"):
        flow.node("QVDSaveCheckpoint", model=int8[0], filename_prefix="diffusion_models/wan2.1_1.3B_qvd", format="QVD")
        portable = "ComfyUI int8 (no pack needed)"
        flow.node(
            "QVDSaveCheckpoint", model=int8[0], filename_prefix="diffusion_models/wan2.1_1.3B_int8", format=portable
        )
    with flow.group("5 - Load (muted: Ctrl+M)"):
        loaded = flow.node("QVDLoadDiffusionModel", unet_name="wan2.1_1.3B_qvd_00001_.safetensors", muted=True)
        shifted = flow.node("ModelSamplingSD3", model=loaded[0], shift=8.0, muted=True)
        samples = sampler(flow, shifted, positive[0], negative, latent, muted=True)
    flow.column(WIDE + 70)
    with flow.group("6 - Video (muted: Ctrl+M)"):
        images = flow.node("VAEDecode", samples=samples[0], vae=vae[0], muted=True)
        clip_ = flow.node("CreateVideo", images=images[0], fps=16.0, muted=True)
        flow.node("SaveVideo", video=clip_[0], filename_prefix="video/qvd_loaded", format="auto", muted=True)


WORKFLOWS: dict[str, Callable[[Workflow], None]] = {
    "qvd_wan_quantize": wan_quantize,
    "qvd_wan_calibrate": wan_calibrate,
    "qvd_wan22_two_experts": wan22_two_experts,
    "qvd_hunyuan_video": hunyuan_video,
    "qvd_svd": svd,
    "qvd_save_and_load": save_and_load,
}


def build(name: str) -> Workflow:
    """The named workflow."""
    flow = Workflow(name)
    WORKFLOWS[name](flow)
    return flow


def text(data: dict[str, Any]) -> str:
    """JSON as the files hold it."""
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Write every file."""
    TWINS.mkdir(exist_ok=True)
    for name in WORKFLOWS:
        flow = build(name)
        (EXAMPLES / f"{name}.json").write_text(text(flow.ui()))
        (TWINS / f"{name}.api.json").write_text(text(flow.api()))


if __name__ == "__main__":
    main()
