"""Murmur: federated learning for organizations that cannot share their data.

The names that users write are here, and each is imported when it is first used: `import murmur` costs nothing.

    from murmur import Task, simulate, fedprox, Client
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from murmur.aggregation.strategies import fedadam, fedavg, fedprox
    from murmur.client import Client
    from murmur.clients.contract import Contract
    from murmur.clients.engine.heads import TaskWeights
    from murmur.clients.engine.lora import load_base, lora, merge_lora
    from murmur.clients.engine.own import load_model
    from murmur.clients.engine.own_training import TrainContext
    from murmur.clients.flower import FlowerTask
    from murmur.clients.flower_app import flower_app
    from murmur.clients.task import Task
    from murmur.protocol.errors import MurmurError
    from murmur.protocol.recipe import Recipe
    from murmur.simulation import History, simulate
    from murmur.tuning import tune

__version__ = "0.1.0"
__all__ = [
    "Client",
    "Contract",
    "FlowerTask",
    "History",
    "MurmurError",
    "Recipe",
    "Task",
    "TaskWeights",
    "TrainContext",
    "fedadam",
    "fedavg",
    "fedprox",
    "flower_app",
    "load_base",
    "load_model",
    "lora",
    "merge_lora",
    "simulate",
    "tune",
]

_HOMES = {
    "Client": "murmur.client",
    "Contract": "murmur.clients.contract",
    "FlowerTask": "murmur.clients.flower",
    "History": "murmur.simulation",
    "MurmurError": "murmur.protocol.errors",
    "Recipe": "murmur.protocol.recipe",
    "Task": "murmur.clients.task",
    "TaskWeights": "murmur.clients.engine.heads",
    "TrainContext": "murmur.clients.engine.own_training",
    "fedadam": "murmur.aggregation.strategies",
    "fedavg": "murmur.aggregation.strategies",
    "fedprox": "murmur.aggregation.strategies",
    "flower_app": "murmur.clients.flower_app",
    "load_base": "murmur.clients.engine.lora",
    "load_model": "murmur.clients.engine.own",
    "lora": "murmur.clients.engine.lora",
    "merge_lora": "murmur.clients.engine.lora",
    "simulate": "murmur.simulation",
    "tune": "murmur.tuning",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'murmur' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
