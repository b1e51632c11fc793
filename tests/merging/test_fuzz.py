"""Damaged folders: a FedcoreError and nothing written, or the definition of what was read."""

import random
import shutil
import warnings
from collections import Counter
from math import isfinite

import pytest
import torch

from fedcore import FedcoreError, aggregate
from tests.property.bounds import bounded, size_of
from tests.property.folders import lora_folder
from tests.property.mutations import MUTATIONS, cut_or_grow, flip_bytes
from tests.reference.merged import folder_products, mean_products, stored_tensors

FEW, ALL = 250, 3000


@pytest.mark.parametrize(
    "seeds",
    [range(FEW), pytest.param(range(FEW, ALL), marks=pytest.mark.exhaustive)],
    ids=["few", "rest"],
)
def test_damaged_folders_are_refused_or_read_right(tmp_path, seeds):
    good = lora_folder(tmp_path / "good", 1, head=True)
    whole = {
        dtype: lora_folder(tmp_path / str(dtype)[6:], 2, head=True, dtype=dtype)
        for dtype in (torch.float32, torch.float64, torch.bfloat16)
    }
    kept = {path.name for path in tmp_path.iterdir()}
    out, seen = tmp_path / "out", Counter()
    for seed in seeds:
        rng = random.Random(seed)
        broken = tmp_path / "broken"
        shutil.copytree(whole[rng.choice(list(whole))], broken)
        mutation = MUTATIONS[seed % len(MUTATIONS)]
        mutation(rng, broken)
        if rng.random() < 0.1 and _standing(broken):
            rng.choice([flip_bytes, cut_or_grow])(rng, broken)
        folders = [good, broken] if rng.random() < 0.5 else [broken, good]
        rank = rng.choice([None, 3, 6])
        method = rng.choice(["flora", "product_svd"])
        refused = None
        try:
            with bounded(size_of(*folders)), warnings.catch_warnings():
                warnings.simplefilter("error")
                aggregate(
                    folders,
                    [1, 3],
                    method=method,
                    rank=rank if method == "product_svd" else None,
                    out=out,
                    dtype="fp64",
                    compare=seed % 8 == 0,
                )
        except FedcoreError as error:
            refused = str(error)
        seen[refused is None] += 1
        if refused is None:
            _check(folders, out, method, seed)
            shutil.rmtree(out)
        else:
            # One line of a length that can be shown, whatever the file held.
            assert "\n" not in refused, seed
            assert len(refused) < 2000, seed
        for rest in (broken, tmp_path / "broken.kept"):
            if rest.is_dir():
                shutil.rmtree(rest)
            else:
                rest.unlink(missing_ok=True)
        assert {path.name for path in tmp_path.iterdir()} == kept, seed
    # Both ends of the range are reached, so neither half of the promise is empty.
    assert seen[False] > len(seeds) / 2
    assert seen[True] > len(seeds) / 20


def _standing(folder):
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size > 100
        for name in ("adapter_model.safetensors", "adapter_config.json")
    )


def _norm(matrix):
    """The Frobenius norm of numbers whose squares may overflow."""
    largest = float(matrix.abs().max()) if matrix.numel() else 0.0
    return largest * float((matrix / largest).norm()) if largest else 0.0


def _check(folders, out, method, seed):
    wanted = mean_products(folders, [1, 3])
    written = folder_products(out)
    assert written.keys() == wanted.keys(), seed
    for module, matrix in wanted.items():
        size = sum(_norm(folder_products(folder)[module]) for folder in folders)
        if not isfinite(size):
            # The definition itself overflows fp64; stacks of finite factors do not.
            assert method == "flora", seed
            continue
        bound = 0.0
        if method == "product_svd":
            kept = stored_tensors(out)[f"base_model.model.{module}.lora_A.weight"].shape[0]
            bound = _norm(torch.linalg.svdvals(matrix)[kept:])
        lost = _norm(written[module] - matrix)
        assert lost <= bound + 1e-5 * size, (seed, module)
    heads = [stored_tensors(folder)["base_model.model.classifier.weight"] for folder in folders]
    mean = heads[0].double() / 4 + 3 * heads[1].double() / 4
    found = stored_tensors(out)["base_model.model.classifier.weight"].double()
    torch.testing.assert_close(found, mean, rtol=1e-5, atol=1e-6 * float(mean.abs().max()))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_damaged_adapter_that_may_be_dropped_is_left_out_or_read_right(tmp_path, mutation):
    good = lora_folder(tmp_path / "good", 1, head=True)
    expected = aggregate([good], compare=False).adapter.to_peft()
    for seed in range(4):
        broken = lora_folder(tmp_path / f"broken{seed}", 2, head=True)
        mutation(random.Random(seed), broken)
        found = aggregate([good, broken], on_invalid="drop", compare=False)
        names = [dropped.client_id for dropped in found.dropped]
        assert names in ([], [str(broken)])
        if names:
            state = found.adapter.to_peft()
            assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())
