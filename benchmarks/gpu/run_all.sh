#!/usr/bin/env bash
# Runs every stage that needs an NVIDIA GPU, at most eight minutes each, and goes on where an earlier call stopped.
#
#   benchmarks/gpu/run_all.sh                   all stages; results and summary.md in build/gpu-results
#   benchmarks/gpu/first.sh, second.sh          the quarter of an hour that says most: docs/gpu.md
#   benchmarks/gpu/run_all.sh --toy             a rehearsal at toy size; needs no GPU
#   benchmarks/gpu/run_all.sh --list            the stages;  --only NAME,... runs some of them;  --help says the rest
#   benchmarks/gpu/run_all.sh --archive DIR     with a packed vLLM: a folder whose unpack.sh, called with the folder and
#                                               a target, fills the target with packages; default .vp, where the
#                                               interpreter has no vLLM
#
# PYTHON names the interpreter; the default is the checkout's .venv, else python3. Nothing is installed or downloaded:
# what vLLM must find of this checkout is written to a folder of its own under ${TMPDIR:-/tmp} and named in PYTHONPATH.
set -euo pipefail

script=run_all.sh
die() { printf '%s: error: %s\n' "$script" "$*" >&2; exit 2; }

started=${EPOCHREALTIME/,/.}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
archive=
arguments=()
while [ $# -gt 0 ]; do
    case $1 in
    # Said by first.sh and second.sh.
    --run) script=$2.sh; arguments+=(--run "$2"); shift ;;
    --archive) [ $# -gt 1 ] || die "--archive needs a folder"; archive=$2; shift ;;
    --archive=*) archive=${1#*=} ;;
    # The stages run in the checkout; the folder is meant from here.
    --output) [ $# -gt 1 ] || die "--output needs a folder"; arguments+=(--output "$(realpath -m -- "$2")"); shift ;;
    --output=*) arguments+=(--output "$(realpath -m -- "${1#*=}")") ;;
    --bundle) [ $# -gt 1 ] || die "--bundle needs a folder"; arguments+=(--bundle "$(realpath -m -- "$2")"); shift ;;
    --bundle=*) arguments+=(--bundle "$(realpath -m -- "${1#*=}")") ;;
    --resume) [ $# -gt 1 ] || die "--resume needs a file"; arguments+=(--resume "$(realpath -m -- "$2")"); shift ;;
    --resume=*) arguments+=(--resume "$(realpath -m -- "${1#*=}")") ;;
    *) arguments+=("$1") ;;
    esac
    shift
done

[ -z "$archive" ] || [ -d "$archive" ] || die "--archive: no folder '$archive'"
if [ -z "${PYTHON:-}" ]; then
    if [ -z "$archive" ] && [ -x "$root/.venv/bin/python" ]; then PYTHON=$root/.venv/bin/python; else PYTHON=python3; fi
fi
python=$(command -v "$PYTHON") || die "no interpreter '$PYTHON'; name one: PYTHON=/path/to/python3"
# A packed vLLM that lies ready is for interpreters that have none.
has_vllm='import importlib.util, sys; sys.exit(importlib.util.find_spec("vllm") is None)'
if [ -z "$archive" ] && [ -d "$root/.vp" ] && ! "$python" -c "$has_vllm" 2>/dev/null; then archive=$root/.vp; fi

# One folder for each user, checkout and archive; a second call finds everything in place.
key=$(printf '%s\n' "$root" "$python" "$archive" "$(cat "${archive:-/nowhere}/MANIFEST" 2>/dev/null || true)" | cksum)
scratch=${TMPDIR:-/tmp}/trimix-gpu-$(id -u)-${key%% *}
mkdir -p -m 700 "$scratch" || die "can't write to ${TMPDIR:-/tmp}; set TMPDIR"
[ -O "$scratch" ] || die "'$scratch' belongs to somebody else; set TMPDIR"

path=$root
if [ -n "$archive" ]; then
    unpack=$archive/unpack.sh
    [ -f "$unpack" ] || unpack=$archive/../unpack.sh
    [ -f "$unpack" ] || die "--archive: '$archive' has no unpack.sh, inside or beside it"
    PYTHON=$python bash "$unpack" "$archive" "$scratch/site" || die "the archive in '$archive' can't be unpacked, see above"
    [ -e "$scratch/site/.complete" ] || die "the archive in '$archive' is not complete: parts are missing"
    export PATH="$scratch/site/bin:$PATH"
    path+=:$scratch/site
    # The archive is without FlashInfer, which vLLM's samplers would import without asking whether it is there.
    export VLLM_USE_FLASHINFER_SAMPLER=${VLLM_USE_FLASHINFER_SAMPLER:-0}
fi

# The entry point by which vLLM finds the plugin, as an installed package would have it.
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$root/vllm_trimix/__init__.py")
info=$scratch/entry/vllm_trimix-$version.dist-info
mkdir -p "$info"
printf 'Metadata-Version: 2.1\nName: vllm-trimix\nVersion: %s\n' "$version" >"$info/METADATA"
printf '[vllm.general_plugins]\ntrimix = vllm_trimix.plugin:register\n' >"$info/entry_points.txt"
export PYTHONPATH="$path:$scratch/entry${PYTHONPATH:+:$PYTHONPATH}"
export VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1
# A machine without a network may know no name of its own; everything here talks to itself.
export VLLM_HOST_IP=${VLLM_HOST_IP:-127.0.0.1} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-lo}

cd "$root"
elapsed=$("$python" -c 'import sys, time; print(time.time() - float(sys.argv[1]))' "$started")
exec "$python" -m benchmarks.gpu.programs --elapsed "$elapsed" ${arguments[@]+"${arguments[@]}"}
