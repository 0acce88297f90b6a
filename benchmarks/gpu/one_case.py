"""One case of a Triton kernel in a process of its own: for compute-sanitizer, and for a person who follows a failure.

python -m benchmarks.gpu.one_case NAME [--device cpu] [--list]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

RIGHT, WRONG = "is right", "is wrong"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs it; 0 if it is right, 1 if it is wrong, 2 if there is no such case."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.one_case", description=__doc__)
    parser.add_argument("name", nargs="?", help="the case")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: in Triton's interpreter")
    parser.add_argument("--list", action="store_true", help="name all cases, the most valuable first")
    args = parser.parse_args(argv)
    if args.device == "cpu":
        # Before anything imports Triton.
        from tests.kernels.interpreter import use_interpreter

        use_interpreter()
    # It imports Triton, which must know by now whether it interprets.
    from benchmarks.gpu.kernel_cases import all_cases, prepare_launch, ranked

    cases = all_cases()
    if args.list:
        print("\n".join(ranked() | cases))
        return 0
    if args.name not in cases:
        print(f"one_case: error: no case {args.name!r}; --list names them", file=sys.stderr)
        return 2
    launch = prepare_launch(cases[args.name], args.device)
    launch.run()
    try:
        launch.answer().check()
    except AssertionError as error:
        print(f"case {args.name} {WRONG}: {error}", flush=True)
        return 1
    print(f"case {args.name} {RIGHT}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
