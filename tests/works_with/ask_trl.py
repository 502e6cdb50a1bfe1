"""Trains an exported model for two steps with TRL's SFTTrainer, on conversations with one picture.

The answers before that stand in the common fields; the trained model stands in OUT.saved, its replies in "saved".
"""

import math
from tempfile import TemporaryDirectory

from ask_transformers import answers, load
from asking import messages_of, read_arguments, write_answers
from datasets import Dataset, Image, List
from trl import SFTConfig, SFTTrainer

STEPS = 2


def conversations(requests):
    """A data set of TRL's conversational kind: messages, and the pictures that their parts of type image stand for."""
    shown = [request for request in requests if len(request["images"]) == 1]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "a red square"}]}
    rows = {
        "messages": [[*messages_of(request), answer] for request in shown],
        "images": [request["images"] for request in shown],
    }
    return Dataset.from_dict(rows).cast_column("images", List(Image()))


def train(model, processor, requests):
    """Losses of the steps."""
    with TemporaryDirectory() as folder:
        options = SFTConfig(
            folder, max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-2, lr_scheduler_type="constant",
            use_cpu=True, bf16=False, logging_steps=1, save_strategy="no", report_to="none", max_length=None,
            shuffle_dataset=False, seed=0,
        )  # fmt: skip
        trainer = SFTTrainer(model, options, train_dataset=conversations(requests * 4), processing_class=processor)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    folder, requests, out = read_arguments()
    model, processor = load(folder)
    result = answers(model, processor, requests)
    losses = train(model, processor, requests)
    print("losses", losses)
    trained = answers(model.float().eval(), processor, requests)
    result["saved"] = trained["alone"]
    result["checks"] = {
        f"{STEPS} steps, loss falls": len(losses) == STEPS
        and all(map(math.isfinite, losses))
        and losses[1] < losses[0],
        "replies changed": trained["alone"] != result["alone"],
    }
    model.save_pretrained(f"{out}.saved")
    processor.save_pretrained(f"{out}.saved")
    write_answers(out, ("trl", "transformers", "torch"), **result)
