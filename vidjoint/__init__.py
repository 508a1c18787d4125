"""vidjoint: one Vision Transformer that learns from images and videos together, in JAX."""

__version__ = "0.1.0"


def load(folder, step=None):
    """Opens a trained model: the folder of a run -> `vidjoint.classifier.Classifier` with `.labels`, `.logits`, `.embed` and `.predict`."""
    from vidjoint.classifier import Classifier  # imported here, so that data workers which import vidjoint.data do not load JAX

    return Classifier(folder, step)
