#!/usr/bin/env bash
# Makes .venv with the pinned cpu stack, Ray, the development tools and rlcore itself, editable.
set -euo pipefail
cd "$(dirname "$0")/.."
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "rlcore needs Python 3.11 or newer; set PYTHON=..." >&2; exit 2; }

index=https://download.pytorch.org/whl/cpu
find=()
if "$PYTHON" - "$index" 2>/dev/null <<'PYTHON'
import sys, urllib.request
urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=5).read(1)
PYTHON
then find=(--extra-index-url "$index"); fi

[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
pip=(.venv/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --no-compile)
echo "installing the cpu stack into .venv (about 1 GB to fetch, once)"
"${pip[@]}" "${find[@]}" -r requirements/cpu.txt -r requirements/ray.txt -r requirements/dev.txt
"${pip[@]}" --no-build-isolation --editable .
# Compile on all cores now, not on one at the first import. Files for other Python versions fail; that is expected.
packages=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
.venv/bin/python -m compileall -qq -j 0 "$packages"/{torch,transformers,vllm} || true
touch .venv/installed
