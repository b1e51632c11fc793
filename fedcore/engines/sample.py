"""One held-out text continued by the model as it was and as it became."""

from __future__ import annotations

from torch import Tensor

from fedcore.data.server_state import ServerState
from fedcore.engines.client_models import client_row
from fedcore.engines.workbench import Workbench
from fedcore.federation.records import Sample
from fedcore.training.generation import continue_greedily

PROMPT = 16
"""Tokens that are given, or half of a text that has fewer than twice as many."""

CONTINUATION = 24
"""Tokens that are written."""


def generation_sample(bench: Workbench, start: Tensor, state: ServerState) -> Sample:
    """The beginning of a held-out text, its own continuation, and the two models'.

    The text is the first held-out one of the most tokens. Where every client has a model of its
    own, the first client's is asked.

    Args:
        start: ``(P,)``, the row before any training.
    """
    tokens = bench.examples.attention_mask[bench.test].sum(dim=1)
    chosen = int(bench.test[int(tokens.argmax())])
    length = int(tokens.max())
    text = bench.examples.input_ids[chosen, :length]
    given = min(PROMPT, length // 2)
    end = bench.tokenizer.eos_token_id

    def continued(row: Tensor) -> str:
        bench.binding.load(row)
        return _words(bench, continue_greedily(bench.model, text[:given], CONTINUATION, end))

    bench.residual.load({})
    before = continued(start)
    bench.residual.load(state.residual)
    own = bench.trainers[0] if bench.method.traits.personalised else None
    after = continued(state.row if own is None else client_row(bench, state, own))
    return Sample(
        domain=bench.label_names[int(bench.examples.labels[chosen])],
        client=own,
        prompt=_words(bench, text[:given]),
        reference=_words(bench, text[given : given + CONTINUATION]),
        before=before,
        after=after,
    )


def _words(bench: Workbench, tokens: Tensor) -> str:
    found: str = bench.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
    return found
