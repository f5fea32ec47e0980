"""`rlcore import-config`: run files of other frameworks mean the same here, and every key of theirs is accounted for."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from rlcore import registry
from rlcore.cli.main import main
from rlcore.config import loader
from rlcore.config.foreign.conversion import Conversion, Entry, convert
from rlcore.config.foreign.document import read_document
from rlcore.config.foreign.report import report, run_file
from rlcore.config.foreign.table import Mapped, Unneeded, Unsupported
from rlcore.errors import ConfigError

ROOT = Path(__file__).parents[2]
FILES = Path(__file__).parent / "theirs"
ROWS = ROOT / "examples" / "recipes" / "rows"
FILE_OF = {
    "chatlearn": "chatlearn_fsdp", "megatron": "chatlearn_megatron", "mindspeed": "mindspeed_3b", "rlinf": "rlinf_robo2vlm",
    "verl": "verl_geo3k",
}  # fmt: skip
VISION = [  # what ChatLearn's script for Qwen2.5-VL-7B says after its template
    "runtime_args.model_type=vlm", "runtime_args.exp_name=vl", "runtime_args.num_episode=200",
    "runtime_args.sample_per_episode=512", "runtime_args.train_global_batch_size=512", "runtime_args.train_micro_batch_size=8",
    "runtime_args.save_episode_interval=5", "runtime_args.eval_episode_interval=5",
    "runtime_args.log_args_dict.enable_wandb=False", "runtime_args.log_args_dict.wandb_project=mine",
    "models.policy_trainer.packing=True", "models.policy_trainer.optimizer.lr=1e-6", "models.policy_trainer.kl_coef=0.01",
    "models.policy.num_inference_per_prompt=4", "models.policy.gpu_memory_utilization=0.85",
    "models.policy.enable_thinking=False",
]  # fmt: skip
TEXT = [  # its script for Qwen3-8B
    "runtime_args.sample_per_episode=2048", "runtime_args.train_global_batch_size=2048",
    "runtime_args.train_micro_batch_size=256", "runtime_args.save_episode_interval=5", "runtime_args.eval_episode_interval=5",
    "models.policy_trainer.packing=True", "models.policy_trainer.optimizer.lr=2e-6",
    "models.policy.gpu_memory_utilization=0.85",
]  # fmt: skip
MEGATRON = [  # its script for Qwen2.5-VL-7B with Megatron
    "runtime_args.num_episode=50", "runtime_args.sample_per_episode=2048", "runtime_args.train_global_batch_size=2048",
    "runtime_args.train_micro_batch_size=1", "runtime_args.save_episode_interval=1000000",
    "runtime_args.eval_episode_interval=1", "runtime_args.enable_eval_before_training=True",
    "models.policy_trainer.packing=False",
    "models.policy_trainer.max_token_in_packing=8192", "models.policy_trainer.tensor_model_parallel_size=2",
    "models.policy.tensor_model_parallel_size=1", "models.policy.gpu_memory_utilization=0.75",
]  # fmt: skip
LARGE = [  # what MindSpeed-MM's file for Qwen2.5-VL-32B has else
    "actor_config.tensor_model_parallel_size=8", "actor_config.pipeline_model_parallel_size=2",
    "vit_config.micro_batch_size=16", "vit_config.model=qwen2.5vl_32b",
    "vit_config.load=models/vit", "vit_config.tensor_model_parallel_size=1",
    "vit_config.no_load_optim=true", "rl_config.max_packing_token_size=[90000,4000]", "rl_config.colocate_actor_and_vit=true",
    "rl_config.actor_resource.num_npus=16", "rl_config.vit_resource.num_npus=16",
    "generate_config.infer_tensor_parallel_size=2",
]  # fmt: skip
SEEDS = {  # by name: whose, overrides, the recipe that has the same settings, published rows, command
    "vision": ("chatlearn", VISION, "qwen2_5_vl_7b_geo3k_grpo", "geo3k"),
    "text": ("chatlearn", TEXT, "qwen3_8b_math_grpo", "math"),
    "megatron": ("megatron", MEGATRON, None, "geo3k"),
    "mindspeed": ("mindspeed", [], "qwen2_5_vl_3b_geo3k_grpo_npu", "geo3k"),
    "mindspeed 32B": ("mindspeed", LARGE, None, "geo3k"),
    "rlinf": ("rlinf", [], "qwen2_5_vl_3b_robo2vlm_sft", "robo2vlm"),
}
ELSEWHERE = (  # what a recipe chose by itself: its files and devices, and settings that its guide has no key for
    "model.path", "model.precision", "data.train", "data.eval", "data.chat_template_options", "reward", "backend", "logging",
    "evaluation", "placement.devices", "rollout.engine", "rollout.options", "train.max_tokens_per_microbatch",
    "train.gradient_checkpointing",
)  # fmt: skip


def imported(file, *overrides, rows=None, skip_unknown=False, environment=()):
    """The conversion of one of the files here, or of settings."""
    name = FILE_OF.get(file, file)
    return convert(table_of(name), document_of(name, overrides, environment), rows, skip_unknown)


def document_of(name, overrides, environment=()):
    table = table_of(name)
    return read_document(FILES / f"{name}.yaml", overrides, table, table.defaults, dict(environment))


@cache
def table_of(name):
    return registry.load("run_files", name.partition("_")[0])


def settings(file, *overrides, **options):
    return imported(file, *overrides, **options).settings


def outcome(conversion, key):
    """What became of a key; of several entries the first."""
    return next(entry.outcome for entry in conversion.entries if key in entry.theirs)


def loaded(conversion, tmp_path, *overrides):
    file = tmp_path / "run.yaml"
    file.write_text(run_file(conversion), encoding="utf-8")
    return loader.load(file, overrides)


def flat(values, prefix=""):
    if not isinstance(values, dict) or prefix in ELSEWHERE:
        return {prefix: values}
    return {name: one for key, value in values.items() for name, one in flat(value, f"{prefix}.{key}".lstrip(".")).items()}


@pytest.mark.parametrize("seed", SEEDS)
def test_the_guides_own_files_have_nothing_unsupported_and_every_key_is_accounted_for(seed):
    file, overrides, *_ = SEEDS[seed]
    conversion = imported(file, *overrides)
    assert not [entry for entry in conversion.entries if isinstance(entry.outcome, Unsupported)]
    assert not conversion.unknown and not conversion.to_set
    accounted = {key for entry in conversion.entries for key in entry.theirs}
    document = document_of(FILE_OF[file], overrides)
    assert document.values.keys() <= accounted
    text = report(conversion)
    assert all(f"{key}:" in text for key in document.values)


@pytest.mark.parametrize("seed", [name for name, (_, _, recipe, _) in SEEDS.items() if recipe])
def test_an_imported_file_is_the_recipe_but_for_its_own_files_and_devices(seed, tmp_path):
    file, overrides, recipe, _ = SEEDS[seed]
    ours = flat(loader.load(ROOT / "examples" / "recipes" / f"{recipe}.yaml").model_dump())
    found = flat(loaded(imported(file, *overrides), tmp_path).model_dump())
    assert found.keys() == ours.keys()
    for key in ours.keys() - set(ELSEWHERE):
        mine, theirs = ours[key], found[key]
        assert (set(mine) == set(theirs)) if key == "placement.offload" else mine == theirs, key


@pytest.mark.parametrize("seed", SEEDS)
def test_an_imported_file_passes_plan(seed, tmp_path, capsys, monkeypatch):
    file, overrides, _, published = SEEDS[seed]
    monkeypatch.chdir(tmp_path)
    names = {"geo3k": "geo3k", "math": "math-lighteval", "robo2vlm": "robo2vlm"}
    layout = {"mindspeed": "mindspeed", "rlinf": "ours"}.get(file, "chatlearn")
    assert main(["data", names[published], "--input", str(ROWS / published), "--output", "data", "--layout", layout]) == 0
    suffix = next(Path("data").glob("train.*")).suffix
    written = "chatlearn" if file == "megatron" else file
    assert main(["import-config", written, str(FILES / f"{FILE_OF[file]}.yaml"), *overrides, "--output", "run.yaml"]) == 0
    vision = published != "math"
    tiny = ["model.path=tiny_qwen2_5_vl", "model.options={layers: 2, vision_layers: 2}"]
    held_out = ["data.eval.path=data/test" + suffix] if "eval" in yaml.safe_load(Path("run.yaml").read_text())["data"] else []
    changes = [
        *(tiny if vision else ["model.path=tiny_qwen3", "model.options={layers: 2}"]), "backend.name=cpu",
        f"data.train.path=data/train{suffix}", *held_out, "data.chat_template_options={}", "model.precision=auto",
    ]  # fmt: skip
    capsys.readouterr()
    assert main(["plan", "run.yaml", *changes]) == 0, capsys.readouterr().err
    assert "16" in capsys.readouterr().out


def test_samples_and_optimizer_steps_of_an_episode_become_prompts_and_minibatches():
    found = imported("chatlearn", *VISION, "runtime_args.train_global_batch_size=128")
    keys = ("train.prompts_per_step", "algorithm.group_size", "train.minibatches_per_step")
    assert [found.settings[key] for key in keys] == [128, 4, 4]
    note = outcome(found, "runtime_args.sample_per_episode").note
    assert "512 samples / 4 a prompt = 128 prompts, 512 / 128 = 4 optimizer steps" in note
    uneven = imported("chatlearn", *VISION, "runtime_args.sample_per_episode=48", "runtime_args.train_global_batch_size=6")
    assert uneven.settings["train.minibatches_per_step"] == 6, "of 12 prompts: a group of 4 is not in two of them"
    assert "6 optimizer steps instead of 8" in outcome(uneven, "runtime_args.sample_per_episode").note


def test_a_group_size_in_two_places_is_called_out_where_they_differ():
    key = "runtime_args.num_inference_per_prompt"
    note = outcome(imported("chatlearn", *VISION), key).note
    assert "the 4 samples of one prompt in one step" in note and f"{key} = 32 rewards" in note
    assert "earlier policies" not in outcome(imported("chatlearn", *TEXT), key).note
    left_out = imported("chatlearn", *VISION, f"~{key}")
    assert "earlier policies" in outcome(left_out, key).note, "the default is 32"
    assert f"{key}: 32 (default)" in report(left_out)


def test_batches_in_prompts_are_multiplied_by_their_samples_only_in_the_report():
    found = imported("mindspeed")
    assert (found.settings["train.prompts_per_step"], found.settings["train.minibatches_per_step"]) == (512, 16)
    assert "mini_batch_size 32 x 5 = 160 samples an optimizer step" in outcome(found, "rl_config.mini_batch_size").note
    found = imported("verl", rows=2101)
    assert (found.settings["train.prompts_per_step"], found.settings["train.minibatches_per_step"]) == (512, 4)


def test_epochs_are_steps_where_the_schedule_has_as_many_and_passes_otherwise():
    same = imported("rlinf")
    assert same.settings["sft.steps"] == 6000 and "sft.epochs" not in same.settings
    assert "set sft.epochs instead" in outcome(same, "runner.max_epochs").note
    passes = imported("rlinf", "runner.max_epochs=3", "actor.optim.total_training_steps=900")
    assert passes.settings["sft.epochs"] == 3 and "sft.steps" not in passes.settings
    steps = imported("rlinf", "runner.max_epochs=-1", "runner.max_steps=500")
    assert steps.settings["sft.steps"] == 500


def test_passes_over_the_rows_ask_for_their_number():
    with pytest.raises(ConfigError, match=r"trainer\.total_epochs: 15 passes over the rows.*--rows N.*total_training_steps=N"):
        imported("verl")
    assert settings("verl", rows=2101)["train.steps"] == 2101 // 512 * 15
    assert settings("verl", "+trainer.total_training_steps=70")["train.steps"] == 70
    with pytest.raises(ConfigError, match="512 prompts a step are more than the 100 rows"):
        imported("verl", rows=100)


def test_warm_up_in_steps_is_warm_up_in_optimizer_steps():
    assert settings("verl", rows=2101)["optimizer.warmup_steps"] == 10 * 4
    ratio = ["actor_rollout_ref.actor.optim.lr_warmup_steps=-1", "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio=0.1"]
    assert settings("verl", *ratio, "actor_rollout_ref.actor.ppo_epochs=2", rows=5120)["optimizer.warmup_steps"] == 15 * 4 * 2
    assert settings("mindspeed", "actor_config.lr_warmup_fraction=0.01")["optimizer.warmup_steps"] == 10 * 16
    ratio = ["actor.optim.lr_warmup_steps=-1", "+actor.optim.lr_warmup_steps_ratio=0.1"]
    assert settings("rlinf", *ratio)["sft.optimizer.warmup_steps"] == 600


def test_schedules():
    style = ["actor_config.lr_decay_style=cosine", "actor_config.min_lr=1e-7"]
    found = settings("mindspeed", *style)
    assert (found["optimizer.schedule"], found["optimizer.min_lr"]) == ("cosine", 1e-7)
    assert "optimizer.min_lr" not in settings("mindspeed")
    assert settings("rlinf", "actor.optim.min_lr_rate=0.1")["sft.optimizer.min_lr"] == pytest.approx(1e-6)
    falling = imported("megatron", "models.policy_trainer.optimizer.min_lr=1e-7")
    assert any(isinstance(one.outcome, Unsupported) and "optimizer.schedule" in one.outcome.remedy for one in falling.entries)
    cosine = ["actor_rollout_ref.actor.optim.warmup_style=cosine", "actor_rollout_ref.actor.optim.min_lr_ratio=0.1"]
    assert settings("verl", *cosine, rows=600)["optimizer.min_lr"] == pytest.approx(1e-7)


def test_micro_batches_of_samples_become_a_cap_of_tokens_that_holds_a_sample():
    cap = "train.max_tokens_per_microbatch"
    assert settings("chatlearn", *VISION)[cap] == 32768
    assert settings("megatron", *MEGATRON)[cap] == 3072
    assert settings("megatron", *MEGATRON, "runtime_args.train_micro_batch_size=4")[cap] == 4 * 3072
    assert settings("mindspeed")[cap] == 4000
    small = imported("mindspeed", "rl_config.max_packing_token_size=[15000,2000]")
    assert small.settings[cap] == 3072 and "2000 tokens, raised" in outcome(small, "rl_config.max_packing_token_size").note
    assert settings("mindspeed", "rl_config.use_dynamic_bsz=false")[cap] == 3072
    assert settings("rlinf")[cap] == 4096
    assert settings("verl", rows=600)[cap] == 10 * 3072
    dynamic = [f"actor_rollout_ref.actor.{key}" for key in ("use_dynamic_bsz=true", "ulysses_sequence_parallel_size=2")]
    assert settings("verl", *dynamic, rows=600)[cap] == 2 * 16384


def test_advantages_divide_by_the_same_deviation():
    keys = ("algorithm.advantage_std", "algorithm.advantage_eps")
    found = {file: settings(file, rows=600) for file in ("chatlearn", "mindspeed", "verl")}
    assert [found["chatlearn"][key] for key in keys] == ["population", 1e-5]
    assert [found["mindspeed"][key] for key in keys] == [found["verl"][key] for key in keys] == ["sample", 1e-6]
    assert settings("verl", "algorithm.norm_adv_by_std_in_grpo=false", rows=600)["algorithm.advantage_std"] == "none"


def test_defaults_that_differ_from_ours_are_written_out():
    bare = settings("chatlearn", "~models.policy_trainer.optimizer.adam_beta2", "~models.policy_trainer.final_clip_ratio")
    assert bare["optimizer.betas"] == [0.9, 0.95] and bare["algorithm.final_clip"] == 3
    assert settings("verl", "~actor_rollout_ref.actor.optim.weight_decay", rows=600)["optimizer.weight_decay"] == 0.01


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], {"kl_in": "loss", "kl_coef": 0.01, "kl_estimator": "low_var_kl"}),
        (["actor_rollout_ref.actor.kl_loss_type=k2"], {"kl_in": "loss", "kl_coef": 0.01, "kl_estimator": "mse"}),
        (["actor_rollout_ref.actor.use_kl_loss=false"], {"kl_coef": 0.0}),
        (
            ["actor_rollout_ref.actor.use_kl_loss=false", "algorithm.use_kl_in_reward=true", "algorithm.kl_ctrl.kl_coef=0.002"],
            {"kl_in": "reward", "kl_coef": 0.002, "kl_estimator": "kl"},
        ),
        (
            [
                "actor_rollout_ref.actor.use_kl_loss=false", "algorithm.use_kl_in_reward=true",
                "algorithm.kl_ctrl.type=adaptive",
            ],
            {"kl_in": "reward", "kl_coef": 0.001, "kl_estimator": "kl", "kl_target": 0.1, "kl_horizon": 10000},
        ),
    ],
)  # fmt: skip
def test_the_divergence_is_where_it_was(overrides, expected):
    found = settings("verl", *overrides, rows=600)
    assert {key[10:]: value for key, value in found.items() if key.startswith("algorithm.kl_")} == expected


def test_an_adaptive_divergence_of_mindspeed_has_its_target():
    found = settings("mindspeed", "rl_config.kl_ctrl_type=adaptive", "rl_config.kl_penalty=abs")
    assert [found[f"algorithm.kl_{key}"] for key in ("target", "horizon", "estimator")] == [100, 1000, "abs"]


def test_clip_ranges():
    found = settings("chatlearn", "models.policy_trainer.pos_clip_ratio=0.28")
    assert (found["algorithm.clip_low"], found["algorithm.clip_high"]) == (0.2, 0.28)
    higher = ["rl_config.clip_higher_enable=true", "rl_config.clip_ratio_high=0.3", "rl_config.clip_ratio_low=0.1"]
    assert [settings("mindspeed", *higher)[f"algorithm.clip_{side}"] for side in ("low", "high")] == [0.1, 0.3]
    actor = "actor_rollout_ref.actor."
    beside = [f"{actor}clip_ratio=0.4", f"{actor}clip_ratio_low=0.2", f"{actor}clip_ratio_high=0.28"]
    found = imported("verl", *beside, rows=600)
    assert [found.settings[f"algorithm.clip_{side}"] for side in ("low", "high")] == [0.2, 0.28]
    assert "clip_ratio 0.4 has no effect" in outcome(found, f"{actor}clip_ratio").note


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("token-mean", "token_mean"), ("seq-mean-token-sum", "sequence_sum"), ("seq-mean-token-mean", "sequence_mean")],
)
def test_loss_aggregation(mode, expected):
    assert settings("verl", f"actor_rollout_ref.actor.loss_agg_mode={mode}", rows=600)["algorithm.aggregation"] == expected


def test_a_constant_length_is_verls_longest_response():
    found = settings("verl", "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum-norm", rows=600)
    assert (found["algorithm.aggregation"], found["algorithm.aggregation_length"]) == ("constant", 2048)


def test_a_critic_comes_with_gae(tmp_path):
    found = loaded(imported("verl", "algorithm.adv_estimator=gae", "critic.optim.lr=2e-5", rows=600), tmp_path)
    assert found.critic.optimizer.lr == 2e-5 and found.algorithm.gae_lambda == 1.0 and found.algorithm.value_clip == 0.5
    assert loaded(imported("mindspeed", "rl_config.adv_estimator=gae"), tmp_path).algorithm.gae_lambda == 0.95


def test_settings_of_dapo():
    dapo = [
        "+algorithm.filter_groups.enable=true", "+algorithm.filter_groups.max_num_gen_batches=10",
        "+reward_model.overlong_buffer.enable=true", "+reward_model.overlong_buffer.len=512",
        "+reward_model.overlong_buffer.penalty_factor=1.0", "+reward_model.reward_manager=dapo",
    ]  # fmt: skip
    found = settings("verl", *dapo, rows=600)
    assert [found[f"algorithm.{key}"] for key in ("max_refills", "overlong_share", "overlong_penalty")] == [9, 0.25, 1.0]


def test_intervals_that_are_off_and_a_last_step_that_is_always_saved():
    off = settings("verl", "trainer.save_freq=-1", "trainer.test_freq=-1", "trainer.val_before_train=true", rows=600)
    assert (off["train.save_every"], off["evaluation.every"], off["evaluation.before"]) == (0, 0, True)
    never = imported("megatron", *MEGATRON)
    assert never.settings["train.save_every"] == 0
    assert "1000000 is beyond the last of 50" in outcome(never, "runtime_args.save_episode_interval").note


def test_evaluations_sample_as_they_did():
    limits = ["temperature", "top_p", "top_k"]
    assert [settings("chatlearn")[f"evaluation.{key}"] for key in limits] == [0.6, 0.95, 20]
    kwargs = "actor_rollout_ref.rollout.val_kwargs."
    sampled = [f"{kwargs}{one}" for one in ("do_sample=true", "temperature=0.6", "top_p=0.95", "top_k=-1", "n=4")]
    found = settings("verl", *sampled, rows=600)
    assert [found[f"evaluation.{key}"] for key in (*limits, "samples")] == [0.6, 0.95, 0, 4]
    greedy = settings("verl", f"{kwargs}temperature=0.6", rows=600)
    assert greedy["evaluation.temperature"] == 0, "do_sample is off"


def test_long_prompts_are_never_cut():
    assert settings("verl", rows=600)["data.long_prompts"] == "drop"
    assert settings("verl", "data.filter_overlong_prompts=false", rows=600)["data.long_prompts"] == "refuse"
    cut = imported("verl", "data.filter_overlong_prompts=false", "data.truncation=left", rows=600)
    assert "not cut (left)" in outcome(cut, "data.truncation").note


def test_what_leaves_the_devices():
    assert set(settings("chatlearn", *VISION)["placement.offload"]) == {"parameters", "optimizer", "reference", "engine"}
    assert "reference" not in settings("chatlearn", *TEXT)["placement.offload"], "there is none without a divergence"
    assert set(settings("verl", rows=600)["placement.offload"]) == {"optimizer", "engine", "reference"}


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("no_shard", {"replicas": "all"}), ("full_shard", {"replicas": 1}), ("shard_grad_op", {"reshard_after_forward": False}),
        ("hybrid_shard", {"replicas": 2}),
    ],
)  # fmt: skip
def test_sharding_strategies(strategy, expected):
    overrides = [f"actor.fsdp_config.sharding_strategy={strategy}", "cluster.num_nodes=2"]
    found = settings("rlinf", *overrides, "cluster.component_placement.actor=0-15")
    assert {key[9:]: value for key, value in found.items() if key.startswith("sharding.")} == expected
    assert found["placement.devices"] == 16


def test_weights_that_stay_gathered_under_fsdp2():
    key, kept = "sharding.reshard_after_forward", ["+actor.fsdp_config.reshard_after_forward=false"]
    assert key not in settings("rlinf", *kept), "fsdp has shard_grad_op for it"
    assert settings("rlinf", *kept, "actor.fsdp_config.strategy=fsdp2")[key] is False


def test_two_keys_that_contradict_each_other_are_an_error():
    found = Conversion(table_of("rlinf"), "theirs.yaml")
    found.add(Entry({"a.first": 1}, Mapped({"seed": 1, "placement.offload": ["engine"]})))
    found.add(Entry({"a.same": 1}, Mapped({"seed": 1, "placement.offload": ["engine", "optimizer"]})))
    assert found.settings == {"seed": 1, "placement.offload": ["engine", "optimizer"]}
    with pytest.raises(ConfigError, match=r"theirs\.yaml: a\.second: gives seed 2, and another key gives 1; change one"):
        found.add(Entry({"a.second": 2}, Mapped({"seed": 2})))


def test_roles_that_are_not_together_have_pools():
    apart = ["runtime_args.colocation=[policy_trainer,ref_policy]", "models.policy.num_gpu=4"]
    assert settings("chatlearn", *VISION, *apart)["placement.pools"] == {
        "train": {"roles": ["actor"], "devices": 8}, "sample": {"roles": ["rollout"], "devices": 4},
    }  # fmt: skip
    assert settings("verl", rows=600)["placement.devices"] == 16


def test_the_engines_model_is_what_megatron_starts_from():
    assert settings("megatron")["model.path"] == "models/policy"
    elsewhere = imported("chatlearn", "models.ref_policy.load=models/other")
    assert any(isinstance(one.outcome, Unsupported) and "reference" in one.outcome.remedy for one in elsewhere.entries)


def test_images_have_the_budget_of_their_framework_and_a_frozen_tower_is_said_to_be():
    found = settings("mindspeed", *LARGE)
    assert [found[f"vision.{key}"] for key in ("min_pixels", "max_pixels", "images_per_batch")] == [512**2, 2048**2, 16]
    assert found["model.freeze"] == ["vision"]
    assert "model.freeze" not in settings("mindspeed", "rl_config.reuse_image_embeds=false")


def test_rewards_by_source_and_by_verifier():
    assert settings("chatlearn")["reward"]["hiyouga/geometry3k"] == [{"name": "geo3k"}]
    assert settings("verl", rows=600)["reward"]["openai/gsm8k"] == [{"name": "gsm8k"}]
    assert settings("mindspeed")["reward"] == [{"name": "geo3k"}]
    text = ["rl_config.is_multimodal=false", "rl_config.verifier_function=[acc,format]", "rl_config.verifier_weight=[0.7,0.3]"]
    found = imported("mindspeed", *text)
    assert found.settings["reward"] == [{"name": "math", "weight": 0.7}]
    assert any(isinstance(one.outcome, Unsupported) and "format" in one.outcome.remedy for one in found.entries)


def test_several_files_are_a_mixture_with_weights(tmp_path):
    found = imported("chatlearn", "runtime_args.data_path='data/a.json,data/b.json'", "runtime_args.data_ratio=[3,1]")
    mixture = loaded(found, tmp_path).data.train
    assert [(one.path, one.weight, one.source) for one in mixture] == [("data/a.json", 3, "a"), ("data/b.json", 1, "b")]
    held_out = settings("verl", "data.val_files=[one/test.parquet,two/test.parquet]", rows=600)["data.eval"]
    assert list(held_out) == ["one-test", "two-test"]


def test_columns_that_are_not_the_usual_ones_are_options():
    found = settings("rlinf", "data.prompt_key=asked", "data.image_keys=[left,right]")["data.train"]
    assert found["options"] == {"question": "asked", "images": ["left", "right"]}
    found = settings("verl", "data.image_key=pictures", rows=600)["data.train"]
    assert found["options"] == {"images": "pictures"}


def test_an_evaluation_alone_has_no_training_rows(tmp_path):
    found = loaded(imported("rlinf", "data.train_data_paths=null"), tmp_path)
    assert found.data.train == [] and found.data.eval


def test_free_sections_keep_their_names():
    found = settings(
        "verl", "+data.apply_chat_template_kwargs.enable_thinking=false",
        "+actor_rollout_ref.rollout.engine_kwargs.vllm.block_size=32", rows=600,
    )  # fmt: skip
    assert found["data.chat_template_options.enable_thinking"] is False
    assert found["rollout.options.block_size"] == 32


@pytest.mark.parametrize(
    ("file", "override", "remedy"),
    [
        ("chatlearn", "runtime_args.use_partial_rollout=true", "a response is sampled in one step"),
        ("chatlearn", "runtime_args.task_type=agent", "agents"),
        ("chatlearn", "runtime_args.rollout_backend=no_engine", "no engine of that name"),
        ("chatlearn", "models.policy.repetition_penalty=1.1", "own distribution"),
        ("chatlearn", "runtime_args.log_args_dict.enable_wandb=True", "W&B"),
        ("mindspeed", "actor_config.finetune=false", "convert the weights"),
        ("mindspeed", "rl_config.use_integrated_worker=false", "placement.pools"),
        ("rlinf", "runner.resume_dir=results/checkpoints/global_step_10", "convert the weights"),
        ("rlinf", "runner.logger.logger_backends=[wandb]", "no such logger"),
        ("rlinf", "data.dataset_name=other", "no data set of the kind"),
        ("verl", "actor_rollout_ref.actor.clip_ratio_c=3.0", "dual clip"),
        ("verl", "actor_rollout_ref.rollout.multi_turn.enable=true", "tools"),
        ("verl", "custom_reward_function.path=mine.py", "dotted path"),
        ("verl", "algorithm.use_kl_in_reward=true", "not in both"),
        ("verl", "data.prompt_key=question", "rename the column"),
    ],
)
def test_what_is_not_supported_says_what_to_do(file, override, remedy):
    found = imported(file, override, rows=600)
    key = override.partition("=")[0]
    said = [one.outcome.remedy for one in found.entries if key in one.theirs and isinstance(one.outcome, Unsupported)]
    assert said and remedy in said[0]
    assert f"{key}: " in report(found).partition("\nunsupported:")[2]


def test_a_file_that_hydra_composes_is_named_as_not_read():
    found = imported("rlinf", "defaults=[model/qwen@actor.model,_self_]")
    assert "model/qwen@actor.model: files of a `defaults` list" in outcome(found, "defaults").remedy
    assert isinstance(outcome(imported("rlinf"), "defaults"), Unneeded), "one that only sets up Hydra"


def write(folder, text):
    file = folder / "theirs.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def run(capsys, *arguments):
    """Status, output, errors."""
    status = main(["import-config", *map(str, arguments)])
    return status, *capsys.readouterr()


def test_an_unknown_key_is_named_with_the_nearest_and_writes_nothing(tmp_path, capsys):
    file = write(tmp_path, (FILES / "mindspeed_3b.yaml").read_text().replace("init_kl_coef:", "init_kl_cof:"))
    status, out, error = run(capsys, "mindspeed", file, "--output", tmp_path / "run.yaml")
    assert (status, out) == (2, "") and not (tmp_path / "run.yaml").exists()
    assert f"{file}: rl_config.init_kl_cof: is no key that is known of MindSpeed-RL" in error
    assert "did you mean rl_config.init_kl_coef?" in error
    status, _, error = run(capsys, "mindspeed", file, "--output", tmp_path / "run.yaml", "--skip-unknown")
    assert status == 0 and "unknown, left out:\n  rl_config.init_kl_cof: 0.01" in error
    assert loader.load(tmp_path / "run.yaml").train.prompts_per_step == 512


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rl_config.n_samples_per_prompt=many", r"rl_config\.n_samples_per_prompt: must be a number; it is 'many'"),
        ("rl_config.n_samples_per_prompt=2.5", r"rl_config\.n_samples_per_prompt: must be a whole number; it is 2\.5"),
        ("rl_config.use_dynamic_bsz=maybe", r"rl_config\.use_dynamic_bsz: must be true or false; it is 'maybe'"),
        ("megatron_training.tokenizer_name_or_path=[a]", r"tokenizer_name_or_path: must be a text; it is \['a'\]"),
        ("rl_config.mini_batch_size=100", r"rl_config\.mini_batch_size: 512 prompts .* equal parts of 100"),
        ("rl_config.max_packing_token_size=[]", r"max_packing_token_size: must be a number or a list of numbers; it is \[\]"),
        ("megatron_training.global_batch_size=0", r"global_batch_size.* cannot be split"),
        ("megatron_training.data_path=[{a: '${now:x}'}]", r"data_path: cannot be resolved here"),
        ("rl_config.adv_estimator=other", r"rl_config\.adv_estimator: must be group_norm or gae; it is 'other'"),
        ("~megatron_training.global_batch_size", r"megatron_training\.global_batch_size: must be set"),
        ("actor_config.lr=-1", r"as a run file of ours: optimizer\.lr: .*greater than 0"),
        ("megatron_training.seed=${now:%s}", r"megatron_training\.seed: cannot be resolved here: 'now'.*it is \$\{now:%s\}"),
        ("rl_config.mini_batch=3", r"has no rl_config\.mini_batch; write \+rl_config\.mini_batch=3"),
        ("+rl_config.mini_batch_size=3", r"rl_config\.mini_batch_size is already in .*write rl_config\.mini_batch_size=3"),
        ("~rl_config.nothing", r"has no rl_config\.nothing"),
        ("rl_config.epochs=[1", "the value is not valid YAML"),
        ("++actor_config.lr.x=1", "'lr' is a plain value"),
        ("model/qwen@actor=x", "chooses a file to compose"),
        ("rl_config.epochs", r"an override is a\.b=value"),
    ],
)
def test_a_wrong_value_is_one_line_with_file_and_key(override, message, tmp_path, capsys):
    file = write(tmp_path, (FILES / "mindspeed_3b.yaml").read_text())
    status, out, error = run(capsys, "mindspeed", file, override, "--output", tmp_path / "run.yaml")
    assert (status, out, len(error.splitlines())) == (2, "", 1), error
    assert re.search(message, error), error
    assert not (tmp_path / "run.yaml").exists()


def test_files_that_cannot_be_read(tmp_path, capsys):
    assert "no such run file" in run(capsys, "verl", tmp_path / "none.yaml")[2]
    assert "not valid YAML" in run(capsys, "verl", write(tmp_path, "a: [1"))[2]
    assert "holds a list" in run(capsys, "verl", write(tmp_path, "- 1"))[2]
    status, _, error = run(capsys, "slime", write(tmp_path, "a: 1"))
    assert status == 2 and "FRAMEWORK: none of the installed run files is called 'slime'" in error
    with pytest.raises(ConfigError, match="only supervised runs"):
        imported("rlinf", "runner.task_type=embodied")


def test_an_output_is_never_replaced(tmp_path, capsys):
    there = write(tmp_path, "mine: true\n")
    status, _, error = run(capsys, "rlinf", FILES / "rlinf_robo2vlm.yaml", "--output", there)
    assert status == 2 and "is there already" in error and there.read_text() == "mine: true\n"
    status, _, error = run(capsys, "rlinf", FILES / "rlinf_robo2vlm.yaml", "--output", tmp_path / "nowhere" / "run.yaml")
    assert status == 1 and "cannot be written" in error
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.yaml"]


def test_the_file_goes_to_the_output_and_the_report_to_the_errors(capsys):
    status, out, error = run(capsys, "rlinf", FILES / "rlinf_robo2vlm.yaml", "~data.eval_data_paths", "data.num_workers=2")
    assert status == 0 and yaml.safe_load(out)["sft"]["steps"] == 6000
    assert error.splitlines()[0].startswith("RLinf, ") and ", 0 unsupported" in error
    assert main(["import-config", "rlinf", str(FILES / "rlinf_robo2vlm.yaml"), "--skip-unknown", "~data.num_workers"]) == 0


def test_what_our_file_must_have_is_named_with_the_key_that_gives_it():
    found = imported("mindspeed", "~megatron_training.tokenizer_name_or_path", "megatron_training.data_path=???")
    assert found.to_set == {
        "model.path": "megatron_training.tokenizer_name_or_path", "data.train": "megatron_training.data_path",
    }  # fmt: skip
    assert "model.path: megatron_training.tokenizer_name_or_path is not set" in report(found)


def test_interpolations():
    environment = {"ROOT": "/data"}
    override = "runtime_args.data_path=${oc.env:ROOT}/${.exp_name}.json"
    assert settings("chatlearn", override, environment=environment)["data.train"]["path"] == "/data/grpo_fsdp.json"
    size = "models.policy.num_inference_per_prompt"
    assert settings("chatlearn", f"{size}=${{oc.env:N,8}}")["algorithm.group_size"] == 8
    assert settings("chatlearn", f"{size}=${{oc.select:nothing.there,16}}")["algorithm.group_size"] == 16
    assert settings("chatlearn", f"{size}=${{runtime_args.num_inference_per_prompt}}")["algorithm.group_size"] == 32
    default = ["~runtime_args.num_inference_per_prompt", f"{size}=${{runtime_args.num_inference_per_prompt}}"]
    assert settings("chatlearn", *default)["algorithm.group_size"] == 32, "the framework's own default"
    unread = imported("chatlearn", "runtime_args.exp_name=${now:%Y}")
    assert isinstance(outcome(unread, "runtime_args.exp_name"), Unneeded), "only what is asked for must be known"
    wrong = {"${oc.env:NONE}": "has no NONE", "${nothing}": "there is no nothing", f"${{{size}}}": "itself"}
    for reference, why in wrong.items():
        with pytest.raises(ConfigError, match=why):
            imported("chatlearn", f"{size}={reference}")


def test_numbers_are_what_omegaconf_reads():
    """YAML 1.1 reads 1e-6 as a text."""
    found = imported("chatlearn", "models.policy_trainer.optimizer.lr=3e-6", "models.policy_trainer.kl_coef='0.02'")
    lr = next(entry.theirs[key] for entry in found.entries for key in entry.theirs if key.endswith("optimizer.lr"))
    assert lr == 3e-6 and isinstance(lr, float)
    assert found.settings["algorithm.kl_coef"] == 0.02, "a quoted number, as of an environment variable, counts as well"


def test_overrides_as_hydra_has_them():
    assert settings("chatlearn", "++models.policy.temperature=0.9", "++models.policy.max_num_batched_tokens=4096")[
        "rollout.options.max_num_batched_tokens"
    ] == 4096
    assert settings("chatlearn", "models.policy.max_num_batched_tokens=2048")["rollout.options.max_num_batched_tokens"] == 2048
    assert "rollout.top_k" not in settings("chatlearn", "~models.policy.top_k")


@pytest.mark.parametrize("name", ["chatlearn", "mindspeed", "rlinf", "verl"])
def test_every_setting_that_a_table_names_is_one_of_ours(name):
    """A converted value has a setting that exists; required ones and defaults have keys that the table knows."""
    table = table_of(name)
    assert all(map(table, table.defaults)), [key for key in table.defaults if not table(key)]
    assert all(map(table, table.required.values()))
    assert not {key for one in table.together for key in one.keys} & table.keys.keys()
    assert all(one.note for one in table.always if isinstance(one, Mapped))
