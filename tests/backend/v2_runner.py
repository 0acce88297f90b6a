"""Model runner V2, its own in everything, with a model of four attention layers.

The layers' queries, keys and values are looked up by token id. A token's id says which request and position it stands
for, so that every row of every step can be compared with the definition, whatever order the runner put the rows in.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import get_forward_context, set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from vllm_trimix.patterns.a_shape import AShape
from vllm_trimix.patterns.base import DynamicPattern
from vllm_trimix.patterns.registry import describe
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.patterns.vertical_slash import VerticalSlash

PATTERN = Triangle(n_init=4, n_local=16, last_n=8)
TRIANGLE_LAYERS = (1, 3)
DYNAMIC_LAYERS = (0, 2)
NUM_LAYERS, HEAD_SIZE, BLOCK_SIZE, NUM_BLOCKS = 4, 32, 16, 64
MAX_LEN, MAX_NUM_REQS, MAX_REQUESTS = 256, 8, 24
DEVICE = torch.device("cpu")


def make_config(
    path: Path, *, num_heads: int, num_kv_heads: int, num_speculative_tokens: int = 0, shallow: bool = True
) -> Any:
    """The engine's configuration, made and resolved as vLLM does, for a Llama without weights."""
    path.mkdir(parents=True, exist_ok=True)
    model = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": num_heads * HEAD_SIZE,
        "intermediate_size": 64,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": HEAD_SIZE,
        "max_position_embeddings": 4 * MAX_LEN,
        "vocab_size": MAX_REQUESTS * MAX_LEN,
        "rms_norm_eps": 1e-6,
        "torch_dtype": "float32",
    }
    (path / "config.json").write_text(json.dumps(model))
    heads = [[describe(pattern) for pattern in dynamic_heads(layer, num_heads)] for layer in range(NUM_LAYERS)]
    (path / "heads.json").write_text(json.dumps({"format": "vllm-trimix-heads/1", "layers": heads}))
    trimix = {"layers": list(TRIANGLE_LAYERS), "min_prompt_len": 0, "stats_log_interval": 0.0}
    trimix.update(n_init=PATTERN.n_init, n_local=PATTERN.n_local, last_n=PATTERN.last_n)
    if shallow:
        trimix["shallow"] = {"heads": str(path / "heads.json"), "min_seq_len": 0}
    drafts = {"method": "ngram", "num_speculative_tokens": num_speculative_tokens, "prompt_lookup_max": 2}
    return EngineArgs(
        model=str(path),
        skip_tokenizer_init=True,
        dtype="float32",
        attention_backend="TRIMIX",
        additional_config={"trimix": trimix},
        max_model_len=MAX_LEN,
        max_num_seqs=MAX_NUM_REQS,
        max_num_batched_tokens=MAX_LEN,
        block_size=BLOCK_SIZE,
        speculative_config=drafts if num_speculative_tokens else None,
    ).create_engine_config()


def dynamic_heads(layer: int, num_heads: int) -> tuple[DynamicPattern, ...]:
    """Patterns of a layer's heads: all of one kind in layer 0, two kinds in each KV head's group elsewhere."""
    slash = VerticalSlash(vertical_size=30, slash_size=50)
    if layer == 0:
        return (slash,) * num_heads
    return tuple(AShape(n_init=2, n_local=30) if head % 2 else slash for head in range(num_heads))


def dense_backend(name: str) -> Any:
    """The stock backend of this name."""
    return resolve_obj_by_qualname(AttentionBackendEnum[name].value)


class Model(torch.nn.Module):
    """Attention layers over embeddings looked up by token id."""

    runner: Any

    def __init__(self, runner: Any, config: Any, backend: type, generator: torch.Generator) -> None:
        super().__init__()
        # Not a submodule.
        self.__dict__["runner"] = runner
        heads = config.model_config.get_num_attention_heads(config.parallel_config)
        kv_heads = config.model_config.get_num_kv_heads(config.parallel_config)
        self.scale = HEAD_SIZE**-0.5
        with set_current_vllm_config(config):
            self.layers = torch.nn.ModuleList(
                Attention(
                    heads,
                    HEAD_SIZE,
                    self.scale,
                    num_kv_heads=kv_heads,
                    cache_config=config.cache_config,
                    prefix=f"model.layers.{index}.self_attn.attn",
                    attn_backend=backend,
                )
                for index in range(NUM_LAYERS)
            )

        def table(num_heads: int) -> torch.Tensor:
            return torch.randn(NUM_LAYERS, MAX_REQUESTS * MAX_LEN, num_heads, HEAD_SIZE, generator=generator)

        self.q, self.k, self.v = table(heads), table(kv_heads), table(kv_heads)
        self.outputs: list[torch.Tensor] = []
        self.tokens: list[int] = []
        self.paths: list[str] = []

    def forward(self, *, input_ids: torch.Tensor, positions: torch.Tensor, **_: Any) -> torch.Tensor:
        context = get_forward_context()
        num_tokens = self.runner.num_scheduled_tokens
        ids = input_ids[:num_tokens].long()
        self.tokens, self.outputs = ids.tolist(), []
        assert not num_tokens or (ids % MAX_LEN).equal(positions[:num_tokens]), (ids, positions)
        metadata = context.attn_metadata or {}
        self.paths.append(_path(metadata.get(self.layers[-1].layer_name)))

        def rows(table: torch.Tensor) -> torch.Tensor:
            # Rows that only pad a graph may hold anything.
            values = torch.full((len(input_ids), *table.shape[1:]), float("nan"))
            values[:num_tokens] = table[ids]
            return values.flatten(1)

        for index, layer in enumerate(self.layers):
            out = layer(rows(self.q[index]), rows(self.k[index]), rows(self.v[index]))
            self.outputs.append(out[:num_tokens].view(num_tokens, *self.q.shape[2:]))
        return torch.zeros(len(input_ids), 1)


def _path(metadata: Any) -> str:
    """How a triangle layer runs under this metadata."""
    plan = getattr(metadata, "trimix", None)
    if plan is None:
        return "stock"
    return "triangle" if plan.dense_rows is None else "slice" if isinstance(plan.dense_rows, slice) else "gather"


def make_runner(model_runner: Any, config: Any, backend: type, *, layout: str, seed: int) -> Any:
    """A real runner with its KV cache, its attention groups and its graph dispatcher."""

    class Runner(model_runner.GPUModelRunner):
        num_scheduled_tokens = 0

    with set_current_vllm_config(config):
        runner = Runner(config, DEVICE)
        runner.model = Model(runner, config, backend, torch.Generator().manual_seed(seed))
        runner.model_state = DefaultModelState(config, runner.model, None, DEVICE)
        runner.decode_query_len = runner.num_speculative_steps + 1
        nothing = SimpleNamespace(
            add_request=lambda *_: None, remove_request=lambda *_: None, apply_staged_writes=lambda: None
        )
        runner.sampler = runner.prompt_logprobs_worker = nothing
        config.cache_config.kv_cache_layout = layout
        spec = runner.get_kv_cache_spec()
        runner.initialize_kv_cache(_kv_cache_config(config, spec))
    for layer in runner.model.layers:
        # Block 0, and every slot that no token is written to, hold NaN.
        layer.kv_cache.fill_(float("nan"))
    _replay_without_graphs(runner)
    return runner


def _kv_cache_config(config: Any, spec: dict[str, Any]) -> Any:
    memory = NUM_BLOCKS * sum(layer.page_size_bytes for layer in spec.values())
    try:
        from vllm.v1.core.kv_cache_planning import get_global_kv_cache_groups, get_kv_cache_configs
    except ImportError:
        # vLLM 0.32.
        from vllm.v1.core.kv_cache_utils import get_kv_cache_configs

        return get_kv_cache_configs(config, [spec], [memory])[0]
    return get_kv_cache_configs(config, [spec], [memory], get_global_kv_cache_groups(config, [spec]))[0]


def _replay_without_graphs(runner: Any) -> None:
    """A captured decode graph is the stock backend on the step's own buffers: it can't hold a plan."""
    manager = runner.cudagraph_manager
    manager._graphs_captured = True
    state: dict[str, Any] = {}

    def pre_forward(scheduler_output: Any, input_batch: Any, attn_metadata: Any = None) -> None:
        state.update(batch=input_batch, metadata=attn_metadata)

    def run_fullgraph(desc: Any) -> torch.Tensor:
        runner.full_graphs += 1
        batch, metadata = state["batch"], state["metadata"]
        if not runner.replays_plans:
            for layer_metadata in metadata.values():
                layer_metadata.trimix = layer_metadata.trimix_dynamic = None
        slots = next(iter(metadata.values())).slot_mapping
        with set_forward_context(
            metadata, runner.vllm_config, slot_mapping={layer.layer_name: slots for layer in runner.model.layers}
        ):
            return runner.model(input_ids=batch.input_ids, positions=batch.positions)

    runner.full_graphs, runner.replays_plans = 0, False
    runner.kv_connector = type(runner.kv_connector)()
    runner.kv_connector.pre_forward = pre_forward
    manager.run_fullgraph = run_fullgraph
