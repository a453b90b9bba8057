"""Translation of option files in BasicSR's format, that of the published recipes, to this package's configuration."""

import contextlib
import difflib
import math
import os
from collections.abc import Mapping

from ..errors import ConfigError
from ..torchrun import position

# Keys without counterpart that do not affect the weights.
_SILENT = {
    "": {
        "name", "model_type", "num_gpu", "dist_params", "is_train", "dist", "rank", "world_size", "auto_resume",
        "find_unused_parameters", "dist_port", "launcher", "use_petrel",
    },
    "datasets.train.": {"name", "task", "phase", "prefetch_mode", "pin_memory", "num_prefetch_queue"},
}  # fmt: skip
_LIKELY = 0.8  # similarity of a key to a known one above which it is taken for a typing error
_NETWORK = {
    "scale", "in_chans", "num_experts", "num_layers", "embedding_dim", "img_range", "use_shuffle",
    "global_kernel_size", "recursive", "lr_space", "topk",
}  # fmt: skip

_TRAINING = {
    "total_iter", "ema_decay", "optim_g", "scheduler", "pixel_opt", "fft_opt", "grad_clip", "use_grad_clip",
    "warmup_iter", "use_amp",
}  # fmt: skip
_IMAGES = {
    "type", "dataroot_gt", "dataroot_lq", "filename_tmpl", "io_backend", "gt_size", "use_hflip", "use_rot",
    "num_worker_per_gpu", "batch_size_per_gpu", "scale", "use_shuffle", "dataset_enlarge_ratio", "meta_info_file",
}  # fmt: skip

_MEASURED = {"name", "type", "dataroot_gt", "dataroot_lq", "io_backend", "filename_tmpl", "task", "phase"}


def translate(options: Mapping, where: str) -> tuple[dict, list[str]]:
    """Return the content of a configuration, and a line for each requested setting that is not supported.

    Translates name, scale, manual_seed, network_g, path, datasets (train, and every val as validation), train
    (total_iter, ema_decay, optim_g, scheduler, pixel_opt, fft_opt, grad_clip, warmup_iter), val and logger. The batch
    is `batch_size_per_gpu` times `num_gpu`, or times the number of processes if that is "auto", as in BasicSR.

    Raises ConfigError for missing sections and unusable values.
    """
    return _Reader(options, where).read()


class _Reader:
    def __init__(self, options: Mapping, where: str):
        self.options, self.where, self.notes = options, where, []

    def read(self) -> tuple[dict, list[str]]:
        options = self.options
        self._name_unsupported(
            options, "", {"scale", "manual_seed", "network_g", "path", "datasets", "train", "val", "logger"}
        )
        content = {"out": f"runs/{options.get('name', 'run')}", "init_from": None}
        if options.get("manual_seed") is not None:
            content["seed"] = options["manual_seed"]
        content["model"] = self._network(self._section(options, "network_g"))
        content |= self._training(self._section(options, "train"))
        datasets = self._section(options, "datasets")
        content["data"] = self._training_data(self._section(datasets, "train", "datasets."), content["model"]["scale"])
        content["validation"] = self._validation(
            datasets, self._section(options, "val", needed=False), content["model"]["scale"]
        )
        content |= self._path_and_logger()
        return content, self.notes

    def _section(self, options: Mapping, key: str, prefix: str = "", needed: bool = True) -> Mapping:
        section = options.get(key)
        if section is None and not needed:
            return {}
        if not isinstance(section, Mapping):
            raise ConfigError(f"{self.where}: {prefix}{key} is {section!r}, expected a section of keys")
        return section

    def _note(self, key: str, reason: str):
        self.notes.append(f"{self.where}: {key} {reason}")

    def _name_unsupported(self, section: Mapping, prefix: str, known: set[str]):
        for key in map(str, section):
            if key in known or key in _SILENT.get(prefix, ()):
                continue
            near = difflib.get_close_matches(key, known, 1, _LIKELY)
            if near or prefix == "network_g.":
                hint = f"did you mean {prefix}{near[0]}?" if near else f"expected one of {', '.join(sorted(known))}"
                raise ConfigError(f"{self.where}: there is no key {prefix}{key}; {hint}")
            self._note(f"{prefix}{key}", "is not supported and has no effect")

    def _network(self, section: Mapping) -> dict:
        self._name_unsupported(section, "network_g.", {"type", *_NETWORK})
        if section.get("type") not in ("SeemoRe", "SeemoReFast"):
            raise ConfigError(f"{self.where}: network_g.type is {section.get('type')!r}, expected SeemoRe")
        scale = section.get("scale", self.options.get("scale"))
        if scale is None:
            raise ConfigError(f"{self.where}: there is no scale, expected it in network_g or at the top")
        scale = self._number(scale, "scale")
        if scale < 1:
            raise ConfigError(f"{self.where}: scale is {scale}, expected at least 1")
        defaults = {"num_experts": 6, "num_layers": 6, "embedding_dim": 64, "topk": 2, "lr_space": "linear"}
        own = {key: value for key, value in section.items() if key in _NETWORK}
        return {"preset": None, **defaults, **own, "scale": scale}

    def _training(self, section: Mapping) -> dict:
        self._name_unsupported(section, "train.", _TRAINING)
        optimizer = dict(self._section(section, "optim_g", "train."))
        self._name_unsupported(optimizer, "train.optim_g.", {"type", "lr", "weight_decay", "betas"})
        name = str(optimizer.pop("type", "Adam")).lower()
        usual = {"betas": [0.9, 0.999], "weight_decay": 0.01 if name == "adamw" else 0}  # of torch
        content = {
            "steps": self._number(section.get("total_iter", 500_000), "train.total_iter"),
            "ema": self._real(section.get("ema_decay", 0), "train.ema_decay"),
            "optimizer": {
                **usual,
                "name": name,
                **{key: value for key, value in optimizer.items() if key in ("lr", "weight_decay", "betas")},
            },
            "schedule": self._schedule(section, optimizer),
            "loss": self._losses(section),
        }
        clip = section.get("grad_clip", 0.01 if section.get("use_grad_clip") else None)
        if clip and not isinstance(clip, bool):
            content["optimizer"]["clip"] = clip
        if section.get("use_amp"):
            content["precision"] = "bf16"
        return content

    def _schedule(self, section: Mapping, optimizer: Mapping) -> dict:
        scheduler = dict(self._section(section, "scheduler", "train.", needed=False))
        kind, warmup = scheduler.pop("type", None), section.get("warmup_iter") or -1
        # BasicSR's step k of W has k / W of the rate, ours k / (W + 1).
        content = {"warmup": max(0, self._number(warmup, "train.warmup_iter") - 1)}
        if kind is None:
            return {"name": "constant", **content}
        if kind in ("MultiStepLR", "MultiStepRestartLR"):
            self._name_unsupported(scheduler, "train.scheduler.", {"milestones", "gamma"})
            own = {key: scheduler[key] for key in ("milestones", "gamma") if key in scheduler}
            return {"name": "multistep", **content, "gamma": 0.1, **own}
        if kind in ("CosineAnnealingRestartLR", "CosineAnnealingRestartCyclicLR", "TrueCosineAnnealingLR"):
            known = {"periods", "T_max", "eta_min", "eta_mins", "restart_weights"}
            self._name_unsupported(scheduler, "train.scheduler.", known)
            periods = scheduler.get("periods", scheduler.get("T_max"))
            periods = periods if isinstance(periods, list) else [periods]
            if periods not in ([None], [self._number(section.get("total_iter", 500_000), "train.total_iter")]):
                self._note("train.scheduler.periods", f"is {periods}: one cosine over all steps is used")
            if scheduler.get("restart_weights", [1]) not in ([1], 1):
                self._note("train.scheduler.restart_weights", "has no effect: there is one cosine over all steps")
            lowest = scheduler.get("eta_min", scheduler.get("eta_mins", [0]))
            lowest = lowest[-1] if isinstance(lowest, list) and lowest else lowest
            rate = self._real(optimizer.get("lr", 1e-3), "train.optim_g.lr")
            lowest = self._real(lowest, "train.scheduler.eta_min")
            return {"name": "cosine", **content, "lowest": lowest / rate if rate else 0.0}
        raise ConfigError(
            f"{self.where}: train.scheduler.type is {kind!r}, expected MultiStepLR or CosineAnnealingRestartLR"
        )

    def _losses(self, section: Mapping) -> dict:
        weights = {"l1": 0.0, "mse": 0.0, "fft": 0.0}
        for key, kinds in (("pixel_opt", {"L1Loss": "l1", "MSELoss": "mse"}), ("fft_opt", {"FFTLoss": "fft"})):
            loss = self._section(section, key, "train.", needed=False)
            if not loss:
                continue
            kind = loss.get("type")
            if kind not in tuple(kinds) or loss.get("reduction", "mean") != "mean":
                expected = " or ".join(kinds)
                raise ConfigError(f"{self.where}: train.{key} is {dict(loss)}, expected {expected} with reduction mean")
            weights[kinds[kind]] = loss.get("loss_weight", 1.0)
        return weights

    def _training_data(self, section: Mapping, scale: int) -> dict:
        self._name_unsupported(section, "datasets.train.", _IMAGES)
        size, where = section.get("gt_size", 128), f"{self.where}: datasets.train"
        size = self._number(size, "datasets.train.gt_size")
        if size % scale:
            raise ConfigError(f"{where}.gt_size is {size!r}, expected a multiple of the scale, {scale}")
        backend = self._section(section, "io_backend", "datasets.train.", needed=False).get("type", "disk")
        if backend != "disk":
            raise ConfigError(f"{where}.io_backend.type is {backend!r}, expected disk")
        if section.get("type", "PairedImageDataset") != "PairedImageDataset":
            self._note("datasets.train.type", f"is {section['type']}: training uses image pairs, or bicubic LR")
        if section.get("meta_info_file"):
            self._note("datasets.train.meta_info_file", "has no effect: all images of the folder are used")
        flips, turns = (section.get(key, True) for key in ("use_hflip", "use_rot"))
        if flips != turns:
            self._note("datasets.train.use_hflip", "and use_rot are one setting here: both are on")
        workers = section.get("num_worker_per_gpu", 0)
        data = {
            "train": self._folders(section.get("dataroot_gt"), f"{where}.dataroot_gt"),
            "patch": size // scale,
            "batch": self._number(section.get("batch_size_per_gpu", 16), "datasets.train.batch_size_per_gpu")
            * self._gpus(),
            "augment": bool(flips or turns),
            "workers": workers,
        }
        if section.get("dataroot_lq"):
            data["lr"] = self._folders(section["dataroot_lq"], f"{where}.dataroot_lq")
            data["lr_name"] = section.get("filename_tmpl", "{}")
        return data

    def _gpus(self) -> int:
        count = self.options.get("num_gpu", "auto")
        return position().world if count == "auto" else max(1, self._number(count, "num_gpu"))

    def _number(self, value, key: str) -> int:
        number = self._real(value, key, "a whole number")
        if not number.is_integer():
            raise ConfigError(f"{self.where}: {key} is {value!r}, expected a whole number")
        return int(number)

    def _real(self, value, key: str, expected: str = "a number") -> float:
        """Return a value of the file as a number. YAML reads 5e3 as text."""
        if not isinstance(value, bool):
            with contextlib.suppress(TypeError, ValueError):
                if math.isfinite(number := float(value)):
                    return number
        raise ConfigError(f"{self.where}: {key} is {value!r}, expected {expected}")

    @staticmethod
    def _folders(value, where: str) -> list[str]:
        folders = value if isinstance(value, list) else [value]
        if not all(isinstance(folder, str) for folder in folders):
            raise ConfigError(f"{where} is {value!r}, expected a folder")
        return [os.path.expanduser(folder) for folder in folders]

    def _validation(self, datasets: Mapping, section: Mapping, scale: int) -> dict:
        self._name_unsupported(section, "val.", {"val_freq", "save_img", "metrics", "suffix", "pbar"})
        for name, metric in self._section(section, "metrics", "val.", needed=False).items():
            metric = metric if isinstance(metric, Mapping) else {}
            kind = metric.get("type", name)
            if kind not in ("calculate_psnr", "calculate_ssim", "psnr", "ssim"):
                self._note(f"val.metrics.{name}", f"of {kind} is not supported and has no effect")
            elif not metric.get("test_y_channel", True):
                self._note(f"val.metrics.{name}", "is of all channels: here it is of Y, as published")
            if metric.get("crop_border", scale) != scale:
                border = f"is {metric['crop_border']}: here {scale}, the scale, as published"
                self._note(f"val.metrics.{name}.crop_border", border)
        data, lr = {}, {}
        for key, options in datasets.items():
            if key == "train":
                continue
            if not (str(key).startswith("val") and isinstance(options, Mapping) and options.get("dataroot_gt")):
                self._note(f"datasets.{key}", "has no effect: it is not a val with a dataroot_gt")
                continue
            self._name_unsupported(options, f"datasets.{key}.", _MEASURED)
            if options.get("filename_tmpl", "{}") not in ("{}", f"{{}}x{scale}"):
                reason = f"has no effect: LR files are named like HR, or with x{scale} at the end"
                self._note(f"datasets.{key}.filename_tmpl", reason)
            name = str(options.get("name", key))
            for key_of, folders in (("dataroot_gt", data), ("dataroot_lq", lr)):
                if folder := options.get(key_of):
                    if not isinstance(folder, str):
                        raise ConfigError(f"{self.where}: datasets.{key}.{key_of} is {folder!r}, expected a folder")
                    folders[name] = os.path.expanduser(folder)
        own = {"data": data, "lr": lr, "every": self._number(section.get("val_freq", 5000), "val.val_freq")}
        return own if section.get("save_img") else {**own, "samples": 0}

    def _path_and_logger(self) -> dict:
        path, logger = (self._section(self.options, key, needed=False) for key in ("path", "logger"))
        self._name_unsupported(
            path, "path.", {"pretrain_network_g", "strict_load_g", "resume_state", "param_key_g", "experiments_root"}
        )
        self._name_unsupported(logger, "logger.", {"print_freq", "save_checkpoint_freq", "use_tb_logger", "wandb"})
        content = {}
        if start := path.get("pretrain_network_g"):
            if not isinstance(start, str):
                raise ConfigError(f"{self.where}: path.pretrain_network_g is {start!r}, expected a file")
            content["init_from"] = os.path.expanduser(start)
            if path.get("param_key_g", "params") != "params_ema":
                self._note("path.param_key_g", "has no effect: params_ema are used if the file has them")
        if path.get("strict_load_g") is False:
            self._note("path.strict_load_g", "has no effect: weights must fit")
        if path.get("experiments_root"):
            self._note("path.experiments_root", "has no effect: use `out`")
        if path.get("resume_state"):
            self._note("path.resume_state", "has no effect: use --resume with a checkpoint of this package")
        if self._section(logger, "wandb", "logger.", needed=False).get("project"):
            self._note("logger.wandb", "is not supported and has no effect: logs are CSV files and TensorBoard")
        if logger.get("save_checkpoint_freq"):
            every = self._number(logger["save_checkpoint_freq"], "logger.save_checkpoint_freq")
            content["checkpoint"] = {"every": every}
        content["log"] = {"every": logger.get("print_freq") or 100}
        if logger.get("use_tb_logger") is False:
            content["log"]["tensorboard"] = False
        return content
