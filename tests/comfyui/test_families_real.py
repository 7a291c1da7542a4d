"""The entries for ComfyUI's models, on tiny models of the real classes.

    COMFYUI_PATH=<checkout> pytest -m comfyui --noconftest tests/comfyui/test_families_real.py

in an environment that ComfyUI runs in (`--noconftest`: it needs none of our development tools).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import combinations, product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qvd_core import QuantSpec, calibrate_model, find_family, quantize_model
from qvd_core.families import Family, family_or_generic, is_image_model
from qvd_core.folds import fold_sites, producer_edits
from qvd_core.plan import quantizable_layers
from qvd_core.temporal_fit import embed_timesteps, grid_features
from tests.comfyui import trees
from tests.comfyui.checkout import VARIABLE, comfyui, find_checkout
from tests.comfyui.tiny import BATCH, BUILDERS, FRAMES, TinyModel, tiny_model
from tests.comfyui.tiny.images import BUILDERS as IMAGE_BUILDERS
from tests.core.folding import family_of, gemm_layers, is_identity, output_error, random_transforms

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif(find_checkout() is None, reason=f"{VARIABLE} names no ComfyUI checkout"),
]


@pytest.fixture(params=BUILDERS)
def tiny(request: pytest.FixtureRequest) -> TinyModel:
    return tiny_model(request.param)


@contextmanager
def watching(model: nn.Module, names, remember) -> Iterator[None]:
    """Call `remember(name, input)` whenever one of the layers runs."""

    def hook(name, module, args, kwargs):
        remember(name, args[0] if args else kwargs["input"])

    handles = [
        model.get_submodule(name).register_forward_pre_hook(partial(hook, name), with_kwargs=True) for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def inputs_read(tiny: TinyModel, names, timestep=500.0, change=0.0) -> dict[str, set[tuple]]:
    """What each layer reads in one call: shape, sum and sum of squares of every input."""
    read: dict[str, set[tuple]] = {}

    def remember(name, x):
        x = x.double()
        read.setdefault(name, set()).add((tuple(x.shape), float(x.sum()), float(x.square().sum())))

    with watching(tiny.model, names, remember), torch.no_grad():
        tiny.call(tiny.model, tiny.latents + change, timestep)
    return read


def test_the_recorded_trees_are_those_of_this_checkout():
    by_class: dict[str, dict[str, trees.Tree]] = {}
    for name in BUILDERS:
        model = tiny_model(name).model
        by_class.setdefault(type(model).__name__, {})[name] = trees.tree_of(model)
    assert {name: trees.read(name) for name in trees.recorded_classes()} == by_class


def fold_places(model: nn.Module, family: Family) -> list[tuple]:
    return [(site.fold, site.consumers, site.shift, site.scale) for site in fold_sites(model, family)]


class TestEntries:
    def test_a_skeleton_stands_for_its_model(self, tiny):
        model = tiny.model
        recorded = trees.skeleton(type(model).__name__, trees.tree_of(model))
        assert find_family(recorded) == find_family(model)
        assert list(gemm_layers(recorded, family_of(tiny))) == list(gemm_layers(model, family_of(tiny)))
        assert fold_places(recorded, family_of(tiny)) == fold_places(model, family_of(tiny))

    def test_layers_that_share_an_input_are_exactly_those_grouped(self, tiny):
        family, names = family_of(tiny), gemm_layers(tiny.model, family_of(tiny))
        read = inputs_read(tiny, names)
        assert read.keys() == names.keys()  # every layer runs
        claimed: dict[str, set[str]] = {}
        for name in names:
            claimed.setdefault(family.input_group(name), set()).add(name)
        for group in claimed.values():
            assert len({frozenset(read[name]) for name in group}) == 1, group
        # Within one block nothing that reads the same tensor is left apart, but for the prompt, which all blocks read.
        for name, other in combinations(names, 2):
            if read[name] == read[other] and not (family.reads_prompt(name) and family.reads_prompt(other)):
                assert family.input_group(name) == family.input_group(other), (name, other)

    def test_layers_that_read_the_prompt_are_exactly_those_named(self, tiny):
        """Other latents leave their input as it was; so do other timesteps, where these do not modulate the prompt."""
        family, names = family_of(tiny), gemm_layers(tiny.model, family_of(tiny))
        early, late, other = (
            inputs_read(tiny, names, timestep, change) for timestep, change in ((900, 0.0), (100, 1.0), (900, 1.0))
        )
        named = {name for name in names if family.reads_prompt(name)}
        assert {name for name in early if early[name] == late[name]} <= named
        assert named <= {name for name in names if early.get(name) == other.get(name)}

    def test_no_layer_that_follows_the_timestep_is_missed(self, tiny):
        """One row per sample, the same for all latents and another one at another timestep: a temporal layer."""
        names = gemm_layers(tiny.model, family_of(tiny))
        early, late, other = (
            inputs_read(tiny, names, timestep, change) for timestep, change in ((900, 0.0), (100, 0.0), (900, 1.0))
        )
        for name, read in early.items():
            rows = max(torch.Size(shape[:-1]).numel() for shape, _, _ in read)
            assert rows > BATCH or read != other[name] or read == late[name], name

    def test_temporal_features_are_what_the_projections_read(self, tiny):
        family = family_of(tiny)
        names = [name for name in quantizable_layers(tiny.model, family, QuantSpec()) if family.is_temporal(name)]
        seen: dict[str, list[Tensor]] = {}
        step = sum(family.timestep_range) / 2
        with watching(tiny.model, names, lambda name, x: seen.setdefault(name, []).append(x)), torch.no_grad():
            tiny.forward(tiny.model, step)
        assert seen.keys() == set(names)
        if family.temporal_features:
            features = embed_timesteps(tiny.model, family, torch.tensor([step, *tiny.other_timesteps]))
            for x in (x for inputs in seen.values() for x in inputs):
                distance = torch.cdist(x.reshape(-1, features.shape[-1]), features).amin(dim=1)
                assert distance.max() < 1e-4
            assert len(grid_features(tiny.model, family)) == 1001

    def test_arguments_of_the_forward_pass(self, tiny):
        family = family_of(tiny)
        parameters = inspect.signature(tiny.model.forward).parameters
        assert {family.sample_argument, family.timestep_argument} - {""} <= parameters.keys()
        if family.frames_dim is not None:
            assert tiny.latents.shape[family.frames_dim] == FRAMES


class TestFolds:
    def test_every_place_is_exact(self, tiny):
        family = family_of(tiny)
        transforms = random_transforms(tiny.model, family)
        assert output_error(tiny, transforms, family) < 1e-3

    def test_what_takes_both_takes_all(self, tiny):
        family = family_of(tiny)
        _, remainders = producer_edits(tiny.model, family, random_transforms(tiny.model, family))
        for site in fold_sites(tiny.model, family):
            whole = site.shift and site.scale and site.channels == site.inputs
            assert all(is_identity(remainders[name]) for name in site.consumers) == whole


def keep_frames_apart(model: nn.Module, patch: pytest.MonkeyPatch) -> nn.Module:
    """A copy in which attention hands nothing from frame to frame: it returns each token's own value."""

    def attend(query, key, value, heads, *args, **options):
        if options.get("skip_reshape"):  # [batch, heads, tokens, channels]
            query, value = (x.transpose(1, 2).flatten(2) for x in (query, value))
        if query.shape == value.shape:
            return value
        return query + value.flatten(2).mean(dim=1, keepdim=True)

    for module in ("wan.model", "wan.model_animate", "wan.ar_model", "wan.model_wandancer", "cosmos.predict2"):
        patch.setattr(comfyui(f"ldm.{module}"), "optimized_attention", attend)
    return copy.deepcopy(model)


WITH_FRAME_ORDER = [name for name in BUILDERS if name.startswith(("wan", "cosmos-predict2"))]


class TestFrameOrder:
    @pytest.mark.parametrize("name", WITH_FRAME_ORDER)
    def test_rows_belong_to_the_frames_they_are_said_to(self, name, monkeypatch):
        """With nothing handed from frame to frame, another frame f changes exactly the rows of f, in every layer."""
        tiny = tiny_model(name)
        family = family_of(tiny)
        if not family.frame_order:
            pytest.skip("claims none")
        model = keep_frames_apart(tiny.model, monkeypatch)
        layers = [layer for layer in gemm_layers(model, family) if family.frame_order_of(layer)]
        assert layers

        def rows(latents: Tensor) -> dict[str, Tensor]:
            inputs: dict[str, Tensor] = {}
            with watching(model, layers, inputs.__setitem__), torch.no_grad():
                tiny.call(model, latents, 500)
            return {layer: x.reshape(-1, x.shape[-1]).clone() for layer, x in inputs.items()}

        before = rows(tiny.latents)
        for frame, entry in product(range(FRAMES), range(BATCH)):
            latents = tiny.latents.clone()
            latents.movedim(family.frames_dim, 1)[entry, frame] += 1.0
            for layer, x in rows(latents).items():
                m = torch.arange(len(x))
                of_batch = m // (len(x) // BATCH)
                of_frame = (m // (len(x) // (BATCH * FRAMES))) % FRAMES
                assert family.frame_order_of(layer) == "major"
                changed = (x != before[layer]).any(dim=1)
                assert torch.equal(changed, (of_frame == frame) & (of_batch == entry)), layer


@pytest.fixture(params=IMAGE_BUILDERS)
def tiny_image(request: pytest.FixtureRequest) -> TinyModel:
    return IMAGE_BUILDERS[request.param]()


class TestImageModels:
    def test_the_generic_rule_takes_their_blocks(self, tiny_image):
        family = family_or_generic(tiny_image.model)
        layers = quantizable_layers(tiny_image.model, family, QuantSpec())
        blocks = ("blocks", "joint_blocks", "transformer_blocks", "layers", "double_blocks", "single_blocks")
        inside = (*blocks, "noise_refiner", "context_refiner")
        assert is_image_model(tiny_image.model) and family.image and family.name == "generic image"
        assert layers and all(name.split(".")[0] in inside for name in layers)

    def test_they_run_quantized(self, tiny_image):
        assert quantized_error(tiny_image, 0.5) < 0.01


def quantized_error(tiny: TinyModel, timestep: float) -> float:
    """Squared error of a model quantized without data, over the square of its output."""
    model = quantize_model(copy.deepcopy(tiny.model), QuantSpec(temporal_quantizer="uniform"))
    with torch.no_grad():
        expected, found = tiny.forward(tiny.model, timestep), tiny.forward(model, timestep)
    return float((found - expected).square().mean() / expected.square().mean())


class TestQuantized:
    def test_a_quantized_model_runs_and_is_near(self, tiny):
        """Whatever is replaced is called as before: nothing reaches for the weight of a layer."""
        assert quantized_error(tiny, sum(family_of(tiny).timestep_range) / 2) < 0.01

    def test_a_calibrated_model_folds_and_is_near(self, tiny, request):
        if family_of(tiny).name == "LTX-2":
            reason = "the sampling clock does not take a pair of timesteps yet"
            request.applymarker(pytest.mark.xfail(raises=ValueError, strict=False, reason=reason))
        spec = QuantSpec(portable=True, temporal_quantizer="uniform", scale="smooth")
        lowest, highest = family_of(tiny).timestep_range
        steps = [lowest + share * (highest - lowest) for share in (0.9, 0.5, 0.1)]
        scales = calibrate_model(tiny.model, lambda: [tiny.forward(tiny.model, step) for step in steps], spec)
        model = quantize_model(copy.deepcopy(tiny.model), spec, scales)
        with torch.no_grad():
            expected, found = tiny.forward(tiny.model, steps[1]), tiny.forward(model, steps[1])
        assert (found - expected).square().mean() < 0.01 * expected.square().mean()

    def test_with_parameters_in_bfloat16_the_features_stay_near(self, tiny):
        family = family_of(tiny)
        if not family.temporal_features:
            pytest.skip("its features need data")
        model = copy.deepcopy(tiny.model).bfloat16()
        features, expected = grid_features(model, family), grid_features(tiny.model, family)
        found = torch.stack(list(features.values())) - torch.stack(list(expected.values()))
        assert F.normalize(found, dim=1).isfinite().all()
        assert found.square().mean() < 0.01 * torch.stack(list(expected.values())).square().mean()
