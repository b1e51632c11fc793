"""A run folder as an engine would leave it, made up from a seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

LABELS = ("business", "entertainment", "politics", "sport", "tech")

SKILL = {"florg.truncated": 0.93, "fedit": 0.91, "rolora": 0.925, "head_only": 0.86}


def module_names(count: int) -> list[str]:
    kinds = ("attention.self.query", "attention.self.value", "intermediate.dense", "output.dense")
    return [f"encoder.layer.{i // 4}.{kinds[i % 4]}" for i in range(count)]


def write_fake_run(
    folder: Path,
    *,
    method: str = "florg.truncated",
    seed: int = 0,
    rounds: int = 12,
    clients: int = 8,
    modules: int = 12,
    labels: tuple[str, ...] = LABELS,
    client_name: str = "client",
    recipe: str = "bbc-news",
    dropped: bool = True,
    finished: bool = True,
    target: float | None = 0.85,
) -> Path:
    """Write a run folder; ``finished=False`` leaves no summary and half a last line."""
    rng = np.random.default_rng([seed, *method.encode()])
    split = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    ids = [f"{client_name}-{i:02d}" for i in range(clients)]
    shares = split.dirichlet(np.full(len(labels), 0.5), clients)
    sizes = split.integers(40, 160, clients)
    train = np.array([split.multinomial(n, p) for n, p in zip(sizes, shares, strict=True)])
    test = np.array([split.multinomial(n // 4, p) for n, p in zip(sizes, shares, strict=True)])
    skill = SKILL.get(method, 0.9) + rng.normal(0, 0.006)
    hard = split.normal(0, 0.05, clients)
    exact, factors = method in {"fedex", "head_only"}, 0 if method == "head_only" else modules
    each = {"adapter": factors * 8 * 384 * 4 * (1 if "florg" in method else 2), "head": 5 * 385 * 4}

    def accuracy(done: int) -> float:
        return float(skill - (skill - 0.2) * np.exp(-done / 2.5) + rng.normal(0, 0.006))

    def shard(done: int, i: int, lift: float) -> float:
        size = max(int(test[i].sum()), 1)
        return round(float(np.clip(accuracy(done) + hard[i] + lift, 0, 1)) * size) / size

    first = accuracy(0)
    lines: list[dict[str, Any]] = [
        {
            "round": -1,
            "accuracy": first,
            "loss": 1.62,
            "clients": [
                {"client": ids[i], "examples": int(sizes[i]), "global_accuracy": shard(0, i, 0.0)}
                for i in range(clients)
            ],
        }
    ]
    for t in range(rounds):
        lost = [{"client": ids[1], "reason": "non-finite values"}] if dropped and t == 4 else []
        kept = [i for i in range(clients) if not (lost and i == 1)]
        lines.append(
            {
                "round": t,
                "accuracy": accuracy(t + 1),
                "loss": float(0.35 + 1.3 * np.exp(-t / 3) + rng.normal(0, 0.02)),
                "train_loss": float(0.2 + 1.4 * np.exp(-t / 2.5) + rng.normal(0, 0.02)),
                "clients": [
                    {
                        "client": ids[i],
                        "examples": int(sizes[i]),
                        "train_loss": float(0.2 + rng.random() * 0.1),
                        "global_accuracy": shard(t + 1, i, 0.0),
                        "local_accuracy": shard(t + 1, i, float(rng.normal(0.02, 0.02))),
                    }
                    for i in kept
                ],
                "sampled": ids,
                "dropped": lost,
                "flags": [],
                "bytes_up": {key: value * len(kept) for key, value in each.items()},
                "bytes_down": {key: value * clients for key, value in each.items()},
                "seconds": {"train": 3.1, "aggregate": 0.02, "evaluate": 0.7, "save": 0.05},
                "modules": [
                    {
                        "module": name,
                        "aggregation_error": _error(rng, t, j, exact),
                        "factor_drift": 0.0 if t == 0 else float(rng.lognormal(-2 - t / 6, 0.4)),
                        "kept_rank": 8,
                        "condition": float(rng.lognormal(2, 0.5)),
                    }
                    for j, name in enumerate(module_names(factors))
                ],
            }
        )
    text = "".join(json.dumps(line) + "\n" for line in lines)
    _write(folder / "metrics.jsonl", text if finished else text + '{"round": 99, "accu')
    _write(
        folder / "recipe.toml",
        f'name = "{recipe}"\nseed = {seed}\nrounds = {rounds}\n\n[method]\nname = "{method}"\n'
        'rank = 8\n\n[data]\npartition = "dirichlet"\nalpha = 0.5\n',
    )
    _json(
        folder / "environment.json",
        {
            "python": "3.11.9",
            "torch": "2.13.0",
            "platform": "Linux-6.1-x86_64",
            "cpu": "made-up CPU",
            "threads": 2,
            "git_commit": "0123456789abcdef",
            "versions": {"peft": "0.21.2", "transformers": "5.23.0"},
        },
    )
    _json(
        folder / "partition.json",
        {
            "label_names": list(labels),
            "class_counts": train.tolist(),
            "test_counts": test.tolist(),
            "client_ids": ids,
        },
    )
    if finished:
        _json(folder / "summary.json", summary(lines, method, seed, recipe, target))
    return folder


def summary(
    lines: list[dict[str, Any]], method: str, seed: int, recipe: str, target: float | None
) -> dict[str, Any]:
    """The summary that belongs to the lines of ``metrics.jsonl``."""
    trained = [line for line in lines if line["round"] >= 0]

    def total(key: str, part: str) -> int:
        return sum(line[key][part] for line in trained)

    last = [c["global_accuracy"] for c in lines[-1]["clients"]]
    reached = [t for t in trained if target is not None and t["accuracy"] >= target]
    until = reached[0]["round"] + 1 if reached else None
    return {
        "recipe": recipe,
        "method": method,
        "seed": seed,
        "rounds": len(trained),
        "accuracy": lines[-1]["accuracy"],
        "best_accuracy": max(line["accuracy"] for line in lines),
        "worst_client": min(last),
        "mean_client": sum(last) / len(last),
        "best_client": max(last),
        "bytes_up": {part: total("bytes_up", part) for part in ("adapter", "head")},
        "bytes_down": {part: total("bytes_down", part) for part in ("adapter", "head")},
        "seconds": {
            phase: sum(line["seconds"][phase] for line in trained)
            for phase in ("train", "aggregate", "evaluate", "save")
        },
        "peak_memory_bytes": 812_000_000,
        "git": "0123456789abcdef",
        "versions": {"fedcore": "0.1.0"},
        "finished": True,
        "target_accuracy": target,
        "rounds_to_target": until,
        "bytes_to_target": None
        if until is None
        else sum(
            sum(line[key].values())
            for line in trained[:until]
            for key in ("bytes_up", "bytes_down")
        ),
    }


def _error(rng: np.random.Generator, t: int, j: int, exact: bool) -> float | None:
    if exact:
        return 0.0
    if t == 0 and j % 5 == 0:
        return None
    return float(rng.lognormal(-3 + 0.08 * j - t / 10, 0.5))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _json(path: Path, value: Any) -> None:
    _write(path, json.dumps(value))
