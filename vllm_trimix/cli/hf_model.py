"""What commands that run a Hugging Face model share: its flags, loading it, its surroundings, progress bars."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vllm_trimix.cli.arguments import add_tokenizer, add_trust, check_output, check_packages, read_object
from vllm_trimix.config.context import max_length
from vllm_trimix.measurement.chat_template import check_arguments, in_use
from vllm_trimix.measurement.hardware import cpu_name
from vllm_trimix.measurement.tokenizers import load_tokenizer

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say how the model is run."""
    add = parser.add_argument
    add("--device", default="auto", help="auto: CUDA where there is one")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="auto: on a CPU float32 where that fits, else the checkpoint's",
    )
    add("--seed", type=int, default=0)
    add_tokenizer(parser)
    add_trust(parser)


def share_trust(args: argparse.Namespace) -> None:
    """Lets ``--trust-remote-code`` count for the command and for its engines, wherever it was given."""
    flag = "--trust-remote-code"
    given = any(word.replace("_", "-") == flag for word in args.flags)
    if args.trust_remote_code and not given and not args.server:
        args.flags = [*args.flags, flag]
    args.trust_remote_code = args.trust_remote_code or given


def check_surroundings(args: argparse.Namespace) -> None:
    """Refuses, before anything takes time, what would fail at the end: packages, weights, the folder for results.

    Raises:
        ValueError: Naming what is missing or in the way.
    """
    check_packages("matplotlib", "psutil", "scipy", "torch", "tqdm", "transformers", extra="probe")
    check_output(args.output)
    folder = Path(args.model)
    if folder.is_dir() and not any(list(folder.glob(pattern)) for pattern in _WEIGHTS):
        raise ValueError(f"{args.model} holds no weights ({', '.join(_WEIGHTS)}); name a model with its weights")


class Source(NamedTuple):
    """A model that is not loaded yet.

    Attributes:
        name: HF id or path.
        config: Of transformers.
        tokenizer: Of transformers.
        dtype: Of weights and activations.
        device: Where it will run.
        max_length: Tokens that an engine takes of it, or None.
    """

    name: str
    config: Any
    tokenizer: Any
    dtype: Any
    device: Any
    max_length: int | None
    load: dict[str, Any]

    def model(self) -> Any:
        """Loads it, in evaluation mode."""
        # Heavy: PyTorch.
        from vllm_trimix.probing.loading import model_class

        auto = model_class(self.config)
        return auto.from_pretrained(self.name, dtype=self.dtype, **self.load).to(self.device).eval()

    def outline(self) -> Any:
        """The model without its weights.

        Raises:
            ValueError: Transformers can't run it.
        """
        # Heavy: PyTorch.
        from vllm_trimix.probing.loading import outline

        return outline(self.config, **self.load)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


class Description(NamedTuple):
    """What is known of a model without its weights.

    Attributes:
        config: Of transformers.
        tokenizer: Of transformers.
        max_length: Tokens that an engine takes of it, or None.
    """

    config: Any
    tokenizer: Any
    max_length: int | None


def describe(model: str, *, trust_remote_code: bool, tokenizer: str | None = None) -> Description:
    """Reads a model's configuration and its tokenizer, or another one.

    Raises:
        ValueError: No tokenizer that can make prompts.
        OSError: No such model.
    """
    # Heavy.
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(model, tokenizer=tokenizer, trust_remote_code=trust_remote_code)
    return Description(config, tokenizer, max_length(config))


def within(lengths: list[int], limit: int | None, *, flag: str, is_default: bool) -> list[int]:
    """Lengths of generated prompts that the model takes; defaults that are too long are left out, with a word.

    Args:
        lengths: In tokens.
        limit: What the model takes, or None.
        flag: The setting that names them.
        is_default: Whether nobody has chosen them.

    Raises:
        ValueError: Longer than the limit.
    """
    if limit is None or max(lengths) <= limit:
        return lengths
    if not is_default:
        raise ValueError(f"{flag}: {max(lengths)} tokens: the model takes {limit}; take shorter prompts")
    # The answer needs room as well.
    longest = limit - limit // 16
    kept = [length for length in lengths if length <= longest] or [longest]
    words = ", ".join(map(str, kept))
    print(f"vllm-trimix: {flag}: {words} instead of {max(lengths)} tokens: the model takes {limit}", file=sys.stderr)
    return kept


def find(args: argparse.Namespace) -> Source:
    """The model that a command's arguments name.

    Raises:
        ValueError: No such device.
        OSError: No such model.
    """
    # Heavy.
    import torch

    device = torch.device(_device(args.device))
    config, tokenizer, limit = describe(args.model, trust_remote_code=args.trust_remote_code, tokenizer=args.tokenizer)
    dtype = getattr(torch, args.dtype) if args.dtype != "auto" else getattr(config, "dtype", None) or torch.float32
    load = {"trust_remote_code": args.trust_remote_code}
    return Source(args.model, config, tokenizer, dtype, device, limit, load)


def precise(args: argparse.Namespace, source: Source, outline: Any) -> Source:
    """A model in fp32 on a CPU, unless another type was asked for or its weights take more than half of the memory.

    Few CPUs multiply bf16 as fast, and its rounding would count as divergence.

    Args:
        args: As parsed.
        source: The model.
        outline: The same without its weights.
    """
    # Heavy: PyTorch.
    import torch

    from vllm_trimix.probing import memory

    fits = 2 * memory.weight_bytes(outline, torch.float32) <= memory.total_bytes()
    return (
        source._replace(dtype=torch.float32)
        if args.dtype == "auto" and source.device.type == "cpu" and fits
        else source
    )


def _device(name: str) -> str:
    # Heavy.
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device: {name}: this torch sees no CUDA device; use cpu")
    try:
        torch.empty(0, device=name)
    except RuntimeError as error:
        raise ValueError(f"--device: {name}: {str(error).splitlines()[0]}") from None
    return name


def template_arguments(args: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """``--chat-template-kwargs``.

    Raises:
        ValueError: No JSON object, or the chat template reads no such argument.
    """
    given = read_object("--chat-template-kwargs", args.chat_template_kwargs)
    check_arguments(tokenizer, given)
    return given


def template_words(tokenizer: Any, arguments: Mapping[str, Any]) -> list[str]:
    """What a report says of the chat template: its arguments, where it takes some."""
    used = in_use(tokenizer, arguments)
    return [f"chat template with {json.dumps(used)}"] if used else []


def environment(device: Any) -> dict[str, str]:
    """Device and versions, for a report."""
    # Heavy.
    import torch
    import transformers

    threads = torch.get_num_threads()
    cpu = f"{cpu_name()}, {threads} thread{'' if threads == 1 else 's'}"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def command(args: argparse.Namespace, *, positional: tuple[str, ...] = ("model",)) -> str:
    """The call again: what differs from the defaults.

    Args:
        args: As parsed, with ``parser``.
        positional: Names of the arguments without a flag, in their order.
    """
    words = ["vllm-trimix", args.command, *(str(getattr(args, name)) for name in positional)]
    for name, value in vars(args).items():
        if name in ("command", "run", "parser", "flags", *positional) or value == args.parser.get_default(name):
            continue
        flag = f"--{name.replace('_', '-')}"
        for item in value if isinstance(value, list) else [value]:
            words += [flag] if item is True else [flag, str(item)]
    return shlex.join([*words, *(["--", *args.flags] if getattr(args, "flags", None) else [])])


class Bars:
    """A progress bar a phase, on stderr.

    Attributes:
        unit: What is counted.
    """

    def __init__(self, unit: str = "pass") -> None:
        self.unit = unit
        self._name = ""
        self._bar: Any = None

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, exception: object, *_: object) -> None:
        if self._bar is not None:
            # The last pass of a phase ends without a word.
            if exception is None:
                self._bar.update(self._bar.total - self._bar.n)
            self._bar.close()

    def update(self, name: str, done: int, total: int) -> None:
        """The phase, and how much of it is done."""
        # Of the extras.
        from tqdm import tqdm

        if name != self._name:
            self.__exit__(None)
            self._name, self._bar = name, tqdm(total=total, desc=name, unit=self.unit)
        self._bar.total = total
        self._bar.update(max(0, done - self._bar.n))
