"""`fedgraft study tables`: the paper's tables, ours beside them, and refusals in words."""

from pathlib import Path

from tests.cli.test_main import fedgraft, refused
from tests.report.example import example_result
from tests.study.test_tables import asked, card, lineage, scores


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


def test_a_file_in_the_place_of_the_tables_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    done = fedgraft("study", "tables", "--out", tmp_path / "out")
    assert "out: expected a directory to write, found a file; choose another" in refused(done)
    assert (tmp_path / "out").read_text() == "mine"


def test_what_was_asked_otherwise_is_said_at_the_end(tmp_path: Path) -> None:
    few = card(scores()).model_copy(update={"benchmarks": {"piqa": asked(num_rows=40)}})
    (tmp_path / "ours.json").write_text(few.model_dump_json(), encoding="utf-8")
    column = f"L3b={tmp_path}/ours.json"
    done = fedgraft("study", "tables", "--column", column, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "piqa: 40 of 100 questions (L3b); no difference is taken" in done.output


def test_a_finished_study_is_a_table_with_its_figures(tmp_path: Path) -> None:
    lineage().write(tmp_path)
    done = fedgraft("study", "tables", "--study", tmp_path, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    header = (tmp_path / "out" / "forgetting.csv").read_text(encoding="utf-8").split("\n")[0]
    assert header.startswith('benchmark,metric,L3b,"L3b, paper","L3b, difference",L3b+50M,L3b+100M')
    assert "FLOPs of all training" in (tmp_path / "out" / "tables.html").read_text("utf-8")


def test_it_is_said_where_no_column_is_called_as_one_of_the_papers(tmp_path: Path) -> None:
    (tmp_path / "ours.json").write_text(card(scores()).model_dump_json(), encoding="utf-8")
    column = f"mine={tmp_path}/ours.json"
    done = fedgraft("study", "tables", "--column", column, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "no column is called as in table 2 (L3b, L3b+100M," in done.output.replace("\n", " ")


def test_a_study_without_benchmarks_is_refused_in_one_message(tmp_path: Path) -> None:
    example_result().write(tmp_path)
    done = fedgraft("study", "tables", "--study", tmp_path, "--out", tmp_path / "out")
    assert "expected a study whose arms were asked the paper's benchmarks" in refused(done)
    assert not (tmp_path / "out").exists()
