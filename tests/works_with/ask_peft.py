"""Asks an exported model behind a LoRA adapter of PEFT: a fresh one, which changes nothing, and one with weights, which
is saved, loaded over the model again and merged; the merged model stands in OUT.saved, its replies in "saved".
"""

import torch
from ask_transformers import answers, load
from asking import read_arguments, write_answers
from peft import LoraConfig, PeftModel, get_peft_model


def with_weights(model):
    """The adapter with B no longer zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


if __name__ == "__main__":
    folder, requests, out = read_arguments()
    model, processor = load(folder)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj|down_proj)"))
    result = answers(adapted.eval(), processor, requests)
    with_weights(adapted).save_pretrained(f"{out}.adapter")
    changed = answers(adapted.eval(), processor, requests)
    merged = PeftModel.from_pretrained(load(folder)[0], f"{out}.adapter").merge_and_unload().eval()
    result["saved"] = answers(merged, processor, requests)["alone"]
    equal = result["saved"] == changed["alone"] == changed["together"]
    result["checks"] = {"adapter saved, loaded, merged: the same replies": equal}
    merged.save_pretrained(f"{out}.saved")
    processor.save_pretrained(f"{out}.saved")
    write_answers(out, ("peft", "transformers", "torch"), **result)
