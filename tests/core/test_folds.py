"""Producer folds: with quantizers off, shift and scale moved into producers leave every family's output as it was."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qvd_core import QVDError
from qvd_core.families import Family, Fold
from qvd_core.folds import TensorEdit, fold_sites, foldable_transforms, producer_edits
from qvd_core.transform import Transform
from tests.core.family_counts import PLACES
from tests.core.folding import (
    family_of,
    fold_into_layers,
    gemm_layers,
    is_identity,
    output_error,
    random_transform,
    random_transforms,
    transform_inputs,
)
from tests.tiny_models import TINY_FAMILIES, tiny_family

EXACT = 1e-3  # METHOD 5.1: |dY| < 1e-3 rms
WRONG = 1e-2  # what a wrong fold must at least do


class TestExactness:
    @pytest.mark.parametrize("name", TINY_FAMILIES)
    def test_every_foldable_group_at_once(self, name):
        """Random transforms on every GEMM layer; what cannot be folded stays in front of the layer."""
        tiny = tiny_family(name)
        family = family_of(tiny)
        assert output_error(tiny, random_transforms(tiny.model, family), family) < EXACT

    @pytest.mark.parametrize("name", ["wan-image", "hunyuan", "ltx", "cogvideox"])
    def test_edits_commute_with_the_fold_of_the_same_layer(self, name):
        """Value projections are consumers and producers at once; either side first."""
        tiny = tiny_family(name)
        family = family_of(tiny)
        transforms = random_transforms(tiny.model, family)
        edits, _ = producer_edits(tiny.model, family, transforms)
        assert {name.removesuffix(".weight") for name in edits} & transforms.keys()
        assert output_error(tiny, transforms, family, layers_first=True) < EXACT

    def test_but_not_where_the_fold_makes_a_bias(self):
        """Why a loader edits a tensor before it folds the layer."""
        tiny = tiny_family("mochi")
        family = family_of(tiny)
        assert output_error(tiny, random_transforms(tiny.model, family), family, layers_first=True) > WRONG

    @pytest.mark.parametrize("name", TINY_FAMILIES)
    def test_nothing_folded(self, name):
        """Everything in front of the layers: the padded border of a convolution is transformed like its inside."""
        tiny = tiny_family(name)
        family = family_of(tiny)
        assert output_error(tiny, random_transforms(tiny.model, family), replace(family, folds=())) < EXACT

    @pytest.mark.parametrize("name", TINY_FAMILIES)
    def test_what_folds_completely_needs_nothing_in_front_of_a_layer(self, name):
        """As a stock runtime has it: transforms restricted to what folds, no remainder, nothing else touched."""
        tiny = tiny_family(name)
        family = family_of(tiny)
        transforms = foldable_transforms(tiny.model, family, random_transforms(tiny.model, family))
        sites = fold_sites(tiny.model, family)
        assert transforms.keys() == {consumer for site in sites for consumer in site.consumers}
        edits, remainders = producer_edits(tiny.model, family, transforms)
        assert edits and all(map(is_identity, remainders.values()))
        assert not all(map(is_identity, transforms.values()))
        assert output_error(tiny, transforms, family) < EXACT

    @settings(max_examples=12)
    @given(
        seed=st.integers(0, 2**16),
        shift=st.floats(0.0, 10.0),
        spread=st.floats(0.0, 1.5),
        left_out=st.sets(st.integers(0, 19), max_size=6),
    )
    def test_any_transform_of_any_layers(self, seed, shift, spread, left_out):
        tiny = tiny_family("wan")
        family = family_of(tiny)
        transforms = random_transforms(tiny.model, family, seed, shift=shift, spread=spread)
        transforms = {name: value for i, (name, value) in enumerate(transforms.items()) if i not in left_out}
        assert output_error(tiny, transforms, family) < EXACT


class TestPlaces:
    @pytest.mark.parametrize("name", TINY_FAMILIES)
    def test_counts(self, name):
        tiny = tiny_family(name)
        assert Counter(site.fold.kind for site in fold_sites(tiny.model, family_of(tiny))) == PLACES[name]

    @pytest.mark.parametrize("name", TINY_FAMILIES)
    def test_every_entry_and_every_name_in_it_is_of_use(self, name):
        tiny = tiny_family(name)
        family = family_of(tiny)
        sites = fold_sites(tiny.model, family)
        assert {site.fold for site in sites} == set(family.folds)
        same = [other for other in map(tiny_family, TINY_FAMILIES) if type(other.model) is type(tiny.model)]
        sites = [
            site for other in same for site in fold_sites(other.model, family)
        ]  # a name may be one variant's alone
        for fold in family.folds:
            found = {consumer for site in sites if site.fold == fold for consumer in site.consumers}
            assert all(any(layer.endswith(f".{consumer}") for layer in found) for consumer in fold.consumers), fold

    @pytest.mark.parametrize("name", TINY_FAMILIES)
    def test_a_layer_has_one_producer_and_shares_it_with_its_whole_group(self, name):
        tiny = tiny_family(name)
        family = family_of(tiny)
        layers = gemm_layers(tiny.model, family)
        consumers = [consumer for site in fold_sites(tiny.model, family) for consumer in site.consumers]
        assert len(consumers) == len(set(consumers)) and set(consumers) <= layers.keys()
        for site in fold_sites(tiny.model, family):
            groups = {family.input_group(consumer) for consumer in site.consumers}
            assert {layer for layer in layers if family.input_group(layer) in groups} == set(site.consumers)

    def test_the_skeleton_is_enough(self):
        tiny = tiny_family("mochi")
        family, meta = family_of(tiny), copy.deepcopy(tiny.model).to("meta")
        assert fold_sites(meta, family) == fold_sites(tiny.model, family)
        transforms = random_transforms(meta, family)
        edits, _ = producer_edits(meta, family, transforms)
        assert edits.keys() == producer_edits(tiny.model, family, transforms)[0].keys()

    def test_shift_needs_a_bias_and_a_norm_its_affine_part(self):
        def sites(**config: bool) -> list[tuple[bool, bool]]:
            model = nn.Module()
            model.block = nn.Module()
            model.block.norm = nn.LayerNorm(8, **config)
            model.block.linear = nn.Linear(8, 8)
            family = Family("f", ("F",), keep=(), folds=(Fold("norm", "block", ("norm",), ("linear",)),))
            return [(site.shift, site.scale) for site in fold_sites(model, family)]

        assert sites() == [(True, True)]
        assert sites(bias=False) == [(False, True)]
        assert sites(elementwise_affine=False) == []

    @pytest.mark.parametrize("name", ["animatediff", "svd", "mochi"])
    def test_values_without_bias_take_no_shift(self, name):
        tiny = tiny_family(name)
        values = [site for site in fold_sites(tiny.model, family_of(tiny)) if site.fold.kind == "value"]
        assert values and all(site.scale and not site.shift for site in values)


def with_fold(family: Family, old: Fold, new: Fold) -> Family:
    return replace(family, folds=tuple(new if fold == old else fold for fold in family.folds))


def find_fold(family: Family, kind: str, test: Callable[[Fold], bool] = lambda fold: True) -> Fold:
    return next(fold for fold in family.folds if fold.kind == kind and test(fold))


# (family, the fold that is made wrong, how). Every kind is there; each must change the output.
WRONG_FOLDS = {
    "norm: a consumer is missing": (
        "svd",
        ("norm", lambda fold: len(fold.consumers) == 3),
        {"consumers": ("attn1.to_q", "attn1.to_k")},
    ),
    "norm: positions are added after it": ("animatediff", ("norm", lambda fold: not fold.scale), {"scale": True}),
    "value: the other stream's projection is missing": (
        "hunyuan",
        ("value", lambda fold: len(fold.producers) == 2),
        {"producers": ("attn.to_v",)},
    ),
    "value: the other stream's output is missing": (
        "hunyuan",
        ("value", lambda fold: len(fold.consumers) == 2),
        {"consumers": ("attn.to_out.0",)},
    ),
    "value: the shift is taken off both addends": (
        "wan-image",
        ("value", lambda fold: bool(fold.addends)),
        {"addends": (), "producers": ("attn2.to_v", "attn2.add_v_proj")},
    ),
    "value: keys for values": (
        "ltx",
        ("value", lambda fold: fold.producers == ("attn1.to_v",)),
        {"producers": ("attn1.to_k",)},
    ),
    "gate: the half that is the gate": (
        "animatediff",
        ("gate", bool),
        {"kind": "modulation", "sections": ((1, None),)},
    ),
    "table: another row": ("wan", ("table", lambda fold: fold.sections == ((0, None),)), {"sections": ((2, None),)}),
    "modulation: one stream only": ("cogvideox", ("modulation", bool), {"sections": ((0, 1),)}),
    "modulation: the attention to the text is missing": (
        "motif",
        ("modulation", lambda fold: len(fold.consumers) == 5),
        {"consumers": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")},
    ),
    "modulation: one kind of rows out of three": (
        "minimax",
        ("modulation", bool),
        {"sections": ((0, 1),)},
    ),
    "modulation: scale before shift": ("hunyuan", ("modulation", bool), {"sections": ((1, 0),)}),
}


class TestWrongFolds:
    """A wrong registry entry must show: the exactness tests can fail, for every kind of fold."""

    @pytest.mark.parametrize("case", WRONG_FOLDS)
    def test_breaks_the_output(self, case):
        name, (kind, test), change = WRONG_FOLDS[case]
        tiny = tiny_family(name)
        family = family_of(tiny)
        fold = find_fold(family, kind, test)
        alone = replace(family, folds=(fold,))
        transforms = random_transforms(tiny.model, alone)
        assert output_error(tiny, transforms, alone) < EXACT
        assert output_error(tiny, transforms, replace(family, folds=(replace(fold, **change),))) > WRONG

    def test_every_kind_is_among_them(self):
        kinds = {kind for _, (kind, _), _ in WRONG_FOLDS.values()}
        assert kinds == {kind for places in PLACES.values() for kind in places}

    def test_rows_that_two_folds_want_are_refused(self):
        tiny = tiny_family("wan")
        family = family_of(tiny)
        table = [fold for fold in family.folds if fold.kind == "table"]
        wrong = with_fold(family, table[1], replace(table[1], sections=table[0].sections))
        with pytest.raises(QVDError, match=r"two folds want the same rows of blocks\.0\.scale_shift_table"):
            producer_edits(tiny.model, wrong, random_transforms(tiny.model, wrong))

    def test_a_zero_padded_convolution_takes_no_constant_bias(self):
        """Shifting before the padding leaves zeros at the border: the bias W z is wrong there."""
        tiny = tiny_family("animatediff")
        family = replace(family_of(tiny), folds=())
        transforms = random_transforms(tiny.model, family)
        model = copy.deepcopy(tiny.model)
        with torch.no_grad():
            fold_into_layers(model, transforms)
            transform_inputs(model, transforms, pad_first=False)
            expected, output = tiny.forward(tiny.model), tiny.forward(model)
        assert (output - expected).square().mean().sqrt() > WRONG * expected.square().mean().sqrt()

    @pytest.mark.parametrize(("padding", "shift"), [(0, True), (1, False)])
    def test_so_its_producer_takes_none(self, padding, shift):
        model = nn.Module()
        model.block = nn.Module()
        model.block.norm = nn.GroupNorm(2, 8)
        model.block.conv = nn.Conv2d(8, 8, 3, padding=padding)
        family = Family("f", ("F",), keep=(), folds=(Fold("norm", "block", ("norm",), ("conv",)),))
        (site,) = fold_sites(model, family)
        assert (site.shift, site.scale) == (shift, True)


class TestPartialFolds:
    def test_only_layers_that_agree_are_folded(self):
        tiny = tiny_family("wan")
        family = family_of(tiny)
        transforms = random_transforms(tiny.model, family)
        q, k, v = (f"blocks.0.attn1.to_{part}" for part in "qkv")
        transforms[k] = random_transform(32, torch.Generator().manual_seed(9))
        _, remainders = producer_edits(tiny.model, family, transforms)
        assert all(remainders[name] is transforms[name] for name in (q, k, v))
        assert is_identity(remainders["blocks.0.attn2.to_q"])
        assert not {q, k, v} & foldable_transforms(tiny.model, family, transforms).keys()
        assert output_error(tiny, transforms, family) < EXACT

    def test_a_layer_that_is_not_transformed_holds_its_producer_back(self):
        tiny = tiny_family("wan")
        family = family_of(tiny)
        transforms = random_transforms(tiny.model, family)
        del transforms["blocks.0.attn2.to_q"]
        edits, remainders = producer_edits(tiny.model, family, transforms)
        assert "blocks.0.norm2.weight" not in edits and "blocks.1.norm2.weight" in edits
        assert remainders.keys() == transforms.keys()

    def test_remainders(self):
        tiny = tiny_family("hunyuan")
        family = family_of(tiny)
        transforms = random_transforms(tiny.model, family)
        _, remainders = producer_edits(tiny.model, family, transforms)
        out, whole = (
            remainders["single_transformer_blocks.0.proj_out"],
            transforms["single_transformer_blocks.0.proj_out"],
        )
        assert not out.shift[:32].any() and (out.scale[:32] == 1).all()  # the attention's part
        assert torch.equal(out.shift[32:], whole.shift[32:]) and torch.equal(out.scale[32:], whole.scale[32:])
        assert remainders["transformer_blocks.0.ff.net.2"] is transforms["transformer_blocks.0.ff.net.2"]

    def test_a_shift_that_stays_is_scaled_with_the_input(self):
        tiny = tiny_family("mochi")
        family = family_of(tiny)
        transforms = random_transforms(tiny.model, family)
        _, remainders = producer_edits(tiny.model, family, transforms)
        name = "transformer_blocks.0.ff.net.2"
        torch.testing.assert_close(remainders[name].shift, transforms[name].shift / transforms[name].scale)
        assert (remainders[name].scale == 1).all()

    def test_a_rotation_stays(self):
        tiny = tiny_family("wan")
        family = family_of(tiny)
        name = "blocks.0.attn2.to_q"
        rotated = {name: replace(random_transforms(tiny.model, family)[name], rotation=16)}
        _, remainders = producer_edits(tiny.model, family, rotated)
        assert remainders[name].rotation == 16 and is_identity(replace(remainders[name], rotation=0))
        assert foldable_transforms(tiny.model, family, rotated)[name].rotation == 0

    def test_identities_edit_nothing(self):
        tiny = tiny_family("wan")
        family = family_of(tiny)
        identities = {
            name: Transform.identity(t.shift.numel()) for name, t in random_transforms(tiny.model, family).items()
        }
        edits, remainders = producer_edits(tiny.model, family, identities)
        assert not edits and all(map(is_identity, remainders.values()))

    def test_a_transform_of_another_width_is_refused(self):
        tiny = tiny_family("wan")
        transforms = {"blocks.0.attn2.to_q": Transform.identity(7)}
        with pytest.raises(QVDError, match=r"blocks\.0\.attn2\.to_q has 7 channels, its input has 32"):
            producer_edits(tiny.model, family_of(tiny), transforms)


class TestTensorEdit:
    def edit(self, name: str = "blocks.0.norm2.weight", scale: float = 2.0) -> TensorEdit:
        tiny = tiny_family("wan")
        transforms = {"blocks.0.attn2.to_q": Transform("t", torch.ones(32), torch.full((32,), scale))}
        return producer_edits(tiny.model, family_of(tiny), transforms)[0][name]

    def test_norm(self):
        gamma, beta = torch.randn(32), torch.randn(32)
        assert torch.equal(self.edit("blocks.0.norm2.weight").apply(gamma), gamma / 2)
        assert torch.equal(self.edit("blocks.0.norm2.bias").apply(beta), (beta - 1) / 2)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    def test_keeps_dtype_and_leaves_the_source_alone(self, dtype):
        source = torch.randn(32).to(dtype)
        before = source.clone()
        edited = self.edit().apply(source)
        assert edited.dtype == dtype and torch.equal(source, before) and torch.equal(edited, before / 2)

    def test_computes_in_float32(self):
        """A 16-bit tensor on its way to int8 is not rounded in between."""
        source = torch.randn(32).bfloat16()
        assert torch.equal(self.edit(scale=3.0).apply(source, torch.float32), source.float() / 3)

    def test_rows_of_one_tensor_edited_for_two_layers(self):
        tiny = tiny_family("wan")
        transforms = random_transforms(tiny.model, family_of(tiny))
        table = tiny.model.blocks[0].scale_shift_table
        edits, _ = producer_edits(tiny.model, family_of(tiny), transforms)
        edited = edits["blocks.0.scale_shift_table"].apply(table)
        expected = table.clone()
        expected[0, 0] -= transforms["blocks.0.attn1.to_q"].shift
        expected[0, 3] -= transforms["blocks.0.ffn.net.0.proj"].shift
        assert edited.shape == table.shape and torch.equal(edited, expected)

    def test_overflow_names_the_tensor_and_the_remedy(self):
        source = torch.full((32,), 6e4, dtype=torch.float16)
        with pytest.raises(
            QVDError, match=r"blocks\.0\.norm2\.weight leaves the range of torch\.float16: load .*bfloat16"
        ):
            self.edit(scale=0.5).apply(source)
        assert torch.isfinite(self.edit(scale=0.5).apply(source, torch.float32)).all()

    def test_another_shape_is_refused(self):
        with pytest.raises(QVDError, match=r"blocks\.0\.norm2\.weight is \[31\], its fold was made for \[32\]"):
            self.edit().apply(torch.ones(31))
