"""Asks an exported model with transformers alone, as its model card says."""

import torch
from asking import MAX_NEW_TOKENS, messages_of, read_arguments, without_ends, write_answers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


def load(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
    return model.eval(), AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def ask(model, processor, requests):
    """(prompts, replies): token ids of one batch."""
    texts = [processor.apply_chat_template(messages_of(r), add_generation_prompt=True) for r in requests]
    images = [Image.open(path) for request in requests for path in request["images"]] or None
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    whole = (inputs["input_ids"], inputs["attention_mask"])
    prompts = [row[mask.bool()].tolist() for row, mask in zip(*whole, strict=True)]
    ends = {*model.generation_config.eos_token_id, model.generation_config.pad_token_id}
    return prompts, [without_ends(row, ends) for row in tokens[:, inputs["input_ids"].shape[1] :].tolist()]


def answers(model, processor, requests):
    single = [ask(model, processor, [request]) for request in requests]
    return {
        "prompts": [prompts[0] for prompts, _ in single],
        "alone": [replies[0] for _, replies in single],
        "together": ask(model, processor, requests)[1],
    }


if __name__ == "__main__":
    folder, requests, out = read_arguments()
    write_answers(out, ("transformers", "torch"), **answers(*load(folder), requests))
