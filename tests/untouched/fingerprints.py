"""What a vLLM process is made of: a fingerprint of every function of every vLLM module that is loaded.

Two processes that ran the same are compared by it. A wrapper is seen although it carries the name of what it wraps: the
code, the file and the line that it comes from are part of the fingerprint.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
import types
from typing import Any

# Functions within functions, in closures and under decorators.
_DEPTH = 6


def loaded_vllm() -> dict[str, str]:
    """Fingerprints of every function, class and member of the loaded vLLM modules, by qualified name."""
    found: dict[str, str] = {}
    for name in sorted(name for name in sys.modules if name.split(".", 1)[0] == "vllm"):
        module = sys.modules[name]
        for key, value in sorted(vars(module).items()):
            place = f"{name}.{key}"
            if isinstance(value, type):
                # Where it is only imported, its name says enough.
                found[place] = f"{value.__module__}.{value.__qualname__}"
                if value.__module__ == name:
                    found.update({f"{place}.{member}": of(item) for member, item in vars(value).items()})
            elif not key.startswith("__"):
                found[place] = of(value)
    return found


def of(value: Any, depth: int = _DEPTH) -> str:
    """What a value is: code for what can be called, the type for everything else."""
    if isinstance(value, classmethod | staticmethod):
        return f"{type(value).__name__}({of(value.__func__, depth)})"
    if isinstance(value, property):
        return f"property({', '.join(of(part, depth) for part in (value.fget, value.fset, value.fdel))})"
    if isinstance(value, functools.partial | functools.partialmethod | functools.cached_property):
        return f"{type(value).__name__}({of(value.func, depth)})"
    if isinstance(value, types.MethodType):
        return f"method({of(value.__func__, depth)})"
    if isinstance(value, types.FunctionType):
        return _function(value, depth)
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    # Statically: some values import what they stand for when they are asked.
    wrapped = None if isinstance(value, type) else inspect.getattr_static(value, "__wrapped__", None)
    return f"{kind}({of(wrapped, depth - 1)})" if isinstance(wrapped, types.FunctionType) and depth else kind


def of_instance(value: Any) -> dict[str, str]:
    """An object's class, the classes above it, and whatever can be called among its own attributes."""
    own = {name: of(item) for name, item in getattr(value, "__dict__", {}).items() if callable(item)}
    return {"class": " ".join(f"{base.__module__}.{base.__qualname__}" for base in type(value).__mro__), **own}


def _function(function: types.FunctionType, depth: int) -> str:
    cells = []
    if depth:
        for cell in function.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:  # Not filled yet: a function that names itself.
                continue
            if isinstance(content, types.FunctionType | classmethod | staticmethod):
                cells.append(of(content, depth - 1))
    code = function.__code__
    digest = hashlib.blake2b("\n".join([_code(code), *cells]).encode(), digest_size=8).hexdigest()
    return f"{function.__module__}.{function.__qualname__} {code.co_filename}:{code.co_firstlineno} {digest}"


def _code(code: types.CodeType) -> str:
    constants = [_code(item) if isinstance(item, types.CodeType) else type(item).__name__ for item in code.co_consts]
    numbers = [repr(item) for item in code.co_consts if isinstance(item, int | float | str)]
    return repr((code.co_code, code.co_names, code.co_varnames, code.co_freevars, constants, numbers))
