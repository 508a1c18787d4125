"""vidjoint: one Vision Transformer that learns from images and videos together, in JAX."""

__version__ = "0.1.0"


def load(folder, step=None, batch_size=None):
    """Opens the folder of a training run; gives a `vidjoint.classifier.Classifier` with `.labels`, `.logits`, `.embed` and `.predict`.

    Args:
      step: which checkpoint, a number or "best"; None is the newest.
      batch_size: examples that go to the device at a time; None is the run's.
    """
    from vidjoint.classifier import Classifier  # imported here, so that data workers which import vidjoint.data do not load JAX

    return Classifier(folder, step, batch_size)
