"""The command `qvd`: calibrate, quantize, inspect, compare, report. Bad input ends with one line and exit code 2."""

from __future__ import annotations

import argparse
import inspect
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError

from qvd_core.errors import QVDError
from qvd_core.quality import psnr, ssim
from qvd_core.scales import Scales
from qvd_core.spec import Activation, Rounding
from qvd_diffusers import cli_report
from qvd_diffusers.config import COMPUTE_DTYPES, DENOISERS, QVDConfig
from qvd_diffusers.kernels import describe_kernels
from qvd_diffusers.listing import describe, megabytes, read_json, recorded_method, table
from qvd_diffusers.pipeline import calibrate
from qvd_diffusers.samples import as_samples, check_call, check_prompts
from qvd_diffusers.sampling import models_of, sample_all

PRESETS: dict[str, Callable[..., QVDConfig]] = {
    "default": QVDConfig,
    "fast": QVDConfig.fast,
    "best": QVDConfig.best,
    "paper": QVDConfig.paper,
}
# QVDError is a ValueError. Type and assertion errors are how diffusers and torch answer wrong values and devices.
EXPECTED_ERRORS = (OSError, ImportError, ValueError, RuntimeError, TypeError, AssertionError, SafetensorError)
Command = Callable[[argparse.Namespace], None]
PIPELINE = "pipeline"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code. `--help` and misspelled options exit from inside argparse (0 and 2)."""
    options = build_parser().parse_args(arguments)
    try:
        options.run(options)
    except EXPECTED_ERRORS as error:
        # Messages of other packages may run over many lines; the first says what is wrong.
        print(f"qvd {options.command}: {(str(error).strip() or type(error).__name__).splitlines()[0]}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The whole grammar of the command line."""
    parser = argparse.ArgumentParser(prog="qvd", description="int8 quantization for video diffusion pipelines.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = _command(commands, "calibrate", run_calibrate, "sample in full precision and find the scales")
    command.add_argument("pipeline", help="folder or Hub name of a full-precision pipeline")
    _add_sampling(command)
    _add_settings(command)
    command.add_argument("--component", help="which denoiser; default: every denoiser the pipeline has")
    command.add_argument(
        "--low-memory", action="store_true", help="hold the denoiser in int8, read its weights layer by layer from disk"
    )
    command.add_argument("--sensitivity", action="store_true", default=None, help="measure every layer's end effect")
    command.add_argument("--no-cache", action="store_true", help="calibrate anew and keep nothing in the cache")
    command.add_argument("--report", type=Path, metavar="FILE", help="also write the report, e.g. report.html")
    command.add_argument("--out", required=True, type=Path, help="scales file to write, e.g. scales.safetensors")

    command = _command(commands, "quantize", run_quantize, "quantize a pipeline's denoiser and save the pipeline")
    command.add_argument("pipeline", help="folder or Hub name of a full-precision pipeline")
    _add_settings(command)
    command.add_argument("--scales", type=Path, help="what `qvd calibrate` wrote to --out; default: data-free")
    command.add_argument("--component", help="which component to quantize; default: every denoiser")
    command.add_argument("--attention", metavar="NAME", help="auto, or a diffusers attention backend, to record")
    _add_loading(command)
    command.add_argument("--out", required=True, type=Path, help="folder to write; must not exist or be empty")
    command.add_argument("--force", action="store_true", help="replace the folder --out if there is one")

    command = _command(commands, "inspect", run_inspect, "list the layers of a quantized folder or of a scales file")
    command.add_argument("path", type=Path, help="pipeline folder, model folder or scales file")
    command.add_argument("--kernels", action="store_true", help="what would run on this machine, and why, per shape")
    command.add_argument("--device", default="cpu", help="with --kernels: the device to ask for (default: cpu)")

    command = _command(commands, "compare", run_compare, "sample two pipelines from the same noise: PSNR and SSIM")
    command.add_argument("reference", help="folder or Hub name of the full-precision pipeline")
    command.add_argument("quantized", help="folder or Hub name of the quantized pipeline")
    _add_sampling(command)

    command = _command(commands, "report", run_report, "write a page on a quantization: errors, ranges, memory")
    cli_report.add_options(command)
    return parser


def _command(commands: Any, name: str, run: Command, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=f"{summary.capitalize()}.")
    parser.set_defaults(run=run)
    return parser


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="text file with one prompt per line")
    parser.add_argument("--prompt", action="extend", nargs="+", metavar="TEXT", default=[], help="prompts")
    parser.add_argument("--call", type=Path, metavar="FILE", help="JSON file: other arguments of the pipeline call")
    parser.add_argument("--seed", type=int, default=0, help="prompt number i starts from the noise of seed + i")
    _add_loading(parser)


def _add_loading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", choices=list(COMPUTE_DTYPES), default="float32", help="type of what stays in floating point"
    )
    parser.add_argument("--device", default="cpu", help="where to run, e.g. cuda (default: cpu)")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=list(PRESETS), default="default", help="settings to start from")
    parser.add_argument("--weight-bits", type=int, metavar="BITS", help="4 to 8")
    parser.add_argument("--activation-bits", type=int, metavar="BITS", help="4 to 8")
    parser.add_argument("--activation", choices=get_args(Activation), help="activation scales: measured or calibrated")
    parser.add_argument("--rounding", choices=get_args(Rounding), help="how weights are rounded")
    parser.add_argument("--rotate", action="store_true", default=None, help="let the search try rotated channels")
    parser.add_argument("--portable", action="store_true", default=None, help="fold shift and scale into other layers")
    parser.add_argument(
        "--auto-keep",
        type=float,
        metavar="AMOUNT",
        help="keep the most sensitive layers: a share of the weights, or dB",
    )


def run_calibrate(options: argparse.Namespace) -> None:
    """`qvd calibrate`."""
    prompts = read_prompts(options)
    call = read_json(options.call) if options.call else {}
    own = sorted(set(call) & set(inspect.signature(calibrate).parameters))
    if own:
        raise QVDError(f"{options.call} sets {', '.join(own)}: that is an option of `qvd calibrate`, not of the call.")
    config = config_of(options)
    with staging(options.out):
        pass  # sampling takes long: a folder that cannot be written is better known before
    low = {"quantization_config": QVDConfig(backend="weight_only")} if options.low_memory else {}
    pipe = load_pipeline(options.pipeline, options, **low)
    found = calibrate(
        pipe,
        prompts,
        config=config,
        component=options.component,
        weights=options.pipeline if options.low_memory else None,
        seed=options.seed,
        cache=not options.no_cache,
        sensitivity=options.sensitivity,
        report=options.report,
        **call,
    )
    for path, scales in named_files(options.out, found).items():
        scales.save(path)
        summary = scales.summary()
        print(f"{path}: {summary['layers']:.0f} layers and {summary['temporal_layers']:.0f} temporal projections")


def run_quantize(options: argparse.Namespace) -> None:
    """`qvd quantize`."""
    scales = find_files(options.scales) if options.scales else None
    config = config_of(options, scales=scales, components=options.component, attention=options.attention)
    refuse_output(options.out, options.pipeline, options.force)
    refuse_quantized_folder(Path(options.pipeline), [options.component] if options.component else DENOISERS)
    with staging(options.out) as folder:
        quantize_into(folder, config, options)
        if options.out.exists():
            shutil.rmtree(options.out)
        (folder / PIPELINE).replace(options.out)


def quantize_into(folder: Path, config: QVDConfig, options: argparse.Namespace) -> None:
    """Load the pipeline quantized, save it below `folder`, and say what became of each component."""
    pipe = load_pipeline(options.pipeline, options, quantization_config=config)
    models: dict[str, Any] = models_of(pipe)
    quantized = {name: model for name, model in models.items() if getattr(model, "is_quantized", False)}
    if not quantized:
        raise QVDError(f"{options.pipeline} has no component to quantize: it has {', '.join(models)}.")
    pipe.save_pretrained(folder / PIPELINE)
    for name, model in quantized.items():
        layers = model.hf_quantizer.quantization_config.layers
        print(f"{options.out / name}: {len(layers)} int8 layers, {megabytes(bytes_of(model))}")


def run_inspect(options: argparse.Namespace) -> None:
    """`qvd inspect`."""
    print(describe_kernels(options.path, options.device) if options.kernels else describe(options.path))


def run_compare(options: argparse.Namespace) -> None:
    """`qvd compare`."""
    prompts = read_prompts(options)
    call = {"output_type": "np", **(read_json(options.call) if options.call else {})}
    for path in (options.reference, options.quantized):
        check_source(path)
    videos, sizes = [], []
    for path in (options.reference, options.quantized):
        pipe = load_pipeline(path, options)
        check_call(pipe, call)
        runs = sample_all(pipe, as_samples(prompts), options.seed, call, f"Sampling {Path(path).name}", progress=True)
        videos.append([as_video(run) for run in runs])
        sizes.append(sum(bytes_of(model) for name, model in models_of(pipe).items() if name in DENOISERS))
        del pipe  # never both pipelines in memory
    figures = [(psnr(a, b).mean().item(), ssim(a, b).mean().item()) for a, b in zip(*videos, strict=True)]
    means = (sum(column) / len(figures) for column in zip(*figures, strict=True))
    rows = [*zip(prompts, figures, strict=True), ("mean", tuple(means))]
    print(table(("prompt", "PSNR dB", "SSIM"), [(name, f"{pair[0]:.2f}", f"{pair[1]:.4f}") for name, pair in rows]))
    print(f"denoiser: {megabytes(sizes[0])} against {megabytes(sizes[1])} ({sizes[1] / sizes[0]:.2f})")


def run_report(options: argparse.Namespace) -> None:
    """`qvd report`."""
    cli_report.run_report(options, find_files(options.scales) if options.scales else None)


def named_files(out: Path, found: Scales | dict[str, Scales]) -> dict[Path, Scales]:
    """Where the scales go: to `out`, or, of several denoisers, beside each other to `<out's stem>.<component>`."""
    if isinstance(found, Scales):
        return {out: found}
    return {out.with_name(f"{out.stem}.{name}{out.suffix}"): scales for name, scales in found.items()}


def find_files(out: Path) -> Path | dict[str, Path]:
    """The file, or the files of several denoisers by component, that `named_files` named after `out`."""
    several = {name: out.with_name(f"{out.stem}.{name}{out.suffix}") for name in DENOISERS}
    there = {name: path for name, path in several.items() if path.is_file()}
    return there if there and not out.exists() else out


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`, gone at the end. Raises QVDError when none can be made there."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=".qvd-", dir=out.parent)
    except OSError as error:
        raise QVDError(
            f"cannot write to {out.parent}: {error.strerror}; choose a writable folder for --out."
        ) from error
    with temporary as name:
        yield Path(name)


def read_prompts(options: argparse.Namespace) -> list[str]:
    """Prompts from --prompts (blank lines do not count) and --prompt."""
    prompts = list(options.prompt)
    if options.prompts:
        prompts += [line.strip() for line in options.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    return check_prompts(prompts)


def config_of(options: argparse.Namespace, **loading: Any) -> QVDConfig:
    """The preset with the settings that were given."""
    names = ("weight_bits", "activation_bits", "activation", "rounding", "rotate", "portable", "auto_keep")
    given = {name: getattr(options, name) for name in names}
    return PRESETS[options.preset](**{name: value for name, value in given.items() if value is not None}, **loading)


def load_pipeline(name: str, options: argparse.Namespace, **arguments: Any) -> DiffusionPipeline:
    """A pipeline from a folder or from the Hub. Raises QVDError when `name` is neither."""
    check_source(name)
    with warnings.catch_warnings():
        # The old keyword is the one that every supported diffusers understands.
        warnings.filterwarnings("ignore", message=".*torch_dtype.*", category=FutureWarning)
        pipe = DiffusionPipeline.from_pretrained(name, torch_dtype=COMPUTE_DTYPES[options.dtype], **arguments)
    return pipe.to(options.device)


def check_source(name: str) -> None:
    """Raise QVDError when `name` can be neither a pipeline's folder nor its name on the Hub."""
    folder = Path(name)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise QVDError(f"{name} is not a pipeline folder: it has no model_index.json.")
    if not folder.is_dir() and (folder.exists() or not HUB_NAME.fullmatch(name)):
        raise QVDError(f"{name} is neither a pipeline folder nor a name on the Hub (owner/name).")


def refuse_output(out: Path, source: str, force: bool) -> None:
    """Raise QVDError before anything is loaded when the result could not, or should not, be written to `out`."""
    if out.is_file():
        raise QVDError(f"--out {out} is a file: give a folder.")
    if Path(source).exists() and out.resolve() in (Path(source).resolve(), *Path(source).resolve().parents):
        raise QVDError(f"--out {out} would overwrite the pipeline that is read: give another folder.")
    if out.is_dir() and any(out.iterdir()):
        if not force:
            raise QVDError(f"--out {out} is not empty: give another folder, or --force to replace it.")
        if not (out / "model_index.json").is_file():
            raise QVDError(f"--out {out} is not a pipeline folder, --force replaces nothing else: give another folder.")


def refuse_quantized_folder(folder: Path, components: Sequence[str]) -> None:
    """Raise QVDError for a pipeline with a quantized component; diffusers would load it and ignore our settings."""
    for name in components:
        method = recorded_method(folder / name)
        if method is not None:
            raise QVDError(f"{folder / name} is quantized already, by {method}: quantize the full-precision pipeline.")


def as_video(run: Any) -> torch.Tensor:
    """The frames of a pipeline's output as [B, C, T, H, W] in [0, 1]."""
    frames = torch.as_tensor(run.frames)  # [B, T, H, W, C]
    return frames.permute(0, 4, 1, 2, 3).float().clamp(0, 1)


def bytes_of(model: torch.nn.Module) -> int:
    """Bytes of all tensors that are saved with a model."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


if __name__ == "__main__":
    sys.exit(main())
