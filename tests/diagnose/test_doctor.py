"""rlcore doctor on incomplete machines: child processes with altered environments, and generated file trees."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
from distributions import distribution

from rlcore import registry
from rlcore.checks import CheckResult, Devices, Trial, attempt, satisfies
from rlcore.cli.main import main
from rlcore.diagnose import doctor, host
from rlcore.errors import PluginError

ROOT = Path(__file__).parents[2]
PROGRAM = (
    "import sys\nfrom rlcore.cli.main import main\nstatus = main(['doctor', *sys.argv[1:]])\n"
    "assert 'torch' not in sys.modules, 'doctor imported torch'\nsys.exit(status)\n"
)
CUDA, NPU = registry.load("doctors", "cuda"), registry.load("doctors", "npu")
LAUNCHER = registry.load("launchers", "ray")


def run(*arguments, limit=None, **environment):
    """Run the command in its own process, which must not import torch; with `limit` open files."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("RAY_PORT", "MASTER_ADDR", "NNODES")}

    def lower():
        if limit:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], env={**inherited, **environment}, preexec_fn=lower,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def results(result):
    return {result["what"]: result for result in json.loads(result.stdout)["checks"]}


def tree(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def written(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory):
    """A machine with every fault that can be set up without root."""
    folder = tmp_path_factory.mktemp("spoiled")
    distribution(folder, "apex", "0.9.10.dev0", "Pyramid toolkit to add Velruse, Flash Messages,CSRF, ReCaptcha and Sessions")
    distribution(folder, "transformers", "4.1.0")
    distribution(folder, "tqdm", "1.0")
    distribution(folder, "broken-extension", "1.0", entry_points="[torch.backends]\nbroken = broken_extension:load\n")
    reason = "libhccl.so: cannot open shared object file: No such file or directory"
    (folder / "broken_extension.py").write_text(f"raise ImportError({reason!r})\n")
    compiler = written(folder / "no-headers", "#!/bin/sh\necho \"fatal error: cstdint: No such file\" >&2\nexit 1\n")
    compiler.chmod(0o755)
    with socket.create_server(("", 0)) as taken:
        environment = {
            "PYTHONPATH": str(folder), "RAY_PORT": str(taken.getsockname()[1]), "CXX": str(compiler), "NNODES": "2",
            "LD_PRELOAD": "", "GLOO_SOCKET_IFNAME": "nosuch0", "TORCH_DEVICE_BACKEND_AUTOLOAD": "1",
        }  # fmt: skip
        return run("--backend", "cpu", "--json", limit=256, **environment), taken.getsockname()[1]


@pytest.fixture(scope="module")
def healthy():
    return run("--backend", "cpu", "--json", TORCH_DEVICE_BACKEND_AUTOLOAD="1")


def test_a_machine_that_runs_these_tests_passes(healthy):
    assert healthy.returncode == 0, healthy.stdout + healthy.stderr
    said = json.loads(healthy.stdout)
    assert said["ok"] is True and said["backend"] == "cpu" and said["devices"] == 1
    assert results(healthy)["import torch"]["verdict"] == results(healthy)["import torchvision"]["verdict"] == "ok"


def test_nothing_is_looked_at_twice_and_torch_is_last(healthy):
    names = [result["what"] for result in json.loads(healthy.stdout)["checks"]]
    assert len(set(names)) == len(names)
    assert names[-2:] == ["import torch", "import torchvision"]


def test_what_fails_is_an_exit_status(spoiled):
    result, _ = spoiled
    assert result.returncode == 1, result.stderr
    assert json.loads(result.stdout)["ok"] is False and result.stderr == ""


@pytest.mark.parametrize(
    ("what", "verdict", "seen", "remedy"),
    [
        ("apex", "failure", "0.9.10.dev0 .* Pyramid", "pip uninstall apex"),
        ("transformers", "failure", "4.1.0, not ==5.19.0", "pip install --no-deps 'transformers==5.19.0'"),
        ("rlcore", "failure", r"asks for transformers.* \(4.1.0\)$", "requirements file"),
        ("other packages", "warning", r"1 of \d+ differ: tqdm 1.0", "pip install --no-deps -r .*cpu.txt"),
        ("open files", "failure", "256 at most .* at least 1024", "ulimit -n"),
        ("RAY_PORT", "failure", r"port {port} of this node is not free \(Address already in use", "RAY_PORT=<another>"),
        ("C++ compiler", "warning", "no-headers does not compile #include <cstdint>: fatal error: cstdint", r"g\+\+"),
        ("MASTER_ADDR", "failure", "not set, and NNODES is 2", "the head's address"),
        ("GLOO_SOCKET_IFNAME", "failure", "no interface here is called nosuch0", "name one of .*lo"),
        ("import torch", "failure", r"extension: broken\..*\(from ImportError: libhccl.so: cannot open", "set_env.sh.*=0"),
    ],
)
def test_each_thing_that_is_wrong_is_seen_with_its_remedy(spoiled, what, verdict, seen, remedy):
    result, port = spoiled
    found = results(result)[what]
    assert found["verdict"] == verdict
    assert re.search(seen.replace("{port}", str(port)), found["seen"]), found
    assert re.search(remedy, found["remedy"]), found


def test_a_torch_that_does_not_import_is_tried_once_and_alone(spoiled):
    names = list(results(spoiled[0]))
    assert names[-1] == "import torch"


def test_every_remedy_stands_under_its_line():
    said = doctor.line(CheckResult("thing", "failure", "gone", "bring it back"))
    assert said.splitlines() == [f"failure  {'thing':16} gone", "         -> bring it back"]
    assert doctor.line(CheckResult("thing", "absent", "not there", "get one")) == f"absent   {'thing':16} not there"


def test_a_warning_is_no_failure():
    found = [
        CheckResult("a", "ok", "here"),
        CheckResult("b", "warning", "old", "renew it"),
        CheckResult("c", "absent", "not there"),
    ]
    assert not doctor.failed(found)
    assert doctor.failed([*found, CheckResult("d", "failure", "gone", "bring it back")])


def test_the_cores_are_those_that_this_process_may_use():
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(mine)})
    try:
        assert registry.load("doctors", "cpu")().devices().seen.startswith(f"1 of {os.cpu_count()} cores are this process's")
    finally:
        os.sched_setaffinity(0, mine)


def test_a_failure_without_a_remedy_is_no_finding():
    with pytest.raises(AssertionError, match="needs a remedy"):
        CheckResult("thing", "failure", "gone")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--backend", "cdua"), "none of the installed doctors is called 'cdua'.*cuda"),
        (("a.b=1",), "unrecognized arguments: a.b=1"),
        (("--jsn",), "unrecognized arguments: --jsn"),
    ],
)
def test_a_wrong_argument_is_status_2(arguments, message, capsys):
    try:
        status = main(["doctor", *arguments])
    except SystemExit as left:
        status = left.code
    assert status == 2
    assert re.search(message, capsys.readouterr().err)


def test_auto_takes_the_highest_of_those_whose_devices_are_seen(monkeypatch):
    monkeypatch.setattr(NPU, "devices", lambda self: Devices(8, "8 NPUs"))
    monkeypatch.setattr(CUDA, "devices", lambda self: Devices(2, "2 GPUs"))
    assert doctor.choose() == doctor.Choice("npu", Devices(8, "8 NPUs"), "auto: 8 NPUs")
    monkeypatch.setattr(NPU, "devices", lambda self: Devices(0, "no NPU"))
    assert (doctor.choose().name, doctor.choose().why) == ("cuda", "auto: 2 GPUs; npu: no NPU")
    monkeypatch.setattr(CUDA, "devices", lambda self: Devices(0, "no GPU"))
    assert doctor.choose().name == "cpu" and "; cuda: no GPU; npu: no NPU" in doctor.choose().why
    assert doctor.choose("cuda").devices == Devices(0, "no GPU")
    monkeypatch.setattr(registry, "names", lambda group: ["cuda", "npu"])
    with pytest.raises(PluginError, match="no devices are here of cuda, npu"):
        doctor.choose()


@pytest.mark.parametrize(
    ("shown", "count"), [(None, 2), ("0", 1), ("0,1", 2), ("", 0), ("-1", 0), ("1,-1,0", 1), ("GPU-a1,GPU-c3", 2), ("0,1,2", 2)]
)
def test_gpus_are_counted_as_cuda_will_show_them(tmp_path, shown, count):
    tree(tmp_path, *(f"dev/{name}" for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm")))
    environment = {} if shown is None else {"CUDA_VISIBLE_DEVICES": shown}
    assert CUDA(tmp_path, environment).devices().count == count


@pytest.mark.parametrize(("module", "version", "verdict"), [
    ("NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23 10:11:16 UTC 2025", "580.95.05", "ok"),
    ("NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build", "570.124.06, not >=580", "failure"),
])  # fmt: skip
def test_the_driver_is_compared_with_what_cuda_needs(tmp_path, module, version, verdict):
    written(tmp_path / "proc/driver/nvidia/version", f"NVRM version: {module}\nGCC version:  gcc version 12.2.0\n")
    found = {result.what: result for result in CUDA(tmp_path, {}).check_results()}["NVIDIA driver"]
    assert (found.verdict, found.seen) == (verdict, version)


def test_npus_need_the_nodes_beside_them(tmp_path):
    tree(tmp_path, "dev/davinci0", "dev/davinci1", "dev/davinci_manager", "dev/devmm_svm")
    found = next(NPU(tmp_path, {}).check_results())
    assert (found.verdict, found.seen) == ("failure", "2 NPUs as /dev/davinci*; /dev/hisi_hdc not there")
    tree(tmp_path, "dev/hisi_hdc")
    assert next(NPU(tmp_path, {}).check_results()) == CheckResult("NPUs", "ok", "2 NPUs as /dev/davinci*")
    hidden = next(NPU(tmp_path, {"ASCEND_RT_VISIBLE_DEVICES": ""}).check_results())
    assert hidden.verdict == "failure" and "unset ASCEND_RT_VISIBLE_DEVICES" in hidden.remedy


@pytest.fixture
def ascend(tmp_path):
    """A machine as the CANN, NNAL and driver installers leave it, without the binaries."""
    written(tmp_path / "usr/local/Ascend/driver/version.info", "Version=25.5.0\nascendhal_version=7.35.23\n")
    written(tmp_path / "usr/local/Ascend/cann/set_env.sh", "")
    info = "package_name=Ascend-cann-toolkit\nversion=9.1.0\ninnerversion=V100R001C25\narch=aarch64\n"
    written(tmp_path / "usr/local/Ascend/cann/aarch64-linux/ascend_toolkit_install.info", info)
    written(tmp_path / "usr/local/Ascend/nnal/atb/9.1.0/atb/cxx_abi_1/lib/libatb.so", "")
    (tmp_path / "usr/local/Ascend/nnal/atb/latest").symlink_to("9.1.0")
    base = tmp_path / "usr/local/Ascend"
    return tmp_path, {"ASCEND_HOME_PATH": str(base / "cann"), "ATB_HOME_PATH": str(base / "nnal/atb/latest/atb/cxx_abi_1")}


def ascend_results(root, environment):
    return {result.what: result for result in NPU(root, environment).check_results()}


def test_the_toolkits_of_ascend_are_read_where_they_are(ascend):
    found = ascend_results(*ascend)
    assert [(found[what].verdict, found[what].seen) for what in ("CANN", "NNAL")] == [("ok", "9.1.0")] * 2
    assert found["Ascend driver"].seen.startswith("25.5.0;")


def test_a_toolkit_whose_script_was_not_sourced_names_the_script(ascend):
    root, _ = ascend
    found = ascend_results(root, {})
    assert found["CANN"].seen == "ASCEND_HOME_PATH is not set"
    assert f"source {root}/usr/local/Ascend/cann/set_env.sh" in found["CANN"].remedy
    assert found["NNAL"].seen == "ATB_HOME_PATH is not set" and "nnal/atb/set_env.sh" in found["NNAL"].remedy


def test_a_toolkit_of_another_version_or_nowhere_is_said(ascend):
    root, environment = ascend
    written(root / "usr/local/Ascend/cann/aarch64-linux/ascend_toolkit_install.info", "version=8.5.0\n")
    assert ascend_results(root, environment)["CANN"].seen == "8.5.0, not ==9.1.0"
    gone = ascend_results(root, {**environment, "ASCEND_HOME_PATH": "/nowhere/cann"})["CANN"]
    assert gone.seen == "ASCEND_HOME_PATH is /nowhere/cann, which is not there"


def test_doctor_for_npu_runs_where_torch_does_not(ascend):
    """The whole command with another CANN version and a loadable libhccl.so; torch-npu is not installed here."""
    root, environment = ascend
    written(root / "usr/local/Ascend/cann/aarch64-linux/ascend_toolkit_install.info", "version=8.5.0\n")
    if shutil.which("gcc") is None:
        pytest.skip("needs a C compiler")
    library = written(root / "hccl.c", "int HcclCommDestroy(void *comm) { return 0; }\n")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", root / "libhccl.so", library], check=True)
    written(root / "site/torch/__init__.py", "raise ImportError('libtorch_global_deps.so: cannot open shared object file')\n")
    distribution(root / "site", "vllm", "0.23.0")
    distribution(root / "site", "triton", "3.6.0")
    result = run("--backend", "npu", "--json", **environment, LD_LIBRARY_PATH=str(root), PYTHONPATH=str(root / "site"))
    assert result.returncode == 1, result.stderr
    found = results(result)
    assert found["CANN"]["seen"] == "8.5.0, not ==9.1.0"
    assert found["libhccl.so"]["verdict"] == "ok"
    assert found["torch-npu"]["remedy"].startswith("pip install --no-deps 'torch-npu==")
    assert found["vllm"]["verdict"] == "ok" and found["vllm's build"]["verdict"] == "warning"
    assert found["triton"]["seen"] == "3.6.0 stands where triton-ascend must: both are imported as triton"
    assert found["import torch"]["seen"].startswith("ImportError: libtorch_global_deps.so")


def test_a_library_that_the_loader_does_not_find_says_how_to_find_it(ascend):
    found = ascend_results(*ascend)["libhccl.so"]
    if found.verdict == "ok":
        pytest.skip("CANN is on this machine's loader path")
    assert "libhccl.so: cannot open shared object file" in found.seen and "cann/set_env.sh" in found.remedy


def test_a_trial_that_hangs_or_dies_is_a_failure():
    assert attempt(Trial("x", "import time; time.sleep(60)", "r", 0.5)).seen == "no answer within 0.5 s"
    assert attempt(Trial("x", "import os; os.kill(os.getpid(), 11)", "r")).seen == "killed by signal 11"
    assert attempt(Trial("x", "raise SystemExit(3)", "r")).seen == "exit status 3"


def test_apex_is_known_by_what_it_holds(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    assert host.apex().verdict == "absent"
    tree(tmp_path, "apex/__init__.py")
    assert host.apex().verdict == "failure"
    tree(tmp_path, "apex/optimizers/__init__.py")
    assert host.apex().verdict == "ok"


def test_shared_memory_is_measured(tmp_path):
    assert host.shared_memory(tmp_path / "shm").verdict == "failure"
    assert re.match(r"[\d.]+ of [\d.]+ GiB are free in ", host.shared_memory(tmp_path).seen)


def test_jemalloc_that_is_preloaded_from_nowhere_is_said():
    assert host.jemalloc({"LD_PRELOAD": "/nowhere/libjemalloc.so.2"}).verdict == "warning"


def launcher_results(**environment):
    return {result.what: result for result in LAUNCHER.check_results(environment)}


def test_the_way_to_the_head_names_the_interface():
    assert launcher_results(MASTER_ADDR="127.0.0.1")["MASTER_ADDR"].seen == "127.0.0.1 is reached by lo as 127.0.0.1"
    loopback = launcher_results(MASTER_ADDR="localhost", NNODES="2")["MASTER_ADDR"]
    assert loopback.verdict == "failure" and "no address that other nodes reach" in loopback.seen
    assert launcher_results(MASTER_ADDR="no.such.host.invalid")["MASTER_ADDR"].verdict == "failure"


def test_ports_that_are_none_and_clusters_that_exist():
    assert launcher_results(RAY_PORT="many")["RAY_PORT"].seen == "'many' is no port"
    assert launcher_results(RAY_PORT="70000")["RAY_PORT"].verdict == "failure"
    assert "RAY_PORT" not in launcher_results(RAY_ADDRESS="10.0.0.1:6766")


@pytest.mark.parametrize(("value", "verdict"), [("lo", "ok"), ("=lo", "ok"), ("^docker", "ok"), ("lo,nosuch", "failure")])
def test_interfaces_are_named_as_collectives_read_them(value, verdict):
    assert launcher_results(HCCL_SOCKET_IFNAME=value)["HCCL_SOCKET_IFNAME"].verdict == verdict


@pytest.mark.parametrize(
    ("version", "wanted", "met"),
    [("2.10.0+cpu", "==2.10.0", True), ("2.13.0", "==2.13.0+cpu", False), ("580.95.05", ">=580", True), ("x", ">=1", False)],
)
def test_versions_are_compared_as_pip_does(version, wanted, met):
    assert satisfies(version, wanted) is met


@pytest.mark.parametrize("name", registry.names("doctors"))
def test_what_decides_is_pinned(name):
    kind = registry.load("doctors", name)
    assert set(kind.decisive) <= set(host.read_pins(kind.pins))
    assert kind.pins.is_file() and Path(str(kind.pins)).samefile(ROOT / "requirements" / f"{name}.txt")


def test_the_table_of_the_docs_is_the_one_that_doctor_checks():
    page = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
    assert doctor.table() in page, "docs/backends.md: replace its table by the output of: rlcore doctor --versions"


def test_the_files_of_pins_are_those_of_the_tree():
    assert {file.name for file in files("rlcore_requirements").iterdir() if file.name.endswith(".txt")} == {
        file.name for file in (ROOT / "requirements").glob("*.txt")
    }
