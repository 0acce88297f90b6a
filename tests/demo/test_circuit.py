"""The circuit model in HF transformers: right at every length, and wrong in the one way the triangle predicts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from vllm_trimix.cli.main import main
from vllm_trimix.config.resolve import resolve
from vllm_trimix.demo import vocabulary
from vllm_trimix.demo.circuit import HEAD_SIZE, ROPE_THETA, circuit_weights, make_demo_model
from vllm_trimix.demo.circuit_spec import CircuitSpec
from vllm_trimix.demo.codewords import codewords
from vllm_trimix.demo.prompts import DemoPrompt, make_demo_prompt

# The whole circuit and an idle layer, at an eighth of the default's attention.
SMALL = CircuitSpec(layers=4, lookup_layer=1, answer_layer=3, heads=2, kv_heads=1)
ALL_LAYERS = range(SMALL.layers)
ALL_BUT_LOOKUP = [layer for layer in ALL_LAYERS if layer != SMALL.lookup_layer]


@dataclass
class Rule:
    """The triangle as the tests state it, and the attention weights it saw, kept on request."""

    layers: Iterable[int] = ()
    n_init: int = 8
    n_local: int = 512
    last_n: int = 128
    prompt_len: int = 0
    keep: bool = False
    kept: dict[int, torch.Tensor] = field(default_factory=dict)


def rule_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _: Any, scaling: float, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Attention of HF's interface under the rule on the model's config."""
    rule: Rule = module.config.rule
    j = torch.arange(key.shape[2])[None, :]
    i = torch.arange(key.shape[2] - query.shape[2], key.shape[2])[:, None]
    visible = j <= i
    if module.layer_idx in rule.layers:
        visible = visible & ((j < rule.n_init) | (i - j < rule.n_local) | (i >= rule.prompt_len - rule.last_n))
    if not rule.keep:
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).transpose(2, 3) * scaling
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    if weights.requires_grad:
        weights.retain_grad()
    rule.kept[module.layer_idx] = weights
    return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2), None


AttentionInterface.register("rule", rule_attention)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Demo:
    """A circuit model on disk, and HF's reading of it."""

    def __init__(self, directory: Path, spec: CircuitSpec) -> None:
        make_demo_model(directory, spec)
        self.directory = directory
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self._models: dict[tuple[torch.dtype, str], Any] = {}

    def model(self, dtype: torch.dtype = torch.float32, attention: str = "rule") -> Any:
        if (dtype, attention) not in self._models:
            self._models[dtype, attention] = AutoModelForCausalLM.from_pretrained(
                self.directory, dtype=dtype, attn_implementation=attention
            )
        return self._models[dtype, attention]

    def ask(
        self, text: str, *, rule: Rule | None = None, dtype: torch.dtype = torch.float32, attention: str = "rule"
    ) -> tuple[str, float]:
        """The words generated before ``</s>``, and the margin of the first one's logit."""
        inputs = self.tokenizer(text, return_tensors="pt")
        prompt_len = inputs.input_ids.shape[1]
        model = self.model(dtype, attention)
        model.config.rule = rule or Rule()
        model.config.rule.prompt_len = prompt_len
        done = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        words = self.tokenizer.convert_ids_to_tokens(done.sequences[0, prompt_len:])
        best, second = done.logits[0][0].float().topk(2).values
        assert words[-1] == vocabulary.EOS, f"never stops: {words}"
        return " ".join(words[:-1]), float(best - second)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[CircuitSpec], Demo]:
    made: dict[CircuitSpec, Demo] = {}

    def make(spec: CircuitSpec) -> Demo:
        if spec not in made:
            made[spec] = Demo(tmp_path_factory.mktemp("model"), spec)
        return made[spec]

    return make


MakeDemo = Callable[[CircuitSpec], Demo]


def prompts(tokens: int, hops: int, count: int) -> list[DemoPrompt]:
    return [make_demo_prompt(tokens=tokens, hops=hops, seed=seed) for seed in range(count)]


def least_margin(hops: int) -> float:
    """From the code's inner products: half of 64 - 16; half of 4 x 64 - 16 less half of 64 + 4 x 16. RMSNorm: -10%."""
    return 0.9 * (24.0 if hops == 1 else 56.0)


# The circuit answers.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("tokens", "count"), [(1024, 6), (2048, 4), (4096, 2)])
@pytest.mark.parametrize("hops", [1, 2])
def test_answers_are_right(demo: MakeDemo, hops: int, tokens: int, count: int, dtype: torch.dtype) -> None:
    for prompt in prompts(tokens, hops, count):
        answer, margin = demo(SMALL).ask(prompt.prompt, dtype=dtype, attention="sdpa")
        assert answer == prompt.answer
        assert margin > least_margin(hops)


@pytest.mark.slow
@pytest.mark.parametrize("hops", [1, 2])
def test_answers_are_right_at_32k(demo: MakeDemo, hops: int) -> None:
    prompt = make_demo_prompt(tokens=32768, hops=hops, seed=0)
    answer, margin = demo(SMALL).ask(prompt.prompt, dtype=torch.bfloat16, attention="sdpa")
    assert answer == prompt.answer
    assert margin > least_margin(hops)


@pytest.mark.parametrize(
    "spec",
    [
        CircuitSpec(),
        CircuitSpec(layers=3, lookup_layer=1, answer_layer=2, heads=4, kv_heads=2),
        CircuitSpec(layers=12, lookup_layer=5, answer_layer=9, heads=3, kv_heads=1),
        CircuitSpec(layers=6, lookup_layer=4, answer_layer=5, heads=8, kv_heads=4, dtype="float32"),
        CircuitSpec(layers=4, lookup_layer=1, answer_layer=3, heads=2, kv_heads=1, sharpness=0.35),
        CircuitSpec(layers=6, lookup_layer=2, answer_layer=4, heads=6, kv_heads=3, distractor_heads=6),
    ],
    ids=["default", "least", "deep", "late", "soft", "distracted"],
)
def test_every_shape_answers_and_only_its_lookup_layer_needs_the_middle(demo: MakeDemo, spec: CircuitSpec) -> None:
    model = demo(spec)
    others = [layer for layer in range(spec.layers) if layer != spec.lookup_layer]
    one_hop, two_hop = (make_demo_prompt(tokens=1100, hops=hops, seed=1) for hops in (1, 2))
    assert model.ask(one_hop.prompt, rule=Rule(range(spec.layers)))[0] == one_hop.answer
    assert model.ask(two_hop.prompt)[0] == two_hop.answer
    assert model.ask(two_hop.prompt, rule=Rule(others))[0] == two_hop.answer
    assert model.ask(two_hop.prompt, rule=Rule([spec.lookup_layer]))[0] == two_hop.wrong_answer


def test_stored_dtype(demo: MakeDemo) -> None:
    stored = AutoModelForCausalLM.from_pretrained(demo(SMALL).directory, dtype="auto")
    assert stored.dtype == torch.bfloat16
    exact = CircuitSpec(layers=6, lookup_layer=4, answer_layer=5, heads=8, kv_heads=4, dtype="float32")
    assert AutoModelForCausalLM.from_pretrained(demo(exact).directory, dtype="auto").dtype == torch.float32


# The triangle bites at the lookup layer alone.


def test_triangle_on_all_but_the_lookup_layer_changes_nothing(demo: MakeDemo) -> None:
    for hops in (1, 2):
        for prompt in prompts(1500, hops, 5):
            dense = demo(SMALL).ask(prompt.prompt)
            triangle = demo(SMALL).ask(prompt.prompt, rule=Rule(ALL_BUT_LOOKUP))
            assert dense[0] == triangle[0] == prompt.answer
            assert triangle[1] == pytest.approx(dense[1], rel=1e-3)


@pytest.mark.parametrize("layers", [ALL_LAYERS, [SMALL.lookup_layer]], ids=["all", "lookup"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_triangle_on_the_lookup_layer_answers_the_aliases_key(
    demo: MakeDemo, layers: Iterable[int], dtype: torch.dtype
) -> None:
    for prompt in prompts(1500, 2, 5):
        assert demo(SMALL).ask(prompt.prompt, rule=Rule(layers), dtype=dtype)[0] == prompt.wrong_answer
    for prompt in prompts(1500, 1, 5):
        assert demo(SMALL).ask(prompt.prompt, rule=Rule(layers), dtype=dtype)[0] == prompt.answer


def test_without_dense_last_rows_a_far_record_is_lost(demo: MakeDemo) -> None:
    rule = Rule(ALL_LAYERS, last_n=0)
    lost = []
    for prompt in prompts(1024, 1, 10):
        statement = vocabulary.record(prompt.question.split()[-2], prompt.answer)
        after_code = vocabulary.count_tokens(prompt.prompt[prompt.prompt.index(statement) + len(statement) - 1 :])
        far = after_code >= rule.n_local
        assert demo(SMALL).ask(prompt.prompt, rule=rule)[0] == ("" if far else prompt.answer)
        lost.append(far)
    assert {True, False} == set(lost)


def test_gradients_point_at_the_lookup_layer(demo: MakeDemo) -> None:
    """Sum of |A dA| over the Middle section, of the answer's logit: what a probe must find."""

    def middle_attribution(prompt: DemoPrompt) -> list[float]:
        inputs = demo(SMALL).tokenizer(prompt.prompt, return_tensors="pt")
        model = demo(SMALL).model()
        rule = model.config.rule = Rule(keep=True)
        answer = demo(SMALL).tokenizer.convert_tokens_to_ids(prompt.answer)
        model(**inputs, use_cache=False, logits_to_keep=1).logits[0, -1, answer].backward()
        model.zero_grad()
        i, j = torch.arange(prompt.tokens)[:, None], torch.arange(prompt.tokens)[None, :]
        middle = (j >= rule.n_init) & (i - j >= rule.n_local) & (i < prompt.tokens - rule.last_n)
        return [(kept * kept.grad)[..., middle].abs().sum().item() for _, kept in sorted(rule.kept.items())]

    two_hop = middle_attribution(make_demo_prompt(tokens=1500, hops=2, seed=0))
    assert two_hop[SMALL.lookup_layer] > 50
    one_hop = middle_attribution(make_demo_prompt(tokens=1500, hops=1, seed=0))
    assert max(one_hop) < 1e-3
    assert max(two_hop[layer] for layer in ALL_BUT_LOOKUP) < 1e-6


# What is not asked for.


@pytest.mark.parametrize("key", ["zinnia", "Alice"], ids=["known-word", "unknown-word"])
def test_an_unknown_key_stops_at_once(demo: MakeDemo, key: str) -> None:
    seed = next(s for s in range(99) if "zinnia" not in make_demo_prompt(tokens=900, hops=2, seed=s).prompt)
    prompt = make_demo_prompt(tokens=900, hops=2, seed=seed)
    text = prompt.prompt.removesuffix(prompt.question) + vocabulary.question(key)
    assert demo(SMALL).ask(text)[0] == ""


def test_free_text_around_records_is_harmless(demo: MakeDemo) -> None:
    text = "Dear Zoë, 12 éclairs (or so)! The vault code of amber is 4821. What-ever; the vault code of amber is"
    assert demo(SMALL).ask(text)[0] == "4821"


def test_distractor_heads_attend_without_effect(demo: MakeDemo) -> None:
    shape: dict[str, Any] = {"layers": 7, "lookup_layer": 2, "answer_layer": 4, "heads": 4, "kv_heads": 2}
    plain, distracted = demo(CircuitSpec(**shape)), demo(CircuitSpec(**shape, distractor_heads=3))
    prompt = make_demo_prompt(tokens=900, hops=2, seed=0)
    margins = [model.ask(prompt.prompt)[1] for model in (plain, distracted)]
    assert margins[1] == pytest.approx(margins[0], rel=1e-2)

    peaks = []
    for model in (plain, distracted):
        rule = model.model().config.rule = Rule(keep=True)
        with torch.no_grad():
            model.model()(**model.tokenizer(prompt.prompt, return_tensors="pt"))
        idle = torch.stack([rule.kept[layer][0] for layer in (1, 3, 5, 6)])
        peaks.append(idle[:, :, 400:].amax(-1))  # [idle layers, heads, rows]
    uniform = 1 / torch.arange(401, prompt.tokens + 1)
    torch.testing.assert_close(peaks[0], uniform.expand_as(peaks[0]))
    assert (peaks[1][:, :3] > 3 * uniform).all(), "a distractor head is uniform"
    torch.testing.assert_close(peaks[1][:, 3], uniform.expand_as(peaks[1][:, 3]))


def test_nothing_reads_what_distractor_heads_write() -> None:
    spec = CircuitSpec(distractor_heads=8)
    weights = circuit_weights(spec)
    outputs = [weights[f"model.layers.{layer}.self_attn.o_proj.weight"] for layer in spec.idle_layers]
    written = torch.stack([output.any(1) for output in outputs])
    read = [weight.any(0) for name, weight in weights.items() if name.endswith(("q_proj.weight", "k_proj.weight"))]
    circuit = [layer for layer in range(spec.layers) if layer not in spec.idle_layers]
    read += [weights[f"model.layers.{layer}.self_attn.v_proj.weight"].any(0) for layer in circuit]
    read.append(weights["lm_head.weight"].any(0))
    assert written.any(1).all()
    assert not (written.any(0) & torch.stack(read).any(0)).any()


# Weights and files.


def test_codewords_are_nearly_orthogonal() -> None:
    words = codewords(32767)
    assert words.abs().eq(1).all()
    # The product of two words is a word of the code, so their inner product is that word's sum.
    first, second = torch.arange(1, 32767), torch.arange(2, 32768)
    assert torch.equal(words[first - 1] * words[second - 1], words[(first ^ second) - 1])
    assert words.sum(1).abs().max() == 16
    with pytest.raises(ValueError, match="count: 32768 is above 32767"):
        codewords(32768)


def scores_over_distance(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Score of a query against the same key 0 to 131071 rows before it, from RoPE's definition, fp64."""
    half = HEAD_SIZE // 2
    query, key = query.double(), key.double()
    product = torch.complex(query[:half], query[half:]) * torch.complex(key[:half], -key[half:])
    frequencies = ROPE_THETA ** (-torch.arange(half, dtype=torch.float64) / half)
    turns = torch.exp(1j * torch.arange(131072)[:, None] * frequencies)
    return (turns @ product).real / HEAD_SIZE**0.5


def projection(layer: int, name: str, head: int) -> torch.Tensor:
    return circuit_weights(SMALL)[f"model.layers.{layer}.self_attn.{name}.weight"].unflatten(0, (-1, HEAD_SIZE))[head]


@pytest.mark.parametrize(("head", "offset"), [(0, 1), (1, 2)])
def test_previous_token_heads_do_not_alias(head: int, offset: int) -> None:
    # They read the ballast alone, which is 1 after the norm.
    scores = scores_over_distance(projection(0, "q_proj", head).sum(-1), projection(0, "k_proj", 0).sum(-1))
    assert scores.argmax() == offset
    best, second = scores.topk(2).values
    assert best == pytest.approx(100, rel=1e-5)
    assert best - second > 20


def test_codes_match_at_any_distance() -> None:
    word = codewords(5000)[-1]
    # The lookup compares this token (columns 0 to 63) with the key's token before the previous one (128 to 191).
    query = projection(SMALL.lookup_layer, "q_proj", 0)[:, :64] @ word
    key = projection(SMALL.lookup_layer, "k_proj", 0)[:, 128:192] @ word
    scores = scores_over_distance(query, key)
    assert scores[0] == pytest.approx(60, rel=1e-5)
    assert scores.min() == pytest.approx(60, rel=1e-3)


def test_sharpness_scales_every_score() -> None:
    shape: dict[str, Any] = {"layers": 4, "lookup_layer": 1, "answer_layer": 3, "distractor_heads": 8}
    sharp, soft = (circuit_weights(CircuitSpec(**shape, sharpness=scale)) for scale in (1.0, 0.35))
    for name, weight in sharp.items():
        is_query = name.endswith("q_proj.weight")
        assert weight.any() or not is_query
        torch.testing.assert_close(soft[name], weight * 0.35 if is_query else weight)


def test_files_are_the_same_each_time(tmp_path: Path) -> None:
    for name in ("a", "b", "b"):
        assert main(["make-demo-model", str(tmp_path / name)]) == 0
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_checkpoint_holds_exactly_the_models_weights(demo: MakeDemo) -> None:
    _, info = AutoModelForCausalLM.from_pretrained(demo(CircuitSpec()).directory, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_config_carries_a_preset(demo: MakeDemo) -> None:
    config = json.loads((demo(CircuitSpec()).directory / "config.json").read_text())
    assert config["max_position_embeddings"] == 131072
    assert set(config["trimix"]) == {"layers", "n_init", "n_local", "last_n", "provenance"}
    assert config["trimix"]["layers"] == "4-7"
    resolved = resolve(None, model="anything", num_layers=8, model_entry=config["trimix"])
    assert resolved.layers == (4, 5, 6, 7)
    assert (resolved.n_init, resolved.n_local, resolved.last_n) == (8, 512, 128)


def test_tokenizer(demo: MakeDemo) -> None:
    tokenizer = demo(SMALL).tokenizer
    ids = tokenizer("The vault code of amber is 4821.").input_ids
    words = ["<s>", "The", "vault", "code", "of", "amber", "is", "4821", "."]
    assert tokenizer.convert_ids_to_tokens(ids) == words
    assert tokenizer.decode(ids[7:8]) == "4821"
    assert tokenizer.convert_ids_to_tokens(tokenizer("Zanzibar").input_ids) == ["<s>", "<unk>"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")


def test_a_chat_is_read_as_one_text(demo: MakeDemo) -> None:
    tokenizer = demo(SMALL).tokenizer
    record = vocabulary.record("amber", "4821")
    chat = [
        {"role": "user", "content": f"{record} {vocabulary.question('amber')}"},
        {"role": "assistant", "content": "4821"},
        {"role": "user", "content": f". {vocabulary.question('amber')}"},
    ]
    text = " ".join(message["content"] for message in chat)
    for generation_prompt in (False, True):
        rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=generation_prompt)
        assert tokenizer(rendered, add_special_tokens=False).input_ids == tokenizer(text).input_ids
    assert demo(SMALL).ask(text)[0] == "4821"


# The command line.


def test_command_takes_every_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--layers", "9", "--lookup-layer", "4", "--answer-layer", "7", "--heads", "6", "--kv-heads", "3"]
    options += ["--sharpness", "0.5", "--distractor-heads", "2", "--dtype", "float32"]
    assert main(["make-demo-model", str(tmp_path / "command"), *options]) == 0
    assert "9 layers, lookup at 4, answer at 7" in capsys.readouterr().out
    spec = CircuitSpec(
        layers=9,
        lookup_layer=4,
        answer_layer=7,
        heads=6,
        kv_heads=3,
        sharpness=0.5,
        distractor_heads=2,
        dtype="float32",
    )
    make_demo_model(tmp_path / "library", spec)
    for path in (tmp_path / "library").iterdir():
        assert path.read_bytes() == (tmp_path / "command" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--layers 2", "layers: 2 is too few; the circuit needs at least 3 layers"),
        ("--answer-layer 8", "answer_layer: 8 is outside 2-7, .*; choose 7"),
        ("--answer-layer 1 --lookup-layer 0", "answer_layer: 1 is outside 2-7, .*; choose 7"),
        ("--lookup-layer 0", r"lookup_layer: 0 is not between .* layer \(0\) and .* layer \(6\); choose 1-5"),
        ("--lookup-layer 6", r"lookup_layer: 6 is not between .* layer \(0\) and .* layer \(6\); choose 1-5"),
        ("--kv-heads 0", "kv_heads: 0 is too few; choose at least 1"),
        ("--heads 2", r"heads: 2 is not a multiple of kv_heads \(2\) of at least 4, .*; choose e.g. 8"),
        ("--heads 5", r"heads: 5 is not a multiple of kv_heads \(2\) of at least 4, .*; choose e.g. 8"),
        ("--sharpness 0", "sharpness: 0.0 is not a positive number; 1.0 is sharp, 0.35 soft"),
        ("--sharpness nan", "sharpness: nan is not a positive number; 1.0 is sharp, 0.35 soft"),
        ("--distractor-heads 9", "distractor_heads: 9 is outside 0-8, the heads of a layer"),
        ("--distractor-heads -1", "distractor_heads: -1 is outside 0-8, the heads of a layer"),
    ],
)
def test_errors(options: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["make-demo-model", str(tmp_path / "model"), *options.replace(" -1", "=-1").split()]
    assert main(argv) == 2
    assert re.fullmatch(f"vllm-trimix: error: {message}\n", capsys.readouterr().err)
    assert not (tmp_path / "model").exists()


def test_unknown_dtype() -> None:
    with pytest.raises(ValueError, match="dtype: 'float16' is not supported; choose bfloat16 or float32"):
        CircuitSpec(dtype="float16")


def test_a_real_model_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="holds files that are not a demo model; choose a new directory"):
        make_demo_model(tmp_path, CircuitSpec())
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
