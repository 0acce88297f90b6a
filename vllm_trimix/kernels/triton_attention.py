"""What the attention kernels share on the device."""

import triton
import triton.language as tl


@triton.jit
def mask_of(is_row, offs_d, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    """Which elements of rows there are: all of HEAD_SIZE, nothing of the padding."""
    mask = is_row[:, None]
    if HEAD_SIZE != BLOCK_D:
        mask = mask & (offs_d < HEAD_SIZE)[None, :]
    return mask


@triton.jit
def key_rows(pages_ptr, keys, is_read, PAGE_SIZE: tl.constexpr, STRIDE_PAGE: tl.constexpr, STRIDE_TOKEN: tl.constexpr):
    """int64 offsets of one request's keys in a paged cache; only pages of keys that are read are looked up."""
    page = tl.load(pages_ptr + keys // PAGE_SIZE, mask=is_read, other=0).to(tl.int64)
    return page * STRIDE_PAGE + (keys % PAGE_SIZE).to(tl.int64) * STRIDE_TOKEN


@triton.jit
def load_rows(kv_ptr, rows, is_read, offs_d, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    """[keys, BLOCK_D] keys or values at ``rows``; zeros where none is read."""
    mask = mask_of(is_read, offs_d, HEAD_SIZE, BLOCK_D)
    return tl.load(kv_ptr + rows[:, None] + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def scores_of(q, k, SCORE_DTYPE: tl.constexpr):
    """[BLOCK_M, NUM_KEYS] fp32, without any scale."""
    return tl.dot(q, tl.trans(k.to(SCORE_DTYPE)), input_precision="ieee")


@triton.jit
def cap_scores(scores, logit_scale, soft_cap):
    """tanh of the capped logits, by an exponential that can't overflow."""
    capped = scores * (logit_scale / soft_cap)
    decay = tl.exp2(tl.abs(capped) * (-2.0 * 1.4426950408889634))
    magnitude = (1.0 - decay) / (1.0 + decay)
    return tl.where(capped < 0, -magnitude, magnitude)


@triton.jit
def accumulate(acc, row_max, row_sum, scores, v, exponent_scale, COMPUTE_DTYPE: tl.constexpr):
    """One step of the online softmax; ``row_max`` is in units of log2."""
    new_max = tl.maximum(row_max, tl.max(scores, 1) * exponent_scale)
    p = tl.exp2(scores * exponent_scale - new_max[:, None])
    rescale = tl.exp2(row_max - new_max)
    row_sum = row_sum * rescale + tl.sum(p, 1)
    acc = tl.dot(p.to(COMPUTE_DTYPE), v.to(COMPUTE_DTYPE), acc * rescale[:, None], input_precision="ieee")
    return acc, new_max, row_sum


@triton.jit
def logit_scales(
    scale,
    soft_cap,
    q_scale_ptr,
    k_scale_ptr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_Q_SCALE: tl.constexpr,
    HAS_K_SCALE: tl.constexpr,
):
    """Factor of the products to logits, and of what ``accumulate`` gets to units of log2."""
    LOG2E: tl.constexpr = 1.4426950408889634
    logit_scale = scale
    if HAS_Q_SCALE:
        logit_scale *= tl.load(q_scale_ptr)
    if HAS_K_SCALE:
        logit_scale *= tl.load(k_scale_ptr)
    return logit_scale, (soft_cap if HAS_SOFT_CAP else logit_scale) * LOG2E


@triton.jit
def before_any_key(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Where the online softmax starts: outputs, row maxima, row sums."""
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    # The lowest finite fp32, not -inf: a step that hides every key of a row must give exp2(-inf), never -inf + inf.
    row_max = tl.full([BLOCK_M], -3.4028234663852886e38, dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    return acc, row_max, row_sum


@triton.jit
def after_all_keys(acc, row_sum, v_scale_ptr, HAS_V_SCALE: tl.constexpr):
    """Where the online softmax ends: the outputs."""
    result = acc / row_sum[:, None]
    if HAS_V_SCALE:
        result *= tl.load(v_scale_ptr)
    return result


@triton.jit
def store_rows(out_ptr, rows, offs_d, mask, result):
    """Writes outputs [rows, BLOCK_D] at ``rows`` in the dtype of ``out_ptr``."""
    tl.store(out_ptr + rows[:, None] + offs_d[None, :], result.to(out_ptr.dtype.element_ty), mask=mask)
