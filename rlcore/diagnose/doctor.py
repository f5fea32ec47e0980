"""`rlcore doctor`: check this machine before torch is imported, and choose the backend for its devices."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from rlcore import registry
from rlcore.checks import CheckResult, Devices, Doctor, Trial, attempt
from rlcore.diagnose import host
from rlcore.errors import PluginError

TORCH = Trial("import torch", "import torch; print(torch.__version__)", "python -c 'import torch' has the whole message")


@dataclass(frozen=True)
class Choice:
    """A backend, and why it was chosen."""

    name: str
    devices: Devices
    why: str


def choose(name: str = "auto") -> Choice:
    """Resolve `--backend auto` to the backend of highest precedence whose devices are seen. Imports no torch.

    Any other name stays itself. PluginError if no such backend is installed, or auto sees no devices.
    """
    if name != "auto":
        registry.check("doctors", name, "--backend")
        return Choice(name, _doctor(name).devices(), "as asked for")
    doctors = {known: _doctor(known) for known in registry.names("doctors")}
    seen = {known: doctor.devices() for known, doctor in doctors.items()}
    there = [known for known in doctors if seen[known].count]
    if not there:
        raise PluginError(f"--backend auto: no devices are here of {', '.join(doctors) or 'any backend: none is installed'}")
    chosen = max(there, key=lambda known: doctors[known].precedence)
    passed = [f"; {known}: {seen[known].seen}" for known in doctors if doctors[known].precedence > doctors[chosen].precedence]
    return Choice(chosen, seen[chosen], f"auto: {seen[chosen].seen}" + "".join(passed))


def examine(name: str, environment: Mapping[str, str] = os.environ) -> Iterator[CheckResult]:
    """Yield the results of all checks of a backend; torch comes last, in processes of its own."""
    doctor = _doctor(name)
    yield host.python(doctor.versions.get("Python", ""))
    yield from doctor.check_results()
    yield from host.packages(doctor.pins, doctor.decisive)
    yield host.own_requirements()
    yield host.apex()
    yield host.shared_memory()
    yield from host.limits()
    yield host.compiler(environment)
    yield host.jemalloc(environment)
    for launcher in registry.names("launchers"):
        yield from registry.load("launchers", launcher).check_results(environment)
    yield from _trials(doctor)


def _trials(doctor: Doctor) -> Iterator[CheckResult]:
    imported = attempt(TORCH)
    if imported.verdict == "ok":
        yield imported
        yield from map(attempt, doctor.trials)
    else:
        yield _explained(imported)


def _explained(failed: CheckResult) -> CheckResult:
    """Explain a failed import: torch imports its installed extensions, and fails if one of them does."""
    if "TORCH_DEVICE_BACKEND_AUTOLOAD" not in failed.seen:
        return failed
    remedy = (
        "an installed extension of torch does not load: make known what it misses (source its toolkit's set_env.sh) or "
        "uninstall it; export TORCH_DEVICE_BACKEND_AUTOLOAD=0 lets torch be imported without it"
    )
    return CheckResult(failed.what, "failure", failed.seen, remedy)


def failed(results: Sequence[CheckResult]) -> bool:
    return any(result.verdict == "failure" for result in results)


def as_json(choice: Choice, results: Sequence[CheckResult]) -> str:
    """One JSON object; `ok` is false where the exit status is 1."""
    whole = {
        "backend": choice.name, "why": choice.why, "devices": choice.devices.count, "ok": not failed(results),
        "checks": [asdict(result) for result in results],
    }  # fmt: skip
    return json.dumps(whole, indent=1)


def line(result: CheckResult) -> str:
    """One aligned line; the remedy of a warning or failure on a second."""
    first = f"{result.verdict:8} {result.what:16} {result.seen}"
    return f"{first}\n{'':9}-> {result.remedy}" if result.verdict in ("warning", "failure") else first


def closing(results: Sequence[CheckResult]) -> str:
    counts = Counter(result.verdict for result in results)
    return f"{len(results)} looked at: " + ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))


def table() -> str:
    """Markdown table of the versions that belong together: one column per backend, from its requirements file and plugin."""
    names = sorted(registry.names("doctors"), key=lambda name: _doctor(name).precedence)
    columns = {name: _column(_doctor(name)) for name in names}
    rows = sorted({row for column in columns.values() for row in column}, key=str.lower)
    body = [[row, *(columns[name].get(row, "") for name in names)] for row in rows]
    lines = [["", *names], ["---"] * (len(names) + 1), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _column(doctor: Doctor) -> dict[str, str]:
    pins = host.read_pins(doctor.pins)
    packages = {name: str(pins[name].specifier).removeprefix("==") for name in doctor.decisive}
    return packages | {what: wanted.removeprefix("==") for what, wanted in doctor.versions.items()}


def _doctor(name: str) -> Doctor:
    return registry.load("doctors", name)()
