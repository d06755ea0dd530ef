"""Laws of training: batches, interruptions and the budget change nothing that they should not."""

import dataclasses
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tests.training.weights import assert_same_weights, weights_of
from transformers import Trainer

from fedgraft.errors import ArtefactError, NonFiniteError, TrainingError
from fedgraft.models import open_model
from fedgraft.provenance import Record
from fedgraft.testing import TEXT, save_tiny, tiny_model, tiny_tokenizer
from fedgraft.text.cache import pack_to_disk
from fedgraft.text.corpus import Document
from fedgraft.text.packing import IGNORED, Rows, pack_pieces
from fedgraft.training import trainer
from fedgraft.training.pretrain import continue_pretraining
from fedgraft.training.settings import TrainingSettings
from fedgraft.training.state import last_whole, work_directory
from fedgraft.training.trainer import train
from fedgraft.weights.checkpoint import Checkpoint

SETTINGS = TrainingSettings(
    num_tokens=8_000, learning_rate=1e-3, batch_tokens=512, checkpoint_every=4
)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_training_moves_the_weights_and_lowers_the_loss(
    checkpoint: Path, rows: Rows, tmp_path: Path
) -> None:
    out = continue_pretraining(checkpoint, rows, tmp_path / "out", SETTINGS)
    record = Record.read(out)
    assert record
    losses = record.figures["losses"]
    assert losses[-1][1] < losses[0][1] - 0.3
    assert leftovers(tmp_path) == ["out"]
    assert record.ancestors == (Checkpoint.open(checkpoint).content_hash,)


def test_weights_of_several_dtypes_are_refused_before_the_training(
    checkpoint: Path, rows: Rows, tmp_path: Path
) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(checkpoint, mixed)
    tensors = weights_of(mixed)
    name = next(iter(tensors))
    tensors[name] = tensors[name].to(torch.bfloat16)
    save_file(tensors, mixed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError, match="weights of one dtype, found BF16, F32; save the"):
        continue_pretraining(mixed, rows, tmp_path / "out", SETTINGS)
    assert leftovers(tmp_path) == ["mixed"]


def test_one_batch_of_eight_equals_eight_of_one(rows: Rows, tmp_path: Path) -> None:
    models = []
    for micro in (8, 1):
        model = tiny_model()
        settings = SETTINGS.model_copy(update={"micro_batch_rows": micro})
        train(model, rows, settings, tmp_path / str(micro), label="test")
        models.append(model)
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, two, atol=2e-5, rtol=1e-4)


def test_documents_in_a_row_do_not_see_each_other_in_the_call_that_trains(
    rows: Rows, tmp_path: Path
) -> None:
    model, untouched = tiny_model(), tiny_model()
    calls: list[tuple[dict[str, Any], torch.Tensor]] = []

    def keep(_model: object, _args: object, kwargs: dict[str, Any], output: Any) -> None:
        calls.append((kwargs, output.logits.detach()))

    model.register_forward_hook(keep, with_kwargs=True)
    train(model, rows, SETTINGS, tmp_path, label="test")
    call, packed = calls[0]
    assert len(packed) == 8
    for ids, positions, logits in zip(call["input_ids"], call["position_ids"], packed, strict=True):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        assert len(starts) > 2
        for begin, end in pairwise(starts):
            alone = untouched(ids[None, begin:end]).logits[0]
            torch.testing.assert_close(logits[begin:end], alone, atol=2e-5, rtol=0)


def test_empty_places_at_the_end_of_a_row_are_not_computed_and_change_nothing(
    tmp_path: Path,
) -> None:
    ids = list(range(1, 41))
    lengths, models = [], []
    for row_length in (40, 256):
        rows = pack_pieces([(ids, [IGNORED] * 7 + ids[7:])], row_length, padding=0, seed=0)
        model = tiny_model()
        model.register_forward_hook(
            lambda _model, _args, kwargs, _output: lengths.append(kwargs["input_ids"].shape[1]),
            with_kwargs=True,
        )
        settings = TrainingSettings(num_tokens=160, learning_rate=1e-3, batch_tokens=row_length)
        outcome = train(model, rows, settings, tmp_path / str(row_length), label="test")
        assert outcome.num_tokens == 160
        models.append(model)
    assert lengths == [40] * 8
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, two, atol=2e-5, rtol=1e-4)


def test_a_run_no_longer_than_what_a_kill_may_cost_leaves_nothing_to_go_on_from(
    rows: Rows, tmp_path: Path
) -> None:
    for every in (4, 1000):
        settings = SETTINGS.model_copy(update={"checkpoint_every": every})
        train(tiny_model(), rows, settings, tmp_path / str(every), label="test")
    assert last_whole(tmp_path / "4")
    assert not last_whole(tmp_path / "1000")


def test_the_same_call_gives_the_same_bytes(checkpoint: Path, rows: Rows, tmp_path: Path) -> None:
    one = continue_pretraining(checkpoint, rows, tmp_path / "one", SETTINGS)
    two = continue_pretraining(checkpoint, rows, tmp_path / "two", SETTINGS)
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def test_stopped_and_resumed_equals_never_stopped(
    checkpoint: Path, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = continue_pretraining(checkpoint, rows, tmp_path / "whole", SETTINGS)
    step = trainer._Trainer.training_step
    calls = 0

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(trainer._Trainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        continue_pretraining(checkpoint, rows, tmp_path / "resumed", SETTINGS)
    assert not (tmp_path / "resumed").exists()
    calls = 100
    resumed = continue_pretraining(checkpoint, rows, tmp_path / "resumed", SETTINGS)
    num_steps = Record.read(resumed).figures["num_steps"]  # type: ignore[union-attr]
    assert calls - 100 == num_steps - 4, "the resumed run did not go on from its checkpoint"
    assert_same_weights(whole, resumed)
    assert leftovers(tmp_path) == ["resumed", "whole"]


def test_a_killed_run_goes_on_and_ends_with_the_same_weights(
    checkpoint: Path, tmp_path: Path
) -> None:
    settings = SETTINGS.model_copy(update={"num_tokens": 40_000, "checkpoint_every": 10})
    texts = [Document(id=str(n), text=f"{n}. {TEXT[n % 3]}", source="test") for n in range(40)]
    rows = pack_to_disk(tiny_tokenizer(), texts, tmp_path / "rows", 64)
    script = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from pathlib import Path\n"
        "from fedgraft.text.cache import open_rows\n"
        "from fedgraft.training.pretrain import continue_pretraining\n"
        "from fedgraft.training.settings import TrainingSettings\n"
        "rows = open_rows(Path(sys.argv[2]))\n"
        "settings = TrainingSettings.model_validate_json(sys.argv[4])\n"
        "continue_pretraining(sys.argv[1], rows, Path(sys.argv[3]), settings)\n"
    )

    def start(out: Path) -> "subprocess.Popen[bytes]":
        arguments = [checkpoint, tmp_path / "rows", out, settings.model_dump_json()]
        return subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)])

    out = tmp_path / "killed"
    process = start(out)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob(".killed.training-*/checkpoint-*/trainer_state.json")):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert start(out).wait() == 0
    assert leftovers(tmp_path) == ["killed", "rows"]
    whole = continue_pretraining(checkpoint, rows, tmp_path / "whole", settings)
    assert_same_weights(whole, out)


def test_a_checkpoint_cut_short_by_a_kill_is_passed_over(tmp_path: Path) -> None:
    for step, state in ((4, '{"global_step": 4}'), (8, '{"glo')):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-12").mkdir()
    assert last_whole(tmp_path) == tmp_path / "checkpoint-4"
    assert last_whole(tmp_path / "none") is None


def test_other_settings_do_not_resume_an_old_run(tmp_path: Path) -> None:
    other = SETTINGS.model_copy(update={"learning_rate": 2e-3})
    inputs = {"model": "a", "rows": "b"}
    assert work_directory(tmp_path, inputs, SETTINGS) != work_directory(tmp_path, inputs, other)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(
    rows: Rows, tmp_path: Path
) -> None:
    broken = save_tiny(tmp_path / "broken")
    tensors = weights_of(broken)
    tensors["model.norm.weight"][0] = float("inf")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"found nan at step 1 of \d+; try a learning rate"):
        continue_pretraining(broken, rows, tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "fault",
    [
        SafetensorError("Error while serializing: I/O error: No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 518528 vs 518416"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
    ids=["safetensors", "torch", "system"],
)
def test_a_disk_that_fills_up_is_one_message_and_the_next_run_goes_on(
    checkpoint: Path,
    rows: Rows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Exception,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_optimizer", full)
        with pytest.raises(ArtefactError, match=r"could not write .* then run the same command"):
            continue_pretraining(checkpoint, rows, tmp_path / "out", SETTINGS)
        assert not (tmp_path / "out").exists()
    continue_pretraining(checkpoint, rows, tmp_path / "out", SETTINGS)
    assert leftovers(tmp_path) == ["out"]


def test_a_gpu_without_memory_left_names_the_setting(
    rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has ...")

    monkeypatch.setattr(Trainer, "training_step", full)
    with pytest.raises(TrainingError, match=r"found CUDA out of memory; set a smaller micro_batch"):
        train(tiny_model(), rows, SETTINGS, tmp_path, label="test")


def test_a_position_that_the_model_lacks_is_refused(rows: Rows, tmp_path: Path) -> None:
    model = tiny_model()
    model.config.max_position_embeddings = 32
    with pytest.raises(TrainingError, match=r"below the model's 32, found \d+ of them; pack into"):
        train(model, rows, SETTINGS, tmp_path, label="test")


def test_the_source_is_left_as_it_was(checkpoint: Path, rows: Rows, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    continue_pretraining(checkpoint, rows, tmp_path / "out", SETTINGS)
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


def test_the_result_has_the_dtype_of_the_source(rows: Rows, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "half", dtype=torch.bfloat16)
    out = continue_pretraining(source, rows, tmp_path / "out", SETTINGS)
    assert {tensor.dtype for tensor in weights_of(out).values()} == {torch.bfloat16}
    assert open_model(out).config.to_dict()["dtype"] in ("float32", torch.float32)
    assert '"dtype": "bfloat16"' in (out / "config.json").read_text()
    assert '"use_cache": true' in (out / "config.json").read_text()


def test_the_budget_is_met_to_within_a_step(checkpoint: Path, rows: Rows, tmp_path: Path) -> None:
    out = continue_pretraining(checkpoint, rows, tmp_path / "out", SETTINGS)
    figures = Record.read(out).figures  # type: ignore[union-attr]
    assert abs(figures["num_tokens"] - SETTINGS.num_tokens) <= SETTINGS.batch_tokens


def test_an_output_that_exists_is_not_overwritten(
    checkpoint: Path, rows: Rows, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(ArtefactError, match="exists already"):
        continue_pretraining(checkpoint, rows, tmp_path / "out", SETTINGS)
    assert (tmp_path / "out" / "mine").read_text() == "precious"


def test_replay_without_old_text_is_refused(checkpoint: Path, rows: Rows, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"found 0\.3 and none"):
        continue_pretraining(checkpoint, rows, tmp_path / "out", SETTINGS, replay_share=0.3)


def test_a_token_that_the_model_lacks_is_refused(rows: Rows, tmp_path: Path) -> None:
    small = save_tiny(tmp_path / "small", rows=300)
    with pytest.raises(TrainingError, match=rf"below the 300 rows .* found {rows.highest_id}"):
        continue_pretraining(small, rows, tmp_path / "out", SETTINGS)


def test_rows_without_targets_are_refused(checkpoint: Path, rows: Rows, tmp_path: Path) -> None:
    blank = dataclasses.replace(rows, targets_of=np.zeros_like(rows.targets_of))
    with pytest.raises(TrainingError, match="expected rows with targets"):
        continue_pretraining(checkpoint, blank, tmp_path / "out", SETTINGS)


def test_a_micro_batch_that_does_not_divide_a_step_is_refused(rows: Rows, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"micro_batch_rows": 3})
    with pytest.raises(TrainingError, match="divide the 8 rows of a step, found 3"):
        train(tiny_model(), rows, settings, tmp_path, label="test")
