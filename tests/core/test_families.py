"""The registry: patterns anchored on whole name parts, and entries that hold for the real models."""

from __future__ import annotations

import copy
import inspect
import logging
from contextlib import contextmanager
from functools import partial
from itertools import combinations, product

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from qvd_core import QuantSpec, QVDError, find_family
from qvd_core.families import FAMILIES, Family, family_or_generic
from qvd_core.families.patterns import has_parts, matches
from qvd_core.plan import quantizable_layers
from qvd_core.temporal_fit import embed_timesteps
from tests.core.family_counts import LAYER_COUNTS, MORE_THAN_THE_TIMESTEP
from tests.core.folding import family_of, gemm_layers
from tests.tiny_models import BATCH, CLASS_OF, FRAMES, TINY_FAMILIES, TinyFamily, missing_class, tiny_family
from tests.tiny_models.classes import VIDEO_CLASSES

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
    def test_parts_are_whole_ones_in_a_row(self, name, wanted):
        runs = [name[start : start + len(wanted)] for start in range(len(name))]
        assert has_parts(".".join(name), [".".join(wanted)]) == (wanted in runs)


def inputs_read(tiny: TinyFamily, names, timestep=500.0, latents=None) -> dict[str, set[tuple]]:
    """What each layer reads in one call: shape, sum and sum of squares of every input."""
    read: dict[str, set[tuple]] = {}

    def remember(name, x):
        x = x.double()
        read.setdefault(name, set()).add((tuple(x.shape), float(x.sum()), float(x.square().sum())))

    with watching(tiny.model, names, remember), torch.no_grad():
        tiny.call(tiny.model, tiny.latents if latents is None else latents, timestep)
    return read


@contextmanager
def watching(model, names, remember):
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


@pytest.fixture(params=TINY_FAMILIES)
def tiny(request) -> TinyFamily:
    return tiny_family(request.param)


class TestEntries:
    def test_every_entry_names_real_classes(self):
        for family in FAMILIES:
            assert family.classes and set(family.classes) <= VIDEO_CLASSES.keys()

    def test_every_entry_is_tested(self):
        installed = {family.name for family in FAMILIES if any(hasattr(diffusers, name) for name in family.classes)}
        assert {family_of(tiny_family(name)).name for name in TINY_FAMILIES} == installed

    def test_found_by_model_and_by_name(self, wan):
        assert find_family(wan.model) is find_family("WanTransformer3DModel")
        assert find_family("WanTransformer3DModel").name == "Wan"
        assert find_family("UNetMotionModel").name == "AnimateDiff"
        assert find_family("Unheard") is None and find_family(nn.Linear(2, 2)) is None

    def test_layers_that_share_an_input_are_exactly_those_grouped(self, tiny):
        """The claim a shared transform stands on, checked on the tensors that the layers read."""
        family, names = family_of(tiny), gemm_layers(tiny.model, family_of(tiny))
        read = inputs_read(tiny, names)
        claimed: dict[str, set[str]] = {}
        for name in names:
            claimed.setdefault(family.input_group(name), set()).add(name)
        assert not family.shared_inputs or max(map(len, claimed.values())) >= 2
        for group in claimed.values():
            assert len({frozenset(read.get(name, ())) for name in group}) == 1, group
        # Within one block nothing that reads the same tensor is left apart, but for the prompt, which all blocks read.
        for name, other in combinations(names, 2):
            if read.get(name) == read.get(other) and not (family.reads_prompt(name) and family.reads_prompt(other)):
                assert family.input_group(name) == family.input_group(other), (name, other)

    def test_layers_that_read_the_prompt_are_exactly_those_named(self, tiny):
        """Other latents leave their input as it was; so do other timesteps, where these do not modulate the prompt."""
        family, names = family_of(tiny), gemm_layers(tiny.model, family_of(tiny))
        early, late = inputs_read(tiny, names, 900), inputs_read(tiny, names, 100, tiny.latents + 1.0)
        other = inputs_read(tiny, names, 900, tiny.latents + 1.0)
        named = {name for name in names if family.reads_prompt(name)}
        assert {name for name in names if early.get(name) == late.get(name)} <= named
        assert named <= {name for name in names if early.get(name) == other.get(name)}
        assert bool(named) == bool(family.prompt_inputs)

    @pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
    def test_every_pattern_of_an_entry_is_of_use(self, family):
        """A pattern that matches nothing in any variant is a typing error; two parts no tiny model has are exempt."""
        variants = [name for class_name in family.classes for name in VIDEO_CLASSES[class_name]]
        for reason in filter(None, map(missing_class, variants)):
            pytest.skip(reason)
        names = [name for variant in variants for name, _ in tiny_family(variant).model.named_modules()]
        patterns = (*family.keep, *family.temporal, *family.prompt_inputs, *(name for name, _ in family.frame_order))
        for pattern in patterns:
            exempt = pattern in ("add_embedding.**", "encoder_hid_proj.**")
            assert exempt or any(matches(name, (pattern,)) for name in names), pattern
        for parent, children in family.shared_inputs:
            for child in children:
                assert any(matches(name, (f"{parent}.{child}",)) for name in names), (parent, child)

    @pytest.mark.parametrize("name", TINY_FAMILIES)
    def test_kept_and_temporal_layers(self, name):
        model, family = tiny_family(name).model, family_of(tiny_family(name))
        layers = quantizable_layers(model, family, QuantSpec())
        temporal = [layer for layer in layers if family.is_temporal(layer)]
        assert (len(layers), len(temporal)) == LAYER_COUNTS[name]
        assert not [layer for layer in temporal if family.keeps(layer)]
        assert not {"proj_in", "proj_out", "conv_in", "conv_out", "patch_embedding"} & layers.keys()
        embedders = ("embed", "_embedder", "_embedding", "caption_projection", "norm_out")
        inside = [layer for layer in layers if any(part.endswith(embedders) for part in layer.split("."))]
        assert set(inside) <= set(temporal)  # the projection of a shared embedding has its name

    def test_temporal_features_are_what_the_projections_read(self, tiny):
        """The data-free feature path, module after module, gives the tensor that the model hands its projections."""
        family = family_of(tiny)
        names = [name for name, _ in tiny.model.named_modules() if family.is_temporal(name)]
        seen: dict[str, torch.Tensor] = {}
        with watching(tiny.model, names, seen.__setitem__), torch.no_grad():
            tiny.forward(tiny.model, 500)
        assert seen.keys() == set(names)
        if family.temporal_features:
            features = embed_timesteps(tiny.model, family, torch.tensor([500.0]))
            for x in seen.values():
                rows = x.reshape(-1, features.shape[-1])
                torch.testing.assert_close(rows, features.expand_as(rows), rtol=1e-5, atol=1e-6)

    def test_which_embeddings_hold_more_than_the_timestep(self):
        without = {name for name in TINY_FAMILIES if not family_of(tiny_family(name)).temporal_features}
        assert without == set(MORE_THAN_THE_TIMESTEP) & set(TINY_FAMILIES)
        assert family_of(tiny_family("cogvideox-ofs")).name == "CogVideoX"  # it embeds ofs besides

    def test_arguments_of_the_forward_pass(self, tiny):
        family = family_of(tiny)
        parameters = inspect.signature(tiny.model.forward).parameters
        assert {family.sample_argument, family.timestep_argument} - {""} <= parameters.keys()
        if family.frames_dim is not None:
            assert tiny.latents.shape[family.frames_dim] == FRAMES and list(tiny.latents.shape).count(FRAMES) == 1


def keep_frames_apart(model: nn.Module, patch: pytest.MonkeyPatch) -> nn.Module:
    """A copy that hands nothing from frame to frame: self-attention returns each token's own value, group norms do
    nothing, temporal convolutions see their middle frame only."""

    def attend(query, key, value, *args, **kwargs):
        return value if query.shape == value.shape else query + value.mean(dim=-2, keepdim=True)

    patch.setattr(F, "scaled_dot_product_attention", attend)
    patch.setattr(F, "group_norm", lambda x, *args, **kwargs: x)
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Conv3d) and module.kernel_size[0] == 3:
            module.weight.data[:, :, (0, 2)] = 0.0
    return model


WITH_FRAME_ORDER = [name for name in TINY_FAMILIES if getattr(find_family(CLASS_OF[name]), "frame_order", ())]


class TestFrameOrder:
    @pytest.mark.parametrize("name", WITH_FRAME_ORDER)
    def test_rows_belong_to_the_frames_they_are_said_to(self, name, monkeypatch):
        """With nothing handed from frame to frame, another frame f changes exactly the rows of f, in every layer."""
        tiny, family = tiny_family(name), family_of(tiny_family(name))
        model = keep_frames_apart(tiny.model, monkeypatch)
        layers = [layer for layer in gemm_layers(model, family) if family.frame_order_of(layer)]

        def rows(latents):
            inputs: dict[str, torch.Tensor] = {}
            with watching(model, layers, inputs.__setitem__), torch.no_grad():
                tiny.call(model, latents, 500)
            moved = {layer: x.movedim(1, -1) if x.dim() == 4 else x for layer, x in inputs.items()}
            return {layer: x.reshape(-1, x.shape[-1]) for layer, x in moved.items()}

        before = rows(tiny.latents)
        for frame, entry in product(range(FRAMES), range(BATCH)):
            latents = tiny.latents.clone()
            latents.movedim(family.frames_dim, 1)[entry, frame] += 1.0
            for layer, x in rows(latents).items():
                m = torch.arange(len(x))
                of_batch = m // (len(x) // BATCH)
                order = family.frame_order_of(layer)
                of_frame = (m // (len(x) // (BATCH * FRAMES))) % FRAMES if order == "major" else m % FRAMES
                changed = (x != before[layer]).any(dim=1)
                assert x.isfinite().all() and torch.equal(changed, (of_frame == frame) & (of_batch == entry)), layer

    @pytest.mark.parametrize("name", TINY_FAMILIES)
    def test_who_has_one(self, name):
        """All layers that see the rows of frames alone, or none; a convolution over time sees whole clips."""
        tiny, family = tiny_family(name), family_of(tiny_family(name))
        layers = gemm_layers(tiny.model, family)
        known = [layer for layer in layers if family.frame_order_of(layer)]
        over_time = {name for name, module in tiny.model.named_modules() if isinstance(module, nn.Conv3d)}
        of_video = [layer for layer in layers if not family.reads_prompt(layer) and layer not in over_time]
        expected = of_video if family.frame_order else []
        assert known == expected
        orders = {family.frame_order_of(layer) for layer in known}
        assert orders == {order for _, order in family.frame_order if order}

    def test_kept_and_temporal_layers_have_none(self):
        family = family_of(tiny_family("animatediff"))
        names = ["conv_in", "down_blocks.0.resnets.0.time_emb_proj", "down_blocks.0.resnets.0.conv1"]
        assert [family.frame_order_of(name) for name in names] == [None, None, "major"]


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

    @pytest.mark.parametrize("name", ["NewTransformer3DModel", "UNet3DMotionModel", "MyVideoModel"])
    def test_other_video_denoisers_are_not(self, name):
        assert family_or_generic(name).name == "generic"


def test_input_group_needs_the_parent_pattern():
    family = Family("f", ("F",), keep=(), shared_inputs=(("blocks.*.attn", ("q", "k")),))
    assert family.input_group("blocks.0.attn.q") == family.input_group("blocks.0.attn.k")
    assert family.input_group("blocks.0.attn.q") != family.input_group("blocks.1.attn.q")
    assert family.input_group("blocks.0.attn.v") == "blocks.0.attn.v"
    assert family.input_group("other.0.attn.q") == "other.0.attn.q"
