"""What loading costs: peak memory and time of every way to load one large checkpoint, each in a process of its own.

    python -m benchmarks.loading            # writes a 1.2 GB Wan transformer with random weights, loads it, reports

The files stay in the page cache, so that the time is the loader's and not the disk's. What is compared runs in turn,
round after round; quoted are medians over rounds, and for times also the median quotient within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from benchmarks import machine
from benchmarks.kernel_results import write_json
from benchmarks.kernel_tables import table_line
from benchmarks.model_speed import SIZES
from qvd_diffusers import QVDConfig

FORMAT = 1
MEGABYTE = 1e6
PLAIN = "plain"
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    PLAIN: ("fp16", {}),
    "quantize": ("fp16", {"quantize": True}),
    "plain, shards": ("fp16-shards", {}),
    "quantize, shards": ("fp16-shards", {"quantize": True}),
    "plain, one type": ("fp16", {"dtype": "float16"}),
    "quantize, one type": ("fp16", {"quantize": True, "dtype": "float16"}),
    "reload int8": ("int8", {}),
}
"""Name of each way: the folder it reads, and how; the type is bfloat16 where none is named."""

_MEANING = {
    PLAIN: "float16 file to bfloat16, no quantization",
    "quantize": "the same, with `QVDConfig()`",
    "plain, shards": "as `plain`, from five shards",
    "quantize, shards": "as `quantize`, from five shards",
    "plain, one type": "float16 file to float16",
    "quantize, one type": "the same, with `QVDConfig()`",
    "reload int8": "the saved int8 model",
}
_BASELINES = {"quantize": PLAIN, "quantize, shards": "plain, shards", "quantize, one type": "plain, one type"}
_BASELINES["reload int8"] = PLAIN
_SAMPLING_SECONDS = 0.005


def write_checkpoints(folder: Path, size: str, layers: int | None) -> None:
    """Write the fp16 model whole and in five shards, and the int8 one; what is there already stays."""
    if (folder / "int8").exists():
        return
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    try:
        model = WanTransformer3DModel(**SIZES[size] | ({"num_layers": layers} if layers else {}))
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder / "fp16", max_shard_size="100GB")
    total = sum(path.stat().st_size for path in (folder / "fp16").glob("*.safetensors"))
    model.save_pretrained(folder / "fp16-shards", max_shard_size=total // 5 + 2**20)
    del model
    quantized = load(folder / "fp16", quantize=True)
    quantized.save_pretrained(folder / "int8", max_shard_size="100GB")


def load(folder: Path, quantize: bool = False, dtype: str = "bfloat16") -> Any:
    """The transformer in `folder`, through the public API."""
    config = {"quantization_config": QVDConfig()} if quantize else {}
    return WanTransformer3DModel.from_pretrained(folder, torch_dtype=getattr(torch, dtype), **config)


def child(folder: Path, arguments: Mapping[str, Any]) -> dict[str, float]:
    """Load once in this process; seconds and the process's memory in bytes, before and at its peak."""
    before = _memory()
    start = time.perf_counter()
    cpu = time.process_time()
    model = load(folder, **arguments)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    after = _memory()
    held = sum(tensor.nbytes for tensor in model.state_dict().values())
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "before": before["VmRSS"],
        "peak": after["VmHWM"],
        "after": after["VmRSS"],
        "held": held,
    }


def _memory(process: str = "self") -> dict[str, int]:
    """Memory of a process in bytes, by the kernel's names; empty when it is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split() for line in lines if line.startswith(("VmHWM", "VmRSS", "RssAnon", "RssFile")))
    return {name.rstrip(":"): int(value) * 1024 for name, value, *_ in pairs}


def run_child(root: Path, way: str, threads: int) -> dict[str, float]:
    """Load in a new process, watched from here for the largest anonymous and file-backed memory."""
    folder, arguments = WAYS[way]
    command = [sys.executable, "-m", "benchmarks.loading", "--child", str(root / folder), json.dumps(arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    peaks = {"RssAnon": 0, "RssFile": 0}

    def watch() -> None:
        while process.poll() is None:
            for name, value in _memory(str(process.pid)).items():
                if name in peaks:
                    peaks[name] = max(peaks[name], value)
            time.sleep(_SAMPLING_SECONDS)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"loading {way} failed with exit code {process.returncode}")
    figures: dict[str, float] = json.loads(output.splitlines()[-1])
    return figures | {"peak_anonymous": peaks["RssAnon"], "peak_file": peaks["RssFile"]}


def measure(root: Path, ways: Sequence[str], rounds: int, threads: int) -> dict[str, dict[str, float]]:
    """Medians over `rounds` of every way, and how its time compares with its baseline within one round."""
    samples: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            samples[way].append(run_child(root, way, threads))
            print(way, {name: round(value, 3) for name, value in samples[way][-1].items()}, file=sys.stderr)
    figures: dict[str, dict[str, float]] = {}
    for way, own in samples.items():
        figures[way] = {name: statistics.median(sample[name] for sample in own) for name in own[0]}
        figures[way]["file"] = sum(path.stat().st_size for path in (root / WAYS[way][0]).glob("*.safetensors"))
        base = samples.get(_BASELINES.get(way, ""))
        if base:
            pairs = zip(own, base, strict=True)
            figures[way]["times_plain"] = statistics.median(mine["seconds"] / its["seconds"] for mine, its in pairs)
    return figures


def markdown(known: Mapping[str, str], figures: Mapping[str, Mapping[str, float]], goal: float) -> str:
    """The report. `goal`: bytes that the peak while quantizing shall not pass."""
    columns = ("way", "what", "file (MB)", "peak RSS", "anonymous", "file pages", "tensors", "s", "× plain")
    lines = [
        "# Loading a large checkpoint",
        "",
        "A Wan transformer with random weights, each load in a new process that has imported everything already; files",
        "in the page cache. Memory in MB (10⁶ bytes): peak RSS of the whole process, of it the largest anonymous and",
        "file-backed parts, and the loaded tensors. `× plain`: median quotient of the times within a round.",
        "",
        f"Goal: quantizing while loading peaks at no more than 0.55 × the fp16 file + 1 GB = {goal / MEGABYTE:.0f} MB",
        "and takes no more than 1.5 × a plain load.",
        "",
        "Measured with " + ", ".join(f"{name} {value}" for name, value in known.items()) + ".",
        "",
        table_line(columns),
        table_line(["---"] * len(columns)),
    ]
    sizes = ("file", "peak", "peak_anonymous", "peak_file", "held")
    for way, values in figures.items():
        ratio = f"{values['times_plain']:.2f}" if "times_plain" in values else "-"
        cells = [f"{values[name] / MEGABYTE:.0f}" for name in sizes]
        lines.append(table_line([way, _MEANING[way], *cells, f"{values['seconds']:.2f}", ratio]))
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--size", choices=SIZES, default="1.3b", help="which Wan model")
    result.add_argument("--layers", type=int, default=12, help="how many blocks of it")
    result.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="what to measure")
    result.add_argument("--rounds", type=int, default=5, help="loads of each")
    result.add_argument("--threads", type=int, default=2, help="threads of PyTorch")
    result.add_argument("--work", type=Path, default=Path("out/loading"), help="folder of the checkpoints")
    result.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the report")
    result.add_argument("--child", nargs=2, metavar=("FOLDER", "ARGUMENTS"), help="load once and print the figures")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and report, or, as a child, load once."""
    options = parser().parse_args(argv)
    if options.child:
        print(json.dumps(child(Path(options.child[0]), json.loads(options.child[1]))))
        return
    torch.set_num_threads(options.threads)
    root = options.work / f"{options.size}-{options.layers}"
    write_checkpoints(root, options.size, options.layers)
    figures = measure(root, options.ways, options.rounds, options.threads)
    known = machine.facts(torch.device("cpu")) | machine.versions(["diffusers", "safetensors"])
    name = f"loading-{machine.slug(torch.device('cpu'))}"
    write_json(options.out / f"{name}.json", {"format": FORMAT, "machine": known, "figures": figures})
    file = sum(path.stat().st_size for path in (root / "fp16").glob("*.safetensors"))
    report = markdown(known, figures, 0.55 * file + 1e9)
    (options.out / f"{name}.md").write_text(report)
    print(report)


if __name__ == "__main__":
    main()
