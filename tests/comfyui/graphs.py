"""Small prompts for the test server: a tiny model of each family, sampled by ComfyUI's own nodes."""

from dataclasses import dataclass
from typing import Any

from tests.comfyui.client import Prompt
from tests.comfyui.object_info import recorded

Output = list[Any]  # [node id, slot]


@dataclass(frozen=True)
class TinyModel:
    """How a tiny model of `tiny_files.py` is loaded and what it is fed with."""

    file: str
    width: int = 4096  # channels of a text token
    pooled: int = 0
    masked: bool = False
    latent: str = "EmptyHunyuanLatentVideo"
    vae: str = ""


MODELS = {
    "wan": TinyModel("tiny_wan.safetensors", vae="tiny_wan_vae.safetensors"),
    "wan_low": TinyModel("tiny_wan_low.safetensors", vae="tiny_wan_vae.safetensors"),
    "hunyuan": TinyModel("tiny_hunyuan_video.safetensors", 192, 768, vae="tiny_hunyuan_vae.safetensors"),
    "ltxv": TinyModel("tiny_ltxv.safetensors", 128, masked=True, latent="EmptyLTXVLatentVideo"),
    "flux": TinyModel("tiny_flux.safetensors", 128, 768, latent="EmptyLatentImage"),
}
SIZE = {"width": 96, "height": 96, "length": 9, "batch_size": 1}
CALIBRATION = {"seed": 3, "steps": 4, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
SAMPLING = {**CALIBRATION, "seed": 1}


class Graph:
    """A prompt that grows node by node; equal nodes are one node, as a user would draw them."""

    def __init__(self) -> None:
        self.prompt: Prompt = {}

    def add(self, class_type: str, **inputs: Any) -> Output:
        """The first output of the node; dots in names are written as two underscores."""
        values = {name.replace("__", "."): value for name, value in inputs.items()}
        node = {"class_type": class_type, "inputs": values}
        for key, other in self.prompt.items():
            if other == node:
                return [key, 0]
        key = str(len(self.prompt) + 1)
        self.prompt[key] = node
        return [key, 0]

    def model(self, name: str) -> Output:
        """The float model."""
        if name == "svd":
            return self.add("ImageOnlyCheckpointLoader", ckpt_name="tiny_svd.safetensors")
        return self.add("UNETLoader", unet_name=MODELS[name].file, weight_dtype="default")

    def lora(self, model: Output, strength: float = 0.5) -> Output:
        """With the LoRA of Wan."""
        return self.add(
            "LoraLoaderModelOnly", model=model, lora_name="tiny_wan_lora.safetensors", strength_model=strength
        )

    def text(self, name: str, text: str, tokens: int = 12) -> Output:
        """What the model's text encoder would give."""
        tiny = MODELS[name]
        return self.add(
            "QVDTestConditioning",
            text=text,
            width=tiny.width,
            tokens=tokens,
            pooled_width=tiny.pooled,
            masked=tiny.masked,
        )

    def latent(self, name: str) -> Output:
        """An empty latent of the model's kind."""
        size = SIZE if "Video" in MODELS[name].latent else {key: SIZE[key] for key in SIZE if key != "length"}
        return self.add(MODELS[name].latent, **size)

    def svd_inputs(self) -> tuple[Output, Output, Output]:
        """Positive, negative and latent of SVD, from an image."""
        node = self.add(
            "SVD_img2vid_Conditioning",
            clip_vision=self.add("QVDTestClipVision", width=1024),
            init_image=self.add("QVDTestImage", width=64, height=64, frames=1, noise=0.0),
            vae=[self.model("svd")[0], 2],
            **{
                "width": 64,
                "height": 64,
                "video_frames": 4,
                "motion_bucket_id": 127,
                "fps": 6,
                "augmentation_level": 0.0,
            },
        )
        return node, [node[0], 1], [node[0], 2]

    def sample(self, model: Output, name: str, **settings: Any) -> Output:
        """The stock KSampler with what the named model needs."""
        chosen = SAMPLING | settings
        if name == "svd":
            positive, negative, latent = self.svd_inputs()
            chosen |= {"scheduler": "karras", "cfg": 2.5}
        else:
            positive, negative = self.text(name, "a fox in the snow"), self.text(name, "blurry")
            latent = self.latent(name)
        return self.add("KSampler", model=model, positive=positive, negative=negative, latent_image=latent, **chosen)

    def decode(self, samples: Output, name: str) -> Output:
        """The images of a latent."""
        vae = [self.model("svd")[0], 2] if name == "svd" else self.add("VAELoader", vae_name=MODELS[name].vae)
        return self.add("VAEDecode", samples=samples, vae=vae)

    def save(self, samples: Output, name: str) -> str:
        """Save a latent losslessly as `output/<name>.safetensors`; the node's id."""
        return str(self.add("QVDTestSaveLatent", value=samples, name=name)[0])

    def save_images(self, images: Output, name: str) -> str:
        """Save images losslessly as `output/<name>.safetensors`; the node's id."""
        return str(self.add("QVDTestSaveImages", value=images, name=name)[0])

    def hash(self, model: Output, again: str, after: Output | None = None) -> str:
        """Hash all weights of a MODEL, after another output is there; the node's id."""
        extra = {} if after is None else {"after": after}
        return str(self.add("QVDTestModelHash", model=model, again=again, **extra)[0])

    def quantize(self, model: Output, preset: str = "auto", **inputs: Any) -> Output:
        """QVD Quantize Model."""
        return self.add("QVDQuantizeModel", model=model, preset=preset, **inputs)

    def settings(self, **chosen: Any) -> Output:
        """QVD Quantize Settings: the recorded defaults, and what is chosen."""
        inputs = recorded()["QVDQuantizeSettings"]["inputs"]
        return self.add("QVDQuantizeSettings", **({name: entry["default"] for name, entry in inputs.items()} | chosen))

    def calibrate(self, model: Output, name: str, *texts: str, preset: str = "paper", **settings: Any) -> Output:
        """QVD Calibrate with one positive conditioning for every text; the preset is the one that searches least."""
        chosen: dict[str, Any] = CALIBRATION | {"preset": preset, "use_cache": True} | settings
        if name == "svd":
            positive, negative, latent = self.svd_inputs()
            positives = [positive]
        else:
            positives = [self.text(name, text) for text in texts or ("a river",)]
            negative, latent = self.text(name, "blurry"), self.latent(name)
        chosen |= {f"positive__positive{index}": value for index, value in enumerate(positives)}
        return self.add("QVDCalibrate", model=model, negative=negative, latent_image=latent, **chosen)
