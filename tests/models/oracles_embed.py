"""NumPy versions of embeddings for videos and of the models that differ by them: written out with loops, float64 inside."""

import numpy as np

from tests.models.oracles import attention_residual, dense, layer_norm, mlp_residual, ordered


def tubelets(pixels, p, patch, depth, time=False):
    """ViViT 3.2, tubelet embedding: uint8[B, F, H, W, 3] -> tokens [B, F / depth, N, D] with position (and time), and the class token [D].

    Videos have parameters of their own; a clip of one frame is an image. The kernel's inputs are frame, row, column and colour, slowest first. A
    position table of several time steps has their patches one after the other.
    """
    b, frames, height, width, _ = pixels.shape
    video = frames > 1
    proj, position, depth = (p["video_proj"], p["video_position"], depth) if video else (p["proj"], p["position"], 1)
    x = (pixels / 255.0 - 0.5) / 0.5
    kernel = proj["kernel"].reshape(depth, patch, patch, 3, -1)
    tokens = np.zeros((b, frames // depth, (height // patch) * (width // patch), kernel.shape[-1]))
    times = (len(position) - 1) // tokens.shape[2]
    for t in range(frames // depth):
        step = t * times // (frames // depth)
        for i in range(height // patch):
            for j in range(width // patch):
                tube = x[:, t * depth : (t + 1) * depth, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
                n = i * (width // patch) + j
                tokens[:, t, n] = np.einsum("btpqc,tpqcd->bd", tube, kernel) + proj["bias"] + position[1 + step * tokens.shape[2] + n]
        if time:
            tokens[:, t] += p["time"][t * len(p["time"]) // (frames // depth)]
    return tokens, p["class_token"] + position[0]


def encoder(x, blocks, heads):
    """Plain ViT blocks on [..., N, D]."""
    for block in ordered(blocks):
        x = x + attention_residual(x, block, heads)
        x = x + mlp_residual(x, block)
    return x


def vivit(pixels, p, heads, patch, depth, time=True):
    """ViViT 3.3, model 1: all tubelets of a clip and one class token in one sequence."""
    tokens, token = tubelets(pixels, p["embed"], patch, depth, time)
    b, _, _, width = tokens.shape
    x = np.concatenate([np.broadcast_to(token, (b, 1, width)), tokens.reshape(b, -1, width)], axis=1)
    return layer_norm(encoder(x, p["blocks"], heads), p["norm"])[:, 0]


def space_only(pixels, p, heads, patch):
    """TimeSformer's space-only attention as its code has it: frames are examples, then the mean of all tokens over them, then the last norm."""
    b, frames = pixels.shape[:2]
    proj, position = p["embed"]["proj"], p["embed"]["position"]
    x = (pixels.reshape(b * frames, *pixels.shape[2:]) / 255.0 - 0.5) / 0.5
    rows, columns = x.shape[1] // patch, x.shape[2] // patch
    squares = [x[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch].reshape(b * frames, -1) for i in range(rows) for j in range(columns)]
    tokens = np.stack([np.broadcast_to(p["embed"]["class_token"], (b * frames, position.shape[1]))] + [dense(s, proj) for s in squares], axis=1)
    tokens = encoder(tokens + position, p["blocks"], heads)
    return layer_norm(tokens.reshape(b, frames, *tokens.shape[1:]).mean(axis=1), p["norm"])[:, 0]
