#!/usr/bin/env bash
# Makes .venv-npu: the packages of .venv plus the real wheels that tests/npu_contract tests the npu backend against.
# Exit status 75, with the reason, if they cannot be obtained.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=.venv-npu wheels=tests/npu_contract/wheels.txt pinned=tests/npu_contract/pinned.txt

fresh() { for source in "$wheels" "$pinned" "$0" .venv/installed; do [ ! "$source" -nt $folder/installed ] || return 1; done; }
[ ! -e $folder/installed ] || ! fresh || exit 0

absent() { echo "tests/npu_contract: $1" >&2; exit 75; }
read -r python machine <<<"$(.venv/bin/python -c 'import platform; print(platform.python_version()[:4], platform.machine())')"
case "$machine $python" in "x86_64 3.11" | "x86_64 3.12") ;; *) absent "no wheels for Python $python on $machine" ;; esac
for tool in gcc nm strings; do command -v $tool >/dev/null || absent "$tool is needed to make a CANN out of names"; done

fetch() {
    $folder/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --no-compile --require-hashes "$@" \
        2>$folder/pip.log && return
    if grep -q "DO NOT MATCH THE HASHES" $folder/pip.log; then cat $folder/pip.log >&2; exit 1; fi
    absent "$(grep ERROR $folder/pip.log | tail -1)"
}
rm -rf $folder
.venv/bin/python -m venv $folder
echo "installing torch-npu and vllm-ascend into $folder (about 300 MB to fetch, once)"
fetch -r "$wheels"
fetch -r "$pinned" --target $folder/pinned
# Only now, so that pip leaves the packages below alone.
site=(.venv/lib/python*/site-packages)
echo "import site; site.addsitedir('$PWD/${site[0]}')" >"$folder/lib/python$python/site-packages/below.pth"
touch $folder/installed
