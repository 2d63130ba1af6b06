"""Run by sampler_vllm.py in vLLM's own environment: MODEL ADAPTER REQUESTS.json.

Every line on standard input asks for one round; the answer is a line with its CPU seconds, and the
first also has the tokens. Nothing of this project is imported here.
"""

import json
import os
import sys
import time

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that its CPU time is this process's
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ["HF_HUB_OFFLINE"] = "1"


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM's own words go to standard error
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]
    from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]

    model, adapter, file = sys.argv[1:]
    with open(file) as opened:
        requests = json.load(opened)
    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        enable_lora=True,
        max_lora_rank=16,
        max_model_len=1024,
        max_num_seqs=64,
        enable_prefix_caching=False,
    )
    params = [
        SamplingParams(temperature=0.0, max_tokens=r["output_tokens"], ignore_eos=True)
        for r in requests
    ]
    prompts = [{"prompt_token_ids": r["prompt"]} for r in requests]
    lora = LoRARequest("bench", 1, adapter)
    for _ in sys.stdin:
        started_cpu, started = time.process_time(), time.perf_counter()
        outputs = llm.generate(prompts, params, lora_request=lora, use_tqdm=False)
        # Whichever is less, so that threads which wait by spinning do not count.
        seconds = min(time.process_time() - started_cpu, time.perf_counter() - started)
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        print(json.dumps({"seconds": seconds, "tokens": tokens}), file=answers, flush=True)


if __name__ == "__main__":
    main()
