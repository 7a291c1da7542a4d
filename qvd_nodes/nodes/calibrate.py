"""QVD Calibrate: of one MODEL, and of the two experts of one video."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from qvd_core.spec import QuantSpec
from qvd_nodes._comfy import ModelPatcher, io, samplers
from qvd_nodes.calibrate import Calibration, Expert, Job, calibrate
from qvd_nodes.describe import collected_warnings, image_model_note, scales_summary, scales_text
from qvd_nodes.nodes.types import CATEGORY, ScalesType, SettingsType, preset_input, searched_spec
from qvd_nodes.sampling import SamplerSettings

MOST_PROMPTS = 16
AS_SAMPLED = "As in the KSampler you will use."


def _conditioning_inputs() -> list[Any]:
    template = io.Autogrow.TemplatePrefix(io.Conditioning.Input("positive"), prefix="positive", min=1, max=MOST_PROMPTS)
    return [
        io.Autogrow.Input(
            "positive",
            template=template,
            tooltip="One or more prompts, each sampled on its own: a few for dynamic scales, 16 for static ones.",
        ),
        io.Conditioning.Input("negative", tooltip="As in the KSampler you will use."),
        io.Latent.Input("latent_image", tooltip="Of the size and length you will sample; smaller ones do, too."),
    ]


def _sampler_inputs(guidance: list[Any]) -> list[Any]:
    return [
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=io.ControlAfterGenerate.fixed,
            tooltip="Of the noise. Leave it fixed: another one calibrates again.",
        ),
        io.Int.Input("steps", default=20, min=1, max=10000, tooltip="All steps are watched: ranges move over them."),
        *guidance,
        io.Combo.Input("sampler_name", options=samplers.KSampler.SAMPLERS, default="euler", tooltip=AS_SAMPLED),
        io.Combo.Input("scheduler", options=samplers.KSampler.SCHEDULERS, default="simple", tooltip=AS_SAMPLED),
    ]


def _guidance(name: str) -> Any:
    return io.Float.Input(
        name, default=5.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="1 for distilled models."
    )


def _choices() -> list[Any]:
    return [
        preset_input("best", auto=False),
        io.Boolean.Input("use_cache", default=True, tooltip="Load an equal calibration that was done before."),
        SettingsType.Input("settings", optional=True, tooltip="Every choice by hand; replaces the preset."),
    ]


def _output(calibration: Calibration, warnings: list[str]) -> io.NodeOutput:
    summaries = [scales_summary(calibration, index, warnings) for index in range(len(calibration.scales))]
    text = "\n".join(scales_text(summary) for summary in summaries)
    return io.NodeOutput(*calibration.scales, ui={"text": (text,), "qvd": tuple(summaries)})


class Calibrate(io.ComfyNode):
    """MODEL + prompts -> QVD_SCALES."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QVDCalibrate",
            display_name="QVD Calibrate",
            category=CATEGORY,
            description="Samples with a few prompts, watches every layer, and finds scales for QVD Quantize Model. "
            "The same graph run again takes them from the cache, also after a restart.",
            search_aliases=["int8 calibration", "scales"],
            inputs=[
                io.Model.Input("model", tooltip="In full precision, with its LoRAs, as it would be sampled."),
                *_conditioning_inputs(),
                *_sampler_inputs([_guidance("cfg")]),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=AS_SAMPLED),
                *_choices(),
                io.Sigmas.Input(
                    "sigmas", optional=True, tooltip="A schedule of your own instead of steps and scheduler."
                ),
            ],
            outputs=[ScalesType.Output(display_name="scales")],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        positive: dict[str, Any],
        negative: Any,
        latent_image: dict[str, Any],
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        denoise: float,
        preset: Any,
        use_cache: bool,
        settings: QuantSpec | None = None,
        sigmas: Tensor | None = None,
    ) -> io.NodeOutput:
        sampling = SamplerSettings(seed, steps, cfg, sampler_name, scheduler, denoise, sigmas)
        spec = searched_spec(preset, settings)
        job = Job((Expert("", model, sampling),), list(positive.values()), negative, latent_image, spec)
        with collected_warnings() as warnings:
            calibration = calibrate(job, str(cls.hidden.unique_id or ""), use_cache)
        return _output(calibration, [*image_model_note(model, spec), *warnings])


class CalibrateTwoExperts(io.ComfyNode):
    """Two MODELs that share one video -> QVD_SCALES of each."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QVDCalibrateTwoExperts",
            display_name="QVD Calibrate Two Experts",
            category=CATEGORY,
            description="For models of two experts, as Wan 2.2: one samples the noisy steps, the other the rest.",
            search_aliases=["wan 2.2", "high noise", "low noise"],
            inputs=[
                io.Model.Input("model_high", tooltip="The high-noise expert."),
                io.Model.Input("model_low", tooltip="The low-noise expert."),
                *_conditioning_inputs(),
                *_sampler_inputs(
                    [
                        io.Int.Input(
                            "switch_step",
                            default=10,
                            min=1,
                            max=10000,
                            tooltip="The low-noise expert's first step: end_at_step of the first KSampler (Advanced).",
                        ),
                        _guidance("cfg_high"),
                        _guidance("cfg_low"),
                    ]
                ),
                *_choices(),
            ],
            outputs=[ScalesType.Output(display_name="scales_high"), ScalesType.Output(display_name="scales_low")],
            hidden=[io.Hidden.unique_id],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls,
        model_high: ModelPatcher,
        model_low: ModelPatcher,
        positive: dict[str, Any],
        negative: Any,
        latent_image: dict[str, Any],
        seed: int,
        steps: int,
        switch_step: int,
        cfg_high: float,
        cfg_low: float,
        sampler_name: str,
        scheduler: str,
        preset: Any,
        use_cache: bool,
        settings: QuantSpec | None = None,
    ) -> io.NodeOutput:
        high = SamplerSettings(seed, steps, cfg_high, sampler_name, scheduler, last_step=switch_step)
        low = replace(high, cfg=cfg_low, first_step=switch_step, last_step=None)
        experts = (Expert("high", model_high, high), Expert("low", model_low, low))
        spec = searched_spec(preset, settings)
        job = Job(experts, list(positive.values()), negative, latent_image, spec)
        with collected_warnings() as warnings:
            calibration = calibrate(job, str(cls.hidden.unique_id or ""), use_cache)
        return _output(calibration, warnings)
