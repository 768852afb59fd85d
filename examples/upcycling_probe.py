"""A few-shot linear probe: how well a straight line through frozen features tells new classes apart.

As the upcycling paper measures ViTs: ten pictures of each class, features of the frozen model, least squares with a
penalty, no training. Here the classes are those of the other task, and the features the class token behind the last
norm.

    N: pictures     d: width of the model     K: classes
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForImageClassification

from surgery.training.images import Pictures

SHOTS, DRAWS, PENALTY = 10, 20, 10.0


def few_shot_accuracy(folder: Path, train: Path, test: Path, seed: int = 0) -> float:
    """The mean over draws of `SHOTS` pictures of each class of how many of the test pictures are told right."""
    images, classes = _stored(train)
    asked_images, right = _stored(test)
    random = np.random.default_rng(seed)
    draws = [
        np.concatenate([random.choice(np.flatnonzero(classes == name), SHOTS, replace=False) for name in set(classes)])
        for _ in range(DRAWS)
    ]
    learn, asked = features(folder, images[np.concatenate(draws)]), features(folder, asked_images)
    found = []
    for part, shots in zip(np.split(learn, DRAWS), draws, strict=True):
        found.append(np.mean(least_squares(part, classes[shots], asked) == right))
    return float(np.mean(found))


def features(folder: Path, images: np.ndarray) -> np.ndarray:
    """The class token behind the last norm for pictures [N, C, H, W]: float64 [N, d]."""
    model = AutoModelForImageClassification.from_pretrained(folder)
    made = Pictures.of(folder, model.config, int)
    pixels = torch.from_numpy(np.stack([made.pixels(image) for image in images]))
    with torch.no_grad():
        found = [model.base_model(pixel_values=part).last_hidden_state[:, 0] for part in torch.split(pixels, 256)]
    return torch.cat(found).double().numpy()


def _stored(file: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(file) as content:
        return content["images"], content["labels"]


def least_squares(shots: np.ndarray, classes: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Ridge regression to one-hot targets, on features scaled by the shots' mean and deviation.

    Args:
        shots: [n, d], to fit.
        classes: [n], theirs.
        asked: [N, d].

    Returns:
        The class told for each, [N].
    """
    names = np.unique(classes)
    mean, spread = shots.mean(0), shots.std(0) + 1e-6
    inputs, targets = (shots - mean) / spread, (classes[:, None] == names) - 1 / len(names)
    weights = np.linalg.solve(inputs.T @ inputs + PENALTY * np.eye(inputs.shape[1]), inputs.T @ targets)
    return np.asarray(names[((asked - mean) / spread @ weights).argmax(1)])
