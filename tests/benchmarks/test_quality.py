"""The quality bench: what its rows are, how it resumes, and the baselines' arithmetic. No model is sampled here."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from benchmarks import measure, plots, quality, tables
from benchmarks.baselines import smooth_scale, smoothquant
from benchmarks.peers import PEERS, Peer, PeerUnavailable, apply_peer
from benchmarks.results import Entry, Store, merge, read_entries, write_entries
from benchmarks.rows import ABLATIONS, BITS, FULL_PRECISION, GRANULARITIES, ROWS, rows_of
from qvd_core import QuantSpec, calibrate_model
from qvd_core.errors import QVDError


def entry(name: str, psnr: float | None = 30.0, frechet: float = 1.0, **changes: object) -> Entry:
    row = next(row for row in ROWS if row.name == name)
    figures = {key: 0.5 for key, _, _ in tables.COLUMNS}
    figures |= {"psnr_mean": psnr, "psnr_min": psnr, "frechet_to_full_precision": frechet}  # type: ignore[dict-item]
    known = Entry("wan", "W6A6", name, 4, 10_000, row.kind, row.granularity, 2, figures)
    return dataclasses.replace(known, **changes)  # type: ignore[arg-type]


def jobs(*patterns: str) -> list[quality.Job]:
    return quality.jobs_of(["wan"], ["W6A6"], patterns, clips=4)


class FakeMeasure:
    """Stands in for sampling: counts what it is asked for and fails where it is told to."""

    def __init__(self, failing: str = "", error: type[Exception] = PeerUnavailable):
        self.asked: list[str] = []
        self.failing, self.error = failing, error

    def __call__(self, job: quality.Job) -> Entry:
        self.asked.append(job.row.name)
        if job.row.name == self.failing:
            raise self.error("it broke\nin many lines")
        return quality.entry_of(job, prompts=2, figures={"psnr_mean": 30.0}, seconds=2.0)


# --- rows -------------------------------------------------------------------------------------------------------------


def test_names_of_rows_are_unique() -> None:
    assert [name for name, count in Counter(row.name for row in ROWS).items() if count > 1] == []


@pytest.mark.parametrize("bits", BITS)
def test_every_row_of_a_table_has_valid_settings_and_a_known_granularity(bits: str) -> None:
    for row in rows_of(bits):
        assert row.granularity in GRANULARITIES
        if row.peer is None:
            spec = row.spec(bits)
            assert (spec.weight_bits, spec.activation_bits) == BITS[bits]
            assert row.calibrated or not spec.is_static


@pytest.mark.parametrize("bits", BITS)
def test_every_granularity_of_every_table_has_a_baseline_beside_qvd(bits: str) -> None:
    for granularity in GRANULARITIES:
        kinds = {row.kind for row in rows_of(bits) if row.granularity == granularity}
        assert {"baseline", "qvd"} <= kinds


def test_each_step_of_an_ablation_changes_exactly_one_thing() -> None:
    by_name = {row.name: row for row in ROWS}

    def choices(name: str) -> dict[str, object]:
        row = by_name[name]
        spec = row.spec("W6A6").to_dict()
        needs_data = ("shift", "scale", "range", "rounding", "bias_correction")  # without it they are the identity
        return {key: value for key, value in spec.items() if row.calibrated or key not in needs_data}

    for names in ABLATIONS.values():
        for first, second in pairwise(names):
            before, after = choices(first), choices(second)
            shared = before.keys() & after.keys()
            if by_name[first].calibrated == by_name[second].calibrated:
                assert sum(before[key] != after[key] for key in shared) == 1, (first, second)
            else:  # what is added is the data
                assert all(before[key] == after[key] for key in shared), (first, second)


def test_the_qvd_rows_are_the_defaults_of_the_product() -> None:
    rows = {row.name: row for row in ROWS}
    assert rows["QVD"].spec("W8A8") == QuantSpec()
    assert rows["QVD static"].spec("W8A8") == QuantSpec(activation="static")


def test_rows_are_chosen_by_name_pattern_or_kind() -> None:
    assert {row.name for row in rows_of("W6A6", ("QVD static_*",))} >= {"QVD static_bucket", "QVD static_frame"}
    assert {row.kind for row in rows_of("W6A6", ("peer",))} == {"peer"}


# --- resuming ---------------------------------------------------------------------------------------------------------


def test_a_finished_row_is_not_measured_again(tmp_path: Path) -> None:
    path, wanted = tmp_path / "q.json", jobs("min-max", "QVD")
    first, second = FakeMeasure(), FakeMeasure()
    list(quality.run(wanted, Store(path), first, prompts=2))
    lines = list(quality.run(wanted, Store(path), second, prompts=2))
    assert first.asked == ["full precision", "full precision, other noise", "min-max", "QVD"]
    assert second.asked == []
    assert "4 of 4" in lines[0]


def test_every_row_is_on_disk_before_the_next_one_starts(tmp_path: Path) -> None:
    path = tmp_path / "q.json"
    progress = quality.run(jobs("min-max"), Store(path), FakeMeasure(), prompts=2)
    next(progress)
    assert [known.name for known in read_entries(path)] == ["full precision"]
    assert list(tmp_path.iterdir()) == [path]  # nothing half-written is left


@pytest.mark.parametrize("error", [PeerUnavailable, QVDError])
def test_a_failed_row_says_why_does_not_stop_the_others_and_is_tried_again(
    tmp_path: Path, error: type[Exception]
) -> None:
    path, wanted = tmp_path / "q.json", jobs("min-max", "QVD")
    list(quality.run(wanted, Store(path), FakeMeasure("min-max", error), prompts=2))
    stored = {known.name: known for known in read_entries(path)}
    assert stored["min-max"].error == "it broke"
    assert stored["QVD"].finished
    again = FakeMeasure()
    list(quality.run(wanted, Store(path), again, prompts=2))
    assert again.asked == ["min-max"]


def test_again_measures_everything_but_a_failure_never_replaces_figures(tmp_path: Path) -> None:
    path, wanted = tmp_path / "q.json", jobs("min-max")
    list(quality.run(wanted, Store(path), FakeMeasure(), prompts=2))
    failing = FakeMeasure("min-max")
    list(quality.run(wanted, Store(path), failing, prompts=2, again=True))
    assert "min-max" in failing.asked
    assert all(known.finished for known in read_entries(path))


def test_a_row_of_other_clips_is_another_row(tmp_path: Path) -> None:
    path, other = tmp_path / "q.json", FakeMeasure()
    list(quality.run(jobs("min-max"), Store(path), FakeMeasure(), prompts=2))
    list(quality.run(quality.jobs_of(["wan"], ["W6A6"], ("min-max",), clips=8), Store(path), other, prompts=2))
    assert "min-max" in other.asked


def test_merging_prefers_figures_to_failures_in_either_order(tmp_path: Path) -> None:
    good, bad = entry("SDNQ int6"), entry("SDNQ int6", error="not installed", figures={})
    for number, order in enumerate([(good, bad), (bad, good)]):
        paths = [tmp_path / f"{number}{part}.json" for part in range(2)]
        for path, known in zip(paths, order, strict=True):
            write_entries(path, [known])
        assert merge(paths) == [good]


@pytest.mark.parametrize("text", ["", "[]", '{"format": 99, "entries": []}', '{"format": 1, "entries": [{"a": 1}]}'])
def test_a_foreign_file_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "q.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="no file of this benchmark"):
        Store(path)
    assert path.read_text() == text


# --- tables and plot --------------------------------------------------------------------------------------------------


def test_the_best_of_each_granularity_is_bold_and_rows_that_do_not_compete_never_are() -> None:
    shown = [
        entry("min-max", psnr=30.0, frechet=5.0),
        entry("QVD static", psnr=36.0, frechet=2.0),
        entry("per token", psnr=38.0, frechet=1.5),
        entry("QVD", psnr=40.0, frechet=0.7),
        entry("SDNQ int6", psnr=45.0, frechet=0.1, comparable=False, note="W6A8"),
    ]
    text = tables.table("wan", "W6A6", shown)
    bold = {part for line in text.splitlines() for part in line.split("|") if "**" in part}
    assert {cell.strip() for cell in bold} == {"**36.00**", "**2.00**", "**40.00**", "**0.70**"}
    assert "(SDNQ int6)" in text
    assert "- SDNQ int6: W6A8" in text


def test_the_table_names_what_could_not_be_measured() -> None:
    text = tables.table("wan", "W6A6", [entry("SDNQ int6", error="not installed", figures={})])
    assert "- SDNQ int6: not installed" in text


def test_the_ablation_shows_gains_over_the_last_step_that_was_measured() -> None:
    shown = [entry("min-max", 30.0), entry("... + shift", 33.0), entry("... + scale", 32.5)]
    text = tables.ablation("static", ABLATIONS["static"], shown)
    assert "| min-max | 30.00 |" in text
    assert "| ... + shift | 33.00 (+3.00) |" in text
    assert "| ... + scale | 32.50 (-0.50) |" in text


def test_the_report_is_written_from_json_alone(tmp_path: Path) -> None:
    path = tmp_path / "q.json"
    reference = entry("full precision, other noise", 10.0, 7.25, bits=FULL_PRECISION)
    equal = entry("QVD", None)  # equal to full precision: infinite PSNR, which the plot cannot show
    write_entries(path, [reference, entry("min-max"), entry("QVD static"), equal])
    quality.main(["--report-only", str(path), "--out", str(tmp_path / "all.json")])
    text = (tmp_path / "all.md").read_text()
    assert "7.25 (Fréchet) from FP" in text
    assert "| token | QVD | ∞ |" in text
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((tmp_path / "all.json").read_text())["entries"]) == 4


def test_a_plot_of_nothing_is_not_written(tmp_path: Path) -> None:
    plots.draw([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


# --- baselines, figures, peers ----------------------------------------------------------------------------------------


def test_smoothquant_divides_the_difficulty_by_the_square_roots_of_both_ranges() -> None:
    reach = torch.tensor([4.0, 1.0, 9.0])
    weights = [torch.tensor([[1.0, -4.0, 1.0]]), torch.tensor([[0.5, 2.0, -9.0], [0.0, 0.0, 0.0]])]
    assert torch.allclose(smooth_scale(reach, weights), torch.tensor([2.0, 0.5, 1.0]))


def test_smoothquant_of_a_convolution_takes_the_widest_tap() -> None:
    weight = torch.zeros(2, 1, 3, 3)
    weight[1, 0, 2, 1] = -4.0
    assert torch.allclose(smooth_scale(torch.tensor([16.0]), [weight]), torch.tensor([2.0]))


class TwoLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.middle = nn.Linear(64, 64)  # the first and last layer of an unknown model are kept

    def forward(self, x: Tensor) -> Tensor:
        return self.middle(self.second(self.first(x)))


def test_smoothquant_equalizes_the_ranges_and_recomputes_the_static_step() -> None:
    torch.manual_seed(0)
    model, x = TwoLinears(), torch.randn(32, 64)
    spec = QuantSpec(activation="static", shift=False, scale="none", range="minmax", bias_correction=False)
    plain = calibrate_model(model, lambda: model(x), spec)
    smooth = smoothquant(plain, model)
    assert smooth.layers
    assert smooth.spec == dataclasses.replace(spec, scale="smooth")
    for name, layer in smooth.layers.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        reach = torch.maximum(layer.input_min.abs(), layer.input_max.abs())
        scaled_input, scaled_weight = reach / layer.input_scale, weight.detach().abs().amax(dim=0) * layer.input_scale
        assert torch.allclose(scaled_input, scaled_weight, rtol=1e-4)  # alpha = 0.5 makes the two ranges equal
        assert layer.static_step is not None
        assert torch.allclose(layer.static_step, scaled_input.max() / 127)
        assert torch.equal(layer.input_min, plain.layers[name].input_min)


def test_the_cosine_looks_past_what_all_clips_share() -> None:
    generator = torch.Generator().manual_seed(0)
    shared, own = torch.ones(1, 1, 2, 8, 8), torch.rand(4, 1, 2, 8, 8, generator=generator) * 0.01
    other = torch.rand(own.shape, generator=generator) * 0.01
    assert measure.centred_cosine(shared + own, shared + own) == pytest.approx(1.0)
    assert measure.centred_cosine(shared + other, shared + own) < 0.5


def test_the_size_counts_every_parameter_and_buffer_at_its_own_type() -> None:
    model = nn.Linear(8, 4).to(torch.bfloat16)
    model.register_buffer("codes", torch.zeros(10, dtype=torch.int8))
    assert measure.denoiser_bytes(model) == 2 * (8 * 4 + 4) + 10


@pytest.mark.parametrize(
    ("name", "bits", "convolutions", "competes"),
    [
        ("QVD", "W4A8", True, True),
        ("torchao int8 dynamic", "W8A8", False, True),
        ("torchao int8 dynamic", "W8A8", True, False),  # leaves them in floating point
        ("SDNQ int8", "W8A8", True, True),
        ("SDNQ int6", "W6A6", False, False),  # is W6A8
        ("comfy-kitchen int4 rotated", "W4A8", False, False),  # finer weight scales
    ],
)
def test_only_equal_bits_in_the_same_layers_compete(name: str, bits: str, convolutions: bool, competes: bool) -> None:
    layers = {"linear": nn.Linear(4, 4)} | ({"convolution": nn.Conv2d(4, 4, 1)} if convolutions else {})
    subject = SimpleNamespace(observation=lambda: SimpleNamespace(layers=layers))
    (job,) = [job for job in quality.jobs_of(["wan"], [bits], (name,), clips=4) if job.bits == bits]
    assert quality._comparable(job, subject) is competes  # type: ignore[arg-type]


def test_every_peer_says_its_bits_and_knows_its_granularity() -> None:
    for peer in PEERS:
        assert peer.granularity in GRANULARITIES
        assert peer.bits in peer.remark


def test_a_peer_that_is_missing_or_fails_gives_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(pipe: DiffusionPipeline, run: object) -> None:
        raise RuntimeError("no kernel\nfor this machine")

    peer = Peer("p", "no-such-package-here", "W8A8", "token", fail)
    with pytest.raises(PeerUnavailable, match=r"^not installed$"):
        apply_peer(peer, DiffusionPipeline(), lambda: None)
    with pytest.raises(PeerUnavailable, match=r"^RuntimeError: no kernel$"):
        apply_peer(dataclasses.replace(peer, package="torch"), DiffusionPipeline(), lambda: None)
