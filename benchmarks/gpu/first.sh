#!/usr/bin/env bash
# The first 4.5 minutes on an NVIDIA GPU: is it right? Engines and kernels side by side, then one line of speed.
#
#   benchmarks/gpu/first.sh --bundle DIR        results.json, summary.md and logs.tar.gz in DIR, renewed after each stage
#   benchmarks/gpu/first.sh --toy               a rehearsal at toy size; needs no GPU
#   benchmarks/gpu/first.sh --list, --help      the stages; everything else
#
# It goes on where it stopped: what passed is not run again. When time runs short the last stages of the list are cut
# first (fp8, then model runner V1, then the eager engines); the line of speed has its time reserved. Kernel cases run
# by rank, so that a stage that is ended has run those that most people need.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_all.sh" --run first "$@"
