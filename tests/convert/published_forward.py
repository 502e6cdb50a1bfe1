"""An independent torch assembly of the published forward pass, written from its description (arXiv 2504.00595).

Vision in timm's names and layout (fused qkv, pos_embed [1, P, D], an unused last block, norm and attention pool),
adaptive average pooling, the two linear layers, transformers' Qwen2 with rounded rotary inverse frequencies.
"""

import torch
from torch import nn
from torch.nn import functional


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, width))


class MLP(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(functional.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width, hidden, heads):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), MLP(width, hidden)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class AttentionPool(nn.Module):
    """Held by the published checkpoints and never run."""

    def __init__(self, width, hidden):
        super().__init__()
        self.latent = nn.Parameter(torch.zeros(1, 1, width))
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.norm, self.mlp = nn.LayerNorm(width), MLP(width, hidden)


class PublishedVision(nn.Module):
    def __init__(self, width, hidden, blocks, heads, patch, num_patches):
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, patch, patch)
        self.pos_embed = nn.Parameter(torch.zeros(1, num_patches, width))
        self.blocks = nn.ModuleList([Block(width, hidden, heads) for _ in range(blocks)])
        self.norm, self.attn_pool = nn.LayerNorm(width, eps=1e-6), AttentionPool(width, hidden)

    def forward(self, pixels):
        x = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks[:-1]:
            x = block(x)
        return x


def visual_tokens(features, projector, num_visual_tokens):
    """[images, P, D] -> [images, M, width of the decoder]."""
    images, patches, width = features.shape
    side, pooled_side = int(patches**0.5), int(num_visual_tokens**0.5)
    grid = features.transpose(1, 2).reshape(images, width, side, side)
    pooled = functional.adaptive_avg_pool2d(grid, (pooled_side, pooled_side))
    return projector(pooled.flatten(2).transpose(1, 2))


@torch.no_grad()
def published_logits(vision, projector, decoder, tokens, pixels, num_visual_tokens, image_token):
    """[T, V] of one row of token ids; the images take its placeholders in order."""
    embeddings = decoder.get_input_embeddings()(tokens[None])
    if len(pixels):
        visual = visual_tokens(vision(pixels), projector, num_visual_tokens)
        embeddings[0, tokens == image_token] = visual.reshape(-1, visual.shape[-1])
    return decoder(inputs_embeds=embeddings).logits[0]


def round_rotary(decoder):
    """The buffer cast of the published code: inverse frequencies in bfloat16, the rest as it is."""
    rotary = decoder.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.to(torch.bfloat16).float()
