"""Flower apps that the adapter's tests load by path: a line through the origin, and what an app can do wrong."""

from __future__ import annotations

import os

import numpy as np
import torch
import torch.distributed as dist
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch.nn.parallel import DistributedDataParallel

X = torch.tensor([[1.0], [2.0], [3.0], [4.0]])


def net():
    return torch.nn.Linear(1, 1, bias=False)


def answered(message, arrays, **metrics):
    records = {"arrays": arrays} if arrays is not None else {}
    return Message(RecordDict({**records, "metrics": MetricRecord(metrics)}), reply_to=message)


# y = 2 x by full-batch steps on the mean squared error: w <- w - lr 15 (w - 2)

app = ClientApp()


@app.train()
def train(message, context):
    if (fault := context.node_config.get("fault")) is not None:
        return FAULTS[fault](message)
    model = net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=message.content["config"]["lr"])
    for _ in range(context.run_config["local-epochs"]):
        optimizer.zero_grad()
        part = X[rank::world]
        ((wrapped(part) - 2 * part) ** 2).mean().backward()
        optimizer.step()
    seen = context.state.config_records.setdefault("seen", ConfigRecord({"rounds": []}))
    seen["rounds"] = [*seen["rounds"], message.content["config"]["server-round"]]
    # 0 where one process trains alone, 1 from the first of two, 11 from the second: which of them counts can be told.
    told = {"train_loss": world - 1.0 + 10 * rank, "num-examples": 4 + rank}
    return answered(message, ArrayRecord(wrapped.state_dict()), **told)


@app.evaluate()
def evaluate(message, context):
    w = message.content["arrays"]["weight"].numpy()
    rounds = context.state["seen"]["rounds"] if "seen" in context.state else []
    return answered(
        message,
        None,
        **{
            "eval_loss": float(np.mean((X.numpy() @ w.T - 2 * X.numpy()) ** 2)),
            "server-round": message.content["config"]["server-round"],
            "rounds": len(rounds),
            "num-examples": 2,
        },
    )


def raises(message):
    raise LookupError("the drawer is empty")


def steps_for_good(message):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    while True:
        model(X).sum().backward()
        optimizer.step()


def arrays_of(message, **changed):
    given = {**message.content["arrays"]}
    given.update({name: Array(np.asarray(value)) for name, value in changed.items()})
    return ArrayRecord(given)


FAULTS = {
    "raises": raises,
    "never ends": steps_for_good,
    "error": lambda m: Message(Error(code=7, reason="no data today"), reply_to=m),
    "nothing": lambda m: None,
    "no weight": lambda m: answered(m, arrays_of(m), train_loss=1.0),
    "half an example": lambda m: answered(m, arrays_of(m), **{"num-examples": 0.5}),
    "no example": lambda m: answered(m, arrays_of(m), **{"num-examples": 0}),
    "no arrays": lambda m: answered(m, None, **{"num-examples": 1}),
    "another name": lambda m: answered(m, arrays_of(m, bias=[0.0]), **{"num-examples": 1}),
    "another shape": lambda m: answered(m, arrays_of(m, weight=[[1.0, 2.0]]), **{"num-examples": 1}),
    "not finite": lambda m: answered(m, arrays_of(m, weight=np.float32([[np.nan]])), **{"num-examples": 1}),
}


# What a list of arrays, as NumPy apps have it, becomes and how it comes

many = ClientApp()


@many.train()
def add_own_number(message, context):
    arrays = message.content["arrays"].to_numpy_ndarrays()
    return answered(message, ArrayRecord([a + n for n, a in enumerate(arrays)]), **{"num-examples": 1})


def twelve():
    return [np.float32(n) * np.ones(1, np.float32) for n in range(12)]


old = ClientApp(client_fn=lambda context: None)

FIRST = {"weight": torch.zeros(1, 1)}
EMPTY = {}
