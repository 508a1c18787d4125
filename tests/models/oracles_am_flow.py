"""NumPy versions of AM Flow's parts, with loops where that is plainer; float64 inside. Parameters are nested dicts of arrays."""

import numpy as np

from tests.models.oracles import attention_residual, dense, embed, layer_norm, mlp_residual, ordered, softmax


def soft_sums(logits, axis):
    """softmax over `axis` ("keys" or "queries") of [N, N], summed over the other."""
    return softmax(logits).sum(0) if axis == "keys" else softmax(logits.T).sum(0)


def maps(q, k, heads_mean):
    """Eq. 2 for q, k [N, H, d] of a frame: a list of [N, N], one per head or their mean."""
    each = [q[:, h] @ k[:, h].T / np.sqrt(q.shape[-1]) for h in range(q.shape[1])]
    return [np.mean(each, axis=0)] if heads_mean else each


def flow(q, k, settings, prefix, encoder=None):
    """Eqs. 2-5 for q, k [B, T, N, H, d]; returns [B, T, N, 1 or H]."""
    batch, frames, tokens, heads, _ = q.shape
    mean, first = settings.flow_heads == "mean", prefix if settings.flow_tokens == "patches" else 0
    result = np.zeros((batch, frames, tokens, 1 if mean else heads))
    for b in range(batch):
        attentions = [maps(q[b, t, first:], k[b, t, first:], mean) for t in range(frames)]
        if settings.flow == "aligned":
            aligned = align([np.stack([summed(a, settings) for a in attentions[t]], -1) for t in range(frames)], settings, encoder)
        for t in range(frames - 1):
            if settings.flow == "aligned":
                change = np.abs(aligned[t] - aligned[t + 1])
            else:
                pairs = zip(attentions[t], attentions[t + 1], strict=True)
                change = np.stack([soft_sums(np.abs(a - after), settings.flow_softmax) for a, after in pairs], -1)
            result[b, t, first:] = change
        if frames > 1 and settings.flow_last == "repeat":
            result[b, -1] = result[b, -2]
    result[:, :, :prefix] = 0
    return result


def summed(logits, settings):
    """What a token receives, from the softmax of the map [N, N] or its logits; [N]."""
    if settings.flow_map == "softmax":
        return soft_sums(logits, settings.flow_softmax)
    return logits.sum(0) if settings.flow_softmax == "keys" else logits.sum(1)


def align(sums, settings, p):
    """Eq. 4: T arrays [N, M] -> the same through the encoder, by token or with all numbers of a frame as one vector."""
    vectors = np.stack([a.reshape(1, -1) if settings.encoder_input == "tokens" else a for a in sums])
    sequences = vectors[:, 0][None] if settings.encoder_input == "tokens" else vectors
    out = np.stack([dense(encoder_layer(dense(s, p["embed"]), p["layer"], settings.encoder_heads, linear_attention), p["out"]) for s in sequences])
    return out.reshape(len(sums), *sums[0].shape)


def linear_attention(q, k, v):
    """Katharopoulos et al., for [N, d]: weights phi(q_i) phi(k_j), normalised over j."""

    def phi(x):
        return np.where(x > 0, x, np.exp(np.minimum(x, 0)) - 1) + 1

    weights = np.array([[phi(a) @ phi(b) for b in k] for a in q])
    return weights @ v / (weights.sum(1, keepdims=True) + 1e-6)


def softmax_attention(q, k, v):
    return softmax(q @ k.T / np.sqrt(q.shape[1])) @ v


def encoder_layer(x, p, heads, attend):
    """Post-norm encoder layer on [N, W]."""
    q, k, v = (np.split(part, heads, axis=1) for part in np.split(dense(x, p["qkv"]), 3, axis=1))
    mixed = np.concatenate([attend(*head) for head in zip(q, k, v, strict=True)], axis=1)
    x = layer_norm(x + dense(mixed, p["proj"]), p["norm1"], 1e-5)
    return layer_norm(x + dense(np.maximum(dense(x, p["fc1"]), 0), p["fc2"]), p["norm2"], 1e-5)


def transformer(x, p, settings):
    """[T, r] -> [T, r]."""
    frames, width = x.shape
    x = x.copy()
    for t in range(frames):
        for i in range(width // 2):
            angle = t / 10000 ** (2 * i / width)
            x[t, i] += np.sin(angle)
            x[t, width // 2 + i] += np.cos(angle)
    for layer in ordered(p["layers"]):
        x = encoder_layer(x, layer, settings.tpu_heads, softmax_attention)
    return x


def tcn(x, p, settings):
    for i, block in enumerate(ordered(p["blocks"])):
        y = causal(causal(x, block["conv1"], 2**i), block["conv2"], 2**i)
        x = np.maximum(y + (dense(x, block["residual"]) if "residual" in block else x), 0)
    return x


def causal(x, p, dilation):
    """ReLU of a weight-normalised causal convolution of two taps on [T, I]."""
    kernel = p["kernel"] / np.linalg.norm(p["kernel"], axis=0) * p["scale"]
    older, newer = np.split(kernel, 2)
    out = []
    for t in range(len(x)):
        past = x[t - dilation] if t >= dilation else np.zeros(x.shape[1])
        out.append(np.maximum(past @ older + x[t] @ newer + p["bias"], 0))
    return np.array(out)


def lstm(x, p, settings):
    def sigmoid(a):
        return 1 / (1 + np.exp(-a))

    for cell in ordered(p["cells"]):
        c = h = np.zeros(settings.tpu_width)
        out = []
        for frame in x:
            i, f, g, o = np.split(frame @ cell["dense_i"]["kernel"] + dense(h, cell["dense_h"]), 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
            out.append(h)
        x = np.array(out)
    return x


def tpu(embedding, p, settings):
    """E [B, T, N, r] -> [B, W]."""
    unit = {"transformer": transformer, "tcn": tcn, "lstm": lstm}[settings.tpu]
    mean = {"auto": settings.tpu == "transformer", "mean": True, "last": False}[settings.tpu_squeeze]
    features = []
    for clip in embedding:
        sequences = [clip.mean(1)] if settings.tpu_sequence == "frames" else [clip[:, n] for n in range(clip.shape[1])]
        states = [unit(x, p["unit"], settings) for x in sequences]
        features.append(np.mean([s.mean(0) if mean else s[-1] for s in states], axis=0))
    return np.array(features)


def adapter_weights(p, shared, settings, place, width):
    """(norm, down, up) of an adapter: {"scale", "bias"} and {"kernel", "bias"} twice."""
    if settings.adapter == "compacter":
        rules = shared["rules"]
        down = sum(np.kron(a, np.outer(s, t)) for a, s, t in zip(rules, p["down_left"], p["down_right"], strict=True))
        up = sum(np.kron(a, np.outer(s, t)) for a, s, t in zip(rules, p["up_left"], p["up_right"], strict=True))
        down = np.concatenate([down, p["down_flow"]])
        return p["norm"], {"kernel": down, "bias": p["down_bias"]}, {"kernel": up, "bias": p["up_bias"]}
    if settings.adapter == "hyperformer":
        source = np.concatenate([shared["task"], shared["blocks"][place[0]], shared["positions"][place[1]]])
        source = dense(np.maximum(dense(source, shared["fc1"]), 0), shared["fc2"])
        made = {name: dense(source, shared[name]) for name in ("norm_scale", "norm_bias", "down", "down_bias", "up", "up_bias")}
        down, up = made["down"].reshape(-1, settings.bottleneck), made["up"].reshape(settings.bottleneck, width)
        return (
            {"scale": made["norm_scale"], "bias": made["norm_bias"]},
            {"kernel": down, "bias": made["down_bias"]},
            {"kernel": up, "bias": made["up_bias"]},
        )
    return p["norm"], p["down"], p["up"]


def adapter(residual, x, flow, p, shared, settings, place):
    """Eqs. 1 and 6; returns the sublayer's new output and E."""
    norm, down, up = adapter_weights(p, shared, settings, place, x.shape[-1])
    source = residual if settings.adapter == "serial" else x
    joined = layer_norm(source, norm)
    if flow is not None:
        joined = np.concatenate([joined, flow], axis=-1)
    embedding = np.maximum(joined @ down["kernel"][: joined.shape[-1]] + down["bias"], 0)
    out = residual + p["scale"] * dense(embedding, up)
    return out + source if settings.double_residual else out, embedding


def features(pixels, p, spec):
    """The class token of the last frame, then the branches of all blocks: [B, D + ...]."""
    settings = spec.am_flow
    patches, token = embed(pixels, p["embed"], spec.patch)
    x = np.concatenate([np.broadcast_to(token, (*patches.shape[:2], 1, spec.width)), patches], axis=2)
    shared, branches = p["blocks"]["0"]["mixer"].get("shared"), []
    for index, block in enumerate(ordered(p["blocks"])):
        mixer, change = block["mixer"], None
        if spec.mixes(index) and settings.flow != "none":
            q, k, _ = np.split(dense(layer_norm(x, block["norm1"]), block["attn"]["qkv"]), 3, axis=-1)
            q, k = (z.reshape(*z.shape[:-1], spec.heads, -1) for z in (q, k))
            change = flow(q, k, settings, 1, mixer.get("encoder"))
        out, embedding = adapter(attention_residual(x, block, spec.heads), x, change, mixer["attention_adapter"], shared, settings, (index, 0))
        x = x + out
        out, other = adapter(mlp_residual(x, block), x, None, mixer["mlp_adapter"], shared, settings, (index, 1))
        x = x + out
        if spec.mixes(index) and settings.tpu != "none":
            branches += [tpu(embedding, mixer["attention_tpu"], settings), tpu(other, mixer["mlp_tpu"], settings)]
    return np.concatenate([layer_norm(x, p["norm"])[:, -1, 0], *branches], axis=-1)
