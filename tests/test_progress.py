"""Progress where no terminal is: a line now and then, with rate, time left and a note."""

import re

import pytest

from fedgraft.progress import progress, silenced


def test_a_short_job_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("pack", 10, "rows") as advance:
        advance(10)
    assert capsys.readouterr() == ("", "")


def test_a_long_job_says_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 5.0, 12.0, 13.0])
    monkeypatch.setattr("fedgraft.progress.time.monotonic", lambda: next(clock))
    with progress("train", 400, "tokens") as advance:
        for _ in range(3):
            advance(40, "loss 2.000")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "train: 20%, 7 tokens/s, 48 s left, loss 2.000\n"


def test_what_takes_seconds_each_has_a_rate_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 80.0])
    monkeypatch.setattr("fedgraft.progress.time.monotonic", lambda: next(clock))
    with progress("round 1", 20, "answers") as advance:
        advance(10)
    assert capsys.readouterr().err == "round 1: 50%, 0.12 answers/s, 80 s left\n"


def test_who_shows_progress_of_its_own_silences_what_is_inside(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 12.0])
    monkeypatch.setattr("fedgraft.progress.time.monotonic", lambda: next(clock))
    with silenced(), progress("train", 400, "tokens") as advance:
        advance(40)
    assert capsys.readouterr().err == ""
    with progress("train", 400, "tokens") as advance:
        advance(40)
    assert capsys.readouterr().err != ""


def test_a_job_without_a_known_end_says_how_much_is_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 12.0])
    monkeypatch.setattr("fedgraft.progress.time.monotonic", lambda: next(clock))
    with progress("crawl", None, "articles") as advance:
        advance(120)
    assert capsys.readouterr().err == "crawl: 120 articles, 10 articles/s\n"


def test_a_terminal_gets_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress("train", 400, "tokens") as advance:
        advance(400, "loss 2.000")
    shown = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert "train" in shown
    assert "100 %" in shown
    assert "tokens/s" in shown
