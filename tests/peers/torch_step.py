"""The published train step in PyTorch, assembled from transformers' SigLIP and Qwen2, to time ours against.

Two forms, on the same weights and the same packed rows:

    published   as the published code computes: every position's logits, attention over the whole row (positions run
                through it), every decoder layer checkpointed, SDPA, AdamW; means of microbatches averaged
    best        what PyTorch can do for the same training: documents that do not see each other (flex_attention, or SDPA
                with a dense mask where its backward pass is missing), logits of labelled positions only in chunks,
                their gradients formed while they exist, torch.compile of the decoder's layers, no checkpointing, fused
                AdamW, loss over the global count

Both run the encoder's 26 of 27 blocks without gradients on real images only; bfloat16 autocast on a GPU, float32 on a
CPU.
"""

import contextlib

import numpy as np
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from convert.weight_map import weights_of
from oq2vl_jax.config import TrainConfig
from oq2vl_jax.data.loading.batch import IGNORE, Batch

LOSS_CHUNK = 512


def tensors_of(layout: str, arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Our parameters as a Hugging Face state dict, through the weight table."""
    state = {}
    for weight in weights_of(layout, {name: array.shape for name, array in arrays.items()}):
        parts = [arrays[name] if weight.layer is None else arrays[name][weight.layer] for name in weight.row.ours]
        state[weight.theirs] = torch.from_numpy(np.array(weight.row.transform.to_theirs(parts), order="C"))
    return state


class TorchStep:
    """One optimizer step after the other; `step(batch)` returns the loss in nats per labelled token."""

    def __init__(self, config: TrainConfig, arrays: dict[str, np.ndarray], is_best: bool):
        vision, decoder = config.model.vision, config.model.decoder
        self.config, self.is_best = config, is_best
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        with torch.device(self.device):  # where filling it with random numbers is quick
            self.vision = SiglipVisionModel(
                SiglipVisionConfig(
                    hidden_size=vision.hidden_size, intermediate_size=vision.intermediate_size,
                    num_hidden_layers=vision.num_layers - 1, num_attention_heads=vision.num_heads,
                    image_size=vision.image_size, patch_size=vision.patch_size, layer_norm_eps=vision.layer_norm_eps,
                    hidden_act="gelu", vision_use_head=False, attn_implementation="sdpa",
                )
            )  # fmt: skip
        missing, unexpected = self.vision.load_state_dict(
            {name.removeprefix("vision_model."): x for name, x in tensors_of("siglip", arrays).items()}
            if not any(name.startswith("vision_model.") for name in self.vision.state_dict())
            else tensors_of("siglip", arrays),
            strict=False,
        )
        assert not unexpected, unexpected
        assert all("post_layernorm" in name for name in missing), missing
        self.vision.requires_grad_(False).to(self.device)
        self.fc1 = torch.nn.Linear(vision.hidden_size, decoder.hidden_size)
        self.fc2 = torch.nn.Linear(decoder.hidden_size, decoder.hidden_size)
        for layer, name in ((self.fc1, "projector.fc1"), (self.fc2, "projector.fc2")):
            layer.weight.data = torch.from_numpy(arrays[f"{name}.kernel"].T.copy())
            layer.bias.data = torch.from_numpy(arrays[f"{name}.bias"].copy())
        with torch.device(self.device):
            self.decoder = Qwen2ForCausalLM(
                Qwen2Config(
                    vocab_size=decoder.vocab_size, hidden_size=decoder.hidden_size,
                    intermediate_size=decoder.intermediate_size, num_hidden_layers=decoder.num_layers,
                    num_attention_heads=decoder.num_heads, num_key_value_heads=decoder.num_kv_heads,
                    rope_parameters={"rope_theta": decoder.rope_theta, "rope_type": "default"},
                    rms_norm_eps=decoder.rms_norm_eps, tie_word_embeddings=decoder.tie_word_embeddings,
                    max_position_embeddings=config.data.num_tokens, attn_implementation="sdpa",
                )
            )  # fmt: skip
        self.decoder.load_state_dict(tensors_of("qwen2", arrays), strict=False)
        for module in (self.fc1, self.fc2, self.decoder):
            module.to(self.device)
        self.parameters = [p for m in (self.fc1, self.fc2, self.decoder) for p in m.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.optimizer.learning_rate,
            weight_decay=config.optimizer.weight_decay,
            fused=is_best,
        )
        self.run_layer = torch.compile(self.layer, dynamic=False) if is_best else self.layer

    def step(self, batch: Batch) -> float:
        """All microbatches of one global batch, one update."""
        rows, num_rows = self.config.rows_per_device or len(batch.tokens), len(batch.tokens)
        total = 0.0
        num_labelled = max(int((batch.labels != IGNORE).sum()), 1)
        for first in range(0, num_rows, rows):
            part = Batch(
                *(torch.from_numpy(np.ascontiguousarray(x[first : first + rows])).to(self.device) for x in batch)
            )
            if self.is_best:
                total += self.backward_in_chunks(part, num_labelled)
                continue
            with self.autocast():
                loss = self.losses(part).mean() * rows / num_rows
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def autocast(self):
        return torch.autocast("cuda", torch.bfloat16) if self.device == "cuda" else contextlib.nullcontext()

    def losses(self, batch: Batch) -> torch.Tensor:
        """Cross entropies of the labelled positions of a microbatch, from the logits of all."""
        logits = self.decoder.lm_head(self.hidden_states(batch)).float()
        is_labelled = batch.labels != IGNORE
        return functional.cross_entropy(logits[is_labelled], batch.labels[is_labelled].long(), reduction="none")

    def backward_in_chunks(self, batch: Batch, num_labelled: int) -> float:
        """Share of a microbatch in the loss. A chunk's gradients are formed while its logits exist."""
        is_labelled = batch.labels != IGNORE
        with self.autocast():
            hidden = self.hidden_states(batch)[is_labelled]
        targets, leaf = batch.labels[is_labelled].long(), hidden.detach().requires_grad_()
        total = 0.0
        for i in range(0, len(leaf), LOSS_CHUNK):
            with self.autocast():
                logits = self.decoder.lm_head(leaf[i : i + LOSS_CHUNK]).float()
            loss = functional.cross_entropy(logits, targets[i : i + LOSS_CHUNK], reduction="sum") / num_labelled
            loss.backward()
            total += float(loss.detach())
        hidden.backward(leaf.grad)
        return total

    def hidden_states(self, batch: Batch) -> torch.Tensor:
        x = self.decoder.model.embed_tokens(batch.tokens)
        x = x.masked_scatter(
            (batch.tokens == self.config.model.image_token_id)[..., None], self.visual_tokens(batch).to(x.dtype)
        )
        positions, mask = self.positions_and_mask(batch)
        rope = self.decoder.model.rotary_emb(x, positions)
        for layer in self.decoder.model.layers:
            if self.is_best:
                x = self.run_layer(layer, x, rope, mask)
            else:
                x = checkpoint(self.run_layer, layer, x, rope, mask, use_reentrant=False)
        return self.decoder.model.norm(x)

    def visual_tokens(self, batch: Batch) -> torch.Tensor:
        """[images of the microbatch, M, D]: real images only."""
        model = self.config.model
        counts = (batch.tokens == model.image_token_id).sum(1) // model.num_visual_tokens
        is_real = torch.arange(batch.images.shape[1], device=self.device) < counts[:, None]
        pixels = batch.images[is_real].permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            features = self.vision(pixels, output_hidden_states=True).hidden_states[-1]
        side, pooled = model.vision.patches_per_side, int(model.num_visual_tokens**0.5)
        grid = features.transpose(1, 2).reshape(len(features), -1, side, side)
        tokens = functional.adaptive_avg_pool2d(grid, pooled).flatten(2).transpose(1, 2)
        return self.fc2(functional.gelu(self.fc1(tokens)))

    def positions_and_mask(self, batch: Batch):
        if not self.is_best:
            return torch.arange(batch.tokens.shape[1], device=self.device)[None], None
        segments = batch.segment_ids
        if self.device == "cuda":
            from torch.nn.attention.flex_attention import create_block_mask

            def same_document(b, h, q, k):
                return (q >= k) & (segments[b, q] == segments[b, k])

            return batch.positions, create_block_mask(same_document, len(segments), None, *(segments.shape[1],) * 2)
        causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool).tril()
        return batch.positions, ((segments[:, :, None] == segments[:, None, :]) & causal)[:, None]

    def layer(self, layer, x: torch.Tensor, rope, mask) -> torch.Tensor:
        """transformers' Qwen2 layer with its own weights and rotary embedding; the attention of this form."""
        attn, shape = layer.self_attn, (*x.shape[:2], -1, self.config.model.decoder.head_dim)
        normed = layer.input_layernorm(x)
        q, k, v = (f(normed).view(shape).transpose(1, 2) for f in (attn.q_proj, attn.k_proj, attn.v_proj))
        q, k = apply_rotary_pos_emb(q, k, *rope)
        if mask is not None and self.device == "cuda":
            from torch.nn.attention.flex_attention import flex_attention

            attended = flex_attention(q, k, v.to(q.dtype), block_mask=mask, enable_gqa=True)
        else:
            attended = functional.scaled_dot_product_attention(
                q, k, v.to(q.dtype), attn_mask=mask, is_causal=mask is None, enable_gqa=True
            )
        x = x + attn.o_proj(attended.transpose(1, 2).reshape(*x.shape[:2], -1))
        return x + layer.mlp(layer.post_attention_layernorm(x))
