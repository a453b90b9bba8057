"""Training loop, from the first step or a checkpoint to the last step."""

import contextlib
import json
import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from ..errors import StateError, TrainingError, first_line, some_of
from ..network.checkpoint import save_model
from ..network.inspection import expert_usage
from ..network.model import SeemoRe
from .checkpoints import Checkpoints, check_same_network, config_changes, read_state
from .components import build_model, build_optimizer, build_step, check_environment
from .config import Config
from .dataset import PairDataset, free_bytes, open_dataset
from .distributed import World
from .init import init_weights
from .logging import RunLog
from .patches import Batches, Patches, load_batches
from .readback import Readback
from .schedule import rate_factor
from .throughput import Throughput
from .validation import Validation

MAX_WAITING = 0.05  # share of the time spent waiting for data, above which workers are recommended


class Trainer:
    """State of a run; `run` trains.

    The constructor checks everything that can be checked before the first step: ConfigError and StateError.
    """

    def __init__(self, config: Config, world: World | None = None, resume: str | None = None):
        self.config, self.world = config, world or World()
        self.out = Path(config.out)
        check_environment(config, self.world)
        torch.manual_seed(config.seed)
        self.model = build_model(config, self.world.device)
        self.average = AveragedModel(self.model).eval().requires_grad_(False)
        self.average_model = cast(SeemoRe, self.average.module)
        self.optimizer = build_optimizer(config.optimizer, self.model.parameters())
        self.scaler = torch.amp.GradScaler(self.world.device.type, enabled=config.precision == "fp16")
        self.checkpoints = Checkpoints(self.out / "checkpoints", config.checkpoint.keep)
        self.step, self.best, self.notes = 0, -math.inf, []
        self.validation_pending = False  # a due validation was interrupted: the resumed run does it first
        state = self._find_state(resume)
        if state is None:
            init_weights(self.model, config.init_from)
        self.dataset = self._open_dataset()
        self.validation = Validation(config.validation.data, config.model.scale, self.world, config.validation.lr)
        self.batches = Batches(self._patches(), config.data.batch, self.world.rank, self.world.size)
        if state is not None:
            self._restore(state)
        self._check_same_step()
        self.take_step = build_step(config, self.world, self.model, self.optimizer, self.scaler, tqdm.write)
        self._weights: list[Tensor] = list(self.model.parameters())
        self._averages: list[Tensor] = list(self.average_model.parameters())
        self._stop_requested = False

    # Setup

    def _check_same_step(self):
        """Raise StateError if processes, on machines that do not share `out`, would resume from different steps."""
        steps = torch.tensor([float(self.step)], device=self.world.device)
        if self.world.sum(steps).item() != self.world.size * self.step:
            raise StateError(
                f"the processes would resume from different steps: {self.out} must be the same folder on all machines"
            )

    def _open_dataset(self) -> PairDataset:
        data, scale, world = self.config.data, self.config.model.scale, self.world
        folder = Path(data.cache) if data.cache else self.out / "cache"

        def create():
            self.out.mkdir(parents=True, exist_ok=True)
            self.checkpoints.clear()
            return open_dataset(data, scale, folder)

        dataset = world.run_if(world.is_first, create)
        # On other machines, which may have folders of their own, one process each creates what is missing.
        others = world.run_if(world.local_rank == 0 and not world.is_first, lambda: open_dataset(data, scale, folder))
        dataset = dataset or others or open_dataset(data, scale, folder, may_create=False)
        if dataset.skipped:
            self.notes.append(f"{len(dataset.skipped)} images skipped: {some_of(dataset.skipped, 5)}")
        return dataset

    def _patches(self) -> Patches:
        data, device = self.config.data, self.world.device
        on_device = data.on_device
        if on_device is None:
            on_device = device.type == "cuda" and self.dataset.pixels.size < torch.cuda.mem_get_info(device)[0] / 4
        return Patches(self.dataset, data.patch, self.config.seed, data.augment, device if on_device else "cpu")

    # Checkpoints

    def _find_state(self, resume: str | None) -> dict | None:
        folder, steps = self.checkpoints.folder, self.checkpoints.steps()
        if resume is None:
            if steps:
                raise StateError(
                    f"{folder} holds a run of {steps[-1]} steps: continue it with --resume auto, "
                    "or set another folder as `out`"
                )
            return None
        if resume == "auto":
            state, errors = self.checkpoints.newest()
            self.notes += [f"{error}; using the previous one" for error in errors]
            if errors and state is None:
                raise StateError(f"none of the checkpoints in {folder} can be read: {errors[0]}")
            path = self.checkpoints.path(state["step"]) if state else None
        else:
            path = Path(resume)
            state = read_state(path)
            if steps and self.out.resolve() not in (path.parent.resolve() / path.name).parents:
                raise StateError(
                    f"{folder} holds a run of {steps[-1]} steps, and {path} is of another one: "
                    "set another folder as `out`"
                )
        if state is not None and path is not None:
            check_same_network(state, self.model.config, path)
            self.notes += [f"{path}: {change}" for change in config_changes(*self._configurations(state))]
        return state

    def _configurations(self, state: dict) -> tuple[dict, dict]:
        """Return the configuration of a checkpoint, and this run's in the same form."""
        return json.loads(state.get("config", "{}")), json.loads(self.config.model_dump_json())

    def _state(self) -> dict:
        state = {
            "step": self.step,
            "network": json.dumps(self.model.config),
            "config": self.config.model_dump_json(),
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": torch.get_rng_state(),
            "best": self.best,
            "images": self.dataset.path.stem,
            "validation_pending": self.validation_pending,
        }
        if self.world.device.type == "cuda":
            state["random_cuda"] = torch.cuda.get_rng_state(self.world.device)
        return state

    def _restore(self, state: dict):
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:  # this run's settings, not the checkpoint's
            group.update(self.optimizer.defaults)
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"])
        if "random_cuda" in state and self.world.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"], self.world.device)
        self.step = state["step"]
        # Checkpoints of earlier versions call it "unmeasured".
        self.validation_pending = state.get("validation_pending", state.get("unmeasured", False))
        saved, config = self._configurations(state)
        same_sets = all(saved.get("validation", {}).get(key) == config["validation"][key] for key in ("data", "lr"))
        if same_sets and self.checkpoints.best.exists():  # otherwise the next validation is the best so far
            self.best = state["best"]
        if state.get("images", self.dataset.path.stem) != self.dataset.path.stem:
            self.notes.append("the images differ from the checkpoint's: other patches are cut")

    def _save(self, report: Callable[[str], None] = print) -> bool:
        """Write a checkpoint and the averaged weights; return False, and keep the old ones, if the disk is full."""
        self._check_weights()
        if not self.world.is_first:
            return True
        try:
            self.checkpoints.save(self._state())
        except (OSError, RuntimeError) as error:  # torch wraps errors of the disk
            folder = self.checkpoints.folder
            report(
                f"step {self.step}: the checkpoint cannot be written to {folder} ({free_bytes(folder) / 1e6:.0f} MB "
                f"free): {first_line(error)}; the older ones are untouched"
            )
            return False
        weights = self.out / "weights.safetensors"
        with self._reporting(report, weights):
            save_model(self.average_model, weights, step=self.step)
        return True

    def _check_weights(self):
        """Raise TrainingError if a gradient that was NaN or infinite has reached the weights."""
        if not all(weight.isfinite().all() for weight in self.model.parameters()):
            raise TrainingError(f"the weights are NaN or infinite after step {self.step}; {self._last_checkpoint()}")

    @contextlib.contextmanager
    def _reporting(self, report: Callable[[str], None], path: Path) -> Iterator[None]:
        """Report a file beside the checkpoints that cannot be written; the run goes on."""
        try:
            yield
        except OSError as error:
            report(f"step {self.step}: {path} cannot be written: {first_line(error)}")

    def _last_checkpoint(self) -> str:
        steps = self.checkpoints.steps()
        return f"the last good checkpoint is {self.checkpoints.path(steps[-1])}" if steps else "there is no checkpoint"

    # Steps

    def train_step(self, lr: Tensor, hr: Tensor) -> Tensor:
        """Take one step; return its loss."""
        rate = self.config.optimizer.lr * rate_factor(self.config.schedule, self.step, self.config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.take_step(lr, hr)
        self._update_average()
        self.step += 1
        return loss

    @torch.no_grad()
    def _update_average(self):
        """Do what `AveragedModel.update_parameters` does, without its wait for the GPU."""
        if self.average.n_averaged:
            torch._foreach_lerp_(self._averages, self._weights, 1 - self.config.ema)
        else:
            torch._foreach_copy_(self._averages, self._weights)
        self.average.n_averaged += 1  # on the host

    def run(self, until: int | None = None) -> bool:
        """Train to the last step, or to step `until`; return whether it was reached, rather than stopped before.

        SIGINT and SIGTERM finish the step and write a checkpoint. Raises TrainingError for a NaN or infinite loss.
        """
        config, end = self.config, min(self.config.steps, until or self.config.steps)
        if self.world.is_first and (archive := self.checkpoints.archive_later(self.step)):
            self.notes.append(f"checkpoints after step {self.step} were moved to {archive}")
        log = RunLog(self.out, self.step, config.log.tensorboard) if self.world.is_first else None
        progress = tqdm(
            desc="training", unit="step", total=config.steps, initial=self.step, smoothing=0.05,
            disable=not self.world.is_first,
        )  # fmt: skip
        for note in self.notes if self.world.is_first else ():
            progress.write(note)
        self.notes = []
        source = load_batches(self.batches, self.step, end, config.data.workers, self.world.device.type == "cuda")
        try:
            with self._signal_handlers(), contextlib.closing(source):  # workers end in any case
                self._loop(end, source, progress, log)
        finally:
            progress.close()
            if log:
                log.close()
        return self.step >= end and not self.validation_pending

    def _loop(self, end: int, source: Iterator, progress: tqdm, log: RunLog | None):
        config, throughput, stop, has_warned = self.config, Throughput(), False, False
        # On a GPU the loss of a step is read while the next one runs, so that the device never waits.
        lag = 1 if self.world.device.type == "cuda" else 0
        pending = Readback()
        if self.validation_pending:
            self.validation_pending = not self._validate(self.batches[self.step - 1][0], log, progress)
            if self.validation_pending:
                progress.write(f"stopped at step {self.step} again, before its validation")
            if self.validation_pending or (self.step >= end and not self._save(progress.write)):
                return
        while self.step < end:
            lr, hr = throughput.wait(lambda: next(source))
            loss = self.train_step(lr, hr)
            requested = torch.full_like(loss, float(self._stop_requested), dtype=torch.float64)  # made on the device
            pending.put(self.step, self.world.sum(torch.stack([loss.double() / self.world.size, requested])))
            is_due = {
                "log": self.step % config.log.every == 0,
                "validation": self.step % config.validation.every == 0 or self.step == config.steps,
                "checkpoint": self.step % config.checkpoint.every == 0 or self.step == end,
            }
            keep = 0 if any(is_due.values()) else lag
            while len(pending) > keep:
                step, values = pending.pop()
                loss, requests = values.tolist()
                self._check_loss(step, loss)
                throughput.add(loss)
                stop = stop or requests > 0
            progress.update()
            if is_due["log"]:
                has_warned = self._log_step(throughput.pop(), progress, log, has_warned)
            if is_due["validation"]:
                self.validation_pending = stop or not self._validate(lr, log, progress)
                stop = self.validation_pending
                throughput.restart()
            if is_due["checkpoint"] or stop:
                if not self._save(progress.write) and (stop or self.step == end):
                    raise TrainingError(f"step {self.step} could not be saved; {self._last_checkpoint()}")
                throughput.restart()
            if stop:
                progress.write(f"stopped after step {self.step}; continue with --resume auto")
                return

    def _check_loss(self, step: int, loss: float):
        if not math.isfinite(loss):
            files = ", ".join(sorted(set(self.batches.names(step - 1))))
            raise TrainingError(
                f"the loss of step {step} is {loss}; {self._last_checkpoint()}; files of the batch: {files}"
            )

    def _log_step(self, values: dict[str, float], progress: tqdm, log: RunLog | None, has_warned: bool) -> bool:
        """Show and record the statistics; return whether slow data has been reported, which is done once."""
        values["lr"] = self.optimizer.param_groups[0]["lr"]
        progress.set_postfix_str(f"loss {values['loss']:.5f}, lr {values['lr']:.1e}, waiting {values['waiting']:.1%}")
        if not log:
            return has_warned
        with self._reporting(progress.write, self.out / "steps.csv"):
            log.add("steps", self.step, values)
        if has_warned or values["waiting"] <= MAX_WAITING or self.batches.patches.device.type != "cpu":
            return has_warned
        progress.write(
            f"step {self.step}: {values['waiting']:.0%} of the time was spent waiting for data: "
            f"data.workers is {self.config.data.workers}, more may help"
        )
        return True

    def _validate(self, lr: Tensor, log: RunLog | None, progress: tqdm) -> bool:
        """Measure the averaged weights on the data sets, and count the experts that each group chooses for a batch.

        Returns False if one of the processes was asked to stop before the end.
        """
        self._check_weights()
        samples, folder = self.config.validation.samples, self.out / "samples" / f"step_{self.step:09d}"
        average = self.average_model
        try:
            results = self.validation.measure(average, samples, folder, progress.write, lambda: self._stop_requested)
        except (MemoryError, OSError, RuntimeError) as error:
            raise TrainingError(f"validation after step {self.step}: {error}; {self._last_checkpoint()}") from error
        if results is None:
            return False
        dtype, parts = next(self.model.parameters()).dtype, lr.chunk(self.config.accumulate)
        counted = [expert_usage(average, part.to(self.world.device).to(dtype) / 255) for part in parts]
        usage = self.world.sum(torch.stack(counted).sum(dim=0)).tolist()
        if log is None:  # not the first process
            return True
        values = {}
        for name, (psnr, ssim) in results.items():
            values |= {f"{name}_psnr": psnr, f"{name}_ssim": ssim}
        for group, counts in enumerate(usage):
            values |= {f"group_{group}_expert_{e}": count for e, count in enumerate(counts)}
        with self._reporting(progress.write, self.out / "validation.csv"):
            log.add("validation", self.step, values)
        quality = ", ".join(f"{name} {psnr:.3f} dB / {ssim:.4f}" for name, (psnr, ssim) in results.items())
        progress.write(f"step {self.step}: {quality}{'; ' if quality else ''}experts by group {usage}")
        mean = sum(psnr for psnr, _ in results.values()) / len(results) if results else -math.inf
        if mean > self.best:
            with self._reporting(progress.write, self.checkpoints.best):
                self.checkpoints.save_best(average, step=self.step, psnr=f"{mean:.4f}")
                self.best = mean
        return True

    @contextlib.contextmanager
    def _signal_handlers(self) -> Iterator[None]:
        def request_stop(number: int, frame: object):
            self._stop_requested = True

        before = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
