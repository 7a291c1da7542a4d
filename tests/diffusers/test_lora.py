"""LoRA on int8 layers: what it changes, how adapters are combined, merged, refused, and saved."""

from __future__ import annotations

import warnings

import pytest
import torch
from diffusers import WanPipeline
from peft import (
    BOFTConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from qvd_core import QuantSpec, QVDError, load_checkpoint, save_checkpoint, shared_input
from qvd_core.layers import QuantizedLayer, QuantLinear
from qvd_core.ops import dispatch
from qvd_core.requantize import float_layer, requantize
from qvd_core.temporal_layer import TemporalLinear
from qvd_diffusers import QVDConfig
from qvd_diffusers.lora import FUSE_WARNING
from tests.diffusers.adapters import (
    DENOISERS,
    FOUR_BITS,
    STATIC,
    TOKEN,
    Denoiser,
    cosine,
    noise,
    same,
    sqnr_db,
    tensors,
    wan,
)
from tests.diffusers.tiny import WAN_CALL, sample_frames

pytestmark = pytest.mark.filterwarnings("ignore:Merging an adapter")


@pytest.fixture(params=list(DENOISERS))
def denoiser(request) -> Denoiser:
    return DENOISERS[request.param]()


@pytest.fixture(params=[TOKEN, STATIC, FOUR_BITS], ids=["token", "static", "4 bits"])
def quantized_wan(request):
    """Wan's tiny transformer, quantized without and with SCRI."""
    return wan().quantized(request.param)


def representable(layer: QuantLinear) -> Tensor:
    """Rows that no static step clips, with a mean far from zero."""
    rows = noise(200, layer.in_features).clamp(-3, 3)
    if layer.activation_scale is None:
        return rows + 0.5
    assert layer.input_shift is not None and layer.input_scale is not None
    return rows / 3 * 127 * layer.activation_scale * layer.input_scale + layer.input_shift


def as_peft_model(denoiser: Denoiser) -> PeftModel:
    """The quantized model with its adapter, made by peft without diffusers."""
    config = LoraConfig(r=4, lora_alpha=4, target_modules=list(denoiser.targets))
    model = get_peft_model(denoiser.quantized(), config)
    weights = {
        f"base_model.model.{key.removeprefix(denoiser.prefix + '.')}": value
        for key, value in denoiser.adapter().items()
    }
    assert not set_peft_model_state_dict(model, weights).unexpected_keys
    return model


def effect(denoiser: Denoiser, adapted: nn.Module, base: nn.Module) -> Tensor:
    return denoiser.run(adapted) - denoiser.run(base)


class TestRunning:
    def test_same_effect_as_on_the_full_precision_model(self, denoiser):
        weights = denoiser.adapter()
        model = denoiser.load(denoiser.quantized(), weights)
        expected = denoiser.load(denoiser.copy(), weights)
        found = effect(denoiser, model, denoiser.quantized())
        assert cosine(found, effect(denoiser, expected, denoiser.model)) >= 0.99
        assert sqnr_db(denoiser.run(model), denoiser.run(expected)) >= 25.0

    def test_with_calibrated_steps(self):
        """These hold what the model did without the adapter: a strong one needs dynamic steps."""
        denoiser, weights = wan(), wan().adapter(strength=0.1)
        model = denoiser.load(denoiser.quantized(STATIC), weights)
        expected = denoiser.load(denoiser.copy(), weights)
        found = effect(denoiser, model, denoiser.quantized(STATIC))
        assert cosine(found, effect(denoiser, expected, denoiser.model)) >= 0.99

    def test_the_adapter_sees_the_original_input(self):
        denoiser = wan()
        wrapper = denoiser.load(denoiser.quantized(STATIC), denoiser.adapter()).blocks[0].attn1.to_q
        assert wrapper.base_layer.input_shift.abs().max() > 0
        x = noise(3, 32)
        with torch.no_grad():
            added = wrapper.lora_B["first"](wrapper.lora_A["first"](x))
            torch.testing.assert_close(wrapper(x), wrapper.base_layer(x) + added)

    def test_several_with_weights(self, denoiser):
        first, second = denoiser.adapter(), denoiser.adapter(seed=1, rank=2)
        found = []
        for model in (denoiser.quantized(), denoiser.copy()):
            denoiser.load(denoiser.load(model, first), second, "second")
            model.set_adapters(["first", "second"], [0.5, -1.0])
            found.append(denoiser.run(model))
        assert sqnr_db(*found) >= 25.0
        only_first = denoiser.load(denoiser.quantized(), first)
        model = denoiser.load(denoiser.load(denoiser.quantized(), first), second, "second")
        model.delete_adapters("second")
        model.set_adapters("first")
        assert torch.equal(denoiser.run(model), denoiser.run(only_first))

    def test_disabled_or_unloaded_nothing_is_left_of_it(self, denoiser):
        base = denoiser.quantized()
        model = denoiser.load(denoiser.quantized(), denoiser.adapter())
        adapted = denoiser.run(model)
        model.disable_lora()
        assert torch.equal(denoiser.run(model), denoiser.run(base))
        model.enable_lora()
        assert torch.equal(denoiser.run(model), adapted)
        model.unload_lora()
        assert torch.equal(denoiser.run(model), denoiser.run(base)) and same(tensors(model), tensors(base))
        assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())

    def test_hotswap(self, denoiser):
        model = denoiser.load(denoiser.quantized(), denoiser.adapter())
        denoiser.load(model, denoiser.adapter(seed=1), hotswap=True)
        expected = denoiser.load(denoiser.quantized(), denoiser.adapter(seed=1))
        assert torch.equal(denoiser.run(model), denoiser.run(expected))

    def test_hotswap_of_a_compiled_model_compiles_nothing_again(self):
        denoiser, second = wan(), wan().adapter(seed=1, rank=4)
        model = denoiser.quantized()
        model.enable_lora_hotswap(target_rank=4)
        denoiser.load(model, denoiser.adapter(rank=2))
        torch._dynamo.reset()
        model.compile(fullgraph=True, backend="eager")
        denoiser.run(model)
        with torch._dynamo.config.patch(error_on_recompile=True):
            denoiser.load(model, second, hotswap=True)
            found = denoiser.run(model)
        expected = denoiser.run(denoiser.load(denoiser.quantized(), second))
        assert sqnr_db(found, expected) > 40.0

    def test_in_bfloat16(self):
        denoiser, weights = wan(), wan().adapter()
        model = denoiser.load(denoiser.quantized().bfloat16(), weights)
        assert {parameter.dtype for name, parameter in model.named_parameters() if "lora" in name} == {torch.bfloat16}
        expected = denoiser.run(denoiser.load(denoiser.copy(), weights))
        assert cosine(denoiser.run(model), expected) > 0.995

    def test_layers_that_share_an_input_still_quantize_it_once(self, monkeypatch):
        attention = wan().load(wan().quantized(QuantSpec(backend="reference")), wan().adapter()).blocks[0].attn1
        monkeypatch.setattr(shared_input, "SMALL_INPUT", 0)
        calls: list[Tensor] = []
        reference = dispatch.backend("reference")
        original = reference.quantize_rows
        monkeypatch.setattr(reference, "quantize_rows", lambda x, *rest: calls.append(x) or original(x, *rest))
        x = noise(2, 5, 32)
        with torch.no_grad():
            for layer in (attention.to_q, attention.to_k, attention.to_v):
                layer(x)
        assert len(calls) == 1


class TestFusing:
    @pytest.mark.parametrize("route", ["safe", "layers", "unload"])
    def test_every_route_gives_the_same_codes(self, denoiser, route):
        model, expected = (denoiser.load(denoiser.quantized(), denoiser.adapter()) for _ in range(2))
        expected.fuse_lora()
        if route == "safe":
            model.fuse_lora(safe_fusing=True)
        elif route == "layers":
            for module in model.modules():
                if isinstance(module, BaseTunerLayer):
                    module.merge(adapter_names=["first"])
        else:
            model = as_peft_model(denoiser).merge_and_unload()
        assert same(tensors(model), tensors(expected))
        assert not same(tensors(model), tensors(denoiser.quantized()))

    def test_keeps_the_effect(self, denoiser):
        model = denoiser.load(denoiser.quantized(), denoiser.adapter())
        adapted = denoiser.run(model)
        model.fuse_lora()
        assert sqnr_db(denoiser.run(model), adapted) >= 25.0

    def test_in_every_kind_of_layer(self, quantized_wan):
        """Shift, scale and packed codes: the delta acts on the original input, and the bias stays unbiased."""
        denoiser = wan()
        enough = 10.0 if quantized_wan.blocks[0].attn1.to_q.weight_bits == 4 else 30.0
        denoiser.load(quantized_wan, denoiser.adapter())
        for name, module in quantized_wan.named_modules():
            if isinstance(module, BaseTunerLayer) and isinstance(module.base_layer, QuantLinear):
                x = representable(module.base_layer)
                with torch.no_grad():
                    expected = module(x)
                    module.merge()
                    found = module(x)
                assert sqnr_db(found, expected) > enough, name

    def test_unfusing_brings_every_bit_back(self, quantized_wan):
        denoiser = wan()
        before = tensors(quantized_wan)
        denoiser.load(denoiser.load(quantized_wan, denoiser.adapter()), denoiser.adapter(seed=1), "second")
        quantized_wan.set_adapters(["first", "second"], [1.0, 0.5])
        adapted = denoiser.run(quantized_wan)
        quantized_wan.fuse_lora(adapter_names=["first"])
        quantized_wan.fuse_lora(adapter_names=["second"])
        assert not same(tensors(quantized_wan), before)
        quantized_wan.unfuse_lora()
        assert same(tensors(quantized_wan), before) and torch.equal(denoiser.run(quantized_wan), adapted)

    def test_disabling_a_fused_adapter_unfuses_it(self):
        denoiser = wan()
        model = denoiser.load(denoiser.quantized(), denoiser.adapter())
        model.fuse_lora()
        model.disable_lora()
        assert torch.equal(denoiser.run(model), denoiser.run(denoiser.quantized()))

    def test_weight_of_the_fusion(self):
        denoiser = wan()
        model = denoiser.load(denoiser.quantized(), denoiser.adapter())
        model.set_adapters("first", 0.5)
        expected = denoiser.run(model)
        again = denoiser.load(denoiser.quantized(), denoiser.adapter())
        again.fuse_lora(lora_scale=0.5)
        assert sqnr_db(denoiser.run(again), expected) >= 30.0

    def test_one_warning(self):
        model = wan().load(wan().quantized(), wan().adapter())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            model.fuse_lora()
            model.unfuse_lora()
        assert [str(warning.message) for warning in caught] == [FUSE_WARNING]

    def test_temporal_layers_forget_their_table(self):
        denoiser = wan()
        model = denoiser.load(denoiser.quantized(), denoiser.adapter(targets=("time_proj",)))
        layer = model.condition_embedder.time_proj.base_layer
        adapted = denoiser.run(model)
        assert isinstance(layer, TemporalLinear) and len(layer.table) > 0
        model.fuse_lora()
        assert len(layer.table) == 0
        assert sqnr_db(denoiser.run(model), adapted) >= 30.0

    @pytest.mark.parametrize("safe", [True, False])
    def test_a_damaged_adapter_changes_nothing(self, safe):
        denoiser = wan()
        model = denoiser.load(denoiser.quantized(), denoiser.adapter())
        layer = model.blocks[0].attn1.to_q
        before = tensors(layer)
        layer.lora_B["first"].weight.data[0, 0] = torch.nan
        with pytest.raises((QVDError, ValueError), match="NaN"):
            layer.merge(safe_merge=safe)
        assert same(tensors(layer), before) and not layer.merged

    def test_an_offloaded_weight_is_refused(self):
        layer = wan().load(wan().quantized(), wan().adapter()).blocks[0].attn1.to_q
        layer.base_layer.to("meta")
        with pytest.raises(QVDError, match="then enable offloading"):
            layer.merge()

    def test_requantizing_what_is_there_changes_nothing(self):
        model = wan().quantized(STATIC)
        before = tensors(model)
        for layer in model.modules():
            if isinstance(layer, QuantizedLayer):
                requantize(layer, float_layer(layer))
        for key, value in tensors(model).items():
            torch.testing.assert_close(value, before[key], rtol=1e-5, atol=1e-5, msg=key)


class TestOtherAdapters:
    @pytest.mark.parametrize(
        ("config", "reason"),
        [
            (LoraConfig(r=2, use_dora=True), "Dora.*needs the float weight"),
            (LoraConfig(r=2, init_lora_weights="pissa"), "'pissa' splits the float weight"),
            (LoraConfig(r=2, init_lora_weights="olora"), "'olora' splits the float weight"),
            (BOFTConfig(boft_block_size=4), "boft Linear computes with the float weight"),
            (IA3Config(feedforward_modules=[]), "ia3 Linear computes with the float weight"),
            (HRAConfig(r=2), "hra HRALinear computes with the float weight"),
        ],
    )
    def test_refused(self, config, reason):
        config.target_modules = {"to_q"}
        with pytest.raises(QVDError, match=reason):
            inject_adapter_in_model(config, wan().quantized())

    @pytest.mark.parametrize("config", [LoKrConfig(r=4, alpha=4), LoHaConfig(r=4, alpha=4)])
    def test_kronecker_and_hadamard_products(self, config, denoiser):
        config.target_modules = {"to_q", "conv1"}
        config.init_weights = False
        adapted = []
        for model in (denoiser.quantized(), denoiser.copy()):
            torch.manual_seed(3)
            adapted.append(inject_adapter_in_model(config, model))
        assert sqnr_db(denoiser.run(adapted[0]), denoiser.run(adapted[1])) >= 25.0
        before, expected = tensors(adapted[0]), denoiser.run(adapted[0])
        layers = [module for module in adapted[0].modules() if isinstance(module, BaseTunerLayer)]
        for layer in layers:
            layer.merge()
        assert not same(tensors(adapted[0]), before)
        assert sqnr_db(denoiser.run(adapted[0]), expected) >= 30.0
        for layer in layers:
            layer.unmerge()
        assert same(tensors(adapted[0]), before)

    def test_two_kinds_on_one_layer_are_refused(self):
        model = wan().load(wan().quantized(), wan().adapter())
        with pytest.raises(QVDError, match="an adapter of another kind already"):
            inject_adapter_in_model(LoKrConfig(r=2, target_modules=["to_q"]), model, "other")


class TestPipeline:
    def test_load_fuse_save_and_load_again(self, wan_folder, tmp_path):
        weights = wan().adapter()
        pipe = WanPipeline.from_pretrained(wan_folder, quantization_config=QVDConfig())
        plain = sample_frames(pipe, WAN_CALL)
        pipe.save_pretrained(tmp_path / "quantized")
        stored = WanPipeline.from_pretrained(tmp_path / "quantized")
        for each in (pipe, stored):
            each.load_lora_weights(dict(weights), adapter_name="first")
        adapted = sample_frames(pipe, WAN_CALL)
        torch.testing.assert_close(sample_frames(stored, WAN_CALL), adapted)
        before = tensors(pipe.transformer)

        pipe.fuse_lora(components=["transformer"])
        assert pipe.fused_loras == {"first"}
        pipe.unfuse_lora(components=["transformer"])
        assert same(tensors(pipe.transformer), before)
        pipe.fuse_lora(components=["transformer"], safe_fusing=True)
        pipe.unload_lora_weights()
        fused = sample_frames(pipe, WAN_CALL)
        assert (fused - adapted).abs().max() < (fused - plain).abs().max()
        pipe.save_pretrained(tmp_path / "fused")
        again = WanPipeline.from_pretrained(tmp_path / "fused")
        assert same(tensors(again.transformer), tensors(pipe.transformer))

    def test_core_checkpoint_of_a_fused_model(self, tmp_path):
        model = wan().load(wan().quantized(), wan().adapter())
        model.fuse_lora()
        model.unload_lora()
        save_checkpoint(model, tmp_path / "fused.safetensors")
        assert same(tensors(load_checkpoint(wan().copy(), tmp_path / "fused.safetensors")), tensors(model))

    def test_saving_an_adapter(self, wan_folder, tmp_path):
        pipe = WanPipeline.from_pretrained(wan_folder, quantization_config=QVDConfig())
        weights = wan().adapter()
        pipe.load_lora_weights(dict(weights), adapter_name="first")
        layers = get_peft_model_state_dict(pipe.transformer, adapter_name="first")
        WanPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)
        model = wan().copy()
        model.load_lora_adapter(tmp_path, weight_name="pytorch_lora_weights.safetensors", adapter_name="first")
        assert torch.equal(wan().run(model), wan().run(wan().load(wan().copy(), weights)))
