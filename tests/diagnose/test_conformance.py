"""rlcore check: the cpu backend passes, a lossy one fails where it is wrong, and an installed third-party one passes."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from distributions import distribution
from run_files import settings

from rlcore import registry
from rlcore.cli.main import main
from rlcore.config.schema import RunConfig
from rlcore.diagnose.conformance import case, engine, numbers, operators, report
from rlcore.diagnose.conformance.measurement import Measurement
from rlcore.errors import PluginError
from rlcore.types import Group, Sample

ROOT = Path(__file__).parents[2]
VLLM = importlib.util.find_spec("vllm") is not None


def rlcore(folder, *arguments, path=()):
    """Run the command in its own process with additional import paths."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "rlcore", *arguments]
    return subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def check(folder, *arguments, path=()):
    """Exit status, output, and each measurement's verdict by name."""
    done = rlcore(folder, "check", *arguments, path=path)
    lines = re.findall(r"^  (pass|FAIL|skipped) +(.*?)(?:  +.*)?$", done.stdout, re.MULTILINE)
    return done, {what: verdict for verdict, what in lines}


def test_the_cpu_backend_passes(tmp_path):
    engine = [] if VLLM else ["rollout.engine=torch"]
    done, verdicts = check(tmp_path, "--backend", "cpu", "backend.options.threads=1", *engine)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(verdicts) > 40 and set(verdicts.values()) == {"pass"}
    page = (tmp_path / "rlcore-check-cpu.md").read_text()
    assert all(f"| {what} |" in page for what in verdicts)
    assert f"{len(verdicts)} passed, 0 failed, 0 skipped" in page
    assert re.search(r"^- torch \d.*, transformers \d", page, re.MULTILINE)


def test_the_goldens_are_what_transformers_gives_in_float64(tmp_path):
    """Recomputed without rlcore."""
    spec = importlib.util.spec_from_file_location("goldens", ROOT / "ci" / "goldens.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    for kind in case.SOURCES:
        found, kept = program.goldens(kind, case.make(kind, tmp_path / kind)), numbers.goldens(kind)
        assert found.keys() == kept.keys() and found.pop("mark") == kept["mark"]
        assert all(value == pytest.approx(kept[name], rel=1e-9) for name, value in found.items())


def test_a_lossy_backend_fails_where_it_is_wrong_and_nowhere_else(tmp_path):
    """bf16 attention shows in everything downstream of it; a missing reduction in sums and norms over ranks."""
    distribution(tmp_path, "lossy", "1.0", entry_points="[rlcore.backends]\nlossy = lossy_backend:LossyBackend\n")
    sections = [f"--only={name}" for name in ("operators", "numbers", "ranks")]
    command = ["--backend", "lossy", "backend.options.threads=1", *sections]
    done, verdicts = check(tmp_path, *command, path=[tmp_path, ROOT / "tests"])
    assert done.returncode == 1, done.stderr
    failed = {what for what, verdict in verdicts.items() if verdict == "FAIL"}
    assert failed >= {
        "attention over packed rows, fp32: output", "text, fp32: log-probabilities", "vision, fp32: log-probabilities",
        "text, fp32: gradient norm", "half a model on each, fp32: gradient norm", "all_reduce on cpu: wrong numbers",
    }  # fmt: skip
    follows = "attention|fused|text|vision|half a model|checkpoint|all_reduce"
    assert {what for what in failed if not re.match(follows, what)} == set()
    assert "did not finish" not in done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Where pip has installed the example."""
    folder = tmp_path_factory.mktemp("installed")
    shutil.copytree(ROOT / "examples" / "new_backend", folder / "source")  # setuptools writes into its source folder
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    result = subprocess.run([*command, str(folder), str(folder / "source")], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return folder


def test_a_backend_from_elsewhere_is_installed_and_passes(installed, tmp_path):
    """In the processes that a section starts, too; the sections engine and learning are a run, as below."""
    sections = [f"--only={name}" for name in ("operators", "ranks")]
    done, verdicts = check(tmp_path, "--backend", "new", "backend.options.threads=1", *sections, path=[installed])
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(verdicts) >= 18 and set(verdicts.values()) == {"pass"}


def test_a_run_is_given_to_it(installed, tmp_path, tiny_llama):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings(tiny_llama)))
    done = rlcore(tmp_path, "grpo", str(file), "--backend", "new", "--run-dir", "run", path=[installed])
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["backend"]["name"] == "new"


def test_two_plugins_of_one_name_are_named(tmp_path, monkeypatch):
    distribution(tmp_path, "another-cpu", "1.0", entry_points="[rlcore.backends]\ncpu = another:Backend\n")
    monkeypatch.syspath_prepend(tmp_path)
    ours = r"rlcore_backends\.cpu\.backend:CpuBackend"
    with pytest.raises(PluginError, match=rf"backends: 'cpu' is claimed by .*{ours}.*; uninstall one"):
        registry.load("backends", "cpu")


def test_a_plugin_that_does_not_import_is_named_with_its_error(tmp_path, monkeypatch, capsys):
    distribution(tmp_path, "half-a-backend", "1.0", entry_points="[rlcore.backends]\nhalf = half_backend:Half\n")
    (tmp_path / "half_backend.py").write_text("import a_driver_that_is_not_here\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["check", "--backend", "half", "--report", str(tmp_path / "report.md")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("rlcore: backends: the plugin 'half' (half_backend:Half) does not import: ModuleNotFoundError")


@pytest.mark.parametrize(("arguments", "said"), [
    (["--backend", "cqu"], "backend.name: none of the installed backends is called 'cqu'; did you mean 'cpu'?"),
    (["--backend", "cpu", "backend.options.thread=1"], "backend.options.thread: no such setting; did you mean 'threads'?"),
    (["--backend", "cpu", "--report", "nowhere/report.md"], "--report: nowhere is no folder"),
])  # fmt: skip
def test_a_wrong_argument_is_named(arguments, said, capsys):
    assert main(["check", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("program", "patience", "said"), [
    ("import os; print('gone', flush=True); os.abort()", 60, "exit status -6: gone"),
    ("import time; time.sleep(60)", 1, "no end within 1 s"),
])  # fmt: skip
def test_a_section_that_dies_or_hangs_is_a_failure_with_what_it_said(monkeypatch, program, patience, said):
    monkeypatch.setattr(report, "PROGRAM", ["-c", program])
    failed, section = report.run("operators", RunConfig.model_validate(settings("model")), patience)
    assert (failed.verdict, failed.note, section.failures) == ("FAIL", said, 1)


def test_samples_that_differ_are_counted():
    def drawn(*token_ids):
        return [Group(None, [Sample(ids, [], "", "stop", 0) for ids in token_ids])]

    assert engine.unlike(drawn([1, 2], [3]), drawn([1, 2], [3])) == 0
    assert engine.unlike(drawn([1, 2], [3]), drawn([2, 1], [3, 3])) == 2


def test_a_distance_is_relative_and_the_largest():
    assert operators.apart([torch.tensor([3.0]), torch.tensor([10.0])], [torch.tensor([2.0]), torch.tensor([10.0])]) == 0.5


def test_what_is_no_number_is_no_pass():
    assert Measurement("x", float("nan"), 1.0).verdict == Measurement("x", float("nan"), 1.0, at_least=True).verdict == "FAIL"
    assert [Measurement("x", 1.0, 1.0, at_least=least).verdict for least in (False, True)] == ["pass", "pass"]
    assert Measurement("x", None, note="why").verdict == "skipped"
