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
    "ltx": (2 * (4 + 4 + 2), 1, "LTX-Video"),
    "ltx-modulated-text": (2 * (4 + 4 + 2), 2, "LTX-Video"),
    "ltx2": (2 * (6 * 4 + 2 * 2), 6, "LTX-2"),  # six attentions and two FFNs
    "ltx2-gated": (2 * (6 * 5 + 2 * 2), 6, "LTX-2"),  # a gate for each attention
    "ltx2-modulated-text": (2 * (6 * 5 + 2 * 2), 8, "LTX-2"),
    "cogvideox": (2 * (4 + 2), 2 * 2, "CogVideoX"),
    "cogvideox15": (2 * (4 + 2), 2 * 2, "CogVideoX"),
    "mochi": (2 * (2 * 2 + 2 * 2) + (2 + 1 + 2), 3 * 2, "Mochi"),  # the last block ends the text stream
    "cosmos": (2 * (4 + 4 + 2), 2 * 6, "Cosmos"),  # three norms with a low-rank modulation
    "cosmos-predict2": (2 * (4 + 4 + 2), 2 * 6, "Cosmos Predict 2"),
    "anima": (2 * (4 + 4 + 2), 2 * 6, "Anima"),
    "kandinsky5": (2 * (4 + 2) + 2 * (4 + 4 + 2), 2 + 2, "Kandinsky 5"),  # text blocks and visual blocks
    "minimax": (2 * (2 + 2) + (2 + 2), 2, "MiniMax-H3"),  # two blocks and one of the refiner
    "minimax-curves": (2 * (2 + 2) + (2 + 2), 2, "MiniMax-H3"),
    # two blocks with layers for each stream, one that shares them, and the last, which ends the text stream
    "seedvr2": (2 * 2 * (2 + 3) + 2 * (2 + 3), 0, "SeedVR2"),
    "seedvr2-gelu": (2 * 2 * (2 + 2) + 2 * (2 + 2), 0, "SeedVR2"),
    "joyimage": (2 * (4 + 4), 1, "JoyImage-Edit"),  # two streams, each a fused qkv, a projection and the FFN
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
    "ltx-modulated-text": "nothing; but the text has an embedding of its own",
    "ltx2": "nothing; but every stream has an embedding of its own",
    "ltx2-gated": "nothing; but every stream has an embedding of its own",
    "ltx2-modulated-text": "nothing; but every stream has an embedding of its own",
    "cogvideox15": "ofs",
    "mochi": "pooled text",
    "cosmos": "nothing; but a low-rank projection reads what another one gives",
    "cosmos-predict2": "nothing; but a low-rank projection reads what another one gives",
    "anima": "nothing; but a low-rank projection reads what another one gives",
    "kandinsky5": "pooled text",
    "minimax": "nothing; but every stream has a timestep of its own",
    "minimax-curves": "nothing; but every stream has a timestep of its own",
    "seedvr2": "nothing is projected",
    "seedvr2-gelu": "nothing is projected",
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
    # its RMSNorms have no affine part, its FFN is a plain GELU; attn2 reads the residual stream, or a modulated norm
    "ltx": {"table": 2 * 2, "value": 2 * 2},
    "ltx-modulated-text": {"table": 2 * (2 + 2), "value": 2 * 2},
    # eight rows of four tables, and two for each of two attentions to the text
    "ltx2": {"table": 2 * 8},
    "ltx2-gated": {"table": 2 * 8},
    "ltx2-modulated-text": {"table": 2 * (8 + 4)},
    "cogvideox": {"modulation": 2 * 2, "value": 2},
    "cogvideox15": {"modulation": 2 * 2, "value": 2},
    "mochi": {"modulation": 3 * 3 + 2},  # the last block has no FFN for the text
    # no linear of their blocks has a bias
    "cosmos": {"value": 2 * 2},
    "cosmos-predict2": {"value": 2 * 2},
    "anima": {"value": 2 * 2},
    # text blocks: two modulated norms, one attention; visual blocks: three and two
    "kandinsky5": {"modulation": 2 * 2 + 2 * 3, "value": 2 + 2 * 2},
    "minimax": {"modulation": 2 * 2, "norm": 2},
    "minimax-curves": {"modulation": 2 * 2, "norm": 2},
    # two blocks with an attention and two FFNs, two with one shared FFN
    "seedvr2": {"table": 2 * (1 + 2) + 2},
    "seedvr2-gelu": {"table": 2 * (1 + 2) + 2},
    "joyimage": {"table": 2 * 4},
    # 4 transformers, each a spatial block and a temporal one with norm_in and ff_in
    "svd": {"norm": 4 * (1 + 3 + 4), "gate": 4 * (1 + 2), "value": 4 * 2},
    "sd15": {"norm": 4 * 4, "gate": 4, "value": 4},
    "sdxl": {"norm": 4 * 4, "gate": 4, "value": 4},
}
