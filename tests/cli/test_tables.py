"""`fedgraft study tables`: the paper's tables, ours beside them, and refusals in words."""

from pathlib import Path

from tests.cli.test_main import fedgraft, refused
from tests.study.test_tables import card, scores


def test_without_columns_it_names_the_averages_that_do_not_follow(tmp_path: Path) -> None:
    done = fedgraft("study", "tables", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "table 3, Q2b+2.5Qr, Sub-Average reasoning: printed 65.48" in done.output
    assert (tmp_path / "out" / "tables.html").exists()


def test_with_columns_ours_stand_beside_the_papers(tmp_path: Path) -> None:
    (tmp_path / "ours.json").write_text(card(scores()).model_dump_json(), encoding="utf-8")
    column = f"DocChat={tmp_path}/ours.json"
    options = ("--beside", "derived", "--out", tmp_path / "out")
    done = fedgraft("study", "tables", "--column", column, *options)
    assert done.exit_code == 0, done.output
    written = (tmp_path / "out" / "derived.csv").read_text(encoding="utf-8")
    assert 'benchmark,metric,DocChat,"DocChat, paper","DocChat, difference"' in written


def test_a_column_that_cannot_be_read_is_refused_in_one_message(tmp_path: Path) -> None:
    done = fedgraft("study", "tables", "--column", "L3b=gone.json", "--out", tmp_path / "out")
    assert "gone.json: expected a scorecard, found No such file" in refused(done)
    assert not (tmp_path / "out").exists()
