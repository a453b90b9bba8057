"""What a run is told: sections, overrides, recipes, option files in BasicSR's format, and what is wrong with them."""

from pathlib import Path

import pytest

from seemore_fast.errors import ConfigError
from seemore_fast.training.config import Schedule, load_config
from seemore_fast.training.recipes import RECIPES
from seemore_fast.training.schedule import rate_factor

pytest.importorskip("yaml", reason="configurations are YAML")
ENOUGH = ["data.train=photos"]


@pytest.fixture
def written(tmp_path):
    """Write a file and load it as a configuration."""

    def load(text, *overrides):
        path = tmp_path / "run.yml"
        path.write_text(text)
        return load_config(str(path), [*ENOUGH, *overrides])

    return load


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_whole(name):
    config, notes = load_config(name, ENOUGH)
    size, scale = name.split("_x")
    assert (config.model.preset, config.model.scale, notes) == (size, int(scale), [])
    assert (config.steps, config.data.batch, config.data.patch, config.loss.fft) == (500_000, 32, 64, 0.1)
    assert config.optimizer.betas == (0.9, 0.99) and config.schedule.milestones[-1] == 475_000
    weights = "interpolation" if scale == "2" else f"runs/{size}_x{int(scale) - 1}/weights.safetensors"
    assert (config.out, config.init_from) == (f"runs/{name}", weights)


def test_overrides_win_and_numbers_may_be_texts(written):
    config, _ = written("optimizer: {lr: 2e-4}\nsteps: 1e5", "data.batch=8", "validation.data.Set5=x", "log.every=7")
    assert (config.optimizer.lr, config.steps, config.data.batch) == (2e-4, 100_000, 8)
    assert config.validation.data == {"Set5": "x"} and config.log.every == 7 and config.data.train == ["photos"]


@pytest.mark.parametrize(
    "text, overrides, message",
    [
        ("stepz: 3", [], "no key stepz; did you mean steps"),
        ("data: {pacth: 3}", [], r"no key data\.pacth; did you mean data\.patch"),
        ("patch: 3", [], r"no key patch; did you mean data\.patch"),
        ("zzzzz: 3", [], "no key zzzzz; expected one of out, steps"),
        ("", ["optimiser.lr=1"], r"optimiser\.lr=1: there is no key optimiser; did you mean optimizer"),
        ("", ["steps"], "steps: expected key=value"),
        ("", ["steps.more=3"], "steps is {'more': 3}, expected a whole number"),
        ("steps: many", [], "steps is 'many', expected a whole number"),
        ("steps: 1.5", [], "steps is 1.5, expected a whole number"),
        ("steps: true", [], "steps is True, expected a number"),
        ("steps: 0", [], "steps is 0, expected at least 1"),
        ("data: 3", [], "data is 3, not a section"),
        ("- 1", [], "holds a list, expected sections"),
        ("a: [", [], "is not valid YAML"),
        ("optimizer: {betas: [0.9]}", [], r"optimizer.betas\[1\] is missing"),
        ("optimizer: {name: sgd}", [], "optimizer.name is 'sgd', expected one of adam, adamw"),
        ("precision: fp8", [], "precision is 'fp8', expected one of fp32"),
        ("ema: 1", [], "ema is 1, expected less than 1"),
        ("loss: {l1: 0}", [], "loss.l1 is 0.0, expected a positive"),
        ("loss: {mse: -1}", [], "loss.mse is -1, expected at least 0"),
        ("accumulate: 3", [], "accumulate is 3, expected a divisor of data.batch, 32"),
        ("schedule: {milestones: [5, 3]}", [], r"schedule.milestones is \[5, 3\], expected increasing steps"),
        ("", ["data.train=[]"], r"data.train is \[\], expected at least one folder"),
        ("", ["data.lr=[a, b]"], "data.lr is .*, expected a folder for each"),
        ("", ["data.sizes=[0.5, 2]"], r"data.sizes\[1\] is 2, expected at most 1"),
        ("", ["data.sizes=[1, 1]"], "data.sizes is .*, expected distinct numbers"),
        ("", ["data.lr=[a]", "data.sizes=[0.5]"], r"data.sizes is \[0.5\], expected \[1\], as data.lr gives"),
    ],
)
def test_what_is_wrong_is_named(written, text, overrides, message):
    with pytest.raises(ConfigError, match=message):
        written(text, *overrides)


def test_a_missing_file_names_what_there_is():
    with pytest.raises(ConfigError, match=r"t_x9 does not exist.*t_x"):
        load_config("t_x9", ENOUGH)


def test_rates_follow_from_the_step():
    schedule = Schedule(milestones=[10, 20], warmup=4)
    assert [rate_factor(schedule, step, 30) for step in (0, 3, 4, 9, 10, 19, 20, 29)] == [
        0.2, 0.8, 1, 1, 0.5, 0.5, 0.25, 0.25
    ]  # fmt: skip
    schedule = Schedule(name="cosine", warmup=4, begin=10, lowest=0.1)
    assert [rate_factor(schedule, step, 30) for step in (4, 10, 20, 30)] == pytest.approx([1, 1, 0.55, 0.1])


PUBLISHED = """
name: train_T_X2
model_type: SeemoReModel
scale: 2
num_gpu: 4
manual_seed: 7
datasets:
  train:
    name: DF2K
    task: SR
    type: PairedImageDataset
    dataroot_gt: hr
    dataroot_lq: lr
    filename_tmpl: '{}x2'
    io_backend: {type: disk}
    gt_size: 128
    use_hflip: true
    use_rot: true
    num_worker_per_gpu: 6
    batch_size_per_gpu: 8
  val_1: {name: Set5, type: PairedImageDataset, dataroot_gt: set5, dataroot_lq: set5_lr}
network_g:
  type: SeemoRe
  scale: 2
  in_chans: 3
  num_experts: 3
  num_layers: 6
  embedding_dim: 36
  img_range: 1.0
  use_shuffle: true
  global_kernel_size: 11
  recursive: 2
  lr_space: exp
  topk: 1
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


def test_option_files_of_basicsr_are_read_as_they_are(tmp_path):
    path = tmp_path / "train_T_X2.yml"
    path.write_text(PUBLISHED)
    config, notes = load_config(str(path))
    assert config.model.arguments() == load_config("t_x2", ENOUGH)[0].model.arguments()
    assert (config.data.train, config.data.lr, config.data.lr_name) == (["hr"], ["lr"], "{}x2")
    assert (config.data.patch, config.data.batch, config.data.workers, config.seed) == (64, 32, 6, 7)
    assert (config.loss.l1, config.loss.fft, config.ema, config.steps) == (1.0, 0.1, 0.999, 500_000)
    assert (config.validation.data, config.validation.every) == ({"Set5": "set5"}, 5000)
    assert (config.checkpoint.every, config.log.every, config.init_from) == (10_000, 200, None)
    named = [note.split(": ", 1)[1].split(" ")[0] for note in notes]
    assert named == ["train.perceptual_opt"]
    assert config.validation.lr == {"Set5": "set5_lr"} and config.validation.samples == 0
    path.write_text(PUBLISHED.replace("L1Loss, loss_weight: 1.0", "MSELoss, loss_weight: 2.0"))
    assert vars(load_config(str(path))[0].loss) == {"l1": 0.0, "mse": 2.0, "fft": 0.1}


@pytest.mark.parametrize(
    "old, new, note",
    [
        ("project: ~", "project: mine", "logger.wandb is not supported"),
        ("resume_state: ~", "resume_state: x.state", "path.resume_state has no effect"),
        ("strict_load_g: true", "strict_load_g: false", "path.strict_load_g has no effect"),
        ("pretrain_network_g: ~", "pretrain_network_g: x.pth", "path.param_key_g has no effect: params_ema"),
        ("pretrain_network_g: ~", "experiments_root: there", "path.experiments_root has no effect"),
        ("type: calculate_psnr", "type: calculate_niqe", "val.metrics.psnr of calculate_niqe is not supported"),
        ("type: calculate_psnr", "type: calculate_psnr, crop_border: 3", "val.metrics.psnr.crop_border is 3: here 2"),
        ("dataroot_lq: set5_lr", "filename_tmpl: '{}_LRBI_x2'", "datasets.val_1.filename_tmpl has no effect: LR files"),
        ("type: calculate_psnr", "test_y_channel: false", "val.metrics.psnr is of all channels"),
        ("type: PairedImageDataset\n", "type: RealESRGANDataset\n", "datasets.train.type is RealESRGANDataset"),
        ("val_1: {name", "test_1: {name", "datasets.test_1 has no effect"),
        ("use_rot: true", "use_rot: false", "datasets.train.use_hflip and use_rot are one setting"),
        ("type: MultiStepLR, milestones: [250000, 400000], gamma: 0.5",
         "type: CosineAnnealingRestartLR, periods: [9, 9]", "train.scheduler.periods is [9, 9]: one cosine"),
        ("type: MultiStepLR, milestones: [250000, 400000], gamma: 0.5",
         "type: CosineAnnealingRestartLR, periods: [500000], restart_weights: [0.5]", "train.scheduler.rest"),
    ],
)  # fmt: skip
def test_what_an_option_file_asks_for_in_vain_is_named(tmp_path, old, new, note):
    assert old in PUBLISHED
    path = tmp_path / "options.yml"
    path.write_text(PUBLISHED.replace(old, new))
    notes = load_config(str(path))[1]
    assert len(notes) == 2 and any(f"{path}: {note}" in line for line in notes)  # and perceptual_opt


def test_what_an_option_file_leaves_out_is_what_it_is_there(tmp_path):
    path, text = tmp_path / "options.yml", PUBLISHED
    for old, new in [
        (", gamma: 0.5", ""), ("type: Adam,", "type: AdamW,"), (", weight_decay: 0, betas: [0.9, 0.99]", ""),
        ("warmup_iter: -1", "warmup_iter: 4"), ("use_tb_logger: true", "use_tb_logger: false"),
        ("dataroot_gt: hr", "dataroot_gt: ~/hr"),
    ]:  # fmt: skip
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    config, _ = load_config(str(path))
    assert config.schedule.gamma == 0.1 and config.log.tensorboard is False
    assert (config.optimizer.betas, config.optimizer.weight_decay) == ((0.9, 0.999), 0.01)
    assert [rate_factor(config.schedule, step, 10) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    assert config.data.train == [str(Path("~/hr").expanduser())]


def test_batches_of_basicsr_grow_with_the_processes(tmp_path, monkeypatch):
    path = tmp_path / "options.yml"
    path.write_text(PUBLISHED.replace("num_gpu: 4", "num_gpu: auto"))
    assert load_config(str(path))[0].data.batch == 8
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert load_config(str(path))[0].data.batch == 16


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("per_gpu: 8", "per_gpu: many", "batch_size_per_gpu is 'many', expected a whole number"),
        ("val_freq: !!float 5e3", "val_freq: often", "val.val_freq is 'often', expected a whole number"),
        ("val_freq: !!float 5e3", "val_freq: ~", "val.val_freq is None, expected a whole number"),
        ("save_checkpoint_freq: !!float 1e4", "save_checkpoint_freq: often", "save_checkpoint_freq is 'often'"),
        ("total_iter: 500000", "total_iter: many", "train.total_iter is 'many', expected a whole number"),
        ("ema_decay: 0.999", "ema_decay: high", "train.ema_decay is 'high', expected a number"),
        ("pretrain_network_g: ~", "pretrain_network_g: 5", "path.pretrain_network_g is 5, expected a file"),
        (
            "type: MultiStepLR, milestones: [250000, 400000], gamma: 0.5",
            "type: CosineAnnealingRestartLR, eta_min: ~",
            "train.scheduler.eta_min is None, expected a number",
        ),
        ("dataroot_lq: set5_lr", "dataroot_lp: set5_lr", r"no key datasets.val_1.dataroot_lp; did you mean datasets"),
        ("gt_size: 128", "gt_size: 127", "gt_size is 127, expected a multiple of the scale, 2"),
        ("type: MultiStepLR", "type: Plateau", "scheduler.type is 'Plateau'"),
        ("type: L1Loss", "type: CharbonnierLoss", "pixel_opt is .*expected L1Loss or MSELoss"),
        ("  type: SeemoRe\n", "  type: EDSR\n", "network_g.type is 'EDSR'"),
        ("dataroot_gt: hr", "dataroot_gt: ~", "dataroot_gt is None, expected a folder"),
        ("train:\n  ema", "trian:\n  ema", "there is no key trian; did you mean train\\?"),
        ("num_layers: 6", "num_layer: 6", r"there is no key network_g.num_layer; did you mean network_g.num_layers\?"),
        ("topk: 1", "dropout: 0.1", "there is no key network_g.dropout; expected one of embedding_dim"),
        ("total_iter: 5", "total_itr: 5", r"there is no key train.total_itr; did you mean train.total_iter\?"),
        ("  scale: 2\n  in", "  scale: 0\n  in", "scale is 0, expected at least 1"),
        ("  scale: 2\n  in", "  scale: two\n  in", "scale is 'two', expected a whole number"),
        (
            "pixel_opt: {type: L1Loss, loss_weight: 1.0, reduction: mean}",
            "pixel_opt: L1Loss",
            "pixel_opt is 'L1Loss', exp",
        ),
        ("io_backend: {type: disk}", "io_backend: disk", "io_backend is 'disk', expected a section"),
        ("io_backend: {type: disk}", "io_backend: {type: lmdb}", "io_backend.type is 'lmdb', expected disk"),
        (
            "scheduler: {type: MultiStepLR, milestones: [250000, 400000], gamma: 0.5}",
            "scheduler: MultiStepLR",
            "scheduler is 'MultiStepLR', expected a section",
        ),
        (
            "val: {val_freq: !!float 5e3, save_img: false, metrics: {psnr: {type: calculate_psnr}}}",
            "val: 5",
            "val is 5, expected a section",
        ),
        ("dataroot_gt: set5,", "dataroot_gt: [set5],", r"datasets.val_1.dataroot_gt is .'set5'., expected a folder"),
        ("warmup_iter: -1", "warmup_iter: few", "warmup_iter is 'few', expected a whole number"),
    ],
)
def test_option_files_that_cannot_be_carried_out(tmp_path, old, new, message):
    assert old in PUBLISHED
    path = tmp_path / "options.yml"
    path.write_text(PUBLISHED.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        load_config(str(path))
