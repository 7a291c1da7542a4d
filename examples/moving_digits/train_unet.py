"""Train the UNet miniature: a stock `AnimateDiffPipeline` that draws moving digits.

Three stages, each of which reads what the one before left in the work folder (`--work`):

    python -m examples.moving_digits.train_unet vae --minutes 6.5
    python -m examples.moving_digits.train_unet denoiser --minutes 100
    python -m examples.moving_digits.train_unet export
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AnimateDiffPipeline, AutoencoderKL, DDIMScheduler, UNetMotionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from examples.moving_digits.data import CANVAS, MovingDigits, all_captions
from examples.moving_digits.training import TrainingOptions, train

MODEL_FOLDER = Path(__file__).with_name("unet")
FRAMES = 8
TOKENS = 8  # "<start> a seven moving left <end>" is six tokens
TEXT_WIDTH = 64
WORD_DEVIATION = 0.1  # of the initial token embeddings
LATENT_CHANNELS = 4
KL_WEIGHT = 2e-4  # small: the latents should reconstruct first and be smooth second
BATCH = 16
TRAINING_CLIPS = 6000
TIMESTEPS = 1000
NOISIEST = 0.1  # the share of the noise levels that half of every batch is drawn from
CAPTION_DROPOUT = 0.1  # the share of captions replaced by "", which guidance needs
# The arguments of a pipeline call beside prompt and generator; the negative prompt is "" unless given.
CALL: dict[str, Any] = {
    "height": CANVAS,
    "width": CANVAS,
    "num_frames": FRAMES,
    "num_inference_steps": 12,
    "guidance_scale": 3.0,
}


def build_vae() -> AutoencoderKL:
    """A stock image autoencoder with spatial factor 4: a 32x32 frame becomes latents [4, 8, 8]."""
    channels = (16, 32, 48)
    return AutoencoderKL(
        sample_size=CANVAS,
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        scaling_factor=1.0,
    )


def build_unet() -> UNetMotionModel:
    """A stock UNet with temporal layers, two levels deep."""
    channels = (32, 64)
    return UNetMotionModel(
        sample_size=CANVAS // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlockMotion",) * len(channels),
        up_block_types=("CrossAttnUpBlockMotion",) * len(channels),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=TEXT_WIDTH,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        motion_max_seq_length=FRAMES,
    )


def build_scheduler() -> DDIMScheduler:
    """v-prediction on cosine betas whose last step is pure noise (zero terminal signal-to-noise ratio)."""
    return DDIMScheduler(
        num_train_timesteps=TIMESTEPS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose merges build every caption word as one token, letter by letter."""
    words = sorted({word for caption in all_captions() for word in caption.split()})
    letters = sorted(set("".join(words)))
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in words:
        built, *rest = [*word[:-1], word[-1] + "</w>"]
        for piece in rest:
            merges.append((built, piece))
            built += piece
            tokens.append(built)
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=list(dict.fromkeys(merges)), model_max_length=TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers of a CLIP text model; it is trained together with the denoiser."""
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # Words start well apart: from CLIP's deviation of 0.02, "left" and "right" merged before the UNet told them apart.
    nn.init.normal_(text_encoder.get_input_embeddings().weight, std=WORD_DEVIATION)
    return text_encoder


def build_denoiser(tokenizer: CLIPTokenizer) -> nn.ModuleDict:
    """What the second stage trains: the UNet and the text encoder."""
    return nn.ModuleDict({"unet": build_unet(), "text_encoder": build_text_encoder(tokenizer)})


def seeded(seed: int, step: int) -> torch.Generator:
    """One generator per training step, so that a resumed run sees fresh data."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def frames_of(video: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B * T, C, H, W]."""
    return video.transpose(1, 2).flatten(0, 1)


def train_vae(work: Path, options: TrainingOptions) -> None:
    """Train the autoencoder on single frames, normalise its latents, save it to `work/vae`."""
    torch.manual_seed(options.seed)
    vae = build_vae().train()
    digits = MovingDigits("train")

    def loss_of_step(step: int) -> Tensor:
        generator = seeded(options.seed, step)
        images = frames_of(digits.sample(8, frames=2, generator=generator).video)
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        return F.mse_loss(decoded, images) + 0.1 * F.l1_loss(decoded, images) + KL_WEIGHT * posterior.kl().mean() / 256

    steps = train(vae, loss_of_step, options, work / "vae.safetensors", "vae")
    normalise_latents(vae, digits)
    vae.eval().save_pretrained(work / "vae")
    images = frames_of(MovingDigits("test").sample(256, frames=1, generator=seeded(1, 0)).video)
    with torch.no_grad():
        decoded = vae.decode(vae.encode(images).latent_dist.mode()).sample
    error = F.mse_loss(decoded.clamp(-1, 1), images)
    print(f"vae: {steps} steps, held-out PSNR {10 * torch.log10(4.0 / error):.2f} dB")


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, digits: MovingDigits) -> None:
    """Give every latent channel zero mean and unit deviation by folding the change into the two 1x1 convolutions.

    `AnimateDiffPipeline` knows a scaling factor but no shift; after folding, neither is needed (the factor stays 1).
    """
    images = frames_of(digits.sample(512, frames=4, generator=seeded(2, 0)).video)
    latents = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in images.split(256)])
    mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    quant, post_quant = vae.quant_conv, vae.post_quant_conv
    quant.weight[:LATENT_CHANNELS] /= deviation[:, None, None, None]
    quant.bias[:LATENT_CHANNELS] = (quant.bias[:LATENT_CHANNELS] - mean) / deviation
    quant.bias[LATENT_CHANNELS:] -= 2.0 * deviation.log()  # the posterior's log-variance
    post_quant.bias += post_quant.weight[:, :, 0, 0] @ mean
    post_quant.weight *= deviation[None, :, None, None]


def load_latents(work: Path, vae: AutoencoderKL) -> dict[str, Tensor]:
    """Latents [N, 4, 8, 8, 8] of training clips and the index of each clip's caption, encoded once and cached."""
    path = work / "latents.safetensors"
    if not path.exists():
        clips = MovingDigits("train").sample(TRAINING_CLIPS, FRAMES, seeded(3, 0))
        with torch.no_grad():
            encoded = [vae.encode(frames_of(part)).latent_dist.mode() for part in clips.video.split(BATCH)]
        latents = torch.cat(encoded).unflatten(0, (-1, FRAMES)).transpose(1, 2).contiguous()
        captions = torch.tensor([all_captions().index(text) for text in clips.captions])
        save_file({"latents": latents, "caption": captions}, path)
    return load_file(path)


def token_table(tokenizer: CLIPTokenizer) -> Tensor:
    """Token ids [41, TOKENS] of all captions and, last, of the empty one, padded as the pipeline pads them."""
    texts = [*all_captions(), ""]
    encoded = tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    return encoded.input_ids


def draw_timesteps(generator: torch.Generator) -> Tensor:
    """Half of the batch spread evenly over all noise levels, half over the noisiest `NOISIEST` share of them.

    Which way a digit moves is decided there, where the clip is all but noise: a level seen rarely is learned late.
    """
    even = torch.arange(BATCH // 2) + torch.rand(2, BATCH // 2, generator=generator)
    anywhere, noisiest = even / (BATCH // 2)
    share = torch.cat([anywhere, 1.0 - NOISIEST * noisiest])
    return (share * TIMESTEPS).long().clamp(max=TIMESTEPS - 1)


def train_denoiser(work: Path, options: TrainingOptions) -> None:
    """Train UNet and text encoder on cached latents; `work/denoiser.safetensors` keeps their running average."""
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    tokenizer, scheduler = build_tokenizer(), build_scheduler()
    model = build_denoiser(tokenizer).train()
    data = load_latents(work, AutoencoderKL.from_pretrained(work / "vae"))
    tokens = token_table(tokenizer)

    def loss_of_step(step: int) -> Tensor:
        generator = seeded(options.seed, step)
        chosen = torch.randint(len(data["latents"]), (BATCH,), generator=generator)
        latents, caption = data["latents"][chosen], data["caption"][chosen]
        dropped = torch.rand(BATCH, generator=generator) < CAPTION_DROPOUT
        text = model["text_encoder"](tokens[caption.masked_fill(dropped, len(tokens) - 1)])[0]
        timestep = draw_timesteps(generator)
        noise = torch.randn(latents.shape, generator=generator)
        noisy = scheduler.add_noise(latents, noise, timestep)
        predicted = model["unet"](noisy, timestep, text.repeat_interleave(FRAMES, dim=0)).sample
        return F.mse_loss(predicted, scheduler.get_velocity(latents, noise, timestep))

    steps = train(model, loss_of_step, options, work / "denoiser.safetensors", "denoiser")
    print(f"denoiser: {steps} steps")


def load_pipeline(work: Path) -> AnimateDiffPipeline:
    """The stock pipeline with the averaged weights of the latest checkpoint, also while training goes on."""
    tokenizer = build_tokenizer()
    model = build_denoiser(tokenizer).eval()
    checkpoint = load_file(work / "denoiser.safetensors")
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(checkpoint[f"average.{index}"])
    print(f"checkpoint: step {int(checkpoint['step'])}, {float(checkpoint['spent']) / 60:.1f} minutes")
    return AnimateDiffPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae"),
        text_encoder=model["text_encoder"],
        tokenizer=tokenizer,
        unet=model["unet"],
        motion_adapter=None,
        scheduler=build_scheduler(),
    )


def export(work: Path, folder: Path = MODEL_FOLDER) -> None:
    """Write the pipeline and `call.json` to `folder`: into a temporary folder first, then swapped in."""
    fresh, stale = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (fresh, stale):
        shutil.rmtree(leftover, ignore_errors=True)
    load_pipeline(work).save_pretrained(fresh)
    (fresh / "call.json").write_text(json.dumps(CALL, indent=2) + "\n")
    if (folder / "README.md").exists():
        shutil.copy(folder / "README.md", fresh)
    if folder.exists():
        folder.rename(stale)
    fresh.rename(folder)
    shutil.rmtree(stale, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("vae", "denoiser", "export"))
    parser.add_argument("--work", type=Path, default=Path("out/training/unet"))
    TrainingOptions.add_arguments(parser, minutes=6)
    args = parser.parse_args()
    if args.stage == "vae":
        train_vae(args.work, TrainingOptions.from_arguments(args))
    elif args.stage == "denoiser":
        train_denoiser(args.work, TrainingOptions.from_arguments(args))
    else:
        export(args.work)


if __name__ == "__main__":
    main()
