"""Run the sections one after the other, each in a process of its own, and report them: one line per measurement, and a file
to paste into an issue. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO

from rlcore import registry
from rlcore.checks import error_in
from rlcore.config.schema import RunConfig
from rlcore.diagnose import host
from rlcore.diagnose.conformance.measurement import Measurement

SECTIONS = {
    "operators": "the device's kernels, against plain torch in float64",
    "numbers": "models against the goldens, checkpoints, random states",
    "ranks": "two devices: collectives, half a model on each",
    "engine": "the engine serves what the actor sends",
    "learning": "a small run",
}
PROGRAM = ["-m", "rlcore.diagnose.conformance.section"]
PATIENCE = 900.0  # seconds per section
_TAIL = 80  # lines kept of a failed section's output


@dataclass(frozen=True)
class Section:
    """Result of one section."""

    name: str
    measurements: Sequence[Measurement]
    seconds: float
    said: str = ""  # end of its output, if it did not finish

    @property
    def failures(self) -> int:
        return sum(measurement.verdict == "FAIL" for measurement in self.measurements)


def check(config: RunConfig, devices: str, names: Sequence[str], path: Path) -> bool:
    """Run the named sections, print every measurement as it is made, write the report; True if all are within their limits."""
    sections = []
    for name in names:
        print(f"{name}: {SECTIONS[name]}", flush=True)
        for found in run(name, config):
            if isinstance(found, Section):
                sections.append(found)
            else:
                print(line(found), flush=True)
    path.write_text(markdown(config, devices, sections), encoding="utf-8")
    print(f"{closing(sections)}; report: {path}")
    return not any(section.failures for section in sections)


def run(name: str, config: RunConfig, patience: float = PATIENCE) -> Iterator[Measurement | Section]:
    """Yield a section's measurements as they are made, then the section. A crash or hang is a failed measurement."""
    started, measurements = time.perf_counter(), []
    reading, writing = os.pipe()
    with (
        tempfile.TemporaryDirectory(prefix="rlcore-check-") as folder, tempfile.TemporaryFile() as output,
        os.fdopen(reading, encoding="utf-8") as lines,
    ):
        process = subprocess.Popen(
            [sys.executable, *PROGRAM, config.model_dump_json(), folder, "section.write", name, str(writing)],
            pass_fds=[writing], stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
        os.close(writing)
        alarm = threading.Timer(patience, _end, [process])
        alarm.start()
        try:
            for line in lines:
                measurements.append(Measurement(**json.loads(line)))
                yield measurements[-1]
            status = process.wait()
        finally:
            late = not alarm.is_alive()
            alarm.cancel()
            _end(process)
        said = _tail(output) if status else ""
    if status:
        why = f"no end within {patience:g} s" if late else f"exit status {status}: {error_in(said) or 'it said nothing'}"
        measurements.append(Measurement("the section did not finish", None, note=why, broken=True))
        yield measurements[-1]
    yield Section(name, measurements, time.perf_counter() - started, said)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _tail(output: IO[bytes]) -> str:
    output.seek(0)
    return "\n".join(output.read().decode(errors="replace").strip().splitlines()[-_TAIL:])


def line(measurement: Measurement) -> str:
    """One aligned line."""
    return f"  {measurement.verdict:8} {measurement.what:64} {_measured(measurement)} {_limit(measurement)}".rstrip()


def closing(sections: Sequence[Section]) -> str:
    verdicts = Counter(measurement.verdict for section in sections for measurement in section.measurements)
    counts = f"{verdicts['pass']} passed, {verdicts['FAIL']} failed, {verdicts['skipped']} skipped"
    return f"{counts}; {sum(section.seconds for section in sections):.0f} s"


def markdown(config: RunConfig, devices: str, sections: Sequence[Section]) -> str:
    """Format the whole report as Markdown."""
    options = json.dumps(config.backend.options)
    page = [
        f"# rlcore check --backend {config.backend.name}", "", f"{closing(sections)}.", "",
        f"- devices: {devices}; options {options}, engine {config.rollout.engine}, precision {config.model.precision}",
        f"- {platform.platform()}, Python {platform.python_version()}, rlcore {metadata.version('rlcore')}",
        f"- {', '.join(_packages(config.backend.name))}",
    ]
    for section in sections:
        page += ["", f"## {section.name}: {SECTIONS[section.name]} ({section.seconds:.0f} s)", ""]
        page += ["| | measured | limit | |", "| --- | --- | --- | --- |"]
        page += [f"| {one.what} | {_measured(one)} | {_limit(one)} | {one.verdict} |" for one in section.measurements]
        page += ["", "```", section.said, "```"] if section.said else []
    return "\n".join(page) + "\n"


def _measured(measurement: Measurement) -> str:
    number = "" if measurement.measured is None else f"{measurement.measured:.3g}"
    return " ".join(part for part in (number, measurement.note) if part)


def _limit(measurement: Measurement) -> str:
    if measurement.measured is None:
        return ""
    return f"{'>=' if measurement.at_least else '<='} {measurement.limit:g}"


def _packages(backend: str) -> list[str]:
    """Packages that affect the numbers, with their versions."""
    decisive = registry.load("doctors", backend).decisive if backend in registry.names("doctors") else ()
    found = {name: host.installed(name) for name in dict.fromkeys(("torch", "transformers", *decisive))}
    return [f"{name} {version or 'not installed'}" for name, version in found.items()]
