"""A CANN without kernels, for the torch_npu that is installed: fake_cann.py FOLDER compiles it there.

With LD_LIBRARY_PATH=FOLDER the real torch_npu then imports and runs on this machine. Memory, copies, streams and events work;
operators and collectives return success and compute nothing: their outputs are uninitialized memory. From the wheel only
names are read: undefined symbols, and those that it looks up at run time.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

_LIBRARY = "libascendcl.so"
_SYSTEM = ("libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2")
_LOOKED_UP = re.compile(r"(acl|Hccl|Hcom|rt|mspti|atb)[A-Za-z0-9_]{3,}")
_PROVIDED_BY_PYTHON = ("Py", "_Py", "_ITM", "__gmon")


def build(packages: Path, folder: Path) -> int:
    """Build the stub library for the wheels in `packages`; returns its number of functions."""
    folder.mkdir(parents=True, exist_ok=True)
    ours = [*packages.glob("torch_npu/lib/*.so"), *packages.glob("torch_npu/_C*.so")]
    written = Path(__file__).with_suffix(".c")
    _run("gcc", "-c", "-fPIC", "-w", "-o", folder / "written.o", written)
    there = {_run("gcc", f"-print-file-name={name}").strip() for name in _SYSTEM}
    provided = _symbols("--defined-only", *ours, *_torch(), *there, folder / "written.o")
    texts = [line for file in ours for line in _run("strings", "-n", "5", file).splitlines()]
    wanted = _symbols("--undefined-only", *ours) | {text for text in texts if _LOOKED_UP.fullmatch(text)}
    wanted |= {f"{name}GetWorkspaceSize" for name in wanted if name.startswith("aclnn")}
    missing = sorted(name for name in wanted - provided if not name.startswith(_PROVIDED_BY_PYTHON))
    (folder / "generated.c").write_text("void fake_cann_called(const char *);\n" + "".join(map(_nothing, missing)))
    _run("gcc", "-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{_LIBRARY}", "-o", folder / _LIBRARY,
         folder / "generated.c", folder / "written.o")  # fmt: skip
    asked = {text for text in texts if re.fullmatch(r"lib[a-z_]+\.so", text)} - {file.name for file in [*ours, *_torch()]}
    for name in asked - {_LIBRARY}:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(_LIBRARY)
    return len(missing)


def _torch() -> list[Path]:
    return sorted(Path(find_spec("torch").origin).parent.glob("lib/*.so*"))


def _symbols(which: str, *files: Path | str) -> set[str]:
    found = [_run("nm", "-g" if Path(file).suffix == ".o" else "-D", which, file) for file in files]
    return {line.split()[-1].partition("@")[0] for text in found for line in text.splitlines() if line.strip()}


def _nothing(name: str) -> str:
    if name.startswith(("_ZTI", "_ZTV", "_ZTS")):  # C++ typeinfo and vtables
        return f"char {name}[256];\n"
    return f'long {name}(void) {{ fake_cann_called("{name}"); return 0; }}\n'


def _run(*command: object) -> str:
    return subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    print(build(Path(sysconfig.get_path("purelib")), Path(sys.argv[1])), "functions of CANN that do nothing")
