"""Calibration by sampling: the cache, two experts, interruption, and what the browser is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.utils
import pytest
import stub_control
import torch
from comfy import model_management, samplers
from comfy.model_patcher import ModelPatcher

import qvd_nodes.scale_cache as scale_cache
from qvd_core import QuantSpec
from qvd_core.errors import QVDError
from qvd_nodes.calibrate import Expert, Job, calibrate
from qvd_nodes.quantize import quantize_patcher
from qvd_nodes.weights import denoiser
from tests.nodes import models
from tests.nodes.conftest import SETTINGS, job

SPEC = QuantSpec(temporal_quantizer="power", scale="smooth", range="minmax")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    folder = tmp_path / "calibrations"
    monkeypatch.setenv("QVD_CACHE", str(folder))
    monkeypatch.setattr(scale_cache, "_chosen_folder", None)
    return folder


@pytest.fixture
def wan() -> ModelPatcher:
    """One block is enough to be calibrated."""
    return models.patcher(models.OneBlockConfig)


def small(patcher: ModelPatcher, **changes: Any) -> Job:
    """One prompt, two steps."""
    expert = Expert("", patcher, replace(SETTINGS, steps=2))
    return job(patcher, **{"spec": SPEC, "experts": (expert,), "positives": [models.conditioning(2)], **changes})


def key(given: Job) -> str:
    return given.key(given.experts[0])


def setting(patcher: ModelPatcher, **changes: Any) -> dict[str, Any]:
    return {"experts": (Expert("", patcher, replace(SETTINGS, steps=2, **changes)),)}


class TestKey:
    def test_equal_inputs_have_one_key_whatever_objects_they_are(self) -> None:
        keys = {key(small(models.patcher(models.OneBlockConfig))) for _ in range(2)}
        patched = {key(small(models.with_lora(models.patcher(models.OneBlockConfig), ["head.head"]))) for _ in range(2)}
        assert len(keys) == len(patched) == 1 and keys != patched

    @pytest.mark.parametrize(
        "change",
        [
            lambda wan: {"spec": replace(SPEC, activation="static")},
            lambda wan: {"positives": [models.conditioning(3)]},
            lambda wan: {"positives": [models.conditioning(2), models.conditioning(3)]},
            lambda wan: {"negative": models.conditioning(3)},
            lambda wan: {"positives": [[[models.conditioning(2)[0][0], {"guidance": 3.5}]]]},
            lambda wan: {"latent": models.latent(frames=5)},
            lambda wan: {"latent": {"samples": torch.ones(1, 4, 3, 4, 6)}},
            lambda wan: {"latent": {**models.latent(), "noise_mask": torch.ones(1, 1, 4, 6)}},
            lambda wan: setting(wan, seed=2),
            lambda wan: setting(wan, cfg=1.0),
            lambda wan: setting(wan, sampler_name="heun"),
            lambda wan: setting(wan, scheduler="normal"),
            lambda wan: setting(wan, denoise=0.5),
            lambda wan: setting(wan, sigmas=torch.tensor([1.0, 0.5, 0.0])),
            lambda wan: setting(wan, last_step=1),
        ],
    )
    def test_changes_with_all_that_is_sampled(self, change: Any, wan: ModelPatcher) -> None:
        assert key(small(wan, **change(wan))) != key(small(wan))

    def test_changes_with_the_model(self, wan: ModelPatcher) -> None:
        weights, structure = models.patcher(models.OneBlockConfig, seed=1), models.patcher(models.ConvolutionsConfig)
        cast, shifted = models.patcher(models.OneBlockConfig, torch.bfloat16), wan.clone()
        sampling = type(wan.model.model_sampling)(wan.model.model_config)
        sampling.set_parameters(shift=8.0)
        shifted.add_object_patch("model_sampling", sampling)
        patches = [
            models.with_lora(wan, ["head.head"], strength, seed) for strength, seed in ((1, 9), (0.5, 9), (1, 8))
        ]
        found = [key(small(model)) for model in (wan, weights, structure, cast, shifted, *patches)]
        assert len(set(found)) == len(found)

    def test_does_not_change_with_what_is_loaded(self, wan: ModelPatcher) -> None:
        patched = models.with_lora(wan, ["blocks.0.ffn.0"])
        expected = key(small(wan)), key(small(patched))
        model_management.load_models_gpu([patched])
        assert (key(small(wan)), key(small(patched))) == expected

    def test_does_not_change_with_what_belongs_to_the_run(self, wan: ModelPatcher) -> None:
        clone = wan.clone()
        clone.set_attachments("other pack", object())
        assert key(small(clone)) == key(small(wan))

    def test_does_not_change_with_the_addresses_of_what_other_nodes_add(self, wan: ModelPatcher) -> None:
        clones = [wan.clone(), wan.clone()]
        for clone in clones:
            clone.model_options["transformer_options"]["mark"] = object()
        assert key(small(clones[0])) == key(small(clones[1]))

    def test_changes_with_functions_and_modules_that_other_nodes_put_in(self, wan: ModelPatcher) -> None:
        wrapped, replaced = wan.clone(), wan.clone()
        wrapped.model_options["model_function_wrapper"] = print
        replaced.object_patches["diffusion_model.blocks.0.ffn.0"] = torch.nn.Linear(2, 2)
        assert len({key(small(model)) for model in (wan, wrapped, replaced)}) == 3

    def test_is_the_same_in_another_process(self, wan: ModelPatcher) -> None:
        """Nothing of it is an address; of an object that has no parts its class must do."""
        clone = wan.clone()
        clone.add_patches({"diffusion_model.head.head.weight": _Adapter(torch.ones(2))})
        other = wan.clone()
        other.add_patches({"diffusion_model.head.head.weight": _Adapter(torch.ones(2))})
        third = wan.clone()
        third.add_patches({"diffusion_model.head.head.weight": _Adapter(torch.zeros(2))})
        assert key(small(clone)) == key(small(other)) != key(small(third))

    def test_of_one_expert_changes_with_the_other(self, wan: ModelPatcher) -> None:
        others = [models.patcher(models.OneBlockConfig, seed=seed) for seed in (1, 2)]
        keys = {pair.key(pair.experts[0]) for pair in (experts(wan, other) for other in others)}
        assert len(keys) == 2


class _Adapter:
    """An adapter of ComfyUI: all it says of itself is its `weights`."""

    def __init__(self, weights: Any) -> None:
        self.weights = weights


def experts(high: ModelPatcher, low: ModelPatcher, switch: int = 2, **changes: Any) -> Job:
    first = Expert("high", high, replace(SETTINGS, steps=4, last_step=switch))
    second = Expert("low", low, replace(SETTINGS, steps=4, cfg=1.0, first_step=switch))
    return small(high, experts=(first, second), **changes)


class TestCalibrate:
    def test_scales_fit_the_model_and_are_cached(self, wan: ModelPatcher, cache: Path) -> None:
        before = models.snapshot(wan)
        first = calibrate(small(wan))
        assert not first.from_cache and [path.name for path in cache.iterdir()] == first.files
        assert models.unchanged(wan, before)
        again = calibrate(small(models.patcher(models.OneBlockConfig)))
        assert again.from_cache and again.files == first.files
        outputs = [models.denoise(quantize_patcher(wan, SPEC, found.scales[0])) for found in (first, again)]
        assert torch.equal(*outputs)
        assert not calibrate(small(wan), use_cache=False).from_cache

    def test_the_description_says_what_was_sampled(self, scales_for: Any) -> None:
        scales = scales_for()
        assert scales.calibrated_on["prompts"] == 2 and scales.calibrated_on["latent"] == [1, 4, 3, 4, 6]
        assert scales.calibrated_on["sampler"]["sampler_name"] == "euler"
        assert scales.model_class == "WanModel" and set(scales.temporal) == {"time_projection.1"}

    def test_a_damaged_cache_is_made_anew(self, wan: ModelPatcher, cache: Path, caplog: Any) -> None:
        first = calibrate(small(wan))
        (cache / first.files[0]).write_bytes(b"not a file of scales")
        assert not calibrate(small(wan)).from_cache and "Ignoring a cached calibration" in caplog.text
        assert calibrate(small(wan)).from_cache

    def test_patches_before_are_seen(self, wan: ModelPatcher) -> None:
        patched = models.with_lora(wan, ["blocks.0.ffn.0"])
        plain, found = calibrate(small(wan)).scales[0], calibrate(small(patched)).scales[0]
        name = "blocks.0.ffn.0"
        assert not torch.equal(plain.layers[name].weight_probe, found.layers[name].weight_probe)
        assert not torch.equal(plain.layers["blocks.0.ffn.2"].input_max, found.layers["blocks.0.ffn.2"].input_max)
        quantize_patcher(patched, SPEC, found)

    def test_sigmas_of_ones_own(self, wan: ModelPatcher) -> None:
        sigmas = torch.tensor([1.0, 0.75, 0.3, 0.0])
        scales = calibrate(small(wan, **setting(wan, sigmas=sigmas))).scales[0]
        assert scales.calibrated_on["sampler"]["sigmas"] == pytest.approx(sigmas.tolist())

    def test_a_compiled_model_is_watched_uncompiled(self, wan: ModelPatcher) -> None:
        """A compiled model calls no hooks."""
        compiled = wan.clone()
        called = []

        def compiled_call(executor: Any, *args: Any, **kwargs: Any) -> Any:
            called.append(1)
            return torch.zeros_like(args[0])

        compiled.add_wrapper_with_key("apply_model", "torch.compile", compiled_call)
        assert models.sample(compiled).abs().sum() >= 0 and called
        called.clear()
        assert calibrate(small(compiled)).scales[0].layers and not called
        assert compiled.wrappers["apply_model"]["torch.compile"]

    def test_wrappers_of_other_packs_stay(self, wan: ModelPatcher) -> None:
        called = []

        def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
            called.append(1)
            return executor(*args, **kwargs)

        wan.add_wrapper_with_key("apply_model", "other pack", wrapper)
        calibrate(small(wan))
        assert len(called) == 2  # steps

    def test_sensitivity_runs_the_model_again(self, wan: ModelPatcher) -> None:
        given = small(wan, spec=replace(SPEC, auto_keep=0.3))
        scales = calibrate(given).scales[0]
        kept = quantize_patcher(wan, scales.spec, scales)
        plain = quantize_patcher(wan, SPEC)
        assert kept.model_size() > plain.model_size()


class TestTwoExperts:
    def test_each_is_calibrated_on_its_own_steps(self, wan: ModelPatcher) -> None:
        low = models.patcher(models.OneBlockConfig, seed=1)
        seen: dict[int, list[float]] = {0: [], 1: []}
        for index, model in enumerate((wan, low)):
            denoiser(model).register_forward_pre_hook(
                lambda module, args, kwargs, index=index: seen[index].append(float(args[1].max())), with_kwargs=True
            )
        found = calibrate(experts(wan, low))
        assert len(found.scales) == len(set(found.files)) == 2
        assert min(seen[0]) > max(seen[1]) and len(seen[0]) == len(seen[1]) == 2
        assert [scales.calibrated_on["component"] for scales in found.scales] == ["high", "low"]
        quantize_patcher(wan, SPEC, found.scales[0])
        with pytest.raises(QVDError, match="weights of layer"):
            quantize_patcher(wan, SPEC, found.scales[1])

    def test_the_second_goes_on_where_the_first_has_stopped(self, wan: ModelPatcher) -> None:
        """Two halves with one model are a whole run."""
        whole = models.sample(wan, steps=4)
        latent = models.latent()["samples"]
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(1))
        arguments = (wan, 4, torch.device("cpu"), "euler", "simple")
        sampler = samplers.KSampler(*arguments)
        with torch.inference_mode():
            half = sampler.sample(noise, models.conditioning(2), models.conditioning(4), 3.0, latent, last_step=2)
            out = sampler.sample(
                torch.zeros_like(noise), models.conditioning(2), models.conditioning(4), 3.0, half, start_step=2
            )
        torch.testing.assert_close(out, whole)

    def test_both_from_the_cache_or_none(self, wan: ModelPatcher, cache: Path) -> None:
        given = experts(wan, models.patcher(models.OneBlockConfig, seed=1))
        first = calibrate(given)
        assert calibrate(given).from_cache
        (cache / first.files[1]).unlink()
        assert not calibrate(given).from_cache

    @pytest.mark.parametrize("switch", [0, 4, 9])
    def test_a_switch_at_an_end_is_refused(self, wan: ModelPatcher, switch: int) -> None:
        other = models.patcher(models.OneBlockConfig, seed=1)
        with pytest.raises(QVDError, match="would sample no step of 4: put the switch between"):
            calibrate(experts(wan, other, switch))

    def test_one_model_twice_is_refused(self, wan: ModelPatcher) -> None:
        with pytest.raises(QVDError, match="both experts are one MODEL"):
            calibrate(experts(wan, wan.clone()))


class TestRefused:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"positives": [[]]}, "the positive 0 conditioning is empty"),
            ({"positives": [models.conditioning(2), [[torch.zeros(1, 0, 24), {}]]]}, "the positive 1 conditioning"),
            ({"negative": []}, "the negative conditioning is empty"),
            ({"negative": [[torch.full((1, 2, 24), torch.nan), {}]]}, "holds NaN or infinity"),
            ({"latent": {}}, "the latent is empty"),
            ({"latent": None}, "the latent is empty"),
            ({"latent": {"samples": torch.zeros(0, 4, 3, 4, 6)}}, "the latent is empty"),
        ],
    )
    def test_before_anything_is_sampled(self, wan: ModelPatcher, changes: dict[str, Any], message: str) -> None:
        denoiser(wan).forward = None  # type: ignore[assignment]
        with pytest.raises(QVDError, match=message):
            calibrate(small(wan, **changes))

    def test_a_quantized_model(self, wan: ModelPatcher) -> None:
        with pytest.raises(QVDError, match="quantized by QVD already"):
            calibrate(small(quantize_patcher(wan, SPEC)))

    def test_no_model(self) -> None:
        with pytest.raises(QVDError, match="connect the MODEL output"):
            calibrate(small(None))  # type: ignore[arg-type]


class TestInterrupted:
    @pytest.mark.parametrize("when", ["sampling", "search"])
    def test_leaves_no_hooks_and_no_file(
        self, wan: ModelPatcher, cache: Path, when: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stub_control.start_server()
        before = models.snapshot(wan)
        monkeypatch.setattr("qvd_nodes.events.SHORTEST_INTERVAL", 0.0)

        def hook(value: int, total: int, preview: Any, node_id: Any = None) -> None:
            if value == (1 if when == "sampling" else 5):
                model_management.interrupt_current_processing()

        comfy.utils.set_progress_bar_global_hook(hook)
        with pytest.raises(model_management.InterruptProcessingException):
            calibrate(small(wan), node="7")
        told = stub_control.messages("qvd.calibration")
        assert told[-1]["phase"] == "interrupted" and told[-2]["phase"] == when
        assert not cache.exists() and models.unchanged(wan, before)

    @pytest.mark.parametrize(
        ("error", "raised", "message"),
        [
            (RuntimeError("sizes differ"), QVDError, "cannot be sampled with these inputs"),
            (torch.OutOfMemoryError("no room"), torch.OutOfMemoryError, "no room"),
            (OSError("disk"), OSError, "disk"),
        ],
    )
    def test_an_error_is_told_and_leaves_no_hooks(
        self, wan: ModelPatcher, monkeypatch: pytest.MonkeyPatch, error: Any, raised: Any, message: str
    ) -> None:
        stub_control.start_server()
        before = models.snapshot(wan)

        def fails(*_: Any, **__: Any) -> Any:
            raise error

        monkeypatch.setattr(samplers, "sample", fails)
        with pytest.raises(raised, match=message):
            calibrate(small(wan))
        last = stub_control.messages("qvd.calibration")[-1]
        assert last["phase"] == "failed" and message in last["message"] and models.unchanged(wan, before)


class TestMessages:
    """As `web/` expects them."""

    KEYS = {"node", "expert", "phase", "done", "total", "seconds", "eta", "sqnr_db", "message"}  # noqa: RUF012

    def run(self, given: Job, monkeypatch: pytest.MonkeyPatch, interval: float = 0.0) -> list[dict[str, Any]]:
        stub_control.start_server()
        monkeypatch.setattr("qvd_nodes.events.SHORTEST_INTERVAL", interval)
        calibrate(given, node="7")
        return stub_control.messages("qvd.calibration")

    def test_every_step_and_every_layer_is_told(self, wan: ModelPatcher, monkeypatch: pytest.MonkeyPatch) -> None:
        given = small(wan, positives=[models.conditioning(2), models.conditioning(3)])
        told = self.run(given, monkeypatch)
        assert all(message.keys() >= self.KEYS and message["node"] == "7" for message in told)
        sampling = [message for message in told if message["phase"] == "sampling"]
        assert [(m["prompt"], m["prompts"], m["step"], m["steps"]) for m in sampling] == [
            (1, 2, 1, 2),
            (1, 2, 2, 2),
            (2, 2, 1, 2),
            (2, 2, 2, 2),
        ]
        search = [message for message in told if message["phase"] == "search"]
        assert search and all(message["layer"] for message in search)
        assert [message["done"] for message in told] == [*range(1, len(told)), len(told) - 1]
        assert told[-1]["phase"] == "done" and {message["total"] for message in told} == {told[-1]["done"]}
        assert all(message["eta"] is None or message["eta"] >= 0 for message in told)

    @pytest.mark.parametrize("two", [True, False])
    def test_no_more_is_done_than_there_is(self, wan: ModelPatcher, monkeypatch: pytest.MonkeyPatch, two: bool) -> None:
        spec = replace(SPEC, auto_keep=0.3)
        given = experts(wan, models.patcher(models.OneBlockConfig, seed=1)) if two else small(wan, spec=spec)
        told = self.run(given, monkeypatch)
        assert all(message["done"] <= message["total"] and message["eta"] >= 0 for message in told)
        assert told[-2]["done"] > 0.8 * told[-2]["total"]

    def test_each_figure_is_told_once(self, wan: ModelPatcher, monkeypatch: pytest.MonkeyPatch) -> None:
        told = self.run(small(wan), monkeypatch)
        names = [name for message in told for name, _ in message["sqnr_db"]]
        scales = calibrate(small(wan)).scales[0]
        known = {name for name, figures in scales.report.items() if "sqnr_db" in figures}
        assert sorted(names) == sorted(known)

    def test_are_few(self, wan: ModelPatcher, monkeypatch: pytest.MonkeyPatch) -> None:
        told = self.run(small(wan), monkeypatch, interval=1e9)
        assert [message["phase"] for message in told] == ["done"]
        assert len(told[-1]["sqnr_db"]) > 5  # what was held back is not lost

    def test_of_the_cache(self, wan: ModelPatcher, monkeypatch: pytest.MonkeyPatch) -> None:
        calibrate(small(wan))
        told = self.run(small(wan), monkeypatch)
        assert [message["phase"] for message in told] == ["cached"] and told[0]["done"] == told[0]["total"]

    def test_of_two_experts_say_which(self, wan: ModelPatcher, monkeypatch: pytest.MonkeyPatch) -> None:
        told = self.run(experts(wan, models.patcher(models.OneBlockConfig, seed=1)), monkeypatch)
        assert [m["expert"] for m in told if m["phase"] == "sampling"] == ["high", "high", "low", "low"]
        assert {m["expert"] for m in told if m["phase"] == "search"} == {"high", "low"}

    def test_go_to_the_browser_that_asked_and_to_nobody_without_a_server(self, wan: ModelPatcher) -> None:
        server = stub_control.start_server()
        server.client_id = "the one"
        calibrate(small(wan))
        assert {sid for _, _, sid in server._sent} == {"the one"}
        stub_control.stop_server()
        assert calibrate(small(wan)).from_cache

    def test_the_progress_bar_shows_previews(self, wan: ModelPatcher) -> None:
        shown = []
        comfy.utils.set_progress_bar_global_hook(lambda *args, node_id=None: shown.append((*args, node_id)))
        calibrate(small(wan), node="7")
        pictures = [preview for _, _, preview, _ in shown if preview is not None]
        assert len(pictures) == 2 and all(kind == "JPEG" and picture.size == (6, 4) for kind, picture, _ in pictures)
        assert {node for *_, node in shown} == {"7"} and shown[-1][0] == shown[-1][1]


class TestFolders:
    def test_default_is_beside_the_users_settings(self, comfyui: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("QVD_CACHE")
        assert scale_cache.cache_folder() == comfyui / "user" / "qvd" / "calibrations"

    def test_another_can_be_chosen(self, wan: ModelPatcher, tmp_path: Path, cache: Path) -> None:
        scale_cache.choose_cache_folder(str(tmp_path / "elsewhere"))
        calibrate(small(wan))
        assert list((tmp_path / "elsewhere").iterdir()) and not cache.exists()
        scale_cache.choose_cache_folder("")
        assert scale_cache.cache_folder() == cache

    def test_one_that_cannot_be_written_costs_a_warning(self, wan: ModelPatcher, tmp_path: Path, caplog: Any) -> None:
        (tmp_path / "file").write_text("")
        scale_cache.choose_cache_folder(str(tmp_path / "file"))
        assert calibrate(small(wan)).scales and "not cached" in caplog.text
