"""What the tiny models hold, counted by hand: the tests of the registry compare it with what they find."""

from __future__ import annotations

# (layers that may go to int8, temporal projections among them) of the tiny models, counted by hand.
LAYER_COUNTS = {
    "wan": (2 * (4 + 4 + 2) + 1, 1),  # per block: two attentions and the FFN
    "wan-image": (2 * (4 + 6 + 2) + 1, 1),
    "wan-vace": (4 * 12 + 1, 1),  # two blocks of each kind
    "wan-animate": (2 * (12 + 4) + 1, 1),  # an attention to the face after each block
    "wan-animate2": (2 * 12 + 1, 1),
    "skyreels": (2 * 10 + 1, 1),
    "skyreels-fps": (2 * 12 + 1, 1),
    "chronoedit": (2 * 12 + 1, 1),
    "anyflow": (2 * 10 + 1, 1),
    "anyflow-far": (2 * 10 + 1, 1),
    "helios": (2 * 10 + 1, 1),
    "hunyuan": (2 * (8 + 4 + 2) + 2 * (3 + 2 + 1), 2 * 2 + 2),  # dual: 8 + 4 and two norms; single: qkv, 2 proj, norm
    "hunyuan-image": (2 * (8 + 4 + 2) + 2 * (3 + 2 + 1), 2 * 2 + 2),
    "framepack": (2 * (8 + 4 + 2) + 2 * (3 + 2 + 1), 2 * 2 + 2),
    "hunyuan15": (2 * (8 + 4 + 2), 2 * 2),
    "hunyuan15-meanflow": (2 * (8 + 4 + 2), 2 * 2),
    "motif": (2 * (8 + 4 + 4 + 2) + 2 * (3 + 2 + 1) + 4, 2 * 2 + 2),  # one single block is a decoder, without text
    "minimax": (2 * (4 + 2 + 1) + 6, 2),
    "joyimage": (2 * (4 + 4) + 1, 1),  # two streams, each a fused qkv, a projection and the FFN
    "ltx": (2 * (4 + 4 + 2) + 1, 1),
    "cogvideox": (2 * (4 + 2 + 2), 2 * 2),
    "cogvideox-ofs": (2 * (4 + 2 + 2), 2 * 2),
    "ltx2": (2 * (6 * 4 + 2 * 2) + 6, 6),  # six attentions and two FFNs
    "ltx2-gated": (2 * (6 * 5 + 2 * 2) + 8, 8),
    "consisid": (2 * (4 + 2 + 2 + 3), 2 * 2),  # after each block an attention to the face
    "easyanimate": ((8 + 4 + 2) + (4 + 2 + 2), 2 * 2),
    "latte": (2 * (4 + 4 + 2) + 2 * (4 + 2) + 1, 1),  # blocks over space and over time
    "allegro": (2 * (4 + 4 + 2) + 1, 1),
    "cosmos": (2 * (4 + 4 + 2 + 6), 2 * 6),  # three norms with a low-rank modulation
    "cosmos-image": (2 * (4 + 7 + 2 + 6), 2 * 6),
    "cosmos-control": (2 * (4 + 7 + 2 + 6), 2 * 6),
    "cosmos3": (2 * (8 + 6), 0),  # the timestep is added to the tokens: nothing is modulated
    "cosmos3-sound": (2 * (8 + 6), 0),
    "kandinsky5": (2 * (4 + 2 + 1) + 2 * (4 + 4 + 2 + 1), 2 + 2),  # text blocks and visual blocks
    "kandinsky6": (
        2 * (4 + 2 + 1) + 2 * (2 * (4 + 4 + 2 + 1) + 2 * (4 + 1)),
        2 + 2 * 4,
    ),  # the same for sound, and both
    "kandinsky6-sr": (2 * (4 + 2 + 1), 2),
    "sana-video": (2 * (4 + 4 + 3) + 1, 1),  # the FFN: two 1x1 convolutions and one over time; the grouped one stays
    "sana-video-guidance": (2 * (4 + 4 + 3) + 1, 1),
    "sana-wm": (2 * (7 + 3 + 3) + 1, 1),
    "sana-wm-refiner": (2 * (6 * 5 + 2 * 2) + 1, 1),
    "mochi": (2 * (8 + 4 + 2) + (7 + 2 + 2), 3 * 2),  # the last block ends the text stream
    # 8 resnets of two convolutions and a projection, 5 shortcuts; 11 transformers: 2 proj, 8 attention, 2 ff; samplers
    "animatediff": (8 * 3 + 5 + 11 * 12 + 2, 8),
    "animatediff-linear": (8 * 3 + 5 + 11 * 12 + 2, 8),
    # the same resnets with one more projection each (Conv3d stays); 4 transformers of a spatial and a temporal block
    "svd": (8 * 6 + 5 + 4 * (2 + 10 + 12) + 2, 16),
    # 8 resnets, each with four convolutions over time; 5 shortcuts; 4 transformers over space and 4 over time; samplers
    "unet3d": (8 * (3 + 4) + 5 + 8 * 12 + 2, 8),
    "i2vgen": (8 * (3 + 4) + 5 + 8 * 12 + 2, 8),
    "motion-adapter": (4 * 12, 0),
    # 4 resnets, a shortcut and a sampler; 2 transformers, 2 motion modules of one attention
    "sparse-control": (4 * 3 + 1 + 1 + 2 * 12 + 2 * 8, 4),
    "sparse-control-linear": (4 * 3 + 1 + 1 + 2 * 12 + 2 * 8, 4),
    "temporal-transformer": (2 * (8 + 2), 0),
}

# Tiny models whose temporal features no timestep alone can give, and what else they hold.
MORE_THAN_THE_TIMESTEP = {
    "anyflow": "where the step ends",
    "anyflow-far": "where the step ends",
    "hunyuan": "pooled text, guidance",
    "hunyuan-image": "pooled text, guidance",
    "framepack": "pooled text, guidance",
    "hunyuan15-meanflow": "where the step ends",
    "minimax": "nothing; but its timesteps lie in [0, 1]",
    "ltx2": "nothing; but every stream has an embedding of its own",
    "ltx2-gated": "nothing; but every stream has an embedding of its own",
    "cogvideox-ofs": "ofs",
    "cosmos": "nothing; but a low-rank projection reads what another one gives",
    "cosmos-image": "nothing; but a low-rank projection reads what another one gives",
    "cosmos-control": "nothing; but a low-rank projection reads what another one gives",
    "cosmos3": "nothing is projected",
    "cosmos3-sound": "nothing is projected",
    "kandinsky5": "pooled text",
    "kandinsky6": "pooled text",
    "kandinsky6-sr": "nothing; but a trained bias, which is no module",
    "sana-video-guidance": "guidance",
    "mochi": "pooled text",
    "svd": "fps, motion, noise of the image",
    "i2vgen": "fps",
    "motion-adapter": "nothing is projected",
    "temporal-transformer": "nothing is projected",
}

# How many places there are of each kind in the tiny models. Absent: nothing of the kind, and why.
PLACES = {
    # per block: two table rows, norm2, two attentions; its FFN is a plain GELU, not gated
    "wan": {"table": 4, "norm": 2, "value": 4},
    "wan-image": {"table": 4, "norm": 2, "value": 4},
    "wan-vace": {"table": 8, "norm": 4, "value": 8},
    "wan-animate": {"table": 4, "norm": 2, "value": 4 + 2},
    "wan-animate2": {"table": 4, "norm": 2, "value": 4},
    "skyreels": {"table": 4, "norm": 2, "value": 4},
    "skyreels-fps": {"table": 4, "norm": 2, "value": 4},
    "chronoedit": {"table": 4, "norm": 2, "value": 4},
    "anyflow": {"table": 4, "norm": 2, "value": 4},
    "anyflow-far": {"table": 4, "norm": 2, "value": 4},
    "helios": {"table": 4, "norm": 2, "value": 4},
    # per dual block: two streams with two modulated norms each; per single block: one, and half of proj_out
    "hunyuan": {"modulation": 2 * 4 + 2, "value": 2 + 2},
    "hunyuan-image": {"modulation": 2 * 4 + 2, "value": 2 + 2},
    "framepack": {"modulation": 2 * 4 + 2, "value": 2 + 2},
    "hunyuan15": {"modulation": 2 * 4, "value": 2},
    "hunyuan15-meanflow": {"modulation": 2 * 4, "value": 2},
    # two attentions per block; the decoder block has one, and a single block's joint attention feeds another layer
    "motif": {"modulation": 2 * 4 + 2, "value": 2 * 2 + 1},
    # two blocks and one refiner block
    "minimax": {"modulation": 2 * 2, "norm": 2, "gate": 3, "value": 3},
    "joyimage": {"table": 2 * 4},
    # its RMSNorms have no affine part, its FFN is a plain GELU, attn2 reads the residual stream
    "ltx": {"table": 4, "value": 4},
    # four tables, of which the queries and the keys read different rows; behind gated attentions nothing folds
    "ltx2": {"table": 2 * 8},
    "ltx2-gated": {"table": 2 * 8},
    # its affine LayerNorms are modulated afterwards: the modulation takes it all
    "cogvideox": {"modulation": 4, "value": 2},
    "cogvideox-ofs": {"modulation": 4, "value": 2},
    "consisid": {"modulation": 4, "value": 2, "norm": 2 * 2},  # two norms before the attention to the face
    "easyanimate": {"modulation": 2, "value": 1},  # the text of the one block that has layers for it
    "latte": {"table": 4 + 4, "value": 4 + 2},  # spatial blocks and temporal ones
    "allegro": {"table": 4, "value": 4},
    # no linear of their blocks has a bias
    "cosmos": {"value": 4},
    "cosmos-image": {"value": 4},
    "cosmos-control": {"value": 4},
    # two towers of two RMSNorms; fewer value heads than query heads
    "cosmos3": {"norm": 2 * 4},
    "cosmos3-sound": {"norm": 2 * 4},
    # text blocks: two modulated norms, one attention; visual blocks: three and two
    "kandinsky5": {"modulation": 2 * 2 + 2 * 3, "value": 2 + 2 * 2},
    # the same for video and sound, and in every visual block an attention from each to the other
    "kandinsky6": {"modulation": 2 * 2 + 2 * (2 * 3 + 2), "value": 2 + 2 * (2 * 2 + 2)},
    "kandinsky6-sr": {"modulation": 2 * 2, "value": 2},
    "sana-video": {"table": 2 * 2, "value": 2},
    "sana-video-guidance": {"table": 2 * 2, "value": 2},
    "sana-wm": {"table": 2},
    "sana-wm-refiner": {"table": 2 * 8},
    # three blocks; the last has no context FFN
    "mochi": {"modulation": 3 * 3 + 2, "gate": 3 + 2, "value": 3},
    # 4 spatial, 7 motion transformers: norm, norm1-3, attn1-2, ff; no modulated norms
    "animatediff": {"norm": 11 * 4, "gate": 11, "value": 11 * 2},
    "animatediff-linear": {"norm": 11 * 4, "gate": 11, "value": 11 * 2},
    # 4 transformers, each a spatial block and a temporal one with norm_in and ff_in
    "svd": {"norm": 4 * (1 + 3 + 4), "gate": 4 * (1 + 2), "value": 4 * 4},
    # 4 transformers over space, 4 over time
    "unet3d": {"norm": 8 * 4, "gate": 8, "value": 8 * 2},
    "i2vgen": {"norm": 8 * 4, "gate": 8, "value": 8 * 2},
    "motion-adapter": {"norm": 4 * 4, "gate": 4, "value": 4 * 2},
    # 2 spatial transformers, 2 motion modules of one attention
    "sparse-control": {"norm": 2 * 4 + 2 * 3, "gate": 2 + 2, "value": 2 * 2 + 2},
    "sparse-control-linear": {"norm": 2 * 4 + 2 * 3, "gate": 2 + 2, "value": 2 * 2 + 2},
    "temporal-transformer": {"norm": 2 * 3, "gate": 2, "value": 2 * 2},
}
