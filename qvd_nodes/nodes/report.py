"""QVD Report and QVD Compare: seeing what was lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from qvd_core.files import write_bytes
from qvd_core.report import (
    compare_videos,
    comparison_chart,
    frame_strip,
    side_by_side,
    summary_picture,
    write_report,
)
from qvd_core.scales import Scales
from qvd_nodes._comfy import ModelPatcher, folder_paths, io
from qvd_nodes.describe import report_of
from qvd_nodes.nodes.types import CATEGORY, PREFIX_TOOLTIP, ScalesType
from qvd_nodes.pictures import image_of, saved_file, spread_frames, write_frames, write_temporary


class Report(io.ComfyNode):
    """An int8 MODEL -> a picture, a page and JSON."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QVDReport",
            display_name="QVD Report",
            category=CATEGORY,
            description="What was quantized and what it cost: every layer's error, the use of its levels, TDScore, "
            "memory. Writes a PNG, an HTML page and JSON into the output folder.",
            inputs=[
                io.Model.Input("model", tooltip="The output of QVD Quantize Model or QVD Load Diffusion Model."),
                ScalesType.Input(
                    "scales", optional=True, tooltip="Those it was quantized with, for ranges and temporal features."
                ),
                io.String.Input("filename_prefix", default="qvd_report", tooltip=PREFIX_TOOLTIP),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: ModelPatcher, filename_prefix: str, scales: Scales | None = None) -> io.NodeOutput:
        report = report_of(model, scales)
        folder, name, counter, _, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory()
        )
        page = write_report(Path(folder) / f"{name}_{counter:05}_.html", report)
        picture = write_bytes(page.with_suffix(".png"), summary_picture(report, "dark"))
        data = page.with_suffix(".json")
        shown = {
            "images": (saved_file(picture),),
            "qvd_report": (json.loads(data.read_text(encoding="utf-8")),),
            "qvd_files": (saved_file(data), saved_file(page)),
        }
        return io.NodeOutput(ui=shown)


class Compare(io.ComfyNode):
    """Two IMAGE batches -> how far they are apart."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QVDCompare",
            display_name="QVD Compare",
            category=CATEGORY,
            description="Compares two videos frame by frame: full precision and int8, from the same seed and settings.",
            search_aliases=["psnr", "ssim", "difference"],
            inputs=[
                io.Image.Input("reference", tooltip="The frames in full precision."),
                io.Image.Input("test", tooltip="The frames from the int8 model, same seed and settings."),
                io.Float.Input(
                    "amplify", default=8.0, min=1.0, max=255.0, step=1.0, tooltip="How much to brighten the difference."
                ),
            ],
            outputs=[
                io.Image.Output(display_name="side_by_side"),
                io.Image.Output(display_name="chart"),
                io.Float.Output(display_name="psnr"),
                io.Float.Output(display_name="ssim"),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, reference: Tensor, test: Tensor, amplify: float) -> io.NodeOutput:
        reference, test = reference[..., :3], test[..., :3]
        comparison = compare_videos(reference, test)
        figures = comparison.figures()
        joined = side_by_side(reference, test, amplify)
        chart = comparison_chart(comparison, "dark")
        frames = spread_frames(len(reference))
        width = reference.shape[2]
        data: dict[str, Any] = {
            **figures,
            "identical": comparison.identical,
            "width": width,
            "height": reference.shape[1],
            "shown_frames": frames,
            "psnr": {
                "mean": figures["psnr_db"],
                "min": figures["psnr_db_min"],
                "worst_frame": figures["worst_frame"],
                "per_frame": list(comparison.psnr_db),
            },
            "reference": write_frames("qvd_reference", joined[:, :, :width], frames),
            "test": write_frames("qvd_test", joined[:, :, width : 2 * width], frames),
            "difference": write_frames("qvd_difference", joined[:, :, 2 * width :], frames),
        }
        if comparison.ssim is not None:
            mean, least = figures["ssim_mean"], figures["ssim_min"]
            data["ssim"] = {"mean": mean, "min": least, "per_frame": list(comparison.ssim)}
        strip = frame_strip(reference, test, "dark", amplify)
        images = tuple(write_temporary("qvd_compare", png) for png in (strip, chart))
        # Numbers for other nodes: identical videos are as good as can be told from 8 bits' worth of PSNR.
        psnr = 100.0 if comparison.identical else float(figures["psnr_db"])
        ssim = float(figures.get("ssim_mean", 1.0 if comparison.identical else 0.0))
        shown = {"images": images, "text": (comparison.text(),), "qvd_compare": (data,)}
        return io.NodeOutput(joined, image_of(chart), psnr, ssim, ui=shown)
