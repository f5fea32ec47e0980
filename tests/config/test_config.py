"""The run file: strict, explained, and the same after a round trip."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlcore.config import loader
from rlcore.config.algorithm import PRESETS
from rlcore.config.loader import validate
from rlcore.config.schema import RunConfig
from rlcore.config.sections import DpoConfig
from rlcore.errors import ConfigError

ROOT = Path(__file__).parents[2]
SMALLEST = {"model": {"path": "tiny_llama"}, "data": {"train": {"name": "arithmetic"}}, "reward": [{"name": "math"}]}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(SMALLEST), encoding="utf-8")
    return path


def refused(file, *overrides):
    """The error of a minimal run file with these overrides."""
    with pytest.raises(ConfigError) as caught:
        loader.load(file, overrides)
    assert caught.value.status == 2
    return str(caught.value)


def test_model_data_and_reward_are_all_a_run_needs(file):
    config = loader.load(file)
    assert config.algorithm.group_size == 8 and config.sft is None and config.evaluation is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.grop_size=8", "algorithm.grop_size: no such setting; did you mean 'group_size'?"),
        ("alogrithm.group_size=8", "alogrithm: no such setting; did you mean 'algorithm'?"),
        ("reward.0.wieght=2", "reward.0.wieght: no such setting; did you mean 'weight'?"),
        ("data.train.max_row=2", "data.train.max_row: no such setting; did you mean 'max_rows'?"),
        ("sft={steps: 1, optimizer: {lrs: 1}}", "sft.optimizer.lrs: no such setting; did you mean 'lr'?"),
        ("backend.zzz=1", "backend.zzz: no such setting; there are: name, options"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(file, override, message):
    assert refused(file, override) == message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=ten", "train.steps: input should be a valid integer, unable to parse string as an integer; it is 'ten'"),
        ("train.steps=-1", "train.steps: input should be greater than or equal to 0; it is -1"),
        ("algorithm.group_size=2.5", "algorithm.group_size: input should be a valid integer, got a number with a fractional"),
        ("algorithm=grpo", "algorithm: input should be a valid dictionary or instance of AlgorithmConfig; it is 'grpo'"),
        ("model.path=", "model.path: input should be a valid string; it is empty"),
        ("model.precision=fp8", "model.precision: input should be 'auto', 'fp32' or 'bf16'; it is 'fp8'"),
        ("rollout.top_p=1.5", "rollout.top_p: input should be less than or equal to 1; it is 1.5"),
        ("optimizer.lr=.nan", "optimizer.lr: input should be"),
        ("algorithm.correction=[icepop]", "algorithm.correction: input should be 'none'"),
        ("algorithm.name=[grpo]", "algorithm.name: input should be 'grpo'"),
        ("algorithm.clip_low=1.5", "algorithm.clip_low: input should be less than or equal to 1; it is 1.5"),
        ("reward=[{}]", "reward.0.name: must be set"),
        ("data.train=5", "data.train: input should be"),
    ],
)
def test_a_wrong_value_is_named_with_what_would_be_right(file, override, message):
    assert refused(file, override).startswith(message)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm.group_size=1"], "algorithm.group_size: 1 leaves nothing to compare a sample with .*; use 2 or more"),
        (["rollout.temperature=0"], "rollout.temperature: 0 gives every sample of a group the same text, .* above 0"),
        (["evaluation.samples=4"], "evaluation.samples: 4 greedy responses to a row are one and the same; .* above 0"),
        (
            ["train.prompts_per_step=8", "train.minibatches_per_step=3"],
            "train.prompts_per_step: 8 prompts cannot be split into 3 equal minibatches; make one a multiple of the other",
        ),
        (
            ["data.max_prompt_tokens=100", "rollout.max_new_tokens=29", "train.max_tokens_per_microbatch=128"],
            r"train.max_tokens_per_microbatch: 128 cannot hold one sample of up to 129 tokens \(data.max_prompt_tokens 100"
            r" \+ rollout.max_new_tokens 29\); raise it to at least 129 or lower the other two",
        ),
        (
            ["algorithm.name=gspo", "algorithm.kl_in=reward", "algorithm.kl_coef=0.1"],
            "algorithm.kl_in: reward penalizes single tokens, and algorithm.surrogate sequence_clip .*=loss",
        ),
        (["algorithm.name=ppo"], r"critic: algorithm.advantage gae needs a value model; add the section \(critic: {}\) or .*"),
        (["critic={}"], "critic: algorithm.advantage group asks no critic; remove the section or set gae"),
        (
            ["algorithm.correction=token_tis", "rollout.top_k=5"],
            "algorithm.correction: token_tis compares log-probabilities, and under rollout.top_k 5 .*=none",
        ),
        (
            ["algorithm.name=reinforce++", "algorithm.max_refills=2"],
            "algorithm.max_refills: 2 replaces groups without spread, which algorithm.advantage batch can learn from; .* 0",
        ),
        (["algorithm.kl_target=0.1"], "algorithm.kl_target: needs an algorithm.kl_coef above 0 to start from"),
        (
            ["algorithm.correction=icepop", "algorithm.correction_high=0.4"],
            "algorithm.correction_low: 0.5 is not below algorithm.correction_high 0.4; swap or spread them",
        ),
        (["optimizer.betas=[0.9, 1.0]"], "optimizer.betas.1: input should be less than 1; it is 1.0"),
        (["optimizer.betas=[1, 0.9]"], "optimizer.betas.0: input should be less than 1; it is 1"),
        (["sft={steps: 1, optimizer: {betas: [0.9, -0.1]}}"], "sft.optimizer.betas.1: input should be greater than .* 0; .*"),
        (
            ["dpo={steps: 1, loss: ipo, label_smoothing: 0.3}"],
            "dpo.label_smoothing: 0.3 is a part of loss sigmoid, and ipo has none; set it to 0 or set dpo.loss=sigmoid",
        ),
        (["dpo={steps: 1, loss: hinge, label_smoothing: 0.1}"], "dpo.label_smoothing: 0.1 .* and hinge has none; .*"),
        (["optimizer.min_lr=1"], "optimizer.min_lr: 1.0 is above lr 1e-06; lower it"),
        (["vision.min_pixels=9000", "vision.max_pixels=8000"], "vision.min_pixels: 9000 is above max_pixels 8000; lower it"),
        (
            ["model.lora={sync: adapter}", "sft={steps: 1}"],
            "model.lora.sync: adapter sends the engine no other weights, and the warm start .* or remove sft",
        ),
        (["evaluation.every=5"], "evaluation: is set but data.eval names no rows; add data.eval or remove evaluation"),
    ],
)
def test_contradicting_numbers_are_refused_with_the_remedy(file, overrides, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        loader.load(file, overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["placement={kind: ray, devices: 3}", "sharding.sequence_parallel=2"],
            r"placement.devices: 3 devices cannot be split into equal parts of 2 \(sharding.replicas x sharding.sequence_.*\)",
        ),
        (
            ["placement={kind: ray, pools: {a: {roles: [actor, rollout]}, b: {roles: [rollout]}}}"],
            "placement.pools.b.roles: rollout is already in the pool 'a'; list each role once",
        ),
        (["placement={kind: ray, pools: {a: {roles: [actor]}}}"], "placement.pools: no pool has the role rollout; .*"),
        (["placement.devices=2"], "placement.kind: local is one process on one device; set placement.kind=ray for more.*"),
    ],
)
def test_devices_that_cannot_be_shared_out_are_refused(file, overrides, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        loader.load(file, overrides)


def test_an_algorithm_stands_for_its_papers_settings_and_what_is_set_wins(file):
    dapo = "algorithm.name=dapo"
    plain = loader.load(file, [dapo]).algorithm
    assert (plain.clip_low, plain.clip_high, plain.aggregation, plain.max_refills) == (0.2, 0.28, "token_mean", 3)
    changed = loader.load(file, [dapo, "algorithm.clip_high=0.3", "algorithm.correction=icepop"]).algorithm
    assert (changed.clip_high, changed.overlong_penalty) == (0.3, 1.0)
    assert (changed.correction_low, changed.correction_high) == (0.5, 5.0)


@pytest.mark.parametrize("name", PRESETS)
def test_an_algorithm_written_out_reads_back_equal(file, tmp_path, name):
    config = loader.load(file, [f"algorithm.name={name}", *(["critic={}"] if name == "ppo" else [])])
    (tmp_path / "again.yaml").write_text(loader.dump(config), encoding="utf-8")
    assert loader.load(tmp_path / "again.yaml") == config


def test_every_mistake_is_listed_at_once(file):
    assert refused(file, "train.stepz=1", "optimizer.lr=fast").splitlines() == [
        "optimizer.lr: input should be a valid number, unable to parse string as a number; it is 'fast'",
        "train.stepz: no such setting; did you mean 'steps'?",
    ]


def test_overrides_reach_lists_sections_that_are_not_there_and_yaml_values(file):
    config = loader.load(
        file,
        [
            "reward.0.weight=2", "optimizer.lr=1e-4", "optimizer.betas=[0, 0.95]", "sft.steps=3", "sft.optimizer.lr=1.0e-3",
            "data.train.options={count: 4}", "data.train.options.seed=1", "logging.tensorboard=false", "model.path=a=b",
        ],
    )  # fmt: skip
    assert config.rewards["0"].weight == 2
    assert config.optimizer.lr == 1e-4 and config.optimizer.betas == (0.0, 0.95)
    assert config.sft is not None and config.sft.steps == 3 and config.sft.optimizer.lr == 1e-3
    assert config.data.train[0].options == {"count": 4, "seed": 1}
    assert config.logging.tensorboard is False
    assert config.model.path == "a=b"


def test_the_last_override_wins_and_a_section_can_be_taken_away(file):
    config = loader.load(file, ["seed=1", "seed=2", "sft.steps=3", "sft=null"])
    assert config.seed == 2 and config.sft is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "'train.steps': an override is a.b=value, for example train.steps=10"),
        ("=3", "'=3': an override is a.b=value"),
        ("train..steps=3", "'train..steps=3': an override is a.b=value"),
        ("train.steps={", "'train.steps={': the value is not valid YAML"),
        ("reward.1.weight=2", "reward.1.weight: '1' is not an entry of this list of 1"),
        ("reward.first.weight=2", "reward.first.weight: 'first' is not an entry of this list of 1"),
        ("model.path.name=x", "model.path.name: 'name' stands below a plain value ('tiny_llama'), not below a section"),
    ],
)
def test_a_malformed_override_is_explained(file, override, message):
    assert refused(file, override).startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a run file is a mapping of settings (model:, data:, reward:, ...), this holds empty"),
        (b"- model", "a run file is a mapping of settings (model:, data:, reward:, ...), this holds a list"),
        (b"model: {path: x", "not valid YAML: "),
        (b"\xff\xfe\x00", "cannot be read: "),
    ],
)
def test_a_file_that_is_no_run_file_is_named(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    assert refused(path).startswith(f"{path}: {message}")


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    assert refused(tmp_path / "no.yaml") == f"{tmp_path / 'no.yaml'}: no such run file"
    assert refused(tmp_path).startswith(f"{tmp_path}: cannot be read: ")


def test_missing_sections_are_all_listed(tmp_path):
    (tmp_path / "run.yaml").write_text("seed: 1\n", encoding="utf-8")
    assert refused(tmp_path / "run.yaml").splitlines() == ["model: must be set", "data: must be set"]


def test_a_key_given_twice_is_an_error_and_not_a_silent_choice(tmp_path):
    (tmp_path / "run.yaml").write_text("seed: 1\ntrain: {steps: 1}\nseed: 2\n", encoding="utf-8")
    assert refused(tmp_path / "run.yaml") == f"{tmp_path / 'run.yaml'}:3: 'seed' is already set on line 1; remove one"


def test_what_show_prints_reads_back_as_the_same_run(file, tmp_path):
    config = loader.load(file, ["optimizer.lr=1e-7", "sft.steps=2", "data.train={name: gsm8k, path: ä.jsonl}"])
    copy = tmp_path / "copy.yaml"
    copy.write_text(loader.dump(config), encoding="utf-8")
    assert loader.load(copy) == config
    assert loader.dump(loader.load(copy)) == loader.dump(config)


def test_a_config_is_read_and_never_written(file):
    config = loader.load(file)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


def test_options_of_a_plugin_are_explained_under_their_full_name():
    with pytest.raises(ConfigError, match=r"^backend.options.steps: must be set\nbackend.options.stepz: no such setting;"):
        validate(DpoConfig, {"stepz": 1}, "backend.options.")


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("**/*.yaml")), ids=lambda path: path.stem)
def test_every_example_parses(example):
    assert isinstance(loader.load(example), RunConfig)


def processor_seconds():
    """CPU time of finished child processes: independent of machine load."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("command", ["grpo", "sft", "plan", "show"])
@pytest.mark.parametrize("mistake", ["algorithm.grop_size=8", "algorithm.group_size=1", "rollout.engine=vlm"])
def test_mistakes_in_settings_are_told_before_torch_is_imported(file, capsys, command, mistake):
    program = (
        "import sys\nfrom rlcore.cli.main import main\n"
        f"status = main([{command!r}, {str(file)!r}, {mistake!r}])\n"
        "assert status == 2, status\n"
        "assert not {'torch', 'transformers', 'numpy', 'vllm'} & set(sys.modules), 'imported'\n"
    )
    before = processor_seconds()
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert processor_seconds() - before < 2
    assert result.stderr.startswith(f"rlcore: {mistake.partition('=')[0]}: ")
    assert len(result.stderr.splitlines()) == 1
