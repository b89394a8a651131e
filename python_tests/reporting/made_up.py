"""Output folders with made-up records, written without any training."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ticketops.files import write_atomically
from ticketops.searching import SearchConfig, ShareConfig, Store, TransferConfig
from ticketops.searching.sharing_plan import SINGLE, TaskTicket
from ticketops.searching.transfer_plan import SCORES
from ticketops.tickets import Importance, WeightCounts, prune


def weight_counts(layers: int, heads: int) -> WeightCounts:
    encoder = layers * (100 * heads + 800) + 2_400
    return WeightCounts(head=100, ffn=800, encoder=encoder, total=encoder + 4_000)


def importance(seed: int, shape: tuple[int, int] = (3, 4)) -> Importance:
    scores = Importance(*shape)
    generator = torch.Generator().manual_seed(seed)
    for layer in range(shape[0]):
        scores.add_head(layer, torch.randn(5, shape[1], generator=generator), None)
        scores.add_ffn(layer, torch.randn(5, generator=generator), None)
    return scores


def make_store(
    folder: Path,
    gain: float = 0.02,
    leave_out: tuple[str, ...] = (),
    notes: Mapping[str, str] = MappingProxyType({}),
    shape: tuple[int, int] = (3, 4),
    **fields: object,
) -> Store:
    """A finished search without any training: winning tickets gain `gain` at sparsity 0.25 and lose beyond.

    The model has `shape`: layers and heads of each.
    """
    kinds = "winning,random,losing"
    config = SearchConfig(**{"model": "m", "task": "t", "seeds": 3, "sparsities": "0.25,0.5", "kinds": kinds, **fields})
    values = {name: value for name, value in config.to_dict().items() if name not in ("output", "save_models")}
    identity = {
        "config": values,
        "task_fingerprint": "feed",
        "model_fingerprint": "beef",
        "layers": shape[0],
        "heads": shape[1],
    }
    notes = {"versions": {"python": "3"}, "machine": {"device": "cpu"}, "validation": "dev", **notes}
    held_out, counted = bool(config.report_fraction), weight_counts(*shape)
    store = Store.create(folder, identity, notes)
    for trial in store.plan:
        if trial.id in leave_out:
            continue
        scores = importance(trial.seed, shape)
        if trial.kind == "full":
            store.write_importance(trial.seed, "pass", scores)
            ticket = prune(scores, counts=(0, 0))
        else:
            counts = (trial.heads_pruned, trial.ffns_pruned)
            ticket = prune(scores, counts=counts, kind=trial.kind, seed=trial.seed)  # type: ignore[arg-type]
            store.keep_ticket(trial, ticket)
        score = 0.8 + 0.01 * trial.seed
        score += {"full": 0.0, "winning": gain if trial.sparsity == 0.25 else -0.1}.get(trial.kind, -0.2)
        split_scores = {"validation": {"accuracy": score, "f1": score}}
        if held_out:
            split_scores["report"] = {"accuracy": score - 0.05, "f1": score}
        record = {
            "id": trial.id, "task": config.task, "model": config.model, "kind": trial.kind,
            "sparsity": trial.sparsity,
            "seed": trial.seed, "heads_pruned": ticket.heads_pruned, "ffns_pruned": ticket.ffns_pruned,
            "weights_remaining": ticket.weights_remaining(counted),
            "weights_remaining_encoder": ticket.weights_remaining(counted, embeddings=False),
            "split": "validation", "metric": "accuracy", "score": score,
            "report_score": score - 0.05 if held_out else None, "scores": split_scores, "majority": 0.5,
            "rows": dict.fromkeys(split_scores, 1000), "constant_scores": dict.fromkeys(split_scores, 0.5),
            "costs": {
                "whole": {"parameters": 1000, "macs_per_token": 800, "bytes": 4000},
                "left": {"parameters": 970, "macs_per_token": 600, "bytes": 3880},
            },
            "train_loss": 0.3, "steps": 10, "timing": {"train_seconds": 1.5, "evaluate_seconds": 0.5},
        }  # fmt: skip
        if trial.kind == "full" and config.importance == "both":
            record["rank_correlation"] = {"head": 0.9, "ffn": None}
        store.write_record(trial, record)
    return store


TASKS = {"rte": "accuracy", "stsb": "pearson"}
NOTES: dict[str, Any] = {"versions": {"python": "3"}, "machine": {"device": "cpu"}}
SHAPE = {"layers": 3, "heads": 4, "model_fingerprint": "beef"}


def values(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in ("output", "save_models")}


def scored(score: float, metric: str, held_out: bool = False) -> dict[str, Any]:
    scores = {"validation": {metric: score}} | ({"report": {metric: score - 0.1}} if held_out else {})
    return {
        "split": "validation", "metric": metric, "score": score, "report_score": score - 0.1 if held_out else None,
        "scores": scores, "majority": 0.4, "rows": dict.fromkeys(scores, 10_000),
        "heads_pruned": 3, "ffns_pruned": 1, "neurons_pruned": 0,
        "weights_remaining": 0.9, "weights_remaining_encoder": 0.8, "train_rows": 100, "steps": 4,
    }  # fmt: skip


def make_share(
    folder: Path,
    gain: float = 0.02,
    leave_out: tuple[str, ...] = (),
    metrics: Mapping[str, str] = TASKS,
    **fields: Any,
) -> Store:
    """Tickets gain `gain` on all tasks over plain training, for every seed alike; random ones lose 0.01."""
    config = ShareConfig(model="m", tasks=list(metrics), **{"seeds": 3, "arms": "tickets,plain,random", **fields})
    prints = {"task_fingerprint": dict.fromkeys(metrics, "feed")}
    identity = {"kind": "share", "config": values(config), **SHAPE, **prints, "tickets": None}
    notes = {**NOTES, "validation": dict.fromkeys(metrics, "dev"), "tasks": {name: f"{name}: rows" for name in metrics}}
    held_out = bool(config.report_fraction)
    store = Store.create(folder, identity, notes)
    for number, task in enumerate(metrics):
        for seed in config.seeds:
            ticket = prune(importance(10 * number + seed), counts=(3, 1))
            store.keep_ticket(TaskTicket(task, seed), ticket)
    pairs = {str(seed): [0.7 + 0.01 * seed, 0.6 if held_out else None] for seed in config.seeds}
    single = {"sparsity": 0.25, "majority": 0.4, "scores": {"full": pairs, "winning": pairs}}
    text = json.dumps({task: {**single, "metric": metric} for task, metric in metrics.items()})
    write_atomically(store.folder / SINGLE, text)
    for trial in store.plan:
        if trial.id in leave_out:
            continue
        score = 0.8 + 0.01 * trial.seed + {"tickets": gain, "random": -0.01}.get(trial.kind, 0.0)
        tasks = {task: scored(score, metric, held_out) for task, metric in metrics.items()}
        record = {
            "id": trial.id, "kind": trial.kind, "seed": trial.seed, "model": "m", "mixing": config.mixing,
            "metric": "task average", "score": score, "report_score": None, "tasks": tasks, "train_loss": 0.5,
            "steps": 8, "timing": {"train_seconds": 2.0, "evaluate_seconds": 0.5},
        }  # fmt: skip
        store.write_record(trial, record)
    return store


def make_transfer(folder: Path, **fields: Any) -> Store:
    """The super ticket gains 2 points where there are few rows, and loses 1 with all of them."""
    config = TransferConfig(source="sst2", target="film", sparsities="0.25,0.5", **{"seeds": 2, **fields})
    identity = {
        "kind": "transfer", "config": values(config), **SHAPE, "task_fingerprint": "feed",
        "source": values(SearchConfig(task="sst2", sparsities="0.25,0.5", kinds="winning", seeds=2)),
        "source_fingerprint": "food", "source_results": None,
    }  # fmt: skip
    notes = {**NOTES, "validation": "dev", "tasks": {"source": "sst2: rows", "target": "film: rows"}}
    store = Store.create(folder, identity, notes)
    for trial in store.plan:
        gain = (0.02 if trial.fraction < 1 else -0.01) if trial.kind == "winning" else 0.0
        gain -= 0.05 if trial.sparsity == 0.5 else 0.0
        record = {
            **scored(0.6 + 0.1 * trial.fraction + 0.01 * trial.seed + gain, "accuracy"), "id": trial.id,
            "task": "film" if trial.ladder == "target" else "sst2", "kind": trial.kind,
            "sparsity": trial.sparsity or (0.25 if trial.kind == "winning" else 0.0),
            "seed": trial.seed, "ladder": trial.ladder, "fraction": trial.fraction, "epochs": 1,
            "train_rows": int(1000 * trial.fraction), "train_loss": 0.5,
            "timing": {"train_seconds": 2.0, "evaluate_seconds": 0.5},
        }  # fmt: skip
        store.write_record(trial, record)
    pairs = {kind: {"0": [score, None], "1": [score, None]} for kind, score in (("full", 0.8), ("winning", 0.81))}
    single = {"metric": "accuracy", "majority": 0.5, "sparsity": 0.25, "scores": pairs, "train_rows": 1000}
    write_atomically(store.folder / SCORES, json.dumps(single))
    return store
