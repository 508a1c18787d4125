"""Names what is in clips. Needs JAX and nothing else: pip install jax, or 'jax[cuda12]', or 'jax[tpu]'.

python run.py TASK CLIP...

TASK is the name of a .stablehlo file in this folder. A CLIP is a file of NumPy, uint8[T, H, W, 3] in RGB, cut as preprocessing.json says; or a video
or picture, which video.py reads (that needs PyAV, for pictures Pillow). Prints a JSON object per clip, the best labels first.
"""

import json
import sys
from pathlib import Path

import numpy as np
import video
from jax import export


def main(folder: Path, task: str, *files: str) -> None:
    data = (folder / "weights.safetensors").read_bytes()  # eight bytes with the length of the header, the header in JSON, arrays
    start = 8 + int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8:start]), data[start:]
    weights = {k: np.frombuffer(body[slice(*e["data_offsets"])], "<f4").reshape(e["shape"]) for k, e in header.items() if k != "__metadata__"}
    model = export.deserialize(bytearray((folder / f"{task}.stablehlo").read_bytes()))
    labels = (folder / "labels" / f"{task}.txt").read_text("utf-8").split("\n")
    settings = json.loads((folder / "preprocessing.json").read_text("utf-8"))["tasks"][task]
    clips = np.stack([np.load(file) if file.endswith(".npy") else video.read(file, settings) for file in files])  # uint8[B, T, H, W, 3], any B
    for file, scores in zip(files, np.asarray(model.call(weights, clips)), strict=True):  # float32[B, C]
        best = np.argsort(-scores, kind="stable")[:5]
        print(json.dumps({"path": file, "task": task, "labels": [labels[c] for c in best], "scores": [float(scores[c]) for c in best]}))


if __name__ == "__main__":
    tasks = sorted(path.stem for path in Path(__file__).parent.glob("*.stablehlo"))
    if len(sys.argv) < 3 or sys.argv[1] not in tasks:
        sys.exit(f"usage: python run.py TASK CLIP...   TASK: {', '.join(tasks)}")
    try:
        main(Path(__file__).parent, *sys.argv[1:])
    except OSError as error:  # PyAV's, too
        sys.exit(f"error: {error}")
