#!/usr/bin/env bash
# The npu backend on the real torch_npu and vllm-ascend, over a CANN that computes nothing. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
status=0
bash ci/setup_npu.sh || status=$?
if [ $status = 75 ]; then echo "0 passed, 0 failed, 1 skipped"; exit 0; fi
[ $status = 0 ] || exit $status

cann=$(mktemp -d)
trap 'rm -rf "$cann"' EXIT
.venv-npu/bin/python tests/npu_contract/fake_cann.py "$cann"
LD_LIBRARY_PATH=$cann${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} \
    .venv-npu/bin/python -m pytest --disable-warnings --confcutdir tests/npu_contract --override-ini testpaths=tests/npu_contract "$@"
