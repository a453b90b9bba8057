"""Configurations: sections, overrides, recipes, option files in BasicSR's format, and their errors."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pydantic", reason="needs the train extra")
pytest.importorskip("yaml", reason="needs the train extra")

import yaml

from seemore_fast.errors import ConfigError
from seemore_fast.training.config import Schedule
from seemore_fast.training.loading import load_config
from seemore_fast.training.recipes import RECIPES
from seemore_fast.training.schedule import rate_factor

TRAIN = "data.train=photos"


@pytest.fixture
def load(tmp_path):
    """Return a function that writes a file and loads it as a configuration."""

    def load(text, *overrides):
        path = tmp_path / "run.yml"
        path.write_text(text)
        return load_config(str(path), overrides)

    return load


def test_there_are_nine_recipes():
    assert set(RECIPES) == {f"{size}_x{scale}" for size in "tbl" for scale in (2, 3, 4)}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name):
    config, notes = load_config(name, [TRAIN])
    size, scale = name[0], int(name[-1])
    assert (config.model.preset, config.model.scale, notes) == (size, scale, [])
    assert (config.steps, config.data.batch, config.data.patch, config.loss.fft) == (500_000, 32, 64, 0.1)
    assert config.optimizer.betas == (0.9, 0.99) and config.schedule.milestones[-1] == 475_000
    weights = "interpolation" if scale == 2 else f"runs/{size}_x{scale - 1}/weights.safetensors"
    assert (config.out, config.init_from) == (f"runs/{name}", weights)


def test_overrides_win_and_numbers_may_be_text(load):
    text = "optimizer: {lr: 2e-4}\nsteps: 1e5\nlog:\nvalidation: {data: {1: x}}"
    config, _ = load(text, TRAIN, "data.batch=8", "validation.data.Set5=y", "log.every=7")
    assert (config.optimizer.lr, config.steps, config.data.batch) == (2e-4, 100_000, 8)
    assert config.validation.data == {"1": "x", "Set5": "y"} and config.data.train == ["photos"]
    assert config.log.every == 7


@pytest.mark.parametrize(
    "text, message",
    [
        ("stepz: 3", "no key stepz; did you mean steps"),
        ("data: {pacth: 3}", r"no key data\.pacth; did you mean data\.patch"),
        ("patch: 3", r"no key patch; did you mean data\.patch"),
        ("zzzzz: 3", "no key zzzzz; expected one of out, steps"),
        ("steps: many", "steps is 'many', expected a whole number"),
        ("steps: 1.5", "steps is 1.5, expected a whole number"),
        ("steps: 0", "steps is 0, expected at least 1"),
        ("ema: 1", "ema is 1, expected less than 1"),
        ("data: 3", "data is 3, not a section"),
        ("loss: 3", "loss is 3, expected keys and values"),
        ("- 1", "holds a list, expected sections"),
        ("a: [", "is not valid YAML"),
        ("precision: fp8", "precision is 'fp8', expected one of fp32, bf16, fp16, fp64"),
        ("accumulate: 3", "accumulate is 3, expected a divisor of data.batch, 32"),
        ("optimizer: {betas: [0.9]}", r"optimizer.betas\[1\] is missing"),
        ("optimizer: {lr: 0}", "optimizer.lr is 0, expected more than 0"),
        ("optimizer: {lr: .inf}", "optimizer.lr is inf, expected a finite number"),
        ("loss: {l1: 0}", "loss.l1 is 0.0, expected a positive"),
        ("loss: {mse: -1}", "loss.mse is -1, expected at least 0"),
        ("schedule: {milestones: [5, 3]}", r"schedule.milestones is \[5, 3\], expected increasing steps"),
        ("schedule: {warmup: 9}\nsteps: 8", "schedule.warmup is 9, expected at most steps, 8"),
        ("validation: {lr: {Set5: x}}", "validation.lr is .*, expected names of validation.data, which has no Set5"),
        ("log: {tensorboard: 1}", "log.tensorboard is 1, expected true or false"),
    ],
)
def test_errors_of_a_file(load, text, message):
    with pytest.raises(ConfigError, match=message):
        load(text, TRAIN)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["optimiser.lr=1"], r"optimiser\.lr=1: there is no key optimiser; did you mean optimizer"),
        (["steps"], "steps: expected key=value"),
        (["steps.more=3"], "steps is {'more': 3}, expected a whole number"),
        (["data.train=[]"], r"data.train=\[\]: data.train is \[\], expected at least one folder"),
        (["data.lr=[a, b]"], "data.lr is .*, expected a folder for each"),
        (["data.lr_name=x"], "data.lr_name is 'x', expected a name with {}"),
        (["data.sizes=[0.5, 2]"], r"data.sizes\[1\] is 2, expected at most 1"),
        (["data.sizes=[1, 1]"], "data.sizes is .*, expected distinct numbers"),
        (["data.lr=[a]", "data.sizes=[0.5]"], r"data.sizes is \[0.5\], expected \[1\], as data.lr gives"),
    ],
)
def test_errors_of_overrides(load, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load("", TRAIN, *overrides)


def test_all_errors_have_a_line(load, tmp_path):
    with pytest.raises(ConfigError) as caught:
        load("steps: 0\ndata: {patch: 0}", "data.batch=many")
    assert str(caught.value).splitlines() == [
        f"{tmp_path}/run.yml: steps is 0, expected at least 1",
        f"{tmp_path}/run.yml: data.train is [], expected at least one folder of images",
        f"{tmp_path}/run.yml: data.patch is 0, expected at least 1",
        "data.batch=many: data.batch is 'many', expected a whole number",
    ]


def test_a_missing_file_lists_the_recipes():
    with pytest.raises(ConfigError, match=r"t_x9 does not exist.*t_x"):
        load_config("t_x9", [TRAIN])


def test_rates_follow_from_the_step():
    schedule = Schedule(milestones=[10, 20], warmup=4)
    assert [rate_factor(schedule, step, 30) for step in (0, 3, 4, 9, 10, 19, 20, 29)] == [
        0.2, 0.8, 1, 1, 0.5, 0.5, 0.25, 0.25
    ]  # fmt: skip
    schedule = Schedule(name="cosine", warmup=4, begin=10, lowest=0.1)
    assert [rate_factor(schedule, step, 30) for step in (4, 10, 20, 30)] == pytest.approx([1, 1, 0.55, 0.1])


def test_without_pydantic_only_training_fails():
    code = (
        "import sys; sys.modules['pydantic'] = None; import seemore_fast.upscale, seemore_fast.evaluation\n"
        "from seemore_fast.cli import main; sys.exit(main(['train', 't_x2', 'data.train=photos']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "pydantic is not installed: pip install 'seemore-fast[train]'" in done.stderr


# BasicSR

PUBLISHED = """
name: train_T_X2
model_type: SeemoReModel
scale: 2
num_gpu: 4
manual_seed: 7
datasets:
  train:
    {name: DF2K, task: SR, type: PairedImageDataset, dataroot_gt: hr, dataroot_lq: lr, filename_tmpl: '{}x2',
     io_backend: {type: disk}, gt_size: 128, use_hflip: true, use_rot: true, num_worker_per_gpu: 6,
     batch_size_per_gpu: 8}
  val_1: {name: Set5, type: PairedImageDataset, dataroot_gt: set5, dataroot_lq: set5_lr}
network_g:
  {type: SeemoRe, scale: 2, in_chans: 3, num_experts: 3, num_layers: 6, embedding_dim: 36, img_range: 1.0,
   use_shuffle: true, global_kernel_size: 11, recursive: 2, lr_space: exp, topk: 1}
path: {pretrain_network_g: ~, strict_load_g: true, resume_state: ~}
train:
  ema_decay: 0.999
  optim_g: {type: Adam, lr: !!float 1e-3, weight_decay: 0, betas: [0.9, 0.99]}
  scheduler: {type: MultiStepLR, milestones: [250000, 400000], gamma: 0.5}
  total_iter: 500000
  warmup_iter: -1
  pixel_opt: {type: L1Loss, loss_weight: 1.0, reduction: mean}
  fft_opt: {type: FFTLoss, loss_weight: 0.1, reduction: mean}
  perceptual_opt: {type: PerceptualLoss}
val: {val_freq: !!float 5e3, save_img: false, metrics: {psnr: {type: calculate_psnr}}}
logger: {print_freq: 200, save_checkpoint_freq: !!float 1e4, use_tb_logger: true, wandb: {project: ~}}
"""


@pytest.fixture
def load_published(load):
    """Return a function that loads the option file above with the given keys changed."""

    def load_published(changes):
        options = yaml.safe_load(PUBLISHED)
        for key, value in changes.items():
            *sections, last = key.split(".")
            functools.reduce(dict.__getitem__, sections, options)[last] = value
        return load(yaml.safe_dump(options))

    return load_published


def test_option_file(load):
    config, notes = load(PUBLISHED)
    assert config.model.arguments() == load_config("t_x2", [TRAIN])[0].model.arguments()
    assert (config.data.train, config.data.lr, config.data.lr_name) == (["hr"], ["lr"], "{}x2")
    assert (config.data.patch, config.data.batch, config.data.workers, config.seed) == (64, 32, 6, 7)
    assert (config.loss.l1, config.loss.fft, config.ema, config.steps) == (1.0, 0.1, 0.999, 500_000)
    assert (config.validation.data, config.validation.every) == ({"Set5": "set5"}, 5000)
    assert config.validation.lr == {"Set5": "set5_lr"} and config.validation.samples == 0
    assert (config.checkpoint.every, config.log.every, config.init_from) == (10_000, 200, None)
    assert [note.split(": ", 1)[1].split(" ")[0] for note in notes] == ["train.perceptual_opt"]


def test_option_file_with_other_choices(load_published):
    changes = {
        "datasets.train.dataroot_gt": "~/hr",
        "logger.use_tb_logger": False,
        "train.optim_g": {"type": "AdamW", "lr": 1e-3},
        "train.pixel_opt": {"type": "MSELoss", "loss_weight": 2.0},
        "train.scheduler": {"type": "MultiStepLR", "milestones": [250_000]},
        "train.warmup_iter": 4,
    }
    config, _ = load_published(changes)
    assert config.data.train == [str(Path("~/hr").expanduser())] and config.log.tensorboard is False
    assert (config.optimizer.betas, config.optimizer.weight_decay) == ((0.9, 0.999), 0.01)  # torch's defaults
    assert config.loss.model_dump() == {"l1": 0.0, "mse": 2.0, "fft": 0.1} and config.schedule.gamma == 0.1
    assert [rate_factor(config.schedule, step, 10) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]


def test_batch_of_an_option_file_grows_with_the_processes(load_published, monkeypatch):
    assert load_published({"num_gpu": "auto"})[0].data.batch == 8
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert load_published({"num_gpu": "auto"})[0].data.batch == 16


@pytest.mark.parametrize(
    "key, value, note",
    [
        ("logger.wandb.project", "mine", "logger.wandb is not supported"),
        ("path.resume_state", "x.state", "path.resume_state has no effect"),
        ("path.strict_load_g", False, "path.strict_load_g has no effect"),
        ("path.pretrain_network_g", "x.pth", "path.param_key_g has no effect: params_ema"),
        ("path.experiments_root", "there", "path.experiments_root has no effect"),
        ("val.metrics.psnr.type", "calculate_niqe", "val.metrics.psnr of calculate_niqe is not supported"),
        ("val.metrics.psnr.crop_border", 3, "val.metrics.psnr.crop_border is 3: here 2"),
        ("val.metrics.psnr.test_y_channel", False, "val.metrics.psnr is of all channels"),
        ("datasets.val_1.filename_tmpl", "{}_LRBI_x2", "datasets.val_1.filename_tmpl has no effect: LR files"),
        ("datasets.train.type", "RealESRGANDataset", "datasets.train.type is RealESRGANDataset"),
        ("datasets.test_1", {"dataroot_gt": "x"}, "datasets.test_1 has no effect"),
        ("datasets.train.use_rot", False, "datasets.train.use_hflip and use_rot are one setting"),
        ("train.scheduler", {"type": "CosineAnnealingRestartLR", "periods": [9, 9]},
         "train.scheduler.periods is [9, 9]: one cosine"),
        ("train.scheduler", {"type": "CosineAnnealingRestartLR", "periods": [500_000], "restart_weights": [0.5]},
         "train.scheduler.restart_weights has no effect"),
        ("train.scheduler", {"type": "MultiStepLR", "eta_min": 0}, "train.scheduler.eta_min is not supported"),
        ("train.optim_g.eps", 1e-6, "train.optim_g.eps is not supported"),
    ],
)  # fmt: skip
def test_unsupported_options_are_noted(load_published, tmp_path, key, value, note):
    _, notes = load_published({key: value})
    assert len(notes) == 2 and any(f"{tmp_path}/run.yml: {note}" in line for line in notes)  # and perceptual_opt


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("datasets.train.batch_size_per_gpu", "many", "batch_size_per_gpu is 'many', expected a whole number"),
        ("val.val_freq", None, "val.val_freq is None, expected a whole number"),
        ("logger.save_checkpoint_freq", "often", "save_checkpoint_freq is 'often', expected a whole number"),
        ("train.total_iter", "many", "train.total_iter is 'many', expected a whole number"),
        ("train.warmup_iter", "few", "warmup_iter is 'few', expected a whole number"),
        ("train.ema_decay", "high", "train.ema_decay is 'high', expected a number"),
        ("train.scheduler", {"type": "CosineAnnealingRestartLR", "eta_min": None},
         "train.scheduler.eta_min is None, expected a number"),
        ("network_g.scale", 0, "scale is 0, expected at least 1"),
        ("network_g.type", "EDSR", "network_g.type is 'EDSR'"),
        ("datasets.train.gt_size", 127, "gt_size is 127, expected a multiple of the scale, 2"),
        ("train.scheduler.type", "Plateau", "scheduler.type is 'Plateau'"),
        ("train.pixel_opt.type", "CharbonnierLoss", "pixel_opt.type is .*, expected one of L1Loss, MSELoss"),
        ("datasets.train.io_backend.type", "lmdb", "io_backend.type is 'lmdb', expected one of disk"),
        ("path.pretrain_network_g", 5, "path.pretrain_network_g is 5, expected a path"),
        ("datasets.train.dataroot_gt", None, r"dataroot_gt\[0\] is None, expected a path"),
        ("datasets.val_1.dataroot_gt", ["set5"], r"datasets.val_1.dataroot_gt is .'set5'., expected a path"),
        ("datasets.train.io_backend", "disk", "io_backend is 'disk', expected keys and values"),
        ("train.scheduler", "MultiStepLR", "scheduler is 'MultiStepLR', expected keys and values"),
        ("val", 5, "val is 5, expected keys and values"),
        ("trian", {}, r"there is no key trian; did you mean train\?"),
        ("datasets", {"trian": {}}, "datasets.train is missing; found trian"),
        ("train.total_itr", 5, r"there is no key train.total_itr; did you mean train.total_iter\?"),
        ("datasets.val_1.dataroot_lp", "x", r"no key datasets.val_1.dataroot_lp; did you mean datasets"),
        ("network_g.num_layer", 6, r"there is no key network_g.num_layer; did you mean network_g.num_layers\?"),
        ("network_g.dropout", 0.1, "there is no key network_g.dropout; expected one of in_chans, "),
    ],
)  # fmt: skip
def test_errors_of_option_files(load_published, key, value, message):
    with pytest.raises(ConfigError, match=message):
        load_published({key: value})
