"""The ladders of settings to try: each rung only where it applies, in its order, and always a valid run file."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest
import torch
import yaml
from rlcore_backends.vllm.relief import Relief
from run_files import settings

from rlcore import registry
from rlcore.config import loader
from rlcore.config.schema import RunConfig
from rlcore.diagnose import failure
from rlcore.diagnose.remedies import Case, changed, remedies
from rlcore.errors import ConfigError, OutOfMemory, RunError, Shortage, WorkerDied

GIB = 2**30
KINDS = {name: registry.load("backends", name) for name in ("cpu", "cuda", "npu")}
EVERYTHING = {"parameters": 4 * GIB, "optimizer": 8 * GIB, "reference": 2 * GIB, "engine": 9 * GIB}
RAY = {"kind": "ray", "devices": 8}
APART = {
    "kind": "ray",
    "pools": {
        "train": {"roles": ["actor"], "devices": 4}, "sample": {"roles": ["rollout"], "devices": 2},
        "fixed": {"roles": ["reference"], "devices": 2},
    },
}  # fmt: skip
COPIES = {"replicas": 2, "meta_init": False}
RUNS = {
    "local": {},
    "eight devices": {"placement": RAY},
    "six devices": {"placement": {"kind": "ray", "devices": 6}},
    "copies": {"placement": RAY, "sharding": COPIES},
    "a copy a device": {"placement": RAY, "sharding": {"replicas": "all"}},
    "gathered once": {"placement": RAY, "sharding": {"reshard_after_forward": False}},
    "shared rows": {"placement": RAY, "sharding": {"sequence_parallel": 2, "cpu_offload": True}},
    "pools": {"placement": APART, "algorithm": {"group_size": 4, "kl_coef": 0.1}},
    "lora": {"model": {"path": "m", "lora": {"rank": 4}}, "placement": {**RAY, "offload": ["engine", "optimizer"]}},
    "frozen vision": {"model": {"path": "m", "freeze": ["vision"]}},
    "critic": {"algorithm": {"name": "ppo"}, "critic": {}},
    "supervised": {"sft": {"steps": 2}, "placement": RAY},
    "preferences": {"dpo": {"steps": 2}},
    "evaluated": {
        "data": {"train": {"name": "arithmetic"}, "eval": {"name": "arithmetic"}, "max_prompt_tokens": 64},
        "evaluation": {"max_new_tokens": 100},
    },
    "workers": {"placement": {**RAY, "reward_workers": 3, "offload": ["optimizer", "reference"]}},
}  # fmt: skip
STAGES = (
    "load", "start_engine", "generate", "embed", "sync", "send", "receive", "reference_logprobs", "logprobs", "values",
    "update", "update_critic", "save", "restore", "join", "",
)  # fmt: skip


def made(name, **options):
    backend = KINDS[name](KINDS[name].Options(**options))
    if name == "npu":  # whose device torch does not know without torch_npu
        backend.device = lambda local_rank: torch.device("privateuseone", local_rank)
    return backend


def configured(engine="vllm", **sections):
    """A run whose samples have 64 tokens of prompt and 448 of response, in micro-batches of 4096 tokens at most."""
    values = settings("m", rollout={"engine": engine, "max_new_tokens": 448}, backend={})
    values["train"]["max_tokens_per_microbatch"] = 4096
    return RunConfig.model_validate({**values, **sections})


def case(stage, config, backend="cuda", heads=8, **known):
    shortage = Shortage(stage, "host" if backend == "cpu" else "device", held=EVERYTHING, neighbours=8, **known)
    if stage in ("start_engine", "generate", "sync", "receive") and config.rollout.engine == "vllm":
        device = made(backend, **config.backend.options)
        arguments = {"max_model_len": 512, "enforce_eager": True, **device.engine_options("vllm"), **config.rollout.options}
        shortage = replace(shortage, relief=tuple(Relief(arguments, config.rollout.options, device, 512).savings()))
    return Case(shortage, config, made(backend), heads)


def keys(given):
    return [override.partition("=")[0] for remedy in given for override in remedy.overrides]


def only_backends(config, backend):
    """The configuration with options of that backend alone."""
    return config.model_copy(update={"backend": config.backend.model_copy(update={"name": backend, "options": {}})})


def after(before, remedy):
    """The same stage running out again, under the remedy."""
    config = changed(before.config, remedy)
    held = {name: size for name, size in before.shortage.held.items() if name not in config.placement.offload}
    tokens = min(before.shortage.tokens, config.train.max_tokens_per_microbatch)
    again = case(before.stage, config, before.backend.name, before.heads, tokens=tokens, longest=before.shortage.longest)
    memory = before.shortage.memory
    return replace(again, shortage=replace(again.shortage, held=held, memory=memory, fits=before.shortage.fits))


def climbed(start):
    """The first remedy of each rung climbed, to the last."""
    found = []
    while first := next(remedies(start), None):
        assert first.overrides not in [one.overrides for one in found], "advice that changed nothing"
        found.append(first)
        if first.hardware:
            break
        start = after(start, first)
        assert len(found) < 60
    return found


# the order of the rungs


def test_an_update_climbs_from_what_costs_time_to_what_costs_devices():
    found = climbed(case("update", configured(placement=RAY, algorithm={"group_size": 4, "kl_coef": 0.1}), tokens=3000))
    assert [override for remedy in found for override in remedy.overrides] == [
        "train.gradient_checkpointing=true", "train.max_tokens_per_microbatch=1500", "train.max_tokens_per_microbatch=750",
        "train.max_tokens_per_microbatch=512", "sharding.sequence_parallel=2", "sharding.sequence_parallel=4",
        "sharding.sequence_parallel=8", "sharding.gradient_sync=each", "placement.offload=[reference, engine]",
        "sharding.cpu_offload=true", "model.lora={rank: 16}", "placement.devices=16",
    ]  # fmt: skip
    assert [remedy.now for remedy in found[:3]] == ["false", "4096", "1500"]
    assert "512 is the least that holds a sample (data.max_prompt_tokens 64 + rollout.max_new_tokens 448)" in found[1].why
    assert "the longest row had 3000 tokens" in found[1].why


def test_copies_of_the_model_are_sharded_before_more_devices_are_asked_for():
    for sharding, first in (({"replicas": "all"}, "1"), ({"replicas": 4}, "2"), ({"replicas": 3}, "1")):
        devices = 6 if sharding["replicas"] == 3 else 8
        start = case("load", configured(placement={"kind": "ray", "devices": devices}, sharding=sharding), heads=7)
        offered = [remedy.overrides[0] for remedy in climbed(start)]
        assert offered[1] == f"sharding.replicas={first}" and offered[-1] == f"placement.devices={2 * devices}", offered
    *_, last = remedies(case("load", configured(placement=RAY, sharding={"replicas": "all"})))
    assert last.why.startswith("they share the prompts, not "), "each has the whole model"
    kept = configured(placement=RAY, sharding={"reshard_after_forward": False, "sequence_parallel": 8, "gradient_sync": "each"})
    kept = kept.model_copy(update={"train": kept.train.model_copy(update={"gradient_checkpointing": True})})
    assert next(remedies(case("update", kept, tokens=512))).overrides == ("sharding.reshard_after_forward=true",)


def test_one_device_has_no_rung_of_several():
    found = climbed(case("update", configured(), tokens=600))
    assert keys(found) == [
        "train.gradient_checkpointing", "train.max_tokens_per_microbatch", "placement.offload", "model.lora", "placement.kind",
        "placement.devices",
    ]  # fmt: skip
    assert found[-1].hardware and found[-1].overrides == ("placement.kind=ray", "placement.devices=2")


@pytest.mark.parametrize("backend, first", [("cuda", "engine_memory"), ("npu", "engine_memory"), ("cpu", "kv_cache_gib")])
def test_an_allocation_that_fails_while_sampling_lowers_the_engines_memory_first(backend, first):
    found = climbed(case("generate", only_backends(configured(placement=RAY), backend), backend))
    assert found[0].overrides[0] == f"backend.options.{first}={'0.5' if backend == 'cpu' else '0.4'}"
    offered = keys(found)
    assert {*offered[: offered.index("rollout.options.max_num_seqs")]} == {f"backend.options.{first}"}
    assert ("rollout.options.enforce_eager" in offered) == (backend == "cuda"), "on the others it is so already"
    assert ("placement.offload" in offered) == (backend != "cpu")
    assert offered[-4:] == ["rollout.tensor_parallel"] * 3 + ["placement.devices"]


def test_a_shortage_of_the_host_takes_back_what_was_moved_there():
    config = configured(placement={**RAY, "offload": ["reference", "optimizer"], "reward_workers": 3}, sharding=COPIES)
    starved = Case(Shortage("load", "host"), config, made("cuda"))
    assert [remedy.overrides[0] for remedy in climbed(starved)] == [
        "sharding.meta_init=true", "placement.offload=[reference]", "placement.offload=[]", "placement.reward_workers=1",
        "placement.reward_workers=0",
    ]  # fmt: skip


# rungs that do not apply


@pytest.mark.parametrize(("stage", "sections", "known", "absent"), [
    ("logprobs", {}, {}, "train.gradient_checkpointing"),
    ("update_critic", {"algorithm": {"name": "ppo"}, "critic": {}}, {}, "train.gradient_checkpointing"),
    ("update", {"train": {"gradient_checkpointing": True, "max_tokens_per_microbatch": 512}}, {},
     "train.gradient_checkpointing"),
    ("update", {}, {"tokens": 512}, "train.max_tokens_per_microbatch"),
    ("update", {}, {"tokens": 900, "longest": 900}, "train.max_tokens_per_microbatch"),
    ("update", {}, {}, "sharding.sequence_parallel"),
    ("update", {"placement": RAY}, {"heads": 7}, "sharding.sequence_parallel"),
    ("update", {"placement": {"kind": "ray", "devices": 3}}, {}, "sharding.sequence_parallel"),
    ("update", {}, {}, "sharding.cpu_offload"),
    ("update", {}, {}, "sharding.gradient_sync"),
    ("update", {"placement": RAY, "sharding": {"replicas": "all"}}, {}, "sharding.gradient_sync"),
    ("update", {"placement": RAY}, {}, "sharding.reshard_after_forward"),
    ("load", {"placement": RAY, "sharding": {"replicas": "all", "meta_init": False}}, {}, "sharding.meta_init"),
    ("update", {"placement": RAY}, {"backend": "cpu"}, "placement.offload"),
    ("update", {"placement": RAY}, {"backend": "cpu"}, "sharding.cpu_offload"),
    ("update", {"model": {"path": "m", "lora": {}}}, {}, "model.lora"),
    ("load", {"placement": RAY}, {}, "sharding.meta_init"),
    ("load", {"sharding": {"meta_init": False}}, {}, "sharding.meta_init"),
    ("load", {"placement": RAY, "model": {"path": "m", "lora": {}}, "sharding": COPIES}, {}, "sharding.meta_init"),
    ("load", {"placement": RAY, "sharding": {"meta_init": False}}, {}, "sharding.cpu_offload"),
    ("load", {"placement": RAY}, {}, "model.lora"),
    ("load", {}, {}, "placement.offload"),
    ("embed", {"vision": {"images_per_batch": 1}}, {}, "vision.images_per_batch"),
    ("sync", {}, {}, "sharding.bucket_mib"),
    ("generate", {}, {}, "rollout.tensor_parallel"),
    ("generate", {}, {}, "sharding.sequence_parallel"),
])  # fmt: skip
def test_a_rung_that_does_not_apply_is_left_out(stage, sections, known, absent):
    assert absent not in keys(remedies(case(stage, configured(**sections), **known)))


def test_only_parts_that_the_stage_does_not_need_are_moved():
    moved = {
        "generate": "reference, optimizer, parameters", "update": "reference, engine", "sync": "reference, optimizer",
        "logprobs": "reference, optimizer, engine", "reference_logprobs": "optimizer, engine, parameters",
        "embed": "reference, optimizer, engine", "save": "reference, engine",
    }  # fmt: skip
    for stage, parts in moved.items():
        given = {remedy.overrides[0] for remedy in remedies(case(stage, configured()))}
        assert f"placement.offload=[{parts}]" in given, stage
    lora = case("reference_logprobs", configured(model={"path": "m", "lora": {}}))
    held = {name: size for name, size in EVERYTHING.items() if name != "reference"}
    given = remedies(replace(lora, shortage=replace(lora.shortage, held=held)))
    assert "placement.offload=[optimizer, engine]" in {one.overrides[0] for one in given}, "the reference is the actor itself"


def test_a_pool_of_its_own_is_what_grows():
    pools = configured(placement=APART)
    last = {stage: [*remedies(case(stage, pools))][-1].overrides[0] for stage in ("update", "generate", "reference_logprobs")}
    assert last == {
        "update": "placement.pools.train.devices=8", "generate": "placement.pools.sample.devices=4",
        "reference_logprobs": "placement.pools.fixed.devices=4",
    }  # fmt: skip


def test_devices_of_another_node_share_no_row():
    found = climbed(case("update", configured(placement=RAY)))
    near = case("update", configured(placement=RAY))
    near = replace(near, shortage=replace(near.shortage, neighbours=4))
    assert "sharding.sequence_parallel=8" in [remedy.overrides[0] for remedy in found]
    four = changed(near.config, next(one for one in remedies(near) if "sequence_parallel" in one.overrides[0]))
    four = four.model_copy(update={"sharding": four.sharding.model_copy(update={"sequence_parallel": 4})})
    assert "sharding.sequence_parallel" not in keys(remedies(replace(near, config=four)))


def test_more_devices_are_never_said_to_shrink_activations():
    for stage in ("update", "logprobs", "generate"):
        *_, last = remedies(case(stage, configured(placement=RAY)))
        shared, _, rest = last.why.partition(", not ")
        assert last.hardware and "activations" not in shared and ("activations" in rest or "engine's memory" in rest)


@pytest.mark.parametrize("fits, overrides", [
    (300, ("rollout.max_new_tokens=236",)),
    (100, ("rollout.max_new_tokens=36", "evaluation.max_new_tokens=36")),
    (60, None),
])  # fmt: skip
def test_responses_are_shortened_to_what_the_cache_can_hold(fits, overrides):
    given = [one.overrides for one in remedies(case("start_engine", configured(**RUNS["evaluated"]), fits=fits))]
    assert [one for one in given if "max_new_tokens" in one[0]] == ([overrides] if overrides else [])


def test_the_plain_sampler_gives_way_to_an_engine_with_a_cache_of_fixed_size():
    assert keys(remedies(case("generate", configured(engine="torch"), "cpu")))[0] == "rollout.engine"


# whatever the run


@pytest.mark.parametrize("backend", ["cpu", "cuda", "npu"])
@pytest.mark.parametrize("run", RUNS)
def test_all_advice_is_a_valid_run_file_and_comes_to_an_end(tmp_path, run, backend):
    config = only_backends(configured(**RUNS[run]), backend)
    (tmp_path / "run.yaml").write_text(loader.dump(config), encoding="utf-8")
    for stage in STAGES:
        found = climbed(case(stage, config, backend, tokens=4000, longest=700))
        loader.load(tmp_path / "run.yaml", [override for remedy in found for override in remedy.overrides])
        assert stage in ("join", "") or found[-1].hardware, stage
        assert all(remedy.why and remedy.now for remedy in found)
    climbed(Case(Shortage("load", "host"), config, made(backend)))


# which memory ran out


def allocate():
    torch.empty(2**50, dtype=torch.uint8)


def real(call):
    with pytest.raises(Exception) as raised:
        call()
    return raised.value


ERRORS = {
    "torch's own class": (lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "device"),
    "the host's allocator": (lambda: real(allocate), "host"),
    "Python": (lambda: real(lambda: bytearray(2**55)), "host"),
    "the system": (lambda: OSError(errno.ENOMEM, "Cannot allocate memory"), "host"),
    "another error": (lambda: RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
    "no file": (lambda: OSError(errno.ENOENT, "No such file"), None),
}


@pytest.mark.parametrize("backend", ["cpu", "cuda", "npu"])
@pytest.mark.parametrize("error", ERRORS)
def test_a_failed_allocation_is_told_from_other_errors(backend, error):
    make, memory = ERRORS[error]
    assert made(backend).shortage(make()) == memory


@pytest.mark.parametrize(("backend", "said"), [
    ("npu", "NPU out of memory. Tried to allocate 260.00 MiB (NPU 0; 28.50 GiB total capacity; 10.24 GiB already allocated)"),
    ("cuda", "CUDA error: out of memory"),
    ("cuda", "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ("cuda", "NCCL error in: ProcessGroupNCCL.cpp: Failed to CUDA calloc async 24 bytes: Cuda failure 2 'out of memory'"),
    ("cuda", "CUDA out of memory occurred when warming up sampler with 256 dummy requests."),
])  # fmt: skip
def test_a_device_names_its_own_shortages(backend, said):
    assert made(backend).shortage(RuntimeError(said)) == "device"
    assert made("cpu").shortage(RuntimeError(said)) is None
    assert made(backend).shortage(ConfigError(said)) is None


# what a user reads


@pytest.fixture
def ended(tmp_path, tmp_path_factory):
    """The error of a run that ended with this one."""
    model = tmp_path_factory.mktemp("model")
    (model / "config.json").write_text('{"model_type": "llama", "num_attention_heads": 8}', encoding="utf-8")
    (model / "model.safetensors").touch()

    def end(error, folder=tmp_path, **sections):
        config = RunConfig.model_validate(settings(model, backend={}, **sections))
        return failure.told(error, config, made("cuda"), folder)  # the ladder of devices with memory of their own

    return end


def checkpoint(folder, name="step_000011"):
    (folder / "checkpoints" / name).mkdir(parents=True)
    (folder / "checkpoints" / name / "state.json").write_text("{}", encoding="utf-8")
    (folder / "checkpoints" / "latest").write_text(name, encoding="utf-8")


def test_the_block_has_what_failed_where_the_numbers_and_the_way_on(ended, tmp_path):
    checkpoint(tmp_path)
    shortage = Shortage(
        "update", "device", "CUDA out of memory. Tried to allocate 2 GiB.", "worker 1 of 2 (pid 7 on n)", step=12,
        held={"parameters": 4 * GIB, "optimizer": 8 * GIB, "vision": 1000}, free=(GIB, 80 * GIB), tokens=200, trace="here",
    )  # fmt: skip
    told = ended(OutOfMemory(shortage))
    assert isinstance(told, RunError) and told.status == 1
    first, numbers, *rest, trace = str(told).splitlines()
    assert first == (
        "out of device memory in `update` of step 12, worker 1 of 2 (pid 7 on n): CUDA out of memory. Tried to allocate 2 GiB."
    )
    assert numbers == (
        "  held: parameters 4.00 GiB, optimizer 8.00 GiB; free: 1.00 GiB of 80.00 GiB; longest packed row: 200 tokens"
    )
    assert [line.split(":")[0] for line in rest] == ["  try", "  then", "  then", "  step_000011 is saved; go on"]
    assert rest[0].startswith("  try:  train.gradient_checkpointing=true (now false): ")
    assert rest[-1].endswith(f"--run-dir {tmp_path} --resume train.gradient_checkpointing=true")
    written = next(tmp_path.glob("failure-*.txt"))
    assert trace == f"  the traceback: {written}" and written.read_text(encoding="utf-8").endswith("\n\nhere")
    assert written.read_text(encoding="utf-8").startswith(first)


def test_weights_that_lora_cannot_resume_start_a_new_run(ended, tmp_path):
    checkpoint(tmp_path)
    train = {"gradient_checkpointing": True, "max_tokens_per_microbatch": 68}
    told = str(ended(OutOfMemory(Shortage("update", "device")), train=train)).splitlines()
    assert told[1].startswith("  try:  'model.lora={rank: 16}' (now null): ")
    model = tmp_path / "checkpoints" / "step_000011" / "model"
    again = "step_000011 is saved; start again from it in a new run folder: the same command with"
    assert f"{again} model.path={model} 'model.lora=" in told[-2]


def test_before_the_run_folder_the_traceback_is_a_temporary_file(ended, tmp_path, monkeypatch):
    monkeypatch.setattr(failure.tempfile, "tempdir", str(tmp_path))
    told = str(ended(OutOfMemory(Shortage("load", "device", trace="here")), folder=tmp_path / "run", placement=RAY))
    assert "\n  start again: the same command with sharding.cpu_offload=true\n" in told
    assert next(tmp_path.glob("rlcore-failure-*.txt")).read_text(encoding="utf-8").endswith("here")
    assert not (tmp_path / "run").exists()


def test_a_run_that_saved_nothing_says_so(ended):
    assert "  nothing is saved; start again in a new run folder: " in str(ended(OutOfMemory(Shortage("load", "device"))))


def test_a_killed_worker_is_told_with_the_hosts_ladder(ended):
    said = "worker 0 of 8 (pid 7 on n) died in `load`: killed for want of host memory: by Ray; --resume goes on"
    told = str(ended(WorkerDied(said, Shortage("load", "host")), placement=RAY, sharding={"meta_init": False})).splitlines()
    assert told[0] == said.removesuffix("; --resume goes on")
    assert told[1].startswith("  try:  sharding.meta_init=true (now false): each device reads only its shard")


def test_where_no_setting_helps_it_is_said(ended):
    told = str(ended(WorkerDied("worker 0 died; go on", Shortage("load", "host"))))
    assert "no setting of this run would help; what is left is more host memory a device: fewer devices a node" in told


def test_the_controllers_own_shortage_is_told_too(ended):
    assert str(ended(real(lambda: bytearray(2**55)))).startswith("out of host memory in the controller: MemoryError()")


@pytest.mark.parametrize("error", [RunError("weight sync: ..."), WorkerDied("worker 1 died"), RuntimeError("shapes")])
def test_other_failures_are_left_as_they_are(ended, error, tmp_path):
    assert ended(error) is None
    assert not list(tmp_path.glob("failure-*"))


def test_the_settings_of_the_tests_are_a_run_file():
    assert yaml.safe_load(loader.dump(configured()))["train"]["max_tokens_per_microbatch"] == 4096
