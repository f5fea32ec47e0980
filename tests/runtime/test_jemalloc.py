"""jemalloc: found, preloaded, queried and purged if installed; nothing breaks if it is not.

The library is the one that the launcher finds, or that JEMALLOC names.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from run_files import write

from rlcore.cli.main import main
from rlcore.errors import ConfigError
from rlcore.runtime import jemalloc, memory

ROOT = Path(__file__).parents[2]
LIBRARY = next(iter(jemalloc.inherited(os.environ).values()), None) or os.environ.get("JEMALLOC") or str(jemalloc.find() or "")
here = pytest.mark.skipif(not Path(LIBRARY).is_file(), reason=f"no jemalloc on this machine; {jemalloc.INSTALL}")
unused = pytest.mark.skipif(jemalloc.of_malloc() is not None, reason="the tests themselves run under jemalloc")
KEEPS = "background_thread:{},dirty_decay_ms:-1"  # freed pages stay unless they are purged
RESIDENT = (
    "import re\ndef resident():\n"
    "    return int(re.findall(r'VmRSS:\\s+(\\d+)', open('/proc/self/status').read())[0]) / 1024  # MiB\n"
)


def under(program: str, *, background: bool = False, **environment: str) -> str:
    """Output of a program in a process with jemalloc preloaded."""
    added = {"LD_PRELOAD": LIBRARY, "MALLOC_CONF": KEEPS.format(str(background).lower()), **environment}
    ended = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **added}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


# in a process


@here
@pytest.mark.parametrize("background", [False, True])
def test_what_was_freed_stays_until_it_is_purged(background):
    """In any arena: threads have arenas of their own."""
    said = under(RESIDENT + (
        "import threading\n"
        "from rlcore.runtime import jemalloc\n"
        "found, held = jemalloc.of_malloc(), []\n"
        "filled = threading.Barrier(5)\n"
        "def fill():\n"
        "    held.extend(b'x' * 50_000 for _ in range(1000))\n"
        "    filled.wait()\n"
        "    threading.Event().wait()\n"  # the arena of a thread that ends is purged at once
        "for _ in range(4): threading.Thread(target=fill, daemon=True).start()\n"
        "filled.wait()\n"
        "full, before = resident(), found.stats()\n"
        "del held\n"
        "freed, kept = resident(), found.stats()\n"
        "found.purge()\n"
        "given, after = resident(), found.stats()\n"
        "print(full - freed, freed - given, (before.allocated - kept.allocated) / 2**20,"
        " (kept.resident - after.resident) / 2**20, (after.retained - kept.retained) / 2**20, found.background_thread)\n"
    ), background=background)  # fmt: skip
    *numbers, thread = said.split()
    stays, goes, freed, resident, retained = map(float, numbers)
    assert stays < 10 and goes > 180, "MiB of the process, as the kernel counts them"
    assert freed > 180 and resident > 180 and retained > 180, "as jemalloc counts them"
    assert thread == str(background), "a purge leaves the thread as it was"


@here
def test_settings_are_what_was_set():
    said = under(
        "from rlcore.runtime import jemalloc\n"
        "found = jemalloc.of_malloc()\n"
        "print(found, found.decay)\n"
        "found.decay, found.background_thread = jemalloc.Decay(500, 250), True\n"
        "print(found, found.decay, repr(found.prefix))\n"
        "try: found._read('no.such', jemalloc.ctypes.c_bool)\n"
        "except OSError as error: print(error)\n"
    ).splitlines()
    assert re.fullmatch(r"jemalloc 5\.\d+\.\d+, background thread off, .* -1 ms Decay\(dirty=-1, muzzy=0\)", said[0])
    assert re.fullmatch(r"jemalloc 5\.\d+\.\d+, background thread on, .* 500 ms Decay\(dirty=500, muzzy=250\) ''", said[1])
    assert said[2] == "[Errno 2] No such file or directory: 'mallctl no.such'"


@here
def test_a_new_decay_reaches_the_arenas_that_are_there():
    said = under(RESIDENT + (
        "import time\nfrom rlcore.runtime import jemalloc\n"
        "found = jemalloc.of_malloc()\n"
        "held = [b'x' * 50_000 for _ in range(4000)]\n"
        "full = resident()\n"
        "found.decay = jemalloc.Decay(0, 0)\n"
        "del held\n"
        "print(full - resident())\n"
    ))  # fmt: skip
    assert float(said) > 180


@here
@unused
def test_a_prefixed_build_is_seen_and_not_taken_for_malloc(tmp_path):
    """Such a build exports je_mallctl but no mallctl; here it forwards to the real one."""
    source = tmp_path / "prefixed.c"
    source.write_text(
        "#include <dlfcn.h>\n#include <stddef.h>\n"
        "int je_mallctl(const char *name, void *old, size_t *oldlen, void *new, size_t newlen) {\n"
        f'  static void *own; if (!own) own = dlopen("{LIBRARY}", RTLD_NOW | RTLD_LOCAL);\n'
        "  return ((int (*)(const char *, void *, size_t *, void *, size_t))dlsym(own, \"mallctl\"))"
        "(name, old, oldlen, new, newlen);\n}\n"
    )
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "prefixed.so", source, "-ldl"], check=True)
    except FileNotFoundError:
        pytest.skip("no C compiler to make a prefixed build with")
    said = under(
        "from rlcore.runtime import jemalloc\n"
        "found, = jemalloc.loaded()\n"
        "print(found.prefix, found.version[0], found.serves_malloc, found.stats().resident > 0, jemalloc.of_malloc())\n"
        "found.purge()\n",
        LD_PRELOAD=str(tmp_path / "prefixed.so"), GLIBC_TUNABLES="glibc.rtld.optional_static_tls=16384",
    )  # fmt: skip
    assert said.split() == ["je_", "5", "False", "True", "None"]


@here
def test_parts_that_move_leave_no_memory_behind():
    said = under(RESIDENT + (
        "import torch\n"
        "from rlcore.monitor.clock import Clock\n"
        "from rlcore.runtime.memory import MemoryManager, OffloadedTensors, memory\n"
        "weights, between = [], []\n"
        "for _ in range(400):\n"
        "    weights.append(torch.ones(2**17))\n"
        "    between.append(torch.ones(64))\n"
        "clock = Clock()\n"
        "memory_manager = MemoryManager(clock, ['parameters'])\n"
        "memory_manager.register('parameters', OffloadedTensors(lambda: weights))\n"
        "full = resident()\n"
        "for phase in ('infer', 'train', 'infer', 'train'):\n"
        "    with memory_manager.phase(phase):\n"
        "        print(resident() - full)\n"
        "print(*memory())\n"
    ))  # fmt: skip
    *held, names = said.splitlines()
    assert all(abs(float(more)) < 40 for more in held), f"of 200 MiB, as a copy or as they were: {held}"
    documented = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    kinds = re.findall(r"`memory/host_\{(.*?)\}`", documented)[0].split(",")
    assert names.split() == ["memory/peak_rss_gib", *(f"memory/host_{kind}" for kind in kinds)]


@unused
def test_without_it_nothing_is_done_and_nothing_is_reported():
    jemalloc.purge()
    assert jemalloc.of_malloc() is None
    assert list(memory.memory()) == ["memory/peak_rss_gib"]


class Told:
    """Stand-in for mallctl with a background thread; records writes and calls."""

    def __init__(self):
        self.background_thread, self.calls = True, []

    def __call__(self, name, old, length, new, size):
        if old is not None:
            old._obj.value = self.background_thread
        elif new is not None:
            self.background_thread = new._obj.value
            self.calls.append((name.decode(), self.background_thread))
        else:
            self.calls.append(name.decode())
        return 0


def test_a_purge_is_not_crossed_by_the_background_thread_which_then_goes_on():
    told = Told()
    jemalloc.Jemalloc(told, "").purge()
    off, on = ("background_thread", False), ("background_thread", True)
    assert told.calls == ["thread.tcache.flush", off, "arena.4096.purge", on]
    told.background_thread, told.calls = False, []
    jemalloc.Jemalloc(told, "").purge()
    assert told.calls == ["thread.tcache.flush", "arena.4096.purge"]


# before a process starts


@pytest.mark.parametrize(
    ("file", "machine"),
    [
        ("usr/lib/x86_64-linux-gnu", "x86_64"), ("usr/lib/aarch64-linux-gnu", "aarch64"),
        ("usr/lib64", "x86_64"), ("usr/lib64", "aarch64"), ("usr/local/lib", "aarch64"),
    ],
)  # fmt: skip
def test_the_library_is_found_where_distributions_put_it(tmp_path, file, machine):
    assert jemalloc.find(tmp_path, machine) is None
    library = tmp_path / file / "libjemalloc.so.2"
    library.parent.mkdir(parents=True)
    library.touch()
    assert jemalloc.find(tmp_path, machine) == library


def test_a_library_that_was_built_here_comes_before_the_distributions(tmp_path):
    folders = ("usr/lib", "usr/lib64", "usr/lib/x86_64-linux-gnu", "usr/local/lib64", "usr/local/lib")
    for folder in folders:  # each takes precedence over the earlier ones
        library = tmp_path / folder / "libjemalloc.so.2"
        library.parent.mkdir(parents=True, exist_ok=True)
        library.touch()
        assert jemalloc.find(tmp_path, "x86_64") == library


def test_another_architectures_library_is_not_taken(tmp_path):
    library = tmp_path / "usr/lib/x86_64-linux-gnu/libjemalloc.so.2"
    library.parent.mkdir(parents=True)
    library.touch()
    assert jemalloc.find(tmp_path, "aarch64") is None


@here
@unused
def test_what_is_preloaded_already_stays_and_comes_first():
    added, said = jemalloc.preload(LIBRARY, {**os.environ, "LD_PRELOAD": "libm.so.6"})
    assert said == "" and added == {"LD_PRELOAD": f"libm.so.6:{LIBRARY}", "MALLOC_CONF": "background_thread:true"}
    assert jemalloc.preload(LIBRARY, {**os.environ, "MALLOC_CONF": "narenas:2"})[0]["MALLOC_CONF"] == "narenas:2"
    assert jemalloc.preload("auto", {"LD_PRELOAD": LIBRARY}) == ({}, ""), "it is there"
    assert jemalloc.preload("off", os.environ) == ({}, "")


def test_what_a_worker_is_started_with_holds_it(monkeypatch):
    placement = pytest.importorskip("rlcore_backends.ray.pools", reason="needs requirements/ray.txt")
    monkeypatch.setenv("LD_PRELOAD", "libm.so.6:/opt/libjemalloc.so.2")
    assert placement._inherited()["LD_PRELOAD"] == "/opt/libjemalloc.so.2"


def test_what_is_preloaded_already_is_kept_for_the_trial_and_for_the_processes(tmp_path, monkeypatch):
    library, tried = tmp_path / "libjemalloc.so.2", []
    monkeypatch.setattr(jemalloc, "_trial", lambda environment: tried.append(environment) or "")
    added, said = jemalloc.preload(str(library), {"LD_PRELOAD": "libm.so.6", "HOME": "/root"})
    assert added == {"LD_PRELOAD": f"libm.so.6:{library}", "MALLOC_CONF": "background_thread:true"} and said == ""
    assert tried == [{**added, "HOME": "/root"}]


@unused
def test_a_library_that_cannot_be_preloaded_is_named(tmp_path, monkeypatch):
    broken = tmp_path / "libjemalloc.so.2"
    with pytest.raises(ConfigError, match=f"JEMALLOC: {broken} cannot be preloaded: .*cannot open.*; apt install"):
        jemalloc.preload(str(broken), os.environ)
    broken.write_text("for another machine" * 1000)
    monkeypatch.setattr(jemalloc, "find", lambda: broken)
    added, said = jemalloc.preload("auto", os.environ)
    assert added == {} and re.match(rf"goes on without jemalloc: {broken} cannot be preloaded: .*invalid ELF header", said)


@unused
def test_a_machine_without_it_is_told_how_to_install_it(monkeypatch):
    monkeypatch.setattr(jemalloc, "find", lambda: None)
    added, said = jemalloc.preload("auto", {})
    assert added == {} and "apt install libjemalloc2" in said and "dnf install jemalloc" in said and "JEMALLOC=off" in said


def test_only_jemalloc_travels_to_workers():
    given = {"LD_PRELOAD": "/a/libtcmalloc.so.4:/b/libjemalloc.so.2 /c/libgomp.so.1", "MALLOC_CONF": "narenas:2", "HOME": "/"}
    assert jemalloc.inherited(given) == {"LD_PRELOAD": "/b/libjemalloc.so.2", "MALLOC_CONF": "narenas:2"}
    assert jemalloc.inherited({"LD_PRELOAD": "/c/libgomp.so.1", "MALLOC_CONF": "narenas:2"}) == {}


# complete runs


@pytest.fixture
def run_file(tmp_path, tiny_llama) -> Path:
    return write(tmp_path, tiny_llama, placement={"offload": ["optimizer", "engine", "parameters"]})


def rows(folder: Path) -> list[dict]:
    return [yaml.safe_load(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@unused
@pytest.mark.parametrize(("setting", "times"), [(None, 1), ("off", 0)])
def test_a_run_that_parks_without_it_works_and_says_so_once(run_file, tmp_path, capsys, monkeypatch, setting, times):
    monkeypatch.delenv("JEMALLOC", raising=False)
    if setting:
        monkeypatch.setenv("JEMALLOC", setting)
    assert main(["grpo", str(run_file), "--run-dir", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.count("malloc is not jemalloc's") == times
    assert not any(name.startswith("memory/host_") for row in rows(tmp_path / "run") for name in row)


@here
def test_a_run_under_it_trains_and_says_what_it_holds(run_file, tmp_path):
    command = ["grpo", str(run_file), "--run-dir", str(tmp_path / "run")]
    said = under(f"from rlcore.cli.main import main\nassert main({command}) == 0")
    assert "jemalloc" not in said
    assert yaml.safe_load((tmp_path / "run" / "environment.json").read_text())["malloc"].startswith("jemalloc 5")
    for row in rows(tmp_path / "run"):
        assert 0 < row["memory/host_allocated"] <= row["memory/host_active"] <= row["memory/host_resident"]


@here
@unused
def test_workers_of_a_cluster_without_it_inherit_it_from_the_controller(run_file, tmp_path, cluster, monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", LIBRARY)
    assert main(["grpo", str(run_file), "--run-dir", str(tmp_path / "run"), "placement.kind=ray", "train.steps=1"]) == 0
    assert rows(tmp_path / "run")[-1]["memory/host_resident"] > 0
