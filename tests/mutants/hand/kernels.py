"""Defects of the kernels and of the tiles and lists that they are given."""

from __future__ import annotations

from tests.mutants.hand.group import SELECTION, Group

CPU = "tests/kernels/test_torch_cpu.py"
WORK = "tests/kernels/test_work_items.py"
TRITON = "tests/kernels/test_triton_triangle.py::test_matches_the_definition"

GROUPS = (
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
                "        scale, soft_cap, q_scale_ptr, k_scale_ptr,",
                "        scale * tl.sqrt(HEAD_SIZE * 1.0 / BLOCK_D), soft_cap, q_scale_ptr, k_scale_ptr,",
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
