"""The kernel bench: what it judges by, that it finds a wrong kernel, how it resumes, what it reports. Tiny shapes."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import kernel_tables, kernels, machine
from benchmarks.kernel_problem import Problem
from benchmarks.kernel_results import Entry, Store, read, write
from benchmarks.kernel_rows import FULL_PRECISION, ROWS, Prepared, Row, RowUnavailable, rows_for
from benchmarks.kernel_shapes import Shape, choose, shapes_for

CPU = torch.device("cpu")
LINEAR = Shape("tiny", "qkv", 24, 40, 24)
STRIDED = Shape("tiny", "down", 2, 8, 16, (9, 8), (3, 3), (2, 2), (1, 1))
TEMPORAL = Shape("tiny", "temporal", 1, 8, 16, (4, 5, 6), (3, 1, 1), (1, 1, 1), (1, 0, 0))
SHAPES = (LINEAR, STRIDED, TEMPORAL)


def layer(x: Tensor, weight: Tensor, bias: Tensor | None, shape: Shape) -> Tensor:
    """The layer by PyTorch; x [M, K] or [B, C, *space], not padded."""
    if shape.kind == "linear":
        return F.linear(x, weight, bias)
    convolve = F.conv2d if len(shape.space) == 2 else F.conv3d
    return convolve(x, weight, bias, shape.stride, shape.padding)


def saturating_sums(codes: Tensor, weight: Tensor) -> Tensor:
    """codes [M, K] x weight [N, K] as `vpmaddubsw` sums them: pairs of products saturate at 16 bits."""
    products = (codes.int() + 128).unsqueeze(1) * weight.int()
    pairs = products.unflatten(-1, (-1, 2)).sum(-1).clamp(-(2**15), 2**15 - 1)
    return (pairs.sum(-1) - 128 * weight.int().sum(-1)).float()


def right_sums(codes: Tensor, weight: Tensor) -> Tensor:
    return (codes.double() @ weight.double().T).float()


def sums_with_one_wrong(codes: Tensor, weight: Tensor) -> Tensor:
    sums = right_sums(codes, weight)
    sums[len(sums) // 2, -1] += 1
    return sums


def fake_row(run: Callable[[Problem], Tensor], integer: Callable[[Tensor, Tensor], Tensor] | None = None) -> Row:
    return Row("fake", "torch", lambda problem: Prepared(lambda: run(problem), 0, integer=integer))


def plain(problem: Problem) -> Tensor:
    return layer(problem.x, problem.weight, problem.bias, problem.shape)


# --- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_names_of_shapes_are_unique_and_every_wanted_kind_of_convolution_is_there(device: str) -> None:
    shapes = shapes_for(device)
    assert [name for name, count in Counter(shape.name for shape in shapes).items() if count > 1] == []
    kinds = {(shape.kernel, max(shape.stride)) for shape in shapes if shape.kind == "conv"}
    assert kinds == {((3, 3), 1), ((3, 3), 2), ((1, 1), 1), ((3, 1, 1), 1), ((3, 3, 3), 1)}
    assert {"wan-1.3b", "wan-14b", "hunyuan", "ltx"} <= {shape.model for shape in shapes if shape.kind == "linear"}


def test_shapes_are_chosen_by_name_model_or_kind() -> None:
    assert {shape.model for shape in choose(shapes_for("cpu"), ["ltx"])} == {"ltx"}
    assert {shape.kind for shape in choose(shapes_for("cpu"), ["conv"])} == {"conv"}
    assert [shape.batch for shape in choose(shapes_for("cpu"), ["wan-1.3b qkv 256x*"])] == [256]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.layer)
def test_a_shape_knows_the_size_of_its_output(shape: Shape) -> None:
    output = plain(Problem(shape, CPU))
    assert tuple(output.shape) == (shape.batch, shape.outputs, *shape.out_space)
    assert shape.rows * shape.outputs == output.numel()


# --- the judge --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.layer)
def test_the_reference_is_the_layer_in_float64_at_the_judged_positions(shape: Shape) -> None:
    problem = Problem(shape, CPU)
    whole = layer(problem.x.double(), problem.weight.double(), problem.bias.double(), shape)
    torch.testing.assert_close(problem.reference, problem.judged(whole), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.layer)
@pytest.mark.parametrize("bits", [8, 4])
def test_the_integer_sums_are_those_of_int64(shape: Shape, bits: int) -> None:
    problem = Problem(shape, CPU)
    case = problem.integer_case(bits)
    if shape.kind == "linear":
        whole = case.codes.long() @ case.weight.long().T
    else:
        padded = dataclasses.replace(shape, padding=(0,) * len(shape.space))
        whole = layer(case.codes.movedim(-1, 1).double(), case.weight.double(), None, padded).long()
    assert torch.equal(case.sums, problem.judged(whole).float())


def test_the_integer_case_goes_to_the_limits_of_its_bits() -> None:
    case = Problem(LINEAR, CPU).integer_case()
    assert (int(case.codes.min()), int(case.codes.max())) == (-128, 127)
    assert (int(case.weight.min()), int(case.weight.max())) == (-128, 127)
    four_bits = Problem(LINEAR, CPU).integer_case(weight_bits=4).weight
    assert (int(four_bits.min()), int(four_bits.max())) == (-7, 7)  # packed codes have no -8
    assert not torch.equal(case.sums, saturating_sums(case.codes, case.weight))


@pytest.mark.parametrize(
    ("integer", "exact"), [(right_sums, True), (saturating_sums, False), (sums_with_one_wrong, False)]
)
def test_a_wrong_kernel_is_found_by_its_bits(integer: Callable[[Tensor, Tensor], Tensor], exact: bool) -> None:
    candidate = kernels.examine(fake_row(plain, integer), Problem(LINEAR, CPU))
    assert (candidate.exact, candidate.judged_by) == (exact, "bits")


def test_a_row_that_takes_no_codes_is_judged_by_its_error() -> None:
    def exact_int8(problem: Problem) -> Tensor:
        return problem.quantized_reference  # all rows of a tiny problem are judged

    def noisy(problem: Problem) -> Tensor:
        noise = torch.randn(24, 24, generator=torch.Generator().manual_seed(0))
        return plain(problem) + 0.03 * noise * problem.reference.std()

    right, wrong = (kernels.examine(fake_row(run), Problem(LINEAR, CPU)) for run in (exact_int8, noisy))
    assert (right.exact, right.judged_by) == (True, "sqnr")
    assert (wrong.exact, wrong.judged_by) == (False, "sqnr")
    assert (right.figures["sqnr"] or 0) > 38 > (wrong.figures["sqnr"] or 0)


def test_an_output_that_is_not_finite_is_no_result() -> None:
    with pytest.raises(RowUnavailable, match="finite"):
        kernels.examine(fake_row(lambda problem: plain(problem) / 0), Problem(LINEAR, CPU))


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [LINEAR, TEMPORAL], ids=lambda shape: shape.layer)
def test_every_row_runs_or_says_why_not(shape: Shape) -> None:
    rows = [row for row in rows_for("cpu") if "compiled" not in row.name]
    entries = {entry.row: entry for entry in kernels.measure(shape, rows, CPU, rounds=1, limit=1.0)}
    assert list(entries.keys() ^ {row.name for row in rows}) == []
    for entry in entries.values():
        assert entry.error or entry.figures["speed"]
    assert entries[FULL_PRECISION].figures["speed"] == 1.0
    for row in rows:
        entry = entries[row.name]
        if row.kind == "qvd" and entry.finished:
            assert (entry.exact, entry.judged_by) == (True, "bits"), entry
            assert (entry.figures["quantize_share"] or 0) > 0
    assert entries["QVD emulated"].finished
    if shape.kind == "conv":
        assert entries["torch._int_mm"].error == "matrix products only"


def test_a_row_that_breaks_is_reported_and_does_not_stop_the_others() -> None:
    def broken(problem: Problem) -> Prepared:
        raise KeyError("gone\nand more")

    entries = kernels.measure(LINEAR, [ROWS[0], Row("broken", "peer", broken)], CPU, rounds=1, limit=1.0)
    by_name = {entry.row: entry for entry in entries}
    assert by_name["broken"].error.startswith("KeyError: ")
    assert by_name[FULL_PRECISION].finished


def test_rows_are_chosen_by_name_or_kind_and_floating_point_always_runs() -> None:
    assert [row.name for row in rows_for("cpu", ("oneDNN*",))] == ["fp32", "16-bit", "oneDNN u8"]
    assert {row.kind for row in rows_for("cuda", ("qvd",))} == {"float", "qvd"}
    names = [row.name for device in ("cpu", "cuda") for row in rows_for(device)]
    assert {"QVD", "QVD cpu", "QVD cpu avx2", "QVD triton", "QVD int_mm", "QVD emulated", "torch._int_mm"} <= set(names)
    assert sum(row.kind == "peer" for row in rows_for("cpu")) >= 4


def test_a_shape_too_large_for_the_memory_is_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Problem:
        raise torch.OutOfMemoryError("no room\nat all")

    monkeypatch.setattr(kernels, "Problem", full)
    entries = kernels.measure(LINEAR, ROWS[:2], CPU, rounds=1, limit=1.0)
    assert [(entry.row, entry.error) for entry in entries] == [
        (name, "OutOfMemoryError: no room") for name in ("fp32", "16-bit")
    ]


# --- resuming ---------------------------------------------------------------------------------------------------------


class FakeMeasure:
    """Stands in for measuring: counts what it is asked for and fails where it is told to."""

    def __init__(self, failing: str = ""):
        self.asked: list[tuple[str, list[str]]] = []
        self.failing = failing

    def __call__(self, shape: Shape, rows: Sequence[Row], *_: object) -> list[Entry]:
        self.asked.append((shape.name, [row.name for row in rows]))
        return [entry(row.name, shape, error="not installed" if row.name == self.failing else "") for row in rows]


def entry(row: str, shape: Shape = LINEAR, speed: float = 2.0, **changes: object) -> Entry:
    kind = next((known.kind for known in ROWS if known.name == row), "peer")
    figures = {key: 0.5 for key, _, _ in kernel_tables.COLUMNS} | {"speed": speed, "memory_bytes": None}
    known = Entry(shape.name, row, shape.model, shape.kind, kind, figures, exact=None if kind == "float" else True)
    if changes.get("error"):
        known = dataclasses.replace(known, figures={}, exact=None)
    return dataclasses.replace(known, **changes)  # type: ignore[arg-type]


def bench(monkeypatch: pytest.MonkeyPatch, path: Path, fake: FakeMeasure, again: bool = False) -> Store:
    monkeypatch.setattr(kernels, "measure", fake)
    store = Store(path, {"device": "test"})
    rows = rows_for("cpu", ("QVD", "oneDNN*"))
    kernels.run([LINEAR, STRIDED], rows, store, CPU, rounds=1, limit=1.0, again=again)
    return store


def test_what_is_measured_is_not_measured_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, first, second = tmp_path / "k.json", FakeMeasure(), FakeMeasure()
    bench(monkeypatch, path, first)
    bench(monkeypatch, path, second)
    rows = ["fp32", "16-bit", "QVD", "oneDNN u8"]
    assert first.asked == [(LINEAR.name, rows), (STRIDED.name, rows)]
    assert second.asked == []
    assert [known.key for known in read(path)[1]] == [(shape.name, row) for shape in (LINEAR, STRIDED) for row in rows]


def test_a_failed_row_is_tried_again_beside_floating_point_whose_figures_stay(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, again = tmp_path / "k.json", FakeMeasure()
    store = bench(monkeypatch, path, FakeMeasure(failing="QVD"))
    assert store.entries[LINEAR.name, "QVD"].error == "not installed"
    before = store.entries[LINEAR.name, "fp32"]
    store = bench(monkeypatch, path, again)
    assert again.asked[0] == (LINEAR.name, ["fp32", "16-bit", "QVD"])
    assert store.entries[LINEAR.name, "QVD"].finished
    assert store.entries[LINEAR.name, "fp32"] == before


def test_again_measures_anew_but_a_failure_never_replaces_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, failing = tmp_path / "k.json", FakeMeasure(failing="QVD")
    bench(monkeypatch, path, FakeMeasure())
    store = bench(monkeypatch, path, failing, again=True)
    assert "QVD" in failing.asked[0][1]
    assert all(known.finished for known in store.entries.values())


def test_a_killed_run_keeps_the_shapes_that_are_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Killed(FakeMeasure):
        def __call__(self, shape: Shape, rows: Sequence[Row], *_: object) -> list[Entry]:
            if shape is STRIDED:
                raise KeyboardInterrupt
            return super().__call__(shape, rows)

    path = tmp_path / "k.json"
    with pytest.raises(KeyboardInterrupt):
        bench(monkeypatch, path, Killed())
    assert {known.shape for known in read(path)[1]} == {LINEAR.name}
    assert list(tmp_path.iterdir()) == [path]  # nothing half-written is left


@pytest.mark.parametrize("text", ["", "[]", '{"format": 99}', '{"format": 1, "machine": {}, "entries": [{"a": 1}]}'])
def test_a_foreign_file_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "k.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="no file of the kernel benchmark"):
        Store(path, {})
    assert path.read_text() == text


# --- report -----------------------------------------------------------------------------------------------------------


def test_the_fastest_exact_row_is_bold_and_a_wrong_one_never_is() -> None:
    shown = [entry("fp32", speed=1.0), entry("QVD", speed=3.0), entry("oneDNN u8", speed=4.0, exact=False)]
    text = kernel_tables.speeds(shown)
    assert "**3.00**" in text
    assert "(4.00)" in text
    assert "**NO**" in kernel_tables.summary(shown)


def test_the_summary_shows_the_worst_exactness_of_all_shapes() -> None:
    shown = [entry("QVD", speed=1.0), entry("QVD", STRIDED, speed=3.0, exact=False)]
    line = next(line for line in kernel_tables.summary(shown).splitlines() if line.startswith("| QVD |"))
    assert "2.00×" in line and "1.00×" in line and "3.00×" in line and "**NO**" in line


def test_the_report_names_what_could_not_be_measured_once() -> None:
    shown = [entry("SDNQ int8", shape, error="sdnq is not installed") for shape in SHAPES]
    assert kernel_tables.missing(shown).splitlines()[2:] == ["- SDNQ int8: sdnq is not installed"]


def test_the_report_is_written_from_json_alone(tmp_path: Path) -> None:
    path = tmp_path / "k.json"
    write(path, {"device": "a machine"}, [entry("fp32"), entry("QVD"), entry("QVD", STRIDED), entry("SDNQ int8")])
    kernels.main(["--report-only", str(path)])
    text = path.with_suffix(".md").read_text()
    assert "a machine" in text and LINEAR.name in text and "![" in text
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_one_command_measures_stores_and_reports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "k.json"
    monkeypatch.setattr(kernels, "shapes_for", lambda device: [LINEAR])
    threads = torch.get_num_threads()
    try:
        kernels.main(["--device", "cpu", "--rows", "QVD emulated", "--rounds", "1", "--out", str(path)])
    finally:
        torch.set_num_threads(threads)
    content = json.loads(path.read_text())
    assert content["machine"]["instructions"]
    (own,) = (known for known in content["entries"] if known["row"] == "QVD emulated")
    assert own["exact"] and math.isfinite(own["figures"]["speed"])
    assert "QVD emulated" in path.with_suffix(".md").read_text()


def test_no_matching_shape_is_a_mistake_and_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        kernels.main(["--device", "cpu", "--shapes", "sdxl"])
    assert stopped.value.code == 2
    assert "wan-1.3b" in capsys.readouterr().err


def test_the_name_of_a_machine_is_fit_for_a_file() -> None:
    name = machine.slug(CPU)
    assert name and set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-")
    assert name.endswith(f"-{torch.get_num_threads()}t")
