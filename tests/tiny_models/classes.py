"""The video model classes of diffusers 0.42.1 and the tiny models of each: the list that coverage is held to."""

from __future__ import annotations

VIDEO_CLASSES: dict[str, tuple[str, ...]] = {
    "WanTransformer3DModel": ("wan", "wan-image"),
    "WanVACETransformer3DModel": ("wan-vace",),
    "WanAnimateTransformer3DModel": ("wan-animate",),
    "WanAnimate2Transformer3DModel": ("wan-animate2",),
    "SkyReelsV2Transformer3DModel": ("skyreels", "skyreels-fps"),
    "ChronoEditTransformer3DModel": ("chronoedit",),
    "AnyFlowTransformer3DModel": ("anyflow",),
    "AnyFlowFARTransformer3DModel": ("anyflow-far",),
    "HeliosTransformer3DModel": ("helios",),
    "HunyuanVideoTransformer3DModel": ("hunyuan", "hunyuan-image"),
    "HunyuanVideo15Transformer3DModel": ("hunyuan15", "hunyuan15-meanflow"),
    "HunyuanVideoFramepackTransformer3DModel": ("framepack",),
    "LTXVideoTransformer3DModel": ("ltx",),
    "LTX2VideoTransformer3DModel": ("ltx2", "ltx2-gated"),
    "CogVideoXTransformer3DModel": ("cogvideox", "cogvideox-ofs"),
    "ConsisIDTransformer3DModel": ("consisid",),
    "MochiTransformer3DModel": ("mochi",),
    "AllegroTransformer3DModel": ("allegro",),
    "LatteTransformer3DModel": ("latte",),
    "EasyAnimateTransformer3DModel": ("easyanimate",),
    "CosmosTransformer3DModel": ("cosmos", "cosmos-image"),
    "Cosmos3OmniTransformer": ("cosmos3", "cosmos3-sound"),
    "CosmosControlNetModel": ("cosmos-control",),
    "Kandinsky5Transformer3DModel": ("kandinsky5",),
    "Kandinsky6Transformer3DModel": ("kandinsky6",),
    "Kandinsky6SRTransformer3DModel": ("kandinsky6-sr",),
    "SanaVideoTransformer3DModel": ("sana-video", "sana-video-guidance"),
    "SanaWMTransformer3DModel": ("sana-wm",),
    "SanaWMLTX2RefinerTransformer3DModel": ("sana-wm-refiner",),
    "MotifVideoTransformer3DModel": ("motif",),
    "MiniMaxH3Transformer3DModel": ("minimax",),
    "JoyImageEditTransformer3DModel": ("joyimage",),
    "UNetSpatioTemporalConditionModel": ("svd",),
    "UNetMotionModel": ("animatediff", "animatediff-linear"),
    "MotionAdapter": ("motion-adapter",),
    "UNet3DConditionModel": ("unet3d",),
    "I2VGenXLUNet": ("i2vgen",),
    "SparseControlNetModel": ("sparse-control", "sparse-control-linear"),
    "TransformerTemporalModel": ("temporal-transformer",),
}
"""Class name to the names of its tiny models; the first one stands for the class in the matrix."""

RELEASED_WITH: dict[str, str] = {"cosmos-image": "Cosmos2_5_PredictBasePipeline"}
"""Tiny model to what came to diffusers together with the options it uses, where its class is older than these."""
