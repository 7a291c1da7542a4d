"""The report is one file that needs no network, holds what it was given, and escapes what it must."""

from pathlib import Path

import pytest

from qvd_core.errors import QVDError
from qvd_core.report import write_report

LAYERS = {
    "blocks.0.<to_q>": {"sqnr_db_before": 30.0, "sqnr_db": 41.5, "coverage_before": 0.4, "coverage": 0.8},
    "blocks.1.to_q": {"sqnr_db_before": 20.0, "sqnr_db": 25.0, "coverage_before": 0.5, "coverage": 0.6},
    "time_proj": {"td_score": 0.86, "tdr": 0.9999, "tdc": 1.0, "col": 0.0, "projected_error": 1e-6},
}


def test_report_is_self_contained_and_lists_the_most_sensitive_layer_first(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(b"\x89PNG")
    path = write_report(tmp_path / "new" / "report.html", "T & U", [("PSNR", "50 dB")], LAYERS, {"frames": picture})
    text = path.read_text(encoding="utf-8")
    assert "T &amp; U" in text and "50 dB" in text and "data:image/png;base64,iVBORw==" in text
    assert "blocks.0.&lt;to_q&gt;" in text and "<to_q>" not in text
    assert text.index("blocks.1.to_q") < text.index("blocks.0.")
    assert "0.9999" in text and "most sensitive" not in text  # nothing was measured end to end
    assert "http" not in text and 'src="data:' in text


def test_report_leaves_out_tables_it_has_nothing_for(tmp_path: Path) -> None:
    text = write_report(tmp_path / "r.html", "t", [], {}, {}).read_text(encoding="utf-8")
    assert "Temporal features" not in text and "most sensitive" not in text


def test_a_missing_picture_is_one_clear_error_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(QVDError, match=r"gone\.png"):
        write_report(tmp_path / "r.html", "t", [], {}, {"frames": tmp_path / "gone.png"})
    assert list(tmp_path.iterdir()) == []


def test_report_ranks_measured_layers_by_their_end_effect_and_marks_the_kept_ones(tmp_path: Path) -> None:
    effects = {"blocks.0.<to_q>": 52.0, "blocks.1.to_q": 31.5, "time_proj": 40.0}
    layers = {name: {**figures, "end_sqnr_db": effects[name]} for name, figures in LAYERS.items()}
    text = write_report(tmp_path / "r.html", "t", [], layers, {}, kept=["blocks.1.to_q"]).read_text(encoding="utf-8")
    ranking = text[text.index("most sensitive first") : text.index("largest error first")]
    assert ranking.index("31.5") < ranking.index("40.0") < ranking.index("52.0")
    assert ranking.count("kept in full precision") == 1
    assert ranking.index("31.5") < ranking.index("kept in full precision") < ranking.index("40.0")
