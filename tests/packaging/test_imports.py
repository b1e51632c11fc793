"""What importing the packages loads, and what must never be importable from here."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATHS = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "theory"))
ENVIRONMENT = {**os.environ, "PYTHONPATH": PATHS}
HEAVY = ("transformers", "peft", "triton", "flwr", "matplotlib", "typer", "pydantic", "datasets")


def run(code: str, *, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_folder_of_ours_is_a_package_called_kernels():
    for folder in ("kernels", "theory", "bench", "tests", "tests/kernels"):
        assert not (ROOT / folder / "__init__.py").exists()
    spec = importlib.util.find_spec("kernels")
    if spec is not None and spec.origin is not None:
        assert not Path(spec.origin).is_relative_to(ROOT / "kernels")


def test_transformers_and_peft_import_beside_us_from_the_root():
    code = (
        "import kernels, transformers, peft, fedcore; "
        "from transformers import BertModel, LlamaForCausalLM; "
        "print(kernels.__file__)"
    )
    assert str(ROOT / "kernels") not in run(code)


@pytest.mark.parametrize("package", ["fedcore", "fedcore_kernels", "fedcore_theory"])
def test_importing_loads_torch_alone(package):
    code = f"import sys, {package}; print([m for m in {HEAVY!r} if m in sys.modules])"
    # torch itself imports triton where it is installed; only what we add counts.
    base = run(f"import sys, torch; print([m for m in {HEAVY!r} if m in sys.modules])")
    assert run(code) == base


@pytest.mark.parametrize(
    "code",
    [
        "import fedcore; fedcore.aggregate",
        "import fedcore_theory.catalog",
        "from fedcore.data import ServerState",
        "from fedcore.transports.folders import FileServer",
    ],
)
def test_what_writes_no_run_folder_does_without_pydantic(code):
    run(f"import sys; sys.modules['pydantic'] = None; {code}")


@pytest.mark.parametrize(
    ("package", "extra"), [("typer", "run"), ("rich", "run"), ("peft", "peft")]
)
def test_a_missing_extra_is_named(package, extra, tmp_path):
    code = (
        "import sys\n"
        f"sys.modules[{package!r}] = None\n"
        f"sys.argv = ['fedcore', 'run', 'bbc-news', '--out', {str(tmp_path / 'run')!r}]\n"
        "from fedcore.cli import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as stop:\n"
        "    print(stop.code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=ENVIRONMENT,
    )
    assert done.stdout.strip() == "2"
    assert f"pip install 'fedcore-lora[{extra}]'" in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_wheel_holds_exactly_three_packages_and_the_recipes(tmp_path):
    import zipfile

    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--wheel-dir",
            str(tmp_path),
            str(ROOT),
        ],
        check=True,
        capture_output=True,
        timeout=300,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top == {"fedcore", "fedcore_kernels", "fedcore_theory"}
    shipped = ("recipes/bbc-news.toml", "reports/page.css", "reports/page.html.j2")
    assert {f"fedcore/{name}" for name in shipped} <= set(names)
    out = run(
        f"import sys; sys.path.insert(0, {str(wheel)!r}); import fedcore; print(fedcore.__file__)",
        cwd=tmp_path,
    )
    assert str(wheel) in out
