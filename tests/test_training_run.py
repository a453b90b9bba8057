"""Training runs: their files, bit-exact resume, and errors that end one."""

import errno
import math
import os
import re
import shutil
from unittest.mock import Mock

import pytest
import safetensors
import torch
from helpers.tables import read_csv
from helpers.training import arguments, checkpoint, newest, stopped, tensors, trainer
from PIL import Image
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from seemore_fast import Upscaler, load_model
from seemore_fast.errors import ConfigError, StateError, TrainingError
from seemore_fast.training import logging
from seemore_fast.training.checkpoints import Checkpoints
from seemore_fast.training.distributed import World
from seemore_fast.training.loading import load_config
from seemore_fast.training.trainer import Trainer


def test_files_of_a_run(work):
    assert trainer(work).run()
    run = work / "run"
    assert Checkpoints(run / "checkpoints", 2).steps() == [10, 12]
    logged, validated = read_csv(run / "steps.csv"), read_csv(run / "validation.csv")
    assert [int(row["step"]) for row in logged] == [3, 6, 9, 12] and all(float(row["loss"]) > 0 for row in logged)
    assert [int(row["step"]) for row in validated] == [6, 12]
    assert all(float(row["held_psnr"]) > 20 and 0.5 < float(row["held_ssim"]) < 1 for row in validated)
    assert all(sum(float(row[f"group_0_expert_{e}"]) for e in range(3)) == 4 for row in validated)
    with Image.open(run / "samples" / "step_000000012" / "held" / "0.png") as sample:
        assert sample.size == (70, 60)
    model, state = load_model(run / "weights.safetensors"), newest(work)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, state["average"][f"module.{name}"])
    assert load_model(run / "checkpoints" / "best.safetensors").scale == 2
    assert not list(run.rglob("*.tmp*"))


def test_experts_are_counted_without_a_validation_set(work):
    path, *overrides = arguments(work)
    overrides = [one for one in overrides if not one.startswith("validation.data")]
    Trainer(load_config(path, overrides)[0]).run()
    validated = read_csv(work / "run" / "validation.csv")
    assert [row["step"] for row in validated] == ["6", "12"] and not any("psnr" in name for name in validated[0])
    assert all(sum(float(row[f"group_0_expert_{e}"]) for e in range(3)) == 4 for row in validated)


def test_tensorboard_has_the_values_of_the_tables(work):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer(work, "log.tensorboard=true").run()
    board = accumulator.EventAccumulator(str(work / "run" / "tensorboard")).Reload()
    losses = [float(row["loss"]) for row in read_csv(work / "run" / "steps.csv")]
    assert [event.value for event in board.Scalars("training/loss")] == pytest.approx(losses, rel=1e-5)
    assert len(board.Scalars("validation/held_psnr")) == 2


# Resume


def assert_is_uninterrupted(work):
    """Compare the newest checkpoint and the validation table bit for bit with those of a run without a stop."""
    trainer(work, out="whole").run()
    states = [newest(work, out) for out in ("run", "whole")]
    assert states[0]["step"] == states[1]["step"] == 12 and states[0]["best"] == states[1]["best"]
    assert all(torch.equal(*pair) for pair in zip(*map(tensors, states), strict=True))
    assert (work / "run" / "validation.csv").read_text() == (work / "whole" / "validation.csv").read_text()


@pytest.mark.parametrize("step", [5, 7])
def test_resumed_run_is_bit_equal(work, step):
    assert stopped(work, step=step).step == step
    resumed = trainer(work, "data.workers=1", resume="auto")
    assert resumed.step == step and resumed.run()
    assert_is_uninterrupted(work)
    assert trainer(work, resume=str(checkpoint(work, 10))).step == 10


def test_stop_during_validation_saves_at_once(work, monkeypatch, capsys):
    call = Upscaler.__call__

    def request_stop(self, image):
        running._stop_requested = running.step == step
        return call(self, image)

    for step in (6, 12):
        running = trainer(work, resume="auto")
        with monkeypatch.context() as patch:
            patch.setattr(Upscaler, "__call__", request_stop)
            assert not running.run() and running.step == step and newest(work)["step"] == step
        assert f"stopped after step {step}" in capsys.readouterr().out
        assert len(read_csv(work / "run" / "validation.csv")) == (step > 6)  # half a set is not recorded
    assert trainer(work, resume="auto").run()
    assert_is_uninterrupted(work)


@pytest.mark.parametrize("key", ["validation_pending", "unmeasured"])
def test_pending_validation_is_done_first(work, key):
    stopped(work)
    state = torch.load(checkpoint(work, 5), weights_only=True)
    del state["validation_pending"]
    torch.save({**state, key: True}, checkpoint(work, 5))
    stopped(work, resume="auto", step=6)
    assert [row["step"] for row in read_csv(work / "run" / "validation.csv")] == ["5", "6"]


def test_errors_of_resume(work):
    assert trainer(work, resume="auto").step == 0  # nothing there yet: from the beginning
    stopped(work)
    given = str(checkpoint(work, 5))
    for options, message in (
        ({}, "holds a run of 5 steps: continue it with --resume auto"),
        ({"resume": "auto", "dim": 16}, r"has model.embedding_dim = 12, this run 16"),
        ({"resume": given, "dim": 16}, r"step_000000005\.pt has model.embedding_dim"),
        ({"resume": "nothing.pt"}, r"nothing\.pt does not exist"),
    ):
        with pytest.raises(StateError, match=message):
            trainer(work, f"model.embedding_dim={options.pop('dim', 12)}", **options)
    stopped(work, resume="auto", step=7)
    whole = checkpoint(work, 7).read_bytes()
    checkpoint(work, 7).write_bytes(whole[: len(whole) // 2])
    older = trainer(work, resume="auto")
    assert older.step == 5 and "step_000000007.pt cannot be read" in older.notes[0]
    checkpoint(work, 5).write_bytes(b"")
    with pytest.raises(StateError, match="none of the checkpoints"):
        trainer(work, resume="auto")


def test_checkpoint_of_another_folder(work):
    trainer(work, out="one").run()
    stopped(work, out="two")
    given = checkpoint(work, 10, "one")
    with pytest.raises(StateError, match=r"two/checkpoints holds a run of 5 steps, and .*step_000000010.pt is of ano"):
        trainer(work, out="two", resume=str(given))
    assert trainer(work, out="three", resume=str(given)).step == 10
    archive = work / "one" / "left_12_1"
    archive.mkdir()
    shutil.copy(given, archive)
    assert trainer(work, out="one", resume=str(archive / given.name)).step == 10


def test_resume_from_an_earlier_step_archives_the_later_ones(work):
    run, overrides = work / "run", ["checkpoint.every=3", "checkpoint.keep=9"]
    trainer(work, *overrides).run()
    folder = run / "checkpoints"
    before = {name: (run / name).read_bytes() for name in ("steps.csv", "validation.csv", "weights.safetensors")}
    before |= {path.name: path.read_bytes() for path in folder.iterdir() if path.stem[-2:] not in ("03", "06")}
    for end in (9, 12):
        stopped(work, *overrides, resume=str(checkpoint(work, 6)), step=end)
        assert max(folder.glob("*.pt")) == checkpoint(work, end)
    assert {path.name: path.read_bytes() for path in (run / "left_12_1").iterdir()} == before
    assert [path.name for path in (run / "left_9_1").glob("*.pt")] == ["step_000000009.pt"]
    assert trainer(work, *overrides, resume="auto").step == 12


def test_resumed_run_follows_its_own_configuration(work):
    stopped(work)
    assert not trainer(work, "data.workers=1", "log.every=1", resume="auto").notes
    resumed = trainer(work, "optimizer.weight_decay=0.5", "optimizer.betas=[0.5, 0.6]", "seed=3", resume="auto")
    assert all(g["weight_decay"] == 0.5 and tuple(g["betas"]) == (0.5, 0.6) for g in resumed.optimizer.param_groups)
    notes = "\n".join(resumed.notes)
    assert "step_000000005.pt: seed is 3, was 0" in notes and len(resumed.notes) == 3
    assert "optimizer.weight_decay is 0.5, was 0.0" in notes and "optimizer.betas is [0.5, 0.6], was" in notes


def test_best_is_kept_for_the_same_sets_in_the_same_folder(work):
    trainer(work).run()
    best, given = newest(work)["best"], str(checkpoint(work, 10))
    assert 0 < trainer(work, resume=given).best <= best
    other = trainer(work, f"validation.data.more={work}/photos", resume="auto", out="run")
    assert other.best == trainer(work, out="other", resume=given).best == -math.inf


def test_changed_images_are_noted(work):
    stopped(work)
    assert trainer(work, resume="auto").notes == []
    (work / "photos" / "1.png").unlink()
    assert "the images differ from the checkpoint's" in trainer(work, resume="auto").notes[0]


def test_processes_must_resume_from_one_step(work, monkeypatch):
    stopped(work)
    monkeypatch.setattr(World, "sum", lambda self, values: values + 3)  # of another process, at another step
    with pytest.raises(StateError, match=r"would resume from different steps: .*run must be the same"):
        trainer(work, resume="auto")


# Steps


def test_accumulated_gradients_are_those_of_the_batch(work):
    gradients = []
    for i, accumulate in enumerate((1, 2, 4)):
        run = trainer(work, f"accumulate={accumulate}", "precision=fp64", "loss.fft=0.1", out=str(i))
        loss = run.take_step.forward_backward(*run.batches[0])
        gradients.append(torch.cat([loss[None], *(p.grad.flatten() for p in run.model.parameters())]))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-9, atol=1e-12)


def loss_of(run):
    """Return the loss of the first four batches together."""
    losses = [run.take_step.forward_backward(*run.batches[i]).item() for i in range(4)]
    run.model.zero_grad()
    return sum(losses)


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer.name=adamw", "optimizer.weight_decay=0.1"],
        ["optimizer.clip=0.01"],
        ["precision=bf16"],
        ["recompute=block"],
        ["schedule.name=constant"],
    ],
    ids=str,
)
def test_options_of_the_step(work, overrides):
    run = trainer(work, *overrides)
    before = loss_of(run)
    assert run.run(until=6)
    assert math.isfinite(loss_of(run)) and loss_of(run) != before


def test_training_reduces_the_loss(work):
    run = trainer(work, "steps=60", "data.augment=false", "validation.every=60", "ema=0.5")
    first = loss_of(run)
    run.run()
    assert loss_of(run) < 0.8 * first


def after_each_step(run, function):
    """Call a function, without arguments, after each training step of a run."""
    step = run.train_step

    def both(*batch):
        loss = step(*batch)
        function()
        return loss

    run.train_step = both


def test_average_is_that_of_torch(work):
    running = trainer(work)
    expected = AveragedModel(running.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    after_each_step(running, lambda: expected.update_parameters(running.model))
    running.run(until=5)
    for name, weight in expected.state_dict().items():
        assert torch.equal(running.average.state_dict()[name], weight), name


# Errors


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["model.num_layers=0"], "model: "),
        (["model.in_chans=1"], "model.in_chans is 1, expected 3"),
        (["data.patch=8"], "data.patch is 8, expected at least 16"),
        (["precision=fp16"], "precision is fp16, expected fp32 or bf16"),
        (["init_from=nowhere.pth"], "init_from: nowhere.pth does not exist"),
        (["init_from=seemore_t_x2"], r"init_from: seemore_t_x2 has body.* of shape .36,., this network of .12,."),
        (["validation.data.more=nowhere"], "validation.data.more: nowhere does not exist"),
        (["validation.data.more=WORK/tiny"], r"more: .*a\.png has 14x20 pixels, expected at least 15x15"),
        (["validation.data.more=WORK/broken"], r"more: .*b\.png: cannot be decoded"),
    ],
)
def test_errors_before_the_first_step(work, overrides, message):
    (work / "tiny").mkdir()
    Image.new("RGB", (14, 20)).save(work / "tiny" / "a.png")
    (work / "broken").mkdir()
    (work / "broken" / "b.png").write_bytes((work / "photos" / "0.png").read_bytes()[:99])
    with pytest.raises(ConfigError, match=message):
        trainer(work, *(one.replace("WORK", str(work)) for one in overrides))


def test_damaged_images_are_listed_at_every_start(work):
    (work / "photos" / "cut.png").write_bytes((work / "photos" / "0.png").read_bytes()[:99])
    for _ in range(2):  # the second finds the cache
        (note,) = trainer(work).notes
        assert note.startswith("1 images skipped: ") and "cut.png" in note


def break_weights(running):
    with torch.no_grad():
        running.model.conv_2.bias[0] = torch.nan


def test_nan_loss_ends_the_run(work):
    stopped(work)
    running = trainer(work, resume="auto")
    break_weights(running)
    expected = r"loss of step 6 is nan; the last good checkpoint is .*step_000000005\.pt; files of the batch: .*photos"
    with pytest.raises(TrainingError, match=expected):
        running.run()
    assert newest(work)["step"] == 5


def test_nan_weights_are_neither_saved_nor_validated(work):
    running = stopped(work)
    after_each_step(running, lambda: break_weights(running))
    for method in (running.run, running._save):  # a validation is due at step 6
        with pytest.raises(TrainingError, match=r"NaN or infinite after step 6; the last good .*step_000000005.pt"):
            method()
    assert newest(work)["step"] == 5


def test_failed_validation_ends_the_run(work, monkeypatch):
    running = trainer(work)
    monkeypatch.setattr(Upscaler, "__call__", Mock(side_effect=MemoryError("too large")))
    with pytest.raises(TrainingError, match=r"validation after step 6: too large; the last good .*step_000000005.pt"):
        running.run()


def full(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_leaves_older_checkpoints(work, monkeypatch, capsys):
    stopped(work)
    run = trainer(work, resume="auto")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda state, file: full(file.write(b"half of it")))
        with pytest.raises(TrainingError, match=r"step 12 could not be saved; the last good .*step_000000005.pt"):
            run.run()
    printed = capsys.readouterr().out
    assert "step 10: the checkpoint cannot be written" in printed
    assert "No space left" in printed and "MB free" in printed
    assert [path.name for path in (work / "run" / "checkpoints").glob("*.pt")] == ["step_000000005.pt"]
    assert trainer(work, resume="auto").step == 5


def test_full_disk_beside_the_checkpoints_ends_no_run(work, monkeypatch, capsys):
    """Also for safetensors, which raises an error that is not an OSError."""
    running = trainer(work)
    full_in_rust = Mock(side_effect=safetensors.SafetensorError("I/O error: No space left on device"))
    monkeypatch.setattr(safetensors.torch, "save_file", full_in_rust)
    monkeypatch.setattr(logging.Table, "add", full)
    monkeypatch.setattr(Image.Image, "save", full)
    assert running.run() and newest(work)["step"] == 12
    printed = capsys.readouterr().out
    for name in ("weights.safetensors", "steps.csv", "validation.csv", "best.safetensors", "0.png"):
        assert re.search(rf"{name} cannot be written.*No space left on device", printed), name
    assert "the checkpoint cannot be written" not in printed
