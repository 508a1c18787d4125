"""NumPy versions of the model's parts, written from the papers' formulas with loops where that is plainer; float64 inside."""

import math

import numpy as np
from flax import nnx

_erf = np.vectorize(math.erf)


def params_of(module) -> dict:
    return numpy_tree(nnx.to_pure_dict(nnx.state(module, nnx.Param)))


def numpy_tree(tree):
    return {str(k): numpy_tree(v) for k, v in tree.items()} if isinstance(tree, dict) else np.asarray(tree, np.float64)


def dense(x, p):
    return x @ p["kernel"] + p["bias"]


def layer_norm(x, p, eps=1e-6):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attention(x, p, heads):
    """Multi-head self-attention over the last but one axis of [..., N, D]."""
    width = x.shape[-1]
    d = width // heads
    q, k, v = np.split(dense(x, p["qkv"]), 3, axis=-1)
    out = np.zeros_like(q)
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        weights = softmax(q[..., part] @ np.swapaxes(k[..., part], -1, -2) / np.sqrt(d))
        out[..., part] = weights @ v[..., part]
    return dense(out, p["proj"])


def mlp(x, p, tanh=False):
    hidden = dense(x, p["fc1"])
    if tanh:
        hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    else:
        hidden = 0.5 * hidden * (1 + _erf(hidden / np.sqrt(2)))
    return dense(hidden, p["fc2"])


def scaled(residual, block, name):
    """LayerScale, where the block has it."""
    return residual * block[name]["gamma"] if name in block else residual


def attention_residual(x, block, heads):
    """What a block's attention adds to [..., N, D]."""
    return scaled(attention(layer_norm(x, block["norm1"]), block["attn"], heads), block, "scale1")


def mlp_residual(x, block):
    """What a block's MLP adds to [..., D]."""
    return scaled(mlp(layer_norm(x, block["norm2"]), block["mlp"]), block, "scale2")


def embed(pixels, p, patch, mean=0.5, std=0.5, time=False):
    """uint8[B, T, H, W, 3] -> patches [B, T, N, D] (with position and time) and the class token [D] (with position)."""
    b, t, height, width, _ = pixels.shape
    x = (pixels / 255.0 - mean) / std
    tokens = []
    for i in range(height // patch):
        for j in range(width // patch):
            square = x[:, :, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
            tokens.append(dense(square.reshape(b, t, -1), p["proj"]))
    patches = np.stack(tokens, axis=2) + p["position"][1:]
    if time:
        patches = patches + p["time"][None, :, None]
    return patches, p["class_token"] + p["position"][0]


def frame_wise(pixels, p, heads, patch):
    """IV-ViT 3.2: each frame through the image ViT; class tokens averaged over frames (eq. 5). Returns features [B, D]."""
    patches, token = embed(pixels, p["embed"], patch)
    features = []
    for t in range(pixels.shape[1]):
        x = np.concatenate([np.broadcast_to(token, (len(pixels), 1, token.size)), patches[:, t]], axis=1)
        for block in ordered(p["blocks"]):
            x = x + attention_residual(x, block, heads)
            x = x + mlp_residual(x, block)
        features.append(layer_norm(x, p["norm"])[:, 0])
    return np.mean(features, axis=0)


def divided(pixels, p, heads, patch, skip_images=False):
    """TimeSformer, divided attention, one class token per video, in the order of the published code."""
    patches, token = embed(pixels, p["embed"], patch, time=True)
    b, frames, n, width = patches.shape
    cls = np.broadcast_to(token, (b, width)).copy()
    for block in ordered(p["blocks"]):
        if not (skip_images and frames == 1):
            mixer, moved = block["mixer"], np.zeros_like(patches)
            for i in range(n):  # each place over time
                y = attention(layer_norm(patches[:, :, i], mixer["temporal_norm"]), mixer["temporal_attn"], heads)
                moved[:, :, i] = dense(y, mixer["temporal_fc"])
            patches = patches + moved
        cls_residuals, spatial = [], np.zeros_like(patches)
        for t in range(frames):
            y = attention_residual(np.concatenate([cls[:, None], patches[:, t]], axis=1), block, heads)
            cls_residuals.append(y[:, 0])
            spatial[:, t] = y[:, 1:]
        cls, patches = cls + np.mean(cls_residuals, axis=0), patches + spatial
        cls = cls + mlp_residual(cls, block)
        patches = patches + mlp_residual(patches, block)
    return layer_norm(cls, p["norm"])


def joint(pixels, p, heads, patch):
    """TimeSformer, joint attention: one sequence of 1 + T N tokens."""
    patches, token = embed(pixels, p["embed"], patch, time=True)
    b, frames, n, width = patches.shape
    x = np.concatenate([np.broadcast_to(token, (b, 1, width)), patches.reshape(b, frames * n, width)], axis=1)
    for block in ordered(p["blocks"]):
        x = x + attention_residual(x, block, heads)
        x = x + mlp_residual(x, block)
    return layer_norm(x, p["norm"])[:, 0]


def shift(x, fold, next_first=True):
    """Token shift of [B, T, D], channel by channel."""
    out = x.copy()
    frames = x.shape[1]
    for t in range(frames):
        for c in range(2 * fold):
            source = t + 1 if (c < fold) == next_first else t - 1
            out[:, t, c] = x[:, source, c] if 0 <= source < frames else 0
    return out


def token_shift(pixels, p, heads, patch, fold, tokens, next_first):
    """TokenShift: the shift acts on the residual stream before each of the two sublayers."""
    patches, token = embed(pixels, p["embed"], patch)
    b, frames, n, width = patches.shape
    x = np.concatenate([np.broadcast_to(token, (b, frames, 1, width)), patches], axis=2)

    def moved(x):
        x = x.copy()
        for i in range(n + 1 if tokens == "all" else 1):
            if frames > 1:
                x[:, :, i] = shift(x[:, :, i], fold, next_first)
        return x

    for block in ordered(p["blocks"]):
        x = moved(x)
        x = x + attention_residual(x, block, heads)
        x = moved(x)
        x = x + mlp_residual(x, block)
    return layer_norm(x, p["norm"])[:, :, 0].mean(1)


def ordered(blocks):
    return [blocks[str(i)] for i in range(len(blocks))]
