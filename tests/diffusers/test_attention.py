"""`attention=`: off by default, 8-bit attention where it can run, never in the way of running without it."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LTXVideoTransformer3DModel, ModelMixin, UNetMotionModel, WanPipeline, WanTransformer3DModel
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName
from torch._dynamo.testing import CompileCounter

from qvd_core.convert import quantize_model
from qvd_diffusers import QVDConfig, QVDError, set_attention
from qvd_diffusers import attention as module
from qvd_diffusers.cli import main
from tests.diffusers.tiny import tiny_wan_transformer

SAGE = AttentionBackendName.SAGE
REGISTRY = attention_dispatch._AttentionBackendRegistry
ATTENTION_LAYERS = 4  # of the tiny Wan: two blocks, each with self- and cross-attention


@pytest.fixture(autouse=True)
def same_default() -> Any:
    """Whatever a test does, the process keeps its default backend."""
    before = REGISTRY._active_backend
    yield
    assert REGISTRY._active_backend == before


@pytest.fixture
def sage(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """A SageAttention that is installed, runs on the CPU, computes plain attention and lists its query shapes."""
    calls: list[torch.Size] = []

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Any = None, **rest: Any) -> Any:
        assert attn_mask is None, "the real one raises"
        assert query.dtype in (torch.float16, torch.bfloat16), "the real one raises"
        calls.append(query.shape)
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: object() if name == "sageattention" else find_spec(name, *rest)
    )
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_SAGE_ATTN", True)
    monkeypatch.setitem(REGISTRY._backends, SAGE, attend)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(module, "SAGE_DEVICE", "cpu")
    return calls


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Our own log lines that a user sees, so far."""
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("qvd")]


def load(folder: Path, attention: str | None, dtype: torch.dtype = torch.bfloat16) -> Any:
    config = QVDConfig(attention=attention)
    return WanTransformer3DModel.from_pretrained(folder / "transformer", quantization_config=config, torch_dtype=dtype)


def recorded(folder: Path) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return entry


def run(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    video = torch.randn(1, 4, 2, 4, 4, generator=generator).to(model.dtype)
    text = torch.randn(1, 6, 32, generator=generator).to(model.dtype)
    out: torch.Tensor = model(video, torch.tensor([500]), text, return_dict=False)[0]
    return out


@torch.no_grad()
def sampled(model: Any) -> torch.Tensor:
    return run(model)


def backends(model: ModelMixin) -> set[Any]:
    return {getattr(layer.processor, "_attention_backend", "none") for layer in module._attention_layers(model)}


def test_auto_runs_an_installed_sageattention(wan_folder: Path, sage: list[torch.Size]) -> None:
    own = sampled(load(wan_folder, None))
    assert sage == []
    out = sampled(load(wan_folder, "auto"))
    assert len(sage) == ATTENTION_LAYERS
    torch.testing.assert_close(out, own, rtol=0.05, atol=0.05)


def test_none_leaves_the_model_alone(wan_folder: Path, tmp_path: Path, sage: list[torch.Size]) -> None:
    model = load(wan_folder, None)
    assert backends(model) == {None}
    assert not any(layer._forward_pre_hooks for layer in module._attention_layers(model))
    model.save_pretrained(tmp_path)
    assert not any("attention" in key for key in recorded(tmp_path))


def test_auto_without_sageattention_says_so_once_and_changes_nothing(
    wan_folder: Path, logged: Callable[[], list[str]]
) -> None:
    if importlib.util.find_spec("sageattention") is not None:
        pytest.skip("it is installed here")
    model = load(wan_folder, "auto")
    assert [line for line in logged() if "attention" in line] == [
        'WanTransformer3DModel keeps its own attention (attention="auto"): sageattention is not installed.'
    ]
    assert backends(model) == {None}
    assert torch.equal(sampled(model), sampled(load(wan_folder, None)))


@pytest.mark.parametrize(
    ("patches", "reason"),
    [
        ([(attention_dispatch, "_CAN_USE_SAGE_ATTN", False)], "older than this diffusers needs"),
        ([(torch.cuda, "is_available", lambda: False)], "needs an NVIDIA GPU"),
        ([(torch.version, "hip", "6.2")], "needs an NVIDIA GPU"),
        ([(torch.cuda, "get_device_capability", lambda device=None: (7, 5))], "this GPU has 7.5"),
        ([(REGISTRY, "_active_backend", AttentionBackendName._NATIVE_MATH)], "'_native_math' for every model"),
        ([(module, "SAGE_HEAD_DIM", 8)], "heads that are not known to fit"),
    ],
)
def test_auto_says_what_is_in_the_way(
    patches: list[tuple[Any, str, Any]],
    reason: str,
    sage: list[torch.Size],
    logged: Callable[[], list[str]],
) -> None:
    model = tiny_wan_transformer().bfloat16()
    with pytest.MonkeyPatch.context() as patch:
        for target, name, value in patches:
            patch.setattr(target, name, value)
        set_attention(model, "auto")
        assert len(logged()) == 1 and reason in logged()[0]
        sampled(model)
    assert sage == [] and backends(model) == {None}


def test_auto_leaves_float32_models_alone(
    wan_folder: Path, sage: list[torch.Size], logged: Callable[[], list[str]]
) -> None:
    model = load(wan_folder, "auto", torch.float32)
    assert len(logged()) == 1 and "torch_dtype=torch.bfloat16" in logged()[0]
    sampled(model)
    assert sage == []


def test_what_auto_chose_still_runs_on_another_device(
    sage: list[torch.Size], logged: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model is loaded on the CPU of a machine with a GPU, and runs where it is moved."""
    model = tiny_wan_transformer().bfloat16()
    own = sampled(model)
    set_attention(model, "auto")
    monkeypatch.setattr(module, "SAGE_DEVICE", "cuda")
    assert torch.equal(sampled(model), own) and torch.equal(sampled(model), own)
    assert sage == [] and len(logged()) == 1 and "not on a cuda device" in logged()[0]
    monkeypatch.setattr(module, "SAGE_DEVICE", "cpu")
    sampled(model)
    assert len(sage) == ATTENTION_LAYERS


def test_gradients_do_not_pass_through_sageattention(sage: list[torch.Size], logged: Callable[[], list[str]]) -> None:
    model = tiny_wan_transformer().bfloat16()
    set_attention(model, "auto")
    torch.autograd.backward(run(model).sum())
    assert sage == [] and "gradients are on" in logged()[0]
    assert model.blocks[0].attn1.to_q.weight.grad is not None


def test_layers_with_a_mask_keep_their_own_attention(sage: list[torch.Size], logged: Callable[[], list[str]]) -> None:
    torch.manual_seed(0)
    model = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=16,
    ).bfloat16()
    set_attention(model, "auto")
    video, text = torch.randn(1, 8, 8).bfloat16(), torch.randn(1, 3, 16).bfloat16()
    mask = torch.tensor([[1, 1, 0]])
    with torch.no_grad():
        model(video, text, torch.tensor([500]), mask, num_frames=2, height=2, width=2)
    assert len(sage) == 2  # the self-attention of both blocks; the prompt's has a mask
    assert len(logged()) == 1 and "where a mask is given" in logged()[0]


@pytest.mark.parametrize("wrong", ["sagee", "", 7, True, ["sage"]])
def test_a_wrong_name_is_one_clear_error(wrong: Any, wan_pipe: WanPipeline) -> None:
    for attempt in (lambda: QVDConfig(attention=wrong), lambda: set_attention(wan_pipe, wrong)):
        with pytest.raises(QVDError, match=r"attention must be None, 'auto' or a diffusers backend \(.*sage.*\), got"):
            attempt()


@pytest.mark.skipif(attention_dispatch._CAN_USE_FLASH_ATTN, reason="needs a backend that is not installed")
def test_a_backend_that_diffusers_refuses_is_an_error_before_anything_is_read(
    wan_folder: Path, wan_pipe: WanPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qvd_diffusers.quantizer.install_layers", lambda *_: pytest.fail("too late"))
    with pytest.raises(QVDError, match=r"attention='flash' cannot be used here: .*flash-attn.* or use attention="):
        load(wan_folder, "flash")
    with pytest.raises(QVDError, match="attention='flash' cannot be used here"):
        set_attention(wan_pipe, "flash")
    assert backends(wan_pipe.transformer) == {None}


def test_a_named_backend_is_set_for_this_model_only(wan_folder: Path) -> None:
    model = load(wan_folder, "_NATIVE_MATH")  # diffusers takes any case
    assert backends(model) == {AttentionBackendName._NATIVE_MATH}
    assert backends(load(wan_folder, None)) == {None}
    assert REGISTRY._active_backend == AttentionBackendName.NATIVE
    torch.testing.assert_close(sampled(model), sampled(load(wan_folder, None)), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("attention", ["auto", "sage", "native"])
def test_it_is_saved_and_restored(attention: str, wan_folder: Path, tmp_path: Path, sage: list[torch.Size]) -> None:
    load(wan_folder, attention).save_pretrained(tmp_path)
    # With an underscore it is a note: a reader from before `attention` passes over it.
    assert recorded(tmp_path)["_attention"] == attention and "attention" not in recorded(tmp_path)
    again = WanTransformer3DModel.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    sampled(again)
    assert len(sage) == (0 if attention == "native" else ATTENTION_LAYERS)
    again.save_pretrained(tmp_path / "again")
    assert recorded(tmp_path / "again")["_attention"] == attention


def test_the_command_records_it(wan_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["quantize", str(wan_folder), "--out", str(tmp_path / "int8"), "--attention"]
    assert main([*command, "nonsense"]) == 2
    assert "attention must be None, 'auto' or a diffusers backend" in capsys.readouterr().err
    assert main([*command, "auto"]) == 0
    assert recorded(tmp_path / "int8" / "transformer")["_attention"] == "auto"


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        ("sage_hub", "call qvd_diffusers.set_attention"),  # loading a checkpoint fetches no code
        ("sage", "cannot be used here"),
        ("of the future", "attention must be None"),
    ],
)
def test_a_checkpoint_loads_where_its_backend_is_missing(
    attention: str,
    reason: str,
    wan_folder: Path,
    tmp_path: Path,
    logged: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_SAGE_ATTN", False)
    monkeypatch.setattr(attention_dispatch, "_maybe_download_kernel_for_backend", lambda backend: pytest.fail("fetch"))
    monkeypatch.setattr(attention_dispatch, "is_kernels_available", lambda: True)
    monkeypatch.setattr(attention_dispatch, "is_kernels_version", lambda *_: True, raising=False)
    load(wan_folder, "auto").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"_attention": "auto"', f'"_attention": "{attention}"'))
    before = len(logged())
    model = WanTransformer3DModel.from_pretrained(tmp_path)
    (line,) = logged()[before:]
    assert f"saved with attention={attention!r} and keeps its own: " in line and reason in line
    assert backends(model) == {None} and sampled(model).isfinite().all()
    assert model.config["quantization_config"].attention == attention  # for the machine that has it


@pytest.mark.parametrize("attention", ["auto", "native"])
def test_legacy_processors_are_reported_and_keep_working(
    attention: str, animate_folder: Path, sage: list[torch.Size], logged: Callable[[], list[str]]
) -> None:
    config = QVDConfig(attention=attention)
    folder = animate_folder / "unet"
    unet = UNetMotionModel.from_pretrained(folder, quantization_config=config, torch_dtype=torch.bfloat16)
    (line,) = logged()
    assert "keeps its own attention" in line and "does not go through diffusers' dispatcher" in line
    with torch.no_grad():
        video, text = torch.randn(1, 4, 2, 8, 8).bfloat16(), torch.randn(2, 4, 32).bfloat16()
        assert unet(video, torch.tensor(5), text).sample.isfinite().all()
    assert sage == []


def test_set_attention_serves_models_quantized_in_place_and_pipelines(
    wan_pipe: WanPipeline, sage: list[torch.Size]
) -> None:
    model = quantize_model(wan_pipe.transformer).bfloat16()
    set_attention(model, "auto")
    sampled(model)
    assert len(sage) == ATTENTION_LAYERS
    set_attention(wan_pipe, None)
    sampled(model)
    assert len(sage) == ATTENTION_LAYERS and backends(model) == {None}
    set_attention(wan_pipe, "auto")
    sampled(model)
    assert len(sage) == 2 * ATTENTION_LAYERS
    assert sum(len(layer._forward_pre_hooks) for layer in module._attention_layers(model)) == ATTENTION_LAYERS


def test_set_attention_changes_what_is_saved(wan_folder: Path, tmp_path: Path) -> None:
    model = load(wan_folder, "native")
    set_attention(model, None)
    model.save_pretrained(tmp_path)
    assert "_attention" not in recorded(tmp_path) and backends(model) == {None}


@pytest.mark.parametrize("wrong", [torch.nn.Linear(2, 2), "transformer", None])
def test_set_attention_needs_a_model_with_attention(wrong: Any) -> None:
    with pytest.raises(QVDError, match="has no attention to choose: give a diffusers model"):
        set_attention(wrong, "auto")


def test_a_later_choice_through_diffusers_has_the_last_word(sage: list[torch.Size]) -> None:
    model = tiny_wan_transformer().bfloat16()
    set_attention(model, "auto")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(REGISTRY, "_active_backend", REGISTRY._active_backend)  # diffusers changes it: put it back
        run(model)  # with gradients, so that the next call would switch
        model.set_attention_backend("_native_math")
        sampled(model)
        assert backends(model) == {AttentionBackendName._NATIVE_MATH}
        model.reset_attention_backend()
        sampled(model)
    assert sage == []


def test_copies_choose_for_themselves(sage: list[torch.Size]) -> None:
    model = tiny_wan_transformer().bfloat16()
    set_attention(model, "auto")
    duplicate = copy.deepcopy(model)
    set_attention(model, None)
    sampled(model)
    assert sage == []
    sampled(duplicate)
    assert len(sage) == ATTENTION_LAYERS


@torch.no_grad()
def test_it_compiles_into_one_graph_once(sage: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    model = tiny_wan_transformer().bfloat16()
    own = run(model)
    # Something that is no attention and has no memory: a list of calls would be a reason to compile again.
    monkeypatch.setitem(REGISTRY._backends, SAGE, lambda query, **rest: query + 1)
    set_attention(model, "auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the compiler would ask the GPU more
    graphs = CompileCounter()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    first, second, eager = run(compiled), run(compiled), run(model)
    assert graphs.frame_count == 1 and torch.equal(first, second)
    torch.testing.assert_close(first, eager, rtol=0.05, atol=0.05)
    assert not torch.allclose(first, own, rtol=0.05, atol=0.05)
