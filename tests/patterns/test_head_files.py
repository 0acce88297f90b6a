"""Head files: MInference's form and our own, what fits a model, and nothing but a ValueError of a bad one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_trimix.config import head_files
from vllm_trimix.config.head_files import FORMAT, HeadFile, check_head_file, read_head_file, write_head_file
from vllm_trimix.patterns.a_shape import AShape
from vllm_trimix.patterns.base import DynamicPattern
from vllm_trimix.patterns.block_sparse import BlockSparse
from vllm_trimix.patterns.dense import Dense
from vllm_trimix.patterns.flexprefill import FlexPrefill
from vllm_trimix.patterns.vertical_slash import VerticalSlash
from vllm_trimix.patterns.xattention import XAttention

WHERE = "trimix.shallow.heads"

# A layer as MInference writes it, scores of both kinds that its files hold.
LAYER = {
    "0": ["vertical_and_slash", 1000, 6096, 0.9623493552207947],
    "1": ["stream_llm", 100, 800, 12],
    "2": ["block_sparse", 8, 1, 0.5],
    "3": ["vertical_and_slash", 3500, 100, 1],
}
HEADS = (VerticalSlash(1000, 6096), AShape(100, 800), BlockSparse(100), VerticalSlash(3500, 100))


def read(tmp_path: Path, data: object) -> HeadFile:
    path = tmp_path / "heads.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return read_head_file(path, where=WHERE)


def own(*layers: object, **keys: object) -> dict[str, object]:
    return {"format": FORMAT, "layers": list(layers), **keys}


def test_reads_minference(tmp_path: Path) -> None:
    shuffled = {head: LAYER[head] for head in ("2", "0", "3", "1")}
    file = read(tmp_path, [LAYER, shuffled])
    note = "block_sparse heads take 100 blocks: MInference's kernel ignores a file's number"
    notes = (f"{note} (of 2, the first: layer 0, head 2: [8, 1])",)
    assert file == HeadFile((HEADS, HEADS), "minference", None, {}, notes)


def test_small_numbers_rise_to_the_published_least(tmp_path: Path) -> None:
    file = read(tmp_path, [{"0": ["vertical_and_slash", 0, 49, 1], "1": ["vertical_and_slash", 31, 51, 1]}])
    assert file.layers == ((VerticalSlash(30, 50), VerticalSlash(31, 51)),)
    (note,) = file.notes
    assert note.startswith("at least 30 verticals and 50 slashes are taken, as in MInference's code (of 1, the first: ")


def test_more_than_ten_heads_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    file = read(tmp_path, [{str(head): ["stream_llm", head, 1, 0] for head in sorted(range(12), key=str)}])
    assert file.layers[0] == tuple(AShape(head, 1) for head in range(12))


def test_reads_our_own(tmp_path: Path) -> None:
    layers = [[{"pattern": "flexprefill", "gamma": 0.9}, {"pattern": "dense", "block_size": 128}], None]
    file = read(tmp_path, own(*layers, model="m", provenance={"date": "2026-01-01"}))
    assert file.layers == ((FlexPrefill(gamma=0.9), Dense(128)), None)
    assert (file.source, file.model, file.provenance) == ("vllm-trimix", "m", {"date": "2026-01-01"})
    bare = read(tmp_path, own([{"pattern": "a_shape"}]))
    assert (bare.model, bare.provenance) == (None, {})


def test_reads_the_heads_of_minferences_training_branch(tmp_path: Path) -> None:
    """Its code takes of the keys, and of the diagonals, the fewest that hold a share, and no more than a number."""
    flex = FlexPrefill(0.9, 0.0, 64, max_budget=4096)
    sizes = [0.9, 4096]
    file = read(
        tmp_path,
        [
            {"0": ["dense", 0, 0, 1.0], "1": ["flex_vertical_and_slash", sizes, sizes, 0.0]},
            {"0": ["vertical_and_slash", sizes, sizes, 0.0], "1": ["flex_vertical_and_slash", [0, 8], [0.5, 9], 1]},
        ],
    )
    assert file.layers == ((Dense(), flex), (flex, FlexPrefill(0.5, 0.0, 64, max_budget=9)))
    budget, larger = file.notes
    assert "most keys, and the most diagonals" in budget
    assert "(of 3, the first: layer 0, head 1: [[0.9, 4096], [0.9, 4096]])" in budget
    assert "larger of a head's two gammas" in larger


def test_qwens_list_is_known_by_its_name(tmp_path: Path) -> None:
    text = json.dumps([{"0": ["vertical_and_slash", 30, 800, 1.0]}])
    for name, size in (("sparse_attention_config.json", 130), ("heads.json", 30)):
        (tmp_path / name).write_text(text)
        assert read_head_file(tmp_path / name, where=WHERE).layers == ((VerticalSlash(size, 800),),)


QWEN_LAYER = {"0": ["vertical_and_slash", 30, 800, None], "1": ["vertical_and_slash", 1000, 6096, 0.9]}
QWEN_HEADS = (VerticalSlash(130, 800), VerticalSlash(1000, 6096))


@pytest.mark.parametrize("part", [lambda whole: whole, lambda whole: {"dual_chunk_attention_config": whole}])
@pytest.mark.parametrize("listed", [[QWEN_LAYER, None, QWEN_LAYER], {"0": QWEN_LAYER, "2": QWEN_LAYER}])
@pytest.mark.parametrize(("threshold", "least"), [({}, None), ({"sparse_attention_threshold": 0}, 1)])
def test_reads_qwens_sparse_configuration(
    part: Any, listed: Any, threshold: dict[str, int], least: int | None, tmp_path: Path
) -> None:
    config = part({"sparse_attention_config": listed, "sparse_attention_enabled": True, **threshold})
    file = read(tmp_path, {"model_type": "qwen2", **config})
    assert file.layers == (QWEN_HEADS, None, QWEN_HEADS)
    assert file.min_seq_len == least
    (note,) = file.notes
    assert note.startswith("a vertical of 30 becomes 130, as in Qwen's code (of 2, the first: layer 0, head 0: [30")


BAD: dict[str, tuple[Any, list[str]]] = {
    "no-json": ("{", ["Expecting"]),
    "nothing": ("", ["Expecting value"]),
    "number": (3, ["holds 3", FORMAT]),
    "nan": ('[{"0": ["stream_llm", 1, 1, NaN]}]', ["NaN"]),
    "infinity": ('[{"0": ["stream_llm", 1, 1, -Infinity]}]', ["-Infinity"]),
    "overflow": ('[{"0": ["stream_llm", 1, 1, 1e999]}]', ["1e999", "too large"]),
    "deep": ("[" * 200_000, ["deep"]),
    "duplicate-head": ('[{"0": ["stream_llm", 1, 1, 0], "0": ["stream_llm", 1, 1, 0]}]', ["'0'", "twice"]),
    "duplicate-key": (f'{{"format": "{FORMAT}", "layers": [], "layers": []}}', ["'layers'", "twice"]),
    "no-layers": ([], ["no layers"]),
    "layer-list": ([[]], ["layer 0", "[]"]),
    "layer-empty": ([LAYER, {}], ["layer 1", "{}"]),
    "missing-head": ([{"0": LAYER["0"], "2": LAYER["0"]}], ["layer 0", "not head 1"]),
    "negative-head": ([{"-1": LAYER["0"]}], ["layer 0", "'-1'"]),
    "zeros-before": ([{"00": LAYER["0"]}], ["layer 0", "'00'"]),
    "other-digits": ([{"٣": LAYER["0"]}], ["layer 0", "no head number"]),
    "short-head": ([{"0": ["stream_llm", 1, 1]}], ["layer 0, head 0", "list of 3", "score"]),
    "unknown-type": ([{"0": ["vertical_slash", 1, 1, 0]}], ["layer 0, head 0", "did you mean 'vertical_and_slash'"]),
    "type-list": ([{"0": [["stream_llm"], 1, 1, 0]}], ["layer 0, head 0", "no type"]),
    "negative": ([{"0": ["vertical_and_slash", -1, 1, 0]}], ["head 0", "vertical: -1", "0 or more"]),
    "float": ([{"0": ["vertical_and_slash", 1000, 1.5, 0]}], ["head 0", "slash: 1.5", "whole"]),
    "bool": ([{"0": ["vertical_and_slash", True, 1, 0]}], ["head 0", "vertical: True"]),
    "ignored-numbers-too": ([{"0": ["block_sparse", "8", 1, 0]}], ["head 0", "vertical: '8'"]),
    "flex-numbers": ([{"0": ["flex_vertical_and_slash", 9, [0.9, 9], 0]}], ["vertical: 9", "[gamma, budget]"]),
    "flex-gamma": ([{"0": ["flex_vertical_and_slash", [0.9, 9], [1.5, 9], 0]}], ["slash: gamma 1.5", "0 to 1"]),
    "flex-budget": ([{"0": ["flex_vertical_and_slash", [0.9, 0], [0.9, 9], 0]}], ["vertical: budget 0", "above 0"]),
    "flex-half": ([{"0": ["vertical_and_slash", [0.9, 9], 9, 0]}], ["vertical: a list of 2", "whole number"]),
    "qwen-empty": ({"sparse_attention_config": []}, ["sparse_attention_config", "[]"]),
    "qwen-layer": ({"sparse_attention_config": {"a": LAYER}}, ["'a' is no layer number"]),
    "qwen-threshold": (
        {"sparse_attention_config": [LAYER], "sparse_attention_threshold": -1},
        ["sparse_attention_threshold: -1"],
    ),
    "score": ([{"0": ["stream_llm", 1, 1, None]}], ["head 0", "score: None"]),
    "no-window": ([{"0": ["stream_llm", 1, 0, 0]}], ["head 0.n_local", "0", "1"]),
    "too-many": ([{"0": ["vertical_and_slash", 40000, 1, 0]}], ["head 0.vertical_size", "40000", "32768"]),
    "unknown-key": (own([{"pattern": "dense"}], layer=[]), ["unknown key 'layer'", "did you mean 'layers'"]),
    "no-format": ({"layers": []}, ["format: None", FORMAT]),
    "newer-format": ({"format": "vllm-trimix-heads/2", "layers": []}, ["heads/2", FORMAT]),
    "model": (own([{"pattern": "dense"}], model=3), ["model: 3"]),
    "provenance": (own([{"pattern": "dense"}], provenance="x"), ["provenance: 'x'"]),
    "layers": ({"format": FORMAT, "layers": {"0": []}}, ["layers: an object of 1"]),
    "own-no-layers": (own(), ["no layers"]),
    "own-empty-layer": (own(None, []), ["layer 1", "null"]),
    "own-layer": (own("dense"), ["layer 0", "'dense'"]),
    "own-head": (own([{"pattern": "dense"}, "dense"]), ["layer 0, head 1", "'dense'"]),
    "own-pattern": (own([{"pattern": "flexprefil"}]), ["layer 0, head 0.pattern", "did you mean 'flexprefill'"]),
    "own-pattern-list": (own([{"pattern": ["dense"]}]), ["layer 0, head 0.pattern", "['dense']"]),
    "own-no-pattern": (own([{}]), ["layer 0, head 0.pattern", "None"]),
    "own-parameter": (own([{"pattern": "flexprefill", "gama": 1}]), ["head 0", "did you mean 'gamma'"]),
    "own-value": (own([{"pattern": "flexprefill", "gamma": 1.5}]), ["head 0.gamma", "1.5", "less than or equal to 1"]),
    "own-block-sizes": (own([{"pattern": "dense"}, {"pattern": "flexprefill"}]), ["head 1", "128", "64"]),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_say_where_what_and_the_limit(case: str, tmp_path: Path) -> None:
    data, parts = BAD[case]
    with pytest.raises(ValueError, match=r"trimix\.shallow\.heads: head file '.*heads\.json'") as error:
        read(tmp_path, data)
    message = str(error.value)
    assert [part for part in parts if part not in message] == [], message
    assert len(message) < 400
    assert "\n" not in message


def test_what_is_no_readable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ValueError, match="no such file"):
            read_head_file(path, where=WHERE)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe[]")
    with pytest.raises(ValueError, match="head file"):
        read_head_file(tmp_path / "bytes.json", where=WHERE)
    text = json.dumps([LAYER])
    monkeypatch.setattr(head_files, "MAX_BYTES", len(text))
    read(tmp_path, text)
    with pytest.raises(ValueError, match=f"larger than {len(text)} bytes"):
        read(tmp_path, text + " ")


def test_what_fits_a_model() -> None:
    file = HeadFile((HEADS, None, HEADS[:3]), "vllm-trimix", "some/model")

    def error(**changed: Any) -> str:
        arguments = {"num_layers": 3, "num_heads": 4, "layers": [0], "where": WHERE} | changed
        try:
            check_head_file(file, **arguments)
        except ValueError as found:
            return str(found)
        return ""

    assert error() == ""
    assert error(layers=[]) == ""
    assert error(num_layers=4) == (
        f"{WHERE}: the head file is for 3 layers, this model has 4; take one that was made for this model "
        "(it says 'some/model')"
    )
    assert "leaves layer 1 out; add its 4 heads" in error(layers=[1, 0])
    assert "layer 2 of the head file has 3 heads (0-2), this model has 4" in error(layers=[2])
    assert "layer 3 is outside this model's 3 layers (0-2)" in error(layers=[3])
    assert "has 4 heads (0-3), this model has 8" in error(num_heads=8)


NUMBERS = {"allow_nan": False, "allow_infinity": False}
PATTERNS_64: list[st.SearchStrategy[DynamicPattern]] = [
    st.builds(AShape, st.integers(0, 2**31 - 1), st.integers(1, 2**31 - 1)),
    st.builds(VerticalSlash, st.integers(30, 2**15), st.integers(50, 2**20)),
    st.builds(BlockSparse, st.integers(2, 2**14)),
    st.builds(
        FlexPrefill, st.floats(0, 1), st.floats(0, 1), st.just(64), st.integers(0, 9), st.none() | st.integers(9, 99)
    ),
    st.builds(XAttention, st.floats(0, 1), st.sampled_from([4, 8, 16]), st.just(64)),
    st.builds(Dense),
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(**NUMBERS) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layers=st.lists(st.none() | st.lists(st.one_of(PATTERNS_64), min_size=1, max_size=4).map(tuple), min_size=1),
    model=st.none() | st.text(),
    provenance=st.dictionaries(st.text(), JSON, max_size=3),
)
def test_what_is_written_is_read(
    tmp_path: Path, layers: list[tuple[DynamicPattern, ...] | None], model: str | None, provenance: dict[str, Any]
) -> None:
    write_head_file(tmp_path / "heads.json", layers, model=model, provenance=provenance)
    assert read_head_file(tmp_path / "heads.json", where=WHERE) == HeadFile(
        tuple(layers), "vllm-trimix", model, provenance
    )


@pytest.mark.parametrize(
    ("layers", "provenance", "message"),
    [
        ([], {}, "no layers"),
        ([[]], {}, "layer 0: has no heads"),
        ([None, [Dense(64), Dense(128)]], {}, "layer 1, head 1: block_size 128"),
        ([["dense"]], {}, "layer 0, head 0: 'dense' is not a pattern"),
        ([None], {"loss": float("nan")}, "provenance"),
        ([None], {"path": Path()}, "provenance"),
        ([None], {"pair": (1, 2)}, "plain JSON"),
        ([None], {1: "a", "1": "b"}, "twice"),
    ],
    ids=["none", "empty", "block-size", "no-pattern", "nan", "type", "tuple", "keys"],
)
def test_what_could_not_be_read_again_is_not_written(
    layers: Any, provenance: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        write_head_file(tmp_path / "heads.json", layers, model=None, provenance=provenance)
    assert not (tmp_path / "heads.json").exists()


NAMES = st.sampled_from(["pattern", "n_init", "gamma", "top_k", "block_size", "stride", "0", "1", "layers", "format"])
VALUES = (
    st.sampled_from(["a_shape", "dense", "flexprefill", "xattention", "stream_llm", "vertical_and_slash", FORMAT])
    | st.integers(-1, 130)
    | st.integers()
    | st.none()
    | st.booleans()
    | st.floats()
    | st.text(max_size=8)
)
NEAR_FILES = st.recursive(
    VALUES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | st.text(max_size=4), inner, max_size=4),
    max_leaves=20,
)
MINFERENCE_HEADS = st.lists(VALUES, min_size=3, max_size=5)
MINFERENCE = st.lists(
    st.dictionaries(st.sampled_from(["0", "1", "2", "-0", "a"]), MINFERENCE_HEADS | VALUES, max_size=3)
)
OWN_HEADS = st.dictionaries(NAMES, VALUES | NEAR_FILES, max_size=4)
OWN = st.builds(lambda layers: own(*layers), st.lists(st.none() | st.lists(OWN_HEADS, max_size=3), max_size=3))


def check_outcome(path: Path) -> None:
    """Either a file with heads in every layer that it has, or an error that names the setting."""
    message = ""
    try:
        file = read_head_file(path, where=WHERE)
    except ValueError as error:
        message = str(error)
    assert message.startswith(WHERE) if message else all(heads is None or heads for heads in file.layers)


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=NEAR_FILES | MINFERENCE | OWN)
def test_only_a_value_error_escapes(tmp_path: Path, data: Any) -> None:
    (tmp_path / "heads.json").write_text(json.dumps(data))
    check_outcome(tmp_path / "heads.json")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_raise_a_value_error_at_most(tmp_path: Path, data: st.DataObject) -> None:
    text = bytearray(
        json.dumps(data.draw(st.sampled_from([[LAYER], own([{"pattern": "a_shape", "n_init": 4}])]))).encode()
    )
    for _ in range(data.draw(st.integers(1, 3))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "heads.json").write_bytes(text)
    check_outcome(tmp_path / "heads.json")
