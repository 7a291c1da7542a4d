"""The entries for ComfyUI's models, against module trees recorded from a real checkout. Needs no ComfyUI."""

from __future__ import annotations

import logging
from collections import Counter
from functools import cache

import pytest
import torch
from torch import nn

from qvd_core import QuantSpec, QVDError
from qvd_core.families import (
    COMFYUI_FAMILIES,
    FAMILIES,
    Family,
    Sinusoid,
    family_or_generic,
    find_family,
    is_image_model,
)
from qvd_core.families.patterns import matches
from qvd_core.folds import fold_sites
from qvd_core.plan import quantizable_layers
from qvd_core.temporal_fit import embed_timesteps, grid_features, sinusoidal_features
from tests.comfyui import snapshot_trees, trees
from tests.comfyui.counts import LAYERS, MORE_THAN_THE_TIMESTEP, PLACES

VIDEO_CLASSES = sorted({name for family in COMFYUI_FAMILIES for name in family.classes})
CLASS_OF = {name: class_name for class_name in VIDEO_CLASSES for name in trees.read(class_name)}


@cache
def recorded(name: str) -> nn.Module:
    """The skeleton of a tiny model."""
    return trees.skeleton(CLASS_OF[name], trees.read(CLASS_OF[name])[name])


def family_of(model: nn.Module) -> Family:
    family = find_family(model)
    assert family is not None
    return family


def models_of(family: Family) -> list[nn.Module]:
    """The skeletons of all tiny models that an entry stands for."""
    models = [recorded(name) for name, class_name in CLASS_OF.items() if class_name in family.classes]
    return [
        model for model in models if family_of(model).folds == family.folds and family_of(model).name == family.name
    ]


@pytest.fixture(params=CLASS_OF)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


class TestEntries:
    def test_every_tiny_model_is_counted(self):
        assert set(LAYERS) == set(PLACES) == set(CLASS_OF)
        assert set(snapshot_trees.MODELS) == set(VIDEO_CLASSES) == set(trees.recorded_classes())

    def test_layers_are_as_counted(self, name):
        model = recorded(name)
        int8, temporal, _ = snapshot_trees.layer_counts(model, family_of(model))
        assert (int8, temporal, family_of(model).name) == LAYERS[name]

    def test_places_of_folds_are_as_counted(self, name):
        model = recorded(name)
        assert Counter(site.fold.kind for site in fold_sites(model, family_of(model))) == PLACES[name]

    def test_no_layer_folds_twice(self, name):
        model = recorded(name)
        consumers = Counter(layer for site in fold_sites(model, family_of(model)) for layer in site.consumers)
        assert set(consumers.values()) <= {1}

    def test_folds_take_whole_groups(self, name):
        """Layers that share an input share what folds into its producer."""
        model, family = recorded(name), family_of(recorded(name))
        groups = {}
        for layer in quantizable_layers(model, family, QuantSpec()):
            groups.setdefault(family.input_group(layer), set()).add(layer)
        for site in fold_sites(model, family):
            for layer in site.consumers:
                assert groups[family.input_group(layer)] <= set(site.consumers), site

    def test_no_modulation_is_missed(self, name):
        """Whatever is called like a modulation is temporal or kept."""
        model, family = recorded(name), family_of(recorded(name))
        words = {"mod", "modulation", "adaLN_modulation", "adaln_single", "adaln", "emb_layers", "time_projection"}
        for layer in quantizable_layers(model, family, QuantSpec()):
            named = any(part in words or part.endswith(("_mod", "_modulation")) for part in layer.split("."))
            assert not named or family.is_temporal(layer), layer

    def test_embedders_and_last_layers_are_kept(self, name):
        model, family = recorded(name), family_of(recorded(name))
        endings = (
            "embed",
            "_embedder",
            "_embedding",
            "_in",
            "_emb",
            "final_layer",
            "head",
            "img_emb",
            "text_embedding",
        )
        allowed = {"ff_in", "proj_in"}  # parts of a transformer
        for layer in quantizable_layers(model, family, QuantSpec()):
            parts = [part for part in layer.split(".") if part.endswith(endings) and part not in allowed]
            assert not parts or family.is_temporal(layer), layer

    @pytest.mark.parametrize("family", COMFYUI_FAMILIES, ids=lambda family: f"{family.name} {family.classes[0]}")
    def test_every_pattern_of_an_entry_is_of_use(self, family):
        """A pattern that matches nothing in any variant is a typing error."""
        models = models_of(family)
        names = [layer for model in models for layer, _ in model.named_modules()]
        patterns = (*family.keep, *family.temporal, *family.prompt_inputs, *(order for order, _ in family.frame_order))
        for pattern in patterns:
            assert any(matches(layer, (pattern,)) for layer in names), pattern
        for parent, children in family.shared_inputs:
            for child in children:
                assert any(matches(layer, (f"{parent}.{child}",)) for layer in names), (parent, child)
        used = {site.fold for model in models for site in fold_sites(model, family)}
        assert used == set(family.folds)
        parts = {part for part in family.temporal_features if isinstance(part, str)}
        assert all(parts <= {layer for layer, _ in model.named_modules()} for model in models)

    def test_which_embeddings_hold_more_than_the_timestep(self):
        assert {name for name in CLASS_OF if not family_of(recorded(name)).temporal_features} == set(
            MORE_THAN_THE_TIMESTEP
        )

    def test_classes_are_named_once(self):
        """A second entry for a class tells its models apart by their modules."""
        unsigned = [name for family in COMFYUI_FAMILIES if not family.signature for name in family.classes]
        assert len(unsigned) == len(set(unsigned))
        of_diffusers = {name for family in FAMILIES for name in family.classes}
        assert not of_diffusers & set(unsigned)


class TestSignatures:
    def test_a_model_belongs_to_the_entry_that_describes_it(self):
        assert family_of(recorded("svd")).name == "Stable Video Diffusion"
        assert family_of(recorded("sd15")).name == "Stable Diffusion UNet"
        assert family_of(recorded("wan")).frame_order and not family_of(recorded("wan-reference")).frame_order

    def test_a_class_name_alone_is_its_plain_entry(self):
        assert find_family("UNetModel").name == "Stable Diffusion UNet"
        assert find_family("WanModel").name == "Wan"


class TestImageModels:
    def test_they_take_the_generic_rule_with_a_note(self, caplog):
        model = trees.skeleton("QwenImageTransformer2DModel", [(f"{i}", "linear", 64, 64) for i in range(4)])
        with caplog.at_level(logging.INFO, logger="qvd_core"):
            family = family_or_generic(model)
        assert is_image_model(model) and family.image
        assert "generic rule" in caplog.text and "makes no videos" in caplog.text
        assert list(quantizable_layers(model, family, QuantSpec())) == ["1", "2"]

    def test_those_of_diffusers_are_still_refused(self):
        model = type("QwenImageTransformer2DModel", (nn.Module,), {"__module__": "diffusers.models"})()
        assert not is_image_model(model)
        with pytest.raises(QVDError, match="is not a video denoiser"):
            family_or_generic(model)

    def test_video_models_are_none(self, name):
        assert is_image_model(recorded(name)) == (name in ("sd15", "sdxl", "anima", "joyimage"))

    def test_an_unknown_class_is_none(self):
        assert not is_image_model(trees.skeleton("BrandNewDiT", []))
        assert family_or_generic(trees.skeleton("BrandNewDiT", [])).name == "generic"


class _CastingLinear(nn.Linear):
    """As ComfyUI's: its weight follows the type of its input."""

    comfy_cast_weights = True

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class _Embedding(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.time_in = nn.Sequential(linear(16, 8), nn.SiLU())


class TestSinusoids:
    @pytest.mark.parametrize("embedding", [Sinusoid(), Sinusoid(1000.0), Sinusoid(2.0, 100.0, sine_first=True)])
    @pytest.mark.parametrize("channels", [16, 17])
    def test_against_float64(self, embedding, channels):
        timesteps = torch.tensor([0.0, 0.25, 1.0])
        half = channels // 2
        expected = torch.zeros(3, channels, dtype=torch.float64)
        for row, timestep in enumerate(timesteps.double()):
            for i in range(half):
                angle = embedding.factor * timestep * embedding.maximum_period ** (-i / half)
                first, second = (angle.sin(), angle.cos()) if embedding.sine_first else (angle.cos(), angle.sin())
                expected[row, i], expected[row, half + i] = first, second
        found = sinusoidal_features(timesteps, embedding, channels)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)

    def test_channels_are_those_of_the_first_linear(self):
        family = Family("f", ("F",), keep=(), temporal_features=(Sinusoid(), "time_in"), timestep_range=(0.0, 1.0))
        features = grid_features(_Embedding(nn.Linear), family)
        assert max(features) == 1.0 and min(features) == 0.0 and len(features) == 1001
        assert features[0.5].shape == (8,)

    @pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
    def test_layers_that_cast_their_weights_get_what_the_model_runs_in(self, stored):
        family = Family("f", ("F",), keep=(), temporal_features=(Sinusoid(), "time_in"))
        model = _Embedding(_CastingLinear)
        model.time_in[0].to(stored)
        steps = torch.tensor([3.0])
        assert embed_timesteps(model, family, steps, torch.bfloat16).dtype == torch.bfloat16
        assert embed_timesteps(model, family, steps).isfinite().all()


def test_the_page_is_what_the_trees_say():
    assert snapshot_trees.PAGE.read_text(encoding="utf-8") == snapshot_trees.table()
