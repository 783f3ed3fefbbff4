"""The engine as a model of lm-eval: its requests in, answers that felt the compressed cache out, for a whole panel.

lm-eval scores a continuation in one forward pass over context and continuation, which never reads a compressed cache, and
generates with a first token that saw the full one. Here the context's last token is held back: the rest is prefilled and
compressed, and everything that is scored or said comes from the compressed cache. Tokenization, truncation, stop sequences
and post-processing are lm-eval's own (its Hugging Face model is the base class), so that with the full cache the results are
those of plain lm-eval.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from mikv.engine import Engine
from mikv.engine.requests import Decoding, Generating, Generation, Prompt, Request, Response, Sampling, Scores, Scoring
from mikv.models.load import Loaded
from mikv.policy import Policy

# What of transformers' generation parameters is honoured; any other that would change an answer is refused.
_DECODING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_HARMLESS = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True, "num_beam_groups": 1}


@dataclass(frozen=True)
class StopStrings:
    """Ends an answer when one of some strings appears at its end, as lm-eval's stopping criterion looks for them."""

    strings: tuple[str, ...]
    lookback: int
    tokenizer: Any = field(compare=False, repr=False)

    def __call__(self, tokens: Sequence[int]) -> bool:
        text = self.tokenizer.decode(tokens[-self.lookback :])
        return any(string in text for string in self.strings)


@dataclass
class EncodedInstances:
    """Instances of one document as requests. places: for each instance the (request, continuation) that answer it; a rolling
    one has several. cut_tokens: what did not fit the model, of the longest instance."""

    requests: list[Request]
    places: list[list[tuple[int, int]]]
    cut_tokens: int = 0


@contextmanager
def quiet_construction() -> Iterator[None]:
    """lm-eval warns of models that it did not load itself."""
    logger = logging.getLogger("lm_eval.models.huggingface")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class PanelLM(HFLM):
    """lm-eval's Hugging Face model, over the compressed caches of a panel.

    `lm_eval.simple_evaluate(model=PanelLM(loaded, [policy("full"), policy("mikv")]), tasks=...)` evaluates the last policy.
    A run (mikv.runner) serves the whole panel in one pass through `encode` and `replies`.

    Args:
        loaded: model and tokenizer.
        panel: the first policy is the others' baseline; empty where only `encode` and `replies` are used.
        engine: None = one with the default reader.
        seed: of sampled answers.
        batch_size: prompts at a time.
        window, head: `loglikelihood_rolling` scores a document in windows of `window` tokens; all but the first begin with
            `head` tokens of context that were scored in the window before, and are compressed. window None = the model's
            limit. head 1 = lm-eval's own windows.
    """

    def __init__(
        self,
        loaded: Loaded,
        panel: Sequence[Policy] = (),
        engine: Engine | None = None,
        seed: int = 0,
        batch_size: int = 4,
        window: int | None = None,
        head: int = 1,
    ) -> None:
        with quiet_construction():
            super().__init__(
                pretrained=loaded.model, tokenizer=loaded.tokenizer, max_length=loaded.max_tokens, batch_size=batch_size
            )
        self._loaded, self._panel, self._seed = loaded, panel, seed
        self._engine = engine or Engine(loaded.model, loaded.end_tokens, loaded.tokenizer.pad_token_id or 0)
        self._engine.verify_kernels(panel)
        self._window = min(window or loaded.max_tokens, loaded.max_tokens)
        self._head = min(head, self._window)

    def encode(self, instances: Sequence[Instance]) -> EncodedInstances:
        """Requests of instances that belong together (a document's): continuations of one context are one request.

        Raises:
            ValueError: something that this model can't do.
        """
        encoded = EncodedInstances([], [[] for _ in instances])
        scoring: dict[tuple[int, ...], tuple[int, list[list[int]]]] = {}  # context -> (request, continuations)

        def score(place: int, context: list[int], continuation: list[int]) -> None:
            if len(continuation) > self.max_length:
                raise ValueError(f"{len(continuation)} tokens are to be scored, and the model's limit is {self.max_length}")
            encoded.cut_tokens = max(encoded.cut_tokens, len(context) + len(continuation) - self.max_length - 1)
            context = context[-(self.max_length + 1 - len(continuation)) :]
            request, continuations = scoring.setdefault(tuple(context), (len(encoded.requests), []))
            if not continuations:
                encoded.requests.append(Scoring(Prompt(context[:-1], context[-1:]), [continuation]))
            continuations.append(continuation)
            encoded.requests[request] = Scoring(encoded.requests[request].prompt, list(continuations))
            encoded.places[place].append((request, len(continuations) - 1))

        for place, instance in enumerate(instances):
            if instance.request_type == "loglikelihood":
                score(place, *self._pair(*instance.args))
            elif instance.request_type == "loglikelihood_rolling":
                for context, continuation in self._windows(instance.args[0]):
                    score(place, context, continuation)
            elif instance.request_type == "generate_until":
                for repeat in range(instance.repeats or 1):
                    request, cut = self._generating(instance.args[0], instance.args[1], repeat)
                    encoded.cut_tokens = max(encoded.cut_tokens, cut)
                    encoded.places[place].append((len(encoded.requests), 0))
                    encoded.requests.append(request)
            else:
                raise ValueError(f"requests of type {instance.request_type} are not supported")
        return encoded

    def replies(
        self, instances: Sequence[Instance], encoded: EncodedInstances, responses: Sequence[Response]
    ) -> list[list[Any]]:
        """What lm-eval calls `resps` of each instance (a list of as many as its repeats), from one policy's responses."""
        replies: list[list[Any]] = []
        for instance, places in zip(instances, encoded.places, strict=True):
            if instance.request_type == "generate_until":
                replies.append([self._text(responses[request], instance.args[1]) for request, _ in places])
                continue
            scored = []
            for request, continuation in places:
                scores = responses[request]
                assert isinstance(scores, Scores)
                scored.append(scores.continuations[continuation])
            if instance.request_type == "loglikelihood_rolling":
                replies.append([sum(one.logprob for one in scored)])
            else:
                replies.append([(scored[0].logprob, scored[0].greedy)] * (instance.repeats or 1))
        return replies

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids, as TemplateLM.loglikelihood makes them."""
        if context == "":
            ids = self.tok_encode(continuation, add_special_tokens=False)
            return ([self.prefix_token_id], ids) if ids[0] != self.prefix_token_id else (ids[:1], ids[1:])
        return self._encode_pair(context, continuation)

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        """(context, continuation) of each window; each token is in one continuation."""
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self._window,
            context_len=self._head,
        )
        return [make_disjoint_window(window) for window in windows]

    def _generating(self, context: str, gen_kwargs: Mapping[str, Any], repeat: int) -> tuple[Generating, int]:
        """The request, and how many tokens were cut on the left."""
        options = dict(normalize_gen_kwargs(dict(gen_kwargs), self.max_gen_toks))
        until = self._until(options.pop("until", None))
        new = int(options.pop("max_gen_toks"))
        room = self.max_length - new
        if room < 1:
            raise ValueError(f"max_gen_toks={new}: the model's limit is {self.max_length} tokens, prompt and answer together")
        tokens = self.tok_batch_encode([context])[0][0].tolist()
        kept = tokens[-room:]
        sampling, penalty = self._sampling(options)
        decoding = Decoding(new, sampling, penalty, self._stop(until))
        prompt = Prompt(kept[:-1], kept[-1:], repeat if sampling is not None else 0)
        return Generating(prompt, decoding), len(tokens) - len(kept)

    def _until(self, until: Any) -> list[str]:
        """Stop strings, the end token's text among them."""
        return handle_stop_sequences(until, eos=self.tok_decode(self.eot_token_id, skip_special_tokens=False))

    def _stop(self, until: Sequence[str]) -> StopStrings:
        strings = tuple(string for string in until if string)
        # two tokens more than the string has: it may come in another tokenization
        lookback = max(len(self.tokenizer.encode(string, add_special_tokens=False)) for string in strings) + 2
        return StopStrings(strings, lookback, self.tokenizer)

    def _sampling(self, options: Mapping[str, Any]) -> tuple[Sampling | None, float]:
        """Sampling and repetition penalty: what is asked for, else the model's own generation config."""
        config = self._loaded.model.generation_config
        for name, value in options.items():
            if name not in _DECODING and _HARMLESS.get(name) != value:
                raise ValueError(f"generation parameter {name}={value} is not supported; supported: {', '.join(_DECODING)}")

        def wanted(name: str, default: float) -> float:
            value = options.get(name, getattr(config, name, None))
            return default if value is None else value

        penalty = float(wanted("repetition_penalty", 1.0))
        if not options.get("do_sample"):
            return None, penalty
        sampling = Sampling(
            float(wanted("temperature", 1.0)), int(wanted("top_k", 0)), wanted("top_p", 1.0), wanted("min_p", 0.0), self._seed
        )
        return sampling, penalty

    def _text(self, response: Response, gen_kwargs: Mapping[str, Any]) -> str:
        assert isinstance(response, Generation)
        until = self._until(normalize_gen_kwargs(dict(gen_kwargs), self.max_gen_toks).get("until"))
        return postprocess_generated_text(self.tok_decode(response.tokens), stop=until, think_end_token=None)

    # lm-eval's own interface: all requests at once, the last policy's answers

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._serve(requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        return self._serve(requests, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return self._serve(requests, disable_tqdm)

    def _serve(self, instances: Sequence[Instance], quiet: bool) -> list[Any]:
        """One reply per instance; an instance that stands several times in the list (its repeats) gets one each time."""
        unique = list({id(instance): instance for instance in instances}.values())
        encoded = self.encode(unique)
        responses: dict[int, Response] = {}
        requests = {i: [request] for i, request in enumerate(encoded.requests)}
        with tqdm(total=len(requests), desc=self._panel[-1].label, unit="prompt", disable=quiet) as progress:
            for complete in self._engine.serve(requests, self._panel, int(self.batch_size), fidelity=False):
                responses |= {served.name: served.responses[-1][0] for served in complete}
                progress.update(len(complete))
        replies = self.replies(unique, encoded, [responses[i] for i in range(len(responses))])
        waiting = {id(instance): iter(own) for instance, own in zip(unique, replies, strict=True)}
        return [next(waiting[id(instance)]) for instance in instances]
