#!/usr/bin/env bash
# unpack.sh ARCHIVE TARGET: fills TARGET with what ARCHIVE holds, and with bin/vllm; touches TARGET/.complete at the end.
# A second call does nothing. PYTHON names the interpreter, 3.12 or newer. No xz, tar or network is needed.
set -euo pipefail
[ $# = 2 ] || { echo "unpack.sh: error: $# arguments; it takes the archive's folder and a target" >&2; exit 2; }
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/unpack.py" "$1" "$2"
