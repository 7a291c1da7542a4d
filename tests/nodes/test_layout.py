"""The quantized weight as one tensor of ComfyUI, against float64 algebra and a Hadamard matrix written down."""

from __future__ import annotations

import pytest
import torch
from comfy.quant_ops import QuantizedTensor
from comfy_kitchen.tensor import get_layout_class
from comfy_kitchen.tensor.base import LAYOUTS
from torch import Tensor

from qvd_core.packing import unpack_int4
from qvd_nodes.layout import CALIBRATED, LAYOUT_NAME, QVDInt8Layout, QVDTensor, is_quantized
from tests.nodes.layer_cases import INPUTS, Case, case, hadamard_matrix

variants = pytest.mark.parametrize(
    "made",
    [
        case(),
        case(calibrated=False),
        case(rotation=16),
        case(rotation=8, weight_bits=4),
        case(weight_bits=6),
        case(weight_bits=4, calibrated=False),
        case("conv2d"),
        case("conv2d", weight_bits=4),
        case("conv3d", rotation=4),
        case("temporal"),
    ],
    ids=lambda made: f"{made.recipe.plan.kind}-{made.recipe.spec.weight_bits}-{made.recipe.plan.rotation}",
)


def parts(made: Case, weight: QuantizedTensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """float64: codes times scale [N, K, taps], shift [K], scale [K], rotation [K, K]."""
    params = weight._params
    shape = made.module.weight.shape
    codes = unpack_int4(weight._qdata, shape) if made.recipe.weight_bits == 4 else weight._qdata
    plain = (codes.double() * params.scale.double()).flatten(2) if codes.dim() > 2 else codes.double()[..., None]
    if codes.dim() == 2:
        plain = plain * params.scale.double()[..., None]
    zeros, ones = torch.zeros(INPUTS, dtype=torch.float64), torch.ones(INPUTS, dtype=torch.float64)
    shift = zeros if params.input_shift is None else params.input_shift.double()
    scale = ones if params.input_scale is None else params.input_scale.double()
    return plain, shift, scale, hadamard_matrix(made.recipe.plan.rotation, INPUTS)


def changed(made: Case, weight: QuantizedTensor, seed: int = 5) -> Tensor:
    """The float weight after a LoRA: what `convert_weight` gives, and a difference as large as the weight."""
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    return weight.dequantize().float() + noise * made.module.weight.float().std()


@variants
class TestQuantize:
    def test_dequantizing_undoes_the_transform(self, made: Case) -> None:
        plain, _, scale, rotation = parts(made, made.weight)
        expected = torch.einsum("nkt,kj->njt", plain, rotation) / scale[None, :, None]
        found = made.weight.dequantize().double().reshape(expected.shape)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

    def test_a_changed_weight_is_within_half_a_step_of_the_float_one(self, made: Case) -> None:
        weight = made.weight
        target = changed(made, weight)
        found = weight.requantize_from_float(target)
        plain, _, scale, rotation = parts(made, found)
        wanted = torch.einsum("nkt,kj->njt", target.double().reshape(plain.shape) * scale[None, :, None], rotation)
        step = found._params.scale.double().reshape(-1, 1, 1)
        limit = {4: 7, 6: 31, 8: 127}[made.recipe.weight_bits]
        inside = (wanted.abs() <= limit * step).double()
        assert ((plain - wanted).abs() * inside <= 0.5001 * step).all()

    def test_a_changed_weight_keeps_everything_but_codes_scale_and_fold(self, made: Case) -> None:
        weight = made.weight
        found = weight.requantize_from_float(changed(made, weight))
        assert is_quantized(found) and found.dtype == torch.float32 and found.shape == weight.shape
        assert not torch.equal(found._qdata, weight._qdata)
        assert found._params.recipe == weight._params.recipe
        for name in CALIBRATED:
            before, after = getattr(weight._params, name), getattr(found._params, name)
            assert (before is None and after is None) or torch.equal(before, after)

    def test_the_fold_is_exact_where_the_input_is_the_shift(self, made: Case) -> None:
        """There x - z is zero, so that no rounding is left: y = W' z + b, and what rounding had taken from W z.

        Changed twice, as a scheduled LoRA does: each time from the codes of the time before.
        """
        first = made.weight
        original = made.module.weight.double()
        bias = torch.zeros(len(original)).double() if made.bias is None else made.tensors["bias"].double()
        _, shift, _, _ = parts(made, first)
        taken = (original - first.dequantize().double()).flatten(2) if original.dim() > 2 else None
        lost = (taken.sum(2) if taken is not None else original - first.dequantize().double()) @ shift
        before = bias - (original.flatten(2).sum(2) if original.dim() > 2 else original) @ shift  # b of the float layer
        weight = first
        for seed in (5, 6):
            target = changed(made, weight, seed)
            after = weight.requantize_from_float(target)
            sums = target.double().flatten(2).sum(2) if target.dim() > 2 else target.double()
            fold = torch.zeros_like(bias) if after._params.fold is None else after._params.fold.double()
            torch.testing.assert_close(bias + fold, sums @ shift + before + lost, rtol=1e-5, atol=1e-4)
            rest = target.double() - after.dequantize().double()
            lost = lost + (rest.flatten(2).sum(2) if rest.dim() > 2 else rest) @ shift
            weight = after

    def test_without_a_shift_there_is_nothing_to_fold(self, made: Case) -> None:
        arguments = QVDInt8Layout.requantize_kwargs(made.weight)
        assert ("carried" in arguments) is (made.weight._params.input_shift is not None)


class TestTensor:
    def test_flattened_and_back(self) -> None:
        weight = case().weight
        names, context = weight.__tensor_flatten__()
        inner = {name: getattr(weight, name) for name in names}
        assert {"_qdata", "_param_scale", "_param_input_shift", "_param_input_scale"} == set(names)
        back = QVDTensor.__tensor_unflatten__(inner, context, weight.shape, weight.stride())
        assert isinstance(back, QVDTensor) and torch.equal(back.dequantize(), weight.dequantize())
        assert back._params.recipe == weight._params.recipe

    def test_moving_takes_every_tensor_along(self) -> None:
        moved = case("temporal").weight.to("meta")
        assert moved._qdata.is_meta and is_quantized(moved)
        present = [name for name in ("scale", *CALIBRATED) if getattr(moved._params, name) is not None]
        assert set(present) == {"scale", "levels", "boundaries", "offset", "gain"}
        assert all(getattr(moved._params, name).is_meta for name in present)

    def test_a_cast_changes_the_type_and_neither_codes_nor_scales(self) -> None:
        weight = case().weight
        cast = weight.to(torch.bfloat16)
        assert cast.dtype == torch.bfloat16 and cast.dequantize().dtype == torch.bfloat16
        assert torch.equal(cast._qdata, weight._qdata) and torch.equal(cast._params.scale, weight._params.scale)
        assert weight.to(torch.float32) is weight

    @pytest.mark.parametrize("inference", [True, False])
    def test_a_copy_is_independent(self, inference: bool) -> None:
        weight = case().weight
        before = weight.dequantize()
        with torch.inference_mode(inference):
            for other in (weight.clone(), weight.to(torch.float32, copy=True)):
                assert other is not weight and other._qdata.data_ptr() != weight._qdata.data_ptr()
                other._qdata.zero_()
        assert torch.equal(weight.dequantize(), before)

    def test_detached_is_the_same_memory(self) -> None:
        weight = case().weight
        assert isinstance(weight.detach(), QVDTensor)
        assert weight.detach()._qdata.data_ptr() == weight._qdata.data_ptr()

    @pytest.mark.parametrize("as_float", [True, False])
    def test_written_into_all_views_change_and_no_other_tensor(self, as_float: bool) -> None:
        made = case()
        weight, separate = made.weight, made.weight
        view = weight.detach()
        scale = weight._params.scale
        kept = scale.clone()
        target = changed(made, weight)
        expected = weight.requantize_from_float(target)
        weight.copy_(target if as_float else expected)
        for tensor in (weight, view):
            assert torch.equal(tensor.dequantize(), expected.dequantize())
            assert torch.equal(tensor._params.fold, expected._params.fold)
        assert torch.equal(scale, kept) and not torch.equal(separate.dequantize(), weight.dequantize())

    def test_its_bytes_are_those_of_the_codes(self) -> None:
        eight, four = case().weight, case(weight_bits=4).weight
        assert four.nbytes * 2 == eight.nbytes == eight.numel() and four.shape == eight.shape

    def test_it_computes_as_its_float_weight_where_nobody_knows_it(self) -> None:
        weight = case().weight
        torch.testing.assert_close(weight + 1, weight.dequantize() + 1)


class TestRegistration:
    def test_no_shortcut_for_comfyuis_own_format_is_taken(self) -> None:
        """They are chosen by the layout's name."""
        assert get_layout_class(LAYOUT_NAME) is QVDInt8Layout and LAYOUT_NAME not in ("TensorWiseINT8Layout",)
        assert [name for name, layout in LAYOUTS.items() if layout is QVDInt8Layout] == [LAYOUT_NAME]

    def test_other_tensors_are_not_quantized(self) -> None:
        assert not is_quantized(torch.zeros(2, 2)) and not is_quantized(None)
