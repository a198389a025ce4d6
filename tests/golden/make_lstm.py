"""Writes lstm.npz: two-layer LSTMs of torch.nn.LSTM, one way and both ways, what they give and their gradients.

    pip install torch && python tests/golden/make_lstm.py

A weight of loss is drawn for every state, so that each of them has a gradient of its own.
"""

from pathlib import Path

import numpy as np
import torch

LAYERS, WIDTH, ROWS, LENGTH = 2, 8, 3, 6


def main() -> None:
    torch.manual_seed(0)
    arrays = {}
    for name, both in (("causal", False), ("both_ways", True)):
        model = torch.nn.LSTM(WIDTH, WIDTH // 2 if both else WIDTH, LAYERS, batch_first=True, bidirectional=both)
        x = torch.randn(ROWS, LENGTH, WIDTH, requires_grad=True)
        weights = torch.randn(ROWS, LENGTH, WIDTH)
        states, _ = model(x)
        (states * weights).sum().backward()
        arrays |= {f"{name}/x": x, f"{name}/weights": weights, f"{name}/states": states, f"{name}/gradient/x": x.grad}
        for key, parameter in model.named_parameters():
            arrays |= {f"{name}/parameter/{key}": parameter, f"{name}/gradient/{key}": parameter.grad}
    np.savez_compressed(Path(__file__).parent / "lstm.npz", **{key: array.detach().numpy() for key, array in arrays.items()})


if __name__ == "__main__":
    main()
