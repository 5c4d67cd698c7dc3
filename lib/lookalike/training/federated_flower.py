"""The same federated rounds through Flower: its ClientApp, its messages, its FedAvg, all in this process.

Paper: Carrasco Limeros et al. 2022 (arXiv 2208.11702), Sec. 4.5, whose code runs Flower 0.18. Chapter:
stylegan2_dermatology. Needs `flwr` 1.41, which the project does not install. `client_app` is what a hospital would run
against a real server; `federated.run_rounds` needs none of it and gives the same weights.

The one decision worth knowing: Flower's own simulations start Ray or a server process that stays behind. The grid here
hands each message to its client and takes the reply, one after another. Messages want to know the task they belong to,
which is a private part of Flower: hence the exact version.
"""

import os
from contextlib import contextmanager

from lookalike.training.federated import EXCHANGED, client_weights, give_state, local_round, take_state

VERSION = "1.41"


def flower_rounds(clients, rounds, iterations, weighting="samples", exchanged=EXCHANGED, reset_state=False):
    """`federated.run_rounds` with plain FedAvg, through Flower: "rounds" (rows with "round", "clients") and "shared".

    Equal to it to within rounding: Flower averages in float32. Raises for whole-number buffers, whose mean Flower
    would take, and where Flower is missing or another version.
    """
    require_flower()
    from flwr.app import ArrayRecord
    from flwr.serverapp.strategy import FedAvg

    shared = take_state(clients[0], exchanged)
    if whole := [name for name, value in shared.items() if not value.is_floating_point()]:
        raise ValueError(f"Flower would average the whole numbers of {whole[0]}: exchange floats alone.")
    weights = client_weights([len(client.images) for client in clients], weighting)
    rows = [{"round": number, "clients": []} for number in range(1, rounds + 1)]
    app = client_app(clients, weights, iterations, exchanged, reset_state, rows)
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=len(clients), min_available_nodes=len(clients))
    with _one_task():
        grid = in_process_grid(app, len(clients))
        found = strategy.start(grid=grid, initial_arrays=ArrayRecord(shared), num_rounds=rounds)
    shared = dict(found.arrays.to_torch_state_dict())
    for client in clients:
        give_state(client, shared, exchanged)
    return {"rounds": rows, "shared": shared}


def client_app(clients, weights, iterations, exchanged=EXCHANGED, reset_state=False, rows=None):
    """Flower's ClientApp of these clients; a node's "partition-id" says which of them it is.

    weights: what each reports as "num-examples", by which FedAvg averages. rows: those of `flower_rounds`, filled.
    """
    require_flower()
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train()
    def train(message, context):
        number = int(context.node_config["partition-id"])
        client, received = clients[number], message.content["arrays"].to_torch_state_dict()
        give_state(client, received, exchanged)
        sent, row = local_round(client, received, iterations, exchanged, reset_state)
        if rows is not None:
            rows[int(message.content["config"]["server-round"]) - 1]["clients"].append(row)
        metrics = MetricRecord({"num-examples": weights[number]})
        content = RecordDict({"arrays": ArrayRecord(sent), "metrics": metrics})
        return Message(content=content, reply_to=message)

    return app


def in_process_grid(app, clients):
    """A Flower Grid of so many nodes that calls the app in this process, in the order of the nodes' numbers.

    FedAvg asks nodes in random order; a fixed order keeps the rounds equal, for clients may share a random state.
    """
    require_flower()
    from flwr.app import Context, Message, RecordDict
    from flwr.serverapp import Grid

    class InProcessGrid(Grid):
        def __init__(self):
            self._run = None
            self.contexts = {
                i + 1: Context(
                    run_id=0, node_id=i + 1, state=RecordDict(), run_config={},
                    node_config={"partition-id": i, "num-partitions": clients},
                )
                for i in range(clients)
            }  # fmt: skip

        def set_run(self, run):
            self._run = run

        @property
        def run(self):
            return self._run

        def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):
            return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

        def get_node_ids(self):
            return list(self.contexts)

        def push_messages(self, messages):
            raise NotImplementedError("This grid has no queue: call send_and_receive.")

        def pull_messages(self, message_ids):
            raise NotImplementedError("This grid has no queue: call send_and_receive.")

        def send_and_receive(self, messages, *, timeout=None):
            ordered = sorted(messages, key=lambda message: message.metadata.dst_node_id)
            return [app(message, self.contexts[message.metadata.dst_node_id]) for message in ordered]

    return InProcessGrid()


def require_flower():
    """Raises ImportError, in a sentence, where Flower is missing or another version; turns its telemetry off."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    try:
        import flwr
    except ImportError:
        raise ImportError(
            f"Flower is not installed: pip install 'flwr=={VERSION}.*' in an environment of its own."
        ) from None
    if not flwr.__version__.startswith(f"{VERSION}."):
        raise ImportError(f"Flower must be {VERSION}.*, not {flwr.__version__}: the grid needs a private part of it.")


@contextmanager
def _one_task():
    """Flower's messages ask which task they belong to; outside its own processes nobody has said."""
    from flwr.supercore.task_identity import TaskIdentity

    names = ("_run_id", "_task_id", "_node_id")
    before = {name: getattr(TaskIdentity, name) for name in names}
    try:
        for name in names:
            setattr(TaskIdentity, name, 0)
        yield
    finally:
        for name, value in before.items():
            setattr(TaskIdentity, name, value)
