"""The shared backbone, its mixers and heads, as pure functions of parameters: `build` makes one for use in any JAX code (docs/python.md)."""

from vidjoint.models.build import Model
from vidjoint.models.build import build as build_from_config  # the module first: its name gives way to the function below


def build(name: str = "B/16", heads: dict[str, int] | None = None, **settings) -> Model:
    """A model by name, without a config file.

    Args:
      name: Ti, S, B, L or H, and the patch size in pixels, as in "B/16" or "H/14".
      heads: task -> number of classes; none: features only.
      settings: any key of `config.model` (explained in vidjoint/config.py), as in mixer="divided", frames=8, image_size=224, dtype="bfloat16",
        or token_shift={"tokens": "all"} for those that have keys of their own. `model.heads` is attention_heads here.

    Returns:
      A `Model`: `init(key)` gives the parameters, `features(params, pixels)` and `logits(params, pixels)` are pure and jit-able.

    Raises:
      UserError: unknown or impossible settings, all of them.
    """
    from vidjoint import validate  # these two know of models; here, so that models can be imported without them
    from vidjoint.config import base_config
    from vidjoint.errors import UserError

    if not isinstance(heads or {}, dict):
        raise UserError(f"heads={heads!r}: write task: number of classes, as in heads={{'actions': 400}}; attention_heads is another thing")
    config, unknown = base_config(), []
    model = config.model
    model.update(dtype="float32", temporal_init="zero")
    for key, value in {"variant": name, **settings}.items():
        key = "heads" if key == "attention_heads" else key
        try:
            model[key].update(value) if isinstance(value, dict) and key in model else model.update({key: value})
        except (KeyError, TypeError, AttributeError) as error:
            unknown.append(f"model.{key}={value!r} can't be set: {' '.join(str(error).split())}")
    if problems := unknown or validate.check_model(config):
        raise UserError(*problems)
    return build_from_config(model, dict(heads or {}))
