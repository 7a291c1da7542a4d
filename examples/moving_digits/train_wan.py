"""Train the Wan miniature: a stock `WanPipeline` small enough for one CPU thread.

Three commands, in this order, from the repository root:

    python -m examples.moving_digits.train_wan vae --minutes 15
    python -m examples.moving_digits.train_wan denoiser --minutes 66
    python -m examples.moving_digits.train_wan export

`vae` trains the autoencoder, measures its latents and caches the normalised latents of training clips. `denoiser`
trains the transformer and the text encoder together on that cache. `export` writes the pipeline folder
`examples/moving_digits/wan` from the latest checkpoint, also while the denoiser is still in training.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from examples.moving_digits.data import CANVAS, DIGIT_WORDS, DIRECTION_WORDS, MovingDigits, caption
from examples.moving_digits.training import TrainingOptions, train

FRAMES = 9
LATENT_CHANNELS = 8
TEXT_DIM = 64
TEXT_TOKENS = 16  # every prompt is padded to this many embeddings
SHIFT = 3.0  # the scheduler's time shift, also used for the noise levels in training
CACHED_CLIPS = 4000
CAPTION_DROPOUT = 0.1
VAE_BATCH = 4
DENOISER_BATCH = 16
KL_WEIGHT = 1e-5
L1_WEIGHT = 0.2

PIPELINE_FOLDER = Path(__file__).parent / "wan"
WORK_FOLDER = Path("out/training/wan")
CALL = {
    "height": CANVAS,
    "width": CANVAS,
    "num_frames": FRAMES,
    "num_inference_steps": 10,
    "guidance_scale": 2.0,
    "max_sequence_length": TEXT_TOKENS,
}


# ---------------------------------------------------------------------------------------------------------------------
# The parts of the pipeline
# ---------------------------------------------------------------------------------------------------------------------


def build_vae() -> AutoencoderKLWan:
    """An autoencoder from [B, 3, 9, 32, 32] clips to [B, 8, 5, 8, 8] latents."""
    return AutoencoderKLWan(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        scale_factor_spatial=4,
        scale_factor_temporal=2,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )


def build_transformer() -> WanTransformer3DModel:
    """The denoiser: 80 tokens per clip. Its output layer starts at zero, so training starts from "no change"."""
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=5,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=64,
        ffn_dim=640,
        num_layers=5,
        rope_max_seq_len=32,
    )
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(transformer.patch_embedding.weight.view(transformer.patch_embedding.out_channels, -1))
    nn.init.zeros_(transformer.proj_out.weight)
    return transformer


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, lower-cased, with `</s>` at the end as T5 tokenizers have it."""
    words = ["<pad>", "</s>", "<unk>", "a", "moving", *DIGIT_WORDS, *DIRECTION_WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TEXT_TOKENS,
    )


def build_text_encoder(vocabulary: int) -> UMT5EncoderModel:
    """A two-layer UMT5 encoder, trained with the denoiser."""
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=128,
        num_heads=4,
        num_layers=2,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return UMT5EncoderModel(config)


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Euler steps along the straight path between noise and data."""
    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


# ---------------------------------------------------------------------------------------------------------------------
# Autoencoder
# ---------------------------------------------------------------------------------------------------------------------


def encode(vae: AutoencoderKLWan, video: Tensor) -> DiagonalGaussianDistribution:
    """`vae.encode` in two chunks, the first frame and the rest: the same numbers in fewer, larger operations."""
    vae.clear_cache()
    parts = []
    for chunk in (video[:, :, :1], video[:, :, 1:]):
        vae._enc_conv_idx = [0]
        parts.append(vae.encoder(chunk, feat_cache=vae._enc_feat_map, feat_idx=vae._enc_conv_idx))
    vae.clear_cache()
    return DiagonalGaussianDistribution(vae.quant_conv(torch.cat(parts, dim=2)))


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """`vae.decode` in two chunks and without its clamp to [-1, 1], which would stop gradients."""
    vae.clear_cache()
    latents = vae.post_quant_conv(latents)
    parts = []
    for index, chunk in enumerate((latents[:, :, :1], latents[:, :, 1:])):
        vae._conv_idx = [0]
        parts.append(vae.decoder(chunk, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=index == 0))
    vae.clear_cache()
    return torch.cat(parts, dim=2)


def train_vae(options: TrainingOptions, work: Path) -> None:
    """Train the autoencoder, then write `work/vae` and the latent cache `work/latents.safetensors`."""
    torch.manual_seed(options.seed)
    vae = build_vae()
    digits = MovingDigits("train")

    def loss_of_step(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
        if step % 4:  # cheap steps: short clips cropped around the digit; every fourth step sees whole clips
            video = crop_around_digit(digits.sample(2 * VAE_BATCH, 5, generator).video)
        else:
            video = digits.sample(VAE_BATCH, FRAMES, generator).video
        posterior = encode(vae, video)
        error = decode(vae, posterior.sample(generator)) - video
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).mean()
        return error.square().mean() + L1_WEIGHT * error.abs().mean() + KL_WEIGHT * kl

    steps = train(vae, loss_of_step, options, work / "vae.safetensors", "autoencoder")
    vae.eval()
    print(f"autoencoder: {steps} steps, held-out PSNR {reconstruction_psnr(vae):.1f} dB", flush=True)
    cache_latents(vae, digits, work, options.seed)
    vae.save_pretrained(work / "vae")


def crop_around_digit(video: Tensor, size: int = 24) -> Tensor:
    """The brightest of four corner crops of every clip: [B, 3, T, 32, 32] -> [B, 3, T, size, size]."""
    brightness = nn.functional.avg_pool2d(video.mean(dim=(1, 2)).unsqueeze(1), size, stride=CANVAS - size)
    corners = brightness.flatten(1).argmax(dim=1)
    crops = []
    for clip, corner in zip(video, corners.tolist(), strict=True):
        top, left = (CANVAS - size) * (corner // 2), (CANVAS - size) * (corner % 2)
        crops.append(clip[:, :, top : top + size, left : left + size])
    return torch.stack(crops)


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKLWan, clips: int = 64) -> float:
    """PSNR in dB of reconstructed clips of held-out digits."""
    video = MovingDigits("test").sample(clips, FRAMES, torch.Generator().manual_seed(1)).video
    error = decode(vae, encode(vae, video).mode()).clamp(-1, 1) - video
    return float(10 * torch.log10(4.0 / error.square().mean()))


@torch.no_grad()
def cache_latents(vae: AutoencoderKLWan, digits: MovingDigits, work: Path, seed: int) -> None:
    """Encode training clips, set `latents_mean` and `latents_std` of `vae` from them, and save them normalised."""
    generator = torch.Generator().manual_seed(seed + 1)
    latents, digit, direction = [], [], []
    for _ in tqdm(range(CACHED_CLIPS // 50), desc="latents", mininterval=5):
        clips = digits.sample(50, FRAMES, generator)
        latents.append(encode(vae, clips.video).mode())
        digit.append(clips.digit)
        direction.append(clips.direction)
    stacked = torch.cat(latents)
    mean, std = stacked.mean(dim=(0, 2, 3, 4)), stacked.std(dim=(0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    normalised = (stacked - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)
    cache = {"latents": normalised, "digit": torch.cat(digit), "direction": torch.cat(direction)}
    save_file(cache, work / "latents.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# Denoiser
# ---------------------------------------------------------------------------------------------------------------------


class Denoiser(nn.Module):
    """Transformer, text encoder and tokenizer together: what flow matching trains."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = build_tokenizer()
        self.text_encoder = build_text_encoder(len(self.tokenizer))
        self.transformer = build_transformer()

    def embed(self, captions: list[str]) -> Tensor:
        """Prompt embeddings [B, 16, 64] as `WanPipeline` makes them: zero beyond each prompt's last token."""
        tokens = self.tokenizer(captions, padding="max_length", max_length=TEXT_TOKENS, return_tensors="pt")
        states = self.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        return states * tokens.attention_mask.unsqueeze(-1)

    def forward(self, noisy: Tensor, sigma: Tensor, captions: list[str]) -> Tensor:
        return self.transformer(noisy, sigma * 1000.0, self.embed(captions), return_dict=False)[0]


def draw_sigmas(count: int, generator: torch.Generator) -> Tensor:
    """Noise levels [count] in (0, 1): stratified logit-normal, then shifted as the scheduler shifts its steps."""
    uniform = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    sigma = torch.sigmoid(1.2 * torch.special.ndtri(uniform.clamp(1e-4, 1 - 1e-4)))
    return SHIFT * sigma / (1 + (SHIFT - 1) * sigma)


def train_denoiser(options: TrainingOptions, work: Path) -> None:
    """Train transformer and text encoder on the cached latents; the checkpoint is `work/denoiser.safetensors`."""
    torch.manual_seed(options.seed)
    denoiser = Denoiser()
    cache = load_file(work / "latents.safetensors")

    def loss_of_step(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
        index = torch.randint(len(cache["latents"]), (DENOISER_BATCH,), generator=generator)
        clean = cache["latents"][index]
        dropped = torch.rand(DENOISER_BATCH, generator=generator) < CAPTION_DROPOUT
        labels = zip(cache["digit"][index].tolist(), cache["direction"][index].tolist(), dropped.tolist(), strict=True)
        captions = ["" if drop else caption(digit, direction) for digit, direction, drop in labels]
        sigma = draw_sigmas(DENOISER_BATCH, generator)
        noise = torch.randn(clean.shape, generator=generator)
        level = sigma.view(-1, 1, 1, 1, 1)
        velocity = denoiser(clean + level * (noise - clean), sigma, captions)
        return nn.functional.mse_loss(velocity, noise - clean)

    steps = train(denoiser, loss_of_step, options, work / "denoiser.safetensors", "denoiser")
    print(f"denoiser: {steps} steps")


# ---------------------------------------------------------------------------------------------------------------------
# Export
# ---------------------------------------------------------------------------------------------------------------------


def load_average(module: nn.Module, checkpoint: Path) -> int:
    """Put the EMA weights of a checkpoint of `training.train` into `module`; returns the checkpoint's step."""
    tensors = load_file(checkpoint)
    with torch.no_grad():
        for index, parameter in enumerate(p for p in module.parameters() if p.requires_grad):
            parameter.copy_(tensors[f"average.{index}"])
    return int(tensors["step"])


def export(work: Path, folder: Path) -> None:
    """Write the pipeline folder from the latest checkpoint, through a temporary folder beside it."""
    denoiser = Denoiser()
    step = load_average(denoiser, work / "denoiser.safetensors")
    pipeline = WanPipeline(
        tokenizer=denoiser.tokenizer,
        text_encoder=denoiser.text_encoder.eval(),
        vae=AutoencoderKLWan.from_pretrained(work / "vae"),
        scheduler=build_scheduler(),
        transformer=denoiser.transformer.eval(),
    )
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)
    for config in (partial / "model_index.json", partial / "tokenizer" / "tokenizer_config.json"):
        # transformers 5 writes its new name of this class; transformers 4 and 5 both know the old one
        config.write_text(config.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    (partial / "call.json").write_text(json.dumps(CALL, indent=2) + "\n")
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: step {step}, {size / 2**20:.1f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("vae", "denoiser", "export"))
    parser.add_argument("--work", type=Path, default=WORK_FOLDER, help="checkpoints and cached latents")
    parser.add_argument("--output", type=Path, default=PIPELINE_FOLDER, help="where `export` writes the pipeline")
    TrainingOptions.add_arguments(parser)
    args = parser.parse_args()
    options = TrainingOptions.from_arguments(args)
    torch.set_num_threads(options.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.command == "vae":
        train_vae(options, args.work)
    elif args.command == "denoiser":
        train_denoiser(options, args.work)
    else:
        export(args.work, args.output)


if __name__ == "__main__":
    main()
