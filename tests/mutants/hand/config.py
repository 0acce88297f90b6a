"""Defects of the configuration and of what it resolves to."""

from __future__ import annotations

from tests.mutants.hand.group import ADMISSION, Group

METAMORPHIC = "tests/metamorphic/test_metamorphic.py"
CONFIG = "tests/config/test_config.py"

GROUPS = (
    Group(
        "vllm_trimix/config/shallow.py",
        (f"{METAMORPHIC}::test_slices_of_heads_are_all_heads",),
        (("every TP rank has the first rank's slice of a head file", "[first : first + num_heads]", "[:num_heads]"),),
    ),
    Group(
        "vllm_trimix/config/resolve.py",
        (CONFIG,),
        (
            ("a preset's keys win over the user's", "in (config, preset):", "in (preset, config):"),
            (
                "starting_layer one too late",
                "range(config.starting_layer, num_layers)",
                "range(config.starting_layer + 1, num_layers)",
            ),
            (
                "starting_layer may be the number of layers",
                "config.starting_layer >= num_layers:",
                "config.starting_layer > num_layers:",
            ),
        ),
    ),
    Group(
        "vllm_trimix/config/entry.py",
        (ADMISSION,),
        (("fingerprint without the patterns", '"shallow": {"notes"}', '"shallow": True'),),
    ),
)
