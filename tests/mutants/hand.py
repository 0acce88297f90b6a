"""Mutants by hand: defects of the kind that this field has shipped, or that only this code can have.

By file and by the tests that must notice: the cheapest that do, not all.
"""

from __future__ import annotations

from typing import NamedTuple

from tests.mutants.bench import Mutant

PLAN = "tests/plan/test_plan.py"
ORACLE = "tests/plan/test_oracle.py::test_any_step_that_hypothesis_thinks_of[0]"
UPLOAD = "tests/backend/test_upload.py"
ADMISSION = "tests/backend/test_admission.py"
CPU = "tests/kernels/test_torch_cpu.py"
NUMERICS = "tests/kernels/test_cpu_numerics.py"
WORK = "tests/kernels/test_work_items.py"
SELECTION = "tests/patterns/test_selection.py"
TRUTH = "tests/patterns/test_truth.py"
TRITON = "tests/kernels/test_triton_triangle.py::test_matches_the_definition"
METAMORPHIC = "tests/metamorphic/test_metamorphic.py"
CONFIG = "tests/config/test_config.py"


class Group(NamedTuple):
    """Mutants of one file with the same tests: name, old text, new text."""

    path: str
    tests: tuple[str, ...]
    defects: tuple[tuple[str, str, str], ...]


_GROUPS = (
    Group(
        "vllm_trimix/patterns/triangle.py",
        (PLAN,),
        (
            ("n_init off by one", "(j < self.n_init)", "(j <= self.n_init)"),
            ("n_local not counting the query", "(i - j < self.n_local)", "(i - j <= self.n_local)"),
            ("last_n off by one", "(i >= prompt_len - self.last_n)", "(i >= prompt_len - self.last_n - 1)"),
            ("diagonal dropped", "(j <= i) & (", "(j < i) & ("),
            ("dense_len off by one", "+ self.n_local + self.last_n", "+ self.n_local + self.last_n + 1"),
            ("dense_len without the last rows", "+ self.n_local + self.last_n", "+ self.n_local"),
        ),
    ),
    Group(
        "vllm_trimix/plan.py",
        (PLAN,),
        (
            (
                "last_n by chunk instead of prompt",
                "body = max(0, min(prompt_rows, prompt_len - last_n - position))",
                "body = max(0, prompt_rows - last_n)",
            ),
            ("min_prompt_len off by one", "min_prompt_len - 1)", "min_prompt_len)"),
        ),
    ),
    Group(
        "vllm_trimix/plan.py",
        (PLAN, ORACLE),
        (
            (
                "opt-out leak: the request's reason is not asked",
                'step_reason or request.dense_reason or ("short_prompt"',
                'step_reason or ("short_prompt"',
            ),
            (
                "opt-out leak: the dynamic pattern's reason is not asked",
                "step_reason or request.dense_reason or request.dynamic_reason",
                "step_reason or request.dense_reason",
            ),
            (
                "decode routed sparse",
                "            dense.append(span)\n            rows[DECODE]",
                '            getattr(plan, "triangle", dense).append(span)\n            rows[DECODE]',
            ),
            (
                "last rows keep the chunk's position",
                "rest.append(Span(index, first_row + body, num_rows - body, position + body))",
                "rest.append(Span(index, first_row + body, num_rows - body, position))",
            ),
            (
                "a request's rows by its place among those that have rows",
                "span = Span(index, first_row",
                "span = Span(len(set(query_start_loc[: index + 1])) - 1, first_row",
            ),
            (
                "the dynamic choice looks from the last sparse row",
                "position), position + prompt_rows))",
                "position), position + body))",
            ),
        ),
    ),
    Group(
        "vllm_trimix/kernels/torch_cpu.py",
        (f"{CPU}::test_parameters",),
        (
            ("window by one key too long", "(i - j < n_local))", "(i - j <= n_local))"),
            ("sinks by one key too many", "visible = (j <= i) & ((j < n_init)", "visible = (j <= i) & ((j <= n_init)"),
            ("future keys of the tile", "visible = (j <= i) & (", "visible = (j < first + rows) & ("),
            (
                "GQA map swapped",
                "num_kv_heads, group, head_size)\n        q_tile = q_tile.permute(0, 2, 3, 1, 4)",
                "group, num_kv_heads, head_size)\n        q_tile = q_tile.permute(0, 3, 2, 1, 4)",
            ),
            (
                "uninitialised output: the last short tile",
                "while row < num_rows:",
                "while row + TILE_ROWS <= num_rows:",
            ),
            (
                "the window's first page rounded up",
                "base = max(0, span.position - n_local + 1) // block_size * block_size",
                "base = -(-max(0, span.position - n_local + 1) // block_size) * block_size",
            ),
            (
                "sinks of the batch's first request",
                "sink_pages = block_table[span.request,",
                "sink_pages = block_table[0,",
            ),
            (
                "pages of the batch's first request",
                "pages = block_table[span.request, base",
                "pages = block_table[0, base",
            ),
            ("every tile has the mask of the first", "_bias(min(first, steady),", "_bias(min(position, steady),"),
        ),
    ),
    Group(
        "vllm_trimix/kernels/torch_cpu.py",
        (f"{CPU}::test_heads",),
        (
            (
                "scale from a padded head size",
                "alpha=scale)",
                "alpha=scale * (q.shape[2] / 2 ** (q.shape[2] - 1).bit_length()) ** 0.5)",
            ),
        ),
    ),
    Group(
        "vllm_trimix/kernels/torch_cpu.py",
        (f"{CPU}::test_threads_batch_tiles",),
        (("tiles batched before the mask is steady", "if first >= steady and rows", "if rows"),),
    ),
    Group(
        "vllm_trimix/kernels/work_items.py",
        (WORK,),
        (
            ("tiles keep their span's position", "    tiles[:, 3] += offsets\n", ""),
            ("two tiles share partial results", "first_slots[owner] + part, WHOLE", "part, WHOLE"),
            ("window of an item off by one", "- n_local + 1, sparse[:, 6]", "- n_local + 2, sparse[:, 6]"),
            ("sinks counted twice", "- n_local + 1, sparse[:, 6])", "- n_local + 1, 0)"),
            (
                "keys after the last whole part dropped",
                "parts = -(-lengths // share)",
                "parts = np.maximum(1, lengths // share)",
            ),
            ("more partial results than the workspace holds", "spare = slots - len(lengths)", "spare = slots"),
        ),
    ),
    Group(
        "vllm_trimix/backend/pseudo_requests.py",
        (UPLOAD,),
        (
            ("dense rows with gaps taken for contiguous", "!= first_row + total:", "< first_row + total:"),
            (
                "dense rows gathered from where they will be",
                "np.repeat(first_rows - starts[:-1], num_rows)",
                "np.repeat(first_rows, num_rows)",
            ),
            (
                "pseudo-requests with the batch's first rows",
                "np.ascontiguousarray(table[:, 0])",
                "np.arange(len(table))",
            ),
        ),
    ),
    Group(
        "vllm_trimix/backend/upload.py",
        (UPLOAD,),
        (
            (
                "uploaded arrays overlap",
                "end += math.ceil(array.size / _ALIGNMENT) * _ALIGNMENT",
                "end += array.size // _ALIGNMENT * _ALIGNMENT",
            ),
        ),
    ),
    Group(
        "vllm_trimix/kernels/sparse_index.py",
        (f"{SELECTION}::test_the_lists_hold_the_mask_and_every_key_once",),
        (
            ("keys of listed blocks listed again", "keep = before & ~blocks.gather(2, wide)", "keep = before"),
            ("columns after the tile", "keep = before & ~blocks.gather(2, wide)", "keep = ~blocks.gather(2, wide)"),
        ),
    ),
    Group(
        "vllm_trimix/kernels/torch_sparse.py",
        ("tests/kernels/test_torch_sparse.py::test_heads",),
        (
            (
                "GQA map by remainder",
                "k[head // group], v[head // group]",
                "k[head % k.shape[0]], v[head % k.shape[0]]",
            ),
            ("future keys of the diagonal block", "visible = j <= i\n", "visible = j < end + 0 * i\n"),
        ),
    ),
    Group(
        "vllm_trimix/patterns/xattention.py",
        (f"{SELECTION}::test_what_kernels_rely_on",),
        (("a tile without its own block", "        blocks.diagonal(tiles.first, 1, 2).fill_(True)\n", ""),),
    ),
    Group(
        "vllm_trimix/patterns/selection.py",
        (f"{SELECTION}::test_merged_heads_see_what_they_saw_alone",),
        (("merged heads keep the first one's band", "band[heads] = part.band", "band[:] = part.band[:1]"),),
    ),
    Group(
        "vllm_trimix/patterns/vertical_slash.py",
        (f"{TRUTH}::test_selection_is_the_papers",),
        (("forced sinks left out", "        columns[:, :FORCED_COLUMNS] = math.inf\n", ""),),
    ),
    Group(
        "vllm_trimix/backend/dynamic.py",
        (f"{NUMERICS}::test_steps_of_dynamic_layers",),
        (
            ("all slabs write the first heads", "- position, heads.start)", "- position, 0)"),
            ("parts of a chunk write its first rows", "first_row + part.tiles.position - position,", "first_row,"),
            (
                "keys of another request's pages",
                "pages = self.block_table[request, : -(-num_keys // self.block_size)]",
                "pages = self.block_table[0, : -(-num_keys // self.block_size)]",
            ),
        ),
    ),
    Group(
        "vllm_trimix/backend/dynamic.py",
        ("tests/hostile/test_dynamic_memory.py::test_scores_of_a_long_chunk_are_bounded",),
        (
            (
                "a long chunk's scores of all heads at once",
                "min(MAX_KEY_BYTES // bytes_per_kv_head, MAX_CHOICE_BYTES // choice)",
                "MAX_KEY_BYTES // bytes_per_kv_head",
            ),
        ),
    ),
    Group(
        "vllm_trimix/patterns/estimate.py",
        (f"{TRUTH}::test_selection_is_the_papers",),
        (("a chunk's first, partial block overwritten", "out[:, bool(first) :][:, :whole]", "out[:, :whole]"),),
    ),
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
        (("fingerprint without the patterns", 'exclude={"dense_backend",', 'exclude={"shallow", "dense_backend",'),),
    ),
    Group(
        "vllm_trimix/backend/admission.py",
        (ADMISSION,),
        (
            (
                "cache_salt not set",
                "        if salt is not None:\n            request.cache_salt",
                "        if salt is None:\n            request.cache_salt",
            ),
            ("a tenant's own salt lost", 'f"{salt}:{request.cache_salt}"', "salt"),
            (
                "the decision not stamped",
                "            if request.sampling_params is not None:",
                "            if request.sampling_params is None:",
            ),
            (
                "the user's parameters changed",
                "request.sampling_params.extra_args = {**extra_args, DENSE_KEY: reason}",
                "params.extra_args = request.sampling_params.extra_args = {**extra_args, DENSE_KEY: reason}",
            ),
            ("reserved salts with a suffix accepted", "cache_salt.startswith(salt)", "cache_salt == salt"),
            ("opted out, yet in the triangle's namespace", "    if reason is not None:\n        return SALT\n", ""),
            ("streaming sessions not dense", "    if resumable:\n", "    if not params and resumable:\n"),
            (
                "connectors that ignore salts not refused",
                "    if name is None or name in SALT_AWARE_CONNECTORS:",
                "    if name is None or name:",
            ),
        ),
    ),
    Group(
        "vllm_trimix/backend/requests.py",
        ("scenario:preempted_and_resumed",),
        (("prefill_len for prompt_len", "prompt_len = new.prompt_len\n", "prompt_len = len(new.prefill_token_ids)\n"),),
    ),
    Group(
        "vllm_trimix/backend/requests.py",
        ("scenario:ids_reused",),
        (
            ("finished requests kept", "            self.requests.pop(req_id, None)\n", "            pass\n"),
            ("the admission's stamp not obeyed", "(params.extra_args or {}).get(DENSE_KEY)", "None"),
        ),
    ),
    Group(
        "vllm_trimix/backend/requests.py",
        ("scenario:rows_gathered_or_sliced",),
        (("rows in the order of the table", "[names.get(int(index)) for index in indices]", "list(names.values())"),),
    ),
    Group(
        "vllm_trimix/backend/requests.py",
        ("scenario:dummy_runs",),
        (("dummy runs planned", "        if dummy:\n", "        if dummy is None:\n"),),
    ),
    Group(
        "vllm_trimix/backend/requests.py",
        ("scenario:test_plans_only_the_step_being_executed",),
        (
            (
                "drafts planned with the target's step",
                "self._saved, _current = _current, None",
                "self._saved = _current",
            ),
        ),
    ),
    Group(
        "vllm_trimix/backend/builder.py",
        ("scenario:rows_gathered_or_sliced",),
        (
            (
                "plan of another step",
                "metadata.trimix = self._step_plan(plan, step, common_attn_metadata)",
                'metadata.trimix = vars(self).setdefault("_kept", self._step_plan(plan, step, common_attn_metadata))',
            ),
            (
                "dense remainder with other requests' lengths",
                "seq_lens=common.seq_lens[index],",
                "seq_lens=common.seq_lens[: len(index)],",
            ),
            (
                "dense remainder with other requests' pages",
                "common.block_table_tensor[index],",
                "common.block_table_tensor[: len(index)],",
            ),
            (
                "one dense builder for both batches",
                "self.dense_builder_cls(kv_cache_spec, layer_names, vllm_config, device, **kwargs) if impls",
                "self if impls",
            ),
            ("layer index off by one", "layer = extract_layer_index(name)", "layer = extract_layer_index(name) + 1"),
        ),
    ),
    Group(
        "vllm_trimix/backend/builder.py",
        ("scenario:single_rows_with_graphs",),
        (
            (
                "prompt chunks as wide as a decode not dense",
                "common.max_query_len <= self._decode_query_len",
                "common.max_query_len < self._decode_query_len",
            ),
        ),
    ),
    Group(
        "vllm_trimix/backend/impl.py",
        ("scenario:rows_gathered_or_sliced",),
        (
            (
                "uninitialised output: gathered rows not written back",
                "        if not isinstance(rows, slice):\n            output[rows] = part\n",
                "",
            ),
        ),
    ),
    Group(
        "vllm_trimix/kernels/triton_triangle.py",
        (f"{TRITON}[sinks-beyond-the-sequence]", f"{TRITON}[chunk-at-17]", f"{TRITON}[d48-float32]"),
        (
            (
                "Triton: window by one key too long",
                "scores = tl.where(age < window.to(tl.uint32, bitcast=True)",
                "scores = tl.where(age <= window.to(tl.uint32, bitcast=True)",
            ),
            ("Triton: sinks of the future", "(keys < num_sinks) & (keys <= position)", "(keys < num_sinks)"),
            (
                "Triton: scale from the padded head size",
                "    logit_scale = scale\n",
                "    logit_scale = scale * tl.sqrt(HEAD_SIZE * 1.0 / BLOCK_D)\n",
            ),
            (
                "Triton: KV head by quotient",
                "kv_head = (tl.program_id(0) % NUM_KV_HEADS)",
                "kv_head = (tl.program_id(0) // NUM_KV_HEADS % NUM_KV_HEADS)",
            ),
        ),
    ),
    Group(
        "vllm_trimix/kernels/triton_triangle.py",
        (f"{TRITON}[huge-output-stride]",),
        (
            (
                "Triton: int32 cast of the output's row",
                "first_token = tl.load(item_ptr + 1, volatile=True).to(tl.int64)",
                "first_token = tl.load(item_ptr + 1, volatile=True)",
            ),
        ),
    ),
)

MUTANTS = tuple(
    Mutant(name, group.path, old, new, group.tests) for group in _GROUPS for name, old, new in group.defects
)

FAST = (
    "n_local not counting the query",
    "last_n by chunk instead of prompt",
    "min_prompt_len off by one",
    "starting_layer one too late",
)
"""What the fast run tries: the cheapest."""
