"""The words of a report: names and units of its figures, and the lines at its top."""

from __future__ import annotations

from collections import Counter

from qvd_core.report.data import Report
from qvd_core.report.panels import in_bytes
from qvd_core.spec import QuantSpec

LABELS = {
    "psnr_db": "PSNR to full precision",
    "psnr_db_mean": "PSNR to full precision, mean",
    "psnr_db_min": "PSNR to full precision, lowest",
    "ssim": "SSIM to full precision",
    "ssim_mean": "SSIM to full precision, mean",
    "ssim_min": "SSIM to full precision, lowest",
    "frechet_distance": "Fréchet distance to full precision",
    "seconds_per_step_float": "seconds per step, full precision",
    "seconds_per_step_int8": "seconds per step, quantized",
    "seconds_calibrating": "seconds of calibration",
}
Line = tuple[str, str]  # what, and its value


def label(name: str) -> str:
    """What a figure of the caller is called on the page."""
    return LABELS.get(name, name.replace("_db", "").replace("_", " "))


def value(name: str, figure: float | None) -> str:
    """A figure with its unit, which its name tells."""
    if figure is None:
        return "identical" if name.startswith("psnr") else "infinite"
    if "_db" in name:
        return f"{figure:.1f} dB"
    if name.startswith("seconds"):
        return f"{figure:.3g} s"
    return f"{figure:.4f}" if abs(figure) < 10 else f"{figure:.5g}"


def memory(report: Report) -> str:
    """Both sizes; "" where they are not known."""
    if not report.float_bytes or not report.int8_bytes:
        return ""
    share = report.int8_bytes / report.float_bytes
    return f"{in_bytes(report.float_bytes)} → {in_bytes(report.int8_bytes)} ({share:.0%})"


def bits(report: Report) -> str:
    """W8A8, W4A8 and the like."""
    return f"W{report.settings.get('weight_bits', '?')}A{report.settings.get('activation_bits', '?')}"


def kinds(report: Report) -> str:
    """How many layers of which kind."""
    count = Counter(layer.kind or "layer" for layer in report.layers)
    return ", ".join(f"{number} {kind}" for kind, number in sorted(count.items()))


def changed_settings(report: Report) -> str:
    """The settings that are not at their default, as they would be written."""
    usual = QuantSpec().to_dict()
    return ", ".join(f"{key}={value!r}" for key, value in report.settings.items() if value != usual.get(key))


def headline(report: Report) -> tuple[str, str, list[Line]]:
    """Title, subtitle and the most telling figures, the most important first."""
    family = f", family {report.family}" if report.family else ""
    prompts = report.calibrated_on.get("prompts", ())  # the texts, or how many there were
    origin = report.calibrated_on.get("samples", prompts if isinstance(prompts, int) else len(prompts))
    calibrated = f"calibrated on {origin} samples" if origin else "calibrated" if report.calibrated_on else "data-free"
    settings = changed_settings(report)
    subtitle = f"{bits(report)}, {calibrated}{family}{'; ' if settings else ''}{settings}"
    count = len(report.layers)
    of_all = f" of {count + len(report.kept)}" if report.kept else ""
    figures = [("layers quantized", f"{count}{of_all}")]
    if report.float_bytes and report.int8_bytes:
        figures.append(("of the memory", f"{report.int8_bytes / report.float_bytes:.0%}"))
    figures += [(label(name), value(name, figure)) for name, figure in list(report.quality.items())[:2]]
    sqnr = report.mean("sqnr_db")
    if sqnr is not None:
        figures.append(("mean output SQNR", f"{sqnr:.1f} dB"))
    used = report.mean("coverage")
    if used is not None:
        figures.append(("levels used, mean", f"{used:.0%}"))
    deployed = next((temporal.deployed for temporal in report.temporal if temporal.deployed), None)
    if deployed is not None:
        figures.append(("of TDScore kept (TDR)", f"{deployed.tdr:.4f}"))
    faster = speedup(report)
    if faster:
        figures.insert(2, ("as fast, per denoising step", faster))
    return f"QVD: {report.model or 'quantized model'}", subtitle, figures


def speedup(report: Report) -> str:
    """How many times as fast a step is; "" where it was not measured."""
    before, after = (report.speed.get(f"seconds_per_step_{kind}") for kind in ("float", "int8"))
    return f"{before / after:.2f}×" if before and after else ""
