"""Names what is in clips. Needs ONNX Runtime and NumPy: pip install onnxruntime.

python run_onnx.py TASK CLIP...

As run.py, for the .onnx files in this folder, which hold their weights.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import video


def main(folder: Path, task: str, *files: str) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    model = onnxruntime.InferenceSession(folder / f"{task}.onnx", options)
    labels = (folder / "labels" / f"{task}.txt").read_text("utf-8").split("\n")
    settings = json.loads((folder / "preprocessing.json").read_text("utf-8"))["tasks"][task]
    clips = np.stack([np.load(file) if file.endswith(".npy") else video.read(file, settings) for file in files])  # uint8[B, T, H, W, 3], any B
    for file, scores in zip(files, model.run(["scores"], {"pixels": clips})[0], strict=True):  # float32[B, C]
        best = np.argsort(-scores, kind="stable")[:5]
        print(json.dumps({"path": file, "task": task, "labels": [labels[c] for c in best], "scores": [float(scores[c]) for c in best]}))


if __name__ == "__main__":
    tasks = sorted(path.stem for path in Path(__file__).parent.glob("*.onnx"))
    if len(sys.argv) < 3 or sys.argv[1] not in tasks:
        sys.exit(f"usage: python run_onnx.py TASK CLIP...   TASK: {', '.join(tasks)}")
    try:
        main(Path(__file__).parent, *sys.argv[1:])
    except OSError as error:  # PyAV's, too
        sys.exit(f"error: {error}")
