"""A training run: from its first step, or from its last checkpoint, to its end."""

import contextlib
import json
import math
import signal
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from ..analysis.routing import expert_usage
from ..errors import StateError, TrainingError, first_line
from ..network.checkpoint import save_model
from .build import build_model, build_optimizer, check_combination
from .config import Config
from .crops import Crops, Steps, batches
from .group import Group
from .images import Images, free_bytes, open_images
from .losses import pixel_loss
from .records import Records
from .schedule import factor
from .start import start
from .state import Checkpoints, check_same_network, differences, read_state
from .validation import Validation
from .window import Window

MOST_WAITING = 0.05  # of the time, for data
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """Everything that a run is made of; `run` trains.

    All that can be wrong with the configuration is found here, before the first step: ConfigError and StateError.
    """

    def __init__(self, config: Config, group: Group | None = None, resume: str | None = None):
        self.config, self.group = config, group or Group()
        self.out = Path(config.out)
        check_combination(config, self.group)
        torch.manual_seed(config.seed)
        self.model = build_model(config, self.group.device)
        self.average = AveragedModel(self.model).eval().requires_grad_(False)
        self.optimizer = build_optimizer(config.optimizer, self.model.parameters())
        self.scaler = torch.amp.GradScaler(self.group.device.type, enabled=config.precision == "fp16")
        self.checkpoints = Checkpoints(self.out / "checkpoints", config.checkpoint.keep)
        self.step, self.best, self.notes = 0, -math.inf, []
        self.unmeasured = False  # whether a validation that is due waits for a run that goes on
        state = self._find_state(resume)
        if state is None:
            start(self.model, config.init_from)
        self.images = self._open_images()
        self.validation = Validation(config.validation.data, config.model.scale, self.group, config.validation.lr)
        self.steps = Steps(self._crops(), config.data.batch, self.group.rank, self.group.world)
        if state is not None:
            self._restore(state)
        self._check_agreement()
        self._parallel = self.model
        if self.group.world > 1:
            ids = [self.group.device] if self.group.device.type == "cuda" else None
            self._parallel = DistributedDataParallel(self.model, device_ids=ids)
        self._asked_to_stop = False

    # What it is made of

    def _check_agreement(self):
        """Raise StateError where processes, on machines that do not share `out`, would go on from different steps."""
        steps = torch.tensor([float(self.step)], device=self.group.device)
        if self.group.total(steps).item() != self.group.world * self.step:
            raise StateError(f"the processes go on from different steps: {self.out} is to be the same for all machines")

    def _open_images(self) -> Images:
        data, scale = self.config.data, self.config.model.scale
        folder = Path(data.cache) if data.cache else self.out / "cache"

        def make():
            self.out.mkdir(parents=True, exist_ok=True)
            self.checkpoints.clear()
            return open_images(data, scale, folder)

        images = self.group.after(self.group.is_first, make)
        # On other machines, whose folders may be their own, each makes what is not there yet.
        others = self.group.after(
            self.group.local == 0 and not self.group.is_first, lambda: open_images(data, scale, folder)
        )
        images = images or others or open_images(data, scale, folder, may_make=False)
        if images.skipped:
            some = "; ".join(images.skipped[:5]) + ("; ..." if len(images.skipped) > 5 else "")
            self.notes.append(f"{len(images.skipped)} images are left out: {some}")
        return images

    def _crops(self) -> Crops:
        data, device = self.config.data, self.group.device
        resident = data.on_device
        if resident is None:
            resident = device.type == "cuda" and self.images.pixels.size < torch.cuda.mem_get_info(device)[0] / 4
        return Crops(self.images, data.patch, self.config.seed, data.augment, device if resident else "cpu")

    # Checkpoints

    def _find_state(self, resume: str | None) -> dict | None:
        if resume is None:
            if there := self.checkpoints.steps():
                raise StateError(
                    f"{self.checkpoints.folder} holds a run of {there[-1]} steps: give --resume auto to go on with it, "
                    "or another folder as `out`"
                )
            return None
        if resume == "auto":
            state, complaints = self.checkpoints.newest()
            self.notes += [f"{line}; the one before is taken" for line in complaints]
            if complaints and state is None:
                raise StateError(f"none of the checkpoints in {self.checkpoints.folder} can be read: {complaints[0]}")
            path = self.checkpoints.path(state["step"]) if state else None
        else:
            path = Path(resume)
            state = read_state(path)
            folder = self.checkpoints.folder
            place = path.parent.resolve()
            if self.out.resolve() not in (place, *place.parents) and (there := self.checkpoints.steps()):
                raise StateError(
                    f"{folder} holds a run of {there[-1]} steps, and {path} is of another: give another folder as `out`"
                )
        if state is not None:
            check_same_network(state, self.model.config, path)
            there, here = self._configurations(state)
            self.notes += [f"{path}: {line}" for line in differences(there, here)]
        return state

    def _configurations(self, state: dict) -> tuple[dict, dict]:
        """Return the configuration of a checkpoint, and this run's in the same form."""
        return json.loads(state.get("config", "{}")), json.loads(self._config_text())

    def _config_text(self) -> str:
        return self.config.model_dump_json()

    def _state(self) -> dict:
        state = {
            "step": self.step,
            "network": json.dumps(self.model.config),
            "config": self._config_text(),
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": torch.get_rng_state(),
            "best": self.best,
            "images": self.images.path.stem,
            "unmeasured": self.unmeasured,
        }
        if self.group.device.type == "cuda":
            state["random_cuda"] = torch.cuda.get_rng_state(self.group.device)
        return state

    def _restore(self, state: dict):
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:  # as this run is told, not as that one was
            group.update(self.optimizer.defaults)
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"])
        if "random_cuda" in state and self.group.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"], self.group.device)
        self.step, self.unmeasured = state["step"], state.get("unmeasured", False)
        there, here = self._configurations(state)
        of_the_same = all(there.get("validation", {}).get(key) == here["validation"][key] for key in ("data", "lr"))
        if of_the_same and self.checkpoints.best.exists():  # else the next is the best so far
            self.best = state["best"]
        if state.get("images", self.images.path.stem) != self.images.path.stem:
            self.notes.append("the images are not those of the checkpoint, or newer: other patches are cut")

    def _save(self, say=print) -> bool:
        """Write a checkpoint and the averaged weights; where the disk does not take them, say so and leave the old."""
        self._check_weights()
        if not self.group.is_first:
            return True
        try:
            self.checkpoints.save(self._state())
        except (OSError, RuntimeError) as error:  # torch wraps what the disk says
            folder = self.checkpoints.folder
            say(
                f"step {self.step}: the checkpoint cannot be written to {folder} ({free_bytes(folder) / 1e6:.0f} MB "
                f"are free): {first_line(error)}; the older ones are untouched"
            )
            return False
        weights = self.out / "weights.safetensors"
        with self._complaining(say, weights):
            save_model(self.average.module, weights, step=self.step)
        return True

    def _check_weights(self):
        """Raise TrainingError where a gradient that was no number has gone into the weights."""
        if not all(weight.isfinite().all() for weight in self.model.parameters()):
            raise TrainingError(f"the weights are no numbers after step {self.step}; {self._last_checkpoint()}")

    @contextlib.contextmanager
    def _complaining(self, say, what: Path):
        """Say what cannot be written beside the checkpoints: a run goes on without."""
        try:
            yield
        except OSError as error:
            say(f"step {self.step}: {what} cannot be written: {first_line(error)}")

    def _last_checkpoint(self) -> str:
        there = self.checkpoints.steps()
        return f"the last good checkpoint is {self.checkpoints.path(there[-1])}" if there else "there is no checkpoint"

    # Steps

    def forward_backward(self, lr: Tensor, hr: Tensor) -> Tensor:
        """Compute the gradients of a batch, uint8, in so many parts as told; return its loss."""
        told, device = self.config, self.group.device
        dtype, cast = next(self.model.parameters()).dtype, AUTOCAST.get(told.precision)
        total = torch.zeros((), dtype=dtype, device=device)
        parts = list(zip(lr.chunk(told.accumulate), hr.chunk(told.accumulate), strict=True))
        for i, (x, truth) in enumerate(parts):
            x, truth = (images.to(device, non_blocking=True).to(dtype) / 255 for images in (x, truth))
            is_last = i == len(parts) - 1
            apart = contextlib.nullcontext() if is_last or self.group.world == 1 else self._parallel.no_sync()
            with apart:
                with torch.autocast(device.type, cast, enabled=cast is not None):
                    y = self._parallel(x)
                loss = pixel_loss(y, truth, **told.loss.model_dump()) / len(parts)
                self.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def train_step(self, lr: Tensor, hr: Tensor) -> Tensor:
        """Take one step; return its loss."""
        rate = self.config.optimizer.lr * factor(self.config.schedule, self.step, self.config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        loss = self.forward_backward(lr, hr)
        if self.config.optimizer.clip:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._update_average()
        self.step += 1
        return loss

    @torch.no_grad()
    def _update_average(self):
        """Do what `AveragedModel.update_parameters` does, which waits for the GPU to count on it."""
        both = list(self.average.module.parameters()), list(self.model.parameters())
        if self.average.n_averaged:
            torch._foreach_lerp_(*both, 1 - self.config.ema)
        else:
            torch._foreach_copy_(*both)
        self.average.n_averaged += 1  # on the host

    def run(self, until: int | None = None) -> bool:
        """Train to the last step, or to step `until`; return whether it came there, rather than was asked to stop.

        SIGINT and SIGTERM finish the step and write a checkpoint. Raises TrainingError where the loss is no number.
        """
        config, end = self.config, min(self.config.steps, until or self.config.steps)
        if self.group.is_first and (left := self.checkpoints.set_aside(self.step)):
            self.notes.append(f"what is later than step {self.step} is in {left} now")
        records = Records(self.out, self.step, config.log.tensorboard) if self.group.is_first else None
        progress = tqdm(
            desc="training", unit="step", total=config.steps, initial=self.step, smoothing=0.05,
            disable=not self.group.is_first,
        )  # fmt: skip
        for note in self.notes if self.group.is_first else ():
            progress.write(note)
        self.notes = []
        source = batches(self.steps, self.step, end, config.data.workers, self.group.device.type == "cuda")
        try:
            with self._handling_signals(), contextlib.closing(source):  # its workers end whatever happens here
                self._loop(end, source, progress, records, Window(self.group))
        finally:
            progress.close()
            if records:
                records.close()
        return self.step >= end and not self.unmeasured

    def _loop(self, end: int, source: Iterator, progress: tqdm, records: Records | None, window: Window):
        config = self.config
        # On a GPU the loss of a step is looked at when the next one is under way, so that the device never waits.
        lag = 1 if self.group.device.type == "cuda" else 0
        pending: list[tuple[int, Tensor]] = []
        told_of_waiting = False
        if self.unmeasured:
            self.unmeasured = not self._validate(self.steps[self.step - 1][0], records, progress)
            if self.unmeasured:
                progress.write(f"stopped at step {self.step} again, before it was measured")
            if self.unmeasured or (self.step >= end and not self._save(progress.write)):
                return
        while self.step < end:
            lr, hr = window.waiting(lambda: next(source))
            loss = self.train_step(lr, hr)
            stop = torch.full_like(loss, float(self._asked_to_stop), dtype=torch.float64)  # made on the device
            told = torch.stack([loss.double() / self.group.world, stop])
            pending.append((self.step, self.group.total(told)))
            is_due = {
                "log": self.step % config.log.every == 0,
                "validation": self.step % config.validation.every == 0 or self.step == config.steps,
                "checkpoint": self.step % config.checkpoint.every == 0 or self.step == end,
            }
            keep = 0 if any(is_due.values()) else lag
            while len(pending) > keep:
                self._look_at(*pending.pop(0), window)
            progress.update()
            if is_due["log"]:
                values = window.values()
                values["lr"] = self.optimizer.param_groups[0]["lr"]
                progress.set_postfix_str(
                    f"loss {values['loss']:.5f}, lr {values['lr']:.1e}, waiting {values['waiting']:.1%}"
                )
                if records:
                    with self._complaining(progress.write, self.out / "steps.csv"):
                        records.add_step(self.step, values)
                is_cut_here = self.steps.crops.device.type == "cpu" and self.group.is_first
                if values["waiting"] > MOST_WAITING and is_cut_here and not told_of_waiting:
                    told_of_waiting = True
                    progress.write(
                        f"step {self.step}: {values['waiting']:.0%} of the time went into waiting for data: "
                        f"data.workers is {config.data.workers}, more may help"
                    )
            stop = window.stop
            if is_due["validation"]:
                self.unmeasured = stop or not self._validate(lr, records, progress)
                stop = self.unmeasured
                window.restart()
            if is_due["checkpoint"] or stop:
                if not self._save(progress.write) and (stop or self.step == end):
                    raise TrainingError(f"step {self.step} could not be saved; {self._last_checkpoint()}")
                window.restart()
            if stop:
                progress.write(f"stopped after step {self.step}; --resume auto goes on from there")
                return

    def _look_at(self, step: int, told: Tensor, window: Window):
        loss, stop = told.tolist()
        window.add(loss, stop > 0)
        if math.isfinite(loss):
            return
        files = ", ".join(sorted(set(self.steps.names(step - 1))))
        raise TrainingError(f"the loss of step {step} is {loss}; {self._last_checkpoint()}; its patches are of {files}")

    def _validate(self, lr: Tensor, records: Records | None, progress: tqdm) -> bool:
        """Measure the averaged weights on the data sets, and count the experts that a batch chooses in each group.

        Return whether that was done, rather than one of the processes asked to stop.
        """
        self._check_weights()
        told = self.config.validation.samples, self.out / "samples" / f"step_{self.step:09d}", progress.write
        try:
            results = self.validation.measure(self.average.module, *told, lambda: self._asked_to_stop)
        except (MemoryError, OSError, RuntimeError) as error:
            raise TrainingError(f"validation after step {self.step}: {error}; {self._last_checkpoint()}") from error
        if results is None:
            return False
        dtype, usage = next(self.model.parameters()).dtype, 0
        for part in lr.chunk(self.config.accumulate):
            usage = usage + expert_usage(self.average.module, part.to(self.group.device).to(dtype) / 255)
        usage = self.group.total(usage).tolist()
        if not self.group.is_first:
            return True
        values = {}
        for name, (psnr, ssim) in results.items():
            values |= {f"{name}_psnr": psnr, f"{name}_ssim": ssim}
        for group, counts in enumerate(usage):
            values |= {f"group_{group}_expert_{e}": count for e, count in enumerate(counts)}
        with self._complaining(progress.write, self.out / "validation.csv"):
            records.add_validation(self.step, values)
        said = [f"{name} {psnr:.3f} dB / {ssim:.4f}" for name, (psnr, ssim) in results.items()]
        progress.write(f"step {self.step}: {', '.join(said)}{'; ' if said else ''}experts by group {usage}")
        mean = sum(psnr for psnr, _ in results.values()) / len(results) if results else -math.inf
        if mean > self.best:
            with self._complaining(progress.write, self.checkpoints.best):
                self.checkpoints.save_best(self.average.module, step=self.step, psnr=f"{mean:.4f}")
                self.best = mean
        return True

    @contextlib.contextmanager
    def _handling_signals(self):
        def ask(number, frame):
            self._asked_to_stop = True

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
