"""Turns the variables of ``make serve`` into a ``vllm serve`` command and becomes that command.

The variables come through the environment, so that JSON with quotes and spaces meets no shell on its way.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from vllm_trimix.measurement.hardware import multiplies_bf16

DEMO_MODEL = "build/demo-model"
DEMO_ARGS = ["--served-model-name", "demo", "--max-model-len", "40960"]
DEMO_KVCACHE_GIB = "2"
VARIABLES = ("MODEL", "PORT", "BACKEND", "TRIMIX_CONFIG", "SERVE_ARGS")


def serve_command(
    variables: Mapping[str, str], *, vllm: str, compiler: bool, multiplies_bf16: bool = True
) -> list[str]:
    """Builds the command line.

    Args:
        variables: MODEL, PORT, BACKEND, TRIMIX_CONFIG, SERVE_ARGS; empty counts as not given.
        vllm: Path of the ``vllm`` command.
        compiler: Whether a C++ compiler is there for torch.compile, or none is needed.
        multiplies_bf16: Whether the device does so well; else the demo model, of which that is known, runs in fp32.

    Raises:
        ValueError: TRIMIX_CONFIG is no JSON object, PORT no port, SERVE_ARGS has an open quote.
    """
    model = variables.get("MODEL", "").strip()
    command = [vllm, "serve", model or DEMO_MODEL, "--attention-backend", variables.get("BACKEND") or "TRIMIX"]
    port = variables.get("PORT") or "8000"
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"PORT: {port!r} is not a port (1-65535)")
    command += ["--port", port]
    if not model:
        command += DEMO_ARGS
        if not multiplies_bf16:
            command.append("--dtype=float32")
    if not compiler:
        command.append("--enforce-eager")
    if variables.get("TRIMIX_CONFIG", "").strip():
        command += ["--additional-config", json.dumps({"trimix": _parse_config(variables["TRIMIX_CONFIG"])})]
    try:
        return command + shlex.split(variables.get("SERVE_ARGS", ""))
    except ValueError as error:
        raise ValueError(f"SERVE_ARGS: {error} in {variables['SERVE_ARGS']!r}") from error


def _parse_config(text: str) -> dict[str, object]:
    example = """write e.g. TRIMIX_CONFIG='{"starting_layer": 16, "n_local": 512}'"""
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"TRIMIX_CONFIG: {text!r} is not JSON ({error}); {example}") from error
    if not isinstance(config, dict):
        raise ValueError(f"TRIMIX_CONFIG: {text!r} is not a JSON object; {example}")
    if "trimix" in config:
        raise ValueError(f"TRIMIX_CONFIG: leave out the outer 'trimix', it is added here; {example}")
    return config


def main() -> None:
    """Replaces this process by ``vllm serve``; exits with status 2 on bad input."""
    bin_dir = Path(sys.executable).parent
    # The CUDA wheel brings no need for a host compiler; torch.compile for the CPU calls $CXX or g++.
    gpu = shutil.which("nvidia-smi") is not None
    compiler = shutil.which(os.environ.get("CXX", "g++")) is not None or gpu
    try:
        command = serve_command(
            os.environ, vllm=str(bin_dir / "vllm"), compiler=compiler, multiplies_bf16=gpu or multiplies_bf16()
        )
    except ValueError as error:
        print(f"make serve: error: {error}", file=sys.stderr)
        sys.exit(2)
    if not compiler:
        print("make serve: no C++ compiler found (g++ or $CXX): serving without torch.compile", flush=True)
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    if not os.environ.get("MODEL", "").strip():
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", DEMO_KVCACHE_GIB)
    # vLLM starts helpers (ninja, its own workers) by name.
    environment["PATH"] = f"{bin_dir}{os.pathsep}{environment.get('PATH', os.defpath)}"
    print("make serve:", shlex.join(command), flush=True)
    os.execve(command[0], command, environment)


if __name__ == "__main__":
    main()
