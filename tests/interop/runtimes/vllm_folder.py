"""vLLM on a CPU, formats `compressed-tensors` and `awq`; bfloat16, on packed weights. It tells log-probabilities, not logits."""

import os

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

from protocol import Answer, Task, counted, serve
from vllm import LLM, SamplingParams


def compute(task: Task) -> Answer:
    """On vLLM's quantized layers, which its CPU kernels run packed."""
    longest = max(map(len, task.windows))
    llm = LLM(
        str(task.folder), dtype="bfloat16", max_model_len=longest + task.n_new + 1, max_num_seqs=1, enforce_eager=True,
        skip_tokenizer_init=True, enable_prefix_caching=False,
    )  # fmt: skip
    score = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, detokenize=False)
    logprobs = [
        [told[token].logprob for token, told in zip(window[1:], output.prompt_logprobs[1:], strict=True)]
        for window in task.windows
        for output in llm.generate({"prompt_token_ids": window}, score, use_tqdm=False)
    ]
    write = SamplingParams(max_tokens=task.n_new, temperature=0, ignore_eos=True, detokenize=False)
    (written,) = llm.generate({"prompt_token_ids": task.prompt}, write, use_tqdm=False)
    (layers,) = llm.apply_model(kernels)
    return Answer(list(written.outputs[0].token_ids), layers, logprobs=logprobs)


def kernels(model) -> str:
    """What computes with each quantized layer; vLLM has fused some."""
    schemes = (getattr(module, "scheme", None) or getattr(module, "quant_method", None) for module in model.modules())
    found = (type(getattr(scheme, "kernel", scheme)).__name__ for scheme in schemes if scheme is not None)
    return counted(name for name in found if not name.startswith("Unquantized") and "KVCache" not in name)


if __name__ == "__main__":
    serve(compute, ["vllm-cpu", "compressed-tensors", "transformers"])
