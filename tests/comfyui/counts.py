"""What the tiny models of ComfyUI's classes hold, counted by hand: the tests compare it with what they find."""

from __future__ import annotations

# (int8 layers, temporal layers) of the tiny models, and the name of the family they belong to.
LAYERS = {
    "wan": (2 * (4 + 4 + 2), 1, "Wan"),  # per block: two attentions and the FFN
    "wan-image": (2 * (4 + 6 + 2), 1, "Wan"),
    "wan-reference": (2 * (4 + 6 + 2), 1, "Wan"),
    "wan-causal": (2 * (4 + 4 + 2), 1, "Wan"),
    "wan-camera": (2 * (4 + 6 + 2), 1, "Wan Camera"),
    "wan-vace": (4 * (4 + 4 + 2), 1, "Wan VACE"),  # two blocks of each kind
    "wan-s2v": (2 * (4 + 4 + 2) + 2 * (4 + 1), 1, "Wan S2V"),  # two attentions to the sound, with a modulated norm each
    "wan-humo": (2 * (4 + 4 + 4 + 2), 1, "Wan HuMo"),  # an attention to the sound in each block
    "wan-animate": (5 * (4 + 6 + 2) + 3, 1, "Wan Animate"),  # five blocks, of which one is followed by a face adapter
    "wan-animate2": (2 * (4 + 6 + 2), 1, "Wan Animate 2"),
    "wan-scail": (2 * (4 + 6 + 2), 1, "Wan SCAIL"),
    "wan-scail2": (2 * (4 + 6 + 2), 1, "Wan SCAIL"),
    "wan-dancer": (2 * (4 + 6 + 2) + 2 * 4, 1, "Wan Dancer"),  # two attentions to the music
    # double blocks: per stream qkv, proj, two of the FFN; single blocks: two
    "hunyuan": (2 * 2 * 4 + 2 * 2, 2 * 2 + 2, "HunyuanVideo"),
    "hunyuan-image": (2 * 2 * 4 + 2 * 2, 2 * 2 + 2, "HunyuanVideo"),
    "hunyuan15": (2 * 2 * 4, 2 * 2, "HunyuanVideo"),
    "hunyuan15-sr": (2 * 2 * 4, 2 * 2, "HunyuanVideo"),
    # 8 resnets of two convolutions, in space and in time; 5 shortcuts; 4 transformers of two projections and two blocks
    # of 10 layers, in time with 2 of an FFN in front; 2 samplers
    "svd": (8 * 4 + 5 + 4 * (2 + 10 + 12) + 2, 2 * 8, "Stable Video Diffusion"),
    "sd15": (8 * 2 + 5 + 4 * (2 + 10) + 2, 8, "Stable Diffusion UNet"),
    "sdxl": (8 * 2 + 5 + 4 * (2 + 10) + 2, 8, "Stable Diffusion UNet"),
}

# Tiny models whose temporal features no timestep alone can give, and what else they hold.
MORE_THAN_THE_TIMESTEP = {
    "hunyuan": "pooled text, guidance",
    "hunyuan-image": "pooled text",
    "hunyuan15-sr": "where the step ends",
    "svd": "fps, motion, noise of the image",
    "sdxl": "pooled text, sizes",
}

# How many places there are of each kind where something folds. Absent: nothing of the kind.
PLACES = {
    # per block: two table rows, norm3, two attentions
    "wan": {"table": 4, "norm": 2, "value": 4},
    "wan-image": {"table": 4, "norm": 2, "value": 4},
    "wan-reference": {"table": 4, "norm": 2, "value": 4},
    "wan-causal": {"table": 4, "norm": 2, "value": 4},
    "wan-camera": {"table": 4, "norm": 2, "value": 4},
    "wan-vace": {"table": 8, "norm": 4, "value": 8},
    "wan-s2v": {"table": 4, "norm": 2, "value": 4 + 2},
    "wan-humo": {"table": 4, "norm": 2 + 2, "value": 4 + 2},
    "wan-animate": {"table": 10, "norm": 5, "value": 10},  # keys and values of the face are one linear
    "wan-animate2": {"table": 4, "norm": 2, "value": 2},
    "wan-scail": {"table": 4, "norm": 2, "value": 4},
    "wan-scail2": {"table": 4, "norm": 2, "value": 4},
    "wan-dancer": {"table": 4, "norm": 2, "value": 4 + 2},
    # per double block: two streams with two modulated norms each; per single block: one
    "hunyuan": {"modulation": 2 * 4 + 2},
    "hunyuan-image": {"modulation": 2 * 4 + 2},
    "hunyuan15": {"modulation": 2 * 4},
    "hunyuan15-sr": {"modulation": 2 * 4},
    # 4 transformers, each a spatial block and a temporal one with norm_in and ff_in
    "svd": {"norm": 4 * (1 + 3 + 4), "gate": 4 * (1 + 2), "value": 4 * 2},
    "sd15": {"norm": 4 * 4, "gate": 4, "value": 4},
    "sdxl": {"norm": 4 * 4, "gate": 4, "value": 4},
}
