#!/usr/bin/env bash
# The second 5 minutes on an NVIDIA GPU, once first.sh has passed: how fast is it?
#
#   benchmarks/gpu/second.sh --bundle DIR       results.json, summary.md and logs.tar.gz in DIR, renewed after each stage
#   benchmarks/gpu/second.sh --toy              a rehearsal at toy size; needs no GPU
#   benchmarks/gpu/second.sh --list, --help     the stages; everything else
#
# All stages prepare side by side (engines start, kernels compile); then each has the device to itself in turn. It goes
# on where it stopped. When time runs short the last stages of the list are cut first, and a stage measures its most
# valuable figures first: docs/gpu.md has the order.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_all.sh" --run second "$@"
