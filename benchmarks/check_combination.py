"""How near combined adapters come to the nearest of their rank. Prints JSON.

    python -m benchmarks.check_combination WEIGHTS RANK ADAPTER ADAPTER OUTPUT...

For each output and its worst module: `difference`, ||B A - D_k|| / ||D_k||, `excess`, ||D - B A|| / ||D - D_k|| - 1;
D is the weighted sum of dW and D_k the nearest matrix of rank k. It is not formed for D_k: numpy factors the stacked
factors in float64. For the smallest module that is compared with the eigenvalues of D D^T itself.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tensors import open_tensors


def scale(folder: Path) -> float:
    """What B A of an adapter without patterns is multiplied by."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not any(config.get(key) for key in ("rank_pattern", "alpha_pattern", "use_rslora"))
    return float(config["lora_alpha"] / config["r"])


def main() -> None:
    weights = [float(text) for text in sys.argv[1].split(",")]
    rank, inputs, outputs = int(sys.argv[2]), [*map(Path, sys.argv[3:5])], [*map(Path, sys.argv[5:])]
    with ExitStack() as stack:
        stored = {folder: open_tensors(folder, stack) for folder in (*inputs, *outputs)}
        keys = sorted(key for key in stored[inputs[0]] if "lora_A" in key)

        def factors(folder: Path, key: str) -> tuple[Any, Any]:
            found = [stored[folder][k].get_tensor(k).double().numpy() for k in (key.replace("lora_A", "lora_B"), key)]
            return found[0] * scale(folder), found[1]

        worst = {str(folder): {"difference": 0.0, "excess": 0.0, "modules": len(keys)} for folder in outputs}
        smallest = min(keys, key=lambda key: stored[inputs[0]][key].get_slice(key).get_shape()[1])
        for key in keys:
            parts = [factors(folder, key) for folder in inputs]
            left, upper = np.linalg.qr(
                np.concatenate([w * B for (B, _), w in zip(parts, weights, strict=True)], axis=1)
            )
            right, lower = np.linalg.qr(np.concatenate([A for _, A in parts]).T)
            U, S, Vh = np.linalg.svd(upper @ lower.T)
            least = float(np.sqrt((S[rank:] ** 2).sum()))
            if key == smallest:
                D = sum(w * B @ A for (B, A), w in zip(parts, weights, strict=True))
                values = np.linalg.eigvalsh(D @ D.T if D.shape[0] <= D.shape[1] else D.T @ D)[::-1]
                assert abs(np.sqrt(values[rank : len(S)].sum()) / least - 1) < 1e-9
            best_left, best_right = left @ (U[:, :rank] * S[:rank]), Vh[:rank] @ right.T
            for folder in outputs:
                B, A = factors(folder, key)
                off = norm(np.concatenate([B, -best_left], axis=1), np.concatenate([A, best_right]))
                rest = norm(np.concatenate([left * 1.0, -B], axis=1), np.concatenate([upper @ lower.T @ right.T, A]))
                found = worst[str(folder)]
                found["difference"] = max(found["difference"], off / float(np.sqrt((S[:rank] ** 2).sum())))
                found["excess"] = max(found["excess"], rest / least - 1)
    print(json.dumps(worst))


def norm(B: Any, A: Any) -> float:
    """||B A|| by QR of both, without the cancellation that traces of squares suffer."""
    _, left = np.linalg.qr(B)
    _, right = np.linalg.qr(A.T)
    return float(np.linalg.norm(left @ right.T))


if __name__ == "__main__":
    main()
