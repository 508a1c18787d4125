"""NumPy versions of motion self-attention, class-attention and the temporal encoder, from the papers' formulas; float64 inside."""

import numpy as np

from tests.models.oracles import attention_residual, dense, layer_norm, mlp_residual, ordered, scaled, softmax


def motion_attention(x, p, heads, grid, side):
    """MEViT eq. 8 on patches [B, T, N, D], one query at a time: its keys are the patches of all frames in the query's block."""
    batch, frames, n, width = x.shape
    d = width // heads
    q, k, v = np.split(dense(x, p["qkv"]), 3, axis=-1)
    block = [(i // grid[1] // side, i % grid[1] // side) for i in range(n)]
    out = np.zeros_like(x)
    for i in range(n):
        near = [j for j in range(n) if block[j] == block[i]]
        for b in range(batch):
            keys, values = k[b][:, near].reshape(-1, width), v[b][:, near].reshape(-1, width)
            for t in range(frames):
                for h in range(heads):
                    part = slice(h * d, (h + 1) * d)
                    weights = softmax(keys[:, part] @ q[b, t, i, part] / np.sqrt(d))
                    out[b, t, i, part] = weights @ values[:, part]
    return dense(out, p["proj"])


def motion_block(x, p, heads, grid, side, prefix, order):
    """A block on [B, T, prefix + N, D]: motion self-attention, spatial attention (in `order`) and MLP; one class token per video."""
    x = x.copy()

    def move():
        mixer = p["mixer"]
        residual = motion_attention(layer_norm(x[:, :, prefix:], mixer["temporal_norm"]), mixer["temporal_attn"], heads, grid, side)
        x[:, :, prefix:] += dense(residual, mixer["temporal_fc"]) if "temporal_fc" in mixer else residual

    if order == "time_space":
        move()
    residual = attention_residual(x, p, heads)
    for c in range(prefix):
        residual[:, :, c] = residual[:, :, c].mean(axis=1, keepdims=True)
    x += residual
    if order == "space_time":
        move()
    return x + mlp_residual(x, p)


def class_attention(x, p, norm, heads, prefix, token_is_key):
    """MEViT eqs. 10, 5 and 9 on [B, T, prefix + N, D], example by example and head by head; returns [B, D]."""
    batch, _, _, width = x.shape
    d = width // heads
    features = []
    for b in range(batch):
        patches, z = x[b, :, prefix:].reshape(-1, width), p["class_token"]
        for block in ordered(p["blocks"]):
            keys = layer_norm(np.concatenate([z[None], patches]) if token_is_key else patches, block["norm1"])
            q = np.split(dense(layer_norm(z, block["norm1"]), block["attn"]["qkv"]), 3)[0]
            _, k, v = np.split(dense(keys, block["attn"]["qkv"]), 3, axis=-1)
            s = [softmax(k[:, i : i + d] @ q[i : i + d] / np.sqrt(d)) @ v[:, i : i + d] for i in range(0, width, d)]
            z = z + scaled(dense(np.concatenate(s), block["attn"]["proj"]), block, "scale1")
            z = z + mlp_residual(z, block)
        features.append(layer_norm(z, norm))
    return np.stack(features)


def temporal_encoder(x, p, norm, heads, prefix):
    """ViViT's factorised encoder on [B, T, prefix + N, D] with as many rows of time as T; returns [B, D]."""
    x = layer_norm(x, norm)
    frames = x[:, :, 0] if prefix else x.mean(axis=2)
    z = np.concatenate([np.broadcast_to(p["class_token"], (len(x), 1, x.shape[-1])), frames + p["time"]], axis=1)
    for block in ordered(p["blocks"]):
        z = z + attention_residual(z, block, heads)
        z = z + mlp_residual(z, block)
    return layer_norm(z, p["norm"])[:, 0]
