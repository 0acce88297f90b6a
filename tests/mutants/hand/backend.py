"""Defects of the backend: requests, their admission, the steps' metadata and what is computed from it."""

from __future__ import annotations

from tests.mutants.hand.group import ADMISSION, Group

UPLOAD = "tests/backend/test_upload.py"
NUMERICS = "tests/kernels/test_cpu_numerics.py"

GROUPS = (
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
        "vllm_trimix/backend/dynamic/prefill.py",
        (f"{NUMERICS}::test_steps_of_dynamic_layers",),
        (
            ("all slabs write the first heads", "- position, heads.start)", "- position, 0)"),
            ("parts of a chunk write its first rows", "first_row + part.tiles.position - position,", "first_row,"),
        ),
    ),
    Group(
        "vllm_trimix/backend/dynamic/cpu_pages.py",
        (f"{NUMERICS}::test_steps_of_dynamic_layers",),
        (
            (
                "keys of another request's pages",
                "pages = self.block_table[request, : -(-num_keys // self.block_size)]",
                "pages = self.block_table[0, : -(-num_keys // self.block_size)]",
            ),
        ),
    ),
    Group(
        "vllm_trimix/backend/dynamic/layer_patterns.py",
        ("tests/hostile/test_dynamic_memory.py::test_scores_of_a_long_chunk_are_bounded",),
        (
            (
                "a long chunk's scores of all heads at once",
                "min(max_key_bytes // bytes_per_kv_head, max_choice_bytes // choice)",
                "max_key_bytes // bytes_per_kv_head",
            ),
        ),
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
            ("streaming sessions not dense", "    if resumable:\n", "    if not params and resumable:\n"),
        ),
    ),
    Group(
        "vllm_trimix/backend/namespaces.py",
        (ADMISSION,),
        (
            ("opted out, yet in the triangle's namespace", "    if reason is not None:\n        return SALT\n", ""),
            (
                "connectors that ignore salts not refused",
                "return None if name in SALT_AWARE_CONNECTORS else",
                "return None if name else",
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
        ),
    ),
    Group(
        "vllm_trimix/backend/split_step.py",
        ("scenario:rows_gathered_or_sliced",),
        (
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
        ),
    ),
    Group(
        "vllm_trimix/backend/builder.py",
        ("scenario:rows_gathered_or_sliced",),
        (
            (
                "one dense builder for both batches",
                "self.dense_builder_cls(kv_cache_spec, layer_names, vllm_config, device, **kwargs) if ours",
                "self if ours",
            ),
        ),
    ),
    Group(
        "vllm_trimix/backend/layer_binding.py",
        ("scenario:rows_gathered_or_sliced",),
        (("layer index off by one", "layer = layer_of(name)", "layer = layer_of(name) + 1"),),
    ),
    Group(
        "vllm_trimix/backend/compat.py",
        ("tests/startup/test_layer_numbers.py",),
        (
            ("shared blocks one after the other", "hybrid_layer_ids[block::num_blocks]", "hybrid_layer_ids[block:]"),
            ("the last number of a name", 'part in name.split(".")', 'part in reversed(name.split("."))'),
        ),
    ),
    Group(
        "vllm_trimix/backend/settings.py",
        ("tests/startup/test_layer_numbers.py",),
        (("a window as long as the context", "int(size) < max_model_len", "int(size) <= max_model_len"),),
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
)
