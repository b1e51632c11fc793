"""Flower's two apps for a recipe: the server's and the clients'.

A node is a part of the recipe's data, by its ``partition-id``, or a site with data of its own, by
its ``site`` and ``data``. What a site's node says of itself, and what is wrong with its rows, stays
there: a refusal names the site, and the site's own log has the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from logging import ERROR, WARNING
from pathlib import Path

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from fedcore.data.folders import is_free, write_files, writing
from fedcore.errors import FedcoreError, missing_extra
from fedcore.experiments.environment import recipe_threads
from fedcore.experiments.holdings import client_ids
from fedcore.experiments.observer import Observer
from fedcore.experiments.privacy import check_local
from fedcore.experiments.run_folder import RunFolder
from fedcore.experiments.setup import Experiment, build_experiment
from fedcore.experiments.site_data import read_site, recipe_at, site_files
from fedcore.methods.requirements import EXCHANGES, ONE_MODEL, refuse
from fedcore.recipes import SITES, Recipe, parse_recipe, to_toml
from fedcore.training.site_settings import SiteSettings
from fedcore.transports.flower.client import evaluate_global, introduce, model_tensors, train
from fedcore.transports.flower.messages import to_arrays
from fedcore.transports.flower.recipe_strategy import RecipeStrategy, TooFewRepliesError
from fedcore.transports.flower.site_strategy import SiteStrategy

ROUND_SECONDS = 3600.0
"""How long a server waits for the replies of a round by default."""

REFUSED = 4102
"""The code of the error by which a site's node says that it cannot take part."""


def check_recipe(recipe: Recipe) -> None:
    """Refuse what a server behind Flower's messages cannot keep or does not see.

    Raises:
        FedcoreError: naming the key and what to do.
    """
    method = recipe.method.create()
    otherwise = "take engine = 'local', or FedLoRA in an app of your own"
    refuse(method, (EXCHANGES, ONE_MODEL), "the flower engine", otherwise)
    for key, is_set in (
        ("round.secure_sum", recipe.round.secure_sum),
        ("round.codec = 'int8'", recipe.round.codec == "int8"),
    ):
        if is_set:
            raise FedcoreError(f"the flower engine has no {key}; run it with engine = 'local'")
    check_local(recipe, "Flower")


def serve(
    experiment: Experiment,
    folder: RunFolder,
    grid: Grid,
    observer: Observer,
    timeout: float = ROUND_SECONDS,
) -> RecipeStrategy:
    """Run the rounds that are left after the newest state in ``folder``, which has one.

    A run that lost its quorum ends with one message, and can be resumed.
    """
    at_sites = experiment.recipe.data.source == SITES
    strategy = (SiteStrategy if at_sites else RecipeStrategy)(experiment, folder, observer)
    try:
        strategy.start(
            grid,
            to_arrays(model_tensors(experiment)),
            experiment.recipe.rounds,
            timeout,
            checkpoint_dir=folder.states,
            resume=True,
        )
    except TooFewRepliesError as error:
        observer.message(str(error))
    return strategy


def client_app(read: Callable[[Context], str]) -> ClientApp:
    """The clients' app: node i of a federation, by its ``partition-id``, is the recipe's client i;
    a node with ``site`` and ``data`` is that site.

    Args:
        read: the recipe's TOML text from a node's context.
    """
    app = ClientApp()

    @app.query()
    def who(message: Message, context: Context) -> Message:
        def answer(recipe: Recipe, settings: SiteSettings) -> Message:
            if settings.owns_data:
                # A file that cannot be read is to be known before the first round.
                read_site(recipe, settings)
            return introduce(message, client_of(context, recipe))

        return _answered(message, context, read(context), answer)

    @app.train()
    def trained(message: Message, context: Context) -> Message:
        def answer(recipe: Recipe, settings: SiteSettings) -> Message:
            experiment, client = _experiment_of(recipe, settings), client_of(context, recipe)
            return train(message, context, experiment, client, run=str(context.run_id))

        return _answered(message, context, read(context), answer)

    @app.evaluate()
    def evaluated(message: Message, context: Context) -> Message:
        def answer(recipe: Recipe, settings: SiteSettings) -> Message:
            experiment, client = _experiment_of(recipe, settings), client_of(context, recipe)
            return evaluate_global(message, experiment, client)

        return _answered(message, context, read(context), answer)

    return app


def _answered(
    message: Message,
    context: Context,
    text: str,
    answer: Callable[[Recipe, SiteSettings], Message],
) -> Message:
    """What ``answer`` returns. Where a site's node fails, its own log has the reason, which may
    name files and columns; Flower would send it to the server.
    """
    recipe = parse_recipe(text)
    try:
        settings = SiteSettings.read(context.node_config)
        with recipe_threads(recipe):
            return answer(recipe, settings)
    except Exception as error:
        if recipe.data.source != SITES:
            raise
        log(ERROR, "this site cannot take part: %s", error)
        reason = f"a site cannot take part ({type(error).__name__}); its own log has the reason"
        return Message(Error(code=REFUSED, reason=reason), reply_to=message)


def client_of(context: Context, recipe: Recipe) -> str:
    """The client that a node is.

    Raises:
        FedcoreError: the node's configuration is not what the recipe needs: its own data where
            sites have theirs, otherwise a ``partition-id`` of one of the clients.
    """
    settings = SiteSettings.read(context.node_config)
    if recipe.data.source == SITES:
        if not settings.owns_data:
            raise FedcoreError(
                "data.source = 'sites', and the node has no data: start it with --node-config "
                '\'site="NAME" data="FILE"\''
            )
        return settings.site
    if settings.owns_data:
        raise FedcoreError(
            f"site {settings.site} has data of its own, and the recipe has data.source = "
            f"{recipe.data.source!r}; set data.source = 'sites'"
        )
    names = client_ids(recipe.clients)
    if recipe.data.sites is not None:
        names = tuple(site.site for site in site_files(recipe.data.sites))
    place = settings.partition_id
    if place is None or not 0 <= place < len(names):
        raise FedcoreError(
            f"the node's partition-id is {place!r}; the recipe has clients 0 to {len(names) - 1}"
        )
    return names[place]


def configured_recipe(context: Context) -> str:
    """The recipe's TOML text in an app's ``[tool.flwr.app.config]``.

    Raises:
        FedcoreError: there is none.
    """
    text = context.run_config.get("recipe")
    if not isinstance(text, str):
        raise FedcoreError("the app's [tool.flwr.app.config] has no recipe")
    return text


def server_app() -> ServerApp:
    """The server's app; ``out`` in its configuration is the run folder, created or resumed."""
    # Imported here: the local engine stands on the same level, and clients never need it.
    from fedcore.experiments import run as local

    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        recipe = parse_recipe(configured_recipe(context))
        check_recipe(recipe)
        path = Path(str(context.run_config.get("out", f"runs/{recipe.name}-flower")))
        timeout = float(str(context.run_config.get("timeout", ROUND_SECONDS)))
        observer = _Logged()

        def rounds(experiment: Experiment, folder: RunFolder, *rest: object) -> object:
            return iter(serve(experiment, folder, grid, observer, timeout).states)

        if (path / "recipe.toml").is_file():
            local.resume(path, observer, rounds=rounds)  # type: ignore[arg-type]
        else:
            local.start(recipe, path, observer, rounds=rounds)  # type: ignore[arg-type]

    return app


class _Logged(Observer):
    """What a person should know goes to Flower's log, which ``flwr run --stream`` shows."""

    def message(self, text: str) -> None:
        log(WARNING, text)


def _experiment_of(recipe: Recipe, settings: SiteSettings) -> Experiment:
    # Nodes that differ in their place alone share what is built.
    return _experiment(to_toml(recipe), replace(settings, partition_id=None, num_partitions=None))


@lru_cache(maxsize=1)
def _experiment(text: str, settings: SiteSettings) -> Experiment:
    """The experiment of this process: a client's process serves many rounds and often many clients,
    and what is built depends on the recipe and the node's settings alone.
    """
    recipe = parse_recipe(text)
    if settings.owns_data:
        return build_experiment(recipe, Observer(), site=settings)
    return build_experiment(recipe_at(recipe, settings), Observer())


_MODULE = '''"""A federated fine-tuning job: the recipe is in pyproject.toml."""

from fedcore.transports.flower.apps import client_app, configured_recipe, server_app

server = server_app()
client = client_app(configured_recipe)
'''

_LICENSE = "Whoever wrote the recipe in pyproject.toml decides under which terms it may be used.\n"


def write_app(
    recipe: Recipe,
    folder: Path,
    *,
    out: Path,
    timeout: float = ROUND_SECONDS,
    dependencies: Sequence[str] = (),
) -> Path:
    """Write ``recipe`` as an app into the empty ``folder`` and return it.

    Every node needs fedcore installed, and the model and texts that the recipe names: by the name
    of a package, or under the same path. Node i says who it is by ``partition-id=i``. With
    ``data.source = "sites"`` a node says which site it is, and where its own data are:
    ``site="NAME" data="FILE"``.

    Args:
        out: the run folder, on the server's machine; an existing run there is resumed.
        timeout: seconds that the server waits for the replies of a round.
        dependencies: packages beside Flower that Flower is to install for the app where it does
            that; with none, it uses what is installed.

    Raises:
        FedcoreError: ``folder`` is not empty or cannot be written, or the recipe cannot run behind
            Flower's messages.
    """
    try:
        import tomli_w
    except ImportError as error:
        raise missing_extra("tomli-w", "run") from error
    check_recipe(recipe)
    with writing(folder):
        free = is_free(folder)
    if not free:
        raise FedcoreError(f"{folder} is not empty; pass a folder that does not exist yet")
    name = "".join(c if c.isalnum() else "-" for c in recipe.name.lower()).strip("-") or "job"
    about = {
        "project": {
            "name": name,
            "version": "1.0.0",
            "description": recipe.description or f"fedcore recipe {recipe.name}",
            "license": {"file": "LICENSE"},
            "dependencies": [f"flwr>={version('flwr')}", *dependencies],
        },
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "fedcore",
                    "fab-format-version": 1,
                    "flwr-version-target": version("flwr"),
                    "components": {
                        "serverapp": "fedcore_job:server",
                        "clientapp": "fedcore_job:client",
                    },
                    "config": {
                        "recipe": to_toml(recipe),
                        "out": str(out.absolute()),
                        "timeout": timeout,
                    },
                }
            }
        },
    }
    texts = {
        "pyproject.toml": tomli_w.dumps(about),
        "fedcore_job.py": _MODULE,
        "LICENSE": _LICENSE,
    }
    write_files(folder, {name: text.encode() for name, text in texts.items()})
    return folder
