"""Features for statements about data: what is averaged, and when two encoders are the same."""

import torch

from fedcore.experiments.observer import Observer
from fedcore.experiments.setup import build_experiment
from fedcore.training.features import encoder_digest, mean_states
from tests.experiments.jobs import tiny_recipe


def bench_of(tmp_path, **settings):
    return build_experiment(tiny_recipe(tmp_path, **settings), Observer())


def test_padding_has_no_part_in_a_feature(tmp_path):
    bench = bench_of(tmp_path)
    found = mean_states(bench.model, bench.examples, batch_size=7)
    ids, mask = bench.examples.input_ids[3:4], bench.examples.attention_mask[3:4]
    length = int(mask.sum())
    assert length < mask.shape[1]
    with torch.no_grad():
        bench.model.eval()
        states = bench.model(
            input_ids=ids[:, :length],
            attention_mask=mask[:, :length],
            output_hidden_states=True,
        ).hidden_states[-1]
    torch.testing.assert_close(found[3], states[0].mean(dim=0), rtol=1e-4, atol=1e-5)
    assert found.shape == (len(bench.examples), 32)


def test_training_leaves_the_digest_and_another_encoder_does_not(tmp_path):
    bench = bench_of(tmp_path)
    before = encoder_digest(bench.model)
    bench.binding.load(torch.randn(bench.binding.layout.size))
    assert torch.equal(encoder_digest(bench.model), before)
    frozen = next(p for p in bench.model.parameters() if not p.requires_grad)
    with torch.no_grad():
        frozen.view(-1)[0] += 1e-3
    assert not torch.equal(encoder_digest(bench.model), before)


def test_every_client_names_its_encoder(tmp_path):
    settings = {"method.name": "ce_lora", "method.min_per_component": 2}
    told = bench_of(tmp_path, **settings).statistics
    assert len(told) == 4
    digests = {bytes(found["encoder"].tolist()) for found in told.values()}
    assert len(digests) == 1


def test_a_client_with_too_few_examples_of_every_class_tells_nothing(tmp_path):
    settings = {"method.name": "ce_lora", "method.min_per_component": 1000}
    assert bench_of(tmp_path, **settings).statistics == {}
