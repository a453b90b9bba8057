"""Whole runs: resumed bit for bit, what they leave, and what ends one."""

import csv
import errno
import math
import os
import re
import shutil

import pytest
import safetensors
import torch
from helpers.training import arguments, everything, newest, trainer
from PIL import Image
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from seemore_fast import Upscaler, load_model
from seemore_fast.errors import ConfigError
from seemore_fast.training import logging
from seemore_fast.training.checkpoints import Checkpoints, StateError
from seemore_fast.training.config import load_config
from seemore_fast.training.distributed import World
from seemore_fast.training.trainer import Trainer, TrainingError

pytest.importorskip("yaml", reason="configurations are YAML")


def test_a_run_leaves_all_that_it_promises(work):
    assert trainer(work).run()
    run = work / "run"
    assert Checkpoints(run / "checkpoints", 2).steps() == [10, 12]
    with (run / "steps.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [3, 6, 9, 12] and all(float(row["loss"]) > 0 for row in rows)
    with (run / "validation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [6, 12]
    assert all(float(row["held_psnr"]) > 20 and 0.5 < float(row["held_ssim"]) < 1 for row in rows)
    assert all(sum(float(row[f"group_0_expert_{e}"]) for e in range(3)) == 4 for row in rows)
    with Image.open(run / "samples" / "step_000000012" / "held" / "0.png") as sample:
        assert sample.size == (70, 60)
    model, state = load_model(run / "weights.safetensors"), newest(work)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, state["average"][f"module.{name}"])
    assert load_model(run / "checkpoints" / "best.safetensors").scale == 2
    assert not list(run.rglob("*.tmp*"))


@pytest.mark.parametrize("stop", [5, 7])
def test_a_resumed_run_is_bit_equal(work, stop):
    trainer(work, out="whole").run()
    first = trainer(work)
    first.run(until=stop)
    assert first.step == stop
    resumed = trainer(work, "data.workers=1", resume="auto")
    assert resumed.step == stop and resumed.run()
    expected, found = newest(work, "whole"), newest(work)
    assert found["step"] == expected["step"] == 12 and found["best"] == expected["best"]
    for one, other in zip(everything(found), everything(expected), strict=True):
        assert torch.equal(one, other)
    told = [(work / out / "validation.csv").read_text() for out in ("run", "whole")]
    assert told[0] == told[1]
    resumed = trainer(work, resume=str(work / "run" / "checkpoints" / "step_000000010.pt"))
    assert resumed.step == 10


def test_what_a_run_cannot_resume(work):
    assert trainer(work, resume="auto").step == 0  # nothing there yet: from the beginning
    trainer(work).run(until=5)
    with pytest.raises(StateError, match="holds a run of 5 steps: continue it with --resume auto"):
        trainer(work)
    with pytest.raises(StateError, match=r"has model.embedding_dim = 12, this run 16"):
        trainer(work, "model.embedding_dim=16", resume="auto")
    given = work / "run" / "checkpoints" / "step_000000005.pt"
    with pytest.raises(StateError, match=r"step_000000005\.pt has model.embedding_dim"):
        trainer(work, "model.embedding_dim=16", resume=str(given))
    with pytest.raises(StateError, match=r"nothing\.pt does not exist"):
        trainer(work, resume="nothing.pt")
    trainer(work, resume="auto").run(until=7)
    folder = work / "run" / "checkpoints"
    whole = (folder / "step_000000007.pt").read_bytes()
    (folder / "step_000000007.pt").write_bytes(whole[: len(whole) // 2])
    older = trainer(work, resume="auto")
    assert older.step == 5 and "step_000000007.pt cannot be read" in older.notes[0]
    (folder / "step_000000005.pt").write_bytes(b"")
    with pytest.raises(StateError, match="none of the checkpoints"):
        trainer(work, resume="auto")


def test_parts_of_a_batch_give_the_gradients_of_the_whole(work):
    gradients = []
    for i, accumulate in enumerate((1, 2, 4)):
        run = trainer(work, f"accumulate={accumulate}", "precision=fp64", "loss.fft=0.1", out=str(i))
        loss = run.forward_backward(*run.batches[0])
        gradients.append(torch.cat([loss[None], *(p.grad.flatten() for p in run.model.parameters())]))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-9, atol=1e-12)


WAYS = [
    ["optimizer.name=adamw", "optimizer.weight_decay=0.1"],
    ["optimizer.clip=0.01"],
    ["precision=bf16"],
    ["recompute=block"],
    ["schedule.name=constant"],
]


@pytest.mark.parametrize("told", WAYS, ids=str)
def test_other_ways_to_train_run(work, told):
    run = trainer(work, *told)
    before = run.forward_backward(*run.batches[0])
    run.model.zero_grad()
    assert run.run(until=6)
    after = run.forward_backward(*run.batches[0])
    assert after.isfinite() and after != before


def test_training_makes_the_loss_small(work):
    run = trainer(work, "steps=60", "data.augment=false", "validation.every=60", "ema=0.5")
    first = [run.forward_backward(*run.batches[i]).item() for i in range(4)]
    run.model.zero_grad()
    run.run()
    last = [run.forward_backward(*run.batches[i]).item() for i in range(4)]
    assert sum(last) < 0.8 * sum(first)


def test_a_loss_that_is_no_number_ends_the_run(work):
    run = trainer(work)
    run.run(until=5)
    run = trainer(work, resume="auto")
    with torch.no_grad():
        run.model.conv_2.bias[0] = torch.nan
    expected = r"loss of step 6 is nan; the last good checkpoint is .*step_000000005\.pt; files of the batch: .*photos"
    with pytest.raises(TrainingError, match=expected):
        run.run()
    assert newest(work)["step"] == 5


def test_a_full_disk_costs_no_checkpoint(work, monkeypatch, capsys):
    run = trainer(work)
    run.run(until=5)
    run = trainer(work, resume="auto")
    save = torch.save

    def full(state, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainingError, match=r"step 12 could not be saved; the last good .*step_000000005.pt"):
        run.run()
    monkeypatch.setattr(torch, "save", save)
    assert "step 10: the checkpoint cannot be written" in (said := capsys.readouterr().out + capsys.readouterr().err)
    assert "No space left" in said and "MB free" in said
    assert [path.name for path in (work / "run" / "checkpoints").glob("*.pt")] == ["step_000000005.pt"]
    assert trainer(work, resume="auto").step == 5


@pytest.mark.parametrize(
    "told, message",
    [
        (["model.num_layers=0"], "model: "),
        (["model.in_chans=1"], "model.in_chans is 1, expected 3"),
        (["data.patch=8"], "data.patch is 8, expected at least 16"),
        (["precision=fp16"], "precision is fp16, expected fp32 or bf16"),
        (["data.patch=40"], "that is 80 pixels of an HR image, but 3 images are smaller"),
        (["init_from=nowhere.pth"], "init_from: nowhere.pth does not exist"),
        (["init_from=seemore_t_x2"], r"init_from: seemore_t_x2 has body.* of shape .36,., this network of .12,."),
        (["validation.data.more=nowhere"], "validation.data.more: nowhere does not exist"),
        (["validation.data.more=WORK/tiny"], r"more: .*a\.png has 14x20 pixels, expected at least 15x15"),
        (["validation.data.more=WORK/broken"], r"more: .*b\.png cannot be decoded"),
    ],
)
def test_what_cannot_be_is_said_before_the_first_step(work, told, message):
    (work / "tiny").mkdir()
    Image.new("RGB", (14, 20)).save(work / "tiny" / "a.png")
    (work / "broken").mkdir()
    (work / "broken" / "b.png").write_bytes((work / "photos" / "0.png").read_bytes()[:99])
    told = [one.replace("WORK", str(work)) for one in told]
    with pytest.raises(ConfigError, match=message):
        trainer(work, *told)


def test_going_on_from_an_earlier_step_sets_the_later_ones_aside(work):
    run, told = work / "run", ["checkpoint.every=3", "checkpoint.keep=9"]
    trainer(work, *told).run()
    folder = run / "checkpoints"
    names = "steps.csv", "validation.csv", "weights.safetensors"
    before = {name: (run / name).read_bytes() for name in names}
    before |= {path.name: path.read_bytes() for path in folder.iterdir() if path.stem[-2:] not in ("03", "06")}
    for end in (9, 12):
        again = trainer(work, *told, resume=str(folder / "step_000000006.pt"))
        again.run(until=end)
        assert sorted(path.name for path in folder.glob("*.pt"))[-1] == f"step_{end:09d}.pt"
    assert {path.name: path.read_bytes() for path in (run / "left_12_1").iterdir()} == before
    assert [path.name for path in (run / "left_9_1").glob("*.pt")] == ["step_000000009.pt"]
    assert trainer(work, *told, resume="auto").step == 12


def test_a_resumed_run_does_as_it_is_told_now(work):
    trainer(work).run(until=5)
    assert not trainer(work, "data.workers=1", "log.every=1", resume="auto").notes
    resumed = trainer(work, "optimizer.weight_decay=0.5", "optimizer.betas=[0.5, 0.6]", "seed=3", resume="auto")
    assert all(g["weight_decay"] == 0.5 and tuple(g["betas"]) == (0.5, 0.6) for g in resumed.optimizer.param_groups)
    said = "\n".join(resumed.notes)
    assert "step_000000005.pt: seed is 3, was 0" in said and len(resumed.notes) == 3
    assert "optimizer.weight_decay is 0.5, was 0.0" in said and "optimizer.betas is [0.5, 0.6], was" in said


def test_what_the_disk_does_not_take_beside_checkpoints_ends_no_run(work, monkeypatch, capsys):
    """Not even a log line's, nor the averaged weights', whose writer raises an error that is no OSError."""

    def full(*told, **more):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full_too(*told, **more):
        raise safetensors.SafetensorError("I/O error: No space left on device")

    running = trainer(work)
    monkeypatch.setattr(safetensors.torch, "save_file", full_too)
    monkeypatch.setattr(logging.Table, "add", full)
    monkeypatch.setattr(Image.Image, "save", full)
    assert running.run() and newest(work)["step"] == 12
    said = capsys.readouterr()
    said = said.out + said.err
    for name in ("weights.safetensors", "steps.csv", "validation.csv", "best.safetensors", "0.png"):
        assert re.search(rf"{name} cannot be written.*No space left on device", said), name
    assert "the checkpoint cannot be written" not in said


def test_weights_that_are_no_numbers_are_not_saved(work):
    running = trainer(work)
    running.run(until=5)
    with torch.no_grad():
        running.model.conv_2.bias[0] = float("nan")
    with pytest.raises(TrainingError, match=r"NaN or infinite after step 5; the last good .*step_000000005.pt"):
        running._save()
    assert newest(work)["step"] == 5


def test_damaged_images_are_counted_and_named_at_every_start(work):
    (work / "photos" / "cut.png").write_bytes((work / "photos" / "0.png").read_bytes()[:99])
    for _ in range(2):  # the second finds the cache
        (note,) = trainer(work).notes
        assert note.startswith("1 images skipped: ") and "cut.png" in note


def test_weights_that_are_no_numbers_are_said_before_they_are_measured(work):
    running = trainer(work)
    running.run(until=5)
    step = running.train_step

    def broken(*batch):
        loss = step(*batch)
        with torch.no_grad():
            running.model.conv_2.bias[0] = float("nan")
        return loss

    running.train_step = broken
    with pytest.raises(TrainingError, match=r"NaN or infinite after step 6; the last good .*step_000000005.pt"):
        running.run()


def test_what_cannot_be_measured_is_said_with_the_step(work, monkeypatch):
    def fail(self, image):
        raise MemoryError("too large")

    running = trainer(work)
    monkeypatch.setattr(Upscaler, "__call__", fail)
    with pytest.raises(TrainingError, match=r"validation after step 6: too large; the last good .*step_000000005.pt"):
        running.run()


def test_asked_to_stop_while_it_measures_it_saves_at_once(work, monkeypatch, capsys):
    call = Upscaler.__call__

    def asked(self, image):
        running._stop_requested = running.step == step
        return call(self, image)

    for step in (6, 12):
        running = trainer(work, resume="auto")
        with monkeypatch.context() as patch:
            patch.setattr(Upscaler, "__call__", asked)
            assert not running.run() and running.step == step and newest(work)["step"] == step
        assert f"stopped after step {step}" in capsys.readouterr().out
        rows = (work / "run" / "validation.csv").read_text().splitlines()
        assert len(rows) == (step > 6) * 2  # half a set is no figure
    assert trainer(work, resume="auto").run()
    trainer(work, out="whole").run()
    told = [(work / out / "validation.csv").read_text() for out in ("run", "whole")]
    assert told[0] == told[1] and newest(work)["best"] == newest(work, "whole")["best"]


def test_a_run_of_another_folder_does_not_go_on_in_one_that_has_a_run(work):
    trainer(work, out="one").run()
    trainer(work, out="two").run(until=5)
    given = work / "one" / "checkpoints" / "step_000000010.pt"
    with pytest.raises(StateError, match=r"two/checkpoints holds a run of 5 steps, and .*step_000000010.pt is of ano"):
        trainer(work, out="two", resume=str(given))
    assert trainer(work, out="three", resume=str(given)).step == 10
    aside = work / "one" / "left_12_1"
    aside.mkdir()
    shutil.copy(given, aside)
    assert trainer(work, out="one", resume=str(aside / given.name)).step == 10


def test_the_best_is_that_of_the_same_sets_and_the_same_folder(work):
    trainer(work).run()
    best = newest(work)["best"]
    given = str(work / "run" / "checkpoints" / "step_000000010.pt")
    assert trainer(work, resume=given).best <= best and trainer(work, resume=given).best > 0
    other = trainer(work, f"validation.data.more={work}/photos", resume="auto", out="run")
    assert other.best == trainer(work, out="other", resume=given).best == -math.inf


def test_other_images_than_before_are_told(work):
    trainer(work).run(until=5)
    assert trainer(work, resume="auto").notes == []
    (work / "photos" / "1.png").unlink()
    assert "the images differ from the checkpoint's" in trainer(work, resume="auto").notes[0]


def test_processes_that_would_go_on_from_different_steps_are_refused(work, monkeypatch):
    trainer(work).run(until=5)
    monkeypatch.setattr(World, "sum", lambda self, values: values + 3)  # of another, at another step
    with pytest.raises(StateError, match=r"would resume from different steps: .*run must be the same"):
        trainer(work, resume="auto")


def test_the_average_is_torchs(work):
    running = trainer(work)
    expected = AveragedModel(running.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    step = running.train_step

    def both(*batch):
        loss = step(*batch)
        expected.update_parameters(running.model)
        return loss

    running.train_step = both
    running.run(until=5)
    for name, weight in expected.state_dict().items():
        assert torch.equal(running.average.state_dict()[name], weight), name


def test_experts_are_counted_without_a_set_to_measure(work):
    path, *told = arguments(work)
    told = [one for one in told if not one.startswith("validation.data")]
    Trainer(load_config(path, told)[0]).run()
    with (work / "run" / "validation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["6", "12"] and not any("psnr" in name for name in rows[0])
    assert all(sum(float(row[f"group_0_expert_{e}"]) for e in range(3)) == 4 for row in rows)


def test_tensorboard_has_what_the_tables_have(work):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer(work, "log.tensorboard=true").run()
    board = accumulator.EventAccumulator(str(work / "run" / "tensorboard")).Reload()
    with (work / "run" / "steps.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert [event.value for event in board.Scalars("training/loss")] == pytest.approx(losses, rel=1e-5)
    assert len(board.Scalars("validation/held_psnr")) == 2
