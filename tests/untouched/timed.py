"""An engine that times one job whenever it is asked: job on the first line of stdin, then a line for each time.

Between two jobs it waits for a line and uses no processor, so that two of them can take turns on one core.
"""

from __future__ import annotations

import json
import os
import sys
import time


def main(replies: int) -> None:
    job = json.loads(sys.stdin.readline())
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    llm = LLM(skip_tokenizer_init=True, enforce_eager=True, enable_prefix_caching=False, **job["engine"])
    params = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    with os.fdopen(replies, "w", buffering=1) as file:
        file.write(json.dumps(sorted(name for name in sys.modules if name.startswith("vllm_trimix"))) + "\n")
        while sys.stdin.readline():
            start, used = time.perf_counter(), time.process_time()
            llm.generate(prompts, params, use_tqdm=False)
            file.write(json.dumps([time.perf_counter() - start, time.process_time() - used]) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
