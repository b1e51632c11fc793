"""A folder that ``flwr run`` takes: a recipe as a Flower app."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from fedcore.data.folders import is_free, write_files, writing
from fedcore.engines.flower.apps import ROUND_SECONDS, check_recipe
from fedcore.errors import FedcoreError, missing_extra
from fedcore.recipes import Recipe, to_toml

_MODULE = '''"""A federated fine-tuning job: the recipe is in pyproject.toml."""

from fedcore.engines.flower.apps import client_app, configured_recipe, server_app

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
    of a package, or under the same path. Node i says who it is by ``partition-id=i``.

    Args:
        out: the run folder, on the server's machine; a run that is found there is gone on with.
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
