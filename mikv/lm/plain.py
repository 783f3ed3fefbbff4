"""Plain lm-eval on the same tasks, model and seed: the reference that the full cache must equal, sample by sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from mikv.lm.harness import Harness
from mikv.lm.model import quiet_construction
from mikv.models.load import Loaded, ModelSpec

# What of a document is compared: lm-eval's own record of it, by (task, document).
Samples = dict[tuple[str, int], dict[str, Any]]


def plain_lm(loaded: Loaded, batch_size: int) -> HFLM:
    """lm-eval's Hugging Face model. loaded: with stock attention (`load(spec, attention="sdpa")`)."""
    with quiet_construction():
        return HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, max_length=loaded.max_tokens, batch_size=batch_size)


def evaluate_plain(
    lm: HFLM, harness: Harness, spec: ModelSpec, limit: int | None, seed: int
) -> tuple[Mapping[str, Any], Samples]:
    """lm-eval's results, and its record of every document: `replies` (its resps) and `metrics` by `metric,filter`."""
    results = lm_eval.simple_evaluate(
        model=lm,
        tasks=harness.load(spec, seed),
        num_fewshot=harness.num_fewshot,
        limit=harness.count(limit),
        bootstrap_iters=0,
        system_instruction=harness.system,
        apply_chat_template=harness.chat,
        fewshot_as_multiturn=harness.multiturn,
        gen_kwargs=dict(harness.gen_kwargs) if harness.gen_kwargs else None,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    assert results is not None
    samples: Samples = {}
    for task, logged in results["samples"].items():
        for one in logged:  # one entry per filter
            sample = samples.setdefault((task, one["doc_id"]), {"replies": one["resps"], "metrics": {}})
            sample["metrics"] |= {f"{metric},{one['filter']}": one[metric] for metric in one["metrics"]}
    return results["results"], samples


def plain_requests(harness: Harness, spec: ModelSpec, limit: int | None, seed: int) -> tuple[str, list[Instance]]:
    """The requests that lm-eval makes of the tasks, and the method of its model that answers them."""
    work = harness.open(spec, limit, seed, "visible")
    instances = work.instances()
    (method,) = {instance.request_type for instance in instances}
    return method, instances
