"""A federation of three nodes, one of which replies another fault in every round.

The app is copied into a folder of its own and installed by Flower; it knows nothing of the tests.
"""

import struct

import torch
from flwr.app import Array, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedcore.transports.flower import FedLoRA, from_arrays, to_arrays

MODULE = "base_model.model.encoder.layer.0.query"
A, B, HEAD = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight", "base_model.model.head.weight"
SHAPES = {A: (4, 6), B: (5, 4), HEAD: (3, 5)}
BAD = 2
"""The partition of the node that does not keep to the rules."""


def drawn(seed):
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}


def trained(partition, round, tensors):
    step = drawn(1000 * round + partition)
    return {key: tensor + 0.1 * step[key] for key, tensor in tensors.items()}


def npy(shape):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


def with_array(content, data, shape, dtype="float32"):
    content["arrays"][A] = Array(dtype=dtype, shape=shape, stype="numpy.ndarray", data=data)


def with_tensor(content, key, tensor):
    content["arrays"] = to_arrays({**from_arrays(content["arrays"]), key: tensor})


def raises(content):
    raise RuntimeError("\x1b[31mnobody expects this\x1b[0m")


FAULTS = [
    lambda content: with_array(content, b"PK\x03\x04garbage", SHAPES[A]),
    lambda content: with_array(content, npy((10**12,)), (10**12,)),
    lambda content: with_tensor(content, A, torch.full(SHAPES[A], float("nan"))),
    lambda content: with_tensor(content, A, torch.zeros(4, 7)),
    lambda content: with_tensor(content, "base_model.model.extra.weight", torch.zeros(3)),
    lambda content: content["metrics"].update({"loss": [1.0, 2.0]}),
    lambda content: content["metrics"].update({"num-examples": 1e308}),
    lambda content: content.update({"fedcore": ConfigRecord({"client": 3})}),
    raises,
]

server = ServerApp()
client = ClientApp()


@server.main()
def main(grid, context):
    strategy = FedLoRA(
        "product_svd",
        on_invalid="drop",
        fraction_evaluate=0.0,
        min_train_nodes=3,
        min_available_nodes=3,
    )
    states, faults = context.run_config["states"], context.run_config["faults"]
    rounds = len(faults.split(","))
    strategy.start(grid, to_arrays(drawn(0)), num_rounds=rounds, checkpoint_dir=states)


@client.train()
def train(message, context):
    partition = int(context.node_config["partition-id"])
    round = int(message.content["config"]["server-round"]) - 1
    arrays = to_arrays(trained(partition, round, from_arrays(message.content["arrays"])))
    metrics = MetricRecord({"num-examples": float(partition + 1), "loss": 1.0})
    content = RecordDict({"arrays": arrays, "metrics": metrics})
    if partition == BAD:
        chosen = context.run_config["faults"].split(",")
        FAULTS[int(chosen[round])](content)
    return Message(content, reply_to=message)
