"""Hugging Face's TimeSformer in PyTorch, for `vidjoint.speed.against_peer`, which starts this as a program of its own.

It answers each line of standard input, "train" or "forward", with the seconds that one such step takes.
"""

import json
import sys
import time


def main() -> None:
    import torch
    import transformers

    sizes = json.loads(sys.argv[1])
    batch, frames, side, classes = (sizes.pop(name) for name in ("batch_size", "num_frames", "image_size", "num_labels"))
    bfloat16 = sizes.pop("bfloat16")
    torch.manual_seed(0)
    config = transformers.TimesformerConfig(**sizes, num_frames=frames, image_size=side, num_labels=classes)
    model = transformers.TimesformerForVideoClassification(config)
    optimizer = torch.optim.SGD(model.parameters(), 5e-3, momentum=0.9)
    pixels, label = torch.rand(batch, frames, 3, side, side), torch.randint(0, classes, (batch,))

    def train() -> None:
        model.train()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = torch.nn.functional.cross_entropy(model(pixel_values=pixels).logits.float(), label)
        loss.backward()
        optimizer.step()

    def forward() -> None:
        model.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            model(pixel_values=pixels)

    steps = {"train": train, "forward": forward}
    for step in steps.values():
        step()
    parameters = sum(value.numel() for value in model.parameters())
    print(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__, "parameters": parameters}), flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        steps[line.strip()]()
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()
