"""The registry: patterns anchored on whole name parts, and entries that hold for the real models."""

from __future__ import annotations

import logging
from functools import partial

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qvd_core import QuantSpec, QVDError, find_family
from qvd_core.families import FAMILIES, Family, family_or_generic
from qvd_core.families.patterns import has_prefix, matches
from qvd_core.plan import quantizable_layers

parts = st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=5)


class TestPatterns:
    @pytest.mark.parametrize(
        ("pattern", "name", "expected"),
        [
            ("proj_out", "proj_out", True),
            ("proj_out", "single_blocks.3.proj_out", False),
            ("proj_out", "proj_out.lora", False),
            ("proj_out", "my_proj_out", False),
            ("blocks.*.to_q", "blocks.7.to_q", True),
            ("blocks.*.to_q", "blocks.7.attn.to_q", False),
            ("blocks.*.to_q", "blocks.to_q", False),
            ("blocks.*.to_q", "blocks.7.to_q_proj", False),
            ("**.to_q", "to_q", True),
            ("**.to_q", "a.b.to_q", True),
            ("**.to_q", "a.not_to_q", False),
            ("text.**", "text", True),
            ("text.**", "text.a.b", True),
            ("text.**", "textual.a", False),
            ("a.**.b", "a.b", True),
            ("a.**.b", "a.x.y.b", True),
            ("a.b", "axb", False),  # a dot is no wildcard
        ],
    )
    def test_examples(self, pattern, name, expected):
        assert matches(name, (pattern,)) is expected

    @given(parts, parts)
    def test_a_literal_matches_only_itself(self, first, second):
        assert matches(".".join(first), (".".join(second),)) == (first == second)

    @given(parts, parts)
    def test_stars_count_parts(self, name, other):
        assert matches(".".join(name), (".".join("*" * len(other)),)) == (len(name) == len(other))
        assert matches(".".join([*other, *name]), ("**." + ".".join(name),))
        assert matches(".".join([*name, *other]), (".".join(name) + ".**",))

    @given(parts, parts)
    def test_prefix_is_whole_parts(self, name, prefix):
        assert has_prefix(".".join(name), [".".join(prefix)]) == (name[: len(prefix)] == prefix)


def inputs_read(denoiser, model, names, timestep=500) -> dict[str, set[tuple]]:
    """What each layer of `model` reads in one call at a timestep: shape, sum and sum of squares of every input."""
    read: dict[str, set[tuple]] = {}

    def remember(name, module, args, kwargs):
        x = args[0] if args else kwargs["input"]
        x = x.double()
        read.setdefault(name, set()).add((tuple(x.shape), float(x.sum()), float(x.square().sum())))

    handles = [
        model.get_submodule(name).register_forward_pre_hook(partial(remember, name), with_kwargs=True) for name in names
    ]
    try:
        with torch.no_grad():
            denoiser.forward(model, timestep)
    finally:
        for handle in handles:
            handle.remove()
    return read


def gemm_layers(denoiser) -> list[str]:
    family = find_family(denoiser.model)
    layers = quantizable_layers(denoiser.model, family, QuantSpec())
    return [name for name in layers if not family.is_temporal(name)]


class TestEntries:
    def test_every_entry_names_real_classes(self):
        for family in FAMILIES:
            assert all(hasattr(diffusers, name) for name in family.classes)

    def test_found_by_model_and_by_name(self, wan):
        assert find_family(wan.model) is find_family("WanTransformer3DModel")
        assert find_family("WanTransformer3DModel").name == "Wan"
        assert find_family("UNetMotionModel").name == "AnimateDiff"
        assert find_family("Unheard") is None and find_family(nn.Linear(2, 2)) is None

    def test_layers_that_share_an_input_are_exactly_those_grouped(self, denoiser):
        """The claim a shared transform stands on, checked on the tensors that the layers read."""
        family, names = find_family(denoiser.model), gemm_layers(denoiser)
        read = inputs_read(denoiser, denoiser.model, names)
        claimed: dict[str, set[str]] = {}
        for name in names:
            claimed.setdefault(family.input_group(name), set()).add(name)
        assert max(map(len, claimed.values())) == 3
        for group in claimed.values():
            assert len({frozenset(read[name]) for name in group}) == 1, group
        # Within one parent module nothing that reads the same tensor is left apart.
        for name in names:
            parent = name.rpartition(".")[0]
            for other in names:
                if other.rpartition(".")[0] == parent and read[name] == read[other]:
                    assert family.input_group(name) == family.input_group(other), (name, other)

    def test_layers_that_read_the_prompt_are_exactly_those_named(self, denoiser):
        """Their input alone is the same at other timesteps and for other latents."""
        family, names = find_family(denoiser.model), gemm_layers(denoiser)
        other = denoiser.copy()
        (other.conv_in if hasattr(other, "conv_in") else other.patch_embedding).bias.data += 1.0  # as other latents do
        early, late = inputs_read(denoiser, denoiser.model, names, 900), inputs_read(denoiser, other, names, 100)
        constant = [name for name in names if early[name] == late[name]]
        assert constant and constant == [name for name in names if family.reads_prompt(name)]

    def test_every_pattern_of_an_entry_is_of_use(self, denoiser):
        """A pattern that matches nothing is a typing error; image-conditioned models have the few that are exempt."""
        family = find_family(denoiser.model)
        names = [name for name, _ in denoiser.model.named_modules()]
        optional = ("image_embedder", "add_embedding", "encoder_hid_proj", "add_k_proj", "add_v_proj")
        for pattern in (*family.keep, *family.temporal, *family.prompt_inputs):
            assert any(map(pattern.__contains__, optional)) or any(matches(name, (pattern,)) for name in names), pattern
        for parent, children in family.shared_inputs:
            found = [name for name in names if matches(name.rpartition(".")[0], (parent,)) and name.endswith(children)]
            assert found or children[0] in optional, parent

    def test_kept_and_temporal_layers_of_wan(self, wan):
        family = find_family(wan.model)
        layers = quantizable_layers(wan.model, family, QuantSpec())
        assert len(layers) == 1 + 2 * 10
        assert [name for name in layers if family.is_temporal(name)] == ["condition_embedder.time_proj"]
        assert not [
            name for name in layers if name == "proj_out" or ("embedder.t" in name and not family.is_temporal(name))
        ]

    def test_kept_and_temporal_layers_of_the_unet(self, unet):
        family = find_family(unet.model)
        layers = quantizable_layers(unet.model, family, QuantSpec())
        resnets = [name for name, _ in unet.model.named_modules() if name.endswith(".time_emb_proj")]
        assert resnets and [name for name in layers if family.is_temporal(name)] == resnets
        assert not {"conv_in", "conv_out", "time_embedding.linear_1"} & layers.keys()
        assert "down_blocks.0.resnets.0.conv1" in layers

    def test_temporal_features_are_what_the_projections_read(self, denoiser):
        """The data-free feature path, module after module, gives the tensor that the model hands its projections."""
        family = find_family(denoiser.model)
        modules = dict(denoiser.model.named_modules())
        seen = []
        projection = next(name for name in modules if family.is_temporal(name))
        handle = modules[projection].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        with torch.no_grad():
            denoiser.forward(denoiser.model, 500)
            handle.remove()
            features = torch.tensor([500.0])
            for name in family.temporal_features:
                features = modules[name](features)
        rows = seen[0].reshape(-1, features.shape[-1])
        torch.testing.assert_close(rows, features.expand_as(rows), rtol=1e-5, atol=1e-6)


class TestUnknownModels:
    def test_generic_rule_with_one_line(self, caplog):
        model = nn.Sequential(
            nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 63), nn.Conv2d(64, 64, 1), nn.Linear(64, 64)
        )
        with caplog.at_level(logging.WARNING, logger="qvd_core"):
            family = family_or_generic(model)
        assert [record.getMessage().count("\n") for record in caplog.records] == [0]
        assert "Sequential" in caplog.text and "generic" in caplog.text
        assert list(quantizable_layers(model, family, QuantSpec())) == ["1", "3"]

    def test_two_layers_are_both_taken(self):
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        assert list(quantizable_layers(model, family_or_generic(model), QuantSpec())) == ["0", "1"]

    @pytest.mark.parametrize(
        "name",
        [
            "AutoencoderKLWan",
            "VQModel",
            "CLIPTextModel",
            "UMT5EncoderModel",
            "T5EncoderModel",
            "UNet2DConditionModel",
            "FluxTransformer2DModel",
            "SD3Transformer2DModel",
            "HunyuanDiT2DModel",
            "CLIPVisionModel",
        ],
    )
    def test_what_is_no_video_denoiser_is_refused(self, name):
        with pytest.raises(QVDError, match=f"{name} is not a video denoiser"):
            family_or_generic(type(name, (nn.Module,), {})())

    @pytest.mark.parametrize(
        "name", ["CogVideoXTransformer3DModel", "UNet3DConditionModel", "I2VGenXLUNet", "MyVideoModel"]
    )
    def test_other_video_denoisers_are_not(self, name):
        assert family_or_generic(name).name == "generic"


def test_input_group_needs_the_parent_pattern():
    family = Family("f", ("F",), keep=(), shared_inputs=(("blocks.*.attn", ("q", "k")),))
    assert family.input_group("blocks.0.attn.q") == family.input_group("blocks.0.attn.k")
    assert family.input_group("blocks.0.attn.q") != family.input_group("blocks.1.attn.q")
    assert family.input_group("blocks.0.attn.v") == "blocks.0.attn.v"
    assert family.input_group("other.0.attn.q") == "other.0.attn.q"
